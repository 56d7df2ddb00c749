//! What several tests need.
#![allow(dead_code)] // each test uses its part

pub mod allocator;
#[cfg(feature = "convert")]
pub mod cases;
pub mod raw;

use mor::gguf::{Gguf, GgufWriter, Metadata, TensorInfo, TensorPlan};
use std::path::{Path, PathBuf};

/// This repository: MOR_TEST_ROOT where the tests run on another machine than the one that built them
/// (tests/cuda/device.sh).
pub fn root() -> PathBuf {
    let other = std::env::var_os("MOR_TEST_ROOT");
    other.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The model that the tool carries.
pub fn default_model() -> PathBuf {
    root().join("models/austen-mor-5m-q8_0.gguf")
}

/// The bytes of a file under tests/data.
pub fn data(name: &str) -> Vec<u8> {
    let path = root().join("tests/data").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Writes a file, of these bytes, once more with other metadata.
pub fn write_copy(path: &Path, metadata: &Metadata, gguf: &Gguf, bytes: &[u8]) {
    let plan = |t: &TensorInfo| TensorPlan {
        name: t.name.clone(),
        ty: t.ty,
        dims: t.dims.clone(),
    };
    let plans: Vec<TensorPlan> = gguf.tensors().iter().map(plan).collect();
    let mut writer = GgufWriter::create(path, metadata, &plans).unwrap();
    for tensor in gguf.tensors() {
        let bytes = &bytes[tensor.offset..][..tensor.bytes];
        writer.write_tensor_bytes(bytes).unwrap();
        writer.next_tensor().unwrap();
    }
    writer.finish().unwrap();
}

/// Whether MOR_TEST_DEVICE says that the tests are to run on a GPU.
pub fn on_gpu() -> bool {
    match std::env::var("MOR_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Err(std::env::VarError::NotPresent) => false,
        other => panic!("MOR_TEST_DEVICE is {other:?}; known is cuda"),
    }
}

/// Says that a test does not run. Written to the stream itself, for what `println!` prints in a test
/// that passes is never seen.
pub fn skip(what: &str, missing: &str) {
    use std::io::Write;
    // One call, so that the lines of several threads do not mix.
    let line = format!("SKIPPED {what}: {missing}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// The same of the test that this is called in.
pub fn skip_test(missing: &str) {
    let thread = std::thread::current();
    skip(thread.name().unwrap_or("a test"), missing);
}

/// The greatest difference; infinite where one is no number.
pub fn worst_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    let told = |d: f32| if d.is_nan() { f32::INFINITY } else { d };
    differences.map(told).fold(0.0, f32::max)
}

/// To compare numbers as they are.
pub fn to_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// xorshift64*: the same numbers everywhere, no dependency.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// 0 to `n` - 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
