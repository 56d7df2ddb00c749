//! Metadata values.

use super::Strings;

/// One value. The variants are GGUF's types.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants say it
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    U64(u64),
    I64(i64),
    F64(f64),
    Array(Array),
}

/// An array; all elements have one type. Arrays of arrays are not supported: no model file has any.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants say it
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Strings),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// GGUF's numbers of the value types.
pub(super) mod id {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// Applies a macro to every element type: variant, Rust type, number.
macro_rules! each_array_type {
    ($with:ident) => {
        $with! {
            (U8, u8, U8), (I8, i8, I8), (U16, u16, U16), (I16, i16, I16), (U32, u32, U32),
            (I32, i32, I32), (F32, f32, F32), (Bool, bool, BOOL), (String, String, STRING),
            (U64, u64, U64), (I64, i64, I64), (F64, f64, F64)
        }
    };
}

macro_rules! conversions {
    ($(($variant:ident, $type:ty, $id:ident)),*) => {
        $(
            impl From<$type> for Value {
                fn from(v: $type) -> Self {
                    Value::$variant(v)
                }
            }
            impl From<Vec<$type>> for Value {
                fn from(v: Vec<$type>) -> Self {
                    Value::Array(Array::$variant(v.into()))
                }
            }
        )*

        impl Value {
            /// GGUF's number of the value's type.
            pub(super) fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => id::$id,)*
                    Value::Array(_) => id::ARRAY,
                }
            }
        }

        impl Array {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(v) => v.len(),)*
                }
            }

            /// GGUF's number of the element type.
            pub(super) fn element_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => id::$id,)*
                }
            }
        }
    };
}
each_array_type!(conversions);

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Value::String(v.to_owned())
    }
}

impl From<Strings> for Value {
    fn from(v: Strings) -> Self {
        Value::Array(Array::String(v))
    }
}

impl From<Array> for Value {
    fn from(v: Array) -> Self {
        Value::Array(v)
    }
}

impl Array {
    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Value {
    /// The value as a whole number, of whatever integer type it is.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// What the value is, for sentences: "a whole number", "a string", ….
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::F32(_) | Value::F64(_) => "a floating-point number",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Array(Array::String(_)) => "an array of strings",
            Value::Array(Array::Bool(_)) => "an array of booleans",
            Value::Array(Array::F32(_) | Array::F64(_)) => "an array of floating-point numbers",
            Value::Array(_) => "an array of whole numbers",
            _ => "a whole number",
        }
    }
}
