//! `mor_model`.

use super::handle::{Mark, Object, allocate, free, object};
use super::params::{self, Params, check_out, copy_text, initialise, null, put, write_sized};
use super::status::{Failure, mor_error, mor_status, report};
use crate::gguf::Value;
use crate::model::{Device, LoadParams, Model, RouterKind, Storage};
use crate::{Error, Text};
use std::ffi::{c_char, c_void};

/// A model: the mapped file and what it says about itself. It never changes, so any number of
/// threads, sessions and tokenizers may use one at the same time.
pub struct mor_model {
    _private: [u8; 0],
}

/// What stands behind a `mor_model`.
#[repr(C)]
pub(super) struct ModelObject {
    mark: u64,
    pub model: Model,
    pub log: Log,
}

// SAFETY: `repr(C)` with the mark first.
unsafe impl Object for ModelObject {
    const MARK: Mark = Mark::Model;
    const NAME: &'static str = "model";
}

/// The model behind a caller's pointer.
pub(super) unsafe fn model<'a>(pointer: *const mor_model) -> Result<&'a ModelObject, Failure> {
    // SAFETY: passed on.
    unsafe { object(pointer.cast::<ModelObject>()) }
}

/// How much a log line matters.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_log_level {
    /// What was loaded and created, and what it takes.
    MOR_LOG_INFO = 0,
    /// Something that the host may want to know, such as a model without a usable tokenizer.
    MOR_LOG_WARNING = 1,
}

/// Takes one line of log, a sentence of UTF-8 that ends with a zero byte and lives for the call.
/// It is called on the thread of the call that has something to tell, must not call this library on
/// the object in question, and must not unwind.
pub type mor_log_fn =
    Option<unsafe extern "C" fn(user_data: *mut c_void, level: mor_log_level, text: *const c_char)>;

/// The host's log.
#[derive(Clone, Copy)]
pub(super) struct Log {
    function: mor_log_fn,
    user_data: *mut c_void,
}

// SAFETY: the pointer is only given back to the host, whose duty it is to pass one that any of its
// threads may be handed (`mor_model_params.log_user_data` says so).
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

impl Log {
    pub fn write(&self, level: mor_log_level, what: impl std::fmt::Display) {
        let Some(function) = self.function else {
            return;
        };
        let mut line = super::status::LastError::EMPTY;
        line.set(&Text::new(what));
        // SAFETY: the host's function, called as `mor_log_fn` says.
        unsafe { function(self.user_data, level, line.as_ptr()) }
    }
}

/// Where a model runs.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(clippy::upper_case_acronyms)]
pub enum mor_device {
    /// The processor.
    MOR_DEVICE_CPU = 0,
    /// An NVIDIA GPU. Needs a library that was built with the feature `cuda`, and NVIDIA's driver.
    MOR_DEVICE_CUDA = 1,
}

/// How a model is loaded. Set it up with `mor_model_params_init`; NULL in its place means the
/// defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_model_params {
    /// Size of this struct as the caller knows it; `mor_model_params_init` sets it.
    pub struct_size: usize,
    /// Read the file into memory of this process instead of mapping it. Default: no. A map costs no
    /// memory of its own and is shared between processes. But if somebody truncates the file while
    /// a call is reading it, the system ends the process with SIGBUS; between calls, truncation is
    /// found and told as `MOR_ERROR_FILE_CHANGED`. A copy is safe from both. (Replacing a file by
    /// renaming another one over it, or deleting it, harms neither.)
    pub copy: u8,
    /// Touch every page while loading, so that no later call waits for the disk. Default: no.
    pub prefault: u8,
    /// Keep every page in memory until the model is freed. Default: no. When the system refuses,
    /// loading fails with `MOR_ERROR_LOCK`.
    pub lock: u8,
    /// Where the model runs, a `mor_device`. Default: `MOR_DEVICE_CPU`.
    pub device: u8,
    /// The number of the GPU, from 0, when the device is one.
    pub device_index: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Takes what the library has to tell about this model and its sessions; NULL (the default):
    /// nobody. The library itself writes nowhere.
    pub log: mor_log_fn,
    /// Passed to `log`, on whatever thread it is called.
    pub log_user_data: *mut c_void,
}

// SAFETY: `repr(C)`, numbers and nullable pointers, the size first.
unsafe impl Params for mor_model_params {
    const NAME: &'static str = "mor_model_params";
    fn defaults() -> Self {
        mor_model_params {
            struct_size: 0,
            copy: 0,
            prefault: 0,
            lock: 0,
            device: mor_device::MOR_DEVICE_CPU as u8,
            device_index: 0,
            reserved: [0; 3],
            log: None,
            log_user_data: std::ptr::null_mut(),
        }
    }
    fn reserved(&self) -> &[u8] {
        &self.reserved
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_model_params)`
/// @return `MOR_ERROR_INVALID_ARGUMENT` when `params` is NULL or the size impossible
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_params_init(
    params: *mut mor_model_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// Loads the GGUF file at `path`: maps it read-only and checks all that is needed to run it. The
/// weights are used where they lie in the map; none is copied, unless `params->copy` asks for it.
/// May block on the disk. Files are not trusted: a damaged or hostile one gives an error.
///
/// @param path       name of the file, UTF-8 (on Unix: any bytes), ending with a zero byte
/// @param params     how, or NULL
/// @param out_model  gets the model; free it with `mor_model_free`
/// @param out_error  gets the reason of a failure, or NULL
/// @return `MOR_ERROR_IO`, `MOR_ERROR_FORMAT`, `MOR_ERROR_UNSUPPORTED`, `MOR_ERROR_OUT_OF_MEMORY`,
///         `MOR_ERROR_LOCK`, `MOR_ERROR_INVALID_ARGUMENT`; `*out_model` is then left as it was
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_load(
    path: *const c_char,
    params: *const mor_model_params,
    out_model: *mut *mut mor_model,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            report(
                load(params, out_model, |params| open(path, params)),
                out_error,
            )
        }
    })
}

/// As `mor_model_load`, from a descriptor of an open file: the `bytes` bytes from `offset` on, for
/// example of an asset inside an Android package. The descriptor stays the caller's and may be
/// closed after the call. Not on Windows.
///
/// @param descriptor  a file that can be read and mapped
/// @param offset      where the model begins in it, any number
/// @param bytes       how long it is; 0: up to the file's end
/// @return as `mor_model_load`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_load_descriptor(
    descriptor: i32,
    offset: u64,
    bytes: u64,
    params: *const mor_model_params,
    out_model: *mut *mut mor_model,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        let bytes = (bytes > 0).then_some(bytes);
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            report(
                load(params, out_model, |params| {
                    let file = duplicate(descriptor)?;
                    Ok(Model::from_file(file, offset, bytes, params)?)
                }),
                out_error,
            )
        }
    })
}

/// As `mor_model_load`, from memory of the caller, which is used where it is and must neither change
/// nor go before the model and every session and tokenizer made of it are freed. With
/// `params->copy` it is copied and may go at once. `params->prefault` and `params->lock` concern the
/// copy.
///
/// @param data   the bytes of a GGUF file, at any address
/// @param bytes  how many they are
/// @return as `mor_model_load`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_load_memory(
    data: *const c_void,
    bytes: usize,
    params: *const mor_model_params,
    out_model: *mut *mut mor_model,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            report(
                load(params, out_model, |params| {
                    // The borrow is as long as the manual demands, which Rust calls 'static.
                    let data: &'static [u8] = params::slice(data.cast(), bytes, "data")?;
                    if data.is_empty() {
                        return Err(Failure::Error(Error::format("it is empty")));
                    }
                    Ok(Model::from_storage(
                        Storage::memory(data, params)?,
                        params.device,
                    )?)
                }),
                out_error,
            )
        }
    })
}

unsafe fn load(
    params: *const mor_model_params,
    out_model: *mut *mut mor_model,
    make: impl FnOnce(&LoadParams) -> Result<Model, Failure>,
) -> Result<(), Failure> {
    check_out(out_model, "out_model")?;
    // SAFETY: passed on.
    let params = unsafe { params::read(params) }?;
    let model = make(&LoadParams {
        copy: params.copy != 0,
        prefault: params.prefault != 0,
        lock: params.lock != 0,
        device: match params.device {
            device if device == mor_device::MOR_DEVICE_CPU as u8 => Device::Cpu,
            device if device == mor_device::MOR_DEVICE_CUDA as u8 => {
                Device::Cuda(params.device_index.into())
            }
            other => {
                return Err(Failure::Error(Error::argument(format_args!(
                    "device is {other}, which no mor_device is"
                ))));
            }
        },
    })?;
    let log = Log {
        function: params.log,
        user_data: params.log_user_data,
    };
    let h = model.hyperparameters();
    log.write(
        mor_log_level::MOR_LOG_INFO,
        format_args!(
            "loaded a model: {}, {} stored and {} logical layers, {} bytes of weights",
            h.kind(),
            h.stored_blocks,
            h.logical_layers(),
            model.weight_bytes()
        ),
    );
    if let Err(error) = model.tokenizer() {
        log.write(mor_log_level::MOR_LOG_WARNING, error);
    }
    let mark = Mark::Model as u64;
    let object = allocate(ModelObject { mark, model, log })?;
    // SAFETY: checked above.
    unsafe { put(out_model, object.cast()) };
    Ok(())
}

#[cfg(unix)]
unsafe fn open(path: *const c_char, params: &LoadParams) -> Result<Model, Failure> {
    use std::ffi::{CStr, OsStr};
    use std::os::unix::ffi::OsStrExt;
    if path.is_null() {
        return Err(null("path"));
    }
    // SAFETY: the caller passes a text that ends with a zero byte.
    let path = unsafe { CStr::from_ptr(path) };
    Ok(Model::open_with(
        OsStr::from_bytes(path.to_bytes()),
        params,
    )?)
}

#[cfg(not(unix))]
unsafe fn open(path: *const c_char, params: &LoadParams) -> Result<Model, Failure> {
    // SAFETY: passed on.
    let path = unsafe { params::text(path, params::MOR_ZERO_TERMINATED, "path") }?;
    Ok(Model::open_with(path, params)?)
}

#[cfg(unix)]
fn duplicate(descriptor: i32) -> Result<std::fs::File, Failure> {
    use std::os::fd::FromRawFd;
    // SAFETY: takes numbers; a descriptor that is not open is an error of the system's.
    let copy = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::io("file descriptor", error).into());
    }
    // SAFETY: a fresh descriptor that nobody else has.
    Ok(unsafe { std::fs::File::from_raw_fd(copy) })
}

#[cfg(not(unix))]
fn duplicate(_: i32) -> Result<std::fs::File, Failure> {
    Err(Error::unsupported("file descriptors on this system").into())
}

/// Frees a model; NULL is allowed, and an object of another kind is left alone. Sessions and tokenizers made of it keep what they need of it and
/// stay usable; the file is unmapped with the last of them. Must not be called while another call on
/// this model is in progress.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_free(model: *mut mor_model) {
    boundary!((), {
        let pointer = model.cast::<ModelObject>();
        // SAFETY: the caller's duty, see the manual; what is no live model is left alone.
        unsafe {
            if object(pointer).is_ok() {
                free(pointer);
            }
        }
    })
}

/// What chooses a token's depth.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_model_kind {
    /// Every layer runs once: a plain Llama model.
    MOR_MODEL_VANILLA = 0,
    /// Every token runs every recursion.
    MOR_MODEL_RECURSIVE = 1,
    /// Before each recursion a router decides which tokens go on.
    MOR_MODEL_EXPERT_CHOICE = 2,
    /// One router gives each token its depth before the first recursion.
    MOR_MODEL_TOKEN_CHOICE = 3,
}

/// What a model says about itself. Set `struct_size` to `sizeof(mor_model_info)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_model_info {
    /// Size of this struct as the caller knows it.
    pub struct_size: usize,
    /// A `mor_model_kind`.
    pub kind: u32,
    /// Tokens in the vocabulary: the length of a row of logits.
    pub vocab_size: u32,
    /// Tokens that the model was trained to see at once.
    pub context_length: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Inner width of the feed-forward half.
    pub feed_forward_size: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Layers in the file.
    pub stored_layers: u32,
    /// Layers that a token of full depth passes.
    pub logical_layers: u32,
    /// N_r: the most recursions that a token takes; 1 for a vanilla model.
    pub recursions: u32,
    /// The cut that the routers were trained for (`mor_session_set_cut`).
    pub cut: f32,
    /// Bytes of all tensors, each once: what a run reads of the map.
    pub weight_bytes: u64,
    /// Bytes that the weights would take if recursions shared nothing.
    pub unshared_weight_bytes: u64,
    /// Weights in the file.
    pub parameters: u64,
    /// 1 when `mor_tokenizer_create` will find a usable tokenizer, else 0.
    pub has_tokenizer: u32,
    /// 1 when the file has a chat template, else 0.
    pub has_chat_template: u32,
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_model_info {
    const NAME: &'static str = "mor_model_info";
    fn defaults() -> Self {
        mor_model_info {
            struct_size: 0,
            kind: 0,
            vocab_size: 0,
            context_length: 0,
            hidden_size: 0,
            feed_forward_size: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            stored_layers: 0,
            logical_layers: 0,
            recursions: 0,
            cut: 0.0,
            weight_bytes: 0,
            unshared_weight_bytes: 0,
            parameters: 0,
            has_tokenizer: 0,
            has_chat_template: 0,
        }
    }
}

/// Describes a model. Any thread, any time.
///
/// @param model     the model
/// @param out_info  gets the description; its `struct_size` must be set
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_describe(
    model: *const mor_model,
    out_info: *mut mor_model_info,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        let outcome = unsafe {
            self::model(model).and_then(|object| write_sized(out_info, describe(&object.model)))
        };
        // SAFETY: no error struct.
        unsafe { report(outcome, std::ptr::null_mut()) }
    })
}

fn describe(model: &Model) -> mor_model_info {
    let h = model.hyperparameters();
    let kind = match (&h.router, h.recursions) {
        (Some(router), _) if router.kind == RouterKind::Expert => {
            mor_model_kind::MOR_MODEL_EXPERT_CHOICE
        }
        (Some(_), _) => mor_model_kind::MOR_MODEL_TOKEN_CHOICE,
        (None, 1) => mor_model_kind::MOR_MODEL_VANILLA,
        (None, _) => mor_model_kind::MOR_MODEL_RECURSIVE,
    };
    let template = model.gguf().metadata.chat_template();
    // Each of these sizes was checked against a limit far below 2^32.
    mor_model_info {
        kind: kind as u32,
        vocab_size: h.vocab_size as u32,
        context_length: h.context_length as u32,
        hidden_size: h.hidden_size as u32,
        feed_forward_size: h.feed_forward_size as u32,
        heads: h.heads as u32,
        kv_heads: h.kv_heads as u32,
        head_dim: h.head_dim as u32,
        stored_layers: h.stored_blocks as u32,
        logical_layers: h.logical_layers() as u32,
        recursions: h.recursions as u32,
        cut: h.router.as_ref().map_or(0.0, |r| r.cut),
        weight_bytes: model.weight_bytes(),
        unshared_weight_bytes: model.unshared_weight_bytes(),
        parameters: model.parameters(),
        has_tokenizer: model.tokenizer().is_ok().into(),
        has_chat_template: matches!(template, Ok(Some(_))).into(),
        ..mor_model_info::defaults()
    }
}

/// Copies the value of a metadata key whose value is a string, such as "general.name", and a zero
/// byte behind it. Any thread, any time.
///
/// @param model      the model
/// @param key        the key, ending with a zero byte
/// @param buffer     gets the text; may be NULL when `capacity` is 0
/// @param capacity   bytes in `buffer`
/// @param out_bytes  gets the text's length without the zero byte, also when the buffer is too
///                   small
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`; `MOR_ERROR_INVALID_ARGUMENT`, also when the file has no
///         such key or its value is no string
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_model_metadata(
    model: *const mor_model,
    key: *const c_char,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let copy = || {
            // SAFETY: the caller's duty, see the manual.
            let object = unsafe { self::model(model) }?;
            // SAFETY: as above.
            let key = unsafe { params::text(key, params::MOR_ZERO_TERMINATED, "key") }?;
            let Some(Value::String(text)) = object.model.gguf().metadata.get(key) else {
                return Err(Failure::argument("the file has no text of this key"));
            };
            // SAFETY: as above.
            unsafe { copy_text(text.as_bytes(), buffer, capacity, out_bytes) }
        };
        // SAFETY: no error struct.
        unsafe { report(copy(), std::ptr::null_mut()) }
    })
}
