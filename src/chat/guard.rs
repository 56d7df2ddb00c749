//! What keeps a hostile template from exhausting the stack, which would end the host's process.
//!
//! The engine walks expressions and values by recursion and limits it only in part: a long chain of
//! operators makes a deep program, a loop makes a deeply nested value. So it runs on a thread of its
//! own whose stack is large enough for the deepest that the template's size and fuel allow (memory
//! is only taken for what is used). Deeper than any stack is a value that contains itself; only a
//! namespace can, so templates that use one other than by its attributes are refused.
//!
//! What it does not keep a template from: values that share parts of themselves (`[x, x]`, again and again) are made
//! in few steps and printed or compared in very many, which the engine counts as one.

use crate::error::{Error, Result};

/// The longest template, in bytes: twice the longest that models come with. The engine takes time in
/// the square of an expression's length.
const MAX_SOURCE: usize = 32 << 10;

/// Enough for a program without depth.
const BASE_STACK: usize = 2 << 20;

/// Stack that compiling needs at most for each byte of a template: 1130 bytes were measured, in a
/// build without optimization (400 with).
const STACK_PER_BYTE: usize = 1536;

/// Stack that rendering needs at most for each unit of fuel: 163 bytes were measured, in a build
/// without optimization (50 with).
const STACK_PER_FUEL: usize = 256;

/// Runs `work` on a stack that is deep enough to compile `source`.
pub(super) fn compiling<T: Send>(
    source: &str,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    if source.len() > MAX_SOURCE {
        return Err(Error::template(format_args!(
            "the file's template has {} bytes; at most {MAX_SOURCE} are accepted",
            source.len()
        )));
    }
    check_namespaces(source)?;
    on_stack(BASE_STACK + STACK_PER_BYTE * source.len(), work)
}

/// Runs `work` on a stack that is deep enough to render with this much fuel.
pub(super) fn rendering<T: Send>(fuel: u64, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let stack = usize::try_from(fuel)
        .ok()
        .and_then(|fuel| fuel.checked_mul(STACK_PER_FUEL)?.checked_add(BASE_STACK))
        .ok_or_else(|| Error::template("the conversation is too long for a template"))?;
    on_stack(stack, work)
}

fn on_stack<T: Send>(bytes: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let builder = std::thread::Builder::new()
        .name("chat template".into())
        .stack_size(bytes);
    std::thread::scope(|scope| {
        let thread = builder.spawn_scoped(scope, work).map_err(|error| {
            Error::thread(format_args!("no thread for the chat template: {error}"))
        })?;
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::template("the template engine failed")))
    })
}

/// Refuses templates in which a namespace could be put into a value. It looks at words, without
/// regard to where text ends and code begins: that can refuse a strange template, but let none by.
fn check_namespaces(source: &str) -> Result<()> {
    let words: Vec<Word> = words(source).collect();
    let mut names = Vec::new();
    for (index, word) in words.iter().enumerate() {
        if word.text != "namespace" {
            continue;
        }
        match words[..index] {
            [.., ref set, ref name]
                if set.text == "set"
                    && set.gap(source, name).trim().is_empty()
                    && name.gap(source, word).trim() == "="
                    && source[word.end..].trim_start().starts_with('(') =>
            {
                names.push((name.text, name.start));
            }
            // A name is never followed by a text: this is the end of one.
            _ if source[word.end..].trim_start().starts_with(['"', '\'']) => {}
            // "namespace functions" is prose.
            _ if words.get(index + 1).is_some_and(|next| {
                word.gap(source, next).trim().is_empty() && !is_operator(next.text)
            }) => {}
            _ => return Err(refused("namespace")),
        }
    }
    for (index, word) in words.iter().enumerate() {
        // `set name = ...` gives the name something else, and what that is was looked at by itself.
        let is_given = index > 0
            && words[index - 1].text == "set"
            && words[index - 1].gap(source, word).trim().is_empty()
            && source[word.end..].trim_start().starts_with('=');
        let is_definition = is_given || names.contains(&(word.text, word.start));
        let has_attribute = source[word.end..].starts_with(['.', '[']);
        let is_name = names.iter().any(|&(name, _)| name == word.text);
        if is_name && !is_definition && !has_attribute {
            return Err(refused(word.text));
        }
    }
    Ok(())
}

fn refused(word: &str) -> Error {
    Error::template(format_args!(
        "the file's template uses '{word}' other than by `set name = namespace(...)` and its attributes, which is not supported"
    ))
}

fn is_operator(word: &str) -> bool {
    ["and", "else", "if", "in", "is", "not", "or", "recursive"].contains(&word)
}

struct Word<'a> {
    text: &'a str,
    start: usize,
    end: usize,
}

impl Word<'_> {
    /// What stands between this word and a later one.
    fn gap<'s>(&self, source: &'s str, next: &Word) -> &'s str {
        &source[self.end..next.start]
    }
}

/// The words of a source: what Jinja would take for identifiers if it were code.
fn words(source: &str) -> impl Iterator<Item = Word<'_>> {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = source.as_bytes();
    let mut position = 0;
    std::iter::from_fn(move || {
        let start = position + bytes[position..].iter().position(|&byte| is_inner(byte))?;
        let rest = &bytes[start..];
        let length = rest
            .iter()
            .position(|&byte| !is_inner(byte))
            .unwrap_or(rest.len());
        position = start + length;
        Some(Word {
            text: &source[start..position],
            start,
            end: position,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_namespaces_pass() {
        for source in [
            "{% set ns = namespace(a=1, b=messages|length - 1) %}{% set ns.a = ns.a + 1 %}{{ ns['b'] }}",
            "{%- set image_count=namespace (value=0) -%}{{ image_count.value }}",
            "namespace functions { } {{ '// namespace tools' }}",
            "",
            "ns",
        ] {
            assert!(check_namespaces(source).is_ok(), "{source}");
        }
    }

    #[test]
    fn namespaces_stay_out_of_values() {
        let define = "{% set ns = namespace() %}";
        for rest in [
            "{% set ns.x = ns %}",
            "{% set ns.x = [ns] %}",
            "{% set y = ns %}",
            "{{ f(ns) }}",
            "{{ ns | tojson }}",
            "{{ ns == 1 }}",
            "{% set ns.x = namespace() %}",
            "{{ [namespace()] }}",
            "{% set n = namespace %}",
            "{% set n = namespace or 1 %}",
            "{% set n = namespace\nif a %}",
            "{% set a, b = namespace(), 1 %}",
            "{% set ns = x or namespace() %}",
        ] {
            assert!(
                check_namespaces(&format!("{define}{rest}")).is_err(),
                "{rest}"
            );
        }
    }

    #[test]
    fn long_templates_are_refused() {
        assert!(compiling(&"x".repeat(MAX_SOURCE + 1), || Ok(())).is_err());
        assert!(rendering(u64::MAX, || Ok(())).is_err());
    }
}
