//! Snapshots: decodes all that precedes the block in the file, and reads or maps the block.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::format::checksum::{Chunks, xxh3};
use crate::format::header::{check_spans, checksums, start_nbytes, verify};
use crate::format::snapshot::{Head, Header};
use crate::format::table::{Table, fingerprint};
use crate::io::block::read;
use crate::io::file::Reader;
use crate::io::snapshot::{self, Opened};
use crate::memory::lease;
use crate::memory::region::Region;
use crate::python::block::{self, Block};
use crate::python::buffer;

/// The decoded head of a snapshot: all that precedes its block.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Snapshot {
    /// The object minus its tensors.
    #[pyo3(get)]
    skeleton: Py<PyBytes>,
    /// The offset table, encoded.
    #[pyo3(get)]
    table: Py<PyBytes>,
    /// The numbers of the views that are buffers.
    #[pyo3(get)]
    buffers: Vec<u32>,
    /// The offset of the block in the file.
    #[pyo3(get)]
    offset: u64,
    decoded: Table,
}

#[pymethods]
impl Snapshot {
    /// Decodes `head`, all that precedes the block, of a snapshot that is `nbytes` long.
    #[new]
    fn new(py: Python<'_>, head: &[u8], nbytes: u64) -> PyResult<Snapshot> {
        let decoded = Head::decode(head, nbytes)?;
        Ok(Snapshot::of(py, head, decoded))
    }

    /// Bytes in the block.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.decoded.nbytes
    }

    /// Bytes of the block's header and checksums.
    #[getter]
    fn start_nbytes(&self) -> usize {
        start_nbytes(&self.decoded)
    }

    /// Offset and bytes of each span.
    #[getter]
    fn spans(&self) -> Vec<(u64, u64)> {
        block::spans(&self.decoded)
    }

    /// Span, dtype, flags, offset, shape and stride of each view, in elements.
    #[getter]
    fn views<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        block::views(py, &self.decoded)
    }

    /// The checksum of each span, from the start of the block.
    fn checksums(&self, py: Python<'_>, start: &[u8]) -> PyResult<Vec<u64>> {
        Ok(checksums(&self.decoded, self.fingerprint(py), start)?)
    }

    /// Checks every span. Raises `BlockError` if one has changed. Calls `read` for at most a MiB at
    /// a time, by rising offset in the block.
    fn verify(&self, py: Python<'_>, read: &Bound<'_, PyAny>) -> PyResult<()> {
        let table = &self.decoded;
        let bytes = |offset, nbytes| read.call1((offset, nbytes))?.extract::<Vec<u8>>();
        let expected = self.checksums(py, &bytes(0, self.start_nbytes())?)?;
        let chunks = Chunks::of(&table.spans)?;
        let sum = |chunk: &std::ops::Range<usize>| Ok(xxh3(&bytes(chunk.start, chunk.len())?));
        let sums = chunks.ranges.iter().map(sum).collect::<PyResult<Vec<_>>>()?;
        Ok(check_spans(table, &expected, &chunks.combine(&sums))?)
    }

    /// Reads the block of a local file to `anchor` in `room`, by several threads. `path` is the
    /// file's name in errors.
    ///
    /// Raises `BlockError` if the block has changed. Then `room` holds no block.
    fn read(
        &self,
        py: Python<'_>,
        descriptor: i32,
        path: PathBuf,
        anchor: &Bound<'_, PyAny>,
        room: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // SAFETY: the caller's file object is held, and has the descriptor open.
        let file = unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?;
        let reader = Reader::new(file.into(), &path)?;
        let target = buffer::room_at(anchor, room, self.nbytes())?;
        let fingerprint = self.fingerprint(py);
        // SAFETY: the room is writable and held; nobody else knows of it yet.
        let target = unsafe { target.bytes_mut() };
        py.detach(|| read(&self.decoded, fingerprint, Arc::new(reader), self.offset, target))?;
        Ok(())
    }

    /// Checks the block that was written to `anchor`. Raises `BlockError` if it differs from the
    /// one that was saved.
    fn check(
        &self,
        py: Python<'_>,
        anchor: &Bound<'_, PyAny>,
        room: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let Region { address, .. } = buffer::room_at(anchor, room, self.nbytes())?;
        let fingerprint = self.fingerprint(py);
        // SAFETY: it lies within the room, which is held, and which nobody else knows of yet.
        let block = unsafe { Region { address, nbytes: self.nbytes() as usize }.bytes() };
        Ok(py.detach(|| verify(&self.decoded, fingerprint, block))?)
    }
}

impl Snapshot {
    fn of(py: Python<'_>, bytes: &[u8], head: Head) -> Snapshot {
        let (buffers, _) = bytes[head.buffers].as_chunks();
        Snapshot {
            skeleton: PyBytes::new(py, &bytes[head.skeleton]).unbind(),
            table: PyBytes::new(py, &bytes[head.table]).unbind(),
            buffers: buffers.iter().map(|&view| u32::from_le_bytes(view)).collect(),
            offset: head.offset,
            decoded: head.decoded,
        }
    }

    fn fingerprint(&self, py: Python<'_>) -> u64 {
        fingerprint(self.table.as_bytes(py))
    }
}

/// The head and the block of a snapshot. The block is mapped privately, or with "copy" read into
/// memory of this process. The descriptor stays the caller's. `path` is the file's name in errors.
#[pyfunction]
pub(super) fn open_snapshot(
    py: Python<'_>,
    descriptor: i32,
    path: PathBuf,
    copied: bool,
) -> PyResult<(Snapshot, Block)> {
    // SAFETY: the caller's file object is held, and has the descriptor open.
    let file = File::from(unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?);
    let opened = py
        .detach(|| if copied { snapshot::copy(file, &path) } else { snapshot::open(file, &path) });
    let Opened { bytes, head, pages, lease } = opened?;
    let block = Block::over(pages, lease, head.decoded.clone(), &bytes[head.table.clone()]);
    Ok((Snapshot::of(py, &bytes, head), block))
}

/// Call before a fork: it takes leases for the child on all open snapshots.
#[pyfunction]
pub(super) fn before_fork(py: Python<'_>) {
    py.detach(lease::before_fork);
}

/// Call in the parent after a fork.
#[pyfunction]
pub(super) fn after_fork_in_parent() {
    lease::after_fork_in_parent();
}

/// Call in the child after a fork.
#[pyfunction]
pub(super) fn after_fork_in_child() {
    lease::after_fork_in_child();
}

/// All bytes that precede the block of a snapshot.
#[pyfunction]
pub(super) fn snapshot_head(skeleton: &[u8], table: &[u8], buffers: Vec<u32>) -> PyResult<Vec<u8>> {
    let buffers: Vec<_> = buffers.iter().flat_map(|view| view.to_le_bytes()).collect();
    let header = Header::new([skeleton, table, &buffers]);
    let mut head = [&header.encode()[..], skeleton, table, &buffers].concat();
    head.resize(header.block_offset()? as usize, 0);
    Ok(head)
}

/// The number of bytes that precede the block, from the start of a snapshot.
#[pyfunction]
pub(super) fn snapshot_head_nbytes(start: &[u8]) -> PyResult<u64> {
    Ok(Header::decode(start)?.block_offset()?)
}
