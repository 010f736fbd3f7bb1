//! A block where it is read, as a Python object.

use std::ffi::{OsString, c_int, c_void};
use std::io;
use std::sync::OnceLock;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::error::Error;
use crate::format::header;
use crate::format::table::{Table, fingerprint};
use crate::format::view::{Flags, View};
use crate::io::block;
use crate::memory::forks::Since;
use crate::memory::huge;
use crate::memory::lease::Lease;
use crate::memory::pages::{Pages, Prefault};
use crate::memory::region::Region;
use crate::memory::store;
use crate::platform;
use crate::platform::mapping::Backing;
use crate::python::buffer;
use crate::python::connection::{Connection, Pin};
use crate::python::loan;

/// A block in this process, with its table: writable memory that keeps the store's buffer.
///
/// ```text
///  tensor ─▶ Block ─▶ pages ─▶ Ray's buffer ─▶ object in the store
/// ```
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Block {
    // dropped in this order: the prefault thread, the pages, then the memory beneath them
    prefault: OnceLock<Option<Prefault>>,
    pages: Pages,
    _lease: Option<Lease>,
    _pin: Option<Pin>,
    table: Table,
    fingerprint: u64,
    source: Option<Backing>,
    /// Why the pages are not held as requested, or None.
    #[pyo3(get)]
    fallback: Option<String>,
}

#[pymethods]
impl Block {
    /// Checks the buffers against the table, and maps them.
    ///
    /// If `anchored`, the only buffer is the block's header. The rest of the block follows it in
    /// the memory that the buffer keeps, as `Gather.write` left it. `connection` is Ray's, if Ray
    /// lent the buffers.
    ///
    /// `variant` gives the header that the block must have, and a table with other views over the
    /// same spans.
    #[new]
    #[pyo3(signature = (table, buffers, isolation, anchored=false, connection=None, variant=None))]
    fn new(
        py: Python<'_>,
        table: &Bound<'_, PyBytes>,
        buffers: Vec<Bound<'_, PyAny>>,
        isolation: &str,
        anchored: bool,
        connection: Option<Py<Connection>>,
        variant: Option<(Bound<'_, PyBytes>, Bound<'_, PyBytes>)>,
    ) -> PyResult<Block> {
        if !matches!(isolation, "private" | "shared" | "copy") {
            let message = format!("isolation is 'private', 'shared' or 'copy', not {isolation:?}");
            return Err(PyValueError::new_err(message));
        }
        let since = Since::now();
        let fingerprint = fingerprint(table.as_bytes());
        let table = Table::decode(table.as_bytes())?;
        let buffers = buffers.iter().map(PyUntypedBuffer::get).collect::<PyResult<Vec<_>>>()?;
        let mut pieces: Vec<_> = buffers
            .iter()
            .map(|buffer| Region { address: buffer.buf_ptr() as usize, nbytes: buffer.len_bytes() })
            .collect();
        let first = pieces.first().map_or(&[] as &[u8], |first| {
            // SAFETY: the buffer is held. Ray seals an object before others can read it.
            unsafe { first.bytes() }
        });
        if let (true, [anchor]) = (anchored, &mut pieces[..]) {
            anchor.nbytes = table.nbytes as usize;
        }
        let contiguous = block::is_contiguous(&pieces, table.nbytes)?;
        header::check_header(first, fingerprint)?;
        let table = match variant {
            Some((header, views)) => {
                header::check_same(first, header.as_bytes())?;
                table.with(Table::decode(views.as_bytes())?.views)?
            }
            None => table,
        };
        let whole = Region { address: first.as_ptr().addr(), nbytes: table.nbytes as usize };
        let backing = store::backing(whole);
        // no buffer tells how much follows an anchor: either all of it lies in one mapped file, or
        // it must be readable, and match its checksums
        if anchored && !matches!(backing, Ok(Some(_))) && !platform::is_readable(whole.addresses())
        {
            let (expected, found) = (table.nbytes, first.len() as u64);
            return Err(Error::BlockLength { expected, found }.into());
        }
        let in_no_file = backing == Ok(None);
        // the store may have reused the memory
        let lost = !in_no_file && connection.as_ref().is_some_and(|it| !it.get().kept());
        let mut fallback = match isolation {
            "copy" => None,
            _ if !contiguous => Some(format!("its {} buffers are not contiguous", pieces.len())),
            _ if lost => Some("this process has no connection to Ray's store".to_owned()),
            "private" if in_no_file => Some("the memory belongs to no shared file".to_owned()),
            _ => None,
        };
        let pages = if isolation == "copy" || fallback.is_some() {
            // SAFETY: the buffers are held; Ray seals an object before others can read it;
            // `is_contiguous` has checked the length.
            Pages::Copied(py.detach(|| unsafe { block::copy(&pieces, table.nbytes) })?)
        } else if isolation == "private" {
            // SAFETY: the buffers are held as long as the pages.
            let private = backing.clone().and_then(|_| unsafe { Pages::private(whole) });
            private.unwrap_or_else(|error| {
                fallback = Some(error.to_string());
                Pages::Shared(whole)
            })
        } else {
            Pages::Shared(whole)
        };
        let source = match &pages {
            Pages::Private { .. } | Pages::Shared(_) => backing.ok().flatten(),
            Pages::Copied(_) => None,
        };
        let copied = matches!(pages, Pages::Copied(_));
        let pin = (!copied).then(|| Pin::new(since, buffers, connection));
        let block = Block {
            prefault: OnceLock::new(),
            pages,
            _lease: None,
            _pin: pin,
            table,
            fingerprint,
            source,
            fallback,
        };
        if lost || anchored && in_no_file {
            block.verify(py)?;
        }
        Ok(block)
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

    /// Name, inode and offset in bytes of the store's file; None for other memory.
    #[getter]
    fn source(&self) -> Option<(OsString, u64, u64)> {
        self.source.clone().map(|source| (source.name.into(), source.inode, source.offset))
    }

    /// Offset and bytes of each span.
    #[getter]
    fn spans(&self) -> Vec<(u64, u64)> {
        spans(&self.table)
    }

    /// Span, dtype, flags, offset, shape and stride of each view, in elements.
    #[getter]
    fn views<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        views(py, &self.table)
    }

    /// How many views there are.
    #[getter]
    fn view_count(&self) -> usize {
        self.table.views.len()
    }

    /// The checksum of each span, as it was written.
    #[getter]
    pub(super) fn checksums(&self) -> PyResult<Vec<u64>> {
        // SAFETY: the pages live. A process that writes to them meanwhile damages the block, which
        // the checksums are to detect.
        let block = unsafe { self.pages.region().bytes() };
        Ok(header::checksums(&self.table, self.fingerprint, block)?)
    }

    /// Checks every span. Raises `BlockError` if a byte has changed.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        // SAFETY: as for `checksums`.
        let block = unsafe { self.pages.region().bytes() };
        Ok(py.detach(|| header::verify(&self.table, self.fingerprint, block))?)
    }

    /// Starts to fill in this process's page table for the block, in the background. If pages are
    /// small, has them made huge later, unless another process does.
    fn prefault(&self) {
        self.prefault.get_or_init(|| self.pages.prefault());
    }

    /// Bytes of the block in huge pages; None if unknown.
    fn huge_nbytes(&self) -> Option<usize> {
        self.pages.huge_nbytes()
    }

    /// The first byte of each view, and one past its last.
    fn ranges(&self, views: Vec<usize>) -> PyResult<Vec<(u64, u64)>> {
        let range = |index: usize| {
            let Table { views, spans, .. } = &self.table;
            let view = views.get(index).ok_or_else(|| PyIndexError::new_err(index))?;
            let own = view.extent()?.unwrap_or_default();
            let start = spans[view.span].offset; // no overflow: the table was checked
            Ok((start + own.start, start + own.end))
        };
        views.into_iter().map(range).collect()
    }

    /// A tensor for each view that has a span of its own and a dtype of DLPack. None for the other
    /// views, for `buffers` (views that are not tensors), and for all if torch cannot borrow.
    fn tensors<'py>(slf: &Bound<'py, Self>, buffers: Vec<usize>) -> PyResult<Bound<'py, PyList>> {
        let py = slf.py();
        let table = &slf.get().table;
        let mut is_buffer = vec![false; table.views.len()];
        for index in buffers {
            *is_buffer.get_mut(index).ok_or_else(|| PyIndexError::new_err(index))? = true;
        }
        let mut views_on = vec![0_u32; table.spans.len()];
        let tensors_on = table.views.iter().zip(&is_buffer).filter(|(_, is_buffer)| !**is_buffer);
        tensors_on.for_each(|(view, _)| views_on[view.span] += 1);
        let tensors = PyList::empty(py);
        for (view, is_buffer) in table.views.iter().zip(is_buffer) {
            if is_buffer {
                tensors.append(py.None())?;
                continue;
            }
            let plain = !view.flags.contains(Flags::CONJ) && !view.flags.contains(Flags::NEG);
            let alone = views_on[view.span] == 1 && plain && !view.shape.contains(&0);
            let made = if alone {
                let start = table.spans[view.span].offset + view.offset * view.dtype.itemsize();
                let data = (slf.get().pages.region().address + start as usize) as *mut c_void;
                // SAFETY: the view is in the block's table; the block keeps view and memory in
                // place.
                unsafe { loan::tensor(data, view, slf) }?
            } else {
                None
            };
            tensors.append(made)?;
        }
        Ok(tensors)
    }

    /// # Safety
    /// The interpreter calls it with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let region = slf.get().pages.region();
        // SAFETY: the interpreter gives the view. The block is its object, and holds the pages.
        unsafe { buffer::fill(slf.into_any(), region, false, view, flags) }
    }
}

impl Block {
    /// Its spans, and the views over them.
    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    /// The region of its bytes.
    pub(super) fn region(&self) -> Region {
        self.pages.region()
    }

    /// A block over the pages of a file.
    pub(super) fn over(
        pages: Pages,
        lease: Option<io::Result<Lease>>,
        table: Table,
        encoded: &[u8],
    ) -> Block {
        let (lease, refused) = match lease {
            Some(Ok(lease)) => (Some(lease), None),
            Some(Err(error)) => (None, Some(error)),
            None => (None, None),
        };
        Block {
            prefault: OnceLock::new(),
            pages,
            _lease: lease,
            _pin: None,
            fingerprint: fingerprint(encoded),
            table,
            source: None,
            fallback: refused.map(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => "the file belongs to another user".to_owned(),
                io::ErrorKind::WouldBlock => "the file is open for writing".to_owned(),
                _ => format!("the system gives no lease on this file ({error})"),
            }),
        }
    }
}

/// Offset and bytes of each span.
pub(super) fn spans(table: &Table) -> Vec<(u64, u64)> {
    table.spans.iter().map(|span| (span.offset, span.nbytes)).collect()
}

/// Span, dtype, flags, offset, shape and stride of each view, in elements.
pub(super) fn views<'py>(py: Python<'py>, table: &Table) -> PyResult<Vec<Bound<'py, PyTuple>>> {
    let view = |view: &View| {
        let shape = PyTuple::new(py, &view.shape)?;
        let stride = PyTuple::new(py, &view.stride)?;
        (view.span, view.dtype.name(), view.flags.0, view.offset, shape, stride).into_pyobject(py)
    };
    table.views.iter().map(view).collect()
}

/// Why pages of shared memory cannot be made huge here; None if they can.
#[pyfunction]
pub(super) fn huge_pages_obstacle() -> Option<String> {
    huge::obstacle()
}

/// Name, inode and offset in bytes of the shared file mapping at an address; None for other memory,
/// or if the system does not tell.
#[pyfunction]
pub(super) fn source_of(address: usize) -> PyResult<Option<(OsString, u64, u64)>> {
    let source = store::backing(Region { address, nbytes: 1 }).ok().flatten();
    Ok(source.map(|source| (source.name.into(), source.inode, source.offset)))
}

/// How many tensors and buffers a table has.
#[pyfunction]
pub(super) fn view_count(table: &[u8]) -> PyResult<usize> {
    Ok(Table::decode(table)?.views.len())
}
