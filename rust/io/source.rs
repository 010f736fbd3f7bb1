//! Sources: where a span's bytes lie before they are written.
//!
//! ```text
//!  mapped file   ████████████████▒▒▒▒████████████     ▒ a page that this process has written
//!  sources       └── file ──────┘└──┘└── file ──┘
//!                                 memory
//! ```

use std::collections::HashMap;
use std::iter;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::io::file::Reader;
use crate::memory::region::Region;
use crate::memory::sole::Sole;
use crate::platform::mapping::Mapping;
use crate::platform::{Mappings, PageTable};

/// Bytes that are to be written somewhere.
#[derive(Debug, Clone)]
pub enum Source {
    /// Memory that somebody else keeps.
    Memory(Region),
    /// Memory that nobody else will read: its pages are given back once written.
    Sole(Sole),
    /// A part of a file.
    File {
        /// The file.
        reader: Arc<Reader>,
        /// The first byte.
        offset: u64,
        /// Length in bytes.
        nbytes: usize,
    },
}

impl From<Region> for Source {
    fn from(region: Region) -> Source {
        Source::Memory(region)
    }
}

impl Source {
    /// Length in bytes.
    pub fn nbytes(&self) -> usize {
        match self {
            Source::Memory(region) => region.nbytes,
            Source::Sole(sole) => sole.region().nbytes,
            Source::File { nbytes, .. } => *nbytes,
        }
    }

    /// Whether any part of it, of so many bytes each, starts on a disk.
    pub fn is_cold(&self, part: usize) -> bool {
        match self {
            Source::Memory(_) | Source::Sole(_) => false,
            Source::File { reader, offset, nbytes } => (0..*nbytes)
                .step_by(part)
                .any(|at| reader.is_cold(offset + at as u64, part.min(nbytes - at))),
        }
    }

    /// A part of its bytes, at most [`CHUNK`](crate::format::checksum::CHUNK) of a file's: where they
    /// are, or read into a slot.
    ///
    /// # Safety
    /// What is memory is readable, and nobody writes it as long as the slice lives.
    pub unsafe fn bytes<'a>(&self, part: Range<usize>, slot: &'a mut [u8]) -> Result<&'a [u8]> {
        match self {
            // SAFETY: the caller's promise.
            Source::Memory(region) => Ok(unsafe { &region.bytes()[part] }),
            // SAFETY: the caller's promise.
            Source::Sole(sole) => Ok(unsafe { &sole.region().bytes()[part] }),
            Source::File { reader, offset, .. } => {
                reader.read(offset + part.start as u64, part.len(), slot)
            }
        }
    }

    /// Gives back the pages of a part, where nobody else has them.
    pub fn give_back(&self, part: Range<usize>) {
        if let Source::Sole(sole) = self {
            sole.give_back(part);
        }
    }

    /// Refuses a file that was written to since it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        match self {
            Source::Memory(_) | Source::Sole(_) => Ok(()),
            Source::File { reader, .. } => reader.check_unchanged(),
        }
    }

    /// Takes in a source that goes right after it, if it also comes right after it.
    fn absorb(&mut self, next: &Source) -> bool {
        match (self, next) {
            (
                Source::File { reader, offset, nbytes },
                Source::File { reader: next_reader, offset: next_offset, nbytes: next_nbytes },
            ) if Arc::ptr_eq(reader, next_reader) && *offset + *nbytes as u64 == *next_offset => {
                *nbytes += next_nbytes;
                true
            }
            _ => false,
        }
    }
}

/// The sources of pieces of memory, each given with the offset that it goes to; in the order of these.
///
/// What lies in a mapping of a file is read from the file, unless this process has written it: pages
/// of a private mapping that were written are memory. So is what lies in a file that has no disk, or
/// cannot be opened again. What adjoins both in its file and where it goes is one source.
pub fn trace(pieces: impl Iterator<Item = (u64, Region)>) -> Vec<(u64, Source)> {
    let mut pieces: Vec<_> = pieces.collect();
    pieces.sort_unstable_by_key(|(_, region)| region.address);
    let mut tracer = Tracer::new();
    for (offset, region) in pieces {
        tracer.trace(offset, region.address..region.address + region.nbytes);
    }
    let mut sources = tracer.found;
    sources.retain(|(_, source)| source.nbytes() > 0);
    sources.sort_unstable_by_key(|&(offset, _)| offset);
    sources.dedup_by(|(offset, source), (start, before)| {
        *start + before.nbytes() as u64 == *offset && before.absorb(source)
    });
    sources
}

/// Goes through memory by rising address.
struct Tracer {
    /// `None` when there are no more.
    mappings: Option<Mappings>,
    /// The one that covers where the tracer is, or the next above it.
    mapping: Option<Mapping>,
    /// By name and inode, as one file may be mapped in parts; `None` for what is to be memory.
    readers: HashMap<(PathBuf, u64), Option<Arc<Reader>>>,
    page_table: PageTable,
    found: Vec<(u64, Source)>,
}

impl Tracer {
    fn new() -> Tracer {
        Tracer {
            mappings: Mappings::open().ok(),
            mapping: None,
            readers: HashMap::new(),
            page_table: PageTable::open(),
            found: Vec::new(),
        }
    }

    /// Traces these addresses, whose bytes go to an offset and after it.
    fn trace(&mut self, offset: u64, addresses: Range<usize>) {
        let mut start = addresses.start;
        while start < addresses.end {
            self.advance(start);
            let stop = match &self.mapping {
                Some(mapping) if mapping.start <= start => mapping.end,
                Some(mapping) => mapping.start,
                None => addresses.end,
            };
            let part = start..stop.min(addresses.end);
            let offset = offset + (start - addresses.start) as u64;
            match self.mapping.clone().filter(|mapping| mapping.start <= start) {
                Some(mapping) => self.trace_mapped(offset, part.clone(), &mapping),
                None => self.found.push((offset, memory(part.clone()))),
            }
            start = part.end;
        }
    }

    fn advance(&mut self, address: usize) {
        if self.mapping.as_ref().is_none_or(|mapping| mapping.end <= address) {
            let next = |mappings: &Mappings| mappings.at_or_after(address).ok().flatten();
            self.mapping = self.mappings.as_ref().and_then(next);
            self.mappings.take_if(|_| self.mapping.is_none());
        }
    }

    fn trace_mapped(&mut self, offset: u64, addresses: Range<usize>, mapping: &Mapping) {
        let written = match mapping.shared {
            true => Some(Vec::new()),
            false => self.page_table.written(&addresses),
        };
        let (Some(written), Some(reader)) = (written, self.reader(mapping)) else {
            return self.found.push((offset, memory(addresses)));
        };
        let mut start = addresses.start;
        for own in written.into_iter().chain(iter::once(addresses.end..addresses.end)) {
            let offset = |address| offset + (address - addresses.start) as u64;
            let in_file = Source::File {
                reader: reader.clone(),
                offset: mapping.backing.offset + (start - mapping.start) as u64,
                nbytes: own.start - start,
            };
            self.found.extend([(offset(start), in_file), (offset(own.start), memory(own.clone()))]);
            start = own.end;
        }
    }

    fn reader(&mut self, mapping: &Mapping) -> Option<Arc<Reader>> {
        let file = (mapping.backing.name.clone(), mapping.backing.inode);
        let open = || Reader::of(mapping).map(Arc::new);
        self.readers.entry(file).or_insert_with(open).clone()
    }
}

fn memory(addresses: Range<usize>) -> Source {
    Source::Memory(addresses.into())
}

#[cfg(all(test, target_os = "linux", not(feature = "portable")))]
#[allow(unsafe_code)] // maps files
mod tests {
    use std::fs::{self, File};
    use std::path::{Path, PathBuf};

    use memmap2::Mmap;

    use super::*;

    const NBYTES: usize = 1 << 20;

    fn new_file(folder: &Path, name: &str) -> (PathBuf, Vec<u8>) {
        let path = folder.join(format!("rzc-source-{name}-{}", std::process::id()));
        let bytes: Vec<_> = (0..NBYTES).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    fn map(path: &Path) -> Mmap {
        // SAFETY: the file is the test's own.
        unsafe { Mmap::map(&File::open(path).unwrap()) }.unwrap()
    }

    fn part(bytes: &[u8], range: Range<usize>) -> Region {
        Region::of(&bytes[range])
    }

    /// What lies where, as (offset, "file" or "memory", bytes).
    fn kinds(sources: &[(u64, Source)]) -> Vec<(u64, &str, usize)> {
        let kind = |(offset, source): &(u64, Source)| match source {
            Source::Memory(_) | Source::Sole(_) => (*offset, "memory", source.nbytes()),
            Source::File { .. } => (*offset, "file", source.nbytes()),
        };
        sources.iter().map(kind).collect()
    }

    #[test]
    fn what_adjoins_is_one_source() {
        let (path, _) = new_file(&std::env::temp_dir(), "adjoining");
        let map = map(&path);
        fs::remove_file(&path).unwrap();
        let pieces =
            [(64, part(&map, 0..64)), (128, part(&map, 64..640)), (0, part(&map, 700..764))];
        let sources = trace(pieces.into_iter());
        assert_eq!(kinds(&sources), [(0, "file", 64), (64, "file", 640)]);
    }

    #[test]
    fn ordinary_memory_and_files_in_memory_are_memory() {
        let own = vec![0; NBYTES];
        let (path, _) = new_file("/dev/shm".as_ref(), "shm");
        let map = map(&path);
        fs::remove_file(&path).unwrap();
        let pieces = [(0, part(&own, 0..NBYTES)), (NBYTES as u64, part(&map, 0..100))];
        let sources = trace(pieces.into_iter());
        assert_eq!(kinds(&sources), [(0, "memory", NBYTES), (NBYTES as u64, "memory", 100)]);
    }
}
