//! `mor_session`: planned, created, freed, cancelled, run.

use super::env::{Env, Failure, Result, no_error, outcome};
use super::model::{long, model, size_or_all};
use super::params;
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;
use std::ffi::c_void;

pub(super) fn session(handle: jlong) -> *mut mor_session {
    handle as usize as *mut mor_session
}

/// The outcome of a call on a session, with the sentence that it left there.
pub(super) fn done(handle: jlong, status: mor_status) -> Result<()> {
    // SAFETY: a live handle; what is BUSY has the sentence of another call.
    unsafe {
        match status {
            mor_status::MOR_OK => Ok(()),
            mor_status::MOR_ERROR_BUSY => Err(Failure::status(status, c"".as_ptr())),
            _ => Err(Failure::status(
                status,
                mor_session_last_error(session(handle)),
            )),
        }
    }
}

/// Creates by `make`; what was created when a log threw is freed.
unsafe fn create(
    jni: &Env,
    make: impl FnOnce(*mut *mut mor_session, *mut mor_error) -> mor_status,
) -> Result<jlong> {
    let (mut created, mut error) = (std::ptr::null_mut(), no_error());
    let status = make(&mut created, &mut error);
    outcome(jni, status, &error).inspect_err(|_| {
        // SAFETY: NULL, or created just now.
        unsafe { mor_session_free(created) };
    })?;
    Ok(created as jlong)
}

/// What a generation calls back.
struct Receiver<'a> {
    jni: &'a Env,
    receiver: jobject,
    method: jmethodID,
}

/// A `mor_piece_fn`.
unsafe extern "C" fn receive(user_data: *mut c_void, piece: *const mor_piece) -> bool {
    let call = || {
        // SAFETY: `generate` passes both for the time of the call, on its own thread.
        let (to, piece) = unsafe { (&*user_data.cast::<Receiver>(), &*piece) };
        // SAFETY: so many bytes of text, by `mor_piece`.
        let text = unsafe { std::slice::from_raw_parts(piece.text.cast(), piece.text_bytes) };
        let Ok(text) = to.jni.new_bytes(text) else {
            return false;
        };
        let (token, depth) = (piece.token as jint, piece.depth as jint);
        let more = to.jni.ask(
            to.method,
            &[
                jvalue { l: to.receiver },
                jvalue { i: token },
                jvalue { i: depth },
                jvalue { l: text },
            ],
        );
        // Allowed with an exception too.
        to.jni.forget(text);
        more
    };
    crate::ffi::boundary::catch(call).unwrap_or(false)
}

native! {
    fn Java_dev_mor_Native_sessionPlan(
        jni, of: jlong, params: jlongArray, cpus: jintArray
    ) -> jlongArray {
        let cpus = params::cpus(jni, cpus)?;
        let params = params::session(jni, params, &cpus)?;
        let mut p: mor_session_plan_info = std::mem::zeroed();
        p.struct_size = size_of::<mor_session_plan_info>();
        let mut error = no_error();
        let status = mor_session_plan(model(of), &params, &mut p, &mut error);
        outcome(jni, status, &error)?;
        jni.new_longs(&[
            long(p.bytes),
            long(p.alignment),
            long(p.kv_bytes),
            long(p.kv_bytes_per_token),
            long(p.stack_bytes),
            long(p.context),
            long(p.batch),
            long(p.kv_pages),
            p.threads.into(),
            long(p.device_bytes),
            long(p.pinned_bytes),
        ])
    }

    fn Java_dev_mor_Native_sessionCreate(
        jni, of: jlong, params: jlongArray, cpus: jintArray
    ) -> jlong {
        let cpus = params::cpus(jni, cpus)?;
        let params = params::session(jni, params, &cpus)?;
        create(jni, |out, error| mor_session_create(model(of), &params, out, error))
    }

    // A buffer begins where Java wants; the session begins at the next aligned byte of it.
    fn Java_dev_mor_Native_sessionCreateIn(
        jni, of: jlong, params: jlongArray, cpus: jintArray, memory: jobject
    ) -> jlong {
        let cpus = params::cpus(jni, cpus)?;
        let params = params::session(jni, params, &cpus)?;
        let (memory, bytes) = jni.buffer(memory)?;
        let skipped = memory.cast::<u8>().align_offset(MOR_SESSION_ALIGNMENT).min(bytes);
        let (memory, bytes) = (memory.byte_add(skipped), bytes - skipped);
        create(jni, |out, error| {
            mor_session_create_in(model(of), &params, memory, bytes, out, error)
        })
    }

    fn Java_dev_mor_Native_sessionFree(_jni, handle: jlong) {
        done(handle, mor_session_free(session(handle)))
    }

    fn Java_dev_mor_Native_cancel(_jni, handle: jlong) {
        // The session's sentence is another thread's: only NULL and freed handles fail.
        match mor_session_cancel(session(handle)) {
            mor_status::MOR_OK => Ok(()),
            status => Err(Failure::status(status, c"".as_ptr())),
        }
    }

    fn Java_dev_mor_Native_resetCancel(_jni, handle: jlong) {
        match mor_session_reset_cancel(session(handle)) {
            mor_status::MOR_OK => Ok(()),
            status => Err(Failure::status(status, c"".as_ptr())),
        }
    }

    fn Java_dev_mor_Native_prefill(jni, handle: jlong, tokens: jintArray) {
        let tokens = jni.ints(tokens)?;
        done(handle, mor_session_prefill(session(handle), tokens.as_ptr(), tokens.len()))
    }

    fn Java_dev_mor_Native_prefillWhole(jni, handle: jlong, tokens: jintArray) -> jint {
        let tokens = jni.ints(tokens)?;
        let mut kept = 0;
        let status =
            mor_session_prefill_whole(session(handle), tokens.as_ptr(), tokens.len(), &mut kept);
        done(handle, status)?;
        // A context has far fewer than 2^31 tokens.
        Ok(kept as jint)
    }

    fn Java_dev_mor_Native_logProbabilities(jni, handle: jlong, tokens: jintArray, into: jfloatArray) {
        let tokens = jni.ints(tokens)?;
        let mut numbers = reserved(tokens.len())?;
        numbers.resize(tokens.len(), 0.0);
        let status = mor_session_log_probabilities(
            session(handle), tokens.as_ptr(), tokens.len(), numbers.as_mut_ptr()
        );
        done(handle, status)?;
        jni.put_floats(into, &numbers)
    }

    // `into` may be null: then only the token is run.
    fn Java_dev_mor_Native_step(jni, handle: jlong, token: jint, into: jfloatArray) {
        let mut logits = std::ptr::null();
        let wanted = if into.is_null() { std::ptr::null_mut() } else { &raw mut logits };
        done(handle, mor_session_step(session(handle), token as u32, wanted))?;
        match into.is_null() {
            true => Ok(()),
            false => put_logits(jni, handle, into),
        }
    }

    fn Java_dev_mor_Native_logits(jni, handle: jlong, into: jfloatArray) {
        put_logits(jni, handle, into)
    }

    fn Java_dev_mor_Native_setSampler(jni, handle: jlong, params: jlongArray) {
        let params = params::sampler(jni, params)?;
        done(handle, mor_session_set_sampler(session(handle), &params))
    }

    fn Java_dev_mor_Native_sample(_jni, handle: jlong) -> jint {
        let mut token = 0;
        done(handle, mor_session_sample(session(handle), &mut token))?;
        Ok(token as jint)
    }

    // `receiver` may be null: then the tokens are found in the session afterwards.
    fn Java_dev_mor_Native_generate(
        jni, handle: jlong, max_tokens: jlong, stop: jobjectArray, receiver: jobject
    ) -> jint {
        let stop = jni.texts(stop, "a stop string")?;
        let mut stops = reserved(stop.len())?;
        stops.extend(stop.iter().map(|text| text.as_ptr().cast()));
        let method = jni.method(c"piece", c"(Ljava/lang/Object;II[B)Z")?;
        let mut target = Receiver { jni, receiver, method };
        let mut params = params::default_generate();
        params.max_tokens = size_or_all(max_tokens, "maxTokens")?;
        params.stop = stops.as_ptr();
        params.stop_count = stops.len();
        if !receiver.is_null() {
            params.callback = Some(receive);
            params.user_data = (&raw mut target).cast();
        }
        let mut finish = mor_finish::MOR_FINISH_END;
        let status = mor_session_generate(session(handle), &params, &mut finish);
        // What the callback threw goes on from here.
        jni.check()?;
        done(handle, status)?;
        Ok(finish as jint)
    }
}

fn put_logits(jni: &Env, handle: jlong, into: jfloatArray) -> Result<()> {
    let (mut start, mut count) = (std::ptr::null(), 0);
    // SAFETY: a live handle.
    let status = unsafe { mor_session_logits(session(handle), &mut start, &mut count) };
    done(handle, status)?;
    // SAFETY: numbers of the session, which stand until its next call.
    jni.put_floats(into, unsafe { std::slice::from_raw_parts(start, count) })
}
