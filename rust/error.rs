//! What can go wrong, as values that carry the numbers. They become exceptions in `python` alone.

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
    /// A table of a version that this one cannot read.
    #[error("offset table has version {found}, this ray-zerocopy reads version {supported}")]
    Version {
        /// The version found.
        found: u16,
        /// The version that can be read.
        supported: u16,
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
    /// Private pages cannot be had here, and why.
    #[error("private pages cannot be had: {reason}")]
    Unsupported {
        /// What is missing.
        reason: String,
    },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
