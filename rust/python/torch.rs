//! What of torch a tensor is made of and asked about.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::Error;
use crate::format::dtype::Dtype;
use crate::python::dlpack::{Describe, ExchangeApi, ToPyObject};

/// Looked up once.
pub(super) struct Torch {
    /// None in a torch below 2.10, or of another DLPack than ours.
    pub(super) to_py_object: Option<ToPyObject>,
    pub(super) describe: Option<Describe>,
    pub(super) has_storage: Py<PyAny>,
    is_sole: Py<PyAny>,
    untyped_storage: Py<PyAny>,
    pub(super) parameter: Py<PyAny>,
    pub(super) strided: Py<PyAny>,
    pub(super) tensor: Py<PyAny>,
    pub(super) warn_if_has_hooks: Py<PyAny>,
    /// torch has one object for each.
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
                let object = torch.getattr(dtype.name()).ok()?; // not every torch has every one
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

    /// Whether a storage is in memory that nobody but this reference can reach.
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
    // SAFETY: an object that is held, by a thread that has the interpreter.
    unsafe { ffi::Py_REFCNT(object.as_ptr()) }
}

/// Whether tensors can be lent to this torch, by the exchange API of DLPack 1.
#[pyfunction]
pub(super) fn borrows(py: Python<'_>) -> PyResult<bool> {
    Ok(Torch::get(py)?.to_py_object.is_some())
}

/// What `torch.from_dlpack` comes to in the end, after ten questions to an exporter; and what answers
/// in one go what we ask of a tensor that is to be published.
fn exchange(tensor: &Bound<'_, PyAny>) -> PyResult<(Option<ToPyObject>, Option<Describe>)> {
    let Some(capsule) = tensor.getattr_opt("__dlpack_c_exchange_api__")? else {
        return Ok((None, None));
    };
    // SAFETY: an object, and a static name.
    let api =
        unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dlpack_exchange_api".as_ptr()) };
    // SAFETY: null with an exception set, or the table that the name promises, there for good.
    let Some(api) = (unsafe { api.cast::<ExchangeApi>().as_ref() }) else {
        return Err(PyErr::fetch(tensor.py()));
    };
    Ok((api.to_py_object(), api.describe()))
}
