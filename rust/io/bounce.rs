//! The bounce buffer: each thread reads file bytes into a slot of it, and copies them to the
//! target.

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::format::checksum::CHUNK;
use crate::platform::{self, HUGE};

/// The alignment of reads past the page cache. No disk has larger blocks.
pub const BLOCK: usize = 4096;

/// Bytes of a thread's slot: a chunk, and the rest of the disk blocks at its ends.
const SLOT: usize = CHUNK + BLOCK;

/// The slots of all threads. A page that no thread touches takes no memory.
///
/// For reads from a disk, huge pages if the system has any: small pages lie scattered, and a disk
/// takes only a few hundred pieces of memory per request. (Eight threads read 755 MiB into huge
/// pages in 200 ms, into small ones in 300 to 600.) For reads from the page cache, small pages,
/// which are always cheap.
#[derive(Debug)]
pub struct Bounce(MmapMut);

impl Bounce {
    /// Makes room for this many threads.
    pub fn new(slots: usize, huge: bool) -> Result<Bounce> {
        let nbytes = (slots * SLOT).next_multiple_of(HUGE) + HUGE; // it may start after a small page
        let refused = |error| Error::refused(format!("a read buffer of {nbytes} bytes"), &error);
        let map = MmapMut::map_anon(nbytes).map_err(refused)?;
        platform::prefer_huge(&map, huge);
        Ok(Bounce(map))
    }

    /// All slots.
    pub fn slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let before = self.0.as_ptr().addr().wrapping_neg() % HUGE;
        self.0[before..].chunks_exact_mut(SLOT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_slot_for_each_thread() {
        for threads in 1..=64 {
            let mut bounce = Bounce::new(threads, true).unwrap();
            let slots: Vec<_> = bounce.slots().take(threads).collect();
            assert_eq!(slots.len(), threads);
            assert!(slots.iter().all(|slot| slot.as_ptr().addr() % BLOCK == 0));
        }
    }
}
