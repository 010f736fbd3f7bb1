//! An arena whose lots are buffers.

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::memory::arena;
use crate::python::buffer;

/// Shared memory for tensors, with pages only where lots lie.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Arena(pub(super) Arc<arena::Arena>);

#[pymethods]
impl Arena {
    #[new]
    fn new() -> PyResult<Arena> {
        Ok(Arena(arena::Arena::new()?))
    }

    /// Lends memory, whatever is in it.
    fn lend(&self, py: Python<'_>, nbytes: usize) -> PyResult<Lot> {
        let lot = py.detach(|| self.0.lend(nbytes));
        let full = || PyMemoryError::new_err(format!("an arena has no {nbytes} addresses left"));
        lot.map(Lot).ok_or_else(full)
    }
}

/// A part of an arena: a writable buffer. Its pages are free again when nobody holds it.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Lot(Arc<arena::Lot>);

#[pymethods]
impl Lot {
    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let region = slf.get().0.region();
        // SAFETY: the interpreter's view; the lot, which keeps the bytes, is its object.
        unsafe { buffer::fill(slf.into_any(), region, false, view, flags) }
    }
}
