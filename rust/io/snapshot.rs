//! An open snapshot: its head, and pages over its block.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::header::{checksums, start_nbytes};
use crate::format::snapshot::{Head, Header, SNAPSHOT_HEADER_NBYTES};
use crate::format::table::fingerprint;
use crate::io::block;
use crate::io::file::Reader;
use crate::memory::lease::{Lease, Leases};
use crate::memory::pages::Pages;
use crate::memory::reaper;

/// An open snapshot.
#[derive(Debug)]
pub struct Opened {
    /// All bytes that precede the block ...
    pub bytes: Vec<u8>,
    /// ... and the same, decoded.
    pub head: Head,
    /// The block.
    pub pages: Pages,
    /// The lease on the file, dropped after the pages; or why there is none. `None` for a copy.
    pub lease: Option<io::Result<Lease>>,
}

/// Leases a snapshot, reads all that precedes the block, and maps the block privately. `path` is
/// its name in errors.
pub fn open(file: File, path: &Path) -> Result<Opened> {
    let mut leases = Leases::get();
    let leased = leases.take(&file); // first, so that nobody can change the file between two reads
    let (bytes, head) = read_head(&file, path)?;
    let nbytes = head.decoded.nbytes as usize;
    // SAFETY: the file is leased, so its bytes stay; or the caller is told why it is not.
    let pages = unsafe { Pages::of_file(&file, head.offset, nbytes) }?;
    let mut start = vec![0; start_nbytes(&head.decoded)];
    read_at(&file, path, head.offset, &mut start)?;
    checksums(&head.decoded, fingerprint(&bytes[head.table.clone()]), &start)?;
    let lease = match &pages {
        Pages::Private { map, .. } => {
            Some(leased.map(|()| leases.cover(file, path.display().to_string(), map)))
        }
        _ => None,
    };
    Ok(Opened { bytes, head, pages, lease })
}

/// Reads a whole snapshot into memory of this process, by several threads. Refuses it if a byte has
/// changed.
pub fn copy(file: File, path: &Path) -> Result<Opened> {
    let (bytes, head) = read_head(&file, path)?;
    let nbytes = head.decoded.nbytes as usize;
    let mut copy = reaper::memory(nbytes)?;
    let reader =
        Reader::new(file, path).map_err(|error| unreadable(path, head.offset, nbytes, &error))?;
    let fingerprint = fingerprint(&bytes[head.table.clone()]);
    block::read(&head.decoded, fingerprint, Arc::new(reader), head.offset, &mut copy)?;
    Ok(Opened { bytes, head, pages: Pages::Copied(copy), lease: None })
}

/// Reads all that precedes the block, at most to the end of the file.
fn read_head(file: &File, path: &Path) -> Result<(Vec<u8>, Head)> {
    let found = file.metadata().map_err(|error| unreadable(path, 0, 0, &error))?.len();
    let mut bytes = vec![0; found.min(SNAPSHOT_HEADER_NBYTES as u64) as usize];
    read_at(file, path, 0, &mut bytes)?;
    let expected = Header::decode(&bytes)?.block_offset()?;
    if expected > found {
        return Err(Error::SnapshotLength { expected, found });
    }
    bytes.resize(expected as usize, 0);
    read_at(file, path, 0, &mut bytes)?;
    let head = Head::decode(&bytes, found)?;
    Ok((bytes, head))
}

fn read_at(file: &File, path: &Path, offset: u64, bytes: &mut [u8]) -> Result<()> {
    let (expected, nbytes) = (offset + bytes.len() as u64, bytes.len());
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => {
            let found = file.metadata().map_or(offset, |metadata| metadata.len());
            Error::SnapshotLength { expected, found }
        }
        _ => unreadable(path, offset, nbytes, &error),
    })
}

fn unreadable(path: &Path, start: u64, nbytes: usize, error: &io::Error) -> Error {
    let (path, end) = (path.display().to_string(), start + nbytes as u64);
    Error::Unreadable { path, start, end, reason: error.to_string() }
}
