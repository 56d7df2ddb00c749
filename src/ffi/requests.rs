//! `mor_batch`: its sequences, what is asked of them, and what a tick brings.

use super::batch::{Content, ask, mor_batch, with};
use super::generation::{mor_finish, mor_sampler_params};
use super::params::{
    self, Params, check_out, initialise, put, slice, slice_mut, too_small, write_sized,
};
use super::sequence::MOR_MAX_RECURSIONS;
use super::status::{Failure, mor_error, mor_status, put_error, report};
use crate::batch::{Event, Finish, Status};
use crate::{Batch, Error, Request, SequenceId, Text};

/// What a new sequence of a batch is to do. Set it up with `mor_batch_request_init`, then set at least
/// the prompt. All of it is read during the call, nothing kept.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_batch_request {
    /// Size of this struct as the caller knows it; `mor_batch_request_init` sets it.
    pub struct_size: usize,
    /// Its tokens; for a fork, those after the common beginning. NULL (the default) for none.
    pub prompt: *const u32,
    /// How many tokens.
    pub prompt_count: usize,
    /// Most tokens to generate; 0 only runs the prompt. Default: as many as the context holds.
    pub max_tokens: usize,
    /// How tokens are drawn, or NULL (the default) for the defaults.
    pub sampler: *const mor_sampler_params,
    /// The routers' cut, from 0 to 1: see `mor_session_set_cut`. Below 0 (the default, -1): as the
    /// model was trained; for a fork, as its parent, which is all that a fork may have.
    pub cut: f32,
    /// The most recursions of a token, from 1. 0 (the default): all; for a fork, as its parent, which
    /// is all that a fork may have. Others are refused for models without routers.
    pub depth_limit: u32,
    /// Under pressure sequences of lower priority give way; of equals the later. Default: 0.
    pub priority: i32,
    /// Go on after tokens that end a text. Default: no. 0 is no, anything else yes.
    pub ignore_end: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

// SAFETY: `repr(C)`, numbers and nullable pointers, the size first.
unsafe impl Params for mor_batch_request {
    const NAME: &'static str = "mor_batch_request";
    fn defaults() -> Self {
        let defaults = Request::default();
        mor_batch_request {
            struct_size: 0,
            prompt: std::ptr::null(),
            prompt_count: 0,
            max_tokens: defaults.max_tokens,
            sampler: std::ptr::null(),
            cut: -1.0,
            depth_limit: 0,
            priority: defaults.priority,
            ignore_end: defaults.ignore_end.into(),
            reserved: [0; 3],
        }
    }
    fn reserved(&self) -> &[u8] {
        &self.reserved
    }
}

impl mor_batch_request {
    /// For a batch of this context.
    unsafe fn to_rust<'a>(self, context: usize) -> Result<Request<'a>, Failure> {
        // Never read when it cannot fit.
        if self.prompt_count > context {
            let needed = self.prompt_count;
            return Err(Error::ContextFull { needed, context }.into());
        }
        // SAFETY: the caller passes so many tokens.
        let prompt = unsafe { slice(self.prompt, self.prompt_count, "prompt") }?;
        // SAFETY: the caller passes NULL or parameters.
        let sampler = unsafe { params::read(self.sampler) }?;
        Ok(Request {
            prompt,
            max_tokens: self.max_tokens,
            sampler: sampler.into(),
            // What is not a number is for the batch to refuse.
            cut: Some(self.cut).filter(|cut| cut.is_nan() || *cut >= 0.0),
            depth_limit: Some(self.depth_limit as usize).filter(|limit| *limit > 0),
            priority: self.priority,
            ignore_end: self.ignore_end != 0,
        })
    }
}

/// Sets every field of `request` to its default.
///
/// @param request      the struct
/// @param struct_size  `sizeof(mor_batch_request)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_request_init(
    request: *mut mor_batch_request,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(request, struct_size), std::ptr::null_mut()) }
    })
}

/// A call that makes a sequence of a request.
unsafe fn make(
    batch: *mut mor_batch,
    request: *const mor_batch_request,
    out_sequence: *mut u64,
    work: impl FnOnce(&mut Batch, &Request) -> crate::Result<SequenceId>,
) -> mor_status {
    let make = |batch: &mut Batch| {
        // SAFETY: the caller passes NULL or a request.
        let request = unsafe {
            let context = batch.plan().params().context;
            params::read(request)?.to_rust(context)
        }?;
        Ok(work(batch, &request)?.0)
    };
    // SAFETY: passed on.
    unsafe { ask(batch, out_sequence, "out_sequence", make) }
}

/// Adds a sequence. Nothing is run yet: `mor_batch_tick` does that.
///
/// @param batch         the batch
/// @param request       what it is to do
/// @param out_sequence  gets its number, which this batch uses for no other
/// @return `MOR_ERROR_NOT_READY` when the batch has as many sequences as it was planned for,
///         `MOR_ERROR_CONTEXT_FULL` and `MOR_ERROR_INVALID_ARGUMENT` for what can never run,
///         `MOR_ERROR_BUSY`. The batch is then as before
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_add(
    batch: *mut mor_batch,
    request: *const mor_batch_request,
    out_sequence: *mut u64,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { make(batch, request, out_sequence, |b, r| b.add(r)) }
    })
}

/// Adds a sequence that begins with the first tokens of another, whose keys and values it shares as
/// far as they are there: a common prompt is run and stored once. It has its parent's cut and depth
/// limit. The parent may be in any state, and may be removed before it.
///
/// @param batch         the batch
/// @param parent        the other
/// @param length        how many tokens they have in common, at most those that the parent has
/// @param request       what comes after them; NULL for nothing else than the defaults
/// @param out_sequence  gets the new sequence's number
/// @return as `mor_batch_add`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_fork(
    batch: *mut mor_batch,
    parent: u64,
    length: usize,
    request: *const mor_batch_request,
    out_sequence: *mut u64,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let fork = |b: &mut Batch, r: &Request| b.fork(SequenceId(parent), length, r);
        // SAFETY: the caller's duty, see the manual.
        unsafe { make(batch, request, out_sequence, fork) }
    })
}

/// A call that changes one sequence.
unsafe fn change(
    batch: *mut mor_batch,
    work: impl FnOnce(&mut Batch) -> crate::Result<()>,
) -> mor_status {
    // SAFETY: passed on.
    unsafe { with(batch, |content| Ok(work(&mut content.batch)?)) }
}

/// Ends a sequence, with `MOR_FINISH_STOPPED` and no event; its tokens stay. One that is done already
/// stays as it is.
///
/// @param batch     the batch
/// @param sequence  the sequence
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_stop(batch: *mut mor_batch, sequence: u64) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { change(batch, |batch| batch.stop(SequenceId(sequence))) }
    })
}

/// Forgets a sequence, in whatever state: its place and its pages are free for others.
///
/// @param batch     the batch
/// @param sequence  the sequence
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_remove(batch: *mut mor_batch, sequence: u64) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { change(batch, |batch| batch.remove(SequenceId(sequence))) }
    })
}

/// Lets a sequence that stands still because the KV pool was full (`MOR_SEQUENCE_FULL`) try again.
/// Nothing happens to others.
///
/// @param batch     the batch
/// @param sequence  the sequence
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_resume(batch: *mut mor_batch, sequence: u64) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { change(batch, |batch| batch.resume(SequenceId(sequence))) }
    })
}

/// What happened to a sequence in a tick.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_event_kind {
    /// A token was drawn. It is run by a later tick.
    MOR_EVENT_TOKEN = 0,
    /// It gave its pages back and waits (`MOR_PRESSURE_EVICT`).
    MOR_EVENT_EVICTED = 1,
    /// It was evicted and runs again.
    MOR_EVENT_RESUMED = 2,
    /// The KV pool has no page for it; it stands still until `mor_batch_resume`.
    MOR_EVENT_FULL = 3,
    /// It ended. Its tokens can be read, and forks made of it, until it is removed.
    MOR_EVENT_FINISHED = 4,
}

/// What a tick brought for a sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct mor_batch_event {
    /// The sequence that it is about.
    pub sequence: u64,
    /// What happened.
    pub kind: mor_event_kind,
    /// Of `MOR_EVENT_TOKEN`: the token; else 0.
    pub token: u32,
    /// Of `MOR_EVENT_TOKEN`: recursions of the token before it, after which it was drawn; else 0.
    pub depth: u32,
    /// Of `MOR_EVENT_FINISHED`: why; else 0.
    pub finish: mor_finish,
}

impl From<Finish> for mor_finish {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::End => mor_finish::MOR_FINISH_END,
            Finish::Length => mor_finish::MOR_FINISH_LENGTH,
            Finish::ContextFull => mor_finish::MOR_FINISH_CONTEXT_FULL,
            Finish::Stopped => mor_finish::MOR_FINISH_STOPPED,
            Finish::Failed => mor_finish::MOR_FINISH_FAILED,
        }
    }
}

impl From<&Event> for mor_batch_event {
    fn from(event: &Event) -> Self {
        let plain = |sequence: SequenceId, kind| mor_batch_event {
            sequence: sequence.0,
            kind,
            token: 0,
            depth: 0,
            finish: mor_finish::MOR_FINISH_END,
        };
        match *event {
            Event::Token {
                sequence,
                token,
                depth,
            } => mor_batch_event {
                token,
                depth: depth.into(),
                ..plain(sequence, mor_event_kind::MOR_EVENT_TOKEN)
            },
            Event::Evicted(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_EVICTED),
            Event::Resumed(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_RESUMED),
            Event::Full(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_FULL),
            Event::Finished(sequence, finish) => mor_batch_event {
                finish: finish.into(),
                ..plain(sequence, mor_event_kind::MOR_EVENT_FINISHED)
            },
        }
    }
}

/// One pass over the weights: new tokens enter, every token in the recursions runs its next one, those
/// that leave are finished, and what follows them is drawn. A failure that concerns one sequence ends
/// that sequence only, with `MOR_FINISH_FAILED`.
///
/// @param batch       the batch
/// @param out_events  gets a pointer to what happened, in the order in which it did. The events lie in
///                    the batch and stand until the next call on it
/// @param out_count   gets how many there are: often none, while tokens are in the recursions
///                    (`mor_batch_is_idle` says whether there is anything left to run)
/// @return `MOR_ERROR_FILE_CHANGED`, `MOR_ERROR_INVALID_ARGUMENT`, `MOR_ERROR_BUSY`. Nothing is lost
///         then: the next tick tries again, and brings first what this one would have brought. (When
///         many fail in a row, the last events are kept.)
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_tick(
    batch: *mut mor_batch,
    out_events: *mut *const mor_batch_event,
    out_count: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |Content { batch, events }: &mut Content| {
            check_out(out_events, "out_events")?;
            check_out(out_count, "out_count")?;
            events.clear();
            events.extend(batch.tick()?.iter().map(mor_batch_event::from));
            // SAFETY: checked above.
            unsafe {
                put(out_events, events.as_ptr());
                put(out_count, events.len());
            }
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(batch, work) }
    })
}

/// Where a sequence of a batch stands.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_sequence_status {
    /// It waits for pages of the KV pool, or for the first tick.
    MOR_SEQUENCE_WAITING = 0,
    /// Its tokens are being run.
    MOR_SEQUENCE_RUNNING = 1,
    /// The KV pool has no page for it, with `MOR_PRESSURE_EVICT` not even when it is alone.
    /// `mor_batch_resume` lets it try again.
    MOR_SEQUENCE_FULL = 2,
    /// It is done.
    MOR_SEQUENCE_FINISHED = 3,
}

/// Where a sequence stands.
///
/// @param batch       the batch
/// @param sequence    the sequence
/// @param out_status  gets where
/// @param out_finish  gets why it ended, when it did; may be NULL
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_sequence_status(
    batch: *mut mor_batch,
    sequence: u64,
    out_status: *mut mor_sequence_status,
    out_finish: *mut mor_finish,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let status = |batch: &mut Batch| {
            Ok(match batch.status(SequenceId(sequence))? {
                Status::Waiting => mor_sequence_status::MOR_SEQUENCE_WAITING,
                Status::Running => mor_sequence_status::MOR_SEQUENCE_RUNNING,
                Status::Full => mor_sequence_status::MOR_SEQUENCE_FULL,
                Status::Finished(finish) => {
                    if !out_finish.is_null() {
                        // SAFETY: not NULL, and the caller's duty.
                        unsafe { put(out_finish, finish.into()) };
                    }
                    mor_sequence_status::MOR_SEQUENCE_FINISHED
                }
            })
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { ask(batch, out_status, "out_status", status) }
    })
}

/// A call that copies a list of the batch's to a buffer of the caller's.
unsafe fn copy<T: Copy>(
    batch: *mut mor_batch,
    (buffer, capacity, what): (*mut T, usize, &str),
    out_count: *mut usize,
    list: impl for<'a> FnOnce(&'a Batch) -> crate::Result<&'a [T]>,
) -> mor_status {
    let work = |content: &mut Content| {
        check_out(out_count, "out_count")?;
        let list = list(&content.batch)?;
        // SAFETY: the caller passes a buffer of this capacity; the place of the count was checked.
        let buffer = unsafe {
            let buffer = slice_mut(buffer, capacity, what)?;
            put(out_count, list.len());
            buffer
        };
        let Some(room) = buffer.get_mut(..list.len()) else {
            return Err(too_small(list.len(), capacity));
        };
        room.copy_from_slice(list);
        Ok(())
    };
    // SAFETY: passed on.
    unsafe { with(batch, work) }
}

/// Copies the tokens of a sequence so far, its prompt among them.
///
/// @param batch       the batch
/// @param sequence    the sequence
/// @param out_tokens  gets the tokens
/// @param capacity    how many it holds; the batch's `context` is always enough
/// @param out_count   gets how many there are, also when the buffer is too small
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence,
///         `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_tokens(
    batch: *mut mor_batch,
    sequence: u64,
    out_tokens: *mut u32,
    capacity: usize,
    out_count: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let buffer = (out_tokens, capacity, "out_tokens");
        // SAFETY: the caller's duty, see the manual.
        unsafe { copy(batch, buffer, out_count, |b| b.tokens(SequenceId(sequence))) }
    })
}

/// Copies the recursions that the tokens of a sequence ran; 0 where the router let one pass by. Tokens
/// that have not passed all layers yet, the last that was drawn among them, are left out: there may be
/// fewer numbers than tokens.
///
/// @param batch       the batch
/// @param sequence    the sequence
/// @param out_depths  gets the numbers
/// @param capacity    how many it holds; the batch's `context` is always enough
/// @param out_count   gets how many there are, also when the buffer is too small
/// @return as `mor_batch_tokens`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_depths(
    batch: *mut mor_batch,
    sequence: u64,
    out_depths: *mut u8,
    capacity: usize,
    out_count: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let buffer = (out_depths, capacity, "out_depths");
        // SAFETY: the caller's duty, see the manual.
        unsafe { copy(batch, buffer, out_count, |b| b.depths(SequenceId(sequence))) }
    })
}

/// Why a sequence ended with `MOR_FINISH_FAILED`.
///
/// @param batch        the batch
/// @param sequence     the sequence
/// @param out_failure  gets the status and the sentence of what went wrong; `MOR_OK` and an empty text
///                     when nothing did
/// @return `MOR_ERROR_INVALID_ARGUMENT` when there is no such sequence, `MOR_ERROR_BUSY`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_failure(
    batch: *mut mor_batch,
    sequence: u64,
    out_failure: *mut mor_error,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_failure, "out_failure")?;
            let (status, text) = match content.batch.failure(SequenceId(sequence))? {
                Some(error) => (error.into(), Text::new(error)),
                None => (mor_status::MOR_OK, Text::new("")),
            };
            // SAFETY: checked above.
            unsafe { put_error(out_failure, status, &text) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(batch, work) }
    })
}

/// Whether there is nothing to run: no sequence waits or runs. Those that stand still
/// (`MOR_SEQUENCE_FULL`) do neither.
///
/// @param batch     the batch
/// @param out_idle  gets the answer
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_is_idle(
    batch: *mut mor_batch,
    out_idle: *mut bool,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { ask(batch, out_idle, "out_idle", |batch| Ok(batch.is_idle())) }
    })
}

/// Bytes of KV pages in use, those of sequences that are done among them. A page that several
/// sequences share counts once.
///
/// @param batch      the batch
/// @param out_bytes  gets the number
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_kv_bytes_used(
    batch: *mut mor_batch,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let used = |batch: &mut Batch| Ok(batch.kv_bytes_used());
        // SAFETY: the caller's duty, see the manual.
        unsafe { ask(batch, out_bytes, "out_bytes", used) }
    })
}

/// What a batch ran since it was created. Set `struct_size` to `sizeof(mor_batch_counters_info)`
/// before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_batch_counters_info {
    /// Size of this struct as the caller knows it.
    pub struct_size: usize,
    /// Ticks that ran anything.
    pub ticks: u64,
    /// Rows for which there was room in the passes of the recursions.
    pub row_capacity: u64,
    /// Rows that passed the last layers.
    pub finished: u64,
    /// Rows of logits.
    pub logits: u64,
    /// Sequences that gave their pages back.
    pub evictions: u64,
    /// Rows of the passes of the recursions, by recursion from 0: each ran the block once. Their sum
    /// over `row_capacity` is the share of the room that was used. Without routers a row runs all
    /// recursions in one pass and counts at 0.
    pub rows: [u64; MOR_MAX_RECURSIONS],
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_batch_counters_info {
    const NAME: &'static str = "mor_batch_counters_info";
    fn defaults() -> Self {
        mor_batch_counters_info {
            struct_size: 0,
            ticks: 0,
            row_capacity: 0,
            finished: 0,
            logits: 0,
            evictions: 0,
            rows: [0; MOR_MAX_RECURSIONS],
        }
    }
}

/// What the batch ran so far.
///
/// @param batch         the batch
/// @param out_counters  gets the numbers; its `struct_size` must be set
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_counters(
    batch: *mut mor_batch,
    out_counters: *mut mor_batch_counters_info,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            let counters = content.batch.counters();
            let info = mor_batch_counters_info {
                ticks: counters.ticks,
                row_capacity: counters.row_capacity,
                finished: counters.finished,
                logits: counters.logits,
                evictions: counters.evictions,
                rows: counters.rows,
                ..mor_batch_counters_info::defaults()
            };
            // SAFETY: the caller's duty, see the manual.
            unsafe { write_sized(out_counters, info) }
        };
        // SAFETY: as above.
        unsafe { with(batch, work) }
    })
}

/// Switches to ordinary batching, to compare with: new tokens enter only when all others have left
/// the recursions, so that everyone waits for the deepest. Results do not depend on it.
///
/// @param batch    the batch
/// @param in_step  whether to do so from now on; a batch begins without
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_batch_set_in_step(batch: *mut mor_batch, in_step: bool) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |batch: &mut Batch| {
            batch.set_in_step(in_step);
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { change(batch, work) }
    })
}
