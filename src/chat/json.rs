//! The filter `tojson` as HF's transformers define it: Python's `json.dumps`, not made safe for HTML
//! as the engine's own is.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use crate::order::sort_by;

/// The bytes of output that one unit of fuel pays.
const BYTES_PER_FUEL: usize = 64;

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Value> = options.get("separators")?;
    let usual = Value::from(vec![if indent.is_some() { "," } else { ", " }, ": "]);
    let separators = separators.filter(|value| !value.is_none()).unwrap_or(usual);
    let [comma, colon] = [0, 1].map(|at| separators.get_item_by_index(at).unwrap_or_default());
    let (Some(2), Some(comma), Some(colon)) = (separators.len(), comma.as_str(), colon.as_str())
    else {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson takes two separators",
        ));
    };
    let mut writer = Writer {
        state,
        indent: indent.map(|indent| indent.min(16)),
        comma,
        colon,
        is_sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        is_ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        paid: 0,
        out: String::new(),
    };
    options.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct Writer<'a, 'env> {
    state: &'a State<'a, 'env>,
    indent: Option<usize>,
    comma: &'a str,
    colon: &'a str,
    /// Whether dictionaries are written in the order of their keys.
    is_sorted: bool,
    /// Whether other characters are escaped.
    is_ascii: bool,
    /// The bytes that have been paid for.
    paid: usize,
    out: String,
}

impl Writer<'_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let fresh = self.out.len() - self.paid;
        self.paid = self.out.len();
        self.state
            .consume_fuel(1 + (fresh / BYTES_PER_FUEL) as u64)?;
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool if value.is_true() => self.out.push_str("true"),
            ValueKind::Bool => self.out.push_str("false"),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.items(value, depth, false)?,
            ValueKind::Map => self.items(value, depth, true)?,
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("a value of type {other} cannot be written as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn items(&mut self, value: &Value, depth: usize, is_map: bool) -> Result<(), Error> {
        self.out.push(if is_map { '{' } else { '[' });
        let mut empty = true;
        let mut items = value.try_iter()?;
        let mut sorted = Vec::new();
        let mut order: Vec<u32> = Vec::new();
        if is_map && self.is_sorted {
            sorted.extend(items.by_ref());
            order.extend(0..sorted.len() as u32);
            sort_by(&mut order, &|a, b| {
                sorted[a as usize].cmp(&sorted[b as usize])
            });
        }
        let sorted = order.into_iter().map(|at| sorted[at as usize].clone());
        for item in sorted.chain(items) {
            if !empty {
                self.out.push_str(self.comma);
            }
            empty = false;
            self.line(depth + 1);
            if is_map {
                self.string(&item.to_string());
                self.out.push_str(self.colon);
                self.value(&value.get_item(&item)?, depth + 1)?;
            } else {
                self.value(&item, depth + 1)?;
            }
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(if is_map { '}' } else { ']' });
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            let spaces = indent.saturating_mul(depth);
            self.out.extend(std::iter::repeat_n(' ', spaces));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..' ' => {
                    let code = u32::from(character);
                    self.out.push_str(&format!("\\u{code:04x}"));
                }
                _ if self.is_ascii && !character.is_ascii() => {
                    for code in character.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{code:04x}"));
                    }
                }
                _ => self.out.push(character),
            }
        }
        self.out.push('"');
    }
}
