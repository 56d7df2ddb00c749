//! `mor_session`.

use super::handle::{Exclusive, Mark, Object, Turn, call};
use super::model::{ModelObject, model, mor_log_level, mor_model};
use super::params::{
    self, Params, check_out, initialise, put, slice, slice_mut, too_small, write_sized,
};
use super::status::{Failure, LastError, mor_error, mor_status, report};
use crate::cpu::thread::CpuSet;
use crate::error::Error;
use crate::generate::{Finish, MAX_STOP_BYTES, Piece};
use crate::model::anonymous;
use crate::plan::ARENA_ALIGNMENT;
use crate::{KvType, Plan, Routing, SamplerParams, Session, SessionParams, ThreadParams};
use memmap2::MmapMut;
use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;
use std::ptr::addr_of_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One sequence of tokens in the making, its memory, its helper threads and its sampler.
///
/// One call at a time may use a session; a second one, from another thread or from a callback of the
/// first, gets `MOR_ERROR_BUSY` and does nothing. Only `mor_session_cancel` and
/// `mor_session_reset_cancel` may come at any time. No call but those that create and free a session
/// allocates or frees memory, on any thread.
pub struct mor_session {
    _private: [u8; 0],
}

/// What stands at the beginning of a session's memory.
#[repr(C)]
struct SessionObject {
    mark: u64,
    turn: Turn,
    cancel: AtomicBool,
    last_error: LastError,
    content: Session<'static>,
    /// The memory that all this stands in, unless it is the caller's.
    memory: Option<MmapMut>,
}

/// Bytes before the plan's memory.
const HEAD: usize = size_of::<SessionObject>().next_multiple_of(ARENA_ALIGNMENT);

// SAFETY: `repr(C)` with the mark first.
unsafe impl Object for SessionObject {
    const MARK: Mark = Mark::Session;
    const NAME: &'static str = "session";
}

// SAFETY: fields of the object.
unsafe impl Exclusive for SessionObject {
    type Content = Session<'static>;
    fn turn(pointer: *mut Self) -> *const Turn {
        // SAFETY: computes a field's address.
        unsafe { &raw const (*pointer).turn }
    }
    fn last_error(pointer: *mut Self) -> *mut LastError {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*pointer).last_error) }
    }
    fn content(pointer: *mut Self) -> *mut Session<'static> {
        // SAFETY: as above.
        unsafe { addr_of_mut!((*pointer).content) }
    }
}

/// A call on the session behind a caller's pointer.
unsafe fn with(
    session: *mut mor_session,
    work: impl FnOnce(&mut Session<'static>) -> Result<(), Failure>,
) -> mor_status {
    // SAFETY: passed on.
    unsafe { call(session.cast::<SessionObject>(), work) }
}

/// How keys and values are stored.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_kv_type {
    /// 2 bytes a number.
    MOR_KV_F16 = 0,
    /// 34 bytes for 32 numbers; the width of a head must be a multiple of 32.
    MOR_KV_Q8_0 = 1,
    /// 4 bytes a number: as computed, for exact comparisons.
    MOR_KV_F32 = 2,
}

/// What a session is planned for. Set it up with `mor_session_params_init`; NULL in its place means
/// the defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_session_params {
    /// Size of this struct as the caller knows it; `mor_session_params_init` sets it.
    pub struct_size: usize,
    /// Most tokens of the sequence. 0 (the default): as many as the model was trained for
    /// (`mor_model_info.context_length`). More are allowed, but models write worse there.
    pub context: usize,
    /// Most tokens of one pass over the weights: prompts are taken in pieces of this size. Larger
    /// is faster and takes more memory. Default: 64. More than `context` counts as `context`.
    /// Results do not depend on it.
    pub batch: usize,
    /// Threads that share the work, the caller's included: `threads - 1` are started when the
    /// session is created. At most 256. Results do not depend on it. 0 (the default): one for each
    /// core that this process may use.
    pub threads: u32,
    /// A `mor_kv_type`. Default: `MOR_KV_F16`.
    pub kv_type: u32,
    /// Pages of the KV pool, of 16 entries each. 0 (the default): enough for every token to take
    /// every recursion. A smaller pool takes less memory and bets on tokens that leave early; when
    /// it is lost, calls fail with `MOR_ERROR_KV_FULL`. More than enough counts as enough; the
    /// least that holds one token of full depth is one page for each layer that it passes
    /// (`mor_model_info.logical_layers`).
    pub kv_pages: usize,
    /// The CPUs that helper threads may run on, by the system's numbers (below 1024), or NULL (the
    /// default) for any. The caller's own thread is left alone. Linux and Android only. Read during
    /// the call, not kept.
    pub cpus: *const u32,
    /// How many `cpus` there are.
    pub cpu_count: usize,
    /// Niceness of the helper threads, from -20 (first) to 19 (last). 0 (the default) leaves it as
    /// it is inherited; below that needs a privilege. Linux and Android only.
    pub niceness: i32,
    /// Touch every page of the session's memory when it is created, so that no later call waits
    /// for the system to give one. Default: no.
    pub prefault: u8,
    /// Keep the session's memory from being swapped out. Default: no. When the system refuses,
    /// creating fails with `MOR_ERROR_LOCK`.
    pub lock: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

// SAFETY: `repr(C)`, numbers and a nullable pointer, the size first.
unsafe impl Params for mor_session_params {
    const NAME: &'static str = "mor_session_params";
    fn defaults() -> Self {
        mor_session_params {
            struct_size: 0,
            context: 0,
            batch: 64,
            threads: 0,
            kv_type: mor_kv_type::MOR_KV_F16 as u32,
            kv_pages: 0,
            cpus: std::ptr::null(),
            cpu_count: 0,
            niceness: 0,
            prefault: 0,
            lock: 0,
            reserved: [0; 2],
        }
    }
}

impl mor_session_params {
    unsafe fn to_rust(self) -> Result<SessionParams, Failure> {
        let kv = match self.kv_type {
            0 => KvType::F16,
            1 => KvType::Q8_0,
            2 => KvType::F32,
            other => {
                return Err(Failure::argument(format_args!(
                    "kv_type is {other}, which is no mor_kv_type"
                )));
            }
        };
        let mut cpus = CpuSet::default();
        if !self.cpus.is_null() {
            // SAFETY: the caller passes `cpu_count` numbers.
            for cpu in unsafe { slice(self.cpus, self.cpu_count, "cpus") }? {
                cpus.insert(*cpu as usize)?;
            }
        }
        let defaults = SessionParams::default();
        Ok(SessionParams {
            context: self.context,
            batch: self.batch,
            threads: match self.threads {
                0 => defaults.threads,
                threads => threads as usize,
            },
            kv,
            kv_pages: self.kv_pages,
            thread: ThreadParams {
                cpus,
                niceness: self.niceness,
            },
            prefault: self.prefault != 0,
            lock: self.lock != 0,
            ..defaults
        })
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_session_params)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_params_init(
    params: *mut mor_session_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// What a session's memory must be aligned to, in bytes.
pub const MOR_SESSION_ALIGNMENT: usize = 64;
const _: () = assert!(MOR_SESSION_ALIGNMENT == ARENA_ALIGNMENT);

/// What a session will take. Set `struct_size` to `sizeof(mor_session_plan_info)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_session_plan_info {
    /// Size of this struct as the caller knows it.
    pub struct_size: usize,
    /// Bytes of the session's one block of memory: all that it takes, at once, when it is created,
    /// but for the stacks of its helper threads.
    pub bytes: usize,
    /// What the block must be aligned to, in bytes: `MOR_SESSION_ALIGNMENT`.
    pub alignment: usize,
    /// Of `bytes`: the pages of the KV cache.
    pub kv_bytes: usize,
    /// Bytes of KV pages that a token of full depth takes.
    pub kv_bytes_per_token: usize,
    /// Bytes of address space of the helper threads' stacks. The system gives them page by page as
    /// they are used, some kilobytes each.
    pub stack_bytes: usize,
    /// Tokens of the sequence, with the default filled in.
    pub context: usize,
    /// Tokens of a pass.
    pub batch: usize,
    /// Pages of the KV pool.
    pub kv_pages: usize,
    /// Threads, the caller's included.
    pub threads: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_session_plan_info {
    const NAME: &'static str = "mor_session_plan_info";
    fn defaults() -> Self {
        mor_session_plan_info {
            struct_size: 0,
            bytes: 0,
            alignment: 0,
            kv_bytes: 0,
            kv_bytes_per_token: 0,
            stack_bytes: 0,
            context: 0,
            batch: 0,
            kv_pages: 0,
            threads: 0,
            reserved: 0,
        }
    }
}

/// Plans a session without taking any memory: what it will take, to the byte.
///
/// @param model      the model
/// @param params     for what, or NULL
/// @param out_plan   gets the plan; its `struct_size` must be set
/// @param out_error  gets the reason of a failure, or NULL
/// @return `MOR_ERROR_INVALID_ARGUMENT` for sizes that nobody can have, `MOR_ERROR_UNSUPPORTED` for
///         what this system cannot do
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_plan(
    model: *const mor_model,
    params: *const mor_session_params,
    out_plan: *mut mor_session_plan_info,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = || {
            // SAFETY: the caller's duty, see the manual.
            let (_, plan) = unsafe { plan(model, params) }?;
            let p = plan.params();
            let info = mor_session_plan_info {
                bytes: HEAD + plan.bytes(),
                alignment: ARENA_ALIGNMENT,
                kv_bytes: plan.kv_bytes(),
                kv_bytes_per_token: plan.kv_bytes_per_token(),
                stack_bytes: plan.stack_bytes(),
                context: p.context,
                batch: p.batch,
                kv_pages: p.kv_pages,
                threads: p.threads as u32,
                ..mor_session_plan_info::defaults()
            };
            // SAFETY: as above.
            unsafe { write_sized(out_plan, info) }
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

unsafe fn plan<'a>(
    model: *const mor_model,
    params: *const mor_session_params,
) -> Result<(&'a ModelObject, Plan), Failure> {
    // SAFETY: passed on.
    let object = unsafe { self::model(model) }?;
    // SAFETY: passed on.
    let params = unsafe { params::read(params)?.to_rust() }?;
    Ok((object, Plan::new(&object.model, &params)?))
}

/// Creates a session in memory of its own, as much as `mor_session_plan` says, and starts its helper
/// threads. The model may be freed before the session.
///
/// @param model        the model
/// @param params       for what, or NULL
/// @param out_session  gets the session; end it with `mor_session_free`
/// @param out_error    gets the reason of a failure, or NULL
/// @return `MOR_ERROR_OUT_OF_MEMORY`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_THREAD`,
///         `MOR_ERROR_LOCK`, `MOR_ERROR_UNSUPPORTED`; `*out_session` is then left as it was
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_create(
    model: *const mor_model,
    params: *const mor_session_params,
    out_session: *mut *mut mor_session,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = || {
            check_out(out_session, "out_session")?;
            // SAFETY: the caller's duty, see the manual.
            let (object, plan) = unsafe { plan(model, params) }?;
            let mut memory = anonymous(HEAD + plan.bytes())?;
            let start = memory.as_mut_ptr();
            let bytes = memory.len();
            // SAFETY: `memory` is moved into the object and unmapped after it.
            let session = unsafe { build(object, plan, start, bytes, Some(memory)) }?;
            // SAFETY: checked above.
            unsafe { put(out_session, session) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

/// As `mor_session_create`, in memory of the caller. The memory must not be used for anything else
/// until `mor_session_free`, which gives it back without freeing it; what it holds before does not
/// matter. With `params->threads` 1 nothing else is taken from anywhere, so such a session may also
/// simply be forgotten together with its memory when the program ends.
///
/// @param memory  aligned to the plan's `alignment`
/// @param bytes   how many bytes it has, at least the plan's `bytes`
/// @return besides those of `mor_session_create`: `MOR_ERROR_BUFFER_TOO_SMALL`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_create_in(
    model: *const mor_model,
    params: *const mor_session_params,
    memory: *mut c_void,
    bytes: usize,
    out_session: *mut *mut mor_session,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = || {
            check_out(out_session, "out_session")?;
            // SAFETY: the caller's duty, see the manual.
            let (object, plan) = unsafe { plan(model, params) }?;
            check_out(memory, "memory")?;
            let start = memory.cast::<u8>();
            if start.align_offset(ARENA_ALIGNMENT) != 0 {
                return Err(Failure::argument(format_args!(
                    "memory must begin at a multiple of {ARENA_ALIGNMENT}"
                )));
            }
            params::check_range(start, bytes, "memory")?;
            let needed = HEAD + plan.bytes();
            if bytes < needed {
                return Err(too_small(needed, bytes));
            }
            // SAFETY: the memory is the session's until it is freed, by the manual; of it only what
            // is needed is ever touched.
            let session = unsafe { build(object, plan, start, needed, None) }?;
            // SAFETY: checked above.
            unsafe { put(out_session, session) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

/// Puts a session into `bytes` bytes at `start`, which are aligned, enough, and its own until it is
/// freed.
unsafe fn build(
    object: &ModelObject,
    plan: Plan,
    start: *mut u8,
    bytes: usize,
    memory: Option<MmapMut>,
) -> Result<*mut mor_session, Failure> {
    // SAFETY: by this function's contract; the head, before it, is another part.
    let rest = unsafe { std::slice::from_raw_parts_mut(start.add(HEAD), bytes - HEAD) };
    let planned = plan.bytes();
    let content = Session::with_plan_in(&object.model, plan, rest)?;
    let pointer = start.cast::<SessionObject>();
    object.log.write(
        mor_log_level::MOR_LOG_INFO,
        format_args!(
            "created a session: {} tokens, {} threads, {} bytes",
            content.plan().params().context,
            content.plan().params().threads,
            HEAD + planned
        ),
    );
    // SAFETY: aligned memory of at least `HEAD` bytes that nobody else uses.
    unsafe {
        pointer.write(SessionObject {
            mark: Mark::Session as u64,
            turn: Turn::new(),
            cancel: AtomicBool::new(false),
            last_error: LastError::EMPTY,
            content,
            memory,
        });
        // Both are parts of the object, of which the content is dropped first.
        (*pointer).content.set_cancel_flag(&(*pointer).cancel);
    };
    Ok(pointer.cast())
}

/// Ends a session: stops its threads and gives its memory back. NULL is allowed.
///
/// @return `MOR_ERROR_BUSY` when a call on the session is in progress; it then goes on to live. Must
///         not be called at the same time as `mor_session_cancel`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_free(session: *mut mor_session) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        if session.is_null() {
            return mor_status::MOR_OK;
        }
        let pointer = session.cast::<SessionObject>();
        // SAFETY: the caller's duty, see the manual.
        let free = || unsafe {
            let object = super::handle::object(pointer)?;
            // Never given back: nobody gets another turn.
            std::mem::forget(object.turn.take()?);
            pointer.cast::<u64>().write_volatile(Mark::Freed as u64);
            addr_of_mut!((*pointer).content).drop_in_place();
            // The map holds the object itself, so it leaves before it is unmapped.
            drop(addr_of_mut!((*pointer).memory).read());
            Ok::<(), Failure>(())
        };
        // SAFETY: no error struct.
        unsafe { report(free(), std::ptr::null_mut()) }
    })
}

/// One sentence about the last call on this session that failed, or an empty text when the last call
/// succeeded. It lives in the session and stands until the next call on it, so only the thread whose
/// turn it is may ask for it. (A call that was refused with `MOR_ERROR_BUSY`, or that got no live
/// session, leaves no text.) Never NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_last_error(session: *const mor_session) -> *const c_char {
    boundary!(c"".as_ptr(), {
        // SAFETY: the caller's duty, see the manual.
        match unsafe { super::handle::object(session.cast::<SessionObject>()) } {
            Ok(object) => object.last_error.as_ptr(),
            Err(_) => c"the session is NULL or was freed".as_ptr(),
        }
    })
}

/// Runs tokens after those so far. On a failure the session is as it was before the call, its logits
/// too. May take long; `mor_session_cancel` ends it.
///
/// @param session  the session
/// @param tokens   token ids, each below the vocabulary's size
/// @param count    how many, at least 1
/// @return `MOR_ERROR_CONTEXT_FULL`, `MOR_ERROR_KV_FULL`, `MOR_ERROR_CANCELLED`,
///         `MOR_ERROR_NOT_FINITE`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_INVALID_ARGUMENT`,
///         `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_prefill(
    session: *mut mor_session,
    tokens: *const u32,
    count: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            let (length, context) = (session.tokens().len(), session.plan().params().context);
            if count > context - length {
                let needed = length.saturating_add(count);
                return Err(Error::ContextFull { needed, context }.into());
            }
            // SAFETY: the caller's duty, see the manual.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            Ok(session.prefill(tokens)?)
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Runs one token after those so far and computes the logits of what follows it.
///
/// @param session     the session
/// @param token       the token
/// @param out_logits  gets a pointer to one number for each token of the vocabulary, or NULL when
///                    only the token is to be run. The numbers lie in the session and stand until
///                    the next call on it
/// @return as `mor_session_prefill`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_step(
    session: *mut mor_session,
    token: u32,
    out_logits: *mut *const f32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            if out_logits.is_null() {
                return Ok(session.prefill(&[token])?);
            }
            let logits = session.step(token)?;
            // SAFETY: checked above.
            unsafe { put(out_logits, logits.as_ptr()) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// The logits of what follows the last token.
///
/// @param session     the session
/// @param out_logits  gets a pointer to the numbers, which lie in the session and stand until the
///                    next call on it
/// @param out_count   gets how many there are, the vocabulary's size; may be NULL
/// @return `MOR_ERROR_NOT_READY` before the first token and after a rewind
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_logits(
    session: *mut mor_session,
    out_logits: *mut *const f32,
    out_count: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_out(out_logits, "out_logits")?;
            let logits = session.logits()?;
            // SAFETY: checked here.
            unsafe {
                put(out_logits, logits.as_ptr());
                if !out_count.is_null() {
                    put(out_count, logits.len());
                }
            }
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// How tokens are drawn. Set it up with `mor_sampler_params_init`. The filters work in this order:
/// penalty, top-k, top-p, min-p, temperature.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_sampler_params {
    /// Size of this struct as the caller knows it; `mor_sampler_params_init` sets it.
    pub struct_size: usize,
    /// Logits are divided by this before the draw; 0 takes the likeliest token. Default: 0.8.
    pub temperature: f32,
    /// Only the likeliest tokens whose probabilities add up to this stay; 1 does nothing. Default:
    /// 0.95.
    pub top_p: f32,
    /// Only tokens at least this times as likely as the likeliest stay; 0 does nothing. Default:
    /// 0.05.
    pub min_p: f32,
    /// Logits of recent tokens are divided by this where positive and multiplied where negative; 1
    /// (the default) does nothing.
    pub repeat_penalty: f32,
    /// Only this many of the likeliest tokens stay; 0 does nothing. Default: 40.
    pub top_k: u32,
    /// How many tokens back the penalty looks. Default: 64.
    pub repeat_last_n: u32,
    /// Start of the random sequence: the same seed draws the same tokens. Default: 0.
    pub seed: u64,
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_sampler_params {
    const NAME: &'static str = "mor_sampler_params";
    fn defaults() -> Self {
        let defaults = SamplerParams::default();
        mor_sampler_params {
            struct_size: 0,
            temperature: defaults.temperature,
            top_p: defaults.top_p,
            min_p: defaults.min_p,
            repeat_penalty: defaults.repeat_penalty,
            top_k: defaults.top_k as u32,
            repeat_last_n: defaults.repeat_last_n as u32,
            seed: defaults.seed,
        }
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_sampler_params)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_sampler_params_init(
    params: *mut mor_sampler_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// Sets how `mor_session_sample` and `mor_session_generate` draw tokens from now on; the random
/// sequence begins at its seed. A new session draws with the defaults.
///
/// @param session  the session
/// @param params   how, or NULL for the defaults
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_set_sampler(
    session: *mut mor_session,
    params: *const mor_sampler_params,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            // SAFETY: the caller's duty, see the manual.
            let p = unsafe { params::read(params) }?;
            Ok(session.set_sampler(SamplerParams {
                repeat_penalty: p.repeat_penalty,
                repeat_last_n: p.repeat_last_n as usize,
                top_k: p.top_k as usize,
                top_p: p.top_p,
                min_p: p.min_p,
                temperature: p.temperature,
                seed: p.seed,
            })?)
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Draws a token from the logits after the last one. It is not run: pass it to `mor_session_step` or
/// `mor_session_prefill`.
///
/// @param session    the session
/// @param out_token  gets the token
/// @return `MOR_ERROR_NOT_READY` before the first token and after a rewind
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_sample(
    session: *mut mor_session,
    out_token: *mut u32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_out(out_token, "out_token")?;
            let token = session.sample()?;
            // SAFETY: checked above.
            unsafe { put(out_token, token) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// One token of a generation, as it comes. All of it lives for the callback only.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_piece {
    /// The token, which has been run and is part of the session.
    pub token: u32,
    /// Recursions that it ran.
    pub depth: u32,
    /// The text that is certain with this token: UTF-8, whole characters, nothing that may still
    /// turn out to be a stop string, with a zero byte behind it. Often empty; the last call of a
    /// generation may repeat the last token with the rest of the text.
    pub text: *const c_char,
    /// Bytes of `text` without the zero byte.
    pub text_bytes: usize,
}

/// Takes the tokens of a generation; answers whether it is to go on. It may look at other objects
/// but gets `MOR_ERROR_BUSY` from this session, but for `mor_session_cancel`. It must not unwind
/// (no C++ exception, no longjmp).
pub type mor_piece_fn =
    Option<unsafe extern "C" fn(user_data: *mut c_void, piece: *const mor_piece) -> bool>;

/// What to generate. Set it up with `mor_generate_params_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_generate_params {
    /// Size of this struct as the caller knows it; `mor_generate_params_init` sets it.
    pub struct_size: usize,
    /// Most tokens to write. Default: as many as the context holds. With 0 nothing is run and the
    /// generation ends with `MOR_FINISH_LENGTH`.
    pub max_tokens: usize,
    /// Texts that end the generation and are not part of it, each UTF-8 that ends with a zero byte;
    /// or NULL (the default). One of more than 1024 bytes is refused, an empty one ends nothing.
    /// Read during the call, not kept.
    pub stop: *const *const c_char,
    /// How many there are.
    pub stop_count: usize,
    /// Takes the tokens; NULL (the default): nobody, and they are found in the session afterwards.
    pub callback: mor_piece_fn,
    /// Passed to `callback`.
    pub user_data: *mut c_void,
}

// SAFETY: `repr(C)`, numbers and nullable pointers, the size first.
unsafe impl Params for mor_generate_params {
    const NAME: &'static str = "mor_generate_params";
    fn defaults() -> Self {
        mor_generate_params {
            struct_size: 0,
            max_tokens: usize::MAX,
            stop: std::ptr::null(),
            stop_count: 0,
            callback: None,
            user_data: std::ptr::null_mut(),
        }
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_generate_params)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_generate_params_init(
    params: *mut mor_generate_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// Why a generation ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_finish {
    /// The model drew a token that ends a text; it is neither run nor shown.
    MOR_FINISH_END = 0,
    /// A stop string came up.
    MOR_FINISH_STOP = 1,
    /// `max_tokens` were written.
    MOR_FINISH_LENGTH = 2,
    /// The session's context is full.
    MOR_FINISH_CONTEXT_FULL = 3,
    /// The callback asked for it.
    MOR_FINISH_CALLBACK = 4,
    /// It was cancelled; the session stands after the last token that was shown.
    MOR_FINISH_CANCELLED = 5,
}

impl From<Finish> for mor_finish {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::End => mor_finish::MOR_FINISH_END,
            Finish::Stop => mor_finish::MOR_FINISH_STOP,
            Finish::Length => mor_finish::MOR_FINISH_LENGTH,
            Finish::ContextFull => mor_finish::MOR_FINISH_CONTEXT_FULL,
            Finish::Callback => mor_finish::MOR_FINISH_CALLBACK,
            Finish::Cancelled => mor_finish::MOR_FINISH_CANCELLED,
        }
    }
}

/// Continues the text so far, token by token: draws with the session's sampler, runs, decodes with
/// the model's tokenizer and calls back. Needs a prompt (`mor_session_prefill`) first.
///
/// @param session     the session
/// @param params      what, or NULL
/// @param out_finish  gets why it ended; may be NULL
/// @return `MOR_ERROR_NOT_READY` without a prompt, `MOR_ERROR_TOKENIZER` when the model has none,
///         `MOR_ERROR_KV_FULL`, `MOR_ERROR_NOT_FINITE`, `MOR_ERROR_FILE_CHANGED`,
///         `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_BUSY`. The tokens before a failure stay
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_generate(
    session: *mut mor_session,
    params: *const mor_generate_params,
    out_finish: *mut mor_finish,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            // SAFETY: the caller's duty, see the manual.
            let p = unsafe { params::read(params) }?;
            let count = if p.stop.is_null() { 0 } else { p.stop_count };
            // SAFETY: as above.
            let stops = unsafe { slice(p.stop, count, "stop") }?;
            for stop in stops {
                // SAFETY: as above.
                unsafe { params::text(*stop, params::MOR_ZERO_TERMINATED, "a stop string") }?;
            }
            let stops = stops.iter().map(|stop| {
                // SAFETY: as above; checked in the loop before.
                let text = unsafe { params::text(*stop, params::MOR_ZERO_TERMINATED, "") };
                text.unwrap_or_default()
            });
            let each = |piece: Piece| {
                let Some(callback) = p.callback else {
                    return ControlFlow::Continue(());
                };
                let piece = mor_piece {
                    token: piece.token,
                    depth: piece.depth.into(),
                    text: piece.text.as_ptr().cast(),
                    text_bytes: piece.text.len(),
                };
                // SAFETY: the host's function, called as `mor_piece_fn` says.
                match unsafe { callback(p.user_data, &piece) } {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            };
            let finish = session.generate_with(p.max_tokens, stops, each)?;
            if !out_finish.is_null() {
                // SAFETY: not NULL, and the caller's duty.
                unsafe { put(out_finish, finish.into()) };
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

const _: () = assert!(MAX_STOP_BYTES == 1024, "the manual says so");

/// How many tokens the sequence has so far.
///
/// @param session     the session
/// @param out_length  gets the number
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_length(
    session: *mut mor_session,
    out_length: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_out(out_length, "out_length")?;
            // SAFETY: checked above.
            unsafe { put(out_length, session.tokens().len()) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Copies tokens of the sequence so far.
///
/// @param session     the session
/// @param first       position of the first one wanted
/// @param count       how many; `first + count` is at most the length
/// @param out_tokens  gets `count` tokens
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_tokens(
    session: *mut mor_session,
    first: usize,
    count: usize,
    out_tokens: *mut u32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            let tokens = part(session.tokens(), first, count)?;
            // SAFETY: the caller's duty, see the manual.
            unsafe { slice_mut(out_tokens, count, "out_tokens") }?.copy_from_slice(tokens);
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Copies the recursions that tokens of the sequence so far ran; 0 where the router let one pass by.
///
/// @param session     the session
/// @param first       position of the first one wanted
/// @param count       how many; `first + count` is at most the length
/// @param out_depths  gets `count` numbers
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_depths(
    session: *mut mor_session,
    first: usize,
    count: usize,
    out_depths: *mut u8,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            let depths = part(session.depths(), first, count)?;
            // SAFETY: the caller's duty, see the manual.
            unsafe { slice_mut(out_depths, count, "out_depths") }?.copy_from_slice(depths);
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

fn part<T>(all: &[T], first: usize, count: usize) -> Result<&[T], Failure> {
    let end = first.checked_add(count);
    let range = end.and_then(|end| all.get(first..end));
    range.ok_or_else(|| {
        Failure::argument(format_args!(
            "{count} tokens from {first} on were asked for; there are {}",
            all.len()
        ))
    })
}

/// The most recursions of any model.
pub const MOR_MAX_RECURSIONS: usize = 64;
const _: () = assert!(MOR_MAX_RECURSIONS == crate::model::MAX_RECURSIONS);

/// How many of the tokens so far ran each number of recursions.
///
/// @param session     the session
/// @param out_counts  gets a count for each depth from 0 to the model's `recursions`
/// @param capacity    how many counts it holds: at least `recursions + 1`, for which
///                    `MOR_MAX_RECURSIONS + 1` is always enough
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_depth_histogram(
    session: *mut mor_session,
    out_counts: *mut u64,
    capacity: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            let needed = session.model().hyperparameters().recursions + 1;
            if capacity < needed {
                return Err(too_small(needed, capacity));
            }
            // SAFETY: the caller's duty, see the manual.
            let counts = unsafe { slice_mut(out_counts, needed, "out_counts") }?;
            for (to, count) in counts.iter_mut().zip(session.depth_histogram()) {
                *to = count as u64;
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Bytes of KV pages in use: they follow the recursions that tokens ran, not the context.
///
/// @param session    the session
/// @param out_bytes  gets the number
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_kv_bytes_used(
    session: *mut mor_session,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_out(out_bytes, "out_bytes")?;
            // SAFETY: checked above.
            unsafe { put(out_bytes, session.kv_bytes_used()) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Sets the routers' cut from the next token on: a token goes on while the sigmoid of its score is
/// at least this. Higher is faster and coarser; 0 sends every token through all recursions, 1 none.
/// Models without expert-choice routers take no notice.
///
/// @param session  the session
/// @param cut      from 0 to 1; a session begins with the cut that the model was trained for
/// @return `MOR_ERROR_INVALID_ARGUMENT` for another number, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_set_cut(session: *mut mor_session, cut: f32) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, |session| Ok(session.set_cut(cut)?)) }
    })
}

/// Limits the recursions of tokens from the next one on.
///
/// @param session  the session
/// @param limit    from 1 to the model's `recursions`, with which a session begins
/// @return `MOR_ERROR_INVALID_ARGUMENT` for another limit, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_set_depth_limit(
    session: *mut mor_session,
    limit: u32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| Ok(session.set_depth_limit(limit as usize)?);
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Sets the time that a token should take, from the call of `mor_session_step` to its logits: an aim,
/// not a bound, for no library can keep the system from giving the core to somebody else. The deepest
/// recursions of a token are left out when by the speed measured so far they would not be done in
/// time. The first recursion is never left out, so a budget below what it takes is missed;
/// and the first tokens of a session, before its speed is known, may go less deep than they could.
/// Prompts of more than one token are not limited. With a budget, results depend on the clock.
///
/// @param session      the session
/// @param nanoseconds  the budget; 0, with which a session begins, sets none
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_set_time_budget(
    session: *mut mor_session,
    nanoseconds: u64,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let budget = (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds));
        let work = |session: &mut Session| {
            session.set_time_budget(budget);
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Who decides which tokens go on to the next recursion of an expert-choice model.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_routing {
    /// Each token's own score, against the cut: causal, for generating.
    MOR_ROUTING_THRESHOLD = 0,
    /// The best of the whole text, as the paper trains and scores: for comparing with published
    /// numbers. The text must come as one `mor_session_prefill` into an empty session whose `batch`
    /// holds it.
    MOR_ROUTING_CAPACITY = 1,
}

/// Sets who decides, from the next call on.
///
/// @param session  the session
/// @param routing  a `mor_routing`; a session begins with `MOR_ROUTING_THRESHOLD`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_set_routing(
    session: *mut mor_session,
    routing: u32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            session.set_routing(match routing {
                0 => Routing::Threshold,
                1 => Routing::Capacity,
                other => {
                    return Err(Failure::argument(format_args!(
                        "routing is {other}, which is no mor_routing"
                    )));
                }
            });
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Forgets all tokens from a position on; their KV pages are free again. The logits are gone: run a
/// token to get new ones.
///
/// @param session  the session
/// @param length   how many tokens stay, at most as many as there are
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there are fewer, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_rewind(
    session: *mut mor_session,
    length: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, |session| Ok(session.rewind(length)?)) }
    })
}

/// Bytes that `mor_session_save` writes now.
///
/// @param session    the session
/// @param out_bytes  gets the number
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_save_size(
    session: *mut mor_session,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_out(out_bytes, "out_bytes")?;
            // SAFETY: checked above.
            unsafe { put(out_bytes, session.save_bytes()) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(session, work) }
    })
}

/// Writes the sequence so far to memory of the caller: tokens, depths, keys and values, and where
/// the sampler's random sequence stands. Settings are not part of it.
///
/// @param session    the session
/// @param buffer     gets the state
/// @param capacity   bytes in `buffer`
/// @param out_bytes  gets the state's size, also when the buffer is too small; may be NULL
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_save(
    session: *mut mor_session,
    buffer: *mut c_void,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            // SAFETY: the caller's duty, see the manual.
            let buffer = unsafe { slice_mut(buffer.cast::<u8>(), capacity, "buffer") }?;
            if !out_bytes.is_null() {
                // SAFETY: as above.
                unsafe { put(out_bytes, session.save_bytes()) };
            }
            session.save(buffer)?;
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Replaces the sequence so far by a saved one, of this or another session of the same model file
/// and KV type, on this or another machine. The next logits are the same bits that the saved session
/// would have computed here. A state is not trusted: what is damaged or does not fit is refused, and
/// the session is as before.
///
/// @param session  the session
/// @param state    the state
/// @param bytes    its size
/// @return `MOR_ERROR_STATE`, `MOR_ERROR_CONTEXT_FULL`, `MOR_ERROR_KV_FULL`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_restore(
    session: *mut mor_session,
    state: *const c_void,
    bytes: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            // SAFETY: the caller's duty, see the manual.
            let state = unsafe { slice(state.cast::<u8>(), bytes, "state") }?;
            Ok(session.restore(state)?)
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Ends the session's call in progress within the time of one layer, or its next call at once. Any
/// thread, any time, also from a signal handler or a callback; never blocks. One cancel ends one
/// `mor_session_prefill` or `mor_session_step`, with `MOR_ERROR_CANCELLED`, or one
/// `mor_session_generate`, with `MOR_OK` and `MOR_FINISH_CANCELLED` (with no call of its callback,
/// where the cancel came before the first token). Only a NULL or freed session is a failure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_cancel(session: *mut mor_session) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { set_cancel(session, true) }
    })
}

/// Takes back a cancel that no call has met yet: call it before a new request, so that a cancel that
/// came too late for the last one does not end it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_reset_cancel(session: *mut mor_session) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { set_cancel(session, false) }
    })
}

unsafe fn set_cancel(session: *mut mor_session, value: bool) -> mor_status {
    let pointer = session.cast::<SessionObject>();
    // SAFETY: passed on.
    if let Err(failure) = unsafe { super::handle::check(pointer) } {
        return failure.status();
    }
    // SAFETY: a field of a live object, which is atomic; another call may use the others.
    let flag = unsafe { &(*pointer).cancel };
    flag.store(value, Ordering::Relaxed);
    mor_status::MOR_OK
}
