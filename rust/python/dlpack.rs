//! DLPack: memory that somebody else keeps, lent as a tensor; and tensors of others, described.
//!
//! ```text
//!  torch's storage ─▶ ManagedTensor ─▶ owner        `deleter` drops the owner with the storage
//! ```
//!
//! As laid down in `dlpack.h`, version 1 (<https://dmlc.github.io/dlpack/latest/c_api.html>).

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::slice;

use crate::format::dtype::Dtype;
use crate::format::view::{Dims, View};

const CPU: i32 = 1;
const MAJOR_VERSION: u32 = 1;

/// `DLPackVersion`; the layout of all that follows it depends on `major`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Version {
    major: u32,
    minor: u32,
}

/// `DLTensor`: where the elements lie, and how.
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

/// `DLManagedTensorVersioned`: a tensor, and what to call when nobody needs it any more.
#[repr(C)]
#[derive(Debug)]
pub struct ManagedTensor {
    version: Version,
    manager_ctx: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    flags: u64,
    tensor: Tensor,
}

/// Makes a Python object of a tensor that it takes over, and puts it where the second argument
/// points; not 0 with a Python exception set.
pub type ToPyObject = unsafe extern "C" fn(*mut ManagedTensor, *mut *mut c_void) -> c_int;

/// Fills in the second argument what a Python object is as a tensor, which stays as it is; not 0
/// with a Python exception set.
pub type Describe = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

/// `DLPackExchangeAPI`, up to what we call: a table that a library keeps for as long as it lives.
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

    /// The library's function that takes a [`ManagedTensor`]; `None` if its DLPack is not ours.
    pub fn to_py_object(&self) -> Option<ToPyObject> {
        (self.version.major == MAJOR_VERSION).then_some(self.to_py_object)
    }
}

/// A tensor of another library: where its first element lies in host memory, and its geometry.
#[derive(Debug, PartialEq, Eq)]
pub struct Strided {
    /// Null only where there is no element, or no memory.
    pub address: usize,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Elements in each dimension ...
    pub shape: Dims,
    /// ... and between neighbours in it.
    pub stride: Dims,
}

/// Asks a library for a tensor of its own; `None` where DLPack cannot express it or it does not lie
/// on the host, and then an exception may be set.
///
/// # Safety
/// `object` is what `describe` takes, alive and left alone meanwhile.
pub unsafe fn strided(describe: Describe, object: *mut c_void) -> Option<Strided> {
    let mut tensor = MaybeUninit::uninit();
    // SAFETY: the caller's object, and room for what it fills in.
    if unsafe { describe(object, tensor.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: 0 says that it is filled in.
    let Tensor { data, device_type, ndim, code, bits, lanes, shape, strides, byte_offset, .. } =
        unsafe { tensor.assume_init() };
    let dtype = Dtype::from_dlpack(code, u64::from(bits) / 8)?;
    let dims = |start: *mut i64| match usize::try_from(ndim) {
        Ok(0) => Some(Dims::new()),
        Ok(n) if !start.is_null() => {
            // SAFETY: as many as there are dimensions, in the tensor; none is negative in torch.
            Some(Dims::from_slice(unsafe { slice::from_raw_parts(start.cast_const().cast(), n) }))
        }
        _ => None,
    };
    let address = (data as usize).checked_add(usize::try_from(byte_offset).ok()?)?;
    let strided = Strided { address, dtype, shape: dims(shape)?, stride: dims(strides)? };
    (device_type == CPU && lanes == 1).then_some(strided)
}

/// What a loan holds: the tensor first, so that a pointer to it is one to all.
#[repr(C)]
struct Loan<Owner> {
    managed: ManagedTensor,
    _owner: Owner,
}

/// Lends the elements of a view that start at `data`; `None` for a dtype that DLPack lacks.
///
/// Whoever takes it calls its deleter in the end, on whatever thread, which drops the owner.
///
/// # Safety
/// The owner keeps the elements and the view where they are.
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
        // only ever read; what is too large for an `i64` is negative to torch, which refuses it
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
/// `managed` is the start of a `Loan<Owner>` that `lend` boxed, and nobody uses it from now on.
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
        // SAFETY: not given back yet.
        let tensor = unsafe { &(*loan).tensor };
        assert_eq!((tensor.data, tensor.ndim, tensor.byte_offset), (data, 2, 0));
        assert_eq!((tensor.code, tensor.bits, tensor.lanes), (4, 16, 1));
        // SAFETY: as many as there are dimensions.
        assert_eq!(unsafe { slice::from_raw_parts(tensor.shape, 2) }, [2, 3]);
        // SAFETY: as many as there are dimensions.
        assert_eq!(unsafe { slice::from_raw_parts(tensor.strides, 2) }, [1, 2]);
        assert_eq!(Arc::strong_count(&owner), 2);
        // SAFETY: not given back yet.
        let deleter = unsafe { (*loan).deleter }.unwrap();
        // SAFETY: lent above, and not used below.
        unsafe { deleter(loan) };
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    /// "Describes" a `Tensor` as itself.
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
        // SAFETY: nobody looks at the elements.
        let loan = unsafe { lend(data, &view, ()) }.unwrap();
        // SAFETY: not given back yet.
        let tensor = unsafe { &raw mut (*loan).tensor };
        let (shape, stride) = (view.shape.clone(), view.stride.clone());
        let expected = Strided { address: 0x1000, dtype: Dtype::Bfloat16, shape, stride };
        // SAFETY: a tensor of ours.
        assert_eq!(unsafe { strided(describe, tensor.cast()) }, Some(expected));
        // SAFETY: not given back yet.
        unsafe { (*tensor).device_type = CPU + 1 };
        // SAFETY: a tensor of ours.
        assert_eq!(unsafe { strided(describe, tensor.cast()) }, None);
        // SAFETY: it refuses what is no object.
        assert_eq!(unsafe { strided(describe, std::ptr::null_mut()) }, None);
        // SAFETY: lent above, and not used below.
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
