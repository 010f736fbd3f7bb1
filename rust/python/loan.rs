//! Tensors over memory that a Python object keeps, lent to torch by DLPack.

use std::ffi::{CStr, c_void};
use std::mem;

use pyo3::prelude::*;
use pyo3::{ffi, intern};

use super::torch::Torch;
use crate::dlpack::{self, ManagedTensor};
use crate::view::{Flags, View};

/// A tensor with a storage of its own, whose first element is at `data`; `None` where DLPack has no
/// such dtype.
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
    let lender = Lender(Some(owner.clone().unbind()));
    // SAFETY: the caller's promise.
    let Some(loan) = (unsafe { dlpack::lend(data, view, lender) }) else {
        return Ok(None);
    };
    let tensor = torch.from_dlpack.bind(py).call1((capsule(py, loan)?,))?;
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
        Python::try_attach(|_| drop(owner.take()));
    }
}

const LENT: &CStr = c"dltensor";

/// A loan as Python hands it on; whoever takes it renames the capsule.
fn capsule<'py>(py: Python<'py>, loan: *mut ManagedTensor) -> PyResult<Bound<'py, PyAny>> {
    unsafe extern "C" fn end(capsule: *mut ffi::PyObject) {
        // SAFETY: called by the interpreter with the capsule that goes.
        if unsafe { ffi::PyCapsule_IsValid(capsule, LENT.as_ptr()) } == 1 {
            // SAFETY: valid under this name, so nobody has taken it.
            let loan = unsafe { ffi::PyCapsule_GetPointer(capsule, LENT.as_ptr()) };
            // SAFETY: the loan, which nobody has taken and nobody can any more.
            unsafe { dlpack::give_back(loan.cast()) };
        }
    }
    // SAFETY: the pointer is not null, and the name is static.
    let capsule = unsafe { ffi::PyCapsule_New(loan.cast(), LENT.as_ptr(), Some(end)) };
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, capsule) }
}
