//! `mor_session`: running tokens, drawing them, generating text.

use super::params::{self, Params, check_out, initialise, put, slice, slice_mut};
use super::session::{mor_session, with};
use super::status::{mor_status, report};
use crate::error::Error;
use crate::generate::{Finish, MAX_STOP_BYTES, Piece};
use crate::{SamplerParams, Session};
use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;

/// Refuses more tokens than a session has room for behind `length`, before they are looked at: so many may not be there.
fn check_room(session: &Session, length: usize, count: usize) -> Result<(), Error> {
    let context = session.plan().params().context;
    if count > context - length {
        let needed = length.saturating_add(count);
        return Err(Error::ContextFull { needed, context });
    }
    Ok(())
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
            check_room(session, session.tokens().len(), count)?;
            // SAFETY: the caller's duty, see the manual.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            Ok(session.prefill(tokens)?)
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Makes a session hold this text and nothing else, as a chat does each turn: of the beginning that it holds already
/// nothing is run again, of the rest everything, and at least the last token, unless its logits are there. (With capacity
/// routing, which looks at a text as a whole, all is run again.)
///
/// @param session   the session
/// @param tokens    the whole text, at least one token
/// @param count     how many
/// @param out_kept  gets how many of the session's tokens stayed, or NULL
/// @return as `mor_session_prefill`. After `MOR_ERROR_INVALID_ARGUMENT` and `MOR_ERROR_CONTEXT_FULL` the session is as it
///         was; after a failure that came when tokens ran it holds the common beginning, as after a rewind
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_prefill_whole(
    session: *mut mor_session,
    tokens: *const u32,
    count: usize,
    out_kept: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_room(session, 0, count)?;
            // SAFETY: the caller's duty, see the manual.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            let kept = session.prefill_whole(tokens)?;
            if !out_kept.is_null() {
                // SAFETY: as above.
                unsafe { put(out_kept, kept) };
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(session, work) }
    })
}

/// Runs tokens after those so far, and tells how likely each of them was after all before it. The sum says how likely they
/// are as a continuation of the text so far, of which there must be some: to compare answers, or to measure a model. (Not
/// with capacity routing, which wants the whole text at once.) On a failure the session is as it was before the call. May
/// take long; `mor_session_cancel` ends it. Faster with more `mor_session_params.logit_rows` than one.
///
/// @param session                the session
/// @param tokens                 token ids, each below the vocabulary's size
/// @param count                  how many, at least 1
/// @param out_log_probabilities  gets `count` numbers: natural logarithms of probabilities (the softmax of the logits,
///                               whatever the sampler would do). Must not overlap `tokens`. After a failure they mean
///                               nothing
/// @return `MOR_ERROR_NOT_READY` for an empty session and after a rewind; else as `mor_session_prefill`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_session_log_probabilities(
    session: *mut mor_session,
    tokens: *const u32,
    count: usize,
    out_log_probabilities: *mut f32,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |session: &mut Session| {
            check_room(session, session.tokens().len(), count)?;
            // SAFETY: the caller's duty, see the manual.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            // SAFETY: as above.
            let out = unsafe { slice_mut(out_log_probabilities, count, "out_log_probabilities") }?;
            Ok(session.log_probabilities(tokens, out)?)
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
    /// (the default) does nothing. From 0.001 to 1000.
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

impl From<mor_sampler_params> for SamplerParams {
    fn from(p: mor_sampler_params) -> Self {
        SamplerParams {
            repeat_penalty: p.repeat_penalty,
            repeat_last_n: p.repeat_last_n as usize,
            top_k: p.top_k as usize,
            top_p: p.top_p,
            min_p: p.min_p,
            temperature: p.temperature,
            seed: p.seed,
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
            let params = unsafe { params::read(params) }?;
            Ok(session.set_sampler(params.into())?)
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
    /// generation may repeat the last token with the rest of the text (but not after the callback
    /// itself has ended it: it is not called again, and what was held back is not shown).
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

/// Why a generation, or a sequence of a batch, ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum mor_finish {
    /// The model drew a token that ends a text; it is neither run nor shown.
    MOR_FINISH_END = 0,
    /// A stop string came up. Its tokens, which were not shown, were run and are in the session:
    /// `mor_session_rewind` takes them out before the text goes on.
    MOR_FINISH_STOP = 1,
    /// `max_tokens` were written.
    MOR_FINISH_LENGTH = 2,
    /// The context is full.
    MOR_FINISH_CONTEXT_FULL = 3,
    /// The callback asked for it.
    MOR_FINISH_CALLBACK = 4,
    /// It was cancelled; the session stands after the last token that was shown.
    MOR_FINISH_CANCELLED = 5,
    /// Of a batch's sequence: `mor_batch_stop`.
    MOR_FINISH_STOPPED = 6,
    /// Of a batch's sequence: the model computed a value that is not finite, or too large for the type of keys and values.
    /// `mor_batch_failure` says
    /// which.
    MOR_FINISH_FAILED = 7,
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
/// The text of each call is one of its own: where calls follow one another, a character whose tokens they
/// share is not put together, and a stop string that begins in one and ends in the next is not found. Text that
/// goes on from call to call is made of the tokens by `mor_tokenizer_decode_next`.
///
/// @param session     the session
/// @param params      what, or NULL
/// @param out_finish  gets why it ended; may be NULL
/// @return `MOR_ERROR_NOT_READY` without a prompt and after a rewind, `MOR_ERROR_TOKENIZER` when the model has none,
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
