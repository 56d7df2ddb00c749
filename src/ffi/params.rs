//! Parameter structs that can grow, and the other things that C passes.

use super::status::Failure;
use crate::error::Error;
use std::ffi::{CStr, c_char};

/// A struct that begins with `size_t struct_size`.
///
/// # Safety
/// `repr(C)`, any bytes are a valid value, and the first field is the `usize` of its size.
pub(super) unsafe trait Params: Copy {
    /// The struct's name, for sentences.
    const NAME: &'static str;
    /// The least size that a caller's version of it can have.
    const FIRST_SIZE: usize = size_of::<Self>();
    /// Every field's default; `struct_size` is set by `initialise`.
    fn defaults() -> Self;
    /// Bytes that later versions may make fields of.
    fn reserved(&self) -> &[u8] {
        &[]
    }
}

/// No struct of any later version is larger.
const MAX_SIZE: usize = 4096;

/// Fills in a caller's struct of `size` bytes, which may be of an earlier or a later version.
pub(super) unsafe fn initialise<T: Params>(params: *mut T, size: usize) -> Result<(), Failure> {
    // SAFETY: the caller passes NULL or `size` bytes.
    unsafe { write_struct(params, size, T::defaults()) }
}

/// Writes as much of `value` as a caller's struct of `size` bytes has room for, zeros behind it, and
/// its size.
pub(super) unsafe fn write_struct<T: Params>(
    out: *mut T,
    size: usize,
    value: T,
) -> Result<(), Failure> {
    check_size::<T>(size)?;
    if out.is_null() {
        return Err(null(T::NAME));
    }
    let common = size.min(size_of::<T>());
    // SAFETY: the caller passes `size` bytes; `value` has at least `common`.
    unsafe {
        out.cast::<u8>().write_bytes(0, size);
        let from = (&raw const value).cast::<u8>();
        from.copy_to_nonoverlapping(out.cast::<u8>(), common);
        out.cast::<usize>().write_unaligned(size);
    }
    Ok(())
}

/// Writes to a struct of the caller's that says its own size.
pub(super) unsafe fn write_sized<T: Params>(out: *mut T, value: T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: the caller passes a struct whose first field is its size.
    unsafe { write_struct(out, out.cast::<usize>().read_unaligned(), value) }
}

/// Reads a caller's struct; NULL stands for the defaults.
pub(super) unsafe fn read<T: Params>(params: *const T) -> Result<T, Failure> {
    let mut value = T::defaults();
    if params.is_null() {
        return Ok(value);
    }
    // SAFETY: the caller passes NULL or a struct whose first field is its size.
    let size = unsafe { params.cast::<usize>().read_unaligned() };
    check_size::<T>(size)?;
    let common = size.min(size_of::<T>());
    // SAFETY: the struct has `size` bytes; any bytes are a valid `T`.
    unsafe {
        let to = (&raw mut value).cast::<u8>();
        params.cast::<u8>().copy_to_nonoverlapping(to, common);
    }
    // SAFETY: inside the caller's struct.
    let beyond = unsafe { params.cast::<u8>().add(common) };
    // SAFETY: as above.
    let beyond = unsafe { std::slice::from_raw_parts(beyond, size - common) };
    if beyond.iter().chain(value.reserved()).any(|byte| *byte != 0) {
        return Err(Failure::argument(format_args!(
            "{} sets a field that this version of the library does not know",
            T::NAME
        )));
    }
    Ok(value)
}

fn check_size<T: Params>(size: usize) -> Result<(), Failure> {
    if (T::FIRST_SIZE..=MAX_SIZE).contains(&size) {
        return Ok(());
    }
    Err(Failure::argument(format_args!(
        "struct_size of {} is {size}; set it with the struct's _init function",
        T::NAME
    )))
}

/// The error of a pointer that must not be NULL.
pub(super) fn null(what: &str) -> Failure {
    Failure::argument(format_args!("{what} is NULL"))
}

/// `count` items from `pointer` on; NULL is allowed for none.
pub(super) unsafe fn slice<'a, T>(
    pointer: *const T,
    count: usize,
    what: &str,
) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    check_range::<T>(pointer, count, what)?;
    // SAFETY: the caller passes `count` items, which nobody changes during the call; NULL,
    // misplaced and impossible ranges are refused.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// As [`slice`], to be written. Only ever used for plain numbers, where any old bytes are valid.
pub(super) unsafe fn slice_mut<'a, T>(
    pointer: *mut T,
    count: usize,
    what: &str,
) -> Result<&'a mut [T], Failure> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_range::<T>(pointer, count, what)?;
    // SAFETY: as in `slice`, and nobody else uses the items during the call.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// Refuses NULL, what is not aligned, and a range that no memory can have.
pub(super) fn check_range<T>(pointer: *const T, count: usize, what: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(null(what));
    }
    let bytes = count.checked_mul(size_of::<T>());
    let end = bytes.and_then(|bytes| (pointer as usize).checked_add(bytes));
    if end.is_none() || bytes > Some(isize::MAX as usize) {
        return Err(Failure::argument(format_args!(
            "{what} cannot have {count} elements"
        )));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format_args!("{what} is not aligned")));
    }
    Ok(())
}

/// The value of a text's length that means "up to its zero byte".
pub const MOR_ZERO_TERMINATED: usize = usize::MAX;

/// A text of `bytes` bytes, or of [`MOR_ZERO_TERMINATED`].
pub(super) unsafe fn text<'a>(
    pointer: *const c_char,
    bytes: usize,
    what: &str,
) -> Result<&'a str, Failure> {
    let bytes = if bytes == MOR_ZERO_TERMINATED {
        if pointer.is_null() {
            return Err(null(what));
        }
        // SAFETY: the caller passes a text that ends with a zero byte.
        unsafe { CStr::from_ptr(pointer) }.to_bytes()
    } else {
        // SAFETY: the caller passes `bytes` bytes.
        unsafe { slice(pointer.cast::<u8>(), bytes, what) }?
    };
    std::str::from_utf8(bytes).map_err(|e| {
        Failure::argument(format_args!(
            "{what} is not UTF-8 from byte {} on",
            e.valid_up_to()
        ))
    })
}

/// Writes a result. The caller has checked `out` with [`check_out`].
pub(super) unsafe fn put<T>(out: *mut T, value: T) {
    // SAFETY: not NULL, and the caller passes room for a `T`.
    unsafe { out.write_unaligned(value) }
}

/// Refuses a NULL where a result is to be written.
pub(super) fn check_out<T>(out: *mut T, what: &str) -> Result<(), Failure> {
    match out.is_null() {
        true => Err(null(what)),
        false => Ok(()),
    }
}

/// Copies a text with a zero byte behind it, or fails with the size that it takes. The size without
/// the zero byte goes to `out_bytes` in both cases.
pub(super) unsafe fn copy_text(
    text: &[u8],
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller passes a buffer of `capacity` bytes and a place for the size.
    unsafe {
        check_out(out_bytes, "out_bytes")?;
        let buffer = slice_mut(buffer.cast::<u8>(), capacity, "buffer")?;
        put(out_bytes, text.len());
        let Some(room) = buffer.get_mut(..=text.len()) else {
            return Err(too_small(text.len() + 1, capacity));
        };
        room[..text.len()].copy_from_slice(text);
        room[text.len()] = 0;
    }
    Ok(())
}

pub(super) fn too_small(needed: usize, capacity: usize) -> Failure {
    Failure::Error(Error::BufferTooSmall { needed, capacity })
}
