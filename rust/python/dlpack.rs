//! DLPack: lends memory to torch as tensors, and describes torch's tensors.
//!
//! ```text
//!  torch's storage ─▶ ManagedTensor ─▶ owner        `deleter` drops the owner with the storage
//! ```
//!
//! The layouts are those of `dlpack.h`, version 1
//! (<https://dmlc.github.io/dlpack/latest/c_api.html>).

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::slice;

use crate::format::dtype::Dtype;
use crate::format::view::{Dims, View};

const CPU: i32 = 1;
const MAJOR_VERSION: u32 = 1;

/// `DLPackVersion`. The layout of the fields after it depends on `major`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLTensor`: the address and geometry of the elements.
#[repr(C)]
#[derive(Debug)]
pub struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensorVersioned`: a tensor, and the function that frees it.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensor {
    version: Version,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    flags: u64,
    tensor: Tensor,
}

/// Turns a tensor, which it takes over, into a Python object, and stores that in the second
/// argument. Not 0 if a Python exception is set.
pub type ToPyObject = unsafe extern "C" fn(*mut ManagedTensor, *mut *mut c_void) -> c_int;

/// Describes a Python object as a tensor in the second argument, without changing the object. Not 0
/// if a Python exception is set.
pub type Describe = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// `DLPackExchangeAPI`, up to the functions that we call. The library keeps this table for as long
/// as it lives.
#[repr(C)]
#[derive(Debug)]
pub struct ExchangeApi {
    version: Version,
    previous: *const ExchangeApi,
    allocate: *const c_void,
    from_py_object: *const c_void,
    to_py_object: ToPyObject,
    describe: Option<Describe>,
}

impl ExchangeApi {
    /// The library's function that describes its tensors, if it has one.
    pub fn describe(&self) -> Option<Describe> {
        self.describe.filter(|_| self.version.major == MAJOR_VERSION)
    }

    /// The library's function that takes a [`ManagedTensor`]. `None` if the library has another
    /// version of DLPack.
    pub fn to_py_object(&self) -> Option<ToPyObject> {
        (self.version.major == MAJOR_VERSION).then_some(self.to_py_object)
    }
}

/// A tensor of another library: the address of its first element in host memory, and its geometry.
#[derive(Debug, PartialEq, Eq)]
pub struct Strided {
    /// Null only if the tensor has no element, or no memory.
    pub address: usize,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements in each dimension ...
    pub shape: Dims,
    /// ... and between neighbours in it.
    pub stride: Dims,
}

/// Describes a tensor of the library. `None` if DLPack cannot express it, or it is not in host
/// memory. Then a Python exception may be set.
///
/// # Safety
/// `object` is one that `describe` accepts. It is alive, and nobody changes it during the call.
pub unsafe fn strided(describe: Describe, object: *mut c_void) -> Option<Strided> {
    let mut tensor = MaybeUninit::uninit();
    // SAFETY: the caller's object, and room for the result.
    if unsafe { describe(object, tensor.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: 0 means that it is filled in.
    let Tensor { data, device_type, ndim, code, bits, lanes, shape, strides, byte_offset, .. } =
        unsafe { tensor.assume_init() };
    let dtype = Dtype::from_dlpack(code, u64::from(bits) / 8)?;
    let dims = |start: *mut i64| match usize::try_from(ndim) {
        Ok(0) => Some(Dims::new()),
        Ok(n) if !start.is_null() => {
            // SAFETY: the tensor has as many as dimensions, and torch has no negative ones.
            Some(Dims::from_slice(unsafe { slice::from_raw_parts(start.cast_const().cast(), n) }))
        }
        _ => None,
    };
    let address = (data as usize).checked_add(usize::try_from(byte_offset).ok()?)?;
    let strided = Strided { address, dtype, shape: dims(shape)?, stride: dims(strides)? };
    (device_type == CPU && lanes == 1).then_some(strided)
}

/// The memory of a loan. The tensor comes first, so that a pointer to it is one to the loan.
#[repr(C)]
struct Loan<Owner> {
    managed: ManagedTensor,
    _owner: Owner,
}

/// Lends the elements of a view that start at `data`. `None` for a dtype that DLPack lacks.
///
/// The borrower finally calls the deleter, on any thread, which drops the owner.
///
/// # Safety
/// The owner keeps the elements and the view in place.
pub unsafe fn lend<Owner>(
    data: *mut c_void,
    view: &View,
    owner: Owner,
) -> Option<*mut ManagedTensor> {
    let tensor = Tensor {
        data,
        device_type: CPU,
        device_id: 0,
        ndim: view.shape.len() as i32,
        code: view.dtype.dlpack()?,
        bits: (8 * view.dtype.itemsize()) as u8,
        lanes: 1,
        // only read; a number beyond `i64` is negative to torch, which refuses it
        shape: view.shape.as_ptr().cast_mut().cast(),
        strides: view.stride.as_ptr().cast_mut().cast(),
        byte_offset: 0,
    };
    let managed = ManagedTensor {
        version: Version { major: MAJOR_VERSION, minor: 0 },
        manager_ctx: std::ptr::null_mut(),
        deleter: Some(end::<Owner>),
        flags: 0,
        tensor,
    };
    Some(Box::into_raw(Box::new(Loan { managed, _owner: owner })).cast())
}

/// # Safety
/// `managed` is the start of a `Loan<Owner>` that `lend` boxed, and nobody uses it afterwards.
unsafe extern "C" fn end<Owner>(managed: *mut ManagedTensor) {
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(managed.cast::<Loan<Owner>>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::view::Flags;
    use std::sync::Arc;

    fn view(dtype: Dtype) -> View {
        let flags = Flags::default();
        View {
            span: 0,
            dtype,
            flags,
            offset: 0,
            shape: Dims::from_slice(&[2, 3]),
            stride: Dims::from_slice(&[1, 2]),
        }
    }

    #[test]
    fn a_loan_describes_the_view_and_keeps_its_owner_until_it_ends() {
        let owner = Arc::new([1_u16, 2, 3, 4, 5, 6]);
        let data = owner.as_ptr().cast_mut().cast();
        let view = view(Dtype::Bfloat16);
        // SAFETY: the view outlives the loan.
        let loan = unsafe { lend(data, &view, Arc::clone(&owner)) }.unwrap();
        // SAFETY: the loan has not ended.
        let tensor = unsafe { &(*loan).tensor };
        assert_eq!((tensor.data, tensor.ndim, tensor.byte_offset), (data, 2, 0));
        assert_eq!((tensor.code, tensor.bits, tensor.lanes), (4, 16, 1));
        // SAFETY: as many as there are dimensions.
        assert_eq!(unsafe { slice::from_raw_parts(tensor.shape, 2) }, [2, 3]);
        // SAFETY: as many as there are dimensions.
        assert_eq!(unsafe { slice::from_raw_parts(tensor.strides, 2) }, [1, 2]);
        assert_eq!(Arc::strong_count(&owner), 2);
        // SAFETY: the loan has not ended.
        let deleter = unsafe { (*loan).deleter }.unwrap();
        // SAFETY: it was lent above, and is not used below.
        unsafe { deleter(loan) };
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    /// Describes a `Tensor` as itself.
    unsafe extern "C" fn describe(object: *mut c_void, tensor: *mut Tensor) -> c_int {
        if object.is_null() {
            return -1;
        }
        // SAFETY: a tensor, and room for one.
        unsafe { std::ptr::copy_nonoverlapping(object.cast(), tensor, 1) };
        0
    }

    #[test]
    fn what_was_lent_is_described_as_it_was() {
        let (data, view) = (0x1000 as *mut c_void, view(Dtype::Bfloat16));
        // SAFETY: nobody reads the elements.
        let loan = unsafe { lend(data, &view, ()) }.unwrap();
        // SAFETY: the loan has not ended.
        let tensor = unsafe { &raw mut (*loan).tensor };
        let (shape, stride) = (view.shape.clone(), view.stride.clone());
        let expected = Strided { address: 0x1000, dtype: Dtype::Bfloat16, shape, stride };
        // SAFETY: our own tensor.
        assert_eq!(unsafe { strided(describe, tensor.cast()) }, Some(expected));
        // SAFETY: the loan has not ended.
        unsafe { (*tensor).device_type = CPU + 1 };
        // SAFETY: our own tensor.
        assert_eq!(unsafe { strided(describe, tensor.cast()) }, None);
        // SAFETY: `describe` refuses null.
        assert_eq!(unsafe { strided(describe, std::ptr::null_mut()) }, None);
        // SAFETY: it was lent above, and is not used below.
        unsafe { end::<()>(loan.cast()) };
    }

    #[test]
    fn a_dtype_that_dlpack_lacks_is_not_lent() {
        let owner = Arc::new(());
        let view = view(Dtype::Quint8);
        // SAFETY: nothing is lent.
        assert!(unsafe { lend(std::ptr::null_mut(), &view, Arc::clone(&owner)) }.is_none());
        assert_eq!(Arc::strong_count(&owner), 1);
    }
}
