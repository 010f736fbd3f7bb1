//! Fill: writes the bytes of sources to their places in a target, by several threads if that is
//! faster.
//!
//! ```text
//!  sources ─┐                  ┌─ thread ─ pages made ready ─ slot, or memory ─▶ part
//!           ├─ parts, in turn ─┤
//!  target ──┘                  └─ thread ─ pages made ready ─ slot, or memory ─▶ part
//! ```

use std::ops::{Range, RangeInclusive};
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::error::{Error, Result};
use crate::format::checksum::{CHUNK, Chunks};
use crate::format::layout::Span;
use crate::io::bounce::Bounce;
use crate::io::part::Part;
use crate::io::source::Source;
use crate::memory::target::Target;
use crate::platform::HUGE;

/// With fewer bytes, a second thread costs more than it saves.
const ALONE: usize = 8 << 20;

/// Bytes of a target that a thread takes at once, after it has made their pages ready.
const PART: usize = 8 << 20;

/// With a `release`, a part is at most 1/64 of the target, because a part is in memory twice until
/// its sources are released.
const GOING_PARTS: usize = 64;

/// Called with each range of the target that has been filled, by the thread that filled it, to let
/// go of its sources.
pub type Release<'a> = &'a (dyn Fn(Range<usize>) + Sync);

/// How many threads read from a disk, however few the cores: a disk needs several requests at a
/// time, and a thread that copies what it has read makes none. (755 MiB, relative to reading
/// without copying: 8 threads 1.28, 12 1.20, 16 1.18, 24 1.14. In another run: 24 threads 1.11, 32
/// 1.07, 64 1.10.)
const READING: RangeInclusive<usize> = 8..=24;

/// Parts of a target for each thread above the least number, so that a thread's slot is less than a
/// twentieth of what the thread reads.
const PARTS_A_THREAD: usize = 12;

/// How the work is shared.
struct Plan {
    /// The longest part that a thread takes at once.
    part: usize,
    threads: usize,
    /// Whether much of the target comes from a disk.
    cold: bool,
}

impl Plan {
    fn of(sources: &[(u64, Source)], nbytes: usize, release: bool) -> Plan {
        let any = |of: fn(&Source) -> bool| sources.iter().any(|(_, source)| of(source));
        let cold = nbytes >= ALONE && any(|source| source.is_cold(PART));
        let part = if release {
            (nbytes / GOING_PARTS).clamp(HUGE, PART)
        } else if cold {
            HUGE // with longer parts, most threads wait for the last one at the end
        } else {
            PART
        };
        let parts = nbytes.div_ceil(part);
        let threads = if nbytes < ALONE {
            1
        } else if cold {
            let most = parts / 2; // with fewer parts, a thread is not worth its slot
            (parts / PARTS_A_THREAD).clamp(*READING.start(), *READING.end()).min(most)
        } else {
            thread::available_parallelism().map_or(1, usize::from).min(8)
        };
        Plan { part, threads, cold }
    }
}

/// Fills a target from sources, each at its offset, with zeros between them. Returns the checksums
/// of `spans`, which sources fill completely.
///
/// Refuses a file that cannot be read, or was written to meanwhile. Then part of the target is
/// filled.
///
/// # Safety
/// Sources in memory are readable, and nobody writes them before they are released.
pub unsafe fn fill(
    mut sources: Vec<(u64, Source)>,
    spans: &[Span],
    target: &mut [u8],
    release: Option<Release<'_>>,
) -> Result<Vec<u64>> {
    let chunks = Chunks::of(spans)?;
    let mut sums = vec![0; chunks.ranges.len()];
    sources.retain(|(_, source)| source.nbytes() > 0);
    sources.sort_unstable_by_key(|&(offset, _)| offset);
    let plan = Plan::of(&sources, target.len(), release.is_some());
    let pages = Target::of(target);
    let parts = Part { start: 0, target, chunks: &chunks.ranges, sums: &mut sums }.cut(plan.part);
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let fill_parts = |slot: &mut [u8]| {
        while let Some(mut part) = next() {
            part.target = pages.ready(part.target)?;
            let range = part.range();
            // SAFETY: the caller's promise.
            let done = unsafe { fill_part(&sources, part, slot) };
            done.inspect_err(|_| while next().is_some() {})?; // the other threads stop, too
            release.inspect(|release| release(range));
        }
        Ok(())
    };
    let mut bounce = Bounce::new(plan.threads, plan.cold)?;
    let done = thread::scope(|scope| {
        let mut slots = bounce.slots().take(plan.threads);
        let own_slot = slots.next().expect("one thread at least");
        // if the system gives fewer threads, these do the work
        let start = |slot| thread::Builder::new().spawn_scoped(scope, || fill_parts(slot)).ok();
        let others: Vec<_> = slots.map_while(start).collect();
        let own = fill_parts(own_slot);
        others.into_iter().fold(own, |done, other| {
            done.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    });
    if let Err(Error::NoRoom { .. }) = done {
        // SAFETY: the block was never sealed.
        unsafe { pages.give_back() };
        return done.map(|()| vec![]);
    }
    done?;
    let _ = pages.make_huge_later(); // nobody waits for the thread: nothing depends on it
    sources.iter().try_for_each(|(_, source)| source.check_unchanged())?;
    Ok(chunks.combine(&sums))
}

/// Fills one part, then gives back the pages of sources that nobody else needs.
///
/// # Safety
/// As for [`fill`].
unsafe fn fill_part(sources: &[(u64, Source)], part: Part<'_>, slot: &mut [u8]) -> Result<()> {
    let range = part.range();
    // so few bytes at a time that they stay in the processor's cache
    for part in part.cut(CHUNK) {
        let within = within(sources, part.range());
        let mut writer = part.writer();
        for (source, target, own) in within {
            writer.clear_to(target.start);
            // SAFETY: the caller's promise.
            writer.write(unsafe { source.bytes(own, slot) }?);
        }
        writer.finish();
    }
    for (source, _, own) in within(sources, range) {
        source.give_back(own);
    }
    Ok(())
}

/// The sources that overlap a range of the target. For each: the overlap in the target, and in the
/// source.
pub fn within(
    sources: &[(u64, Source)],
    range: Range<usize>,
) -> impl Iterator<Item = (&Source, Range<usize>, Range<usize>)> {
    let start = |(offset, _): &(u64, Source)| *offset as usize;
    let end = move |placed: &(u64, Source)| start(placed) + placed.1.nbytes();
    let first = sources.partition_point(|placed| end(placed) <= range.start);
    let within = sources[first..].iter().take_while(move |placed| start(placed) < range.end);
    within.map(move |placed| {
        let target = start(placed).max(range.start)..end(placed).min(range.end);
        let own = target.start - start(placed)..target.end - start(placed);
        (&placed.1, target, own)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::sync::Arc;

    use memmap2::MmapOptions;
    use proptest::prelude::*;

    use super::*;
    use crate::format::checksum;
    use crate::io::file::Reader;
    use crate::io::source::trace;
    use crate::memory::region::Region;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn whatever_pieces_it_comes_in_a_span_is_summed_as_a_whole(
            sizes in prop::collection::vec(prop_oneof![0..200_usize, 0..3 * CHUNK], 1..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..9),
            align in prop_oneof![4 => Just(64_usize), 1 => Just(1)],
            gap in 0..100_usize,
        ) {
            let mut end = 64;
            let place = |&nbytes: &usize| {
                let offset = (end + gap).next_multiple_of(align);
                end = offset + nbytes;
                Span { offset: offset as u64, nbytes: nbytes as u64 }
            };
            let mut spans: Vec<_> = sizes.iter().map(place).collect();
            spans.reverse();
            let block: Vec<_> = (0..end).map(|i| (i * 31 % 251) as u8).collect();
            let span = |span: &Span| &block[span.offset as usize..][..span.nbytes as usize];
            let expected = checksum::sums(&spans.iter().map(span).collect::<Vec<_>>());

            let path = std::env::temp_dir().join(format!("rzc-pieces-{}", std::process::id()));
            fs::write(&path, &block).unwrap();
            let reader = Reader::new(File::open(&path).unwrap(), &path).unwrap();
            let reader = Arc::new(reader);
            fs::remove_file(&path).unwrap();
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(end)).chain([0, end]).collect();
            cuts.sort();
            let source = |(index, range): (usize, &[usize])| {
                let (start, end) = (range[0], range[1]);
                let (offset, nbytes) = (start as u64, end - start);
                match index % 2 {
                    0 => (offset, Source::File { reader: reader.clone(), offset, nbytes }),
                    _ => (offset, Region::of(&block[start..end]).into()),
                }
            };
            let sources = cuts.windows(2).enumerate().map(source).collect();
            let mut memory = vec![7; end + 64];
            let start = memory.as_ptr().align_offset(64);
            let target = &mut memory[start..start + end];
            // SAFETY: the block lives and is only read.
            prop_assert_eq!(unsafe { super::fill(sources, &spans, target, None) }, Ok(expected));
            prop_assert!(target == block);
        }
    }

    #[test]
    fn what_lies_in_a_file_is_read_to_its_place_and_what_cannot_be_is_refused() {
        let path = std::env::temp_dir().join(format!("rzc-place-{}", std::process::id()));
        let bytes: Vec<_> = (0..20 << 20).map(|i: usize| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let reader = Arc::new(Reader::new(file, &path).unwrap());
        let from_file = |offset, nbytes| Source::File { reader: reader.clone(), offset, nbytes };
        let memory = vec![99; 5000];
        let sources = vec![
            (64, from_file(100, 10)),
            (128, Source::Memory(Region::of(&memory))),
            (6400, from_file(8, 17 << 20)),
        ];
        let mut target = vec![7; 18 << 20];
        // SAFETY: the memory lives and is only read.
        unsafe { fill(sources.clone(), &[], &mut target, None) }.unwrap();
        assert_eq!(target[64..74], bytes[100..110]);
        assert!(target[128..5128] == memory);
        assert!(target[6400..][..17 << 20] == bytes[8..][..17 << 20]);
        assert!(
            [&target[..64], &target[74..128], &target[5128..6400]].concat() == [0; 64 + 54 + 1272]
        );
        File::options().write(true).open(&path).unwrap().set_len(9 << 20).unwrap();
        fs::remove_file(&path).unwrap();
        // SAFETY: as above.
        let error = unsafe { fill(sources, &[], &mut target, None) }.unwrap_err();
        assert!(matches!(error, Error::Unreadable { .. }), "{error}");
    }

    const NBYTES: usize = 1 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn a_target_filled_from_sources_is_what_memory_shows(
            ranges in prop::collection::vec((0..NBYTES, 0..100_000_usize), 1..20),
            written in prop::collection::vec(0..NBYTES, 0..9),
        ) {
            let path = std::env::temp_dir().join(format!("rzc-law-{}", std::process::id()));
            fs::write(&path, (0..NBYTES).map(|i| (i % 251) as u8).collect::<Vec<_>>()).unwrap();
            // SAFETY: the file is the test's own.
            let map = unsafe { MmapOptions::new().map_copy(&File::open(&path).unwrap()) };
            let mut map = map.unwrap();
            fs::remove_file(&path).unwrap();
            for at in written {
                map[at] = 255;
            }
            let own = vec![42; NBYTES];
            let (mut pieces, mut expected) = (Vec::new(), Vec::new());
            for (index, (start, nbytes)) in ranges.into_iter().enumerate() {
                let bytes = if index % 3 == 2 { &own[..] } else { &map[..] };
                let range = start..NBYTES.min(start + nbytes);
                expected.resize(expected.len().next_multiple_of(64), 0);
                pieces.push((expected.len() as u64, Region::of(&bytes[range.clone()])));
                expected.extend(&bytes[range]);
            }
            let mut target = vec![7; expected.len()];
            // SAFETY: all of it lives and is only read.
            unsafe { fill(trace(pieces.into_iter()), &[], &mut target, None) }.unwrap();
            prop_assert!(target == expected);
        }
    }
}
