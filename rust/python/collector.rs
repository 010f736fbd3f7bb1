//! Python's cyclic collector: notes the modules that a load makes, and collects given objects
//! early.

use std::cell::RefCell;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefReference};

thread_local! {
    /// For each load that this thread is in, the modules made so far. The innermost load is last.
    static MODULES: RefCell<Vec<Vec<Py<PyWeakrefReference>>>> = const { RefCell::new(Vec::new()) };
}

/// Weak references to the modules that a load made.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Modules(Vec<Py<PyWeakrefReference>>);

#[pymethods]
impl Modules {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Whether all of them are freed.
    fn are_gone(&self, py: Python<'_>) -> bool {
        self.0.iter().all(|module| module.bind(py).upgrade().is_none())
    }

    /// The references.
    fn refs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, &self.0)
    }
}

/// Calls `make`. Returns its result and the modules that it made.
#[pyfunction]
pub(super) fn noting_modules<'py>(
    make: &Bound<'py, PyAny>,
) -> PyResult<(Bound<'py, PyAny>, Modules)> {
    MODULES.with_borrow_mut(|modules| modules.push(Vec::new()));
    let made = make.call0();
    let modules = MODULES.with_borrow_mut(|modules| modules.pop().unwrap_or_default());
    Ok((made?, Modules(modules)))
}

/// Notes a module that is being made.
#[pyfunction]
pub(super) fn note_module(module: &Bound<'_, PyAny>) -> PyResult<()> {
    if MODULES.with_borrow(|modules| modules.is_empty()) {
        return Ok(());
    }
    let module = PyWeakrefReference::new(module)?.unbind();
    MODULES.with_borrow_mut(|modules| modules.last_mut().map(|last| last.push(module)));
    Ok(())
}

/// Collects these objects, which the collector must track, and all that were made since it last
/// ran, but no others. Empties the list.
#[pyfunction]
pub(super) fn collect(objects: &Bound<'_, PyList>) -> PyResult<()> {
    let gc = objects.py().import("gc")?;
    for object in objects {
        // newly tracked objects belong to the youngest generation, the only one that is collected
        // SAFETY: the collector tracks the object, and no Python code runs in between.
        unsafe { ffi::PyObject_GC_UnTrack(object.as_ptr().cast()) };
        // SAFETY: as above; the object is no longer tracked.
        unsafe { ffi::PyObject_GC_Track(object.as_ptr().cast()) };
    }
    objects.del_slice(0, objects.len())?;
    gc.call_method1("collect", (0,))?;
    Ok(())
}
