//! What the cyclic collector is to judge: modules as they are made, and what can be reached from them.

use std::cell::RefCell;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefReference};

thread_local! {
    /// The modules of each load that this thread is in, the innermost last.
    static MODULES: RefCell<Vec<Vec<Py<PyWeakrefReference>>>> = const { RefCell::new(Vec::new()) };
}

/// The modules that a load has made, by weak references.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Modules(Vec<Py<PyWeakrefReference>>);

#[pymethods]
impl Modules {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Whether none of them is there any more.
    fn are_gone(&self, py: Python<'_>) -> bool {
        self.0.iter().all(|module| module.bind(py).upgrade().is_none())
    }

    /// The references.
    fn refs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, &self.0)
    }
}

/// Calls something, and gives its result and the modules that it has made.
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

/// Has the cyclic collector judge these objects, which it must know of, and besides no more than were
/// made since it ran last. The list is empty afterwards.
#[pyfunction]
pub(super) fn collect(objects: &Bound<'_, PyList>) -> PyResult<()> {
    let gc = objects.py().import("gc")?;
    for object in objects {
        // what is tracked anew is of the youngest generation, and that is all that is collected
        // SAFETY: an object that the collector knows of; nothing of Python's runs in between.
        unsafe { ffi::PyObject_GC_UnTrack(object.as_ptr().cast()) };
        // SAFETY: as above, and it is not tracked any more.
        unsafe { ffi::PyObject_GC_Track(object.as_ptr().cast()) };
    }
    objects.del_slice(0, objects.len())?;
    gc.call_method1("collect", (0,))?;
    Ok(())
}
