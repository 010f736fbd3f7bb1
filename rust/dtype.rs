//! Every dtype of torch: its name, the bytes of one element, and the numpy dtype that carries it.

use crate::error::{Error, Result};

macro_rules! dtypes {
    ($($code:literal $variant:ident $name:literal $itemsize:literal $carrier:literal;)*) => {
        /// A torch dtype. The discriminants are the codes of the offset table: never renumber.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs)] // the variants are torch's own names
        pub enum Dtype { $($variant = $code,)* }

        impl Dtype {
            /// All dtypes, in the order of their codes.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// The name in torch, without `torch.`.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bytes of one element; sub-byte dtypes take a whole byte, as in torch.
            pub fn itemsize(self) -> u64 {
                match self { $(Dtype::$variant => $itemsize,)* }
            }

            /// The numpy dtype whose elements have the same size: the same dtype where numpy has
            /// it, else an integer to be reinterpreted with `Tensor.view`.
            pub fn carrier(self) -> &'static str {
                match self { $(Dtype::$variant => $carrier,)* }
            }

            /// The dtype with this torch name.
            pub fn from_name(name: &str) -> Result<Dtype> {
                match name {
                    $($name => Ok(Dtype::$variant),)*
                    _ => Err(Error::UnknownDtype { name: name.to_owned() }),
                }
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
    0 Uint8 "uint8" 1 "uint8";
    1 Int8 "int8" 1 "int8";
    2 Int16 "int16" 2 "int16";
    3 Int32 "int32" 4 "int32";
    4 Int64 "int64" 8 "int64";
    5 Float16 "float16" 2 "float16";
    6 Float32 "float32" 4 "float32";
    7 Float64 "float64" 8 "float64";
    8 Complex32 "complex32" 4 "int32";
    9 Complex64 "complex64" 8 "complex64";
    10 Complex128 "complex128" 16 "complex128";
    11 Bool "bool" 1 "bool";
    12 Qint8 "qint8" 1 "int8";
    13 Quint8 "quint8" 1 "uint8";
    14 Qint32 "qint32" 4 "int32";
    15 Bfloat16 "bfloat16" 2 "int16";
    16 Quint4x2 "quint4x2" 1 "uint8";
    17 Quint2x4 "quint2x4" 1 "uint8";
    18 Bits1x8 "bits1x8" 1 "uint8";
    19 Bits2x4 "bits2x4" 1 "uint8";
    20 Bits4x2 "bits4x2" 1 "uint8";
    21 Bits8 "bits8" 1 "uint8";
    22 Bits16 "bits16" 2 "int16";
    23 Float8E5m2 "float8_e5m2" 1 "uint8";
    24 Float8E4m3fn "float8_e4m3fn" 1 "uint8";
    25 Float8E5m2fnuz "float8_e5m2fnuz" 1 "uint8";
    26 Float8E4m3fnuz "float8_e4m3fnuz" 1 "uint8";
    27 Uint16 "uint16" 2 "uint16";
    28 Uint32 "uint32" 4 "uint32";
    29 Uint64 "uint64" 8 "uint64";
    30 Uint1 "uint1" 1 "uint8";
    31 Uint2 "uint2" 1 "uint8";
    32 Uint3 "uint3" 1 "uint8";
    33 Uint4 "uint4" 1 "uint8";
    34 Uint5 "uint5" 1 "uint8";
    35 Uint6 "uint6" 1 "uint8";
    36 Uint7 "uint7" 1 "uint8";
    37 Int1 "int1" 1 "uint8";
    38 Int2 "int2" 1 "uint8";
    39 Int3 "int3" 1 "uint8";
    40 Int4 "int4" 1 "uint8";
    41 Int5 "int5" 1 "uint8";
    42 Int6 "int6" 1 "uint8";
    43 Int7 "int7" 1 "uint8";
    44 Float8E8m0fnu "float8_e8m0fnu" 1 "uint8";
    45 Float4E2m1fnX2 "float4_e2m1fn_x2" 1 "uint8";
    46 Bcomplex32 "bcomplex32" 4 "int32";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_are_inverse() {
        for (code, &dtype) in Dtype::ALL.iter().enumerate() {
            assert_eq!(usize::from(dtype as u8), code);
            assert_eq!(Dtype::from_code(dtype as u8), Ok(dtype));
            assert_eq!(Dtype::from_name(dtype.name()), Ok(dtype));
        }
        assert!(Dtype::from_code(u8::MAX).is_err());
        assert!(Dtype::from_name("float7").is_err());
    }

    #[test]
    fn carriers_have_the_same_itemsize() {
        for &dtype in Dtype::ALL {
            let carrier = Dtype::from_name(dtype.carrier()).unwrap();
            assert_eq!(carrier.itemsize(), dtype.itemsize());
            assert_eq!(carrier.carrier(), carrier.name());
        }
    }
}
