//! Tensors over memory that a Python object keeps, lent to torch by DLPack.

use std::ffi::c_void;
use std::{mem, ptr};

use pyo3::prelude::*;
use pyo3::{ffi, intern};

use crate::format::view::{Flags, View};
use crate::python::dlpack;
use crate::python::torch::Torch;

/// A tensor with a storage of its own, whose first element is at `data`; `None` where DLPack has no
/// such dtype, or torch does not borrow.
///
/// # Safety
/// The owner keeps the elements and the view where they are.
pub(super) unsafe fn tensor<'py>(
    data: *mut c_void,
    view: &View,
    owner: &Bound<'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = owner.py();
    let torch = Torch::get(py)?;
    let Some(to_py_object) = torch.to_py_object else {
        return Ok(None);
    };
    let lender = Lender(Some(owner.clone().unbind()));
    // SAFETY: the caller's promise.
    let Some(loan) = (unsafe { dlpack::lend(data, view, lender) }) else {
        return Ok(None);
    };
    let mut tensor = ptr::null_mut();
    // SAFETY: a loan that torch takes over, and room for the tensor; `py` proves that we may.
    if unsafe { to_py_object(loan, &raw mut tensor) } != 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference.
    let tensor = unsafe { Bound::from_owned_ptr_or_err(py, tensor.cast()) }?;
    if view.flags.contains(Flags::PARAMETER) {
        // as torch's own lazy modules do; `Parameter(tensor)` makes a second tensor, 2 us more
        tensor.setattr(intern!(py, "__class__"), &torch.parameter)?;
    }
    if view.flags.contains(Flags::REQUIRES_GRAD) {
        tensor.setattr(intern!(py, "requires_grad"), true)?;
    }
    Ok(Some(tensor))
}

/// An owner whose memory is on loan to torch, which may give it back on any thread, or after the
/// interpreter.
struct Lender(Option<Py<PyAny>>);

impl Drop for Lender {
    fn drop(&mut self) {
        let mut owner = mem::ManuallyDrop::new(self.0.take());
        Python::try_attach(|_| {
            // Torch lets go of the interpreter while it frees, also inside of a call of ours, where PyO3
            // takes it for attached: the interpreter itself knows.
            // SAFETY: it is there, as PyO3 has found.
            let state = unsafe { ffi::PyGILState_Ensure() };
            drop(owner.take());
            // SAFETY: of this thread's last call to ensure it.
            unsafe { ffi::PyGILState_Release(state) };
        });
    }
}
