//! A model's log, which may be called on any thread that creates something.

use super::env::{Env, Failure};
use crate::error::Error;
use crate::ffi::*;
use jni_sys::*;
use std::ffi::{CStr, c_char, c_void};

/// What is behind `mor_model_params.log_user_data`.
pub(super) struct Log {
    machine: *mut JavaVM,
    /// `Native`, kept.
    class: jclass,
    /// Kotlin's receiver, kept.
    receiver: jobject,
    method: jmethodID,
}

/// A `mor_log_fn`.
pub(super) unsafe extern "C" fn write(
    user_data: *mut c_void,
    level: mor_log_level,
    text: *const c_char,
) {
    // A panic here is told by nobody and harms nothing.
    crate::ffi::boundary::catch(|| {
        // SAFETY: the log lives as long as its model, which is what calls this.
        let log = unsafe { &*user_data.cast::<Log>() };
        let mut env = std::ptr::null_mut();
        // SAFETY: the machine is the one that loaded this library.
        let known =
            unsafe { ((**log.machine).v1_2.GetEnv)(log.machine, &mut env, JNI_VERSION_1_6) };
        if known != JNI_OK {
            return;
        }
        let jni = Env {
            env: env.cast(),
            class: log.class,
        };
        // Nothing may be called once a log has thrown; the method that is running sees it.
        if jni.thrown() {
            return;
        }
        // SAFETY: the library's texts end with a zero byte.
        if let Ok(text) = jni.new_bytes(unsafe { CStr::from_ptr(text) }.to_bytes()) {
            let level = jvalue { i: level as jint };
            jni.ask(
                log.method,
                &[jvalue { l: log.receiver }, level, jvalue { l: text }],
            );
            if !jni.thrown() {
                jni.forget(text);
            }
        }
    });
}

native! {
    fn Java_dev_mor_Native_hold(jni, kept: jobject) -> jlong {
        Ok(jni.keep(kept)? as usize as jlong)
    }

    fn Java_dev_mor_Native_letGo(jni, held: jlong) {
        if held != 0 {
            jni.drop_kept(held as usize as jobject);
        }
        Ok(())
    }

    fn Java_dev_mor_Native_logCreate(jni, receiver: jobject) -> jlong {
        let method = jni.method(c"log", c"(Ljava/lang/Object;I[B)Z")?;
        let machine = jni.machine()?;
        let class = jni.keep(jni.class)?;
        let receiver = jni.keep(receiver).inspect_err(|_| jni.drop_kept(class))?;
        let mut place = crate::memory::reserved(1).map_err(Failure::from)?;
        place.push(Log { machine, class, receiver, method });
        Ok(Box::into_raw(place.into_boxed_slice()).cast::<Log>() as jlong)
    }

    fn Java_dev_mor_Native_logFree(jni, log: jlong) {
        let log = log as usize as *mut Log;
        if log.is_null() {
            return Err(Error::argument("the log is NULL").into());
        }
        // SAFETY: made by `logCreate`, of one element, and its model is freed.
        let place = Box::from_raw(std::ptr::slice_from_raw_parts_mut(log, 1));
        jni.drop_kept(place[0].class);
        jni.drop_kept(place[0].receiver);
        Ok(())
    }
}
