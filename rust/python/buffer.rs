//! Our memory as Python buffers.

use std::ffi::{c_int, c_void};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::memory::region::Region;

/// The part of `room` that starts at `anchor`. Raises if a block does not fit there.
pub(super) fn room_at(
    anchor: &Bound<'_, PyAny>,
    room: &Bound<'_, PyAny>,
    nbytes: u64,
) -> PyResult<Region> {
    let (anchor, room) = (PyUntypedBuffer::get(anchor)?, PyUntypedBuffer::get(room)?);
    let address = anchor.buf_ptr() as usize;
    let start = room.buf_ptr() as usize;
    let end = start + room.len_bytes();
    let fits = (start..end).contains(&address) && nbytes <= (end - address) as u64;
    if room.readonly() || !fits {
        return Err(PyBufferError::new_err(format!("no room for a block of {nbytes} bytes")));
    }
    Ok(Region { address, nbytes: end - address })
}

/// Fills a buffer view with a region.
///
/// # Safety
/// The interpreter gives `view` to be filled, and `object` keeps the region alive.
pub(super) unsafe fn fill(
    object: Bound<'_, PyAny>,
    region: Region,
    readonly: bool,
    view: *mut ffi::Py_buffer,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill"));
    }
    let (address, nbytes) = (region.address as *mut c_void, region.nbytes as ffi::Py_ssize_t);
    // SAFETY: the view is not null; the bytes live as long as the object, which the view will hold.
    let status = unsafe {
        ffi::PyBuffer_FillInfo(view, object.as_ptr(), address, nbytes, c_int::from(readonly), flags)
    };
    if status == 0 { Ok(()) } else { Err(PyErr::fetch(object.py())) }
}
