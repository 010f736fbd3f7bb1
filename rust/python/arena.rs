//! An arena whose lots are Python buffers.

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::memory::arena;
use crate::python::buffer;

/// Shared memory for tensors that has pages only in its lots.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Arena(pub(super) Arc<arena::Arena>);

#[pymethods]
impl Arena {
    #[new]
    fn new() -> PyResult<Arena> {
        Ok(Arena(arena::Arena::new()?))
    }

    /// Lends memory with any content.
    fn lend(&self, py: Python<'_>, nbytes: usize) -> PyResult<Lot> {
        let lot = py.detach(|| self.0.lend(nbytes));
        let full = || PyMemoryError::new_err(format!("the arena has no room for {nbytes} bytes"));
        lot.map(Lot).ok_or_else(full)
    }
}

/// A part of an arena: a writable buffer. Its pages are freed when nobody holds it.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Lot(Arc<arena::Lot>);

#[pymethods]
impl Lot {
    /// # Safety
    /// The interpreter calls it with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let region = slf.get().0.region();
        // SAFETY: the interpreter gives the view. The lot is its object, and keeps the bytes.
        unsafe { buffer::fill(slf.into_any(), region, false, view, flags) }
    }
}
