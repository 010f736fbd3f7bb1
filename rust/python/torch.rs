//! What of torch a tensor is made of and asked about.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::dtype::Dtype;
use crate::error::Error;

/// Looked up once.
pub(super) struct Torch {
    pub(super) from_dlpack: Py<PyAny>,
    pub(super) has_storage: Py<PyAny>,
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
            let (core, hooks) = (torch.getattr("_C")?, py.import("torch.utils.hooks")?);
            let dtypes = Dtype::ALL.iter().filter_map(|&dtype| {
                let object = torch.getattr(dtype.name()).ok()?; // not every torch has every one
                Some((object.unbind(), dtype))
            });
            Ok(Torch {
                // what `torch.from_dlpack` calls, which first asks ten questions of an exporter
                from_dlpack: core.getattr("_from_dlpack")?.unbind(),
                has_storage: core.getattr("_has_storage")?.unbind(),
                parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
                strided: torch.getattr("strided")?.unbind(),
                tensor: torch.getattr("Tensor")?.unbind(),
                warn_if_has_hooks: hooks.getattr("warn_if_has_hooks")?.unbind(),
                dtypes: dtypes.collect(),
            })
        })
    }

    pub(super) fn dtype(&self, dtype: &Bound<'_, PyAny>) -> PyResult<Dtype> {
        match self.dtypes.iter().find(|(object, _)| dtype.is(object)) {
            Some((_, known)) => Ok(*known),
            None => Err(Error::UnknownDtype { name: dtype.to_string() }.into()),
        }
    }
}
