//! The objects of torch that make and describe tensors.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::Error;
use crate::format::dtype::Dtype;
use crate::python::dlpack::{Describe, ExchangeApi, ToPyObject};

/// Objects of torch, looked up once.
pub(super) struct Torch {
    /// None in a torch older than 2.10, or with another version of DLPack.
    pub(super) to_py_object: Option<ToPyObject>,
    pub(super) describe: Option<Describe>,
    pub(super) has_storage: Py<PyAny>,
    is_sole: Py<PyAny>,
    untyped_storage: Py<PyAny>,
    pub(super) parameter: Py<PyAny>,
    pub(super) strided: Py<PyAny>,
    pub(super) tensor: Py<PyAny>,
    pub(super) warn_if_has_hooks: Py<PyAny>,
    /// torch has one object for each dtype.
    dtypes: Vec<(Py<PyAny>, Dtype)>,
}

impl Torch {
    pub(super) fn get(py: Python<'_>) -> PyResult<&Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let (inside, hooks) =
                (py.import("ray_zerocopy.objects.torch_inside")?, py.import("torch.utils.hooks")?);
            let dtypes = Dtype::ALL.iter().filter_map(|&dtype| {
                let object = torch.getattr(dtype.name()).ok()?; // not every torch has every dtype
                Some((object.unbind(), dtype))
            });
            let (to_py_object, describe) = exchange(&torch.getattr("Tensor")?)?;
            Ok(Torch {
                to_py_object,
                describe,
                has_storage: inside.getattr("has_storage")?.unbind(),
                is_sole: inside.getattr("is_sole")?.unbind(),
                untyped_storage: torch.getattr("UntypedStorage")?.unbind(),
                parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
                strided: torch.getattr("strided")?.unbind(),
                tensor: torch.getattr("Tensor")?.unbind(),
                warn_if_has_hooks: hooks.getattr("warn_if_has_hooks")?.unbind(),
                dtypes: dtypes.collect(),
            })
        })
    }

    /// Whether nothing but this reference can reach a storage.
    pub(super) fn is_sole(&self, owner: &Bound<'_, PyAny>) -> PyResult<bool> {
        let ours = owner.get_type().is(&self.untyped_storage);
        let asked = || self.is_sole.bind(owner.py()).call1((owner,))?.is_truthy();
        Ok(ours && refcount(owner) == 1 && asked()?)
    }

    pub(super) fn dtype(&self, dtype: &Bound<'_, PyAny>) -> PyResult<Dtype> {
        match self.dtypes.iter().find(|(object, _)| dtype.is(object)) {
            Some((_, known)) => Ok(*known),
            None => Err(Error::UnknownDtype { name: dtype.to_string() }.into()),
        }
    }
}

fn refcount(object: &Bound<'_, PyAny>) -> isize {
    // SAFETY: the object is held, and this thread has the interpreter.
    unsafe { ffi::Py_REFCNT(object.as_ptr()) }
}

/// Whether this torch can borrow tensors through the exchange API of DLPack 1.
#[pyfunction]
pub(super) fn borrows(py: Python<'_>) -> PyResult<bool> {
    Ok(Torch::get(py)?.to_py_object.is_some())
}

/// torch's DLPack functions. `torch.from_dlpack` calls the first in the end, after asking the
/// exporter ten questions. The second describes a tensor in one call.
fn exchange(tensor: &Bound<'_, PyAny>) -> PyResult<(Option<ToPyObject>, Option<Describe>)> {
    let Some(capsule) = tensor.getattr_opt("__dlpack_c_exchange_api__")? else {
        return Ok((None, None));
    };
    // SAFETY: an object, and a static name.
    let api =
        unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
    // SAFETY: null with an exception set, or the table with that name, which lives for ever.
    let Some(api) = (unsafe { api.cast::<ExchangeApi>().as_ref() }) else {
        return Err(PyErr::fetch(tensor.py()));
    };
    Ok((api.to_py_object(), api.describe()))
}
