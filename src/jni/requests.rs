//! What a batch does: sequences come, run and go. Their numbers cross as bits of a `long`.

use super::batch::{batch, done};
use super::env::{Env, Result, no_error, size};
use super::params;
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;

/// Adds a sequence by `add`. `sampler` may be null.
unsafe fn request(
    jni: &Env,
    handle: jlong,
    (fields, prompt, sampler): (jlongArray, jintArray, jlongArray),
    add: impl FnOnce(*mut mor_batch, *const mor_batch_request, *mut u64) -> mor_status,
) -> Result<jlong> {
    let prompt = jni.ints(prompt)?;
    let sampler = match sampler.is_null() {
        true => None,
        false => Some(params::sampler(jni, sampler)?),
    };
    let request = params::request(jni, fields, &prompt, sampler.as_ref())?;
    let mut sequence = 0;
    done(handle, add(batch(handle), &request, &mut sequence))?;
    Ok(sequence as jlong)
}

/// The numbers of a sequence that `copy` writes when it has room, and tells how many they are.
fn numbers<T: Copy + Default>(
    handle: jlong,
    copy: impl Fn(*mut T, usize, *mut usize) -> mor_status,
) -> Result<Vec<T>> {
    let (mut numbers, mut count) = (Vec::new(), 0);
    let mut status = copy(std::ptr::null_mut(), 0, &mut count);
    if status == mor_status::MOR_ERROR_BUFFER_TOO_SMALL {
        numbers = reserved(count)?;
        numbers.resize(count, T::default());
        status = copy(numbers.as_mut_ptr(), count, &mut count);
    }
    done(handle, status)?;
    Ok(numbers)
}

native! {
    fn Java_dev_mor_Native_batchAdd(
        jni, handle: jlong, fields: jlongArray, prompt: jintArray, sampler: jlongArray
    ) -> jlong {
        request(jni, handle, (fields, prompt, sampler), |batch, request, out| {
            mor_batch_add(batch, request, out)
        })
    }

    fn Java_dev_mor_Native_batchFork(
        jni, handle: jlong, parent: jlong, length: jint,
        fields: jlongArray, prompt: jintArray, sampler: jlongArray
    ) -> jlong {
        let length = size(length.into(), "length")?;
        request(jni, handle, (fields, prompt, sampler), |batch, request, out| {
            mor_batch_fork(batch, parent as u64, length, request, out)
        })
    }

    fn Java_dev_mor_Native_batchStop(_jni, handle: jlong, sequence: jlong) {
        done(handle, mor_batch_stop(batch(handle), sequence as u64))
    }

    fn Java_dev_mor_Native_batchRemove(_jni, handle: jlong, sequence: jlong) {
        done(handle, mor_batch_remove(batch(handle), sequence as u64))
    }

    fn Java_dev_mor_Native_batchResume(_jni, handle: jlong, sequence: jlong) {
        done(handle, mor_batch_resume(batch(handle), sequence as u64))
    }

    // Five numbers for each event: sequence, kind, token, depth, finish.
    fn Java_dev_mor_Native_batchTick(jni, handle: jlong) -> jlongArray {
        let (mut start, mut count) = (std::ptr::null(), 0);
        done(handle, mor_batch_tick(batch(handle), &mut start, &mut count))?;
        let events = match count {
            0 => &[],
            // SAFETY: so many events, which stand until the next call.
            count => std::slice::from_raw_parts(start, count),
        };
        let mut all = reserved(5 * count)?;
        all.extend(events.iter().flat_map(|e| [
            e.sequence as jlong,
            e.kind as jlong,
            e.token.into(),
            e.depth.into(),
            e.finish as jlong,
        ]));
        jni.new_longs(&all)
    }

    // The status, and 256 times why it ended.
    fn Java_dev_mor_Native_batchSequenceStatus(_jni, handle: jlong, sequence: jlong) -> jint {
        let mut status = mor_sequence_status::MOR_SEQUENCE_WAITING;
        let mut finish = mor_finish::MOR_FINISH_END;
        let asked = mor_batch_sequence_status(
            batch(handle), sequence as u64, &mut status, &mut finish,
        );
        done(handle, asked)?;
        Ok(status as jint + 256 * finish as jint)
    }

    fn Java_dev_mor_Native_batchTokens(jni, handle: jlong, sequence: jlong) -> jintArray {
        let tokens = numbers(handle, |out, capacity, count| {
            mor_batch_tokens(batch(handle), sequence as u64, out, capacity, count)
        })?;
        jni.new_ints(&tokens)
    }

    fn Java_dev_mor_Native_batchDepths(jni, handle: jlong, sequence: jlong) -> jbyteArray {
        let depths = numbers(handle, |out, capacity, count| {
            mor_batch_depths(batch(handle), sequence as u64, out, capacity, count)
        })?;
        jni.new_bytes(&depths)
    }

    // The status in a byte and the sentence, or null where nothing failed.
    fn Java_dev_mor_Native_batchFailure(jni, handle: jlong, sequence: jlong) -> jbyteArray {
        let mut failure = no_error();
        done(handle, mor_batch_failure(batch(handle), sequence as u64, &mut failure))?;
        if failure.status == mor_status::MOR_OK {
            return Ok(std::ptr::null_mut());
        }
        // SAFETY: written by the call, with a zero byte behind it.
        let text = std::ffi::CStr::from_ptr(failure.text.as_ptr()).to_bytes();
        let mut told = reserved(1 + text.len())?;
        told.push(failure.status as u8);
        told.extend_from_slice(text);
        jni.new_bytes(&told)
    }
}
