//! Forks: keeps mapped objects until no forked child can see them.
//!
//! ```text
//!  this process   map ───────── fork ────── drop ────────────▶ release, once no child is left
//!                                │  reads a pipe, which is open until ...
//!  a child                       └─ holds its other end ──── ... the child ends, and its children
//! ```
//!
//! A forked child sees the same pages. The parent, which got them from Ray's store, must not
//! release them before the child has ended: the store would reuse them for other objects.

use std::cell::Cell;
use std::io::{self, PipeReader, PipeWriter};
use std::mem;
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use crate::platform;

/// How often the thread that waits for children looks for new ones to wait for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The moment when something was mapped. Forks are followed while one of these lives.
#[derive(Debug)]
pub struct Since {
    /// The number of forks before it ...
    forks: u64,
    /// ... and this process's id.
    process: u32,
}

/// A pipe whose other end a child holds. `None` if the system had no pipe left: then the child
/// counts as alive.
type Life = Option<Arc<PipeReader>>;

struct Deferred {
    children: Vec<Life>,
    release: Box<dyn FnOnce() + Send>,
}

struct Forks {
    count: u64,
    children: Vec<(u64, Life)>,
    deferred: Vec<Deferred>,
    /// Whether a thread waits for the deferred releases.
    watched: bool,
}

/// The forks of this process.
static FORKS: Mutex<Forks> =
    Mutex::new(Forks { count: 0, children: Vec::new(), deferred: Vec::new(), watched: false });

/// How many [`Since`] exist.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// This process's id, unless it was forked without our handlers.
static PROCESS: AtomicU32 = AtomicU32::new(0);

impl Since {
    /// The present moment.
    pub fn now() -> Since {
        static START: Once = Once::new();
        START.call_once(|| {
            PROCESS.store(process::id(), Ordering::Relaxed);
            platform::at_fork(before, after, after_in_child);
        });
        MAPPED.fetch_add(1, Ordering::SeqCst);
        Since { forks: forks().count, process: process::id() }
    }

    /// Whether this is a forked child of the process that mapped.
    pub fn is_inherited(&self) -> bool {
        self.process != process::id()
    }

    /// Calls `release` when no child is left that was forked since: now, or later on another
    /// thread. In a child it is never called: the parent releases.
    pub fn release_after(self, release: impl FnOnce() + Send + 'static) {
        if self.is_inherited() {
            return mem::forget(release);
        }
        let mut forks = forks();
        if forks.count > self.forks {
            forks.forget_the_dead();
            let since = forks.children.iter().filter(|(number, _)| *number > self.forks);
            let children: Vec<_> = since.map(|(_, life)| life.clone()).collect();
            if !children.is_empty() {
                return forks.defer(Deferred { children, release: Box::new(release) });
            }
        }
        drop(forks);
        release();
    }
}

impl Drop for Since {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Forks {
    fn forget_the_dead(&mut self) {
        self.children.retain(|(_, life)| is_alive(life));
    }

    fn defer(&mut self, deferred: Deferred) {
        self.deferred.push(deferred);
        if !self.watched {
            // without a thread, the next release that is deferred tries again
            let thread = thread::Builder::new().name("rzc.forks".into());
            self.watched = thread.spawn(watch).is_ok();
        }
    }
}

fn forks() -> MutexGuard<'static, Forks> {
    FORKS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_alive(life: &Life) -> bool {
    !life.as_ref().is_some_and(|pipe| platform::wait_for_end(&[&**pipe], Duration::ZERO))
}

/// Calls deferred releases until none is left.
fn watch() {
    while {
        let lives: Vec<_> = {
            let forks = forks();
            let children = forks.deferred.iter().flat_map(|deferred| &deferred.children);
            children.flatten().cloned().collect()
        };
        let pipes: Vec<_> = lives.iter().map(|life| &**life).collect();
        platform::wait_for_end(&pipes, LOOK_EVERY);
        let mut forks = forks();
        for deferred in &mut forks.deferred {
            deferred.children.retain(is_alive);
        }
        let ready = forks.deferred.extract_if(.., |deferred| deferred.children.is_empty());
        let ready: Vec<_> = ready.collect();
        forks.watched = !forks.deferred.is_empty();
        let watched = forks.watched;
        drop(forks);
        ready.into_iter().for_each(|deferred| (deferred.release)());
        watched
    } {}
}

/// Held by a thread that forks, so that nothing is released during the fork.
struct Fork {
    forks: MutexGuard<'static, Forks>,
    pipe: Option<(PipeReader, PipeWriter)>,
}

thread_local! {
    static FORK: Cell<Option<Fork>> = const { Cell::new(None) };
}

extern "C" fn before() {
    if PROCESS.load(Ordering::Relaxed) == process::id() {
        let forks = forks();
        let pipe = (MAPPED.load(Ordering::SeqCst) > 0).then(io::pipe);
        FORK.set(Some(Fork { forks, pipe: pipe.and_then(Result::ok) }));
    }
}

extern "C" fn after() {
    if let Some(Fork { mut forks, pipe }) = FORK.take()
        && MAPPED.load(Ordering::SeqCst) > 0
    {
        forks.forget_the_dead();
        forks.count += 1;
        let child = (forks.count, pipe.map(|(read, _)| Arc::new(read)));
        forks.children.push(child);
    }
}

extern "C" fn after_in_child() {
    if let Some(Fork { mut forks, pipe }) = FORK.take() {
        PROCESS.store(process::id(), Ordering::Relaxed);
        if let Some((_, write)) = pipe {
            mem::forget(write); // open until the child ends
        }
        mem::forget(mem::take(&mut forks.deferred)); // only the parent releases these
        forks.children.clear();
        forks.watched = false;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A child that lives until its pipe is closed.
    struct Child(Option<PipeWriter>);

    impl Child {
        #[allow(unsafe_code)]
        fn fork() -> Child {
            let (read, write) = io::pipe().unwrap();
            // SAFETY: the child only reads, and ends.
            match unsafe { libc::fork() } {
                0 => {
                    drop(write);
                    platform::wait_for_end(&[&read], Duration::from_secs(60));
                    // SAFETY: as above.
                    unsafe { libc::_exit(0) }
                }
                _ => Child(Some(write)),
            }
        }
    }

    /// Whether it is released within a time.
    fn release(since: Since) -> impl Fn(Duration) -> bool {
        let (released, told) = mpsc::channel();
        since.release_after(move || released.send(()).unwrap());
        move |timeout| told.recv_timeout(timeout).is_ok()
    }

    // a single test: children of another one would see what this one maps
    #[test]
    fn what_a_child_sees_is_released_when_the_last_has_ended() {
        let (short, long) = (Duration::from_millis(50), Duration::from_secs(60));
        assert!(release(Since::now())(Duration::ZERO));
        let before = Since::now();
        let mut one = Child::fork();
        let between = Since::now();
        let mut other = Child::fork();
        let after = Since::now();
        assert!(release(after)(Duration::ZERO));
        let (before, between) = (release(before), release(between));
        assert!(!before(short) && !between(short));
        other.0.take();
        assert!(between(long) && !before(short));
        one.0.take();
        assert!(before(long));
        let last = Since::now();
        Child::fork();
        assert!(release(last)(long));
        assert!(forks().deferred.is_empty());
    }
}
