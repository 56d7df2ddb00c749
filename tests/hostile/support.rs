//! Model files taken apart, spoilt and put together again; the program run under a watch.
#![allow(dead_code)] // Each test program uses its own part.

use mor::gguf::{Gguf, GgufWriter, Metadata, TensorPlan};
use mor::{Error, KvType, Model, Session, SessionParams};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A model file in parts.
#[derive(Clone)]
pub struct Draft {
    pub metadata: Metadata,
    pub tensors: Vec<(TensorPlan, Vec<u8>)>,
}

impl Draft {
    pub fn of(bytes: &[u8]) -> Draft {
        let gguf = Gguf::parse(bytes).unwrap();
        let part = |t: &mor::gguf::TensorInfo| {
            let plan = TensorPlan {
                name: t.name.clone(),
                ty: t.ty,
                dims: t.dims.clone(),
            };
            (plan, bytes[t.offset..][..t.bytes].to_vec())
        };
        Draft {
            tensors: gguf.tensors().iter().map(part).collect(),
            metadata: gguf.metadata,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let plan: Vec<_> = self.tensors.iter().map(|(plan, _)| plan.clone()).collect();
        let mut writer = GgufWriter::create(&path, &self.metadata, &plan).unwrap();
        for (_, bytes) in &self.tensors {
            writer.write_tensor_bytes(bytes).unwrap();
            writer.next_tensor().unwrap();
        }
        writer.finish().unwrap();
        std::fs::read(&path).unwrap()
    }
}

/// Where the entry of the tensor `name` has its dimension count.
pub fn entry(bytes: &[u8], name: &str) -> usize {
    let mut key = (name.len() as u64).to_le_bytes().to_vec();
    key.extend_from_slice(name.as_bytes());
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    at + key.len()
}

/// Where the entry of the two-dimensional tensor `name` has its type; its offset is behind.
pub fn type_at(bytes: &[u8], name: &str) -> usize {
    let at = entry(bytes, name);
    assert_eq!(bytes[at], 2, "{name}");
    at + 4 + 16
}

pub fn patch(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

/// Opens the model and runs `tokens` at full depth.
pub fn run(bytes: Vec<u8>, tokens: &[u32]) -> Result<(), Error> {
    let model = Model::from_bytes(bytes)?;
    let params = SessionParams {
        context: 16,
        batch: 16,
        threads: 1,
        kv: KvType::F32,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params)?;
    session.set_cut(0.0)?;
    session.prefill(tokens)?;
    session.logits().map(drop)
}

/// The sentence with which `bytes` are refused.
#[track_caller]
pub fn refusal(bytes: Vec<u8>, what: &str) -> String {
    match run(bytes, &[1, 2, 3, 0]) {
        Ok(()) => panic!("{what}: was taken"),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
pub fn assert_says(sentence: &str, phrase: &str, what: &str) {
    assert!(sentence.contains(phrase), "{what}: {sentence}");
}

/// A folder to make bad files in.
pub struct Desk(TempDir);

impl Desk {
    pub fn new() -> Desk {
        Desk(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path as an argument.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.arg(name)
    }

    /// The path of `name` as an argument, whether it exists or not.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A copy of a folder, to be spoilt.
    pub fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.path(name);
        std::fs::create_dir(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    }
}

/// Nothing that is refused takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the program; its exit code and what it wrote to standard error.
#[track_caller]
pub fn mor(args: &[&str]) -> (i32, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(args)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Read as it comes: a full pipe would hold the program up.
    let mut stderr = child.stderr.take().unwrap();
    let text = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = text.join().unwrap().unwrap();
    let code = status
        .code()
        .unwrap_or_else(|| panic!("{args:?}: {status}"));
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    (code, text)
}

/// The program ends with 1 and one line, which holds `phrase`.
#[track_caller]
pub fn refuses(args: &[&str], phrase: &str) {
    let (code, text) = mor(args);
    let lines: Vec<_> = text.lines().collect();
    // A conversion says what it assumes before it finds out what is wrong.
    let alone = lines.len() == 1 || args[0] == "convert";
    let errors = lines.iter().filter(|line| line.starts_with("mor: "));
    assert!(
        code == 1 && alone && errors.count() == 1,
        "{args:?}: {code}, {text}"
    );
    let last = lines.last().unwrap();
    assert!(
        last.starts_with("mor: ") && last.contains(phrase),
        "{args:?}: {text}"
    );
}
