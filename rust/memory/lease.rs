//! Leases: the pages of a file keep their bytes, whatever happens to the file.
//!
//! ```text
//!  pages ─▶ file, leased                 another process opens the file for writing, and waits
//!  pages ─▶ memory of this process       our thread copies the pages, and releases the lease
//!           file                         the other process continues
//! ```
//!
//! A forked child inherits the open files with their leases, but not the thread. So before a fork
//! each file is opened and leased a second time, for the child.
//!
//! A thread must not wait for the table with the interpreter's lock: a fork holds the table, and
//! runs Python meanwhile.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use crate::memory::reaper::Reaped;
use crate::platform::{self, Map};

/// The leases of this process.
#[derive(Debug)]
pub struct Leases {
    held: Vec<Held>,
    /// The thread that the kernel tells when a lease is broken.
    thread: Option<i32>,
}

#[derive(Debug)]
struct Held {
    file: File,
    name: String,
    map: Weak<Reaped<Map>>,
    /// The file opened a second time, for a child.
    passed: Option<File>,
}

/// Stands for a lease. Drop it after the pages: then the lease ends.
#[derive(Debug)]
pub struct Lease(());

static LEASES: Mutex<Leases> = Mutex::new(Leases { held: Vec::new(), thread: None });

thread_local! {
    /// The table, while this thread forks.
    static FORKING: RefCell<Option<MutexGuard<'static, Leases>>> = const { RefCell::new(None) };
}

impl Leases {
    /// The leases of this process. No fork happens while the guard lives.
    pub fn get() -> MutexGuard<'static, Leases> {
        LEASES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a lease: the file keeps its bytes from now on, at least until `cover`.
    pub fn take(&mut self, file: &File) -> io::Result<()> {
        let thread = match self.thread {
            Some(thread) => thread,
            None => *self.thread.insert(platform::watch(serve)?),
        };
        platform::lease(file, thread)
    }

    /// Makes a lease last as long as the mapping of its file.
    pub fn cover(&mut self, file: File, name: String, map: &Arc<Reaped<Map>>) -> Lease {
        self.held.push(Held { file, name, map: Arc::downgrade(map), passed: None });
        self.serve(); // the thread has found no entry for a lease that was broken before
        Lease(())
    }

    /// Copies the pages of each file that another process waits for.
    fn serve(&mut self) {
        self.held.retain(|held| match held.map.upgrade() {
            Some(map) if !platform::is_leased(&held.file) => {
                held.give_up(&map);
                false
            }
            map => map.is_some(),
        });
    }
}

impl Held {
    /// Copies the pages, and lets other processes have the file.
    fn give_up(&self, map: &Map) {
        if let Err(error) = map.own().and_then(|()| platform::release(&self.file)) {
            map.forbid(); // the pages may have other bytes now
            eprintln!(
                "ray-zerocopy: another process changed {}, and this process could not copy its weights \
                 ({error}). To use them is now a segmentation fault: open the file again",
                self.name
            );
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let_go();
    }
}

/// Ends the leases of files that are no longer mapped. If another thread holds the table, that one
/// does it later.
pub fn let_go() {
    match LEASES.try_lock() {
        Ok(mut leases) => leases.held.retain(|held| held.map.strong_count() > 0),
        Err(TryLockError::Poisoned(_) | TryLockError::WouldBlock) => {}
    }
}

fn serve() {
    Leases::get().serve();
}

/// Call before a fork, in the thread that forks. Then call one of the next two.
pub fn before_fork() {
    let mut leases = Leases::get();
    let thread = leases.thread.unwrap_or_default();
    leases.held.retain_mut(|held| {
        let Some(map) = held.map.upgrade() else { return false };
        let passed = platform::reopen(&held.file);
        let passed = passed.and_then(|file| platform::lease(&file, thread).map(|()| file));
        if passed.is_err() {
            held.give_up(&map); // another process waits: the child gets a copy
        }
        held.passed = passed.ok();
        held.passed.is_some()
    });
    FORKING.set(Some(leases));
}

/// Call in the parent after a fork, also one that failed.
pub fn after_fork_in_parent() {
    if let Some(mut leases) = FORKING.take() {
        leases.held.iter_mut().for_each(|held| held.passed = None);
        leases.serve();
    }
}

/// Call in the child after a fork.
pub fn after_fork_in_child() {
    let Some(mut leases) = FORKING.take() else { return };
    leases.thread = None;
    if leases.held.is_empty() {
        return;
    }
    leases.thread = platform::watch(serve).ok();
    let thread = leases.thread;
    leases.held.retain_mut(|held| {
        let Some((map, passed)) = held.map.upgrade().zip(held.passed.take()) else { return false };
        held.file = passed;
        let told = thread.is_some_and(|thread| platform::tell(&held.file, thread).is_ok());
        if !told {
            held.give_up(&map);
        }
        told
    });
    leases.serve();
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
#[allow(unsafe_code)] // reads and writes what it has mapped
mod tests {
    use std::{fs, thread};

    use super::*;

    #[test]
    fn leased_pages_stay_what_they_were_and_what_was_written_there_too() {
        let path = std::env::temp_dir().join(format!("rzc-lease-{}", std::process::id()));
        let bytes: Vec<_> = (0..300_000_u32).map(|index| (index / 7) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let mut leases = Leases::get();
        leases.take(&file).unwrap();
        let map = Arc::new(Reaped::from(Map::private(&file, 5000, 250_000).unwrap()));
        let lease = leases.cover(file, "a test".into(), &map);
        drop(leases);
        let address = map.region().address;
        // SAFETY: the pages are the test's own, and nobody else reads them.
        unsafe { *((address + 70_000) as *mut u8) = 99 };
        let writer = thread::spawn({
            let path = path.clone();
            move || fs::write(path, [1; 100]) // truncates it first
        });
        writer.join().unwrap().unwrap();
        // SAFETY: nobody writes any more.
        let found = unsafe { map.region().bytes() };
        assert_eq!(found[70_000], 99);
        assert_eq!(found[..70_000], bytes[5000..75_000]);
        assert_eq!(found[70_001..], bytes[75_001..255_000]);
        assert!(Leases::get().held.is_empty());
        fs::remove_file(&path).unwrap();
        drop((map, lease));
    }

    #[test]
    fn a_lease_ends_with_its_pages_and_is_refused_of_a_file_that_is_written() {
        let path = std::env::temp_dir().join(format!("rzc-lent-{}", std::process::id()));
        fs::write(&path, [0; 100]).unwrap();
        let writer = File::options().write(true).open(&path).unwrap();
        let file = File::open(&path).unwrap();
        assert!(Leases::get().take(&file).is_err());
        drop(writer);
        Leases::get().take(&file).unwrap();
        drop(file);
        File::options().write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
    }
}
