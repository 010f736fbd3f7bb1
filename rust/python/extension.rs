//! The extension module `_core`: its classes, functions and constants. Its stub is
//! `python/ray_zerocopy/_core.pyi`.

use pyo3::prelude::*;

use crate::format::layout::HEADER_NBYTES;
use crate::format::snapshot::SNAPSHOT_HEADER_NBYTES;
use crate::format::view::Flags;
use crate::python::arena;
use crate::python::block;
use crate::python::collector;
use crate::python::connection;
use crate::python::digest;
use crate::python::gather;
use crate::python::module;
use crate::python::snapshot;
use crate::python::sources;
use crate::python::torch;

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<arena::Arena>()?;
    m.add_class::<arena::Lot>()?;
    m.add_class::<sources::Sources>()?;
    m.add_class::<gather::Gather>()?;
    m.add_class::<gather::Segment>()?;
    m.add_class::<connection::Connection>()?;
    m.add_class::<block::Block>()?;
    m.add_class::<collector::Modules>()?;
    m.add_class::<module::ModuleReducer>()?;
    m.add_class::<snapshot::Snapshot>()?;
    m.add_function(wrap_pyfunction!(snapshot::open_snapshot, m)?)?;
    m.add_function(wrap_pyfunction!(snapshot::before_fork, m)?)?;
    m.add_function(wrap_pyfunction!(snapshot::after_fork_in_parent, m)?)?;
    m.add_function(wrap_pyfunction!(snapshot::after_fork_in_child, m)?)?;
    m.add_function(wrap_pyfunction!(snapshot::snapshot_head, m)?)?;
    m.add_function(wrap_pyfunction!(snapshot::snapshot_head_nbytes, m)?)?;
    m.add_function(wrap_pyfunction!(digest::digest, m)?)?;
    m.add_function(wrap_pyfunction!(digest::digest_of_blocks, m)?)?;
    m.add_function(wrap_pyfunction!(sources::has_plain_storage, m)?)?;
    m.add_function(wrap_pyfunction!(torch::borrows, m)?)?;
    m.add_function(wrap_pyfunction!(block::huge_pages_obstacle, m)?)?;
    m.add_function(wrap_pyfunction!(block::source_of, m)?)?;
    m.add_function(wrap_pyfunction!(block::view_count, m)?)?;
    m.add_function(wrap_pyfunction!(collector::collect, m)?)?;
    m.add_function(wrap_pyfunction!(collector::note_module, m)?)?;
    m.add_function(wrap_pyfunction!(collector::noting_modules, m)?)?;
    m.add_function(wrap_pyfunction!(module::initialized_module, m)?)?;
    m.add_function(wrap_pyfunction!(module::module_state, m)?)?;
    m.add_function(wrap_pyfunction!(module::restore_module, m)?)?;
    m.add("HEADER_NBYTES", HEADER_NBYTES)?;
    m.add("SNAPSHOT_HEADER_NBYTES", SNAPSHOT_HEADER_NBYTES)?;
    m.add("REQUIRES_GRAD", Flags::REQUIRES_GRAD.0)?;
    m.add("PARAMETER", Flags::PARAMETER.0)?;
    m.add("CONJ", Flags::CONJ.0)?;
    m.add("NEG", Flags::NEG.0)?;
    Ok(())
}
