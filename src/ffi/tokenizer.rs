//! `mor_tokenizer`.

use super::handle::{Kind, Mark, Owned, call, last_error};
use super::model::{model, mor_model};
use super::params::{
    self, Params, check_out, initialise, put, slice, slice_mut, text, too_small, write_sized,
};
use super::status::{Failure, mor_error, mor_status, report};
use crate::error::Error;
use crate::model::Model;
use crate::tokenizer::{EncodeOptions, EncodeScratch, Utf8Stream};
use std::ffi::c_char;

/// A model's tokenizer with working memory of its own. One call at a time may use it; a second one
/// gets `MOR_ERROR_BUSY`. Threads make one each; they share the vocabulary, which is the model's.
/// No call but those that create and free it, and `mor_tokenizer_format_chat`, allocates.
pub struct mor_tokenizer {
    _private: [u8; 0],
}

/// What stands behind a `mor_tokenizer`.
struct Content {
    model: Model,
    scratch: EncodeScratch,
}

impl Content {
    fn tokenizer(&self) -> Result<&crate::Tokenizer, Error> {
        self.model.tokenizer()
    }
}

impl Kind for Content {
    const MARK: Mark = Mark::Tokenizer;
    const NAME: &'static str = "tokenizer";
}

/// A call on the tokenizer behind a caller's pointer.
unsafe fn with(
    tokenizer: *mut mor_tokenizer,
    work: impl FnOnce(&mut Content) -> Result<(), Failure>,
) -> mor_status {
    // SAFETY: passed on.
    unsafe { call(tokenizer.cast::<Owned<Content>>(), work) }
}

/// What a tokenizer is made for. Set it up with `mor_tokenizer_params_init`; NULL in its place means
/// the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_tokenizer_params {
    /// Size of this struct as the caller knows it; `mor_tokenizer_params_init` sets it.
    pub struct_size: usize,
    /// The longest piece of text without a break that `mor_tokenizer_encode` can take, in bytes: a
    /// word for byte-level vocabularies, whose texts may be of any length; the text between two
    /// special tokens for SentencePiece's. The working memory is about 29 times as large. Default:
    /// 16384.
    pub max_piece_bytes: usize,
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_tokenizer_params {
    const NAME: &'static str = "mor_tokenizer_params";
    fn defaults() -> Self {
        mor_tokenizer_params {
            struct_size: 0,
            max_piece_bytes: 16 << 10,
        }
    }
}

/// Sets every field of `params` to its default.
///
/// @param params       the struct
/// @param struct_size  `sizeof(mor_tokenizer_params)`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_params_init(
    params: *mut mor_tokenizer_params,
    struct_size: usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual.
        unsafe { report(initialise(params, struct_size), std::ptr::null_mut()) }
    })
}

/// Creates a tokenizer of a model. The model may be freed before it.
///
/// @param model          the model
/// @param params         for what, or NULL
/// @param out_tokenizer  gets the tokenizer; free it with `mor_tokenizer_free`
/// @param out_error      gets the reason of a failure, or NULL
/// @return `MOR_ERROR_TOKENIZER` when the file has none that can be used, `MOR_ERROR_OUT_OF_MEMORY`,
///         `MOR_ERROR_INVALID_ARGUMENT`; `*out_tokenizer` is then left as it was
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_create(
    model: *const mor_model,
    params: *const mor_tokenizer_params,
    out_tokenizer: *mut *mut mor_tokenizer,
    out_error: *mut mor_error,
) -> mor_status {
    boundary!(error: out_error, {
        let work = || {
            check_out(out_tokenizer, "out_tokenizer")?;
            // SAFETY: the caller's duty, see the manual.
            let object = unsafe { self::model(model) }?;
            // SAFETY: as above.
            let params = unsafe { params::read(params) }?;
            object.model.tokenizer()?;
            let tokenizer = Owned::create(Content {
                model: object.model.clone(),
                scratch: EncodeScratch::new(params.max_piece_bytes)?,
            })?;
            // SAFETY: checked above.
            unsafe { put(out_tokenizer, tokenizer.cast()) };
            Ok(())
        };
        // SAFETY: as above.
        unsafe { report(work(), out_error) }
    })
}

/// Frees a tokenizer; NULL is allowed.
///
/// @return `MOR_ERROR_BUSY` when a call on it is in progress; it then stays valid
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_free(tokenizer: *mut mor_tokenizer) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        // SAFETY: the caller's duty, see the manual. No error struct.
        unsafe {
            let end = Owned::end(tokenizer.cast::<Owned<Content>>());
            report(end, std::ptr::null_mut())
        }
    })
}

/// As `mor_session_last_error`, of a tokenizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_last_error(
    tokenizer: *const mor_tokenizer,
) -> *const c_char {
    boundary!(c"".as_ptr(), {
        // SAFETY: the caller's duty, see the manual.
        unsafe {
            let pointer = tokenizer.cast_mut().cast::<Owned<Content>>();
            last_error(pointer, c"the tokenizer is NULL or was freed")
        }
    })
}

/// What a tokenizer says about itself. Set `struct_size` to `sizeof(mor_tokenizer_info)` before the
/// call. A special token that the file does not have is -1.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_tokenizer_info {
    /// Size of this struct as the caller knows it.
    pub struct_size: usize,
    /// Tokens. The model may have more: its last rows are then no text.
    pub vocab_size: u32,
    /// The token that begins a text.
    pub bos: i32,
    /// The token that ends a text.
    pub eos: i32,
    /// The token that ends a turn of a conversation.
    pub eot: i32,
    /// 1 when the file asks for `bos` before each text, else 0.
    pub add_bos: u32,
    /// 1 when the file asks for `eos` after each text, else 0.
    pub add_eos: u32,
    /// Bytes of the longest token.
    pub max_token_bytes: usize,
}

// SAFETY: `repr(C)`, numbers, the size first.
unsafe impl Params for mor_tokenizer_info {
    const NAME: &'static str = "mor_tokenizer_info";
    fn defaults() -> Self {
        mor_tokenizer_info {
            struct_size: 0,
            vocab_size: 0,
            bos: -1,
            eos: -1,
            eot: -1,
            add_bos: 0,
            add_eos: 0,
            max_token_bytes: 0,
        }
    }
}

/// Describes a tokenizer.
///
/// @param tokenizer  the tokenizer
/// @param out_info   gets the description; its `struct_size` must be set
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_describe(
    tokenizer: *mut mor_tokenizer,
    out_info: *mut mor_tokenizer_info,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            let t = content.tokenizer()?;
            // A vocabulary has at most 2^24 tokens.
            let id = |id: Option<u32>| id.map_or(-1, |id| id as i32);
            let info = mor_tokenizer_info {
                vocab_size: t.vocab_size() as u32,
                bos: id(t.bos()),
                eos: id(t.eos()),
                eot: id(t.eot()),
                add_bos: t.add_bos().into(),
                add_eos: t.add_eos().into(),
                max_token_bytes: t.max_piece_bytes(),
                ..mor_tokenizer_info::defaults()
            };
            // SAFETY: the caller's duty, see the manual.
            unsafe { write_sized(out_info, info) }
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

/// Flag of `mor_tokenizer_encode`: put the tokens that begin and end a text around it, if the file
/// asks for them. Usual for a prompt, wrong for a rendered chat, which brings its own.
pub const MOR_ENCODE_ADD_SPECIAL: u32 = 1;
/// Flag of `mor_tokenizer_encode`: read the names of control tokens, such as "<|im_end|>", as these
/// tokens. Only for text that is trusted, such as a rendered chat.
pub const MOR_ENCODE_PARSE_SPECIAL: u32 = 2;
/// Flag of `mor_tokenizer_decode` and `mor_tokenizer_token_bytes`: write control tokens by their
/// names. Without it they are no text.
pub const MOR_DECODE_SPECIAL: u32 = 1;

fn check_flags(flags: u32, known: u32) -> Result<(), Failure> {
    match flags & !known {
        0 => Ok(()),
        other => Err(Failure::argument(format_args!(
            "flags has bits that mean nothing here ({other:#x})"
        ))),
    }
}

/// Writes the tokens of a text.
///
/// @param tokenizer   the tokenizer
/// @param text        UTF-8
/// @param text_bytes  its length, or `MOR_ZERO_TERMINATED`
/// @param flags       0 or a sum of `MOR_ENCODE_...`
/// @param out_tokens  gets the tokens; may be NULL when `capacity` is 0
/// @param capacity    how many it holds
/// @param out_count   gets how many tokens the text has, also when the buffer is too small
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_TOKENIZER`, `MOR_ERROR_INVALID_ARGUMENT`, also
///         for text that is not UTF-8 and for a piece longer than `max_piece_bytes`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_encode(
    tokenizer: *mut mor_tokenizer,
    text: *const c_char,
    text_bytes: usize,
    flags: u32,
    out_tokens: *mut u32,
    capacity: usize,
    out_count: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_count, "out_count")?;
            check_flags(flags, MOR_ENCODE_ADD_SPECIAL | MOR_ENCODE_PARSE_SPECIAL)?;
            // SAFETY: the caller's duty, see the manual.
            let text = unsafe { self::text(text, text_bytes, "text") }?;
            // SAFETY: as above.
            let out = unsafe { slice_mut(out_tokens, capacity, "out_tokens") }?;
            let options = EncodeOptions {
                add_special: flags & MOR_ENCODE_ADD_SPECIAL != 0,
                parse_special: flags & MOR_ENCODE_PARSE_SPECIAL != 0,
            };
            let tokenizer = content.model.tokenizer()?;
            let outcome = tokenizer.encode_into(text, options, &mut content.scratch, out);
            if let Ok(needed) | Err(Error::BufferTooSmall { needed, .. }) = outcome {
                // SAFETY: checked above.
                unsafe { put(out_count, needed) };
            }
            outcome?;
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

/// Writes the text of some tokens and a zero byte behind it. What is no valid UTF-8 becomes U+FFFD.
/// To show tokens one by one use `mor_session_generate` or `mor_tokenizer_decode_next`, which never cut a character.
///
/// @param tokenizer  the tokenizer
/// @param tokens     the tokens
/// @param count      how many
/// @param flags      0 or `MOR_DECODE_SPECIAL`
/// @param buffer     gets the text; may be NULL when `capacity` is 0
/// @param capacity   bytes in `buffer`
/// @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_decode(
    tokenizer: *mut mor_tokenizer,
    tokens: *const u32,
    count: usize,
    flags: u32,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_bytes, "out_bytes")?;
            check_flags(flags, MOR_DECODE_SPECIAL)?;
            // SAFETY: the caller's duty, see the manual.
            let tokens = unsafe { slice(tokens, count, "tokens") }?;
            // SAFETY: as above.
            let buffer = unsafe { slice_mut(buffer.cast::<u8>(), capacity, "buffer") }?;
            // The last byte is kept for the zero.
            let (room, zero) = match buffer.split_last_mut() {
                Some((zero, room)) => (room, Some(zero)),
                None => (&mut [][..], None),
            };
            let tokenizer = content.tokenizer()?;
            let outcome = tokenizer.decode_into(tokens, flags & MOR_DECODE_SPECIAL != 0, room);
            let (Ok(length) | Err(Error::BufferTooSmall { needed: length, .. })) = outcome else {
                outcome?;
                return Ok(());
            };
            // SAFETY: checked above.
            unsafe { put(out_bytes, length) };
            let fits = outcome.is_ok();
            match (zero, room.get_mut(length)) {
                (Some(_), Some(zero)) | (Some(zero), None) if fits => *zero = 0,
                _ => return Err(too_small(length + 1, capacity)),
            }
            Ok(())
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

/// A text that comes token by token, as a batch gives tokens: the beginning of a character whose end is still missing.
/// Set it to zero (`mor_decode_stream stream = {0};`) before the first token. It is plain memory of the caller, one for
/// each text; a copy goes on from the same place, as a fork does.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_decode_stream {
    /// The bytes.
    pub pending: [u8; 4],
    /// How many they are, at most 3.
    pub pending_count: u32,
}

/// Writes the characters that are complete with one more token, and a zero byte behind them. What can be no UTF-8 becomes
/// U+FFFD. `3 * max_token_bytes + 10` bytes are always enough (`mor_tokenizer_info`).
///
/// @param tokenizer  the tokenizer
/// @param stream     the text so far; it takes the token unless the call fails
/// @param token      the token; one beyond the vocabulary, which a model may draw, adds nothing
/// @param flags      0 or `MOR_DECODE_SPECIAL`
/// @param buffer     gets the text, which may be empty; may be NULL when `capacity` is 0
/// @param capacity   bytes in `buffer`
/// @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
/// @return `MOR_ERROR_BUFFER_TOO_SMALL`, `MOR_ERROR_INVALID_ARGUMENT`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_decode_next(
    tokenizer: *mut mor_tokenizer,
    stream: *mut mor_decode_stream,
    token: u32,
    flags: u32,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_flags(flags, MOR_DECODE_SPECIAL)?;
            let special = flags & MOR_DECODE_SPECIAL != 0;
            let bytes = content.tokenizer()?.drawn_bytes(token, special);
            // SAFETY: the caller's duty, see the manual.
            unsafe {
                go_on(stream, buffer, capacity, out_bytes, |text, each| {
                    text.push(bytes, each)
                })
            }
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

/// Ends a text that came token by token: writes U+FFFD if a character was left incomplete, else nothing, and a zero
/// byte. The stream is then ready for another text.
///
/// @param tokenizer  the tokenizer
/// @param stream     the text so far
/// @param buffer     gets the text, at most three bytes and the zero; may be NULL when `capacity` is 0
/// @param capacity   bytes in `buffer`
/// @param out_bytes  gets the text's length without the zero byte, also when the buffer is too small
/// @return as `mor_tokenizer_decode_next`
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_decode_end(
    tokenizer: *mut mor_tokenizer,
    stream: *mut mor_decode_stream,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |_: &mut Content| {
            // SAFETY: the caller's duty, see the manual.
            unsafe {
                go_on(stream, buffer, capacity, out_bytes, |text, each| {
                    each(text.finish())
                })
            }
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

/// Writes what `step` gives of a stream, which is left as it was unless all of that fits.
unsafe fn go_on(
    stream: *mut mor_decode_stream,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
    step: impl FnOnce(&mut Utf8Stream, &mut dyn FnMut(&str)),
) -> Result<(), Failure> {
    check_out(stream, "stream")?;
    check_out(out_bytes, "out_bytes")?;
    // SAFETY: the caller's duty: a struct, a buffer of `capacity` bytes, a place for the size.
    unsafe {
        let buffer = slice_mut(buffer.cast::<u8>(), capacity, "buffer")?;
        let mor_decode_stream {
            pending,
            pending_count,
        } = stream.read_unaligned();
        let mut text =
            Utf8Stream::with_pending(pending, pending_count as usize).ok_or_else(|| {
                Error::argument("the stream is damaged; set it to zero before the first token")
            })?;
        let mut length = 0;
        step(&mut text, &mut |piece| {
            if let Some(room) = buffer.get_mut(length..length + piece.len()) {
                room.copy_from_slice(piece.as_bytes());
            }
            length += piece.len();
        });
        put(out_bytes, length);
        let Some(zero) = buffer.get_mut(length) else {
            return Err(too_small(length + 1, capacity));
        };
        *zero = 0;
        let (pending, count) = text.pending();
        let pending_count = count as u32;
        put(
            stream,
            mor_decode_stream {
                pending,
                pending_count,
            },
        );
    }
    Ok(())
}

/// The bytes that one token adds to a text; they need not be whole characters and are not followed
/// by a zero byte. They lie in the model and live as long as it.
///
/// @param tokenizer  the tokenizer
/// @param token      the token
/// @param flags      0 or `MOR_DECODE_SPECIAL`
/// @param out_text   gets where they begin
/// @param out_bytes  gets how many they are
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_token_bytes(
    tokenizer: *mut mor_tokenizer,
    token: u32,
    flags: u32,
    out_text: *mut *const c_char,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_text, "out_text")?;
            check_out(out_bytes, "out_bytes")?;
            check_flags(flags, MOR_DECODE_SPECIAL)?;
            let tokenizer = content.tokenizer()?;
            let bytes = tokenizer.token_bytes(token, flags & MOR_DECODE_SPECIAL != 0)?;
            // SAFETY: checked above.
            unsafe {
                put(out_text, bytes.as_ptr().cast());
                put(out_bytes, bytes.len());
            }
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(tokenizer, work) }
    })
}

/// Whether nothing is to be generated after a token.
///
/// @param tokenizer  the tokenizer
/// @param token      the token; one outside the vocabulary ends nothing
/// @param out_end    gets the answer
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_is_end(
    tokenizer: *mut mor_tokenizer,
    token: u32,
    out_end: *mut bool,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_end, "out_end")?;
            // SAFETY: checked above.
            unsafe { put(out_end, content.tokenizer()?.is_end(token)) };
            Ok(())
        };
        // SAFETY: the caller's duty, see the manual.
        unsafe { with(tokenizer, work) }
    })
}

/// One turn of a conversation. Both texts are UTF-8 and end with a zero byte.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mor_chat_message {
    /// Who speaks: usually "system", "user" or "assistant".
    pub role: *const c_char,
    /// What is said.
    pub content: *const c_char,
}

/// Writes a conversation as the text that the model was trained on, by the chat template in its
/// file, and a zero byte behind it. Encode it with `MOR_ENCODE_PARSE_SPECIAL`.
///
/// A template is a program from the file and is not trusted: its work and its depth are bounded. This
/// is the one call besides creating and freeing that takes memory from the heap, and that starts a
/// thread, which ends with the call: templates run on a stack of their own, so that no template can
/// overflow the caller's.
///
/// @param tokenizer   the tokenizer
/// @param messages    the turns, the first one first
/// @param count       how many
/// @param add_prompt  end where the assistant is to speak
/// @param buffer      gets the text; may be NULL when `capacity` is 0
/// @param capacity    bytes in `buffer`
/// @param out_bytes   gets the text's length without the zero byte, also when the buffer is too small
/// @return `MOR_ERROR_TEMPLATE`, also when the file has none; `MOR_ERROR_BUFFER_TOO_SMALL`;
///         `MOR_ERROR_UNSUPPORTED` when the library was built without templates
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mor_tokenizer_format_chat(
    tokenizer: *mut mor_tokenizer,
    messages: *const mor_chat_message,
    count: usize,
    add_prompt: bool,
    buffer: *mut c_char,
    capacity: usize,
    out_bytes: *mut usize,
) -> mor_status {
    boundary!(mor_status::MOR_ERROR_INTERNAL, {
        let work = |content: &mut Content| {
            check_out(out_bytes, "out_bytes")?;
            // SAFETY: the caller's duty, see the manual.
            let messages = unsafe { slice(messages, count, "messages") }?;
            // SAFETY: as above.
            let text = unsafe { render(&content.model, messages, add_prompt) }?;
            // SAFETY: as above.
            unsafe { params::copy_text(text.as_bytes(), buffer, capacity, out_bytes) }
        };
        // SAFETY: as above.
        unsafe { with(tokenizer, work) }
    })
}

#[cfg(feature = "chat")]
unsafe fn render(
    model: &Model,
    messages: &[mor_chat_message],
    add_prompt: bool,
) -> Result<String, Failure> {
    use crate::chat::{ChatTemplate, Message};
    let mut turns = crate::memory::reserved(messages.len())?;
    for message in messages {
        // SAFETY: the caller passes texts that end with zero bytes.
        let [role, content] = [(message.role, "role"), (message.content, "content")]
            .map(|(text, what)| unsafe { self::text(text, params::MOR_ZERO_TERMINATED, what) });
        turns.push(Message {
            role: role?,
            content: content?,
        });
    }
    let metadata = &model.gguf().metadata;
    let template = ChatTemplate::from_metadata(metadata, model.tokenizer()?)?
        .ok_or_else(|| Error::template("the file has none; write the prompt as plain text"))?;
    Ok(template.render(&turns, add_prompt)?)
}

#[cfg(not(feature = "chat"))]
unsafe fn render(_: &Model, _: &[mor_chat_message], _: bool) -> Result<String, Failure> {
    Err(Error::unsupported("chat templates: the library was built without them").into())
}
