//! The types a tensor can have, and what a block of each looks like from outside.

/// How the weights of a tensor are stored. The names are those of ggml and GGUF.
#[allow(non_camel_case_types)] // Q4_K is the format's name; Q4K would be another one
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TensorType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    BF16,
    /// 32 weights: scale, 8-bit integers.
    Q8_0,
    /// 32 weights: scale, 4-bit integers around 8.
    Q4_0,
    /// 32 weights: scale and minimum, 4-bit integers.
    Q4_1,
    /// 32 weights: scale, 5-bit integers around 16.
    Q5_0,
    /// 32 weights: scale and minimum, 5-bit integers.
    Q5_1,
    /// 256 weights in 8 groups with 6-bit scales and minima, 4-bit integers.
    Q4_K,
    /// As [`TensorType::Q4_K`] with 5-bit integers.
    Q5_K,
    /// 256 weights in 16 groups with 8-bit scales, 6-bit integers around 32.
    Q6_K,
}

/// What is known of a type: its number in GGUF, its name, weights and bytes of a block.
struct Layout {
    id: u32,
    name: &'static str,
    len: usize,
    bytes: usize,
}

const fn layout(id: u32, name: &'static str, len: usize, bytes: usize) -> Layout {
    Layout {
        id,
        name,
        len,
        bytes,
    }
}

impl TensorType {
    /// Every type, in the order of their declaration.
    pub const ALL: [TensorType; 11] = [
        TensorType::F32,
        TensorType::F16,
        TensorType::BF16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q4_K,
        TensorType::Q5_K,
        TensorType::Q6_K,
    ];

    const fn layout(self) -> Layout {
        match self {
            TensorType::F32 => layout(0, "F32", 1, 4),
            TensorType::F16 => layout(1, "F16", 1, 2),
            TensorType::BF16 => layout(30, "BF16", 1, 2),
            TensorType::Q8_0 => layout(8, "Q8_0", 32, 2 + 32),
            TensorType::Q4_0 => layout(2, "Q4_0", 32, 2 + 16),
            TensorType::Q4_1 => layout(3, "Q4_1", 32, 2 + 2 + 16),
            TensorType::Q5_0 => layout(6, "Q5_0", 32, 2 + 4 + 16),
            TensorType::Q5_1 => layout(7, "Q5_1", 32, 2 + 2 + 4 + 16),
            TensorType::Q4_K => layout(12, "Q4_K", 256, 2 + 2 + 12 + 128),
            TensorType::Q5_K => layout(13, "Q5_K", 256, 2 + 2 + 12 + 32 + 128),
            TensorType::Q6_K => layout(14, "Q6_K", 256, 128 + 64 + 16 + 2),
        }
    }

    /// The type with this number in a GGUF file; `None` for those that this library does not read.
    pub fn from_gguf(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.gguf_id() == id)
    }

    /// The type's number in a GGUF file.
    pub const fn gguf_id(self) -> u32 {
        self.layout().id
    }

    /// The name, as ggml's tools print it: `"F32"`, `"Q4_0"`, ….
    pub const fn name(self) -> &'static str {
        self.layout().name
    }

    /// The type of this name, in upper or lower case.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|ty| ty.name().eq_ignore_ascii_case(name))
    }

    /// Weights in a block.
    pub const fn block_len(self) -> usize {
        self.layout().len
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.layout().bytes
    }

    /// Bytes of a row of `columns` weights; `None` when the row is not a whole number of blocks or
    /// the result does not fit a `usize`.
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if !columns.is_multiple_of(self.block_len()) {
            return None;
        }
        (columns / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether [`quantize_row`](super::quantize_row) can write the type.
    pub const fn can_encode(self) -> bool {
        matches!(
            self,
            TensorType::F32
                | TensorType::F16
                | TensorType::BF16
                | TensorType::Q8_0
                | TensorType::Q4_0
                | TensorType::Q4_1
        )
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of any type number that GGUF files are known to use, so that a refusal can say what a
/// file is made of.
pub(crate) fn ggml_type_name(id: u32) -> Option<&'static str> {
    if let Some(ty) = TensorType::from_gguf(id) {
        return Some(ty.name());
    }
    Some(match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return None,
    })
}
