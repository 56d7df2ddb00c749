//! What a file may ask for. Real files stay far below; a file above is hostile or damaged.

/// Key-value pairs. Real files have some dozens; a pair costs about a hundred bytes of memory.
pub const MAX_METADATA_ENTRIES: u64 = 1 << 16;
/// Tensors. The largest published models have some thousands.
pub const MAX_TENSORS: u64 = 1 << 16;
/// Bytes of a key: what the GGUF specification allows.
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Bytes of a string value. The longest in real files is an embedded tokenizer of some tens of MB.
pub const MAX_STRING_BYTES: u64 = 1 << 26;
/// Elements of an array. The longest in real files are vocabularies and merges, below a million.
pub const MAX_ARRAY_LEN: u64 = 1 << 24;
/// Dimensions of a tensor: ggml's `GGML_MAX_DIMS`.
pub const MAX_DIMS: u32 = 4;
/// Bytes of a tensor's name that are read: ggml's `GGML_MAX_NAME`.
pub const MAX_NAME_BYTES: u64 = 64;
/// Bytes of a tensor's name that are written: ggml keeps one of its 64 for the final zero.
pub const MAX_WRITTEN_NAME_BYTES: usize = 63;
/// Alignment of tensor data. Files use 32; beyond a huge page it serves nobody.
pub const MAX_ALIGNMENT: u32 = 1 << 21;
/// Alignment where the file names none.
pub const DEFAULT_ALIGNMENT: u32 = 32;
