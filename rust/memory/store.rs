//! Ray's store: finds its file behind an address of this process.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::memory::region::Region;
use crate::platform::Mappings;
use crate::platform::mapping::{Backing, Mapping};

/// A shared mapping of the store's file, or of a file in which Ray fell back to disk.
#[derive(Debug, Clone)]
struct Store {
    mapping: Mapping,
    /// The path that opens the file, once known.
    path: Option<PathBuf>,
}

/// The stores found so far, which saves asking the kernel for its list of mappings.
static FOUND: Mutex<Vec<Store>> = Mutex::new(Vec::new());

/// The most stores to remember: Ray's, and a few of the files of its fallback to disk.
const KEEP: usize = 16;

/// The file of the store behind a region. `None` for other memory.
pub fn backing(region: Region) -> Result<Option<Backing>> {
    Ok(find(region)?.map(|store| store.mapping.backing_at(region.address)))
}

/// Opens the file of the store behind a region.
pub fn open(region: Region) -> Result<(File, Backing)> {
    let mut store = find(region)?.ok_or_else(|| Error::Unsupported {
        reason: "the memory belongs to no shared file".into(),
    })?;
    let opened = store.mapping.open(store.path.as_deref());
    let opened = opened.or_else(|error| store.mapping.open_of_raylet().ok_or(error));
    let (file, path) = opened.map_err(|error| {
        let name = store.mapping.backing.name.display();
        Error::refused(
            format!("neither the kernel's link nor the raylet's descriptors open {name}"),
            &error,
        )
    })?;
    let backing = store.mapping.backing_at(region.address);
    if store.path.as_ref() != Some(&path) {
        store.path = Some(path);
        remember(&mut found(), store);
    }
    Ok((file, backing))
}

/// The store around a region: a remembered one if its mapping still exists, or else from the
/// kernel's list.
fn find(region: Region) -> Result<Option<Store>> {
    let mut found = found();
    if let Some(store) = found.iter().find(|store| store.mapping.holds(&region.addresses()))
        && store.mapping.stands()
    {
        return Ok(Some(store.clone()));
    }
    let mapping = Mappings::open().and_then(|mappings| mappings.at_or_after(region.address));
    let mapping =
        mapping.map_err(|error| Error::refused("the mappings of this process", &error))?;
    let mapping = mapping.filter(|found| found.shared && found.holds(&region.addresses()));
    let store = mapping.map(|mapping| Store { mapping, path: None });
    if let Some(store) = &store {
        remember(&mut found, store.clone());
    }
    Ok(store)
}

fn remember(found: &mut Vec<Store>, store: Store) {
    let (start, end) = (store.mapping.start, store.mapping.end);
    // remembered mappings that overlap it no longer exist
    found.retain(|old| old.mapping.end <= start || end <= old.mapping.start);
    found.truncate(KEEP - 1);
    found.insert(0, store);
}

fn found() -> MutexGuard<'static, Vec<Store>> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}
