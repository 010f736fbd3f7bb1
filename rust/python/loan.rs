//! Tensors over the memory of a Python object, lent to torch by DLPack.

use std::ffi::c_void;
use std::{mem, ptr};

use pyo3::prelude::*;
use pyo3::{ffi, intern};

use crate::format::view::{Flags, View};
use crate::python::dlpack;
use crate::python::torch::Torch;

/// A tensor with its own storage, whose first element is at `data`. `None` if DLPack lacks the
/// dtype, or torch cannot borrow.
///
/// # Safety
/// The owner keeps the elements and the view in place.
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
    // SAFETY: torch takes over the loan, and there is room for the tensor; `py` proves that this
    // thread has the interpreter.
    if unsafe { to_py_object(loan, &raw mut tensor) } != 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: it is a new reference.
    let tensor = unsafe { Bound::from_owned_ptr_or_err(py, tensor.cast()) }?;
    if view.flags.contains(Flags::PARAMETER) {
        // as torch's lazy modules do it; `Parameter(tensor)` makes a second tensor (2 us more)
        tensor.setattr(intern!(py, "__class__"), &torch.parameter)?;
    }
    if view.flags.contains(Flags::REQUIRES_GRAD) {
        tensor.setattr(intern!(py, "requires_grad"), true)?;
    }
    Ok(Some(tensor))
}

/// The owner of memory that torch has borrowed. Torch may drop it on any thread, or after the
/// interpreter has ended.
struct Lender(Option<Py<PyAny>>);

impl Drop for Lender {
    fn drop(&mut self) {
        let mut owner = mem::ManuallyDrop::new(self.0.take());
        Python::try_attach(|_| {
            // Torch releases the interpreter while it frees, even within a call of ours, where PyO3
            // believes that this thread has it. So the interpreter itself is asked.
            // SAFETY: the interpreter exists, as PyO3 has checked.
            let state = unsafe { ffi::PyGILState_Ensure() };
            drop(owner.take());
            // SAFETY: the state is from this thread's last `PyGILState_Ensure`.
            unsafe { ffi::PyGILState_Release(state) };
        });
    }
}
