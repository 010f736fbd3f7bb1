//! The tensors of an object that is to be published, as a pickler finds them.

use std::collections::HashMap;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{IntoPyObjectExt, intern};

use crate::format::dtype::Dtype;
use crate::format::view::{Dims, Flags, View};
use crate::memory::region::Region;
use crate::python::dlpack::{self, Strided};
use crate::python::torch::Torch;

/// The tensors that a pickler finds in an object graph: views over storages.
///
/// Calls `to_host` with each storage that is not in host memory. It returns a copy that is.
#[pyclass(module = "ray_zerocopy._core")]
pub(super) struct Sources {
    to_host: Py<PyAny>,
    pub(super) views: Vec<View>,
    pub(super) storages: Vec<(Region, Py<PyAny>)>,
    /// The item size in bytes of each storage that is a buffer.
    pub(super) buffers: HashMap<usize, usize>,
    /// The tensors of the views. They stay alive, so that no new tensor gets the address of an old
    /// one.
    #[pyo3(get)]
    tensors: Py<PyList>,
    /// The number of each tensor, by its address.
    tensor_ids: HashMap<usize, usize>,
    /// The number of each storage, by the address of torch's `StorageImpl`.
    storage_ids: HashMap<usize, usize>,
}

#[pymethods]
impl Sources {
    #[new]
    fn new(py: Python<'_>, to_host: Py<PyAny>) -> Sources {
        Sources {
            to_host,
            views: Vec::new(),
            storages: Vec::new(),
            buffers: HashMap::new(),
            tensors: PyList::empty(py).unbind(),
            tensor_ids: HashMap::new(),
            storage_ids: HashMap::new(),
        }
    }

    /// Takes a plain tensor or parameter, and returns its number. None for all other objects.
    ///
    /// This is a pickler's `persistent_id`, called for every object, thousands of times a model. It
    /// is a method because calling the object itself would take twice as long.
    fn take(&mut self, object: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
        let torch = Torch::get(object.py())?;
        let kind = object.get_type();
        let flags = if kind.is(&torch.parameter) {
            Flags::PARAMETER
        } else if kind.is(&torch.tensor) {
            Flags::default()
        } else {
            return Ok(None);
        };
        if let Some(&known) = self.tensor_ids.get(&(object.as_ptr() as usize)) {
            return Ok(Some(known));
        }
        if !object.getattr(intern!(object.py(), "__dict__"))?.is_empty()? {
            return Ok(None);
        }
        let view = match self.described(torch, object, flags)? {
            Some(view) => view,
            None if has_plain_storage(object)? => self.view(torch, object, flags)?,
            None => return Ok(None),
        };
        let index = self.push(object, view)?;
        self.tensor_ids.insert(object.as_ptr() as usize, index);
        Ok(Some(index))
    }

    /// Takes a buffer that is not a tensor (numpy's, for example) as a view of uint8. Returns its
    /// number.
    ///
    /// Its item size gives its alignment.
    fn take_buffer(&mut self, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let bytes = PyUntypedBuffer::get(buffer)?;
        if !bytes.is_c_contiguous() && !bytes.is_fortran_contiguous() {
            return Err(PyBufferError::new_err("a buffer that is not contiguous cannot be stored"));
        }
        let region = Region { address: bytes.buf_ptr() as usize, nbytes: bytes.len_bytes() };
        self.buffers.insert(self.storages.len(), bytes.item_size());
        let (flags, shape) = (Flags::default(), Dims::from_slice(&[region.nbytes as u64]));
        let view = View {
            span: self.storages.len(),
            dtype: Dtype::Uint8,
            flags,
            offset: 0,
            shape,
            stride: Dims::from_slice(&[1]),
        };
        self.storages.push((region, buffer.clone().unbind()));
        self.push(buffer, view)
    }
}

impl Sources {
    fn push(&mut self, object: &Bound<'_, PyAny>, view: View) -> PyResult<usize> {
        self.tensors.bind(object.py()).append(object)?;
        self.views.push(view);
        Ok(self.views.len() - 1)
    }

    /// The view of a tensor with memory that DLPack can express. One call instead of the nine of
    /// `view`: half the time, for thousands of tensors.
    fn described(
        &mut self,
        torch: &Torch,
        tensor: &Bound<'_, PyAny>,
        flags: Flags,
    ) -> PyResult<Option<View>> {
        let Some(describe) = torch.describe else { return Ok(None) };
        // SAFETY: a tensor of torch, which nobody changes while this thread has the interpreter.
        let Some(strided) = (unsafe { dlpack::strided(describe, tensor.as_ptr().cast()) }) else {
            drop(PyErr::take(tensor.py()));
            return Ok(None);
        };
        if strided.address == 0 {
            return Ok(None);
        }
        let dtype = match strided.dtype {
            // torch gives these to DLPack for integers of less than a byte, too (2.15)
            Dtype::Int8 | Dtype::Uint8 => {
                torch.dtype(&tensor.getattr(intern!(tensor.py(), "dtype"))?)?
            }
            known => known,
        };
        let flags = self.flags(torch, tensor, dtype.is_complex(), flags)?;
        let span = self.storage(tensor)?;
        let start = self.storages[span].0.address;
        let Some(nbytes) = strided.address.checked_sub(start) else { return Ok(None) };
        let offset = nbytes as u64 / dtype.itemsize();
        let Strided { shape, stride, .. } = strided;
        Ok(Some(View { span, dtype, flags, offset, shape, stride }))
    }

    /// The flags of a tensor: those of autograd and of lazy negation.
    fn flags(
        &self,
        torch: &Torch,
        tensor: &Bound<'_, PyAny>,
        complex: bool,
        mut flags: Flags,
    ) -> PyResult<Flags> {
        let py = tensor.py();
        let mut set = |flag: Flags, asked: Bound<'_, PyAny>| -> PyResult<()> {
            flags.0 |= if asked.is_truthy()? { flag.0 } else { 0 };
            Ok(())
        };
        set(Flags::REQUIRES_GRAD, tensor.getattr(intern!(py, "requires_grad"))?)?;
        set(Flags::NEG, tensor.call_method0(intern!(py, "is_neg"))?)?;
        if complex {
            set(Flags::CONJ, tensor.call_method0(intern!(py, "is_conj"))?)?;
        }
        let hooks = tensor.getattr(intern!(py, "_backward_hooks"))?;
        if !hooks.is_none() {
            torch.warn_if_has_hooks.call1(py, (tensor,))?;
        }
        Ok(flags)
    }

    fn view(&mut self, torch: &Torch, tensor: &Bound<'_, PyAny>, flags: Flags) -> PyResult<View> {
        let py = tensor.py();
        Ok(View {
            span: self.storage(tensor)?,
            dtype: torch.dtype(&tensor.getattr(intern!(py, "dtype"))?)?,
            flags: self.flags(torch, tensor, true, flags)?,
            offset: tensor.call_method0(intern!(py, "storage_offset"))?.extract()?,
            shape: tensor.getattr(intern!(py, "shape"))?.extract()?,
            stride: tensor.call_method0(intern!(py, "stride"))?.extract()?,
        })
    }

    fn storage(&mut self, tensor: &Bound<'_, PyAny>) -> PyResult<usize> {
        let py = tensor.py();
        let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
        let id = storage.getattr(intern!(py, "_cdata"))?.extract()?;
        if let Some(&known) = self.storage_ids.get(&id) {
            return Ok(known);
        }
        let is_cpu = tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()?;
        let host = if is_cpu { &storage } else { &self.to_host.bind(py).call1((&storage,))? };
        let address = host.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let nbytes = host.call_method0(intern!(py, "nbytes"))?.extract()?;
        // keep the storage itself, so that no new one gets its address
        let owner = if is_cpu { storage.unbind() } else { (host, &storage).into_py_any(py)? };
        self.storages.push((Region { address, nbytes }, owner));
        self.storage_ids.insert(id, self.storages.len() - 1);
        Ok(self.storages.len() - 1)
    }
}

/// Whether a tensor consists only of a storage, a dtype and strides.
#[pyfunction]
pub(super) fn has_plain_storage(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = tensor.py();
    let torch = Torch::get(py)?;
    let is = |name| tensor.getattr(name)?.is_truthy();
    Ok(tensor.getattr(intern!(py, "layout"))?.is(&torch.strided)
        && !is(intern!(py, "is_meta"))?
        && !is(intern!(py, "is_quantized"))?
        && !is(intern!(py, "is_nested"))?
        && torch.has_storage.bind(py).call1((tensor,))?.is_truthy()?)
}
