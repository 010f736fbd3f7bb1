//! This process's connection to Ray's store, and what it keeps there.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use crate::memory::connection;
use crate::memory::forks::Since;

/// Keeps this process's connection to the store at a socket open, also when Ray closes its side, so
/// that mapped objects keep their memory.
#[pyclass(frozen, module = "ray_zerocopy._core")]
pub(super) struct Connection(Option<Arc<connection::Connection>>);

#[pymethods]
impl Connection {
    #[new]
    fn new(path: Option<PathBuf>) -> PyResult<Connection> {
        let keep = |path: PathBuf| connection::Connection::keep(&path);
        Ok(Connection(path.map(keep).transpose()?.flatten()))
    }

    /// Whether this process has such a connection.
    #[getter]
    pub(super) fn kept(&self) -> bool {
        self.0.is_some()
    }
}

/// Keeps an object in Ray's store: Ray's buffers, which release it when they are dropped, the
/// connection they depend on, and the children that may still see it.
pub(super) struct Pin(Option<(Since, Vec<PyUntypedBuffer>, Option<Py<Connection>>)>);

impl Pin {
    /// Pins an object that was mapped after `since`.
    pub(super) fn new(
        since: Since,
        buffers: Vec<PyUntypedBuffer>,
        connection: Option<Py<Connection>>,
    ) -> Pin {
        Pin(Some((since, buffers, connection)))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some((since, buffers, connection)) = self.0.take() {
            since.release_after(move || {
                let held = std::mem::ManuallyDrop::new((buffers, connection));
                // the buffers first; nothing, if the interpreter is gone
                Python::try_attach(|_| drop(std::mem::ManuallyDrop::into_inner(held)));
            });
        }
    }
}
