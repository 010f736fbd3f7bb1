//! Sole: memory that nobody else will read.

use std::ops::Range;
use std::sync::Arc;

use crate::memory::arena::Lot;
use crate::memory::region::Region;
use crate::platform;

/// A region that only its holder still needs. Its pages can be freed before the memory itself.
#[derive(Debug, Clone)]
pub struct Sole {
    region: Region,
    /// The lot that it is part of, if it lies in an arena. Else it is private memory.
    lot: Option<Arc<Lot>>,
}

impl Sole {
    /// Takes over a region.
    ///
    /// # Safety
    /// It stays mapped. After a [`give_back`](Sole::give_back), nobody reads those bytes: neither
    /// this process nor a device that has the pages pinned.
    pub unsafe fn new(region: Region, lot: Option<Arc<Lot>>) -> Sole {
        Sole { region, lot }
    }

    /// The region. Bytes that were given back are zeros.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Frees the pages that lie wholly within a range of it. Give each range back only once.
    pub fn give_back(&self, part: Range<usize>) {
        let address = self.region.address + part.start;
        let addresses = address..address + part.len();
        match &self.lot {
            // SAFETY: the promise of `new`.
            Some(lot) => unsafe { lot.give_back(addresses) },
            // SAFETY: the promise of `new`.
            None => unsafe { platform::discard(addresses) },
        }
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
        // SAFETY: only this test has the memory.
        let sole = unsafe { Sole::new(Region::of(&memory[1..]), None) };
        sole.give_back(0..3 * page);
        let given = page..3 * page;
        assert!(memory[given.clone()].iter().all(|&byte| byte == 0));
        assert!(memory[..given.start].iter().all(|&byte| byte == 7));
        assert!(memory[given.end..].iter().all(|&byte| byte == 7));
        sole.give_back(5..5);
    }
}
