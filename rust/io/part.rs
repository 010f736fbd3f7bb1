//! Parts of a target: a thread fills one at a time, and sums its chunks on the way.
//!
//! ```text
//!  sources   └── file ───────┘└─ memory ─┘   └──── file ────┘
//!  target    │███████████████████████████░░░██████████████│      ░ between sources: cleared
//!  chunks    └─ summed ─┘└─ summed last ─┘   └─ summed ───┘
//!                 as it is copied: it comes from one source
//! ```

use std::ops::Range;

use crate::format::checksum::xxh3;
use crate::io::stream::{copy_and_sum, copy_bytes};

/// A part of a target, and the chunks in it that are to be summed.
pub struct Part<'a> {
    /// Its offset in the target.
    pub start: usize,
    /// Its bytes.
    pub target: &'a mut [u8],
    /// By rising offset in the target. All lie within the part.
    pub chunks: &'a [Range<usize>],
    /// The checksum of each chunk.
    pub sums: &'a mut [u64],
}

impl<'a> Part<'a> {
    /// Cuts it into parts of at most `nbytes`, but never within a chunk of at most that size.
    pub fn cut(self, nbytes: usize) -> Vec<Part<'a>> {
        let Part { mut start, mut target, mut chunks, mut sums } = self;
        let mut parts = Vec::new();
        while !target.is_empty() {
            // the bytes between the last chunk that fits and the next one go with the former
            let fit = chunks.partition_point(|chunk| chunk.end <= start + nbytes);
            let next = chunks.get(fit).map_or(usize::MAX, |next| next.start);
            let stop = next.min(start + nbytes).min(start + target.len());
            let (part, rest) = target.split_at_mut(stop - start);
            let (own, other_chunks) = chunks.split_at(fit);
            let (own_sums, other_sums) = sums.split_at_mut(fit);
            parts.push(Part { start, target: part, chunks: own, sums: own_sums });
            (start, target, chunks, sums) = (stop, rest, other_chunks, other_sums);
        }
        parts
    }

    /// Its range in the target.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.target.len()
    }

    /// A writer for it.
    pub fn writer(self) -> Writer<'a> {
        Writer { at: self.start, next_chunk: 0, in_pieces: Vec::new(), part: self }
    }
}

/// Writes a part from front to back.
pub struct Writer<'a> {
    part: Part<'a>,
    /// The offset in the target up to which it has written.
    at: usize,
    /// The first chunk that starts at or after `at`.
    next_chunk: usize,
    /// Chunks whose bytes came in more than one piece.
    in_pieces: Vec<usize>,
}

impl Writer<'_> {
    /// Writes zeros up to an offset in the target.
    pub fn clear_to(&mut self, end: usize) {
        self.take_to(end).fill(0);
    }

    /// Writes bytes. A chunk that lies wholly in them is summed while it is copied.
    pub fn write(&mut self, bytes: &[u8]) {
        let (start, end) = (self.at, self.at + bytes.len());
        while let Some(chunk) = self.part.chunks.get(self.next_chunk) {
            let chunk = chunk.clone();
            if chunk.start >= end {
                break;
            }
            if chunk.end <= end {
                let (before, own) = (self.at - start, chunk.start - start..chunk.end - start);
                copy_bytes(self.take_to(chunk.start), &bytes[before..own.start]);
                let sum = copy_and_sum(self.take_to(chunk.end), &bytes[own]);
                self.part.sums[self.next_chunk] = sum;
            } else {
                self.in_pieces.push(self.next_chunk);
            }
            self.next_chunk += 1;
        }
        let rest = &bytes[self.at - start..];
        copy_bytes(self.take_to(end), rest);
    }

    /// Writes zeros to the end, and sums the chunks that came in pieces.
    pub fn finish(mut self) {
        self.clear_to(self.part.range().end);
        let Part { start, target, chunks, sums } = self.part;
        for index in self.in_pieces {
            let Range { start: from, end: to } = chunks[index];
            sums[index] = xxh3(&target[from - start..to - start]);
        }
    }

    /// The bytes of the target up to an offset, which come next.
    fn take_to(&mut self, end: usize) -> &mut [u8] {
        let start = std::mem::replace(&mut self.at, end);
        &mut self.part.target[start - self.part.start..end - self.part.start]
    }
}
