//! Ray's store: which file of it lies beneath memory of this process.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::memory::region::Region;
use crate::platform::Mappings;
use crate::platform::mapping::{Backing, Mapping};

/// A shared mapping of the store, or of a file that what had no room there fell back to.
#[derive(Debug, Clone)]
struct Store {
    mapping: Mapping,
    /// Where the file can be opened, once that was found.
    path: Option<PathBuf>,
}

/// The stores found so far, without a question to the kernel's list of mappings.
static FOUND: Mutex<Vec<Store>> = Mutex::new(Vec::new());

/// More than Ray's store and a few of its files for what fell back to disk are not kept.
const KEEP: usize = 16;

/// The store's file behind this memory; `None` if it is other memory of this process.
pub fn backing(region: Region) -> Result<Option<Backing>> {
    Ok(find(region)?.map(|store| store.mapping.backing_at(region.address)))
}

/// Opens the store's file behind this memory.
pub fn open(region: Region) -> Result<(File, Backing)> {
    let mut store = find(region)?
        .ok_or_else(|| Error::Unsupported { reason: "it lies in no shared file".into() })?;
    let opened = store.mapping.open(store.path.as_deref());
    let opened = opened.or_else(|error| store.mapping.open_of_raylet().ok_or(error));
    let (file, path) = opened.map_err(|error| {
        let name = store.mapping.backing.name.display();
        Error::refused(
            format!("no link of the kernel's nor file of the raylet opens {name}"),
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

/// The store around a region: remembered if it still stands, else asked for.
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
    // what overlaps it is gone
    found.retain(|old| old.mapping.end <= start || end <= old.mapping.start);
    found.truncate(KEEP - 1);
    found.insert(0, store);
}

fn found() -> MutexGuard<'static, Vec<Store>> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}
