//! Bounce buffer: what threads read files into, on the way to their place.

use memmap2::MmapMut;

use crate::error::{Error, Result};
use crate::format::checksum::CHUNK;
use crate::platform::{self, HUGE};

/// The alignment of what is read past the page cache: that of no disk's blocks is larger.
pub const BLOCK: usize = 4096;

/// What a thread reads into: a chunk, and the rest of the blocks at its ends.
const SLOT: usize = CHUNK + BLOCK;

/// Memory that threads read into, each into a slot of its own; a page that is not touched is none.
///
/// For a disk huge pages, if there are some: small ones lie anywhere, and a disk takes a few hundred
/// pieces of memory at once. Eight threads read 755 MiB in 300 to 600 ms into them, in 200 into huge
/// ones. For the page cache small ones, which are never dear.
#[derive(Debug)]
pub struct Bounce(MmapMut);

impl Bounce {
    /// Room for so many threads.
    pub fn new(slots: usize, huge: bool) -> Result<Bounce> {
        let nbytes = (slots * SLOT).next_multiple_of(HUGE) + HUGE; // as it need not start at one
        let refused = |error| Error::refused(format!("{nbytes} bytes to read into"), &error);
        let map = MmapMut::map_anon(nbytes).map_err(refused)?;
        platform::prefer_huge(&map, huge);
        Ok(Bounce(map))
    }

    /// The slots, as many as it has room for.
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
