//! Structs as Java passes them: arrays of `long`, in the order of `Params.kt`. What is a float there is
//! its bits here. Each begins with the library's defaults.

use super::env::{Env, Failure, Result, size};
use super::model::{long, size_or_all};
use crate::ffi::*;
use jni_sys::*;

/// The fields of a struct.
fn fields<const N: usize>(jni: &Env, array: jlongArray) -> Result<[jlong; N]> {
    let fields = jni.longs(array)?;
    <[jlong; N]>::try_from(fields.as_slice())
        .map_err(|_| Failure::argument("a struct of another version of the library"))
}

/// A number that C has as 32 bits.
fn small<T: TryFrom<jlong>>(number: jlong, what: &str) -> Result<T> {
    T::try_from(number)
        .map_err(|_| Failure::argument(format_args!("{what} is {number}, out of its range")))
}

fn float(bits: jlong) -> f32 {
    f32::from_bits(bits as u32)
}

fn bits(number: f32) -> jlong {
    number.to_bits().into()
}

/// A struct with the library's defaults.
///
/// # Safety
/// Zeros are a valid `T`, and `initialise` writes one.
unsafe fn with_defaults<T>(initialise: unsafe extern "C" fn(*mut T, usize) -> mor_status) -> T {
    // SAFETY: by this function's contract.
    unsafe {
        let mut params = std::mem::zeroed();
        initialise(&mut params, size_of::<T>());
        params
    }
}

/// The numbers of the CPUs, or none for any.
pub(super) fn cpus(jni: &Env, array: jintArray) -> Result<Option<Vec<u32>>> {
    match array.is_null() {
        true => Ok(None),
        false => jni.ints(array).map(Some),
    }
}

fn list(numbers: &Option<Vec<u32>>) -> (*const u32, usize) {
    match numbers {
        Some(numbers) => (numbers.as_ptr(), numbers.len()),
        None => (std::ptr::null(), 0),
    }
}

fn default_session() -> mor_session_params {
    // SAFETY: numbers and a nullable pointer.
    unsafe { with_defaults(mor_session_params_init) }
}

/// `cpus` must live as long as the result.
pub(super) fn session(
    jni: &Env,
    array: jlongArray,
    cpus: &Option<Vec<u32>>,
) -> Result<mor_session_params> {
    let f = fields::<9>(jni, array)?;
    let (cpus, cpu_count) = list(cpus);
    Ok(mor_session_params {
        context: size(f[0], "context")?,
        batch: size(f[1], "batch")?,
        threads: small(f[2], "threads")?,
        kv_type: small(f[3], "kvType")?,
        kv_pages: size(f[4], "kvPages")?,
        logit_rows: size(f[5], "logitRows")?,
        niceness: small(f[6], "niceness")?,
        prefault: (f[7] != 0).into(),
        lock: (f[8] != 0).into(),
        cpus,
        cpu_count,
        ..default_session()
    })
}

fn default_batch() -> mor_batch_params {
    // SAFETY: numbers and a nullable pointer.
    unsafe { with_defaults(mor_batch_params_init) }
}

/// `cpus` must live as long as the result.
pub(super) fn batch(
    jni: &Env,
    array: jlongArray,
    cpus: &Option<Vec<u32>>,
) -> Result<mor_batch_params> {
    let f = fields::<11>(jni, array)?;
    let (cpus, cpu_count) = list(cpus);
    Ok(mor_batch_params {
        context: size(f[0], "context")?,
        sequences: size(f[1], "sequences")?,
        rows: size(f[2], "rows")?,
        logit_rows: size(f[3], "logitRows")?,
        kv_pages: size(f[4], "kvPages")?,
        threads: small(f[5], "threads")?,
        kv_type: small(f[6], "kvType")?,
        pressure: small(f[7], "pressure")?,
        niceness: small(f[8], "niceness")?,
        prefault: (f[9] != 0).into(),
        lock: (f[10] != 0).into(),
        cpus,
        cpu_count,
        ..default_batch()
    })
}

fn default_sampler() -> mor_sampler_params {
    // SAFETY: numbers.
    unsafe { with_defaults(mor_sampler_params_init) }
}

pub(super) fn sampler(jni: &Env, array: jlongArray) -> Result<mor_sampler_params> {
    let f = fields::<7>(jni, array)?;
    Ok(mor_sampler_params {
        temperature: float(f[0]),
        top_p: float(f[1]),
        min_p: float(f[2]),
        repeat_penalty: float(f[3]),
        top_k: small(f[4], "topK")?,
        repeat_last_n: small(f[5], "repeatLastN")?,
        // All bits are a seed.
        seed: f[6] as u64,
        ..default_sampler()
    })
}

pub(super) fn default_generate() -> mor_generate_params {
    // SAFETY: numbers and nullable pointers.
    unsafe { with_defaults(mor_generate_params_init) }
}

fn default_request() -> mor_batch_request {
    // SAFETY: numbers and nullable pointers.
    unsafe { with_defaults(mor_batch_request_init) }
}

/// `prompt` and `sampler` must live as long as the result.
pub(super) fn request(
    jni: &Env,
    array: jlongArray,
    prompt: &[u32],
    sampler: Option<&mor_sampler_params>,
) -> Result<mor_batch_request> {
    let f = fields::<5>(jni, array)?;
    Ok(mor_batch_request {
        prompt: prompt.as_ptr(),
        prompt_count: prompt.len(),
        max_tokens: size_or_all(f[0], "maxTokens")?,
        sampler: sampler.map_or(std::ptr::null(), std::ptr::from_ref),
        cut: float(f[1]),
        depth_limit: small(f[2], "depthLimit")?,
        priority: small(f[3], "priority")?,
        ignore_end: (f[4] != 0).into(),
        ..default_request()
    })
}

native! {
    fn Java_dev_mor_Native_modelDefaults(_jni) -> jint {
        let params: mor_model_params = with_defaults(mor_model_params_init);
        Ok(super::model::flags(&params))
    }

    fn Java_dev_mor_Native_sessionDefaults(jni) -> jlongArray {
        let p = default_session();
        jni.new_longs(&[
            long(p.context),
            long(p.batch),
            p.threads.into(),
            p.kv_type.into(),
            long(p.kv_pages),
            long(p.logit_rows),
            p.niceness.into(),
            p.prefault.into(),
            p.lock.into(),
        ])
    }

    fn Java_dev_mor_Native_batchDefaults(jni) -> jlongArray {
        let p = default_batch();
        jni.new_longs(&[
            long(p.context),
            long(p.sequences),
            long(p.rows),
            long(p.logit_rows),
            long(p.kv_pages),
            p.threads.into(),
            p.kv_type.into(),
            p.pressure.into(),
            p.niceness.into(),
            p.prefault.into(),
            p.lock.into(),
        ])
    }

    fn Java_dev_mor_Native_samplerDefaults(jni) -> jlongArray {
        let p = default_sampler();
        jni.new_longs(&[
            bits(p.temperature),
            bits(p.top_p),
            bits(p.min_p),
            bits(p.repeat_penalty),
            p.top_k.into(),
            p.repeat_last_n.into(),
            p.seed as jlong,
        ])
    }

    fn Java_dev_mor_Native_generateDefaults(_jni) -> jlong {
        Ok(long(default_generate().max_tokens))
    }

    fn Java_dev_mor_Native_requestDefaults(jni) -> jlongArray {
        let p = default_request();
        jni.new_longs(&[
            long(p.max_tokens),
            bits(p.cut),
            p.depth_limit.into(),
            p.priority.into(),
            p.ignore_end.into(),
        ])
    }
}
