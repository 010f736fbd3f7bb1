//! Errors as exceptions.

use pyo3::prelude::*;

use crate::error::Error;

pyo3::import_exception!(ray_zerocopy.errors, BlockError);
pyo3::import_exception!(ray_zerocopy.errors, PublishError);
pyo3::import_exception!(ray_zerocopy.errors, ResourceError);
pyo3::import_exception!(ray_zerocopy.errors, StoreFullError);
pyo3::import_exception!(ray_zerocopy.errors, VersionError);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        match error {
            Error::NoRoom { .. } => StoreFullError::new_err(error.to_string()),
            Error::Limit { .. } | Error::Unsupported { .. } => {
                ResourceError::new_err(error.to_string())
            }
            Error::Version { .. } => VersionError::new_err(error.to_string()),
            _ => BlockError::new_err(error.to_string()),
        }
    }
}
