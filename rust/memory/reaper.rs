//! Reaper: a thread that unmaps what is large, so that whoever drops it goes on.
//!
//! ```text
//!  dropped ─▶ queue ─▶ rzc.reaper: gives back 8 MiB at a time ─▶ unmaps
//! ```
//!
//! The kernel takes each page out of the page table: who drops 400 MiB would hold up the interpreter, 76 ms on
//! two busy cores, where the queue takes 0.3.
//! It holds the lock of the process's mappings, too: hence one piece at a time.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::memory::region::Region;
use crate::platform::{self, Map};

/// What is smaller is unmapped at once: a thread costs as much.
const LARGE_NBYTES: usize = 4 << 20;

/// What is given back before another thread can change the mappings.
const PIECE_NBYTES: usize = 8 << 20;

/// How many mappings wait at most. Who drops more unmaps them: a process may have 65,530.
const WAITING: usize = 64;

/// How long a mapping for which there is no room waits for others to go.
const SETTLE: Duration = Duration::from_secs(1);

/// Memory that is unmapped when it is dropped, and counts for nobody then.
pub trait Mapped: Send + 'static {
    /// The bytes.
    fn region(&self) -> Region;
}

impl Mapped for Map {
    fn region(&self) -> Region {
        self.region()
    }
}

impl Mapped for MmapMut {
    fn region(&self) -> Region {
        Region::of(self)
    }
}

/// Mapped memory that the reaper unmaps, where that takes long.
#[derive(Debug)]
pub struct Reaped<M: Mapped>(ManuallyDrop<M>);

impl<M: Mapped> Reaped<M> {
    /// Maps; where the system has no room, once more when all that was dropped is unmapped.
    pub fn map(mut map: impl FnMut() -> io::Result<M>) -> io::Result<Reaped<M>> {
        let mapped = map().or_else(|error| match error.kind() {
            io::ErrorKind::OutOfMemory if settle() => map(),
            _ => Err(error),
        });
        mapped.map(Reaped::from)
    }
}

impl<M: Mapped> From<M> for Reaped<M> {
    fn from(map: M) -> Reaped<M> {
        Reaped(ManuallyDrop::new(map))
    }
}

impl<M: Mapped> Deref for Reaped<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.0
    }
}

impl<M: Mapped> DerefMut for Reaped<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.0
    }
}

impl<M: Mapped> Drop for Reaped<M> {
    fn drop(&mut self) {
        // SAFETY: once, and nobody has it any more.
        let map = unsafe { ManuallyDrop::take(&mut self.0) };
        if map.region().nbytes >= LARGE_NBYTES {
            static START: Once = Once::new();
            START.call_once(|| platform::at_fork(before, after, after_in_child));
            let refused = reaper().take(map);
            drop(refused); // where nobody waits for the lock
        }
    }
}

struct Reaper {
    /// What is to be unmapped, the first in part, perhaps.
    queue: VecDeque<Box<dyn Mapped>>,
    at_work: bool,
}

static REAPER: Mutex<Reaper> = Mutex::new(Reaper { queue: VecDeque::new(), at_work: false });
static IDLE: Condvar = Condvar::new();

fn reaper() -> MutexGuard<'static, Reaper> {
    REAPER.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reaper {
    /// Takes what it can; gives back what the caller is to unmap.
    fn take<M: Mapped>(&mut self, map: M) -> Option<M> {
        if !self.at_work {
            let thread = thread::Builder::new().name("rzc.reaper".into());
            self.at_work = thread.spawn(work).is_ok();
        }
        if !self.at_work || self.queue.len() == WAITING {
            return Some(map);
        }
        self.queue.push_back(Box::new(map));
        None
    }
}

/// Unmaps what is in the queue, until nothing is.
fn work() {
    loop {
        let mut waiting = reaper();
        let Some(Region { address, nbytes }) = waiting.queue.front().map(|map| map.region()) else {
            waiting.at_work = false;
            return IDLE.notify_all();
        };
        drop(waiting);
        for start in (0..nbytes).step_by(PIECE_NBYTES) {
            let piece = address + start..address + nbytes.min(start + PIECE_NBYTES);
            // SAFETY: mapped, as the queue has it; whoever had it before has dropped it.
            unsafe { platform::discard(piece) };
        }
        // a fork finds in the queue whatever is mapped: it is unmapped under the lock, when nothing is left
        reaper().queue.pop_front();
    }
}

/// Memory of this process alone. What was dropped before is free by then: two copies are never held at once.
pub fn memory(nbytes: usize) -> Result<Reaped<MmapMut>> {
    settle();
    let map = MmapMut::map_anon(nbytes).map(Reaped::from);
    map.map_err(|error| Error::refused(format!("a copy of {nbytes} bytes"), &error))
}

/// Waits until all that was dropped is unmapped; says whether it is.
fn settle() -> bool {
    let working = |reaper: &mut Reaper| reaper.at_work;
    let waited = IDLE.wait_timeout_while(reaper(), SETTLE, working);
    !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
}

thread_local! {
    /// The queue, while this thread forks.
    static FORKING: Cell<Option<MutexGuard<'static, Reaper>>> = const { Cell::new(None) };
}

extern "C" fn before() {
    FORKING.set(Some(reaper()));
}

extern "C" fn after() {
    FORKING.take();
}

extern "C" fn after_in_child() {
    if let Some(mut reaper) = FORKING.take() {
        reaper.at_work = false; // the thread was left behind
        reaper.queue.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Memory that counts how much of it is mapped.
    struct Counted(MmapMut, Arc<AtomicUsize>);

    impl Counted {
        fn new(nbytes: usize, mapped: &Arc<AtomicUsize>) -> io::Result<Counted> {
            mapped.fetch_add(1, Ordering::SeqCst);
            MmapMut::map_anon(nbytes).map(|map| Counted(map, Arc::clone(mapped)))
        }
    }

    impl Mapped for Counted {
        fn region(&self) -> Region {
            self.0.region()
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::SeqCst);
        }
    }

    // one test, as others' queues and forks are this one's
    #[test]
    fn what_is_dropped_is_unmapped_before_long_also_by_a_child() {
        let mapped = Arc::new(AtomicUsize::new(0));
        let map = |nbytes| Reaped::map(|| Counted::new(nbytes, &mapped)).unwrap();
        drop(map(LARGE_NBYTES - 1));
        assert_eq!(mapped.load(Ordering::SeqCst), 0, "small: at once");
        for _ in 0..5 * WAITING {
            let mut large = map(3 * PIECE_NBYTES / 2);
            large.0.0.fill(1);
            drop(large);
            assert!(mapped.load(Ordering::SeqCst) <= WAITING + 1);
        }
        let held = (0..WAITING / 2).map(|_| map(LARGE_NBYTES)).collect::<Vec<_>>();
        drop(held);
        // SAFETY: the child looks at its own memory, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(map(LARGE_NBYTES));
            let gone = settle() && mapped.load(Ordering::SeqCst) == 0;
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!gone)) }
        }
        let mut status = -1;
        // SAFETY: a child of our own, and an integer of our own.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(settle());
        assert_eq!(mapped.load(Ordering::SeqCst), 0);
    }
}
