//! Sole: private memory that nobody else will read any more.

use std::ops::Range;

use crate::memory::region::Region;
use crate::platform;

/// A region of private memory of which only the holder still wants the bytes: its pages can go before
/// the memory itself does.
#[derive(Debug, Clone, Copy)]
pub struct Sole(Region);

impl Sole {
    /// Takes a region on.
    ///
    /// # Safety
    /// It stays mapped, and after a [`give_back`](Sole::give_back) nobody reads what was there: neither
    /// this process nor a device that has its pages pinned.
    pub unsafe fn new(region: Region) -> Sole {
        Sole(region)
    }

    /// Its bytes, of which those that were given back are zeros.
    pub fn region(self) -> Region {
        self.0
    }

    /// Gives back the pages that lie wholly within a part of it.
    pub fn give_back(self, part: Range<usize>) {
        let address = self.0.address + part.start;
        // SAFETY: the promise of `new`.
        unsafe { platform::discard(address..address + part.len()) };
    }
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
mod tests {
    use memmap2::MmapMut;

    use super::*;

    #[test]
    fn what_is_given_back_is_zero_and_what_is_beside_it_stays() {
        let page = platform::page();
        let mut memory = MmapMut::map_anon(5 * page).unwrap();
        memory.fill(7);
        // SAFETY: the test's own memory.
        let sole = unsafe { Sole::new(Region::of(&memory[1..])) };
        sole.give_back(0..3 * page);
        let given = page..3 * page;
        assert!(memory[given.clone()].iter().all(|&byte| byte == 0));
        assert!(memory[..given.start].iter().all(|&byte| byte == 7));
        assert!(memory[given.end..].iter().all(|&byte| byte == 7));
        sole.give_back(5..5);
    }
}
