//! Cutting text into words before merging ("pre-tokenizing"). Each cutter is the hand-written
//! equivalent of the regular expressions that the model was trained with; they are linear in the
//! text whatever it holds, and allocate nothing.

use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

use crate::error::{Error, Result};

/// The supported values of `tokenizer.ggml.pre`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// What llama.cpp does for files that name none.
    Default,
    /// GPT-2 itself.
    Gpt2,
    /// Single digits, then as GPT-2.
    SmolLm,
    /// Llama 3.
    Llama3,
    /// Llama 3's words without what else goes with them: no BOS unless the file asks, no words that are tokens as a whole.
    Smaug,
    /// Qwen 2 and later.
    Qwen2,
}

impl PreTokenizer {
    pub(super) fn parse(name: Option<&str>) -> Result<Self> {
        match name {
            None | Some("" | "default") => Ok(Self::Default),
            // Names of models whose words are cut in the same way, as in llama.cpp (llama-vocab.cpp).
            Some("gpt-2" | "olmo" | "jais" | "trillion" | "mellum" | "gigachat" | "phi-2") => {
                Ok(Self::Gpt2)
            }
            Some(
                "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
                | "minerva-7b",
            ) => Ok(Self::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "midm-2.0") => {
                Ok(Self::Llama3)
            }
            Some("smaug-bpe" | "dbrx") => Ok(Self::Smaug),
            Some("qwen2" | "megrez" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan") => {
                Ok(Self::Qwen2)
            }
            Some(other) => Err(Error::tokenizer(format_args!(
                "the file's pre-tokenizer '{}' is not supported; supported are default, gpt-2, smollm, llama-bpe, smaug-bpe, qwen2, and those of other models that are cut in the same way",
                super::excerpt(other)
            ))),
        }
    }

    /// Cutters, coarse to fine: each cuts the pieces of the one before.
    fn cutters(self) -> &'static [fn(&str) -> usize] {
        match self {
            Self::Default => &[punctuation_runs, gpt2, number_runs, digit_triples],
            Self::Gpt2 => &[gpt2],
            Self::SmolLm => &[single_numbers, gpt2],
            Self::Llama3 | Self::Smaug => &[llama3],
            Self::Qwen2 => &[qwen2],
        }
    }
}

/// The most cutters that a pre-tokenizer chains.
const MAX_CUTTERS: usize = 4;

/// The words of a text, in order; together they are the text.
pub(super) struct Words<'a> {
    cutters: &'static [fn(&str) -> usize],
    text: &'a str,
    position: usize,
    /// Where the current piece of each cutter ends.
    ends: [usize; MAX_CUTTERS],
}

impl<'a> Words<'a> {
    pub(super) fn new(pre: PreTokenizer, text: &'a str) -> Self {
        Words {
            cutters: pre.cutters(),
            text,
            position: 0,
            ends: [0; MAX_CUTTERS],
        }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let start = self.position;
        if start >= self.text.len() {
            return None;
        }
        let mut end = self.text.len();
        for (cut, piece_end) in self.cutters.iter().zip(&mut self.ends) {
            if *piece_end <= start {
                *piece_end = start + cut(&self.text[start..end]);
            }
            end = *piece_end;
        }
        self.position = end;
        Some(&self.text[start..end])
    }
}

/// What the regular expressions tell apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
    /// Everything else, unassigned code points included.
    Other,
}

fn class(character: char) -> Class {
    if character.is_ascii() {
        return match character {
            'a'..='z' | 'A'..='Z' => Class::Letter,
            '0'..='9' => Class::Number,
            '\t'..='\r' | ' ' => Class::Space,
            _ => Class::Other,
        };
    }
    match character.general_category_group() {
        GeneralCategoryGroup::Letter => Class::Letter,
        GeneralCategoryGroup::Number => Class::Number,
        // Unicode's White_Space, which is what \s means to HF's engine (Oniguruma): with U+0085
        // and the no-break spaces, without the zero-width ones.
        _ if character.is_whitespace() => Class::Space,
        _ => Class::Other,
    }
}

fn is_newline(character: char) -> bool {
    matches!(character, '\r' | '\n')
}

/// The bytes of the longest prefix whose characters all satisfy `accept`.
fn span(text: &str, accept: impl Fn(char) -> bool) -> usize {
    text.find(|character| !accept(character))
        .unwrap_or(text.len())
}

fn span_of(text: &str, wanted: Class) -> usize {
    span(text, |character| class(character) == wanted)
}

/// The first piece of a text cut into runs of `\p{N}` and the rest.
fn number_runs(text: &str) -> usize {
    match text.chars().next().map(class) {
        Some(Class::Number) => span_of(text, Class::Number),
        _ => span(text, |character| class(character) != Class::Number),
    }
}

/// The first piece of a text cut into single `\p{N}` and the rest.
fn single_numbers(text: &str) -> usize {
    match text.chars().next() {
        Some(first) if class(first) == Class::Number => first.len_utf8(),
        _ => span(text, |character| class(character) != Class::Number),
    }
}

/// The first piece of a text cut into runs of `[\p{P}$+<=>^~|]` and the rest.
fn punctuation_runs(text: &str) -> usize {
    let is_mark = |character: char| match character {
        '$' | '+' | '<' | '=' | '>' | '^' | '~' | '|' => true,
        '`' => false,
        _ if character.is_ascii() => character.is_ascii_punctuation(),
        _ => character.general_category_group() == GeneralCategoryGroup::Punctuation,
    };
    match text.chars().next() {
        Some(first) if is_mark(first) => span(text, is_mark),
        _ => span(text, |character| !is_mark(character)),
    }
}

/// The first piece of a text cut into `[0-9][0-9][0-9]` and the rest.
fn digit_triples(text: &str) -> usize {
    let triple = text
        .as_bytes()
        .windows(3)
        .position(|window| window.iter().all(u8::is_ascii_digit));
    match triple {
        Some(0) => 3,
        Some(position) => position,
        None => text.len(),
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
fn gpt2(text: &str) -> usize {
    if let Some(length) = contraction(text, false) {
        return length;
    }
    let (space, rest) = match text.strip_prefix(' ') {
        Some(rest) => (1, rest),
        None => (0, text),
    };
    match rest.chars().next().map(class) {
        Some(wanted) if wanted != Class::Space => space + span_of(rest, wanted),
        _ => spaces(text),
    }
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
fn llama3(text: &str) -> usize {
    modern(text, 3)
}

/// As Llama 3, but with `\p{N}` for `\p{N}{1,3}`.
fn qwen2(text: &str) -> usize {
    modern(text, 1)
}

fn modern(text: &str, max_digits: usize) -> usize {
    if let Some(length) = contraction(text, true) {
        return length;
    }
    let Some(first) = text.chars().next() else {
        return 0;
    };
    let first_class = class(first);
    let rest = &text[first.len_utf8()..];
    match first_class {
        Class::Letter => return span_of(text, Class::Letter),
        Class::Number => return numbers(text, max_digits),
        _ if is_newline(first) => {}
        _ => {
            let letters = span_of(rest, Class::Letter);
            if letters > 0 {
                return first.len_utf8() + letters;
            }
        }
    }
    let space = usize::from(first == ' ');
    let others = span_of(&text[space..], Class::Other);
    if others > 0 {
        let end = space + others;
        return end + span(&text[end..], is_newline);
    }
    let run = span_of(text, Class::Space);
    match text[..run].rfind(is_newline) {
        Some(last) => last + 1,
        None => spaces(text),
    }
}

/// `\p{N}{1,max}`
fn numbers(text: &str, max: usize) -> usize {
    text.chars()
        .take(max)
        .take_while(|&character| class(character) == Class::Number)
        .map(char::len_utf8)
        .sum()
}

/// `\s+(?!\S)|\s+`: a run of white space leaves its last character to the word that follows, unless
/// it is the only one.
fn spaces(text: &str) -> usize {
    let run = span_of(text, Class::Space);
    if run == text.len() {
        return run;
    }
    let last = text[..run].chars().next_back().map_or(0, char::len_utf8);
    if run > last { run - last } else { run }
}

/// `'s|'t|'re|'ve|'m|'ll|'d`. Ignoring case, the long s (U+017F) is an s too: HF's engine folds by
/// Unicode's rules.
fn contraction(text: &str, ignore_case: bool) -> Option<usize> {
    let mut rest = text.strip_prefix('\'')?.chars();
    let mut next = || {
        rest.next().map(|character| match character {
            'ſ' if ignore_case => ('s', 2),
            _ if ignore_case => (character.to_ascii_lowercase(), 1),
            _ => (character, 1),
        })
    };
    let (first, bytes) = next()?;
    match first {
        's' | 't' | 'm' | 'd' => Some(1 + bytes),
        'r' | 'v' if next()?.0 == 'e' => Some(3),
        'l' if next()?.0 == 'l' => Some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pre: PreTokenizer, text: &str) -> Vec<&str> {
        let words: Vec<&str> = Words::new(pre, text).collect();
        assert_eq!(words.concat(), text);
        words
    }

    #[test]
    fn gpt2_words() {
        let cut = |text| cut(PreTokenizer::Gpt2, text);
        assert_eq!(
            cut("I'll say: don't!"),
            ["I", "'ll", " say", ":", " don", "'t", "!"]
        );
        assert_eq!(cut("WE'LL"), ["WE", "'", "LL"]);
        assert_eq!(cut("'re've'x"), ["'re", "'ve", "'", "x"]);
        assert_eq!(cut("a   b"), ["a", "  ", " b"]);
        assert_eq!(cut("a\t\tb \n"), ["a", "\t", "\t", "b", " \n"]);
        assert_eq!(cut(" 123 x5"), [" 123", " x", "5"]);
        assert_eq!(cut("  "), ["  "]);
        assert_eq!(cut(""), [""; 0]);
        assert_eq!(cut("x\u{85}y\u{a0}z"), ["x", "\u{85}", "y", "\u{a0}", "z"]);
        // A zero-width space and an unassigned code point are no white space.
        assert_eq!(
            cut("a\u{200b}b \u{378}!"),
            ["a", "\u{200b}", "b", " \u{378}!"]
        );
        // A combining accent is neither letter nor number.
        assert_eq!(cut("e\u{301}a"), ["e", "\u{301}", "a"]);
    }

    #[test]
    fn smollm_words() {
        let cut = |text| cut(PreTokenizer::SmolLm, text);
        assert_eq!(cut("in 2024!"), ["in", " ", "2", "0", "2", "4", "!"]);
        assert_eq!(cut("a  1"), ["a", "  ", "1"]);
        assert_eq!(cut("½٣"), ["½", "٣"]);
        assert_eq!(cut("1's"), ["1", "'s"]);
    }

    #[test]
    fn default_words() {
        let cut = |text| cut(PreTokenizer::Default, text);
        assert_eq!(cut("it's (a)"), ["it", "'", "s", " ", "(", "a", ")"]);
        assert_eq!(cut("x 12345"), ["x", " ", "123", "45"]);
        assert_eq!(cut("a`b |="), ["a", "`", "b", " ", "|="]);
        assert_eq!(cut("१२123४"), ["१२", "123", "४"]);
        assert_eq!(cut("a «b» 。"), ["a", " ", "«", "b", "»", " ", "。"]);
    }

    #[test]
    fn llama3_words() {
        let cut = |text| cut(PreTokenizer::Llama3, text);
        assert_eq!(cut("We'LL GO'S"), ["We", "'LL", " GO", "'S"]);
        assert_eq!(cut("x'ſab"), ["x", "'ſ", "ab"]);
        assert_eq!(cut("12345"), ["123", "45"]);
        assert_eq!(cut(" 12"), [" ", "12"]);
        assert_eq!(cut("a!\r\n\r\nb"), ["a", "!\r\n\r\n", "b"]);
        assert_eq!(cut("a  \n \n  b"), ["a", "  \n \n", " ", " b"]);
        assert_eq!(cut("\tif(x)"), ["\tif", "(x", ")"]);
        assert_eq!(cut("a\nb"), ["a", "\n", "b"]);
        assert_eq!(cut(" \u{301}a ?"), [" \u{301}", "a", " ?"]);
        assert_eq!(cut("x "), ["x", " "]);
        assert_eq!(cut("'r'v'l"), ["'r", "'v", "'l"]);
    }

    #[test]
    fn qwen2_words() {
        let cut = |text| cut(PreTokenizer::Qwen2, text);
        assert_eq!(cut("a 123"), ["a", " ", "1", "2", "3"]);
        assert_eq!(cut("DON'T"), ["DON", "'T"]);
    }

    #[test]
    fn unknown_pre_tokenizers_are_refused() {
        let error = PreTokenizer::parse(Some("deepseek-v3")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("deepseek-v3") && text.contains("smollm"),
            "{text}"
        );
        assert_eq!(PreTokenizer::parse(None).unwrap(), PreTokenizer::Default);
    }
}
