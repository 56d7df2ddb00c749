//! A machine for the pickles that hold PyTorch state dicts.
//!
//! Python's pickle is a program that may import and call anything. This machine knows ordered
//! dictionaries, tensors and their storages; at any other import it stops and names it. Values
//! are small handles into arenas, so nothing nests, nothing is copied twice, and memory stays in
//! proportion to the pickle.

use std::collections::HashMap;
use std::ops::Range;

use super::source::Dtype;
use crate::error::{Error, Result};

/// A state dict's pickle has about 200 bytes a tensor.
pub(super) const MAX_PICKLE_BYTES: usize = 16 << 20;
/// Dictionaries, lists, tuples and tensors in one pickle.
const MAX_OBJECTS: usize = 1 << 20;
/// Values on the stack at once.
const MAX_STACK: usize = 1 << 20;
/// Arguments of a call that are looked at, dimensions of a tensor, and bytes of a storage's key: what is made by a
/// short call must be short, or a long list that is named again and again would be copied as often.
const MAX_ARGUMENTS: usize = 4;
const MAX_DIMENSIONS: usize = 8;
const MAX_KEY: usize = 256;
/// Tensors of a state dict, as many as a GGUF file may have, and bytes of a name: one that is named again and again
/// is copied as often too.
const MAX_TENSORS: usize = 1 << 16;
const MAX_NAME: usize = 1024;

/// Where training scripts keep the model in a larger dictionary.
const WRAPPING_KEYS: [&str; 4] = ["state_dict", "model", "module", "model_state_dict"];

/// A tensor as a pickle describes it: a window on a storage that lies elsewhere in the archive.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PickledTensor {
    pub dtype: Dtype,
    /// The storage's key in the archive.
    pub storage: String,
    /// Where the tensor begins in it, in numbers.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// The tensors of a state dict, and how much was in it besides.
#[derive(Debug, Default)]
pub(super) struct StateDict {
    pub tensors: Vec<(String, PickledTensor)>,
    pub skipped: usize,
    /// The key of the first of those, where it is text.
    pub first_skipped: Option<String>,
}

impl StateDict {
    fn skip(&mut self, key: Option<&str>) {
        if self.skipped == 0 {
            self.first_skipped = key.map(str::to_owned);
        }
        self.skipped += 1;
    }
}

/// Interprets a pickle.
pub(super) fn read_state_dict(bytes: &[u8]) -> Result<StateDict> {
    if bytes.len() > MAX_PICKLE_BYTES {
        return Err(refuse(format!(
            "has {} bytes, more than a state dict needs ({MAX_PICKLE_BYTES})",
            bytes.len()
        )));
    }
    let mut machine = Machine {
        bytes,
        ..Machine::default()
    };
    let top = machine.run()?;
    machine.state_dict(top)
}

fn refuse(what: String) -> Error {
    Error::convert(format_args!("the pickle {what}; refused"))
}

fn damaged() -> Error {
    Error::convert("the pickle is damaged: an instruction lacks its operands")
}

/// What a pickle may import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn import(module: &str, name: &str) -> Result<Global> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::Storage(Dtype::BF16),
            ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
            ("torch", "LongStorage") => Global::Storage(Dtype::Other("I64")),
            ("torch", "IntStorage") => Global::Storage(Dtype::Other("I32")),
            ("torch", "ShortStorage") => Global::Storage(Dtype::Other("I16")),
            ("torch", "CharStorage") => Global::Storage(Dtype::Other("I8")),
            ("torch", "ByteStorage") => Global::Storage(Dtype::Other("U8")),
            ("torch", "BoolStorage") => Global::Storage(Dtype::Other("BOOL")),
            _ => {
                // The name is the file's own; it must not garble the sentence.
                let shown: String = format!("{module}.{name}")
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(100)
                    .collect();
                return Err(refuse(format!("tries to import {shown}")));
            }
        })
    }
}

/// A value: small, copied freely, everything large by its place in an arena.
#[derive(Debug, Clone, Copy)]
enum Item {
    None,
    Bool,
    Int(i64),
    Float,
    /// Text or bytes: a range of the pickle.
    Text(usize, usize),
    /// A tuple or a list.
    Sequence(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Item>,
    /// Stack heights where a MARK stands.
    marks: Vec<usize>,
    memo: HashMap<usize, Item>,
    sequences: Vec<Vec<Item>>,
    dicts: Vec<Vec<(Item, Item)>>,
    storages: Vec<(Dtype, Range<usize>)>,
    tensors: Vec<PickledTensor>,
    /// Entries that dictionaries were made with.
    entries: usize,
}

impl Machine<'_> {
    /// Runs to STOP and returns the value on top.
    fn run(&mut self) -> Result<Item> {
        loop {
            let op = self.byte()?;
            match op {
                b'.' => return self.pop(),
                b'c' | b'i' | 0x93 => self.import(op)?,
                b'R' | 0x81 => self.call()?,
                b'b' => self.build()?,
                b'Q' => self.persistent()?,
                b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember(op)?,
                b'(' | b'0' | b'1' | b'2' => self.shuffle(op)?,
                b't' | b'l' | b'd' | b')' | b']' | b'}' | 0x85..=0x87 => self.collect(op)?,
                b'a' | b'e' | b's' | b'u' => self.extend(op)?,
                _ => self.constant(op)?,
            }
        }
    }

    /// Numbers, text, and what only frames the stream.
    fn constant(&mut self, op: u8) -> Result<()> {
        let item = match op {
            0x80 => {
                let protocol = self.byte()?;
                if !(2..=5).contains(&protocol) {
                    return Err(refuse(format!("is of protocol {protocol}, not 2 to 5")));
                }
                return Ok(());
            }
            0x95 => {
                self.take(8)?;
                return Ok(());
            }
            b'N' => Item::None,
            0x88 | 0x89 => Item::Bool,
            b'K' => Item::Int(self.number(1)? as i64),
            b'M' => Item::Int(self.number(2)? as i64),
            // Four bytes, signed.
            b'J' => Item::Int(i64::from(self.number(4)? as u32 as i32)),
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                Item::Float
            }
            b'U' | b'C' | 0x8c => self.text(1)?,
            b'T' | b'B' | b'X' => self.text(4)?,
            0x8d | 0x8e => self.text(8)?,
            _ => {
                return Err(refuse(format!(
                    "uses the instruction 0x{op:02x}, which no state dict needs"
                )));
            }
        };
        self.push(item)
    }

    fn import(&mut self, op: u8) -> Result<()> {
        let (module, name) = if op == 0x93 {
            let name = self.pop()?;
            (self.pop()?, name)
        } else {
            (self.line()?, self.line()?)
        };
        let global = Global::import(self.as_text(module)?, self.as_text(name)?)?;
        if op == b'i' {
            return Err(refuse("instantiates a class in the old way".into()));
        }
        self.push(Item::Global(global))
    }

    /// Calls the few things that may be called.
    fn call(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let callee = self.pop()?;
        let Item::Sequence(arguments) = arguments else {
            return Err(damaged());
        };
        let arguments = self.sequences.get(arguments).map_or(&[][..], Vec::as_slice);
        let arguments = arguments[..arguments.len().min(MAX_ARGUMENTS)].to_vec();
        let result = match callee {
            Item::Global(Global::OrderedDict) => self.ordered_dict(&arguments)?,
            Item::Global(Global::RebuildTensor) => self.tensor(&arguments)?,
            Item::Global(Global::RebuildParameter) => match arguments.first() {
                Some(&tensor @ Item::Tensor(_)) => tensor,
                _ => return Err(damaged()),
            },
            _ => return Err(refuse("calls something that is no tensor".into())),
        };
        self.push(result)
    }

    fn ordered_dict(&mut self, arguments: &[Item]) -> Result<Item> {
        let mut entries = Vec::new();
        if let Some(&first) = arguments.first() {
            self.count_entries(self.sequence(first)?.len())?;
            for &pair in self.sequence(first)? {
                match self.sequence(pair)? {
                    &[key, value] => entries.push((key, value)),
                    _ => return Err(damaged()),
                }
            }
        }
        self.new_dict(entries)
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, …)`
    fn tensor(&mut self, arguments: &[Item]) -> Result<Item> {
        let &[Item::Storage(storage), offset, size, stride, ..] = arguments else {
            return Err(damaged());
        };
        let (dtype, key) = self.storages.get(storage).cloned().ok_or_else(damaged)?;
        if key.len() > MAX_KEY {
            return Err(refuse(format!("names a storage by {} bytes", key.len())));
        }
        let tensor = PickledTensor {
            dtype,
            storage: self.as_text(Item::Text(key.start, key.end))?.to_string(),
            offset: as_size(offset)?,
            shape: self.sizes(size)?,
            strides: self.sizes(stride)?,
        };
        if tensor.shape.len() != tensor.strides.len() {
            return Err(damaged());
        }
        self.count_objects()?;
        self.tensors.push(tensor);
        Ok(Item::Tensor(self.tensors.len() - 1))
    }

    /// BUILD sets attributes. A state dict's only one is `_metadata`, which says nothing about
    /// its tensors.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.stack.last() {
            Some(Item::Dict(_)) => Ok(()),
            _ => Err(refuse(
                "sets attributes of something that is no dictionary".into(),
            )),
        }
    }

    /// `('storage', torch.FloatStorage, key, location, numbers)`
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let &[
            kind,
            Item::Global(Global::Storage(dtype)),
            Item::Text(start, end),
            ..,
        ] = self.sequence(id)?
        else {
            return Err(refuse(
                "refers to something outside that is no storage".into(),
            ));
        };
        if self.as_text(kind)? != "storage" {
            return Err(refuse(
                "refers to something outside that is no storage".into(),
            ));
        }
        self.count_objects()?;
        self.storages.push((dtype, start..end));
        self.push(Item::Storage(self.storages.len() - 1))
    }

    fn remember(&mut self, op: u8) -> Result<()> {
        let index = match op {
            b'q' | b'h' => self.number(1)? as usize,
            b'r' | b'j' => self.number(4)? as usize,
            _ => self.memo.len(),
        };
        if matches!(op, b'h' | b'j') {
            let item = self.memo.get(&index).copied().ok_or_else(damaged)?;
            return self.push(item);
        }
        let top = self.stack.last().copied().ok_or_else(damaged)?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn shuffle(&mut self, op: u8) -> Result<()> {
        match op {
            b'(' => {
                if self.marks.len() >= MAX_STACK {
                    return Err(refuse("nests without end".into()));
                }
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop().map(|_| ()),
            b'1' => self.pop_mark().map(|_| ()),
            _ => {
                let top = self.stack.last().copied().ok_or_else(damaged)?;
                self.push(top)
            }
        }
    }

    /// Makes tuples, lists and dictionaries.
    fn collect(&mut self, op: u8) -> Result<()> {
        let items = match op {
            b')' | b']' | b'}' => Vec::new(),
            0x85..=0x87 => {
                let count = usize::from(op - 0x84);
                let at = self.stack.len().checked_sub(count).ok_or_else(damaged)?;
                if self.marks.last().is_some_and(|&mark| mark > at) {
                    return Err(damaged());
                }
                self.stack.split_off(at)
            }
            _ => self.pop_mark()?,
        };
        let item = if matches!(op, b'}' | b'd') {
            let entries = pairs(&items)?;
            self.count_entries(entries.len())?;
            self.new_dict(entries)?
        } else {
            self.count_objects()?;
            self.sequences.push(items);
            Item::Sequence(self.sequences.len() - 1)
        };
        self.push(item)
    }

    /// Adds to the list or dictionary below.
    fn extend(&mut self, op: u8) -> Result<()> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let target = self.stack.last().copied();
        match (op, target) {
            (b'a' | b'e', Some(Item::Sequence(at))) => {
                let list = self.sequences.get_mut(at).ok_or_else(damaged)?;
                list.extend(items);
            }
            (b's' | b'u', Some(Item::Dict(at))) => {
                let entries = pairs(&items)?;
                self.count_entries(entries.len())?;
                let dict = self.dicts.get_mut(at).ok_or_else(damaged)?;
                dict.extend(entries);
            }
            _ => return Err(damaged()),
        }
        Ok(())
    }

    /// The tensors of a dictionary; one that training scripts wrap around it is looked through.
    fn state_dict(&self, top: Item) -> Result<StateDict> {
        let Item::Dict(mut at) = top else {
            return Err(refuse("holds no dictionary of tensors".into()));
        };
        let entries = |at: usize| self.dicts.get(at).map_or(&[][..], Vec::as_slice);
        let mut state = StateDict::default();
        let tensors_here = |at| {
            entries(at)
                .iter()
                .any(|(_, v)| matches!(v, Item::Tensor(_)))
        };
        if !tensors_here(at) {
            for &(key, value) in entries(at) {
                let name = self.name(key)?;
                let wraps = name.is_some_and(|name| WRAPPING_KEYS.contains(&name));
                match value {
                    Item::Dict(inner) if wraps && tensors_here(inner) => at = inner,
                    _ => state.skip(name),
                }
            }
        }
        for &(key, value) in entries(at) {
            let name = self.name(key)?;
            let Item::Tensor(tensor) = value else {
                state.skip(name);
                continue;
            };
            let name = name.ok_or_else(|| refuse("names a tensor by what is no text".into()))?;
            if state.tensors.len() >= MAX_TENSORS {
                return Err(refuse(format!("names more than {MAX_TENSORS} tensors")));
            }
            let tensor = self.tensors.get(tensor).cloned().ok_or_else(damaged)?;
            state.tensors.push((name.to_owned(), tensor));
        }
        if state.tensors.is_empty() {
            return Err(refuse("holds no tensors".into()));
        }
        Ok(state)
    }

    /// A dictionary's key, where it is text.
    fn name(&self, key: Item) -> Result<Option<&str>> {
        let Item::Text(..) = key else {
            return Ok(None);
        };
        let name = self.as_text(key)?;
        match name.len() > MAX_NAME {
            true => Err(refuse(format!("has a key of {} bytes", name.len()))),
            false => Ok(Some(name)),
        }
    }

    fn new_dict(&mut self, entries: Vec<(Item, Item)>) -> Result<Item> {
        self.count_objects()?;
        self.dicts.push(entries);
        Ok(Item::Dict(self.dicts.len() - 1))
    }

    fn count_entries(&mut self, more: usize) -> Result<()> {
        self.entries += more;
        match self.entries > MAX_OBJECTS {
            true => Err(refuse(format!("makes more than {MAX_OBJECTS} entries"))),
            false => Ok(()),
        }
    }

    fn count_objects(&self) -> Result<()> {
        let objects =
            self.sequences.len() + self.dicts.len() + self.storages.len() + self.tensors.len();
        if objects < MAX_OBJECTS {
            Ok(())
        } else {
            Err(refuse(format!("makes more than {MAX_OBJECTS} objects")))
        }
    }

    fn push(&mut self, item: Item) -> Result<()> {
        if self.stack.len() >= MAX_STACK {
            return Err(refuse(format!("stacks more than {MAX_STACK} values")));
        }
        self.stack.push(item);
        Ok(())
    }

    fn pop(&mut self) -> Result<Item> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(damaged());
        }
        self.stack.pop().ok_or_else(damaged)
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Item>> {
        let mark = self.marks.pop().ok_or_else(damaged)?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn sequence(&self, item: Item) -> Result<&[Item]> {
        match item {
            Item::Sequence(at) => self
                .sequences
                .get(at)
                .map(Vec::as_slice)
                .ok_or_else(damaged),
            _ => Err(damaged()),
        }
    }

    fn sizes(&self, item: Item) -> Result<Vec<usize>> {
        let sizes = self.sequence(item)?;
        if sizes.len() > MAX_DIMENSIONS {
            return Err(refuse(format!(
                "has a tensor of {} dimensions",
                sizes.len()
            )));
        }
        sizes.iter().map(|&i| as_size(i)).collect()
    }

    fn as_text(&self, item: Item) -> Result<&str> {
        let Item::Text(start, end) = item else {
            return Err(damaged());
        };
        let bytes = self.bytes.get(start..end).ok_or_else(damaged)?;
        std::str::from_utf8(bytes).map_err(|_| damaged())
    }

    fn take(&mut self, count: usize) -> Result<Range<usize>> {
        let end = self.at.checked_add(count).ok_or_else(damaged)?;
        if end > self.bytes.len() {
            return Err(damaged());
        }
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.number(1)? as u8)
    }

    /// An unsigned little-endian number of `count` bytes, at most 8.
    fn number(&mut self, count: usize) -> Result<u64> {
        let range = self.take(count)?;
        let bytes = self.bytes.get(range).unwrap_or_default();
        Ok(bytes.iter().rev().fold(0, |n, &b| (n << 8) | u64::from(b)))
    }

    /// LONG1: a two's-complement number. One beyond 64 bits is nothing that a tensor has.
    fn long(&mut self) -> Result<Item> {
        let count = usize::from(self.byte()?);
        if count > 8 {
            self.take(count)?;
            return Ok(Item::None);
        }
        let value = self.number(count)?;
        let unused = 64 - 8 * count as u32;
        let signed = value.checked_shl(unused).unwrap_or(0) as i64;
        Ok(Item::Int(signed.checked_shr(unused).unwrap_or(0)))
    }

    fn text(&mut self, length_bytes: usize) -> Result<Item> {
        let length = usize::try_from(self.number(length_bytes)?).map_err(|_| damaged())?;
        let range = self.take(length)?;
        Ok(Item::Text(range.start, range.end))
    }

    /// Text up to the end of a line, as GLOBAL has it.
    fn line(&mut self) -> Result<Item> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|&b| b == b'\n').ok_or_else(damaged)?;
        let range = self.take(length)?;
        self.take(1)?;
        Ok(Item::Text(range.start, range.end))
    }
}

fn as_size(item: Item) -> Result<usize> {
    match item {
        Item::Int(n) => usize::try_from(n).map_err(|_| damaged()),
        _ => Err(damaged()),
    }
}

fn pairs(items: &[Item]) -> Result<Vec<(Item, Item)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    if rest.is_empty() {
        Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
    } else {
        Err(damaged())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `{'a': tensor}` as torch writes it, protocol 2, with a tensor of two numbers.
    fn small() -> Vec<u8> {
        let mut p = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01X\x01\x00\x00\x00a".to_vec();
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage");
        p.extend(b"ctorch\nBFloat16Storage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ");
        p.extend(b"K\x00K\x02\x85K\x01\x85\x89h\x00)RtRs.");
        p
    }

    #[test]
    fn a_small_state_dict() {
        let state = read_state_dict(&small()).unwrap();
        let tensor = PickledTensor {
            dtype: Dtype::BF16,
            storage: "0".into(),
            offset: 0,
            shape: vec![2],
            strides: vec![1],
        };
        assert_eq!(state.tensors, [("a".to_string(), tensor)]);
    }

    /// A list that is written once and named often is not copied as often.
    #[test]
    fn long_lists_are_not_copied_again_and_again() {
        let many = 100_000;
        // A tuple of that many numbers, remembered as 9; `call` is done with it that often.
        let calls = |before: &[u8], call: &[u8]| {
            let mut p = [b"\x80\x02(", &b"K\x01".repeat(many)[..], b"tq\x09"].concat();
            p.extend(before);
            p.extend(call.repeat(many));
            p.push(b'.');
            read_state_dict(&p).map(drop).unwrap_err().to_string()
        };
        let tensor = b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\x00\x00\x00storagectorch\nBFloat16Storage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQq\x020";
        let refused = calls(tensor, b"h\x01(h\x02K\x00h\x09h\x09tR0");
        assert!(refused.contains("dimensions"), "{refused}");
        let pairs = b"ccollections\nOrderedDict\nq\x01(";
        let pairs = [pairs, &b"K\x01K\x01\x86".repeat(1000)[..], b"tq\x03"].concat();
        let refused = calls(&pairs, b"h\x01h\x03\x85R0");
        assert!(refused.contains("entries"), "{refused}");
    }

    /// As for names; and what is no state dict's is left out, not damaged.
    #[test]
    fn long_names_are_not_copied_again_and_again() {
        let tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nBFloat16Storage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00K\x02\x85K\x01\x85tR";
        // A dictionary in which a key of so many bytes has a tensor so often.
        let dict = |bytes: u32, times: usize| {
            let mut p = b"\x80\x02X".to_vec();
            p.extend(bytes.to_le_bytes());
            p.extend(b"k".repeat(bytes as usize));
            p.extend([b"q\x010", &tensor[..], b"q\x020}("].concat());
            p.extend(b"h\x01h\x02".repeat(times));
            p.extend(b"u.");
            read_state_dict(&p)
        };
        assert_eq!(dict(1000, 3).unwrap().tensors.len(), 3);
        let refused = |bytes, times| dict(bytes, times).unwrap_err().to_string();
        assert!(refused(1 << 20, 3000).contains("a key of 1048576 bytes"));
        assert!(refused(8, MAX_TENSORS + 1).contains("more than 65536 tensors"));
        // A number as a key, and one of ten bytes as a value.
        let odd = [
            b"\x80\x02}K\x01\x8a\x0a0123456789sX\x01\x00\x00\x00a",
            &tensor[..],
            b"s.",
        ]
        .concat();
        let state = read_state_dict(&odd).unwrap();
        assert_eq!(
            (state.tensors.len(), state.skipped, state.first_skipped),
            (1, 1, None)
        );
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_survived() {
        let whole = small();
        for end in 0..whole.len() {
            assert!(read_state_dict(&whole[..end]).is_err(), "{end}");
        }
        for at in 0..whole.len() {
            for value in 0..=255u8 {
                let mut changed = whole.clone();
                changed[at] = value;
                // Whatever it says, it must come back.
                let _ = read_state_dict(&changed);
            }
        }
    }

    #[test]
    fn imports_are_named_and_refused() {
        let cases: [(&[u8], &str); 5] = [
            (
                b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
                "os.system",
            ),
            (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
            (b"(X\x02\x00\x00\x00lsios\nsystem\n.", "os.system"),
            (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
            (b"\x80\x02ctorch\nload\n.", "torch.load"),
        ];
        for (pickle, name) in cases {
            let error = read_state_dict(pickle).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("cannot convert: the pickle tries to import {name}; refused")
            );
        }
    }

    #[test]
    fn floods_are_stopped() {
        let mut lists = b"\x80\x02".to_vec();
        lists.extend(std::iter::repeat_n(b']', MAX_OBJECTS + 1));
        let marks = vec![b'('; MAX_STACK + 1];
        let nones = vec![b'N'; MAX_STACK + 1];
        for flood in [lists, marks, nones] {
            assert!(
                read_state_dict(&flood)
                    .unwrap_err()
                    .to_string()
                    .ends_with("refused")
            );
        }
    }

    #[test]
    fn self_reference_and_signs_are_harmless() {
        // A list that holds itself, then a negative shape.
        assert!(read_state_dict(b"\x80\x02]q\x00h\x00a.").is_err());
        let mut negative = small();
        let at = negative.windows(3).position(|w| w == b"K\x02\x85").unwrap();
        negative.splice(at..at + 2, *b"J\xff\xff\xff\xff");
        assert!(read_state_dict(&negative).is_err());
        let mut machine = Machine {
            bytes: b"\x02\xff\xff",
            ..Machine::default()
        };
        assert!(matches!(machine.long(), Ok(Item::Int(-1))));
    }
}
