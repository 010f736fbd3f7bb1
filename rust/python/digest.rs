//! The digest of an object in parts.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::format::digest::digest as digest_of;
use crate::format::header::{checksums, start_nbytes};
use crate::format::table::{Table, fingerprint};
use crate::memory::region::Region;
use crate::python::block::Block;
use crate::python::gather::Gather;

/// The digest of an object in hexadecimal, from its skeleton, its table, its views that are
/// buffers, and its block (or the start of it, with the checksums). `plain` returns the part of an
/// archive that counts.
#[pyfunction]
pub(super) fn digest(
    skeleton: &[u8],
    table: &[u8],
    buffers: Vec<u32>,
    block: &Bound<'_, PyAny>,
    plain: &Bound<'_, PyAny>,
) -> PyResult<String> {
    let decoded = Table::decode(table)?;
    let block = PyUntypedBuffer::get(block)?;
    let nbytes = block.len_bytes().min(start_nbytes(&decoded));
    let start = Region { address: block.buf_ptr() as usize, nbytes };
    // SAFETY: it lies within the buffer, which is held; nobody writes to a finished block.
    let start = unsafe { start.bytes() };
    let sums = checksums(&decoded, fingerprint(table), start)?;
    hexadecimal(skeleton, &decoded, &buffers, &sums, plain)
}

/// The digest of a variant, from its blocks, each with the numbers of its views. Reads no weights.
#[pyfunction]
pub(super) fn digest_of_blocks(
    py: Python<'_>,
    skeleton: &[u8],
    buffers: Vec<u32>,
    blocks: Vec<(Bound<'_, Block>, Vec<usize>)>,
    plain: &Bound<'_, PyAny>,
) -> PyResult<String> {
    let (whole, sums) = Gather::joined(py, blocks)?;
    let table = Table::decode(whole.table.as_bytes(py))?;
    hexadecimal(skeleton, &table, &buffers, &sums, plain)
}

fn hexadecimal(
    skeleton: &[u8],
    table: &Table,
    buffers: &[u32],
    sums: &[u64],
    plain: &Bound<'_, PyAny>,
) -> PyResult<String> {
    let py = plain.py();
    let plain = |archive: &[u8]| {
        let counts = plain.call1((PyBytes::new(py, archive),)).and_then(|counts| counts.extract());
        counts.unwrap_or_else(|_| archive.to_vec())
    };
    let digest = digest_of(skeleton, table, buffers, sums, &plain)?;
    Ok(format!("{digest:032x}"))
}
