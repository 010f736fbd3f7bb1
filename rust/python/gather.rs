//! Sources on their way into a block.

use std::ffi::c_int;
use std::ops::Range;
use std::slice;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::buffer;
use super::sources::Sources;
use crate::block;
use crate::error::Error;
use crate::layout::{Layout, Piece, Segment as Run, used};
use crate::table::{Table, fingerprint};

/// Storages and views on their way into a block.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Gather {
    layout: Layout,
    storages: Vec<Piece>,
    /// What keeps the storages where they are.
    _owners: Vec<Py<PyAny>>,
    /// The offset table, encoded.
    #[pyo3(get)]
    table: Py<PyBytes>,
}

#[pymethods]
impl Gather {
    #[new]
    fn new(py: Python<'_>, sources: &Sources) -> PyResult<Gather> {
        let Sources { storages, views, .. } = sources;
        let mut views = views.clone();
        let mut extents = vec![Vec::new(); storages.len()];
        for (index, view) in views.iter().enumerate() {
            let (span, spans) = (view.span, storages.len());
            let no_such_span = Error::NoSuchSpan { view: index, span, spans };
            view.check(storages.get(span).ok_or(no_such_span)?.0.nbytes as u64)?;
            extents[span].extend(view.extent()?);
        }
        let used: Vec<_> = extents.into_iter().map(used).collect();
        for view in &mut views {
            let start = used[view.span].start / view.dtype.itemsize();
            view.offset = if view.extent()?.is_some() { view.offset - start } else { 0 };
        }
        let piece = |((whole, owner), used): (&(Piece, Py<PyAny>), Range<u64>)| {
            let nbytes = (used.end - used.start) as usize;
            (Piece { address: whole.address + used.start as usize, nbytes }, owner.clone_ref(py))
        };
        let (storages, _owners): (Vec<_>, _) = storages.iter().zip(used).map(piece).unzip();
        let layout = Layout::plan(&storages)?;
        let table = Table::new(&layout, views)?.encode();
        Ok(Gather { layout, storages, _owners, table: PyBytes::new(py, &table).unbind() })
    }

    /// The block as buffers in order: the small storages packed, the large ones where they are.
    fn segments(slf: &Bound<'_, Self>) -> Vec<Segment> {
        let (py, gather) = (slf.py(), slf.get());
        let fingerprint = fingerprint(gather.table.as_bytes(py));
        let segment = |run: &Run| {
            let (piece, packed) = match run {
                Run::Packed { .. } => {
                    // SAFETY: the owners keep the storages alive; that nobody writes a model while
                    // it is published is the caller's part, as with any pickle.
                    let bytes =
                        unsafe { block::pack(&gather.layout, &gather.storages, fingerprint) };
                    (Piece { address: bytes.as_ptr() as usize, nbytes: bytes.len() }, bytes)
                }
                Run::Piece(piece) => (*piece, Vec::new()),
            };
            Segment { piece, _packed: packed, _gather: slf.clone().unbind() }
        };
        gather.layout.segments.iter().map(segment).collect()
    }

    /// Bytes in the block.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.layout.nbytes
    }

    /// Writes the whole block where `anchor` starts, and clears what is left of `room`.
    fn write(
        &self,
        py: Python<'_>,
        anchor: &Bound<'_, PyAny>,
        room: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (anchor, room) = (PyUntypedBuffer::get(anchor)?, PyUntypedBuffer::get(room)?);
        let start = anchor.buf_ptr() as usize;
        let end = room.buf_ptr() as usize + room.len_bytes();
        let nbytes = self.layout.nbytes;
        let fits =
            (room.buf_ptr() as usize..end).contains(&start) && nbytes <= (end - start) as u64;
        if room.readonly() || !fits {
            return Err(PyBufferError::new_err(format!("no room for a block of {nbytes} bytes")));
        }
        let fingerprint = fingerprint(self.table.as_bytes(py));
        py.detach(|| {
            // SAFETY: within the room, which can be written and is held; nobody else has the
            // object's reference yet, so nobody reads or writes it.
            let target = unsafe { slice::from_raw_parts_mut(start as *mut u8, end - start) };
            // SAFETY: as for `segments`.
            unsafe { block::write(&self.layout, &self.storages, fingerprint, target) };
        });
        Ok(())
    }
}

/// A part of the block on its way: a read-only buffer.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Segment {
    piece: Piece,
    /// The bytes, where they were packed ...
    _packed: Vec<u8>,
    /// ... and what keeps them, where they lie in the model.
    _gather: Py<Gather>,
}

#[pymethods]
impl Segment {
    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let piece = slf.get().piece;
        // SAFETY: the interpreter's view; the segment, which keeps the bytes, is its object.
        unsafe { buffer::fill(slf.into_any(), piece, true, view, flags) }
    }
}
