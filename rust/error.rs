//! The errors of this crate, as values that carry the numbers. Only `python` turns them into
//! exceptions.

use std::fmt::Display;
use std::io;

use thiserror::Error;

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// A size does not fit into 64 bits.
    #[error("{what} does not fit into 64 bits")]
    Overflow {
        /// The quantity that overflowed.
        what: &'static str,
    },
    /// A torch dtype that this version does not know.
    #[error("this version of ray-zerocopy does not know dtype {name}: upgrade ray-zerocopy here")]
    UnknownDtype {
        /// Its name in torch, or its code in an offset table.
        name: String,
    },
    /// A view whose shape and stride differ in length.
    #[error("view has {shape} dimensions, but {stride} strides")]
    Dimensions {
        /// Length of the shape.
        shape: usize,
        /// Length of the stride.
        stride: usize,
    },
    /// A view that torch has no tensor for.
    #[error("torch has no tensor of {dtype} with {what}")]
    NoTensor {
        /// The name of its dtype.
        dtype: &'static str,
        /// The property that such a tensor cannot have.
        what: String,
    },
    /// A view that reaches beyond its span.
    #[error("view ends at byte {end}, its span has {nbytes}")]
    OutOfSpan {
        /// One past the last byte the view touches.
        end: u64,
        /// Bytes in the span.
        nbytes: u64,
    },
    /// A view that refers to a span that does not exist.
    #[error("view {view} refers to span {span}, the table has {spans} spans")]
    NoSuchSpan {
        /// Index of the view.
        view: usize,
        /// The span it refers to.
        span: usize,
        /// How many spans there are.
        spans: usize,
    },
    /// A span that reaches beyond its block.
    #[error("span {span} ends at byte {end}, the block has {nbytes}")]
    OutOfBlock {
        /// Index of the span.
        span: usize,
        /// One past its last byte.
        end: u64,
        /// Bytes in the block.
        nbytes: u64,
    },
    /// A span that does not start at a multiple of the alignment.
    #[error("span {span} starts at byte {offset}, not at a multiple of {align}")]
    Misaligned {
        /// Index of the span.
        span: usize,
        /// Where it starts.
        offset: u64,
        /// The alignment it should have.
        align: u64,
    },
    /// Bytes that are not an offset table.
    #[error("not an offset table of ray-zerocopy: it starts with {found:02x?}")]
    NotATable {
        /// The first bytes found.
        found: Vec<u8>,
    },
    /// A format version newer than this package.
    #[error(
        "{what} has version {found}, this ray-zerocopy reads up to {supported}: upgrade ray-zerocopy here"
    )]
    Version {
        /// The object of that version.
        what: &'static str,
        /// The version found.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// A table that is truncated, or has bytes after its end.
    #[error("offset table should have {needed} bytes, it has {available}")]
    TableLength {
        /// Bytes the header announces, as far as they were counted.
        needed: u64,
        /// Bytes found.
        available: u64,
    },
    /// A block whose length is not the one in its table.
    #[error("block should have {expected} bytes, it has {found}: truncated, or another object's")]
    BlockLength {
        /// Bytes the table announces.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A block that belongs to another table.
    #[error(
        "block has fingerprint {found:016x}, its table has {expected:016x}: it is another object's"
    )]
    ForeignBlock {
        /// The table's fingerprint.
        expected: u64,
        /// The fingerprint in the block's header.
        found: u64,
    },
    /// A base whose block is not the one that the variant was stored with.
    #[error("the base has another block than the variant was stored with")]
    OtherBase,
    /// A span whose bytes have changed.
    #[error(
        "span {span} ({tensor}; bytes {start} to {end} of the block) is damaged: \
         checksum {found:016x}, it was written with {expected:016x}"
    )]
    Damaged {
        /// Index of the span.
        span: usize,
        /// The tensors in it.
        tensor: String,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// The checksum of the bytes that were written.
        expected: u64,
        /// The checksum of the bytes that were found.
        found: u64,
    },
    /// Another part of a block or snapshot that has changed.
    #[error("{what} is damaged: it differs from what was written")]
    Corrupt {
        /// What is damaged.
        what: &'static str,
    },
    /// Bytes that are not a snapshot.
    #[error("not a snapshot of ray-zerocopy: it starts with {found:02x?}")]
    NotASnapshot {
        /// The first bytes found.
        found: Vec<u8>,
    },
    /// A snapshot that is truncated, or has bytes after its end.
    #[error("snapshot should have {expected} bytes, it has {found}: truncated, or incomplete")]
    SnapshotLength {
        /// Bytes that its header and table announce.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Spans that share bytes.
    #[error("span {span} starts at byte {offset}, within another")]
    Overlap {
        /// Index of the second span.
        span: usize,
        /// Where it starts.
        offset: u64,
    },
    /// A range of a file that cannot be read.
    #[error("{path}: bytes {start} to {end} cannot be read: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// The system's error.
        reason: String,
    },
    /// Shared memory is full.
    #[error(
        "shared memory has no room for {nbytes} bytes: /dev/shm is full, or smaller than the store that \
         Ray was started with"
    )]
    NoRoom {
        /// Bytes in the block.
        nbytes: u64,
    },
    /// This process has reached one of its limits.
    #[error("{what}: {reason}: {limit}")]
    Limit {
        /// The resource that was asked for.
        what: String,
        /// The system's error.
        reason: String,
        /// The limit to raise.
        limit: &'static str,
    },
    /// This system lacks a feature, or forbids it.
    #[error("{reason}")]
    Unsupported {
        /// What is missing.
        reason: String,
    },
}

impl Error {
    /// The error for a resource that the system refuses: `Limit` if this process has reached a
    /// limit.
    pub fn refused(what: impl Display, error: &io::Error) -> Error {
        let limit = match error.raw_os_error() {
            Some(libc::EMFILE) => "raise `ulimit -n` (open files)",
            Some(libc::ENFILE) => "raise fs.file-max (open files of the machine)",
            Some(libc::ENOMEM) => "raise `ulimit -v` or vm.max_map_count, or free memory",
            Some(libc::EAGAIN) => "raise `ulimit -u` or the cgroup's pids.max (threads)",
            _ => return Error::Unsupported { reason: format!("{what}: {error}") },
        };
        Error::Limit { what: what.to_string(), reason: error.to_string(), limit }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
