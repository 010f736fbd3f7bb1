//! Takes modules apart and rebuilds them: the defaults of `torch.nn.Module`, and the differences.

use std::ffi::c_void;
use std::{mem, ptr};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PySet, PyString, PyTuple, PyType};
use pyo3::{IntoPyObjectExt, ffi, intern};

use crate::python::collector::note_module;

/// The attributes that `torch.nn.Module.__init__` sets. Most keep their value: in a module of BERT
/// about 14 of 17.
struct Defaults {
    /// Each attribute's name, and its default.
    kinds: Vec<(Py<PyString>, Default)>,
    ordered_dict: Py<PyType>,
    /// Makes an empty `OrderedDict` without `__init__`, which would do nothing and take as long
    /// again.
    new_ordered_dict: ffi::newfunc,
    no_arguments: Py<PyTuple>,
}

/// A default value: an empty container of its own for each module, or one constant for all.
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
            // SAFETY: a type object. The slot is checked before use.
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
        // SAFETY: it is the `tp_new` of this type, which takes a type and a tuple.
        let new = unsafe { (self.new_ordered_dict)(kind.cast(), no_arguments, ptr::null_mut()) };
        // SAFETY: it is a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, new) }
    }

    /// Sets the defaults, then the differences.
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
        differing.iter().try_for_each(|(name, value)| {
            if value.is_exact_instance(self.ordered_dict.bind(py)) && self.holds_hooks(&name)? {
                keep_numbers(&value)?;
            }
            set(&name, &value)
        })
    }

    /// Whether this attribute of a module holds hooks by number.
    fn holds_hooks(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        for (hooks, default) in &self.kinds {
            if matches!(default, Default::OrderedDict) && name.eq(hooks)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether an attribute still has its default value.
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

/// Makes torch number the next hook of this process above all of these.
///
/// torch numbers hooks per process, from 0, and pickles the numbers. In a process without hooks, a
/// new hook would replace one that came with a model. (torch 2.15)
fn keep_numbers(hooks: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = hooks.py();
    let handle = py.import("torch.utils.hooks")?.getattr("RemovableHandle")?;
    let next: u64 = handle.getattr(intern!(py, "next_id"))?.extract()?;
    let numbers = hooks.try_iter()?.filter_map(|number| number.ok()?.extract::<u64>().ok());
    match numbers.max() {
        Some(last) if last >= next => {
            handle.setattr(intern!(py, "next_id"), last.saturating_add(1))
        }
        _ => Ok(()),
    }
}

/// For a pickler, reduces modules of one class to the class and the differences from the defaults.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct ModuleReducer {
    /// Makes a bare module ...
    make: Py<PyAny>,
    /// ... of this class ...
    arguments: Py<PyTuple>,
    /// ... and restores its state from the differences.
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
            if state.is_instance_of::<PyDict>() {
                return Ok(py.NotImplemented().into_bound(py)); // then pickle does it in its own way
            }
            let initialized = py.import("ray_zerocopy._core")?.getattr("initialized_module")?;
            return (initialized, &self.arguments, state).into_bound_py_any(py);
        };
        let none = py.None();
        (&self.make, &self.arguments, differing, &none, &none, &self.restore).into_bound_py_any(py)
    }
}

/// The attributes of a module that differ from the defaults of `torch.nn.Module`.
///
/// None if `state` does not start with all defaults in their order, as it does after
/// `nn.Module.__init__`.
fn differing<'py>(state: &Bound<'py, PyDict>) -> PyResult<Option<Bound<'py, PyDict>>> {
    let defaults = Defaults::get(state.py())?;
    let differing = PyDict::new(state.py());
    let mut attributes = state.iter();
    for (expected, default) in &defaults.kinds {
        match attributes.next() {
            Some((name, value)) if name.is(expected) || name.eq(expected)? => {
                if !defaults.is_untouched(default, &value)? {
                    differing.set_item(name, value)?;
                }
            }
            _ => return Ok(None),
        }
    }
    for (name, value) in attributes {
        // compiled code stays here, as in `Module.__getstate__`
        if !name.eq(intern!(state.py(), "_compiled_call_impl"))? {
            differing.set_item(name, value)?;
        }
    }
    Ok(Some(differing))
}

/// The whole state of a module, with fresh defaults. The inverse of `differing`.
#[pyfunction]
pub(super) fn module_state<'py>(differing: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyDict>> {
    let state = PyDict::new(differing.py());
    Defaults::get(differing.py())?.set(differing, |name, value| state.set_item(name, value))?;
    Ok(state)
}

/// A module on which only `nn.Module.__init__` has run.
///
/// For a `__setstate__` that takes something other than a dict and sets attributes one by one, such
/// as that of torch's quantized convolutions. On a bare module it fails, in plain pickle too.
/// (torch 2.15)
#[pyfunction]
pub(super) fn initialized_module<'py>(kind: &Bound<'py, PyType>) -> PyResult<Bound<'py, PyAny>> {
    let py = kind.py();
    let module = kind.call_method1(intern!(py, "__new__"), (kind,))?;
    let base = py.import("torch.nn")?.getattr("Module")?;
    base.call_method1(intern!(py, "__init__"), (&module,))?;
    note_module(&module)?;
    Ok(module)
}

/// Gives a bare module its whole state, as `nn.Module.__setstate__` does.
///
/// Sets one attribute after another, as `__init__` does: then a module has no `__dict__` until
/// somebody asks for it.
#[pyfunction]
pub(super) fn restore_module<'py>(
    module: &Bound<'py, PyAny>,
    differing: &Bound<'py, PyDict>,
) -> PyResult<()> {
    note_module(module)?;
    Defaults::get(module.py())?.set(differing, |name, value| {
        let (module, name, value) = (module.as_ptr(), name.as_ptr(), value.as_ptr());
        // SAFETY: three objects of this interpreter.
        let status = unsafe { ffi::PyObject_GenericSetAttr(module, name, value) };
        if status == 0 { Ok(()) } else { Err(PyErr::fetch(differing.py())) }
    })
}
