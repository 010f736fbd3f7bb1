//! The edge towards Python, and the only file that knows PyO3. Stub: `python/ray_zerocopy/_core.pyi`.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::ops::Range;
use std::sync::OnceLock;
use std::{mem, ptr, slice};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyList, PySet, PyString, PyTuple, PyType};
use pyo3::{IntoPyObjectExt, intern};

use crate::block;
use crate::dlpack::{self, ManagedTensor};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::layout::{HEADER_NBYTES, Layout, Piece, Segment as Run, used};
use crate::pages::{self, Pages, Prefault, Source};
use crate::table::{Table, fingerprint};
use crate::view::{Flags, View};

pyo3::import_exception!(ray_zerocopy.errors, BlockError);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        BlockError::new_err(error.to_string())
    }
}

/// The tensors of an object graph as a pickler meets them: views over storages of the source.
///
/// `to_host` is called with each storage that does not lie in the host's memory, and gives one that
/// does.
#[pyclass(module = "ray_zerocopy._core")]
struct Sources {
    to_host: Py<PyAny>,
    views: Vec<View>,
    storages: Vec<(Piece, Py<PyAny>)>,
    /// What the views describe. It keeps the tensors alive, so that none takes another's address.
    #[pyo3(get)]
    tensors: Py<PyList>,
    /// The number of each tensor, by its own address.
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
            tensors: PyList::empty(py).unbind(),
            tensor_ids: HashMap::new(),
            storage_ids: HashMap::new(),
        }
    }

    /// Takes a plain tensor or parameter and gives its number; None for all else.
    ///
    /// A pickler's `persistent_id`, which it calls for every object, thousands of times a model: a
    /// method, as a call of the object itself would take twice as long.
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
        if !has_plain_storage(object)?
            || !object.getattr(intern!(object.py(), "__dict__"))?.is_empty()?
        {
            return Ok(None);
        }
        let view = self.view(torch, object, flags)?;
        let index = self.push(object, view)?;
        self.tensor_ids.insert(object.as_ptr() as usize, index);
        Ok(Some(index))
    }

    /// Takes a buffer that is no tensor, such as numpy's, as a view of uint8; gives its number.
    fn take_buffer(&mut self, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let bytes = PyUntypedBuffer::get(buffer)?;
        let piece = Piece { address: bytes.buf_ptr() as usize, nbytes: bytes.len_bytes() };
        let (flags, shape) = (Flags::default(), vec![piece.nbytes as u64]);
        let view = View {
            span: self.storages.len(),
            dtype: Dtype::Uint8,
            flags,
            offset: 0,
            shape,
            stride: vec![1],
        };
        self.storages.push((piece, buffer.clone().unbind()));
        self.push(buffer, view)
    }
}

impl Sources {
    fn push(&mut self, object: &Bound<'_, PyAny>, view: View) -> PyResult<usize> {
        self.tensors.bind(object.py()).append(object)?;
        self.views.push(view);
        Ok(self.views.len() - 1)
    }

    fn view(
        &mut self,
        torch: &Torch,
        tensor: &Bound<'_, PyAny>,
        mut flags: Flags,
    ) -> PyResult<View> {
        let py = tensor.py();
        let hooks = tensor.getattr(intern!(py, "_backward_hooks"))?;
        if !hooks.is_none() {
            torch.warn_if_has_hooks.call1(py, (tensor,))?;
        }
        for (flag, asked) in [
            (Flags::REQUIRES_GRAD, tensor.getattr(intern!(py, "requires_grad"))?),
            (Flags::CONJ, tensor.call_method0(intern!(py, "is_conj"))?),
            (Flags::NEG, tensor.call_method0(intern!(py, "is_neg"))?),
        ] {
            if asked.is_truthy()? {
                flags.0 |= flag.0;
            }
        }
        Ok(View {
            span: self.storage(tensor)?,
            dtype: torch.dtype(&tensor.getattr(intern!(py, "dtype"))?)?,
            flags,
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
        // the storage itself as well: as long as it lives, no other has its address
        let owner = if is_cpu { storage.unbind() } else { (host, &storage).into_py_any(py)? };
        self.storages.push((Piece { address, nbytes }, owner));
        self.storage_ids.insert(id, self.storages.len() - 1);
        Ok(self.storages.len() - 1)
    }
}

/// Whether a storage, a dtype and strides are all there is to a tensor.
#[pyfunction]
fn has_plain_storage(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = tensor.py();
    let torch = Torch::get(py)?;
    let is = |name| tensor.getattr(name)?.is_truthy();
    Ok(tensor.getattr(intern!(py, "layout"))?.is(&torch.strided)
        && !is(intern!(py, "is_meta"))?
        && !is(intern!(py, "is_quantized"))?
        && !is(intern!(py, "is_nested"))?
        && torch.has_storage.bind(py).call1((tensor,))?.is_truthy()?)
}

/// Storages and views on their way into a block.
#[pyclass(frozen, module = "ray_zerocopy._core")]
struct Gather {
    layout: Layout,
    storages: Vec<Piece>,
    /// What keeps the storages where they are.
    _owners: Vec<Py<PyAny>>,
    /// The offset table, encoded.
    #[pyo3(get)]
    table: Py<PyBytes>,
}

#[pymethods]
impl Gather {
    #[new]
    fn new(py: Python<'_>, sources: &Sources) -> PyResult<Gather> {
        let Sources { storages, views, .. } = sources;
        let mut views = views.clone();
        let mut extents = vec![Vec::new(); storages.len()];
        for (index, view) in views.iter().enumerate() {
            let (span, spans) = (view.span, storages.len());
            let no_such_span = Error::NoSuchSpan { view: index, span, spans };
            view.check(storages.get(span).ok_or(no_such_span)?.0.nbytes as u64)?;
            extents[span].extend(view.extent()?);
        }
        let used: Vec<_> = extents.into_iter().map(used).collect();
        for view in &mut views {
            let start = used[view.span].start / view.dtype.itemsize();
            view.offset = if view.extent()?.is_some() { view.offset - start } else { 0 };
        }
        let piece = |((whole, owner), used): (&(Piece, Py<PyAny>), Range<u64>)| {
            let nbytes = (used.end - used.start) as usize;
            (Piece { address: whole.address + used.start as usize, nbytes }, owner.clone_ref(py))
        };
        let (storages, _owners): (Vec<_>, _) = storages.iter().zip(used).map(piece).unzip();
        let layout = Layout::plan(&storages)?;
        let table = Table::new(&layout, views)?.encode();
        Ok(Gather { layout, storages, _owners, table: PyBytes::new(py, &table).unbind() })
    }

    /// The block as buffers in order: the small storages packed, the large ones where they are.
    fn segments(slf: &Bound<'_, Self>) -> Vec<Segment> {
        let (py, gather) = (slf.py(), slf.get());
        let fingerprint = fingerprint(gather.table.as_bytes(py));
        let segment = |run: &Run| {
            let (piece, packed) = match run {
                Run::Packed { .. } => {
                    // SAFETY: the owners keep the storages alive; that nobody writes a model while
                    // it is published is the caller's part, as with any pickle.
                    let bytes =
                        unsafe { block::pack(&gather.layout, &gather.storages, fingerprint) };
                    (Piece { address: bytes.as_ptr() as usize, nbytes: bytes.len() }, bytes)
                }
                Run::Piece(piece) => (*piece, Vec::new()),
            };
            Segment { piece, _packed: packed, _gather: slf.clone().unbind() }
        };
        gather.layout.segments.iter().map(segment).collect()
    }

    /// Bytes in the block.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.layout.nbytes
    }

    /// Writes the whole block where `anchor` starts, and clears what is left of `room`.
    fn write(
        &self,
        py: Python<'_>,
        anchor: &Bound<'_, PyAny>,
        room: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (anchor, room) = (PyUntypedBuffer::get(anchor)?, PyUntypedBuffer::get(room)?);
        let start = anchor.buf_ptr() as usize;
        let end = room.buf_ptr() as usize + room.len_bytes();
        let nbytes = self.layout.nbytes;
        let fits =
            (room.buf_ptr() as usize..end).contains(&start) && nbytes <= (end - start) as u64;
        if room.readonly() || !fits {
            return Err(PyBufferError::new_err(format!("no room for a block of {nbytes} bytes")));
        }
        let fingerprint = fingerprint(self.table.as_bytes(py));
        py.detach(|| {
            // SAFETY: within the room, which can be written and is held; nobody else has the
            // object's reference yet, so nobody reads or writes it.
            let target = unsafe { slice::from_raw_parts_mut(start as *mut u8, end - start) };
            // SAFETY: as for `segments`.
            unsafe { block::write(&self.layout, &self.storages, fingerprint, target) };
        });
        Ok(())
    }
}

/// A part of the block on its way: a read-only buffer.
#[pyclass(frozen, module = "ray_zerocopy._core")]
struct Segment {
    piece: Piece,
    /// The bytes, where they were packed ...
    _packed: Vec<u8>,
    /// ... and what keeps them, where they lie in the model.
    _gather: Py<Gather>,
}

#[pymethods]
impl Segment {
    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let piece = slf.get().piece;
        // SAFETY: the interpreter's view; the segment, which keeps the bytes, is its object.
        unsafe { fill_buffer(slf.into_any(), piece, true, view, flags) }
    }
}

/// # Safety
/// `view` is the interpreter's to be filled, and `object` keeps the piece alive.
unsafe fn fill_buffer(
    object: Bound<'_, PyAny>,
    piece: Piece,
    readonly: bool,
    view: *mut ffi::Py_buffer,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill"));
    }
    let (address, nbytes) = (piece.address as *mut c_void, piece.nbytes as ffi::Py_ssize_t);
    // SAFETY: the view is not null; the bytes live as long as the object, which it will refer to.
    let status = unsafe {
        ffi::PyBuffer_FillInfo(view, object.as_ptr(), address, nbytes, c_int::from(readonly), flags)
    };
    if status == 0 { Ok(()) } else { Err(PyErr::fetch(object.py())) }
}

/// A block in this process, with its table: writable memory that keeps the store's buffer alive.
///
/// ```text
///  tensor ─▶ Block ─▶ pages ─▶ Ray's buffer ─▶ object in the store
/// ```
#[pyclass(frozen, module = "ray_zerocopy._core")]
struct Block {
    // dropped in this order: what reads the pages, the pages, what lies beneath them
    prefault: OnceLock<Prefault>,
    pages: Pages,
    _buffers: Vec<PyUntypedBuffer>,
    table: Table,
    source: Option<Source>,
    /// Why the pages are not what was asked for, if they are not.
    #[pyo3(get)]
    fallback: Option<String>,
}

#[pymethods]
impl Block {
    /// Checks the buffers against the table and maps them.
    ///
    /// An anchored block is one buffer that is only the block's header: the rest follows it in the
    /// memory that the buffer keeps, as `Gather.write` has left it.
    #[new]
    #[pyo3(signature = (table, buffers, isolation, anchored=false))]
    fn new(
        py: Python<'_>,
        table: &Bound<'_, PyBytes>,
        buffers: Vec<Bound<'_, PyAny>>,
        isolation: &str,
        anchored: bool,
    ) -> PyResult<Block> {
        let fingerprint = fingerprint(table.as_bytes());
        let table = Table::decode(table.as_bytes())?;
        let buffers = buffers.iter().map(PyUntypedBuffer::get).collect::<PyResult<Vec<_>>>()?;
        let mut pieces: Vec<_> = buffers
            .iter()
            .map(|buffer| Piece { address: buffer.buf_ptr() as usize, nbytes: buffer.len_bytes() })
            .collect();
        let first = pieces.first().map_or(&[] as &[u8], |first| {
            // SAFETY: the buffer is held; objects of the store are sealed before they are read.
            unsafe { first.bytes() }
        });
        if let (true, [anchor]) = (anchored, &mut pieces[..]) {
            anchor.nbytes = table.nbytes as usize;
        }
        let contiguous = block::is_contiguous(&pieces, table.nbytes)?;
        block::check_header(first, fingerprint)?;
        let whole = pieces
            .first()
            .map(|first| Piece { address: first.address, nbytes: table.nbytes as usize });
        let copy = || {
            // SAFETY: the buffers are held; objects of the store are sealed before they are read;
            // the length was checked.
            py.detach(|| unsafe { block::copy(&pieces, table.nbytes) }).map(Pages::Copied)
        };
        let (mut source, mut fallback) = (None, None);
        let pages = match (whole, isolation) {
            (_, "copy") => copy()?,
            (Some(whole), "private" | "shared") if contiguous => {
                match (pages::source(whole), isolation) {
                    (Ok(None), "private") => {
                        fallback = Some("it lies in no shared file".to_owned());
                        copy()?
                    }
                    (found, "shared") => {
                        source = found.ok().flatten();
                        Pages::Shared(whole)
                    }
                    (found, _) => match found.and_then(|_| Pages::private(whole)) {
                        Ok(pages) => pages,
                        Err(error) => {
                            fallback = Some(error.to_string());
                            Pages::Shared(whole)
                        }
                    },
                }
            }
            (_, "private" | "shared") => {
                fallback = Some(format!("its {} buffers do not adjoin", pieces.len()));
                copy()?
            }
            _ => {
                let message =
                    format!("isolation is 'private', 'shared' or 'copy', not {isolation:?}");
                return Err(PyValueError::new_err(message));
            }
        };
        if let Pages::Private { source: found, .. } = &pages {
            source = Some(found.clone());
        }
        Ok(Block { prefault: OnceLock::new(), pages, _buffers: buffers, table, source, fallback })
    }

    /// How the bytes are held: "private", "shared" or "copied".
    #[getter]
    fn held(&self) -> &'static str {
        match self.pages {
            Pages::Private { .. } => "private",
            Pages::Shared(_) => "shared",
            Pages::Copied(_) => "copied",
        }
    }

    /// File name, inode and offset in bytes of the store's file beneath; None for other memory.
    #[getter]
    fn source(&self) -> Option<(String, u64, u64)> {
        self.source.clone().map(|source| (source.name, source.inode, source.offset))
    }

    /// Offset and bytes of each span.
    #[getter]
    fn spans(&self) -> Vec<(u64, u64)> {
        self.table.spans.iter().map(|span| (span.offset, span.nbytes)).collect()
    }

    /// Span, dtype, flags, offset, shape and stride of each view, in elements.
    #[getter]
    fn views<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let view = |view: &View| {
            let shape = PyTuple::new(py, &view.shape)?;
            let stride = PyTuple::new(py, &view.stride)?;
            (view.span, view.dtype.name(), view.flags.0, view.offset, shape, stride)
                .into_pyobject(py)
        };
        self.table.views.iter().map(view).collect()
    }

    /// Fills this process's page table for the whole block, while the caller goes on.
    fn prefault(&self) {
        // SAFETY: the block drops it before the pages.
        self.prefault.get_or_init(|| unsafe { self.pages.prefault() });
    }

    /// A tensor for each view that has a span for itself, and a dtype that DLPack has; None for the
    /// others.
    fn tensors<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        let torch = Torch::get(py)?;
        let table = &slf.get().table;
        let mut views_on = vec![0_u32; table.spans.len()];
        table.views.iter().for_each(|view| views_on[view.span] += 1);
        let tensors = PyList::empty(py);
        for view in &table.views {
            let plain = !view.flags.contains(Flags::CONJ) && !view.flags.contains(Flags::NEG);
            let alone = views_on[view.span] == 1 && plain && view.extent()?.is_some();
            let offset = table.spans[view.span].offset;
            tensors.append(if alone { torch.tensor(slf, offset, view)? } else { None })?;
        }
        Ok(tensors)
    }

    /// # Safety
    /// Called by the interpreter with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let piece = slf.get().pages.piece();
        // SAFETY: the interpreter's view; the block, which holds the pages, is its object.
        unsafe { fill_buffer(slf.into_any(), piece, false, view, flags) }
    }
}

/// What of torch a tensor is made of and asked about, looked up once.
struct Torch {
    from_dlpack: Py<PyAny>,
    has_storage: Py<PyAny>,
    parameter: Py<PyAny>,
    strided: Py<PyAny>,
    tensor: Py<PyAny>,
    warn_if_has_hooks: Py<PyAny>,
    /// torch has one object for each.
    dtypes: Vec<(Py<PyAny>, Dtype)>,
}

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Torch> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let core = torch.getattr("_C")?;
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
                warn_if_has_hooks: py
                    .import("torch.utils.hooks")?
                    .getattr("warn_if_has_hooks")?
                    .unbind(),
                dtypes: dtypes.collect(),
            })
        })
    }

    fn dtype(&self, dtype: &Bound<'_, PyAny>) -> PyResult<Dtype> {
        match self.dtypes.iter().find(|(object, _)| dtype.is(object)) {
            Some((_, known)) => Ok(*known),
            None => Err(Error::UnknownDtype { name: dtype.to_string() }.into()),
        }
    }

    /// A tensor with a storage of its own over a part of the block; `None` where DLPack has no
    /// such dtype.
    fn tensor<'py>(
        &self,
        block: &Bound<'py, Block>,
        span: u64,
        view: &View,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = block.py();
        let start = (span + view.offset * view.dtype.itemsize()) as usize;
        let data = (block.get().pages.piece().address + start) as *mut c_void;
        let lender = Lender(Some(block.clone().unbind()));
        // SAFETY: the view is of the block's table, and neither moves while there is the block.
        let Some(loan) = (unsafe { dlpack::lend(data, view, lender) }) else {
            return Ok(None);
        };
        let tensor = self.from_dlpack.bind(py).call1((capsule(py, loan)?,))?;
        if view.flags.contains(Flags::PARAMETER) {
            // as torch's own lazy modules do; `Parameter(tensor)` makes a second tensor, 2 us more
            tensor.setattr(intern!(py, "__class__"), &self.parameter)?;
        }
        if view.flags.contains(Flags::REQUIRES_GRAD) {
            tensor.setattr(intern!(py, "requires_grad"), true)?;
        }
        Ok(Some(tensor))
    }
}

/// The block on loan to torch, which may give it back on any thread, or after the interpreter.
struct Lender(Option<Py<Block>>);

impl Drop for Lender {
    fn drop(&mut self) {
        let mut block = mem::ManuallyDrop::new(self.0.take());
        Python::try_attach(|_| drop(block.take()));
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

/// What `torch.nn.Module.__init__` gives every module, of which most stays as it was: of 17
/// attributes a module of BERT has about 14.
struct Defaults {
    /// Each attribute's name and what makes it.
    kinds: Vec<(Py<PyString>, Default)>,
    ordered_dict: Py<PyType>,
    /// Makes an empty one without `__init__`, which has nothing to do there: half the time.
    new_ordered_dict: ffi::newfunc,
    no_arguments: Py<PyTuple>,
}

/// A default attribute: an empty container of its own for each module, or one constant for all.
enum Default {
    Dict,
    OrderedDict,
    Set,
    Constant(Py<PyAny>),
}

impl Defaults {
    fn get(py: Python<'_>) -> PyResult<&Defaults> {
        static DEFAULTS: PyOnceLock<Defaults> = PyOnceLock::new();
        DEFAULTS.get_or_try_init(py, || {
            let module = py.import("torch")?.getattr("nn")?.getattr("Module")?.call0()?;
            let attributes = module.getattr("__dict__")?.cast_into::<PyDict>()?;
            let ordered_dict = py.import("collections")?.getattr("OrderedDict")?;
            let ordered_dict = ordered_dict.cast_into::<PyType>()?;
            let kinds = attributes.iter().map(|(name, value)| {
                let default = if value.is_exact_instance(&ordered_dict) {
                    Default::OrderedDict
                } else if value.is_exact_instance_of::<PyDict>() {
                    Default::Dict
                } else if value.is_exact_instance_of::<PySet>() {
                    Default::Set
                } else {
                    Default::Constant(value.unbind())
                };
                Ok((name.cast_into::<PyString>()?.unbind(), default))
            });
            let kinds = kinds.collect::<PyResult<_>>()?;
            // SAFETY: a type object; the slot is checked before it is used.
            let slot = unsafe { ffi::PyType_GetSlot(ordered_dict.as_type_ptr(), ffi::Py_tp_new) };
            if slot.is_null() {
                return Err(PyErr::fetch(py));
            }
            Ok(Defaults {
                kinds,
                ordered_dict: ordered_dict.unbind(),
                // SAFETY: the slot of this number holds a function of this type.
                new_ordered_dict: unsafe { mem::transmute::<*mut c_void, ffi::newfunc>(slot) },
                no_arguments: PyTuple::empty(py).unbind(),
            })
        })
    }

    fn new_ordered_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (kind, no_arguments) = (self.ordered_dict.as_ptr(), self.no_arguments.as_ptr());
        // SAFETY: this is the `tp_new` of this type, which takes a type and a tuple.
        let new = unsafe { (self.new_ordered_dict)(kind.cast(), no_arguments, ptr::null_mut()) };
        // SAFETY: a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, new) }
    }

    /// Sets the defaults, then what differs from them.
    fn set<'py>(
        &self,
        differing: &Bound<'py, PyDict>,
        set: impl Fn(&Bound<'py, PyAny>, &Bound<'py, PyAny>) -> PyResult<()>,
    ) -> PyResult<()> {
        let py = differing.py();
        for (name, default) in &self.kinds {
            let value = match default {
                Default::Dict => PyDict::new(py).into_any(),
                Default::OrderedDict => self.new_ordered_dict(py)?,
                Default::Set => PySet::empty(py)?.into_any(),
                Default::Constant(constant) => constant.bind(py).clone(),
            };
            set(name.bind(py), &value)?;
        }
        differing.iter().try_for_each(|(name, value)| set(&name, &value))
    }

    /// Whether a module's attribute is as it was made.
    fn is_untouched(&self, default: &Default, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(match default {
            Default::Dict => value.is_exact_instance_of::<PyDict>() && value.is_empty()?,
            Default::Set => value.is_exact_instance_of::<PySet>() && value.is_empty()?,
            Default::OrderedDict => {
                value.is_exact_instance(self.ordered_dict.bind(value.py())) && value.is_empty()?
            }
            Default::Constant(constant) => value.is(constant),
        })
    }
}

/// Reduces modules of one class, for a pickler, to the class and what differs from the defaults.
#[pyclass(frozen, module = "ray_zerocopy._core")]
struct ModuleReducer {
    /// Makes a bare module ...
    make: Py<PyAny>,
    /// ... of this class ...
    arguments: Py<PyTuple>,
    /// ... and restores it from what differs.
    restore: Py<PyAny>,
    /// The class's own `__getstate__`, if it has one.
    getstate: Option<Py<PyAny>>,
}

#[pymethods]
impl ModuleReducer {
    #[new]
    fn new(kind: &Bound<'_, PyType>, make: Py<PyAny>, restore: Py<PyAny>) -> PyResult<Self> {
        let py = kind.py();
        let getstate = kind.getattr("__getstate__")?;
        let inherited = py.import("torch.nn")?.getattr("Module")?.getattr("__getstate__")?;
        let getstate = (!getstate.is(&inherited)).then(|| getstate.unbind());
        let arguments = PyTuple::new(py, [kind])?.unbind();
        Ok(ModuleReducer { make, arguments, restore, getstate })
    }

    fn reduce<'py>(&self, module: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = module.py();
        let state = match &self.getstate {
            Some(getstate) => getstate.bind(py).call1((module,))?,
            None => module.getattr(intern!(py, "__dict__"))?,
        };
        let differing = match state.cast_exact::<PyDict>() {
            Ok(state) => differing(state)?,
            Err(_) => None,
        };
        let Some(differing) = differing else {
            return Ok(py.NotImplemented().into_bound(py)); // as pickle does it, then
        };
        let none = py.None();
        (&self.make, &self.arguments, differing, &none, &none, &self.restore).into_bound_py_any(py)
    }
}

/// The attributes of a module that differ from the defaults of `torch.nn.Module`.
///
/// None where `state` does not start with all of these, in their order, as it does in any module
/// whose `__init__` has run.
#[pyfunction]
fn differing<'py>(state: &Bound<'py, PyDict>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let defaults = Defaults::get(state.py())?;
    let differing = PyDict::new(state.py());
    let mut attributes = state.iter();
    for (expected, default) in &defaults.kinds {
        match attributes.next() {
            Some((name, value)) if name.eq(expected)? => {
                if !defaults.is_untouched(default, &value)? {
                    differing.set_item(name, value)?;
                }
            }
            _ => return Ok(None),
        }
    }
    for (name, value) in attributes {
        // what a compiler made of it stays here, as in `Module.__getstate__`
        if !name.eq(intern!(state.py(), "_compiled_call_impl"))? {
            differing.set_item(name, value)?;
        }
    }
    Ok(Some(differing))
}

/// The whole state of a module, its defaults fresh; the inverse of `differing`.
#[pyfunction]
fn module_state<'py>(differing: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyDict>> {
    let state = PyDict::new(differing.py());
    Defaults::get(differing.py())?.set(differing, |name, value| state.set_item(name, value))?;
    Ok(state)
}

/// Gives a bare module its whole state, as `nn.Module.__setstate__` would.
///
/// Attribute by attribute, as `__init__` does: until someone asks for its `__dict__`, a module then
/// needs none.
#[pyfunction]
fn restore_module<'py>(module: &Bound<'py, PyAny>, differing: &Bound<'py, PyDict>) -> PyResult<()> {
    Defaults::get(module.py())?.set(differing, |name, value| {
        let (module, name, value) = (module.as_ptr(), name.as_ptr(), value.as_ptr());
        // SAFETY: three objects of this interpreter.
        let status = unsafe { ffi::PyObject_GenericSetAttr(module, name, value) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(differing.py())) }
    })
}

/// File name, inode and offset in bytes of the shared file mapping that holds an address.
#[pyfunction]
fn source_of(address: usize) -> PyResult<Option<(String, u64, u64)>> {
    let source = pages::source(Piece { address, nbytes: 1 })?;
    Ok(source.map(|source| (source.name, source.inode, source.offset)))
}

/// The names of the dtypes that can be laid out.
#[pyfunction]
fn dtypes() -> Vec<&'static str> {
    Dtype::ALL.iter().map(|dtype| dtype.name()).collect()
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Gather>()?;
    module.add_class::<Segment>()?;
    module.add_class::<Block>()?;
    module.add_class::<Sources>()?;
    module.add_class::<ModuleReducer>()?;
    module.add_function(wrap_pyfunction!(has_plain_storage, module)?)?;
    module.add_function(wrap_pyfunction!(differing, module)?)?;
    module.add_function(wrap_pyfunction!(module_state, module)?)?;
    module.add_function(wrap_pyfunction!(restore_module, module)?)?;
    module.add_function(wrap_pyfunction!(source_of, module)?)?;
    module.add_function(wrap_pyfunction!(dtypes, module)?)?;
    module.add("HEADER_NBYTES", HEADER_NBYTES)?;
    module.add("REQUIRES_GRAD", Flags::REQUIRES_GRAD.0)?;
    module.add("PARAMETER", Flags::PARAMETER.0)?;
    module.add("CONJ", Flags::CONJ.0)?;
    module.add("NEG", Flags::NEG.0)?;
    Ok(())
}
