//! `mor_model`.

use super::env::{Env, Failure, Result, no_error, outcome, size};
use super::log;
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;

pub(super) fn model(handle: jlong) -> *mut mor_model {
    handle as usize as *mut mor_model
}

/// Bits of `flags`, as in `LoadParams`; above them come the device and its number, a byte each.
const COPY: jint = 1;
const PREFAULT: jint = 2;
const LOCK: jint = 4;
const DEVICE: u32 = 8;
const DEVICE_INDEX: u32 = 16;

/// The flags of some parameters.
pub(super) fn flags(params: &mor_model_params) -> jint {
    let flag = |set: u8, bit| if set != 0 { bit } else { 0 };
    flag(params.copy, COPY)
        | flag(params.prefault, PREFAULT)
        | flag(params.lock, LOCK)
        | jint::from(params.device) << DEVICE
        | jint::from(params.device_index) << DEVICE_INDEX
}

/// Loads by `make` with these parameters.
unsafe fn load(
    jni: &Env,
    flags: jint,
    log: jlong,
    make: impl FnOnce(*const mor_model_params, *mut *mut mor_model, *mut mor_error) -> mor_status,
) -> Result<jlong> {
    // SAFETY: numbers and nullable pointers.
    let mut params: mor_model_params = unsafe { std::mem::zeroed() };
    // SAFETY: a struct of this size.
    unsafe { mor_model_params_init(&mut params, size_of::<mor_model_params>()) };
    params.copy = (flags & COPY != 0).into();
    params.prefault = (flags & PREFAULT != 0).into();
    params.lock = (flags & LOCK != 0).into();
    params.device = (flags >> DEVICE) as u8;
    params.device_index = (flags >> DEVICE_INDEX) as u8;
    if log != 0 {
        params.log = Some(log::write);
        params.log_user_data = log as usize as *mut _;
    }
    let (mut loaded, mut error) = (std::ptr::null_mut(), no_error());
    let status = make(&params, &mut loaded, &mut error);
    outcome(jni, status, &error).inspect_err(|_| {
        // SAFETY: NULL, or loaded just now by a call whose log threw.
        unsafe { mor_model_free(loaded) }
    })?;
    Ok(loaded as jlong)
}

native! {
    fn Java_dev_mor_Native_modelLoad(jni, path: jbyteArray, flags: jint, log: jlong) -> jlong {
        let path = jni.text(path, "the path")?;
        load(jni, flags, log, |params, out, error| {
            mor_model_load(path.as_ptr().cast(), params, out, error)
        })
    }

    fn Java_dev_mor_Native_modelLoadDescriptor(
        jni, descriptor: jint, offset: jlong, bytes: jlong, flags: jint, log: jlong
    ) -> jlong {
        let unsigned = |number: jlong, what| u64::try_from(number).map_err(|_| {
            Failure::argument(format_args!("{what} is {number}"))
        });
        let (offset, bytes) = (unsigned(offset, "offset")?, unsigned(bytes, "length")?);
        load(jni, flags, log, |params, out, error| {
            mor_model_load_descriptor(descriptor, offset, bytes, params, out, error)
        })
    }

    fn Java_dev_mor_Native_modelLoadMemory(jni, data: jobject, flags: jint, log: jlong) -> jlong {
        let (data, bytes) = jni.buffer(data)?;
        load(jni, flags, log, |params, out, error| {
            mor_model_load_memory(data, bytes, params, out, error)
        })
    }

    fn Java_dev_mor_Native_modelFree(_jni, handle: jlong) {
        mor_model_free(model(handle));
        Ok(())
    }

    fn Java_dev_mor_Native_modelDescribe(jni, handle: jlong) -> jlongArray {
        let mut i: mor_model_info = std::mem::zeroed();
        i.struct_size = size_of::<mor_model_info>();
        match mor_model_describe(model(handle), &mut i) {
            mor_status::MOR_OK => {}
            status => return Err(Failure::status(status, c"".as_ptr())),
        }
        jni.new_longs(&[
            i.kind.into(),
            i.vocab_size.into(),
            i.context_length.into(),
            i.hidden_size.into(),
            i.feed_forward_size.into(),
            i.heads.into(),
            i.kv_heads.into(),
            i.head_dim.into(),
            i.stored_layers.into(),
            i.logical_layers.into(),
            i.recursions.into(),
            i.cut.to_bits().into(),
            i.weight_bytes as i64,
            i.unshared_weight_bytes as i64,
            i.parameters as i64,
            i.has_tokenizer.into(),
            i.has_chat_template.into(),
        ])
    }

    fn Java_dev_mor_Native_modelMetadata(jni, handle: jlong, key: jbyteArray) -> jbyteArray {
        let (key, model) = (jni.text(key, "the key")?, model(handle));
        let key = key.as_ptr().cast();
        two_calls(
            |buffer, capacity, bytes| mor_model_metadata(model, key, buffer, capacity, bytes),
            // A model keeps no sentence; there is no other reason than these.
            |status| Failure::status(status, c"the file has no text of this key".as_ptr()),
        )
        .and_then(|text| jni.new_bytes(&text))
    }
}

/// A text of a function that says how long it is when its buffer is too small.
pub(super) fn two_calls(
    ask: impl Fn(*mut std::ffi::c_char, usize, *mut usize) -> mor_status,
    failure: impl FnOnce(mor_status) -> Failure,
) -> Result<Vec<u8>> {
    let (mut bytes, mut text) = (0, Vec::new());
    let mut status = ask(std::ptr::null_mut(), 0, &mut bytes);
    if status == mor_status::MOR_ERROR_BUFFER_TOO_SMALL {
        // With room for the zero byte.
        text = reserved::<u8>(bytes + 1)?;
        text.resize(bytes + 1, 0);
        status = ask(text.as_mut_ptr().cast(), text.len(), &mut bytes);
        text.truncate(bytes);
    }
    match status {
        mor_status::MOR_OK => Ok(text),
        status => Err(failure(status)),
    }
}

/// A size that is not negative, as Java has it.
pub(super) fn long(number: usize) -> jlong {
    jlong::try_from(number).unwrap_or(jlong::MAX)
}

/// See [`size`]; the largest stands for as many as there can be.
pub(super) fn size_or_all(number: jlong, what: &str) -> Result<usize> {
    match number {
        jlong::MAX => Ok(usize::MAX),
        number => size(number, what),
    }
}
