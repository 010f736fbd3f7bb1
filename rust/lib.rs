//! The core of ray-zerocopy: plan the layout of a model's storages, gather them into one block,
//! and map that block again where it is read.
//!
//! ```text
//! storages ─ layout ─▶ table + segments ─ block ─▶ ... ═ store ═ ... ─ pages ─▶ views
//! ```
//!
//! A folder imports only from those before it, in the order of this file, and a file only from those
//! before it in its folder's `mod.rs`, which says what comes in and what goes out.

pub mod error;

pub mod format;

pub mod platform;

pub mod memory;

pub mod io;

#[allow(unsafe_code)] // a C structure and what it keeps; the buffer protocol
pub mod python;

#[cfg(test)]
mod order {
    use std::fs;
    use std::path::Path;

    /// The files of modules in the order in which they are declared, as paths from the crate; that which
    /// declares those of a folder comes after them.
    fn files(declaring: &Path, path: &str) -> Vec<String> {
        let text = fs::read_to_string(declaring).unwrap_or_default();
        let declared = text.lines().filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            line.strip_prefix("mod ")?.strip_suffix(';')
        });
        let folder = declaring.parent().unwrap();
        let files = |name| files(&folder.join(name).join("mod.rs"), &format!("{path}::{name}"));
        declared.flat_map(files).chain([path.to_owned()]).collect()
    }

    #[test]
    fn a_file_imports_only_from_files_before_it() {
        let rust = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust");
        let files = files(&rust.join("lib.rs"), "crate");
        assert!(files.len() > 20, "{files:?}");
        for (index, file) in files.iter().enumerate() {
            let path = rust.join(file.replacen("crate", ".", 1).replace("::", "/"));
            let text = fs::read_to_string(path.with_extension("rs"))
                .or_else(|_| fs::read_to_string(path.join("mod.rs")))
                .unwrap_or_default();
            for path in text.split("crate::").skip(1) {
                let path = format!("crate::{}", path.split([';', ' ', '(']).next().unwrap());
                let is = |file: &&String| path == **file || path.starts_with(&format!("{file}::"));
                let found = files.iter().find(is).unwrap();
                assert!(files[..=index].contains(found), "{file} imports {path}");
            }
        }
    }
}
