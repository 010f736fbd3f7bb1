//! Aliases: storages that overlap in memory, such as windows of one array, or an array and its
//! tensor.
//!
//! ```text
//!  storages   └──── 0 ─────┘          └── 3 ──┘
//!                  └──── 1 ────┘
//!                     └ 2 ┘
//!  regions    └─────── 0 ──────┘      └── 1 ──┘
//! ```

use std::ops::Range;

use crate::memory::region::Region;

/// The regions that cover all storages without overlap, and the place of each storage in them.
#[derive(Debug, PartialEq, Eq)]
pub struct Aliases {
    /// By the first storage in each.
    pub regions: Vec<Region>,
    /// For each storage: the index of its region, and its offset there.
    pub places: Vec<(usize, usize)>,
}

impl Aliases {
    /// Joins overlapping storages into one region, if each then lies at a multiple of its `align`
    /// in it.
    pub fn of(storages: &[Region], aligns: &[usize]) -> Aliases {
        let mut order: Vec<_> = (0..storages.len()).filter(|&i| storages[i].nbytes > 0).collect();
        order.sort_unstable_by_key(|&storage| storages[storage].address);
        let mut wholes = storages.to_vec();
        let mut heads: Vec<_> = (0..storages.len()).collect();
        let mut rest = &order[..];
        while let Some(&head) = rest.first() {
            let mut whole = storages[head].addresses();
            let overlaps = |&&storage: &&usize| {
                let Range { start, end } = storages[storage].addresses();
                let overlaps = start < whole.end;
                whole.end = if overlaps { end.max(whole.end) } else { whole.end };
                overlaps
            };
            let (group, others) = rest.split_at(rest.iter().take_while(overlaps).count());
            let offset = |storage: usize| storages[storage].address - whole.start;
            if group.iter().all(|&storage| offset(storage).is_multiple_of(aligns[storage])) {
                group.iter().for_each(|&storage| heads[storage] = head);
                wholes[head] = whole.into();
            }
            rest = others;
        }
        let (mut regions, mut numbers) = (Vec::new(), vec![None; storages.len()]);
        let place = |(storage, head): (&Region, usize)| {
            let number = *numbers[head].get_or_insert_with(|| {
                regions.push(wholes[head]);
                regions.len() - 1
            });
            (number, storage.address - wholes[head].address)
        };
        let places = storages.iter().zip(heads).map(place).collect();
        Aliases { regions, places }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_storage_lies_in_its_region_and_shares_what_it_shared(
            storages in prop::collection::vec(
                (0..300_usize, 0..40_usize, prop_oneof![Just(1_usize), Just(4), Just(8)]), 0..20,
            ),
        ) {
            let regions: Vec<_> = storages
                .iter()
                .map(|&(start, nbytes, align)| Region { address: 4096 + start * align, nbytes })
                .collect();
            let aligns: Vec<_> = storages.iter().map(|&(.., align)| align).collect();
            let aliases = Aliases::of(&regions, &aligns);
            let mut used = vec![false; aliases.regions.len()];
            for ((storage, &(number, offset)), align) in regions.iter().zip(&aliases.places).zip(&aligns) {
                let region = aliases.regions[number];
                prop_assert_eq!(region.address + offset, storage.address);
                prop_assert!(offset + storage.nbytes <= region.nbytes);
                prop_assert!(offset.is_multiple_of(*align));
                used[number] = true;
            }
            prop_assert!(used.into_iter().all(|used| used));
            // without alignment, no two regions overlap
            if aligns.iter().all(|&align| align == 1) {
                let total: usize = aliases.regions.iter().map(|region| region.nbytes).sum();
                let mut bytes: Vec<_> = regions.iter().flat_map(|region| region.addresses()).collect();
                bytes.sort_unstable();
                bytes.dedup();
                prop_assert_eq!(total, bytes.len());
            }
        }
    }

    #[test]
    fn what_would_be_misaligned_is_apart() {
        let storages =
            [(4096, 40), (4102, 8), (4096, 8)].map(|(address, nbytes)| Region { address, nbytes });
        let aliases = Aliases::of(&storages, &[1, 4, 1]);
        assert_eq!(
            (aliases.regions, aliases.places),
            (storages.to_vec(), vec![(0, 0), (1, 0), (2, 0)])
        );
    }
}
