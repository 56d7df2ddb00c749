//! Chat templates: a conversation written as the text that the model was trained on.
//!
//! A template is a Jinja program from the model's file, so it is not trusted: its work and its depth
//! are bounded, it sees nothing but the conversation and the date, and its failures are errors.

#[cfg(unix)]
mod clock;
mod guard;
mod json;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State, context};

use crate::error::{Error, Result};
use crate::gguf::Metadata;
use crate::tokenizer::Tokenizer;

const NAME: &str = "chat_template";

/// The work that a rendering may do, in instructions and in pieces of 64 bytes: some for the
/// template itself, some for each message, some for each byte of them. Real templates need a tenth.
const BASE_FUEL: u64 = 100_000;
const FUEL_PER_MESSAGE: u64 = 1_000;
/// For templates that look through all messages for each of them: so much for a pair, and at most this for all, since
/// fuel wants stack too.
const FUEL_PER_PAIR: u64 = 16;
const FUEL_FOR_PAIRS: u64 = 1_000_000;
const BYTES_PER_FUEL: u64 = 4;

/// How deep a template may nest; each level costs stack.
const DEPTH: usize = 100;

/// One turn of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks: usually "system", "user" or "assistant".
    pub role: &'a str,
    /// What is said.
    pub content: &'a str,
}

/// The chat template of a file. It is read-only and may be shared by threads.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads the file's template, if it has one.
    ///
    /// # Errors
    /// [`Error::Template`] where it is broken or too long, [`Error::Format`] where its key is no text.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(source) = metadata.chat_template()? else {
            return Ok(None);
        };
        let name = |id: Option<u32>| -> Result<String> {
            let bytes = id.map_or(Ok(&[][..]), |id| tokenizer.token_bytes(id, true))?;
            Ok(String::from_utf8_lossy(bytes).into_owned())
        };
        Self::new(source, name(tokenizer.bos())?, name(tokenizer.eos())?).map(Some)
    }

    /// Makes a template of `source`; `bos_token` and `eos_token` are the names that it may use.
    ///
    /// # Errors
    /// [`Error::Template`] where it is broken or too long.
    pub fn new(source: &str, bos_token: String, eos_token: String) -> Result<Self> {
        let environment = guard::compiling(source, || compile(source))?;
        Ok(ChatTemplate {
            environment,
            bos_token,
            eos_token,
        })
    }

    /// Writes a conversation as the model's text. With `add_generation_prompt` it ends where the
    /// assistant is to speak. The text names control tokens: encode it with `parse_special`.
    ///
    /// # Errors
    /// [`Error::Template`] where it fails, refuses the conversation or works too much; [`Error::Thread`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let fuel = fuel(messages);
        guard::rendering(fuel, || {
            let messages: Vec<Value> = messages
                .iter()
                .map(|message| context! { role => message.role, content => message.content })
                .collect();
            let mut environment = self.environment.clone();
            environment.set_fuel(Some(fuel));
            let template = environment
                .get_template(NAME)
                .map_err(|error| broken(&error))?;
            template
                .render(context! {
                    messages,
                    add_generation_prompt,
                    // Defined, as there, and none.
                    tools => (),
                    documents => (),
                    bos_token => self.bos_token.as_str(),
                    eos_token => self.eos_token.as_str(),
                })
                .map_err(|error| broken(&error))
        })
    }
}

fn fuel(messages: &[Message]) -> u64 {
    let bytes: usize = messages
        .iter()
        .map(|message| message.role.len() + message.content.len())
        .sum();
    let messages = messages.len() as u64;
    let pairs = messages.saturating_mul(messages);
    messages
        .saturating_mul(FUEL_PER_MESSAGE)
        .saturating_add(pairs.saturating_mul(FUEL_PER_PAIR).min(FUEL_FOR_PAIRS))
        .saturating_add(bytes as u64 / BYTES_PER_FUEL)
        .saturating_add(BASE_FUEL)
}

/// Sets up the engine as HF's transformers set up Jinja.
fn compile(source: &str) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| broken(&error))?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(method);
    // They indent what they print, which takes time in the cube of its depth and is not counted.
    environment.add_filter("pprint", refused);
    environment.add_function("debug", refused);
    environment.add_function("raise_exception", raise_exception);
    // Templates that find no clock write the date that their model knows.
    #[cfg(unix)]
    environment.add_function("strftime_now", clock::strftime_now);
    environment.add_filter("tojson", json::tojson);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.set_recursion_limit(DEPTH);
    environment
        .add_template_owned(NAME, as_engine_reads_it(source))
        .map_err(|error| broken(&error))?;
    Ok(environment)
}

/// As in Jinja2, where none cannot be iterated.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// As in Jinja2: what has a length and items.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map => true,
        // A part of a list, or a range, but not what comes one by one.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// Ends of lines as Jinja2 has them, and `{% generation %}`, with which transformers mark what is trained on, as a
/// condition that holds; of the same length, so that errors name the right line.
fn as_engine_reads_it(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut from = 0;
    while let Some(start) = text[from..].find("{%") {
        from += start + 2;
        let inner = text[from..].trim_start_matches(['-', '+']).trim_start();
        for (word, instead) in [
            ("generation", "if true   "),
            ("endgeneration", "endif        "),
        ] {
            let Some(after) = inner.strip_prefix(word) else {
                continue;
            };
            if after
                .trim_start()
                .trim_start_matches(['-', '+'])
                .starts_with("%}")
            {
                let at = text.len() - inner.len();
                text.replace_range(at..at + word.len(), instead);
                break;
            }
        }
    }
    text
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

/// Marks the errors that a template raises on purpose.
const RAISED: &str = "the template refuses the conversation: ";

fn refused(_: Rest<Value>) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        "pprint and debug are not supported",
    ))
}

/// Python's methods of texts, lists and dictionaries.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    // The engine makes room for the width of a field before it asks whether the fuel pays for it. A width stands in the
    // field, as digits behind a colon.
    if name == "format"
        && let Some(text) = value.as_str()
    {
        let fields = text.split('{').skip(1);
        let formats = fields.filter_map(|field| Some(field.split('}').next()?.split_once(':')?.1));
        let numbers = formats.flat_map(|format| format.split(|c: char| !c.is_ascii_digit()));
        let widths = numbers.filter(|digits| !digits.is_empty());
        let bytes = widths.fold(0u64, |sum, digits| {
            sum.saturating_add(digits.parse().unwrap_or(u64::MAX))
        });
        state.consume_fuel(bytes / 16)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    let text = format!("{RAISED}{message}");
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
}

/// One sentence about an error of the template engine.
fn broken(error: &minijinja::Error) -> Error {
    if let Some(detail) = error.detail()
        && detail.starts_with(RAISED)
    {
        return Error::template(detail);
    }
    let line = error
        .line()
        .map_or(String::new(), |line| format!(" in line {line}"));
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "it does more work than is allowed".to_owned(),
        kind => match error.detail() {
            Some(detail) => format!("{kind}: {detail}"),
            None => kind.to_string(),
        },
    };
    Error::template(format_args!("the file's template failed{line}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TALK: [Message<'static>; 2] = [
        Message {
            role: "user",
            content: " Hi <b>&amp; ",
        },
        Message {
            role: "assistant",
            content: "Hello",
        },
    ];

    fn render(source: &str) -> Result<String> {
        ChatTemplate::new(source, "<s>".into(), "</s>".into())?.render(&TALK, true)
    }

    fn failure(source: &str) -> String {
        match render(source) {
            Err(Error::Template(text)) => text.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn chatml_as_smollm_has_it() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        assert_eq!(
            render(source).unwrap(),
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n Hi <b>&amp; <|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn llama2_with_python_methods() {
        let source = "{{ bos_token }}\n{%- for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content.strip() }} [/INST]\n  {%- else %} {{ m.content.upper() }} {{ eos_token }}\n  {%- endif %}\n{%- endfor %}\n";
        assert_eq!(
            render(source).unwrap(),
            "<s>[INST] Hi <b>&amp; [/INST] HELLO </s>"
        );
    }

    #[test]
    fn usual_features() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% if m.content.startswith('He') %}{% set ns.n = ns.n + 1 %}{% continue %}{% endif %}{% endfor %}{{ ns.n }}{{ tools is defined and tools is none }}{{ messages[-1] | tojson }}{{ messages[0].content | trim | length }}";
        let text = render(source).unwrap();
        assert!(
            text.starts_with("1True") || text.starts_with("1true"),
            "{text}"
        );
        assert!(text.contains("\"Hello\"") && text.ends_with("11"), "{text}");
    }

    #[test]
    fn failures_are_sentences() {
        assert_eq!(
            failure("{{ raise_exception('Roles must alternate') }}"),
            "the template refuses the conversation: Roles must alternate"
        );
        assert!(failure("\n{% if %}").contains("line 2"));
        assert!(failure("{{ now() }}").contains("now"));
        assert!(failure("{{ messages | nonsense }}").contains("nonsense"));
    }

    #[test]
    fn depth_does_not_exhaust_the_stack() {
        for (wrap, end) in [
            ("[ns.x]", "{{ ns.x }}"),
            ("{'a': ns.x}", "{{ ns.x | tojson }}"),
            ("[ns.x]", "{{ [ns.x, 1] | unique | list }}"),
            ("{'a': ns.x}", "{{ ns.x == ns.x }}"),
        ] {
            // The last runs out of fuel, half built.
            for depth in [1_000, 30_000] {
                let build = format!(
                    "{{% set ns = namespace(x=[1]) %}}{{% for i in range({depth}) %}}{{% set ns.x = {wrap} %}}{{% endfor %}}"
                );
                // Whether it is refused does not matter, only that it returns.
                let _ = render(&(build + end));
            }
        }
        for link in [
            "+1", ".a", "|e", "()", "-1", "~1", "[0]", " is odd", " or 1", "**1",
        ] {
            let chain = link.repeat(10_000 / link.len());
            let _ = render(&format!("{{{{ a{chain} }}}}"));
        }
        // Views of views: slow to build (each looks through all), and the deepest for their fuel.
        let _ = render(
            "{% set ns = namespace(x=[1]) %}{% for i in range(4000) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x | list }}",
        );
        let _ = render(&format!("{{{{ {}1 }}}}", "-".repeat(30_000)));
        let _ = render(&format!(
            "{{% if a %}}{}{{% endif %}}",
            "{%elif a%}".repeat(3_000)
        ));
        failure("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}");
    }

    #[test]
    fn hostile_templates_end() {
        let endless =
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        assert!(failure(endless).contains("more work"));
        let bomb = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}";
        failure(bomb);
        failure("{{ 'x' * 1000000000000 }}");
        failure("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
        failure(&format!("{{{{ {}1", "(".repeat(100_000)));
        failure(&"{% if true %}".repeat(10_000));
        failure("{% include 'chat_template' %}");
        // Widths that would take terabytes.
        for field in [
            "{:10000000000000}",
            "{:.99999999999999999999f}",
            "{:é^1000000000}",
        ] {
            let told = failure(&format!("{{{{ '{field}'.format(1.5) }}}}"));
            assert!(told.contains("more work"), "{field}: {told}");
        }
        // Other numbers are none.
        let date = "{{ '20241231999 {0} {1:4}|'.format('a', 'b') }}";
        assert_eq!(render(date).unwrap(), "20241231999 a b   |");
        // What prints a deep value prettily takes time in the cube of its depth.
        let deep = "{% set ns = namespace(x=[1]) %}{% for i in range(8000) %}{% set ns.x = [ns.x] %}{% endfor %}";
        assert!(failure(&format!("{deep}{{{{ ns.x | pprint }}}}")).contains("pprint"));
        assert!(failure(&format!("{deep}{{{{ debug() }}}}")).contains("debug"));
    }

    /// A template that looks through all messages for each of them, as Gemma's does.
    #[test]
    fn long_conversations_have_their_work() {
        let source = "{% for m in messages %}{% set ns = namespace(n=0) %}{% for o in messages %}{% if o.role == m.role %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}{% endfor %}{{ messages | length }}";
        let template = ChatTemplate::new(source, String::new(), String::new()).unwrap();
        for count in [2, 100, 250] {
            let talk = vec![TALK[0]; count];
            assert_eq!(template.render(&talk, true).unwrap(), count.to_string());
        }
    }

    /// As `json.dumps` of Python 3.12 writes them.
    #[test]
    fn json_has_pythons_arguments() {
        for (arguments, expected) in [
            ("", r#"{"b": [1, true], "a": "é😀"}"#),
            ("sort_keys=true", r#"{"a": "é😀", "b": [1, true]}"#),
            ("separators=(',', ':')", r#"{"b":[1,true],"a":"é😀"}"#),
            (
                "ensure_ascii=true",
                r#"{"b": [1, true], "a": "\u00e9\ud83d\ude00"}"#,
            ),
            (
                "indent=1, separators=none",
                "{\n \"b\": [\n  1,\n  true\n ],\n \"a\": \"é😀\"\n}",
            ),
        ] {
            let source = format!("{{{{ {{'b': [1, true], 'a': 'é😀'}} | tojson({arguments}) }}}}");
            assert_eq!(render(&source).unwrap(), expected, "{arguments}");
        }
        failure("{{ 1 | tojson(separators=(',',)) }}");
        failure("{{ 1 | tojson(separators=(',', ':', ';')) }}");
        assert!(failure("{{ 1 | tojson(sorted=true) }}").contains("sorted"));
    }

    /// What looks like the namespace and is none: prose in a text, and a name that is given anew.
    #[test]
    fn names_that_are_no_namespaces() {
        assert_eq!(
            render("{% set n = 'x' %}{{ \"namespace \" + n }}{{ 'namespace' }}").unwrap(),
            "namespace xnamespace"
        );
        let anew = "{% set last = namespace(value=false) %}{{ last.value }}{% set last = 3 %}";
        assert_eq!(render(anew).unwrap().to_lowercase(), "false");
        for inside in [
            "{% set ns = namespace() %}{% set ns = [ns] %}",
            "{% set ns = namespace() %}{% set ns.a = [ns] %}",
            "{% set f = namespace %}",
        ] {
            assert!(failure(inside).contains("other than by"), "{inside}");
        }
    }
}
