//! Writes what the targets begin with, made from the repository's tests: fuzz/seeds/TARGET, and the models of the
//! target `state` in fuzz/seeds/models.

mod session;

use mor::Model;
use mor::convert::{ConvertOptions, Silent, SynthOptions, SynthShape, convert, synth};
use mor::gguf::Gguf;
use mor::quant::TensorType;
use session::{saved, session};
use std::fs::{copy, create_dir_all, read, read_dir, write};
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (seeds, tests) = (here.join("seeds.part"), here.join("../tests"));
    for target in [
        "models",
        "file",
        "state",
        "text",
        "template",
        "config",
        "yaml",
        "safetensors",
        "tokenizer",
        "torch",
        "pickle",
    ] {
        create_dir_all(seeds.join(target))?;
    }

    for case in folder(&tests.join("cases"))? {
        let name = case.file_name().unwrap();
        let model = seeds.join("models").join(name).with_extension("gguf");
        let options = ConvertOptions {
            ty: Some(TensorType::Q4_0),
            ..Default::default()
        };
        convert(&case, &model, &options, &mut Silent)?;
        copy(case.join("config.json"), seeds.join("config").join(name))?;
        copy(case.join("mor.yaml"), seeds.join("yaml").join(name))?;
        let weights = read(case.join("model.safetensors"))?;
        let head = 8 + u64::from_le_bytes(weights[..8].try_into()?) as usize;
        write(seeds.join("safetensors").join(name), &weights[..head])?;
    }
    for (number, path) in folder(&seeds.join("models"))?.into_iter().enumerate() {
        head(&path, &seeds.join("file").join(path.file_name().unwrap()))?;
        let model = Model::open(&path)?;
        for length in [0, 1, 6] {
            let mut session = session(&model);
            if length > 0 {
                session.prefill(&(0..length).collect::<Vec<_>>())?;
            }
            let bytes = [&[number as u8], &saved(&mut session)[..]].concat();
            write(seeds.join(format!("state/{number}-{length}")), bytes)?;
        }
    }
    // Models with tokenizers.
    for shape in SynthShape::all().filter(|shape| shape.name().starts_with("tiny")) {
        let path = seeds.join(shape.name());
        let options = SynthOptions {
            shape,
            layers: None,
            ty: TensorType::Q4_0,
            seed: 0,
            mean_depth: None,
        };
        synth(&path, &options, &mut Silent)?;
        head(&path, &seeds.join("file").join(shape.name()))?;
        std::fs::remove_file(&path)?;
    }
    for path in folder(&tests.join("data/tokenizer"))? {
        let name = path.file_name().unwrap();
        match path.extension().is_some_and(|e| e == "gguf") {
            true => copy(&path, seeds.join("file").join(name))?,
            false => copy(&path, seeds.join("tokenizer").join(name))?,
        };
    }
    for name in ["bf16", "bin", "evil", "legacy", "strided"] {
        let from = tests
            .join("data/convert")
            .join(name)
            .join("pytorch_model.bin");
        copy(&from, seeds.join("torch").join(name))?;
        // One of them is a pickle and no zip.
        if let Ok(mut zip) = zip::ZipArchive::new(std::fs::File::open(from)?) {
            let parts: Vec<String> = zip
                .file_names()
                .map(|n| Ok(n?.into_owned()))
                .collect::<Result<_>>()?;
            let pickle = parts.iter().find(|part| part.ends_with("/data.pkl"));
            let mut to = std::fs::File::create(seeds.join("pickle").join(name))?;
            std::io::copy(&mut zip.by_name(pickle.ok_or("no pickle")?)?, &mut to)?;
        }
    }
    let prose = std::fs::read_to_string(tests.join("data/prose.txt"))?;
    for (number, line) in prose.lines().take(50).enumerate() {
        write(seeds.join(format!("text/{number}")), line)?;
    }
    let chat: serde_json::Value = serde_json::from_slice(&read(tests.join("data/chat.json"))?)?;
    for (name, template) in chat["templates"].as_object().ok_or("no templates")? {
        write(
            seeds.join("template").join(name),
            template.as_str().ok_or("no text")?,
        )?;
    }
    // Whole or not at all.
    Ok(std::fs::rename(seeds, here.join("seeds"))?)
}

fn folder(path: &Path) -> Result<Vec<PathBuf>> {
    let paths: std::io::Result<Vec<_>> = read_dir(path)?.map(|e| Ok(e?.path())).collect();
    let mut paths = paths?;
    paths.sort();
    Ok(paths)
}

/// The part of a model file before its weights.
fn head(from: &Path, to: &Path) -> Result<()> {
    let bytes = read(from)?;
    let gguf = Gguf::parse(&bytes)?;
    let end = gguf.tensors().iter().map(|tensor| tensor.offset).min();
    Ok(write(to, &bytes[..end.unwrap_or(bytes.len())])?)
}
