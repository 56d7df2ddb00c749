//! What a session has so far, and how it goes on.

use super::env::{Failure, Result, size};
use super::model::long;
use super::session::{done, session};
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;

/// `count` numbers that a function of a session writes.
fn numbers<T: Copy + Default>(
    handle: jlong,
    count: usize,
    write: impl FnOnce(*mut T) -> mor_status,
) -> Result<Vec<T>> {
    let mut numbers = reserved(count)?;
    numbers.resize(count, T::default());
    done(handle, write(numbers.as_mut_ptr()))?;
    Ok(numbers)
}

/// `first` and `count` as they can be: memory is taken only for as many as there are.
fn part(handle: jlong, first: jint, count: jint) -> Result<(usize, usize)> {
    let mut length = 0;
    // SAFETY: a live handle.
    let status = unsafe { mor_session_length(session(handle), &mut length) };
    done(handle, status)?;
    let (first, count) = (size(first.into(), "first")?, size(count.into(), "count")?);
    if first > length || count > length - first {
        return Err(Failure::argument(format_args!(
            "{count} tokens from {first} on were asked for, but there are {length}"
        )));
    }
    Ok((first, count))
}

/// The one size that a function of a session writes.
fn ask(
    handle: jlong,
    function: unsafe extern "C" fn(*mut mor_session, *mut usize) -> mor_status,
) -> Result<jlong> {
    let mut answer = 0;
    // SAFETY: a live handle.
    done(handle, unsafe { function(session(handle), &mut answer) })?;
    Ok(long(answer))
}

native! {
    fn Java_dev_mor_Native_length(_jni, handle: jlong) -> jlong {
        ask(handle, mor_session_length)
    }

    fn Java_dev_mor_Native_tokens(jni, handle: jlong, first: jint, count: jint) -> jintArray {
        let (first, count) = part(handle, first, count)?;
        let tokens = numbers(handle, count, |out| {
            mor_session_tokens(session(handle), first, count, out)
        })?;
        jni.new_ints(&tokens)
    }

    fn Java_dev_mor_Native_depths(jni, handle: jlong, first: jint, count: jint) -> jbyteArray {
        let (first, count) = part(handle, first, count)?;
        let depths = numbers(handle, count, |out| {
            mor_session_depths(session(handle), first, count, out)
        })?;
        jni.new_bytes(&depths)
    }

    fn Java_dev_mor_Native_depthHistogram(jni, handle: jlong) -> jlongArray {
        const MOST: usize = MOR_MAX_RECURSIONS + 1;
        let counts = numbers(handle, MOST, |out: *mut i64| {
            mor_session_depth_histogram(session(handle), out.cast(), MOST)
        })?;
        jni.new_longs(&counts)
    }

    fn Java_dev_mor_Native_kvBytesUsed(_jni, handle: jlong) -> jlong {
        ask(handle, mor_session_kv_bytes_used)
    }

    fn Java_dev_mor_Native_setCut(_jni, handle: jlong, cut: jfloat) {
        done(handle, mor_session_set_cut(session(handle), cut))
    }

    fn Java_dev_mor_Native_setDepthLimit(_jni, handle: jlong, limit: jint) {
        // A negative limit is beyond any model's.
        done(handle, mor_session_set_depth_limit(session(handle), limit as u32))
    }

    fn Java_dev_mor_Native_setTimeBudget(_jni, handle: jlong, nanoseconds: jlong) {
        let nanoseconds = u64::try_from(nanoseconds)
            .map_err(|_| Failure::argument(format_args!("nanoseconds is {nanoseconds}")))?;
        done(handle, mor_session_set_time_budget(session(handle), nanoseconds))
    }

    fn Java_dev_mor_Native_setRouting(_jni, handle: jlong, routing: jint) {
        done(handle, mor_session_set_routing(session(handle), routing as u32))
    }

    fn Java_dev_mor_Native_rewind(_jni, handle: jlong, length: jint) {
        let length = size(length.into(), "length")?;
        done(handle, mor_session_rewind(session(handle), length))
    }

    fn Java_dev_mor_Native_saveSize(_jni, handle: jlong) -> jlong {
        ask(handle, mor_session_save_size)
    }

    fn Java_dev_mor_Native_save(jni, handle: jlong) -> jbyteArray {
        let bytes = size(ask(handle, mor_session_save_size)?, "a state")?;
        let state = numbers(handle, bytes, |out: *mut u8| {
            mor_session_save(session(handle), out.cast(), bytes, std::ptr::null_mut())
        })?;
        jni.new_bytes(&state)
    }

    // Answers how many bytes of the buffer were written.
    fn Java_dev_mor_Native_saveTo(jni, handle: jlong, buffer: jobject) -> jlong {
        let (start, capacity) = jni.buffer(buffer)?;
        let mut bytes = 0;
        done(handle, mor_session_save(session(handle), start, capacity, &mut bytes))?;
        Ok(long(bytes))
    }

    fn Java_dev_mor_Native_restore(jni, handle: jlong, state: jbyteArray) {
        let state = jni.bytes(state)?;
        restore(handle, state.as_ptr(), state.len())
    }

    fn Java_dev_mor_Native_restoreFrom(jni, handle: jlong, buffer: jobject) {
        let (start, bytes) = jni.buffer(buffer)?;
        restore(handle, start.cast(), bytes)
    }
}

fn restore(handle: jlong, state: *const u8, bytes: usize) -> Result<()> {
    // SAFETY: a live handle, and `bytes` bytes.
    done(handle, unsafe {
        mor_session_restore(session(handle), state.cast(), bytes)
    })
}
