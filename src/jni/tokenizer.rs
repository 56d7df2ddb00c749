//! `mor_tokenizer`.

use super::env::{Failure, Result, no_error, outcome, size};
use super::model::{long, model, two_calls};
use crate::ffi::*;
use crate::memory::reserved;
use jni_sys::*;
use std::cell::Cell;

fn tokenizer(handle: jlong) -> *mut mor_tokenizer {
    handle as usize as *mut mor_tokenizer
}

/// The failure of a call on a tokenizer, with the sentence that it left there.
fn failure(handle: jlong, status: mor_status) -> Failure {
    // SAFETY: a live handle; what is BUSY has the sentence of another call.
    unsafe {
        Failure::status(
            status,
            match status {
                mor_status::MOR_ERROR_BUSY => c"".as_ptr(),
                _ => mor_tokenizer_last_error(tokenizer(handle)),
            },
        )
    }
}

fn done(handle: jlong, status: mor_status) -> Result<()> {
    match status {
        mor_status::MOR_OK => Ok(()),
        status => Err(failure(handle, status)),
    }
}

/// A stream of which these bytes are pending; too many of them are the library's to refuse. A call for which the buffer
/// is too small leaves it as it is.
fn stream(pending: &[u8]) -> Cell<mor_decode_stream> {
    let mut stream = mor_decode_stream {
        pending: [0; 4],
        pending_count: pending.len() as u32,
    };
    for (to, from) in stream.pending.iter_mut().zip(pending) {
        *to = *from;
    }
    Cell::new(stream)
}

fn defaults() -> mor_tokenizer_params {
    let mut params = mor_tokenizer_params {
        struct_size: 0,
        max_piece_bytes: 0,
    };
    // SAFETY: a struct of this size.
    unsafe { mor_tokenizer_params_init(&mut params, size_of::<mor_tokenizer_params>()) };
    params
}

native! {
    fn Java_dev_mor_Native_tokenizerDefaults(_jni) -> jlong {
        Ok(long(defaults().max_piece_bytes))
    }

    fn Java_dev_mor_Native_tokenizerCreate(jni, of: jlong, max_piece_bytes: jlong) -> jlong {
        let mut params = defaults();
        params.max_piece_bytes = size(max_piece_bytes, "maxPieceBytes")?;
        let (mut created, mut error) = (std::ptr::null_mut(), no_error());
        let status = mor_tokenizer_create(model(of), &params, &mut created, &mut error);
        outcome(jni, status, &error)?;
        Ok(created as jlong)
    }

    fn Java_dev_mor_Native_tokenizerFree(_jni, handle: jlong) {
        done(handle, mor_tokenizer_free(tokenizer(handle)))
    }

    fn Java_dev_mor_Native_tokenizerDescribe(jni, handle: jlong) -> jlongArray {
        let mut i: mor_tokenizer_info = std::mem::zeroed();
        i.struct_size = size_of::<mor_tokenizer_info>();
        done(handle, mor_tokenizer_describe(tokenizer(handle), &mut i))?;
        jni.new_longs(&[
            i.vocab_size.into(),
            i.bos.into(),
            i.eos.into(),
            i.eot.into(),
            i.add_bos.into(),
            i.add_eos.into(),
            long(i.max_token_bytes),
        ])
    }

    fn Java_dev_mor_Native_encode(
        jni, handle: jlong, text: jbyteArray, special: jboolean, parse: jboolean
    ) -> jintArray {
        let text = jni.bytes(text)?;
        let flags = if special { MOR_ENCODE_ADD_SPECIAL } else { 0 }
            | if parse { MOR_ENCODE_PARSE_SPECIAL } else { 0 };
        let encode = |tokens: &mut Vec<u32>, count: &mut usize| mor_tokenizer_encode(
            tokenizer(handle),
            text.as_ptr().cast(),
            text.len(),
            flags,
            tokens.as_mut_ptr(),
            tokens.len(),
            count,
        );
        let (mut tokens, mut count) = (Vec::new(), 0);
        let mut status = encode(&mut tokens, &mut count);
        if status == mor_status::MOR_ERROR_BUFFER_TOO_SMALL {
            tokens = reserved(count)?;
            tokens.resize(count, 0);
            status = encode(&mut tokens, &mut count);
        }
        done(handle, status)?;
        jni.new_ints(&tokens)
    }

    fn Java_dev_mor_Native_decode(
        jni, handle: jlong, tokens: jintArray, special: jboolean
    ) -> jbyteArray {
        let (tokens, flags) = (jni.ints(tokens)?, if special { MOR_DECODE_SPECIAL } else { 0 });
        let (start, count) = (tokens.as_ptr(), tokens.len());
        let text = two_calls(
            |buffer, capacity, bytes| {
                let tokenizer = tokenizer(handle);
                mor_tokenizer_decode(tokenizer, start, count, flags, buffer, capacity, bytes)
            },
            |status| failure(handle, status),
        )?;
        jni.new_bytes(&text)
    }

    // How many bytes are pending then, these, and the text.
    fn Java_dev_mor_Native_decodeNext(
        jni, handle: jlong, pending: jbyteArray, token: jint, special: jboolean
    ) -> jbyteArray {
        let stream = stream(&jni.bytes(pending)?);
        let flags = if special { MOR_DECODE_SPECIAL } else { 0 };
        let text = two_calls(
            |buffer, capacity, bytes| {
                let (tokenizer, stream) = (tokenizer(handle), stream.as_ptr());
                mor_tokenizer_decode_next(
                    tokenizer, stream, token as u32, flags, buffer, capacity, bytes,
                )
            },
            |status| failure(handle, status),
        )?;
        let after = stream.get();
        let pending = &after.pending[..after.pending_count as usize];
        let mut all = reserved(1 + pending.len() + text.len())?;
        all.push(pending.len() as u8);
        all.extend_from_slice(pending);
        all.extend_from_slice(&text);
        jni.new_bytes(&all)
    }

    fn Java_dev_mor_Native_decodeEnd(
        jni, handle: jlong, pending: jbyteArray
    ) -> jbyteArray {
        let stream = stream(&jni.bytes(pending)?);
        let text = two_calls(
            |buffer, capacity, bytes| {
                let (tokenizer, stream) = (tokenizer(handle), stream.as_ptr());
                mor_tokenizer_decode_end(tokenizer, stream, buffer, capacity, bytes)
            },
            |status| failure(handle, status),
        )?;
        jni.new_bytes(&text)
    }

    fn Java_dev_mor_Native_tokenBytes(
        jni, handle: jlong, token: jint, special: jboolean
    ) -> jbyteArray {
        let flags = if special { MOR_DECODE_SPECIAL } else { 0 };
        let (mut start, mut count) = (std::ptr::null(), 0);
        let tokenizer = tokenizer(handle);
        let status =
            mor_tokenizer_token_bytes(tokenizer, token as u32, flags, &mut start, &mut count);
        done(handle, status)?;
        // SAFETY: bytes of the model, which the tokenizer keeps.
        jni.new_bytes(std::slice::from_raw_parts(start.cast(), count))
    }

    fn Java_dev_mor_Native_isEnd(_jni, handle: jlong, token: jint) -> jboolean {
        let mut end = false;
        done(handle, mor_tokenizer_is_end(tokenizer(handle), token as u32, &mut end))?;
        Ok(end)
    }

    // `texts`: role, content, role, content, ...
    fn Java_dev_mor_Native_formatChat(
        jni, handle: jlong, texts: jobjectArray, add_prompt: jboolean
    ) -> jbyteArray {
        let texts = jni.texts(texts, "a message")?;
        let mut turns = reserved(texts.len() / 2)?;
        turns.extend(texts.chunks_exact(2).map(|turn| mor_chat_message {
            role: turn[0].as_ptr().cast(),
            content: turn[1].as_ptr().cast(),
        }));
        let (start, count) = (turns.as_ptr(), turns.len());
        let text = two_calls(
            |buffer, capacity, bytes| {
                let tokenizer = tokenizer(handle);
                mor_tokenizer_format_chat(
                    tokenizer, start, count, add_prompt, buffer, capacity, bytes,
                )
            },
            |status| failure(handle, status),
        )?;
        jni.new_bytes(&text)
    }
}
