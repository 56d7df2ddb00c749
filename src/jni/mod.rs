//! The native methods of `bindings/kotlin`, whose class `dev.mor.Native` declares them.
//!
//! Nothing but translation, once more: each method turns Java's arrays into memory and calls a function
//! of [`crate::ffi`] by its C name, so that every check of the C interface holds for Java as well. Texts
//! cross as bytes of UTF-8, for JNI's own strings are another encoding that changes emoji and zeros.
//! Structs cross as arrays of `long` in the order of their fields.
//!
//! What the `unsafe` of these files rests on: a handle is 0 or one that this library gave out and that
//! is not freed during the call (Kotlin's `Handle` sees to both), and what is passed by Java is
//! what the signature in `Native.kt` says.

#[macro_use]
mod env;
mod log;
mod params;

mod batch;
mod model;
mod requests;
mod sequence;
mod session;
mod tokenizer;

use crate::ffi::*;
use jni_sys::{jbyteArray, jint};

native! {
    fn Java_dev_mor_Native_version(jni) -> jbyteArray {
        jni.new_text(mor_version())
    }

    fn Java_dev_mor_Native_statusText(jni, status: jint) -> jbyteArray {
        jni.new_text(mor_status_text(status))
    }
}
