//! What can go wrong, as values that carry the numbers. They become exceptions in `python` alone.

use std::fmt::Display;
use std::io;

use thiserror::Error;

/// Everything this crate refuses, with the numbers that say why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// A size does not fit into 64 bits.
    #[error("{what} does not fit into 64 bits")]
    Overflow {
        /// The quantity that overflowed.
        what: &'static str,
    },
    /// A torch dtype that this version does not know.
    #[error("dtype {name} is not known to this version of ray-zerocopy")]
    UnknownDtype {
        /// Its name in torch, or its code in a table.
        name: String,
    },
    /// A view whose shape and stride differ in length.
    #[error("view has {shape} dimensions and {stride} strides")]
    Dimensions {
        /// Length of the shape.
        shape: usize,
        /// Length of the stride.
        stride: usize,
    },
    /// A view that is no tensor to torch.
    #[error("torch has no tensor of {dtype} with {what}")]
    NoTensor {
        /// The name of its dtype.
        dtype: &'static str,
        /// What such a tensor cannot have.
        what: String,
    },
    /// A view that reaches beyond the bytes it is laid over.
    #[error("view ends at byte {end}, its span has {nbytes}")]
    OutOfSpan {
        /// One past the last byte the view touches.
        end: u64,
        /// Bytes in the span.
        nbytes: u64,
    },
    /// A view that names a span that is not there.
    #[error("view {view} lies in span {span}, the table has {spans}")]
    NoSuchSpan {
        /// Index of the view.
        view: usize,
        /// The span it names.
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
    /// Bytes that are no table of ours.
    #[error("not an offset table of ray-zerocopy: it starts with {found:02x?}")]
    NotATable {
        /// The first bytes found.
        found: Vec<u8>,
    },
    /// A format newer than this package.
    #[error(
        "{what} has version {found}, this ray-zerocopy reads up to {supported}: upgrade ray-zerocopy here"
    )]
    Version {
        /// What has it.
        what: &'static str,
        /// The version found.
        found: u32,
        /// The newest version that can be read.
        supported: u32,
    },
    /// A table that ends early, or goes on after its end.
    #[error("offset table should have {needed} bytes, it has {available}")]
    TableLength {
        /// Bytes the header announces, as far as they were counted.
        needed: u64,
        /// Bytes that are there.
        available: u64,
    },
    /// A block of another length than its table says.
    #[error("block should have {expected} bytes, it has {found}: truncated, or another object's")]
    BlockLength {
        /// Bytes the table announces.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// A block that belongs to another table.
    #[error(
        "block carries fingerprint {found:016x}, its table has {expected:016x}: another object's"
    )]
    ForeignBlock {
        /// The table's fingerprint.
        expected: u64,
        /// What stands at the head of the block.
        found: u64,
    },
    /// A block that a variant does not mean.
    #[error("the base's block is another than the variant was stored with")]
    OtherBase,
    /// A span whose bytes are not those that were written.
    #[error(
        "span {span} ({tensor}; bytes {start} to {end} of the block) is damaged: \
         checksum {found:016x}, it was written with {expected:016x}"
    )]
    Damaged {
        /// Index of the span.
        span: usize,
        /// The tensors over it.
        tensor: String,
        /// Its first byte.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// The checksum that was taken when it was written.
        expected: u64,
        /// That of the bytes found.
        found: u64,
    },
    /// Something else of a block or a snapshot that is not as it was written.
    #[error("{what} is damaged: it is not what was written")]
    Corrupt {
        /// What is damaged.
        what: &'static str,
    },
    /// Bytes that are no snapshot of ours.
    #[error("not a snapshot of ray-zerocopy: it starts with {found:02x?}")]
    NotASnapshot {
        /// The first bytes found.
        found: Vec<u8>,
    },
    /// A snapshot that ends early, or goes on after its end.
    #[error("snapshot should have {expected} bytes, it has {found}: truncated, or not finished")]
    SnapshotLength {
        /// Bytes that its header and table announce.
        expected: u64,
        /// Bytes that are there.
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
    /// A part of a file that cannot be read, and why.
    #[error("{path}: bytes {start} to {end} cannot be read: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// The first byte of the part.
        start: u64,
        /// One past its last byte.
        end: u64,
        /// What the system says.
        reason: String,
    },
    /// Shared memory that a block cannot be written to.
    #[error(
        "shared memory has no room for {nbytes} bytes: /dev/shm is full, or smaller than the store that \
         Ray was started with"
    )]
    NoRoom {
        /// Bytes in the block.
        nbytes: u64,
    },
    /// What a limit of this process refuses.
    #[error("{what}: {reason}: {limit}")]
    Limit {
        /// What was asked for.
        what: String,
        /// What the system says.
        reason: String,
        /// The limit that is reached.
        limit: &'static str,
    },
    /// What this system does not have, or does not allow.
    #[error("{reason}")]
    Unsupported {
        /// What is missing.
        reason: String,
    },
}

impl Error {
    /// What the system refuses this process: a limit of the process, if the error is one.
    pub fn refused(what: impl Display, error: &io::Error) -> Error {
        let limit = match error.raw_os_error() {
            Some(libc::EMFILE) => "`ulimit -n` files are open",
            Some(libc::ENFILE) => "fs.file-max files are open on this machine",
            Some(libc::ENOMEM) => "`ulimit -v` or vm.max_map_count is reached, or memory is short",
            Some(libc::EAGAIN) => "`ulimit -u` threads run, or pids.max of the cgroup",
            _ => return Error::Unsupported { reason: format!("{what}: {error}") },
        };
        Error::Limit { what: what.to_string(), reason: error.to_string(), limit }
    }
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
