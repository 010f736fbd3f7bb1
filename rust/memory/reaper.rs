//! Reaper: a thread that unmaps large memory, so that dropping it does not block.
//!
//! ```text
//!  dropped ─▶ queue ─▶ rzc.reaper: discards 8 MiB at a time ─▶ unmaps
//! ```
//!
//! To unmap, the kernel takes each page out of the page table. A thread that drops 400 MiB would
//! hold the interpreter that long (two busy cores: 76 ms; the queue: 0.3). The kernel also holds
//! the lock of the process's mappings, so the reaper discards one piece at a time.

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

/// Smaller memory is unmapped at once, because a thread costs as much.
const LARGE_NBYTES: usize = 4 << 20;

/// Bytes discarded at a time. In between, other threads can change the mappings.
const PIECE_NBYTES: usize = 8 << 20;

/// The longest queue. Beyond it the dropping thread unmaps: a process may have 65,530 mappings.
const WAITING: usize = 64;

/// How long a new mapping that finds no room waits for the queue to be unmapped.
const SETTLE: Duration = Duration::from_secs(1);

/// Memory that is unmapped when dropped. Then nobody uses it any more.
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

/// Mapped memory. If it is large, the reaper unmaps it.
#[derive(Debug)]
pub struct Reaped<M: Mapped>(ManuallyDrop<M>);

impl<M: Mapped> Reaped<M> {
    /// Maps. If the system has no room, waits until all dropped memory is unmapped, and tries
    /// again.
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
        // SAFETY: `drop` runs once, and nobody uses the value afterwards.
        let map = unsafe { ManuallyDrop::take(&mut self.0) };
        if map.region().nbytes >= LARGE_NBYTES {
            static START: Once = Once::new();
            START.call_once(|| platform::at_fork(before, after, after_in_child));
            let refused = reaper().take(map);
            drop(refused); // after the lock is released
        }
    }
}

struct Reaper {
    /// Mappings to be unmapped. Part of the first may be discarded already.
    queue: VecDeque<Box<dyn Mapped>>,
    at_work: bool,
}

static REAPER: Mutex<Reaper> = Mutex::new(Reaper { queue: VecDeque::new(), at_work: false });
static IDLE: Condvar = Condvar::new();

fn reaper() -> MutexGuard<'static, Reaper> {
    REAPER.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reaper {
    /// Queues a mapping, or returns it, to be unmapped by the caller.
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

/// Unmaps until the queue is empty.
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
            // SAFETY: it is mapped while it is in the queue, and its owner has dropped it.
            unsafe { platform::discard(piece) };
        }
        // a fork must find in the queue all that is mapped, so the unmap happens under the lock;
        // little is left of it
        reaper().queue.pop_front();
    }
}

/// New memory of this process. Waits for dropped memory first, so that a process never holds two
/// copies.
pub fn memory(nbytes: usize) -> Result<Reaped<MmapMut>> {
    settle();
    let map = MmapMut::map_anon(nbytes).map(Reaped::from);
    map.map_err(|error| Error::refused(format!("a copy of {nbytes} bytes"), &error))
}

/// Waits until all dropped memory is unmapped. False after a timeout.
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
        reaper.at_work = false; // the child does not have the thread
        reaper.queue.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Memory that counts its mapped bytes.
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

    // a single test: another's queue and forks would disturb this one's
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
        // SAFETY: the child only looks at its own memory, and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(map(LARGE_NBYTES));
            let gone = settle() && mapped.load(Ordering::SeqCst) == 0;
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!gone)) }
        }
        let mut status = -1;
        // SAFETY: a child and an integer of this test.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(settle());
        assert_eq!(mapped.load(Ordering::SeqCst), 0);
    }
}
