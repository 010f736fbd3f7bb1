//! A view: the dtype, shape, stride and offset of a tensor in one span.

use std::ops::Range;

use smallvec::SmallVec;

use crate::error::{Error, Result};
use crate::format::dtype::Dtype;

/// What torch keeps of a tensor besides its geometry: the bits of one byte in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(pub u8);

impl Flags {
    /// Autograd records operations on it.
    pub const REQUIRES_GRAD: Flags = Flags(1);
    /// It is a `torch.nn.Parameter`.
    pub const PARAMETER: Flags = Flags(2);
    /// Its conjugate bit is set (`Tensor.is_conj`).
    pub const CONJ: Flags = Flags(4);
    /// Its negative bit is set (`Tensor.is_neg`).
    pub const NEG: Flags = Flags(8);

    /// All of them.
    const ALL: Flags = Flags(15);

    /// Whether it has all bits of `other`.
    pub fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A number for each dimension. Up to four need no heap memory.
pub type Dims = SmallVec<[u64; 4]>;

/// A strided tensor over a span. Shape, stride and offset count elements, as in torch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Index of the span in the table.
    pub span: usize,
    /// Type of the elements.
    pub dtype: Dtype,
    /// What else torch keeps of it.
    pub flags: Flags,
    /// Elements between the start of the span and the first element.
    pub offset: u64,
    /// Elements in each dimension.
    pub shape: Dims,
    /// Elements between neighbours in each dimension; 0 repeats, none is negative.
    pub stride: Dims,
}

impl View {
    /// The range of its span that it touches, in bytes; `None` if it has no element.
    pub fn extent(&self) -> Result<Option<Range<u64>>> {
        if self.shape.len() != self.stride.len() {
            return Err(Error::Dimensions { shape: self.shape.len(), stride: self.stride.len() });
        }
        if self.shape.contains(&0) {
            return Ok(None);
        }
        let overflow = Error::Overflow { what: "a view's last byte" };
        let last =
            (self.shape.iter().zip(&self.stride)).try_fold(self.offset, |last, (&n, &step)| {
                // n > 0: a zero has returned above
                (n - 1).checked_mul(step).and_then(|span| last.checked_add(span))
            });
        let itemsize = self.dtype.itemsize();
        let end = last.and_then(|last| last.checked_add(1)).and_then(|n| n.checked_mul(itemsize));
        let end = end.ok_or(overflow)?;
        // offset <= last, so offset * itemsize <= end
        Ok(Some(self.offset * itemsize..end))
    }

    /// Refuses a view that torch has no tensor for, or that reaches beyond a span of `nbytes`.
    pub fn check(&self, nbytes: u64) -> Result<()> {
        self.check_tensor()?;
        match self.extent()? {
            Some(extent) if extent.end > nbytes => {
                Err(Error::OutOfSpan { end: extent.end, nbytes })
            }
            _ => Ok(()),
        }
    }

    /// Refuses numbers that torch would refuse, or misread because its own are signed.
    fn check_tensor(&self) -> Result<()> {
        let (dtype, flags) = (self.dtype, self.flags);
        let refused = |what| Err(Error::NoTensor { dtype: dtype.name(), what });
        let fits = |number: u64| i64::try_from(number).is_ok();
        // in the order of the dimensions, as torch multiplies: after a 0 no overflow is possible
        let count = self.shape.iter().try_fold(1, |count: u64, &n| count.checked_mul(n));
        if !count.is_some_and(fits) || !self.shape.iter().all(|&n| fits(n)) {
            return refused(format!("shape {:?}", self.shape));
        }
        if !fits(self.offset) || !self.stride.iter().all(|&step| fits(step)) {
            return refused(format!("offset {} and stride {:?}", self.offset, self.stride));
        }
        if !Flags::ALL.contains(flags) {
            return refused(format!("flags {:#010b}", flags.0));
        }
        if flags.contains(Flags::REQUIRES_GRAD) && !(dtype.is_float() || dtype.is_complex()) {
            return refused("requires_grad".to_owned());
        }
        if flags.contains(Flags::CONJ) && !dtype.is_complex() {
            return refused("a conjugate bit".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn view(dtype: Dtype, offset: u64, shape: &[u64], stride: &[u64]) -> View {
        let (shape, stride) = (Dims::from_slice(shape), Dims::from_slice(stride));
        View { span: 0, dtype, flags: Flags::default(), offset, shape, stride }
    }

    #[test]
    fn extents_of_known_layouts() {
        let cases = [
            (view(Dtype::Float32, 0, &[2, 3], &[3, 1]), Some(0..24)),
            (view(Dtype::Float32, 1, &[2, 3], &[1, 2]), Some(4..28)),
            (view(Dtype::Bfloat16, 5, &[], &[]), Some(10..12)),
            (view(Dtype::Int64, 0, &[9, 4], &[0, 1]), Some(0..32)), // expanded
            (view(Dtype::Float8E4m3fn, 0, &[4, 4], &[2, 1]), Some(0..10)), // overlapping
            (view(Dtype::Complex128, 7, &[0, 4], &[4, 1]), None),
        ];
        for (view, extent) in cases {
            assert_eq!(view.extent().unwrap(), extent, "{view:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let error = view(Dtype::Float32, 0, &[2, 3], &[3, 1]).check(23).unwrap_err();
        assert_eq!(error, Error::OutOfSpan { end: 24, nbytes: 23 });
        assert!(view(Dtype::Float32, 0, &[2], &[]).extent().is_err());
        assert!(view(Dtype::Float32, u64::MAX, &[1], &[1]).extent().is_err());
        assert!(view(Dtype::Float32, 0, &[u64::MAX, 3], &[u64::MAX, 1]).extent().is_err());
    }

    #[test]
    fn what_is_no_tensor_to_torch_is_refused() {
        let large = 1 << 63;
        let flags = |dtype, flags| View { flags: Flags(flags), ..view(dtype, 0, &[2], &[1]) };
        let cases = [
            (
                view(Dtype::Int8, 0, &[large, 0], &[1, 1]),
                "int8 with shape [9223372036854775808, 0]",
            ),
            (
                view(Dtype::Int8, 0, &[1 << 32, 1 << 32, 0], &[0; 3]),
                "shape [4294967296, 4294967296, 0]",
            ),
            (view(Dtype::Int8, 0, &[1], &[large]), "offset 0 and stride [9223372036854775808]"),
            (view(Dtype::Int8, large, &[0], &[1]), "offset 9223372036854775808 and stride [1]"),
            (flags(Dtype::Int64, 3), "int64 with requires_grad"),
            (flags(Dtype::Float32, 4), "float32 with a conjugate bit"),
            (flags(Dtype::Complex64, 16), "complex64 with flags 0b00010000"),
        ];
        for (view, told) in cases {
            let error = view.check(64).unwrap_err().to_string();
            assert!(
                error.starts_with("torch has no tensor of ") && error.contains(told),
                "{error}"
            );
        }
        assert_eq!(view(Dtype::Int8, 0, &[0, 1 << 32, 1 << 32], &[1; 3]).check(0), Ok(()));
        assert_eq!(flags(Dtype::Complex64, 15).check(64), Ok(()));
    }

    proptest! {
        #[test]
        fn an_extent_holds_just_the_elements(
            offset in 0u64..50, dims in prop::collection::vec((1u64..5, 0u64..9), 0..4),
        ) {
            let (shape, stride): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
            let view = view(Dtype::Int16, offset, &shape, &stride);
            // the oracle: every index, one by one
            let mut indices = vec![offset];
            for (&n, &step) in shape.iter().zip(&stride) {
                indices = indices.iter().flat_map(|&i| (0..n).map(move |k| i + k * step)).collect();
            }
            let (first, last) = (indices.iter().min().unwrap(), indices.iter().max().unwrap());
            prop_assert_eq!(view.extent().unwrap(), Some(first * 2..(last + 1) * 2));
        }

        #[test]
        fn arbitrary_numbers_never_panic(
            offset: u64, shape in prop::collection::vec(any::<u64>(), 0..5),
            stride in prop::collection::vec(any::<u64>(), 0..5), nbytes: u64,
        ) {
            let view = view(Dtype::Complex128, offset, &shape, &stride);
            if view.check(nbytes).is_ok() && !shape.contains(&0) {
                prop_assert!(view.extent().unwrap().unwrap().end <= nbytes);
            }
        }
    }
}
