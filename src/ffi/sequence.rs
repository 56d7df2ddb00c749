//! `mor_session`: the sequence so far, settings, saving and restoring.

use super::params::{put, slice, slice_mut, too_small};
use super::session::{mor_session, tell, with};
use super::status::{Failure, mor_status};
use crate::{Routing, Session};
use std::ffi::c_void;
use std::time::Duration;

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
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            tell(session, out_length, "out_length", |session| {
                session.tokens().len()
            })
        }
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
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            tell(session, out_bytes, "out_bytes", |session| {
                session.kv_bytes_used()
            })
        }
    })
}

/// Sets the routers' cut from the next token on: a token goes on while the sigmoid of its score (the
/// score itself, where the router has neither a function nor an auxiliary router) is at least this. Higher is faster and coarser; 0
/// sends every token through all recursions, 1 none. Models without expert-choice routers take no notice.
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

/// Bytes that `mor_session_save` writes now: never more than the plan's `kv_bytes`, 5 for each token of
/// the context, 4 for each element of the model's hidden size and 128.
///
/// @param session    the session
/// @param out_bytes  gets the number
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_save_size(
    session: *mut mor_session,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            tell(session, out_bytes, "out_bytes", |session| {
                session.save_bytes()
            })
        }
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
/// would have computed here; where it had none, because it was rewound, `MOR_ERROR_NOT_READY` comes here
/// too. So does the next random number, if the sampler is set before: `mor_session_set_sampler` begins the
/// random sequence again. A state is not trusted: what is damaged or does not fit is refused, and the
/// session is as before.
///
/// @param session  the session
/// @param state    the state
/// @param bytes    its size
/// @return `MOR_ERROR_STATE`, `MOR_ERROR_CONTEXT_FULL`, `MOR_ERROR_KV_FULL`, `MOR_ERROR_FILE_CHANGED`
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
