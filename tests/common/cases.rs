//! Models made from the reference cases.

use mor::convert::{ConvertOptions, Silent, convert};
use mor::gguf::Gguf;
use mor::quant::TensorType;
use mor::{Device, KvType, Model, Session, SessionParams};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Where cases lie: the reference's own, those of odd shapes, and what MOR_TEST_CASES names (tests/shapes/make.py).
fn case_folders() -> Vec<PathBuf> {
    let ours = ["tests/cases", "tests/shapes"].map(|folder| super::root().join(folder));
    let more = std::env::var_os("MOR_TEST_CASES").map(PathBuf::from);
    ours.into_iter().chain(more).collect()
}

/// The folder of a case.
pub fn case_folder(case: &str) -> PathBuf {
    let mut folders = case_folders().into_iter().map(|folder| folder.join(case));
    let found = folders.find(|folder| folder.is_dir());
    found.unwrap_or_else(|| panic!("there is no case '{case}'"))
}

/// The names of the cases in one of the folders.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

/// The names of the reference's own cases.
pub fn cases() -> Vec<String> {
    let names = names(&case_folders()[0]);
    assert!(names.len() >= 23, "the reference cases are missing");
    names
}

/// The names of the cases of odd shapes: widths that divide into nothing, small and large heads, up to five
/// recursions.
pub fn shapes() -> Vec<String> {
    let folders = &case_folders()[1..];
    let names: Vec<String> = folders.iter().flat_map(|folder| names(folder)).collect();
    assert!(names.len() >= 13, "the cases of odd shapes are missing");
    names
}

/// A case as a GGUF file's bytes.
pub fn gguf_bytes(case: &str, ty: TensorType) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let options = ConvertOptions {
        ty: Some(ty),
        ..Default::default()
    };
    convert(&case_folder(case), &path, &options, &mut Silent).unwrap();
    std::fs::read(&path).unwrap()
}

/// Spoils an F32 model's file: of token 5 nothing good comes, its embedding is no number.
pub fn spoil_token_5(bytes: &mut [u8]) {
    let gguf = Gguf::parse(bytes).unwrap();
    let embedding = gguf.tensor("token_embd.weight").unwrap();
    let row = embedding.offset + 5 * embedding.columns() * size_of::<f32>();
    bytes[row..row + 4].copy_from_slice(&f32::NAN.to_le_bytes());
}

/// Where the tests' models run: the CPU, or with MOR_TEST_DEVICE=cuda the first GPU.
pub fn device() -> Device {
    match super::on_gpu() {
        true => Device::Cuda(0),
        false => Device::Cpu,
    }
}

/// A case as a model.
pub fn model(case: &str, ty: TensorType) -> Model {
    Model::from_bytes_on(gguf_bytes(case, ty), device()).unwrap()
}

/// A session's state.
pub fn saved(session: &mut Session) -> Vec<u8> {
    let mut state = vec![0; session.save_bytes()];
    session.save(&mut state).unwrap();
    state
}

/// A session with exact keys and values.
pub fn session(model: &Model, batch: usize, threads: usize) -> Session {
    let params = SessionParams {
        context: 128,
        batch,
        threads,
        kv: KvType::F32,
        logit_rows: 3,
        ..Default::default()
    };
    Session::new(model, &params).unwrap()
}

/// What a case expects.
pub struct Expected {
    bytes: Vec<u8>,
}

impl Expected {
    pub fn of(case: &str) -> Self {
        let bytes = std::fs::read(case_folder(case).join("expected.safetensors")).unwrap();
        Expected { bytes }
    }

    /// Rows of integers, if the case has them.
    pub fn integers(&self, name: &str) -> Option<Vec<Vec<i64>>> {
        self.rows(name, 8, |b| i64::from_le_bytes(b.try_into().unwrap()))
    }

    /// Rows of floats, if the case has them.
    pub fn floats(&self, name: &str) -> Option<Vec<Vec<f32>>> {
        self.rows(name, 4, |b| f32::from_le_bytes(b.try_into().unwrap()))
    }

    /// The input sequences.
    pub fn inputs(&self) -> Vec<Vec<u32>> {
        let rows = self.integers("input_ids").unwrap().into_iter();
        rows.map(|row| row.iter().map(|id| *id as u32).collect())
            .collect()
    }

    /// The tensor cut along its first dimension (a vector is one row).
    fn rows<T>(&self, name: &str, size: usize, read: impl Fn(&[u8]) -> T) -> Option<Vec<Vec<T>>> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).ok()?;
        let rows = if tensor.shape().len() > 1 {
            tensor.shape()[0]
        } else {
            1
        };
        let values: Vec<&[u8]> = tensor.data().chunks_exact(size).collect();
        let rows = values.chunks_exact(values.len() / rows);
        Some(
            rows.map(|row| row.iter().map(|b| read(b)).collect())
                .collect(),
        )
    }
}
