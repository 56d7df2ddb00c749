//! `mor_batch`: planned, created, freed, asked.

use super::env::{Env, Failure, Result, no_error, outcome, size};
use super::model::{long, model};
use super::params;
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;

pub(super) fn batch(handle: jlong) -> *mut mor_batch {
    handle as usize as *mut mor_batch
}

/// The outcome of a call on a batch, with the sentence that it left there.
pub(super) fn done(handle: jlong, status: mor_status) -> Result<()> {
    // SAFETY: a live handle; what is BUSY has the sentence of another call.
    unsafe {
        match status {
            mor_status::MOR_OK => Ok(()),
            mor_status::MOR_ERROR_BUSY => Err(Failure::status(status, c"".as_ptr())),
            _ => Err(Failure::status(status, mor_batch_last_error(batch(handle)))),
        }
    }
}

/// A plan that `make` writes, as Java has it.
unsafe fn plan(
    jni: &Env,
    params: jlongArray,
    cpus: jintArray,
    make: impl FnOnce(*const mor_batch_params, *mut mor_batch_plan_info, *mut mor_error) -> mor_status,
) -> Result<jlongArray> {
    let cpus = params::cpus(jni, cpus)?;
    let params = params::batch(jni, params, &cpus)?;
    // SAFETY: numbers.
    let mut p: mor_batch_plan_info = unsafe { std::mem::zeroed() };
    p.struct_size = size_of::<mor_batch_plan_info>();
    let mut error = no_error();
    let status = make(&params, &mut p, &mut error);
    outcome(jni, status, &error)?;
    jni.new_longs(&[
        long(p.bytes),
        long(p.heap_bytes),
        long(p.kv_bytes),
        long(p.kv_bytes_per_token),
        long(p.stack_bytes),
        long(p.context),
        long(p.sequences),
        long(p.rows),
        long(p.kv_pages),
        p.threads.into(),
        long(p.device_bytes),
        long(p.pinned_bytes),
    ])
}

native! {
    fn Java_dev_mor_Native_batchPlan(
        jni, of: jlong, params: jlongArray, cpus: jintArray
    ) -> jlongArray {
        plan(jni, params, cpus, |params, out, error| mor_batch_plan(model(of), params, out, error))
    }

    fn Java_dev_mor_Native_batchPlanIn(
        jni, of: jlong, params: jlongArray, cpus: jintArray, mean_depth: jdouble, bytes: jlong
    ) -> jlongArray {
        let bytes = size(bytes, "bytes")?;
        plan(jni, params, cpus, |params, out, error| {
            mor_batch_plan_in(model(of), params, mean_depth, bytes, out, error)
        })
    }

    fn Java_dev_mor_Native_batchPagesFor(
        jni, of: jlong, params: jlongArray, cpus: jintArray, mean_depth: jdouble
    ) -> jlong {
        let cpus = params::cpus(jni, cpus)?;
        let params = params::batch(jni, params, &cpus)?;
        let (mut pages, mut error) = (0, no_error());
        let status = mor_batch_pages_for(model(of), &params, mean_depth, &mut pages, &mut error);
        outcome(jni, status, &error)?;
        Ok(long(pages))
    }

    fn Java_dev_mor_Native_batchCreate(
        jni, of: jlong, params: jlongArray, cpus: jintArray
    ) -> jlong {
        let cpus = params::cpus(jni, cpus)?;
        let params = params::batch(jni, params, &cpus)?;
        let (mut created, mut error) = (std::ptr::null_mut(), no_error());
        let status = mor_batch_create(model(of), &params, &mut created, &mut error);
        outcome(jni, status, &error).inspect_err(|_| {
            // NULL, or created just now by a call whose log threw.
            mor_batch_free(created);
        })?;
        Ok(created as jlong)
    }

    fn Java_dev_mor_Native_batchFree(_jni, handle: jlong) {
        done(handle, mor_batch_free(batch(handle)))
    }

    fn Java_dev_mor_Native_batchIsIdle(_jni, handle: jlong) -> jboolean {
        let mut idle = false;
        done(handle, mor_batch_is_idle(batch(handle), &mut idle))?;
        Ok(idle)
    }

    fn Java_dev_mor_Native_batchKvBytesUsed(_jni, handle: jlong) -> jlong {
        let mut bytes = 0;
        done(handle, mor_batch_kv_bytes_used(batch(handle), &mut bytes))?;
        Ok(long(bytes))
    }

    fn Java_dev_mor_Native_batchCounters(jni, handle: jlong) -> jlongArray {
        let mut c: mor_batch_counters_info = std::mem::zeroed();
        c.struct_size = size_of::<mor_batch_counters_info>();
        done(handle, mor_batch_counters(batch(handle), &mut c))?;
        let first = [c.ticks, c.row_capacity, c.finished, c.logits, c.evictions];
        let mut all = reserved(first.len() + c.rows.len())?;
        all.extend(first.iter().chain(&c.rows).map(|number| *number as jlong));
        jni.new_longs(&all)
    }

    fn Java_dev_mor_Native_batchSetInStep(_jni, handle: jlong, in_step: jboolean) {
        done(handle, mor_batch_set_in_step(batch(handle), in_step))
    }
}
