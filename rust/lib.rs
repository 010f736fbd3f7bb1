//! The core of ray-zerocopy. It plans where the storages of a model lie in one block, writes that
//! block, and maps it in each process that reads it.
//!
//! ```text
//! storages ─ layout ─▶ table + segments ─ block ─▶ ... ═ store ═ ... ─ pages ─▶ views
//! ```
//!
//! A folder imports only from the folders before it, in the order of this file. A file imports only
//! from the files before it, in the order of its folder's `mod.rs`, which also says what the folder
//! takes and gives.

pub mod error;

pub mod format;

pub mod platform;

pub mod memory;

pub mod io;

#[allow(unsafe_code)] // C structures, and the buffer protocol
pub mod python;

#[cfg(test)]
mod order {
    use std::fs;
    use std::path::Path;

    /// The files of all modules, as paths from the crate, in the order of their declarations. A
    /// `mod.rs` comes after the files that it declares.
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
