//! One file, which MOR_FUZZ_FILE names, of the checkpoint in MOR_FUZZ_FOLDER, where it is written anew each time; of
//! pytorch_model.bin also the pickle alone (data.pkl), in a zip that is right otherwise. What is converted opens.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mor::Model;
use mor::convert::{ConvertOptions, Silent, convert};
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

static NAME: LazyLock<String> = LazyLock::new(|| std::env::var("MOR_FUZZ_FILE").unwrap());

static FOLDER: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::var("MOR_FUZZ_FOLDER").unwrap().into());

const ZIP: &str = "pytorch_model.bin";

/// The parts of the checkpoint's zip but for the pickle.
static PARTS: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let mut zip = ZipArchive::new(Cursor::new(std::fs::read(FOLDER.join(ZIP)).unwrap())).unwrap();
    let parts = (0..zip.len()).map(|index| {
        let mut part = zip.by_index(index).unwrap();
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes).unwrap();
        (part.name().unwrap().into_owned(), bytes)
    });
    parts
        .filter(|(name, _)| !name.ends_with("/data.pkl"))
        .collect()
});

/// The checkpoint's zip with another pickle, whose checksum is right.
fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    let parts = &*PARTS;
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let all = parts.iter().map(|(name, bytes)| (&**name, &**bytes));
    for (name, bytes) in std::iter::once(("pytorch_model/data.pkl", pickle)).chain(all) {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    let mut file = &**NAME;
    match Path::new(file).extension().and_then(|e| e.to_str()) {
        // What comes is the head.
        Some("safetensors") => bytes.resize(bytes.len() + 140_000, 0),
        Some("pkl") => (file, bytes) = (ZIP, with_pickle(data)),
        _ => {}
    }
    std::fs::write(FOLDER.join(file), bytes).unwrap();
    let output = FOLDER.join("out.gguf");
    if convert(&FOLDER, &output, &ConvertOptions::default(), &mut Silent).is_ok() {
        let bytes = std::fs::read(&output).unwrap();
        std::fs::remove_file(&output).unwrap();
        Model::from_bytes(bytes).expect("what was converted opens");
    }
});
