//! Sources: where the bytes of a span come from, memory or a range of a file.
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

/// Bytes to be written to a target.
#[derive(Debug, Clone)]
pub enum Source {
    /// Memory that the caller keeps.
    Memory(Region),
    /// Memory that nobody else will read. Its pages are given back once they are written.
    Sole(Sole),
    /// A range of a file.
    File {
        /// The file.
        reader: Arc<Reader>,
        /// Its first byte.
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

    /// Whether the start of any of its parts of this size has to be read from a disk.
    pub fn is_cold(&self, part: usize) -> bool {
        match self {
            Source::Memory(_) | Source::Sole(_) => false,
            Source::File { reader, offset, nbytes } => (0..*nbytes)
                .step_by(part)
                .any(|at| reader.is_cold(offset + at as u64, part.min(nbytes - at))),
        }
    }

    /// Bytes of a range of it: in place, or read from a file into `slot`, at most
    /// [`CHUNK`](crate::format::checksum::CHUNK) then.
    ///
    /// # Safety
    /// Memory of the source is readable, and nobody writes it while the slice lives.
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

    /// Gives back the pages of a range, if nobody else has them.
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

    /// Appends `next` if it continues this source in the same file. False if it does not.
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

/// The sources of regions of memory, each with the offset that its bytes go to, by rising offset.
///
/// Memory that maps a file is read from the file, except pages of a private mapping that this
/// process has written. A file in memory, or one that cannot be opened again, is read from memory
/// too. Sources that are adjacent both in the file and in the target become one.
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

/// Walks through memory by rising address.
struct Tracer {
    /// `None` after the last mapping.
    mappings: Option<Mappings>,
    /// The mapping at the current address, or the next above it.
    mapping: Option<Mapping>,
    /// By name and inode, as a file may have several mappings; `None` for a file that is read from
    /// memory.
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

    /// Traces a range of addresses, whose bytes go to `offset`.
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

    /// Each source as (offset, "file" or "memory", bytes).
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
