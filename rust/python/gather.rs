//! Gathers storages and writes them into a block.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ffi::c_int;
use std::iter;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3::{IntoPyObjectExt, ffi};

use crate::error::{Error, Result};
use crate::format::layout::{Layout, Span, used};
use crate::format::table::{Table, fingerprint};
use crate::format::view::View;
use crate::io::block;
use crate::io::fill;
use crate::io::source::{self, Source};
use crate::io::twins::Storages;
use crate::memory::aliases::Aliases;
use crate::memory::arena::Lot;
use crate::memory::region::Region;
use crate::memory::sole::Sole;
use crate::python::arena::Arena;
use crate::python::block::Block;
use crate::python::buffer;
use crate::python::errors::PublishError;
use crate::python::release::{Release, lock};
use crate::python::sources::Sources;
use crate::python::torch::Torch;

/// Storages and views that are to become a block.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Gather {
    layout: Layout,
    storages: Vec<Region>,
    /// The objects that keep the storages alive.
    owners: Mutex<Vec<Py<PyAny>>>,
    /// The offset table, encoded.
    #[pyo3(get)]
    pub(super) table: Py<PyBytes>,
}

#[pymethods]
impl Gather {
    #[new]
    fn new(py: Python<'_>, sources: &Sources) -> PyResult<Gather> {
        let Sources { storages, views, buffers, .. } = sources;
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
        let region = |((whole, owner), used): (&(Region, Py<PyAny>), Range<u64>)| {
            let nbytes = (used.end - used.start) as usize;
            (Region { address: whole.address + used.start as usize, nbytes }, owner.clone_ref(py))
        };
        let (storages, owners): (Vec<_>, Vec<_>) = storages.iter().zip(used).map(region).unzip();
        let mut aligns = vec![1; storages.len()];
        buffers.iter().for_each(|(&storage, &align)| aligns[storage] = align);
        for view in &views {
            aligns[view.span] = aligns[view.span].max(view.dtype.itemsize() as usize);
        }
        let Aliases { regions: storages, places } = Aliases::of(&storages, &aligns);
        for view in &mut views {
            let (span, offset) = places[view.span];
            view.offset +=
                if view.extent()?.is_some() { offset as u64 / view.dtype.itemsize() } else { 0 };
            view.span = span;
        }
        let mut kept: Vec<Vec<_>> = storages.iter().map(|_| Vec::new()).collect();
        owners.into_iter().zip(places).for_each(|(owner, (span, _))| kept[span].push(owner));
        let owners = kept.into_iter().map(|mut owners| match owners.len() {
            1 => Ok(owners.remove(0)),
            _ => owners.into_py_any(py),
        });
        let owners = owners.collect::<PyResult<_>>()?;
        Gather::of(py, storages, owners, views)
    }

    /// Joins the storages of several blocks into one block to be written. The numbers of the views
    /// give their order; no number may occur twice.
    #[staticmethod]
    fn of_blocks(py: Python<'_>, blocks: Vec<(Bound<'_, Block>, Vec<usize>)>) -> PyResult<Gather> {
        Ok(Gather::joined(py, blocks)?.0)
    }

    /// Leaves out storages whose bytes are in a span of one of these blocks. No two storages get
    /// the same span.
    ///
    /// Returns the rest, and the numbers of its views. For each block, returns the table of the
    /// views that lie there, and their numbers. Ignores a block with less than a sixteenth of the
    /// storages' bytes, unless these are at least half of the block.
    fn without(&self, py: Python<'_>, blocks: Vec<Bound<'_, Block>>) -> PyResult<Rest> {
        let spans = spans_of(&blocks);
        let mut sums = Vec::new();
        for block in &blocks {
            sums.extend(block.get().checksums()?);
        }
        // SAFETY: as for `find`.
        let find = |storages: &Storages, spans: &[&[u8]]| unsafe { storages.find(spans, &sums) };
        let found = self.find(py, &spans, find)?;
        let all = self.nbytes_of_storages();
        let pays = |there: usize, whole: usize| there * 16 >= all || there * 2 >= whole;
        let used: Vec<_> = nbytes_in(&blocks, &spans, &found)
            .map(|(there, whole)| there > 0 && pays(there, whole))
            .collect();
        self.split(py, &blocks, &spans, found, &used)
    }

    /// As `without`, for the blocks of an object's previous version, each with the numbers of its
    /// views. Compares each storage with at most one span, and none if samples differ.
    ///
    /// Uses at most `most` blocks, and none with less than half of its bytes in use. Leaves out
    /// nothing if that is less than a quarter of the bytes.
    fn without_previous(
        &self,
        py: Python<'_>,
        placed: Vec<(Bound<'_, Block>, Vec<usize>)>,
        most: usize,
    ) -> PyResult<Rest> {
        let (blocks, numbers): (Vec<_>, Vec<_>) = placed.into_iter().unzip();
        let mut spans = spans_of(&blocks);
        let mut order = HashMap::new(); // the lowest number of a view of each span
        for (block, (of, numbers)) in blocks.iter().zip(&numbers).enumerate() {
            for (view, &number) in of.get().table().views.iter().zip(numbers) {
                let first = order.entry((block, view.span)).or_insert(number);
                *first = number.min(*first);
            }
        }
        spans.sort_by_key(|&(block, span, _)| {
            order.get(&(block, span)).copied().unwrap_or(usize::MAX)
        });
        // SAFETY: as for `find`.
        let find = |storages: &Storages, spans: &[&[u8]]| unsafe { storages.find_in_order(spans) };
        let found = self.find(py, &spans, find)?;
        let there: Vec<_> = nbytes_in(&blocks, &spans, &found).collect();
        let mut best: Vec<_> = (0..blocks.len()).collect();
        best.retain(|&block| there[block].0 > 0 && there[block].0 * 2 >= there[block].1);
        best.sort_by_key(|&block| Reverse(there[block].0));
        best.truncate(most);
        if best.iter().map(|&block| there[block].0).sum::<usize>() * 4 < self.nbytes_of_storages() {
            best.clear();
        }
        let used: Vec<_> = (0..blocks.len()).map(|block| best.contains(&block)).collect();
        self.split(py, &blocks, &spans, found, &used)
    }

    /// The block as a list of buffers: the small storages packed, each large one in place.
    fn segments(slf: &Bound<'_, Self>) -> PyResult<Vec<Segment>> {
        let (py, gather) = (slf.py(), slf.get());
        let fingerprint = fingerprint(gather.table.as_bytes(py));
        // SAFETY: the owners keep the storages alive. The caller must not write to a model while
        // publishing it, as with any pickle.
        let packed =
            py.detach(|| unsafe { block::pack(&gather.layout, &gather.storages, fingerprint) })?;
        let new =
            |region, packed| Segment { region, _packed: packed, _gather: slf.clone().unbind() };
        let first = new(Region::of(&packed), packed);
        let others = gather.layout.segments().map(|(storage, part)| {
            let address = gather.storages[storage].address + part.start;
            new(Region { address, nbytes: part.len() }, Vec::new())
        });
        Ok(iter::once(first).chain(others).collect())
    }

    /// Bytes in the block.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.layout.nbytes
    }

    /// Writes the whole block to `room`, from `anchor` on, and zeros to the end of `room`.
    ///
    /// With an arena, releases the storages while it writes them: those that nobody else holds are
    /// freed. Possible only once.
    #[pyo3(signature = (anchor, room, arena = None))]
    fn write(
        &self,
        py: Python<'_>,
        anchor: &Bound<'_, PyAny>,
        room: &Bound<'_, PyAny>,
        arena: Option<&Arena>,
    ) -> PyResult<()> {
        let target = buffer::room_at(anchor, room, self.layout.nbytes)?;
        let fingerprint = fingerprint(self.table.as_bytes(py));
        let (holders, release) = match arena {
            Some(arena) => {
                let holders = self.holders(py, arena)?;
                let owners = mem::take(&mut *lock(&self.owners));
                (holders, Some(Release::new(&self.layout.spans, owners)))
            }
            None => (Vec::new(), None),
        };
        let filled = release.as_ref().map(|release| |range| release.filled(range));
        let filled = filled.as_ref().map(|filled| filled as fill::Release<'_>);
        py.detach(|| {
            // SAFETY: it lies within the room, which is writable and held. Nobody else has a
            // reference to the object yet, so nobody reads or writes it.
            let target = unsafe { target.bytes_mut() };
            let sources = self.sources(holders, release.as_ref());
            // SAFETY: as for `segments`. `Sole` keeps the lot of its storage, and `release` keeps
            // the other lots and storages until they are written.
            unsafe { block::write(sources, &self.layout, fingerprint, target, filled) }
        })
        .map_err(refused)
    }
}

/// The exception for an error. A source file that cannot be read is a `PublishError`.
fn refused(error: Error) -> PyErr {
    match error {
        Error::Unreadable { .. } => PublishError::new_err(error.to_string()),
        _ => error.into(),
    }
}

/// The error for numbers that are not those of a variant.
const NUMBERS: Error = Error::Corrupt { what: "the list of tensor numbers of a variant" };

impl Gather {
    /// Plans the block for these storages, which the owners keep, and for views over them.
    fn of(
        py: Python<'_>,
        storages: Vec<Region>,
        owners: Vec<Py<PyAny>>,
        views: Vec<View>,
    ) -> PyResult<Gather> {
        let layout = Layout::plan(storages.iter().map(|storage| storage.nbytes as u64))?;
        let table = Table::new(&layout, views)?.encode();
        let table = PyBytes::new(py, &table).unbind();
        Ok(Gather { layout, storages, owners: Mutex::new(owners), table })
    }

    /// As `of_blocks`, with the checksum of each storage, as it was written.
    pub(super) fn joined(
        py: Python<'_>,
        blocks: Vec<(Bound<'_, Block>, Vec<usize>)>,
    ) -> PyResult<(Gather, Vec<u64>)> {
        let (mut storages, mut owners, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        let mut ordered = vec![None; blocks.iter().map(|(_, numbers)| numbers.len()).sum()];
        for (block, numbers) in blocks {
            let table = block.get().table();
            let Region { address, .. } = block.get().region();
            let its_sums = block.get().checksums()?;
            if numbers.len() != table.views.len() {
                return Err(NUMBERS.into());
            }
            let mut places = vec![None; table.spans.len()];
            for (view, number) in table.views.iter().zip(numbers) {
                let place = *places[view.span].get_or_insert_with(|| {
                    let Span { offset, nbytes } = table.spans[view.span];
                    let (address, nbytes) = (address + offset as usize, nbytes as usize);
                    storages.push(Region { address, nbytes });
                    owners.push(block.clone().into_any().unbind());
                    sums.push(its_sums[view.span]);
                    storages.len() - 1
                });
                let at = ordered.get_mut(number).filter(|at| at.is_none()).ok_or(NUMBERS)?;
                *at = Some(View { span: place, ..view.clone() });
            }
        }
        let views = ordered.into_iter().collect::<Option<_>>().ok_or(NUMBERS)?;
        Ok((Gather::of(py, storages, owners, views)?, sums))
    }

    fn nbytes_of_storages(&self) -> usize {
        self.storages.iter().map(|storage| storage.nbytes).sum()
    }

    /// Calls a function that looks for the storages in these spans of blocks.
    fn find(
        &self,
        py: Python<'_>,
        spans: &[InBlock],
        find: impl Fn(&Storages, &[&[u8]]) -> Result<Vec<Option<usize>>> + Sync,
    ) -> PyResult<Vec<Option<usize>>> {
        let found = py.detach(|| {
            // SAFETY: the blocks are held, and nobody writes to an object in the store.
            let there = spans.iter().map(|(_, _, region)| unsafe { region.bytes() });
            // The owners keep the storages alive. The caller must not write to a model while
            // publishing it, as with any pickle.
            find(&Storages::of(&self.storages), &there.collect::<Vec<_>>())
        });
        found.map_err(refused)
    }

    /// Leaves out the storages that were found in the used blocks.
    fn split(
        &self,
        py: Python<'_>,
        blocks: &[Bound<'_, Block>],
        spans: &[InBlock],
        mut found: Vec<Option<usize>>,
        used: &[bool],
    ) -> PyResult<Rest> {
        let views = Table::decode(self.table.as_bytes(py))?.views;
        found.iter_mut().for_each(|span| *span = span.filter(|&span| used[spans[span].0]));
        let mut places = vec![0; found.len()];
        let (mut storages, mut owners) = (Vec::new(), Vec::new());
        for (index, owner) in lock(&self.owners).iter().enumerate() {
            if found[index].is_none() {
                places[index] = storages.len();
                storages.push(self.storages[index]);
                owners.push(owner.clone_ref(py));
            }
        }
        let mut own = (Vec::new(), Vec::new());
        let mut there = vec![(Vec::new(), Vec::new()); blocks.len()];
        for (number, view) in views.into_iter().enumerate() {
            let ((views, numbers), span) = match found[view.span] {
                None => (&mut own, places[view.span]),
                Some(found) => (&mut there[spans[found].0], spans[found].1),
            };
            views.push(View { span, ..view });
            numbers.push(number);
        }
        let tables = blocks.iter().zip(there).map(|(block, (views, numbers))| {
            let table = block.get().table().with(views)?.encode();
            Ok((PyBytes::new(py, &table).unbind(), numbers))
        });
        let tables = tables.collect::<PyResult<_>>()?;
        Ok((Gather::of(py, storages, owners, own.0)?, own.1, tables))
    }

    /// Who else holds each storage. For a storage in a lot, the lot replaces the owner.
    fn holders(&self, py: Python<'_>, arena: &Arena) -> PyResult<Vec<Holder>> {
        let torch = Torch::get(py)?;
        let holder = |(storage, owner): (&Region, &mut Py<PyAny>)| {
            if let Some(lot) = arena.0.lot_at(storage.address) {
                *owner = py.None();
                return Ok(Holder::Lot(lot));
            }
            Ok(if torch.is_sole(owner.bind(py))? { Holder::Nobody } else { Holder::Others })
        };
        self.storages.iter().zip(lock(&self.owners).iter_mut()).map(holder).collect()
    }

    /// The sources of the block, each with its offset there; `release` gets the lots that others
    /// hold, too.
    fn sources(&self, holders: Vec<Holder>, release: Option<&Release>) -> Vec<(u64, Source)> {
        let mut holders = holders.into_iter();
        let (mut sources, mut others) = (Vec::new(), Vec::new());
        for (span, &storage) in self.layout.spans.iter().zip(&self.storages) {
            let lot = match holders.next() {
                Some(Holder::Nobody) => None,
                Some(Holder::Lot(lot)) if Arc::strong_count(&lot) == 1 => Some(lot),
                other => {
                    if let (Some(Holder::Lot(lot)), Some(release)) = (other, release) {
                        release.keep(*span, lot);
                    }
                    others.push((span.offset, storage));
                    continue;
                }
            };
            // SAFETY: the lot, or the owner in `release`, keeps it mapped until all is written.
            // Nobody else holds it, so nobody reads it then, and none of its pages is pinned.
            sources.push((span.offset, Source::Sole(unsafe { Sole::new(storage, lot) })));
        }
        sources.extend(source::trace(others.into_iter()));
        sources
    }
}

/// A span of a block: the number of the block, its index there, and its bytes.
type InBlock = (usize, usize, Region);

/// What is not in other blocks, with the numbers of its views; and for each block, the table of the
/// views that lie there, with their numbers.
type Rest = (Gather, Vec<usize>, Vec<(Py<PyBytes>, Vec<usize>)>);

/// The spans of these blocks.
fn spans_of(blocks: &[Bound<'_, Block>]) -> Vec<InBlock> {
    let mut spans = Vec::new();
    for (number, block) in blocks.iter().enumerate() {
        let (table, Region { address, .. }) = (block.get().table(), block.get().region());
        let span = |(index, span): (usize, &Span)| {
            let (address, nbytes) = (address + span.offset as usize, span.nbytes as usize);
            (number, index, Region { address, nbytes })
        };
        spans.extend(table.spans.iter().enumerate().map(span));
    }
    spans
}

/// For each block, the bytes that were found there, and all its bytes.
fn nbytes_in<'a>(
    blocks: &'a [Bound<'_, Block>],
    spans: &[InBlock],
    found: &[Option<usize>],
) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut there = vec![0; blocks.len()];
    for &span in found.iter().flatten() {
        there[spans[span].0] += spans[span].2.nbytes;
    }
    there.into_iter().zip(blocks.iter().map(|block| block.get().region().nbytes))
}

/// Who else can reach a storage.
enum Holder {
    Nobody,
    /// The holders of its lot: nobody, if this is the only one.
    Lot(Arc<Lot>),
    Others,
}

/// A part of a block that is being written: a read-only buffer.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Segment {
    region: Region,
    /// The bytes of the packed storages ...
    _packed: Vec<u8>,
    /// ... or the object that keeps a storage of the model.
    _gather: Py<Gather>,
}

#[pymethods]
impl Segment {
    /// # Safety
    /// The interpreter calls it with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let region = slf.get().region;
        // SAFETY: the interpreter gives the view. The segment is its object, and keeps the bytes.
        unsafe { buffer::fill(slf.into_any(), region, true, view, flags) }
    }
}
