//! `mor_batch`: planned, created, freed. What it does is in `requests.rs`.

use super::handle::{Kind, Mark, Owned, call, last_error, tell};
use super::model::{ModelObject, model, mor_log_level, mor_model};
use super::params::{self, Params, check_out, initialise, put, write_sized};
use super::requests::mor_batch_event;
use super::session::{mor_kv_type, mor_session_params};
use super::status::{Failure, mor_error, mor_status, report};
use crate::batch::{MAX_EVENTS, Pressure};
use crate::memory::reserved;
use crate::{Batch, Model, Plan, SessionParams};
use std::ffi::c_char;

/// Many sequences at once, batched by depth: each `mor_batch_tick` runs the shared block once over
/// all tokens that need it, whatever their sequence and recursion. What a sequence gets does not
/// depend on who else is there: the same bits as in a session of its own.
///
/// One call at a time may use a batch; a second one gets `MOR_ERROR_BUSY` and does nothing. It may
/// move between threads. No call but those that create and free a batch allocates or frees memory, on
/// any thread.
pub struct mor_batch {
    _private: [u8; 0],
}

/// What stands behind a `mor_batch`.
pub(super) struct Content {
    pub batch: Batch,
    /// What the last tick brought, as C reads it. Never more than there is room for.
    pub events: Vec<mor_batch_event>,
}

impl Kind for Content {
    const MARK: Mark = Mark::Batch;
    const NAME: &'static str = "batch";
}

/// A call on the batch behind a caller's pointer.
pub(super) unsafe fn with(
    batch: *mut mor_batch,
    work: impl FnOnce(&mut Content) -> Result<(), Failure>,
) -> mor_status {
    // SAFETY: passed on.
    unsafe { call(batch.cast::<Owned<Content>>(), work) }
}

/// A call that writes one value about the batch.
pub(super) unsafe fn ask<V>(
    batch: *mut mor_batch,
    out: *mut V,
    name: &str,
    value: impl FnOnce(&mut Batch) -> Result<V, Failure>,
) -> mor_status {
    let value = |content: &mut Content| value(&mut content.batch);
    // SAFETY: passed on.
    unsafe { tell(batch.cast::<Owned<Content>>(), out, name, value) }
}

/// Who has the pages of the KV pool when there are not enough.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_pressure {
    /// The sequence of lowest priority gives its pages back and goes on when there is room again: it
    /// is run anew from its tokens, to the same results.
    MOR_PRESSURE_EVICT = 0,
    /// The sequence of lowest priority of those that need a page stands still, with what it has,
    /// until `mor_batch_resume`.
    MOR_PRESSURE_REFUSE = 1,
}

/// What a batch is planned for. Set it up with `mor_batch_params_init`; NULL in its place means the
/// defaults. Numbers of type `uint8_t` are truths: 0 is no, anything else yes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_batch_params {
    /// Size of this struct as the caller knows it; `mor_batch_params_init` sets it.
    pub struct_size: usize,
    /// Most tokens of a sequence. 0 (the default): as many as the model was trained for.
    pub context: usize,
    /// Sequences at a time, those among them that are done and not yet removed. At least 1, which is
    /// the default.
    pub sequences: usize,
    /// Most tokens of one tick's pass over the weights. Larger is faster when there are many
    /// sequences or long prompts, and takes more memory. 0 (the default): 64, on a GPU 512. More than
    /// all sequences can hold counts as that. Results do not depend on it.
    pub rows: usize,
    /// Rows of logits that are computed together when tokens are drawn for many sequences: the output
    /// matrix is read once for so many of them, and each takes 4 bytes for every token of the
    /// vocabulary. 0 (the default): one for each sequence, up to 32; on a GPU at least that
    /// many. Results do not depend on it.
    pub logit_rows: usize,
    /// Pages of the KV pool that the sequences share, of 16 entries each. 0 (the default): enough for
    /// every token of every sequence to take every recursion; `mor_batch_pages_for` says how many do
    /// for less. More than enough counts as enough.
    pub kv_pages: usize,
    /// Threads that share the work, the caller's included: `threads - 1` are started when the batch
    /// is created. At most 256. Results do not depend on it. 0 (the default): one for each core that
    /// this process may use. On a GPU always 1.
    pub threads: u32,
    /// A `mor_kv_type`. Default: `MOR_KV_F16`.
    pub kv_type: u32,
    /// A `mor_pressure`: what happens when the KV pool is full. Default: `MOR_PRESSURE_EVICT`.
    pub pressure: u32,
    /// As in `mor_session_params`.
    pub niceness: i32,
    /// As in `mor_session_params`. Read during the call, not kept.
    pub cpus: *const u32,
    /// How many `cpus` there are.
    pub cpu_count: usize,
    /// Touch every page of the batch's memory when it is created, so that no later call waits for
    /// the system to give one. Default: no.
    pub prefault: u8,
    /// Keep the batch's memory from being swapped out, but for its `heap_bytes`. Default: no. When
    /// the system refuses, creating fails with `MOR_ERROR_LOCK`.
    pub lock: u8,
    /// Zero.
    pub reserved: [u8; 6],
}

// SAFETY: `repr(C)`, numbers and a nullable pointer, the size first.
unsafe impl Params for mor_batch_params {
    const NAME: &'static str = "mor_batch_params";
    fn defaults() -> Self {
        let defaults = SessionParams::default();
        mor_batch_params {
            struct_size: 0,
            context: defaults.context,
            sequences: defaults.sequences,
            rows: defaults.batch,
            logit_rows: defaults.logit_rows,
            kv_pages: defaults.kv_pages,
            threads: 0,
            kv_type: mor_kv_type::MOR_KV_F16 as u32,
            pressure: mor_pressure::MOR_PRESSURE_EVICT as u32,
            niceness: 0,
            cpus: std::ptr::null(),
            cpu_count: 0,
            prefault: 0,
            lock: 0,
            reserved: [0; 6],
        }
    }
    fn reserved(&self) -> &[u8] {
        &self.reserved
    }
}

impl mor_batch_params {
    unsafe fn to_rust(self) -> Result<(SessionParams, Pressure), Failure> {
        let pressure = match self.pressure {
            0 => Pressure::Evict,
            1 => Pressure::Refuse,
            other => {
                return Err(Failure::argument(format_args!(
                    "pressure is {other}, which is no mor_pressure"
                )));
            }
        };
        let shared = mor_session_params {
            context: self.context,
            batch: self.rows,
            threads: self.threads,
            kv_type: self.kv_type,
            kv_pages: self.kv_pages,
            cpus: self.cpus,
            cpu_count: self.cpu_count,
            niceness: self.niceness,
            prefault: self.prefault,
            lock: self.lock,
            ..mor_session_params::defaults()
        };
        let params = SessionParams {
            sequences: self.sequences,
            logit_rows: self.logit_rows,
            // SAFETY: passed on.
            ..unsafe { shared.to_rust() }?
        };
        Ok((params, pressure))
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_batch_params)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_params_init(
    params: *mut mor_batch_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// What a batch will take. Set `struct_size` to `sizeof(mor_batch_plan_info)` before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_batch_plan_info {
    /// Size of this struct as the caller knows it.
    pub struct_size: usize,
    /// Bytes of the batch's one block of memory, which it takes when it is created. Besides there are
    /// `heap_bytes` and the stacks of its helper threads.
    pub bytes: usize,
    /// Bytes that it takes from the heap when it is created, for its list of sequences.
    pub heap_bytes: usize,
    /// The pages of the KV pool: of `bytes`, or of `device_bytes` when the model is on a GPU.
    pub kv_bytes: usize,
    /// Bytes of KV pages that a token of full depth takes.
    pub kv_bytes_per_token: usize,
    /// Bytes of address space of the helper threads' stacks. The system gives them page by page as
    /// they are used, some kilobytes each.
    pub stack_bytes: usize,
    /// Tokens of a sequence, with the default filled in.
    pub context: usize,
    /// Sequences at a time.
    pub sequences: usize,
    /// Tokens of a tick's pass.
    pub rows: usize,
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
unsafe impl Params for mor_batch_plan_info {
    const NAME: &'static str = "mor_batch_plan_info";
    fn defaults() -> Self {
        mor_batch_plan_info {
            struct_size: 0,
            bytes: 0,
            heap_bytes: 0,
            kv_bytes: 0,
            kv_bytes_per_token: 0,
            stack_bytes: 0,
            context: 0,
            sequences: 0,
            rows: 0,
            kv_pages: 0,
            threads: 0,
            reserved: 0,
            device_bytes: 0,
            pinned_bytes: 0,
        }
    }
}

/// Events of one tick, at most.
fn most_events(sequences: usize) -> usize {
    sequences * MAX_EVENTS
}

fn describe(plan: &Plan) -> mor_batch_plan_info {
    let p = plan.params();
    mor_batch_plan_info {
        bytes: plan.bytes(),
        heap_bytes: plan.heap_bytes()
            + most_events(p.sequences) * size_of::<mor_batch_event>()
            + size_of::<Owned<Content>>(),
        kv_bytes: plan.kv_bytes(),
        kv_bytes_per_token: plan.kv_bytes_per_token(),
        stack_bytes: plan.stack_bytes(),
        context: p.context,
        sequences: p.sequences,
        rows: p.batch,
        kv_pages: p.kv_pages,
        threads: p.threads as u32,
        device_bytes: plan.device_bytes(),
        pinned_bytes: plan.pinned_bytes(),
        ..mor_batch_plan_info::defaults()
    }
}

/// The model and the parameters behind a caller's pointers.
unsafe fn wanted<'a>(
    model: *const mor_model,
    params: *const mor_batch_params,
) -> Result<(&'a ModelObject, SessionParams, Pressure), Failure> {
    // SAFETY: passed on.
    let object = unsafe { self::model(model) }?;
    // SAFETY: passed on.
    let (params, pressure) = unsafe { params::read(params)?.to_rust() }?;
    Ok((object, params, pressure))
}

/// Writes a plan of the model and the parameters behind a caller's pointers.
unsafe fn write_plan(
    model: *const mor_model,
    params: *const mor_batch_params,
    out_plan: *mut mor_batch_plan_info,
    plan: impl FnOnce(&Model, &SessionParams) -> crate::Result<Plan>,
) -> Result<(), Failure> {
    // SAFETY: passed on.
    let (object, params, _) = unsafe { wanted(model, params) }?;
    let plan = plan(&object.model, &params)?;
    // SAFETY: passed on.
    unsafe { write_sized(out_plan, describe(&plan)) }
}

/// Plans a batch without taking any memory: what it will take, to the byte.
///
/// @param model      the model
/// @param params     for what, or NULL
/// @param out_plan   gets the plan; its `struct_size` must be set
/// @param out_error  gets the reason of a failure, or NULL
/// @return `MOR_ERROR_INVALID_ARGUMENT` for sizes that nobody can have, `MOR_ERROR_UNSUPPORTED` for
///         what this system cannot do
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_plan(
    model: *const mor_model,
    params: *const mor_batch_params,
    out_plan: *mut mor_batch_plan_info,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            let plan = |model: &Model, params: &SessionParams| Plan::batch(model, params);
            report(write_plan(model, params, out_plan, plan), out_error)
        }
    })
}

/// Plans the batch with the most sequences whose block of memory, or on a GPU what it takes there, has
/// at most so many bytes, with pages for the whole context of each when a token runs `mean_depth`
/// recursions on average. What was sought stands in the plan's `sequences` and `kv_pages`; in `params`
/// these two do not matter.
///
/// @param model       the model
/// @param params      for what else, or NULL
/// @param mean_depth  to the model's `recursions`, from 0 where routers may drop a token at once, from 1 elsewhere
/// @param bytes       for the block, the plan's `bytes`; `heap_bytes` and stacks come besides. On a GPU for
///                    its `device_bytes`; all that is on the host comes besides
/// @param out_plan    gets the plan; its `struct_size` must be set
/// @param out_error   gets the reason of a failure, or NULL
/// @return `MOR_ERROR_INVALID_ARGUMENT` also when not even one sequence fits; otherwise as
///         `mor_batch_plan`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_plan_in(
    model: *const mor_model,
    params: *const mor_batch_params,
    mean_depth: f64,
    bytes: usize,
    out_plan: *mut mor_batch_plan_info,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            let plan = |model: &Model, params: &SessionParams| {
                Plan::batch_in(model, params, mean_depth, bytes)
            };
            report(write_plan(model, params, out_plan, plan), out_error)
        }
    })
}

/// Pages of the KV pool that the sequences of `params` take when their contexts are full and a token
/// runs `mean_depth` recursions on average: a value for `kv_pages`.
///
/// @param model       the model
/// @param params      for what, or NULL; its `kv_pages` does not matter
/// @param mean_depth  to the model's `recursions`, from 0 where routers may drop a token at once, from 1 elsewhere
/// @param out_pages   gets the number
/// @param out_error   gets the reason of a failure, or NULL
/// @return `MOR_ERROR_INVALID_ARGUMENT`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_pages_for(
    model: *const mor_model,
    params: *const mor_batch_params,
    mean_depth: f64,
    out_pages: *mut usize,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        let work = || {
            check_out(out_pages, "out_pages")?;
            // SAFETY: the caller's duty, see the manual.
            let (object, params, _) = unsafe { wanted(model, params) }?;
            let pages = Plan::pages_for(&object.model, &params, mean_depth)?;
            // SAFETY: checked above.
            unsafe { put(out_pages, pages) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

/// Creates a batch in memory of its own, as much as `mor_batch_plan` says, and starts its helper
/// threads. The model may be freed before the batch.
///
/// @param model      the model
/// @param params     for what, or NULL
/// @param out_batch  gets the batch; end it with `mor_batch_free`
/// @param out_error  gets the reason of a failure, or NULL
/// @return `MOR_ERROR_OUT_OF_MEMORY`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_THREAD`,
///         `MOR_ERROR_LOCK`, `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_UNSUPPORTED`; `*out_batch` is then
///         left as it was
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_create(
    model: *const mor_model,
    params: *const mor_batch_params,
    out_batch: *mut *mut mor_batch,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        let work = || {
            check_out(out_batch, "out_batch")?;
            // SAFETY: the caller's duty, see the manual.
            let (object, params, pressure) = unsafe { wanted(model, params) }?;
            let mut batch = Batch::new(&object.model, &params)?;
            batch.set_pressure(pressure);
            let plan = describe(batch.plan());
            let events = reserved(most_events(plan.sequences))?;
            let batch = Owned::create(Content { batch, events })?;
            object.log.write(
                mor_log_level::MOR_LOG_INFO,
                format_args!(
                    "created a batch: {} sequences of {} tokens, {} threads, {} bytes",
                    plan.sequences,
                    plan.context,
                    plan.threads,
                    plan.bytes + plan.heap_bytes
                ),
            );
            // SAFETY: checked above.
            unsafe { put(out_batch, batch.cast()) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

/// Ends a batch: stops its threads and gives its memory back. NULL is allowed.
///
/// @return `MOR_ERROR_BUSY` when a call on the batch is in progress; it then stays valid
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_free(batch: *mut mor_batch) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual. No error struct.
        unsafe {
            let end = Owned::end(batch.cast::<Owned<Content>>());
            report(end, std::ptr::null_mut())
        }
    })
}

/// As `mor_session_last_error`, of a batch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_last_error(batch: *const mor_batch) -> *const c_char {
    boundary!(c"".as_ptr(), {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            let pointer = batch.cast_mut().cast::<Owned<Content>>();
            last_error(pointer, c"the batch is NULL or was freed")
        }
    })
}
