//! `mor_session`: planned, created, freed, cancelled. What it does is in `generation.rs` and
//! `sequence.rs`.

use super::handle::{self, Kind, Mark, Owned, call, check, last_error};
use super::model::{ModelObject, model, mor_log_level, mor_model};
use super::params::{self, Params, check_out, initialise, put, slice, too_small, write_sized};
use super::status::{Failure, mor_error, mor_status, report};
use crate::cpu::thread::CpuSet;
use crate::model::anonymous;
use crate::plan::ARENA_ALIGNMENT;
use crate::{KvType, Plan, Session, SessionParams, ThreadParams};
use memmap2::MmapMut;
use std::ffi::{c_char, c_void};
use std::ptr::addr_of_mut;
use std::sync::atomic::{AtomicBool, Ordering};

/// One sequence of tokens in the making, its memory, its helper threads and its sampler.
///
/// One call at a time may use a session; a second one, from another thread or from a callback of the
/// first, gets `MOR_ERROR_BUSY` and does nothing. Only `mor_session_cancel` and
/// `mor_session_reset_cancel` may come at any time. No call but those that create and free a session
/// allocates or frees memory, on any thread.
pub struct mor_session {
    _private: [u8; 0],
}

/// What stands at the beginning of a session's memory. Calls see the `Owned` only.
#[repr(C)]
struct SessionObject {
    owned: Owned<Session>,
    cancel: AtomicBool,
    /// The memory that all this stands in, unless it is the caller's.
    memory: Option<MmapMut>,
}

impl Kind for Session {
    const MARK: Mark = Mark::Session;
    const NAME: &'static str = "session";
}

/// Bytes before the plan's memory.
const HEAD: usize = size_of::<SessionObject>().next_multiple_of(ARENA_ALIGNMENT);

/// A call on the session behind a caller's pointer.
pub(super) unsafe fn with(
    session: *mut mor_session,
    work: impl FnOnce(&mut Session) -> Result<(), Failure>,
) -> mor_status {
    // SAFETY: passed on.
    unsafe { call(session.cast::<Owned<Session>>(), work) }
}

/// A call that writes one number about the session.
pub(super) unsafe fn tell(
    session: *mut mor_session,
    out: *mut usize,
    name: &str,
    number: impl FnOnce(&mut Session) -> usize,
) -> mor_status {
    let number = |session: &mut Session| Ok(number(session));
    // SAFETY: passed on.
    unsafe { handle::tell(session.cast::<Owned<Session>>(), out, name, number) }
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
    /// is faster and takes more memory. 0 (the default): 64, on a GPU 512. More than `context`
    /// counts as `context`. Results do not depend on it.
    pub batch: usize,
    /// Threads that share the work, the caller's included: `threads - 1` are started when the
    /// session is created. At most 256. Results do not depend on it. 0 (the default): one for each
    /// core that this process may use. On a GPU always 1.
    pub threads: u32,
    /// A `mor_kv_type`. Default: `MOR_KV_F16`.
    pub kv_type: u32,
    /// Pages of the KV pool, of 16 entries each. 0 (the default): enough for every token to take
    /// every recursion. A smaller pool takes less memory and bets on tokens that leave early; when
    /// it is lost, calls fail with `MOR_ERROR_KV_FULL`. More than enough counts as enough; the
    /// least that holds one token of full depth is one page for each layer that it passes
    /// (`mor_model_info.logical_layers`), fewer where recursions share their keys and values.
    pub kv_pages: usize,
    /// Rows of logits that `mor_session_log_probabilities` computes together: the output matrix is read once for so many
    /// of them, and each takes 4 bytes for every token of the vocabulary. 0 (the default): 1; 16 or more are faster
    /// where texts are scored. Results do not depend on it.
    pub logit_rows: usize,
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
            batch: 0,
            threads: 0,
            kv_type: mor_kv_type::MOR_KV_F16 as u32,
            kv_pages: 0,
            logit_rows: 0,
            cpus: std::ptr::null(),
            cpu_count: 0,
            niceness: 0,
            prefault: 0,
            lock: 0,
            reserved: [0; 2],
        }
    }
    fn reserved(&self) -> &[u8] {
        &self.reserved
    }
}

impl mor_session_params {
    pub(super) unsafe fn to_rust(self) -> Result<SessionParams, Failure> {
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
        Ok(SessionParams {
            context: self.context,
            batch: self.batch,
            threads: self.threads as usize,
            kv,
            kv_pages: self.kv_pages,
            logit_rows: self.logit_rows,
            thread: ThreadParams {
                cpus,
                niceness: self.niceness,
            },
            prefault: self.prefault != 0,
            lock: self.lock != 0,
            ..Default::default()
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
    /// but for the stacks of its helper threads and what it takes on a GPU.
    pub bytes: usize,
    /// What the block must be aligned to, in bytes: `MOR_SESSION_ALIGNMENT`.
    pub alignment: usize,
    /// The pages of the KV cache: of `bytes`, or of `device_bytes` when the model is on a GPU.
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
    /// Bytes of the GPU's memory, besides the weights; 0 on the CPU.
    pub device_bytes: usize,
    /// Bytes of the host's memory that are pinned for copies to and from the GPU; 0 on the CPU.
    pub pinned_bytes: usize,
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
            device_bytes: 0,
            pinned_bytes: 0,
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
    boundary!(error: out_error, {
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
                device_bytes: plan.device_bytes(),
                pinned_bytes: plan.pinned_bytes(),
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
///         `MOR_ERROR_LOCK`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_UNSUPPORTED`; `*out_session` is then
///         left as it was
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_create(
    model: *const mor_model,
    params: *const mor_session_params,
    out_session: *mut *mut mor_session,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
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
/// matter. With `params->threads` 1, on the CPU, nothing else is taken from anywhere, so such a session
/// may also simply be forgotten together with its memory when the program ends. (On a GPU
/// `device_bytes`, `pinned_bytes` and some of the heap come besides, until it is freed.)
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
    boundary!(error: out_error, {
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
            owned: Owned::new(content),
            cancel: AtomicBool::new(false),
            memory,
        });
        // Both are parts of the object, of which the content is dropped first.
        (*pointer).owned.content.set_cancel_flag(&(*pointer).cancel);
    };
    Ok(pointer.cast())
}

/// Ends a session: stops its threads and gives its memory back. NULL is allowed.
///
/// @return `MOR_ERROR_BUSY` when a call on the session is in progress; it then stays valid. Must
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
            handle::last_turn(session.cast::<Owned<Session>>())?;
            pointer.cast::<u64>().write_volatile(Mark::Freed as u64);
            addr_of_mut!((*pointer).owned.content).drop_in_place();
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
        unsafe {
            let pointer = session.cast_mut().cast::<Owned<Session>>();
            last_error(pointer, c"the session is NULL or was freed")
        }
    })
}

/// Ends the session's call that runs tokens within the time of one layer (on a GPU of one pass); where
/// none is in progress, the next one at once. Any thread, any time, also from a signal handler or a
/// callback; never blocks. One cancel ends one `mor_session_prefill`, `mor_session_prefill_whole`,
/// `mor_session_log_probabilities` or `mor_session_step`, with `MOR_ERROR_CANCELLED`, or one `mor_session_generate`, with
/// `MOR_OK` and `MOR_FINISH_CANCELLED` (with no call of its callback, where the cancel came before the first token).
/// Other calls, and those that have nothing to run, leave it pending. Only a NULL or freed session is a
/// failure.
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
    if let Err(failure) = unsafe { check(session.cast::<Owned<Session>>()) } {
        return failure.status();
    }
    // SAFETY: a field of a live object, which is atomic; another call may use the others.
    let flag = unsafe { &(*pointer).cancel };
    flag.store(value, Ordering::Relaxed);
    mor_status::MOR_OK
}
