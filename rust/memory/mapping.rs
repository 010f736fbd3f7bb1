//! Mappings: which file lies behind which memory of this process.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::memory::region::Region;

pub use system::Mappings;

/// One mapping of a file in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Address of its first byte.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
    /// The file.
    pub backing: Backing,
    /// Whether a write goes into the file; if not, the page written becomes this process's own.
    pub shared: bool,
}

/// The file behind a region of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The file's name as the kernel gives it, with ` (deleted)` if it is.
    pub name: String,
    /// Its inode.
    pub inode: u64,
    /// Where in the file the memory starts, in bytes.
    pub offset: u64,
    /// Whether the mapping that was found can be written.
    pub writable: bool,
}

impl Mapping {
    /// Whether all of a region lies in it.
    pub fn holds(&self, region: Region) -> bool {
        self.start <= region.address && region.nbytes <= self.end.saturating_sub(region.address)
    }

    /// What lies behind the memory from an address of the mapping on.
    pub fn backing_at(&self, address: usize) -> Backing {
        let offset = self.backing.offset + (address - self.start) as u64;
        Backing { offset, ..self.backing.clone() }
    }

    /// The kernel's link to the mapped file. Its name tells that the mapping still stands;
    /// to open it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
    pub fn link(&self) -> PathBuf {
        format!("/proc/self/map_files/{:x}-{:x}", self.start, self.end).into()
    }

    /// Whether the mapping is what it was.
    pub fn stands(&self) -> bool {
        fs::read_link(self.link()).is_ok_and(|name| name.as_os_str() == &*self.backing.name)
    }

    /// Opens `path` if it is the mapped file.
    pub fn open_at(&self, path: &Path) -> Option<File> {
        // never a device, which may do something when it is opened
        let file = fs::metadata(path).ok()?.is_file().then(|| File::open(path).ok())??;
        (system::inode(&file)? == self.backing.inode).then_some(file)
    }
}

/// The file mapping around a region.
pub fn around(region: Region) -> Result<Option<Mapping>> {
    let mapping = Mappings::open()?.at_or_after(region.address)?;
    Ok(mapping.filter(|mapping| mapping.holds(region)))
}

#[cfg(target_os = "linux")]
mod system {
    use std::ffi::CStr;
    use std::fs::{self, File};
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;
    use std::sync::OnceLock;

    use super::{Backing, Mapping};
    use crate::error::{Error, Result};

    const MAPS: &str = "/proc/self/maps";

    /// The kernel's `struct procmap_query` (linux/fs.h).
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        size: u64,
        flags: u64,
        address: u64,
        start: u64,
        end: u64,
        rights: u64,
        page_size: u64,
        offset: u64,
        inode: u64,
        device: [u32; 2],
        name_size: u32,
        build_id_size: u32,
        name: u64,
        build_id: u64,
    }

    /// `_IOWR('f', 17, struct procmap_query)`
    const PROCMAP_QUERY: libc::Ioctl =
        (3 << 30 | (size_of::<Query>() << 16) | ((b'f' as usize) << 8) | 17) as libc::Ioctl;
    const WRITABLE: u64 = 0x02;
    const SHARED: u64 = 0x08;
    const COVERING_OR_NEXT: u64 = 0x10;
    const FILE_BACKED: u64 = 0x20;

    /// The file mappings of this process, asked for one by one (Linux 6.11), or read at once: that takes
    /// 2 ms with torch's CUDA libraries loaded, as long as all the rest of a load.
    #[derive(Debug)]
    pub struct Mappings {
        maps: File,
        read: OnceLock<Vec<Mapping>>,
    }

    impl Mappings {
        /// Those of this process, as they are now.
        pub fn open() -> Result<Mappings> {
            Ok(Mappings { maps: File::open(MAPS).map_err(unreadable)?, read: OnceLock::new() })
        }

        /// The one that covers an address, or the next above it.
        pub fn at_or_after(&self, address: usize) -> Result<Option<Mapping>> {
            if self.read.get().is_none() {
                match self.query(address) {
                    Ok(mapping) => return Ok(Some(mapping)),
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
                    Err(_) => {} // an older kernel
                }
            }
            if self.read.get().is_none() {
                let lines = fs::read_to_string(MAPS).map_err(unreadable)?;
                let _ = self.read.set(lines.lines().filter_map(Mapping::parse).collect());
            }
            let mappings = self.read.get().map_or(&[][..], Vec::as_slice);
            Ok(mappings.get(mappings.partition_point(|mapping| mapping.end <= address)).cloned())
        }

        fn query(&self, address: usize) -> io::Result<Mapping> {
            let mut name = [0_u8; libc::PATH_MAX as usize];
            let mut query = Query {
                size: size_of::<Query>() as u64,
                flags: COVERING_OR_NEXT | FILE_BACKED,
                address: address as u64,
                name_size: name.len() as u32,
                name: name.as_mut_ptr().addr() as u64,
                ..Query::default()
            };
            // SAFETY: a structure of the size that it says, and a name of the size that it says.
            let status =
                unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
            if status != 0 {
                return Err(io::Error::last_os_error());
            }
            let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
            let backing = Backing {
                name: name.to_string_lossy().into_owned(),
                inode: query.inode,
                offset: query.offset,
                writable: query.rights & WRITABLE != 0,
            };
            let (start, end) = (query.start as usize, query.end as usize);
            Ok(Mapping { start, end, backing, shared: query.rights & SHARED != 0 })
        }
    }

    impl Mapping {
        fn parse(line: &str) -> Option<Mapping> {
            // 7f00-7f80 rw-s 00001000 00:1a 1234    /dev/shm/plasma (deleted)
            let mut fields = line.splitn(6, ' ');
            let (start, end) = fields.next()?.split_once('-')?;
            let rights = fields.next()?;
            let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
            let inode = fields.nth(1)?.parse().ok()?;
            let name = fields.next()?.trim_start().to_owned();
            let start = usize::from_str_radix(start, 16).ok()?;
            let end = usize::from_str_radix(end, 16).ok()?;
            let backing = Backing { name, inode, offset, writable: rights.starts_with("rw") };
            let shared = rights.ends_with('s');
            (inode != 0).then_some(Mapping { start, end, backing, shared })
        }
    }

    pub fn inode(file: &File) -> Option<u64> {
        Some(file.metadata().ok()?.ino())
    }

    fn unreadable(error: io::Error) -> Error {
        Error::refused(MAPS, &error)
    }

    #[cfg(test)]
    mod tests {
        use memmap2::MmapOptions;

        use super::*;
        use crate::memory::mapping::around;
        use crate::memory::region::Region;

        #[test]
        fn a_line_of_maps_is_read() {
            let line =
                "7f0000-7f8000 rw-s 00001000 00:1a 1234                 /dev/shm/a b (deleted)";
            let mapping = Mapping::parse(line).unwrap();
            let name = "/dev/shm/a b (deleted)".to_owned();
            let backing = Backing { name, inode: 1234, offset: 0x1000, writable: true };
            assert_eq!(mapping.backing, backing);
            assert_eq!(mapping.backing_at(0x7f0010).offset, 0x1010);
            assert!(mapping.holds(Region { address: 0x7f0000, nbytes: 0x8000 }));
            assert!(!mapping.holds(Region { address: 0x7f0001, nbytes: 0x8000 }));
            assert!(mapping.shared);
            let private = Mapping::parse("7f0000-7f8000 rw-p 00001000 00:1a 1234 /private");
            assert!(!private.unwrap().shared);
            assert!(Mapping::parse("7f0000-7f8000 rw-s 00000000 00:00 0").is_none());
            assert!(Mapping::parse("").is_none());
        }

        #[test]
        fn the_kernel_says_of_one_mapping_what_it_lists_of_all() {
            let file = File::open("/proc/self/exe").unwrap();
            // SAFETY: nobody writes a program that runs.
            let map = unsafe { MmapOptions::new().offset(4096).len(5000).map_copy(&file) }.unwrap();
            let asked = Mappings::open().unwrap();
            let listed = Mappings::open().unwrap();
            let lines = fs::read_to_string(MAPS).unwrap();
            listed.read.set(lines.lines().filter_map(Mapping::parse).collect()).unwrap();
            for address in [0, map.as_ptr().addr(), map.as_ptr().addr() + 4999] {
                let (asked, listed) = (asked.at_or_after(address), listed.at_or_after(address));
                assert!(asked.as_ref().unwrap().is_some());
                assert_eq!(asked, listed);
            }
            assert_eq!(asked.at_or_after(usize::MAX - 4096), Ok(None));
            let region = Region { address: map.as_ptr().addr() + 100, nbytes: 4900 };
            let mapping = around(region).unwrap().unwrap();
            assert_eq!(mapping.backing_at(region.address).offset, 4196);
            assert!(!mapping.shared && mapping.backing.writable && mapping.stands());
            assert!(mapping.open_at("/proc/self/exe".as_ref()).is_some());
            assert!(mapping.open_at(MAPS.as_ref()).is_none());
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::fs::File;

    use super::Mapping;
    use crate::error::{Error, Result};

    /// Only Linux tells which file lies behind which memory.
    #[derive(Debug)]
    pub struct Mappings;

    impl Mappings {
        /// Refused.
        pub fn open() -> Result<Mappings> {
            Err(Error::Unsupported {
                reason: "only Linux tells which file lies behind memory".into(),
            })
        }

        /// Never reached.
        pub fn at_or_after(&self, _: usize) -> Result<Option<Mapping>> {
            Ok(None)
        }
    }

    pub fn inode(_: &File) -> Option<u64> {
        None
    }
}
