//! Every dtype of torch: its name, its size, and its code in DLPack.

use crate::error::{Error, Result};

macro_rules! dtypes {
    ($($code:literal $variant:ident $name:literal $itemsize:literal $dlpack:expr;)*) => {
        /// A torch dtype. The discriminants are the codes of the offset table: never renumber.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)] // the variants are torch's own names
        pub enum Dtype { $($variant = $code,)* }

        impl Dtype {
            /// All dtypes, in the order of their codes.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// Its name in torch, without `torch.`.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bytes of one element. Sub-byte dtypes take a whole byte, as in torch.
            pub fn itemsize(self) -> u64 {
                match self { $(Dtype::$variant => $itemsize,)* }
            }

            /// Its `DLDataTypeCode`, if DLPack has a type of this code and size.
            pub fn dlpack(self) -> Option<u8> {
                match self { $(Dtype::$variant => $dlpack,)* }
            }

            /// Whether elements are real numbers with an exponent.
            pub fn is_float(self) -> bool {
                self.name().contains("float")
            }

            /// Whether elements have an imaginary part.
            pub fn is_complex(self) -> bool {
                self.name().contains("complex")
            }

            /// The dtype with this code and size in DLPack.
            pub fn from_dlpack(code: u8, nbytes: u64) -> Option<Dtype> {
                let is = |dtype: &Dtype| dtype.dlpack() == Some(code) && dtype.itemsize() == nbytes;
                Dtype::ALL.iter().copied().find(is)
            }

            /// The dtype with this code in a table.
            pub fn from_code(code: u8) -> Result<Dtype> {
                match code {
                    $($code => Ok(Dtype::$variant),)*
                    _ => Err(Error::UnknownDtype { name: format!("code {code}") }),
                }
            }
        }
    };
}

dtypes! {
    0 Uint8 "uint8" 1 Some(1);
    1 Int8 "int8" 1 Some(0);
    2 Int16 "int16" 2 Some(0);
    3 Int32 "int32" 4 Some(0);
    4 Int64 "int64" 8 Some(0);
    5 Float16 "float16" 2 Some(2);
    6 Float32 "float32" 4 Some(2);
    7 Float64 "float64" 8 Some(2);
    8 Complex32 "complex32" 4 Some(5);
    9 Complex64 "complex64" 8 Some(5);
    10 Complex128 "complex128" 16 Some(5);
    11 Bool "bool" 1 Some(6);
    12 Qint8 "qint8" 1 None;
    13 Quint8 "quint8" 1 None;
    14 Qint32 "qint32" 4 None;
    15 Bfloat16 "bfloat16" 2 Some(4);
    16 Quint4x2 "quint4x2" 1 None;
    17 Quint2x4 "quint2x4" 1 None;
    18 Bits1x8 "bits1x8" 1 None;
    19 Bits2x4 "bits2x4" 1 None;
    20 Bits4x2 "bits4x2" 1 None;
    21 Bits8 "bits8" 1 None;
    22 Bits16 "bits16" 2 None;
    23 Float8E5m2 "float8_e5m2" 1 Some(12);
    24 Float8E4m3fn "float8_e4m3fn" 1 Some(10);
    25 Float8E5m2fnuz "float8_e5m2fnuz" 1 Some(13);
    26 Float8E4m3fnuz "float8_e4m3fnuz" 1 Some(11);
    27 Uint16 "uint16" 2 Some(1);
    28 Uint32 "uint32" 4 Some(1);
    29 Uint64 "uint64" 8 Some(1);
    30 Uint1 "uint1" 1 None;
    31 Uint2 "uint2" 1 None;
    32 Uint3 "uint3" 1 None;
    33 Uint4 "uint4" 1 None;
    34 Uint5 "uint5" 1 None;
    35 Uint6 "uint6" 1 None;
    36 Uint7 "uint7" 1 None;
    37 Int1 "int1" 1 None;
    38 Int2 "int2" 1 None;
    39 Int3 "int3" 1 None;
    40 Int4 "int4" 1 None;
    41 Int5 "int5" 1 None;
    42 Int6 "int6" 1 None;
    43 Int7 "int7" 1 None;
    44 Float8E8m0fnu "float8_e8m0fnu" 1 Some(14);
    45 Float4E2m1fnX2 "float4_e2m1fn_x2" 1 None;
    46 Bcomplex32 "bcomplex32" 4 None;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_the_place_in_the_list() {
        for (code, &dtype) in Dtype::ALL.iter().enumerate() {
            assert_eq!(usize::from(dtype as u8), code);
            assert_eq!(Dtype::from_code(dtype as u8), Ok(dtype));
        }
        assert!(Dtype::from_code(u8::MAX).is_err());
    }

    #[test]
    fn dlpack_tells_all_apart_that_it_has() {
        for &dtype in Dtype::ALL {
            if let Some(code) = dtype.dlpack() {
                assert_eq!(Dtype::from_dlpack(code, dtype.itemsize()), Some(dtype));
            }
        }
        assert_eq!(Dtype::from_dlpack(1, 3), None);
    }
}
