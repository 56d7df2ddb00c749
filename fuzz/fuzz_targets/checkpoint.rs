//! One file, which MOR_FUZZ_FILE names, of the checkpoint in MOR_FUZZ_FOLDER, where it is written anew each time. What is
//! converted opens.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mor::Model;
use mor::convert::{ConvertOptions, Silent, convert};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static NAME: LazyLock<String> = LazyLock::new(|| std::env::var("MOR_FUZZ_FILE").unwrap());

static FOLDER: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::var("MOR_FUZZ_FOLDER").unwrap().into());

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if Path::new(&*NAME)
        .extension()
        .is_some_and(|e| e == "safetensors")
    {
        // What comes is the head.
        bytes.resize(bytes.len() + 140_000, 0);
    }
    std::fs::write(FOLDER.join(&*NAME), bytes).unwrap();
    let output = FOLDER.join("out.gguf");
    if convert(&FOLDER, &output, &ConvertOptions::default(), &mut Silent).is_ok() {
        let bytes = std::fs::read(&output).unwrap();
        std::fs::remove_file(&output).unwrap();
        Model::from_bytes(bytes).expect("what was converted opens");
    }
});
