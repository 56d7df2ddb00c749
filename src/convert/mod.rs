//! Checkpoints and GGUF files in, GGUF files out; and random models for benchmarks.
//!
//! A checkpoint is a folder in the layout of the authors' training code (safetensors or PyTorch,
//! whole or in shards, with `config.json` and `mor.yaml` or without). Its tensors are mapped, not
//! loaded, and encoded a few megabytes at a time, so a checkpoint larger than memory converts.
//! Nothing is executed: a pickle is interpreted by a machine that knows tensors and nothing else.

mod census;
mod document;
mod encode;
mod hyper;
mod layout;
mod metadata;
mod options;
mod output;
mod pickle;
mod random;
mod requantize;
mod rope;
mod router;
mod safetensors;
mod source;
mod spec;
mod synth;
mod synth_tokenizer;
mod tokenizer;
mod tokenizer_json;
mod torch;

use std::path::{Path, PathBuf};

pub use options::{
    Balancing, ConvertOptions, Gating, Kind, KvStrategy, Overrides, Progress, RouterFunction,
    Selection, Sharing, Silent, Summary,
};

pub use output::Output;
pub use random::RandomTokens;
pub use synth::{SynthOptions, SynthShape, SynthSummary, synth};

use document::Document;
use encode::{Encoding, Job};
use rope::Scaling;
use source::Source;
use spec::{Documents, Spec};

use crate::error::{Error, Result};
use crate::model::TensorLayout;
use crate::quant::TensorType;

/// Converts `input`, a checkpoint folder, a weights file or a GGUF file, to the GGUF file
/// `output`, which appears whole and verified or not at all.
///
/// The input is mapped: a program that truncates it meanwhile faults this one.
///
/// # Errors
/// [`Error::Io`], [`Error::Convert`] and [`Error::Unsupported`] with the reason, [`Error::Format`] of a GGUF file. The output
/// is then as it was.
pub fn convert(
    input: &Path,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    options.ty.map_or(Ok(()), encode::check_target)?;
    let output = Output::new(output)?;
    if is_gguf(input)? {
        return requantize::convert(input, output, options, progress);
    }
    convert_checkpoint(input, output, options, progress)
}

fn is_gguf(input: &Path) -> Result<bool> {
    use std::io::Read;
    if input.is_dir() {
        return Ok(false);
    }
    let mut magic = Vec::new();
    let file = std::fs::File::open(input).map_err(|e| Error::io(input, e))?;
    file.take(4)
        .read_to_end(&mut magic)
        .map_err(|e| Error::io(input, e))?;
    Ok(magic == b"GGUF")
}

fn convert_checkpoint(
    input: &Path,
    output: Output,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    let folder = if input.is_dir() {
        input
    } else {
        input.parent().unwrap_or(input)
    };
    let source = Source::open(input, progress)?;
    let documents = read_documents(folder, options.training.as_deref(), progress)?;
    let spec = Spec::resolve(&source, &documents, &options.overrides, progress)?;
    let layout = layout::plan(&source, &spec, progress)?;
    note_tying(&source, &documents.config, progress)?;
    let ty = options.ty.unwrap_or(TensorType::F16);
    let mut jobs = jobs(&source, &layout, ty, options.layout, progress)?;
    let frequencies = match &spec.shape.rope_scaling {
        Scaling::Frequencies(divisors) => divisors.as_slice(),
        _ => &[],
    };
    let bytes: Vec<u8> = frequencies
        .iter()
        .flat_map(|divisor| divisor.to_le_bytes())
        .collect();
    if !frequencies.is_empty() {
        jobs.push(Job {
            name: "rope_freqs.weight".into(),
            origin: "rope_scaling".into(),
            bytes: &bytes,
            from: Encoding::Block(TensorType::F32),
            from_tiles: false,
            to: TensorType::F32,
            to_tiles: false,
            dims: vec![frequencies.len() as u64],
        });
    }
    let name = source::file_label(&folder.canonicalize().unwrap_or_else(|_| folder.into()));
    let mut metadata = metadata::build(&spec, &layout, ty, &name, &options.overrides);
    metadata::set_layout(&mut metadata, options.layout);
    tokenizer::insert(
        &mut metadata,
        options.tokenizer.as_deref(),
        folder,
        spec.shape.vocab,
        &documents.config,
        progress,
    )?;
    let output_bytes = encode::write_file(output, &metadata, &jobs, progress)?;
    Ok(Summary {
        architecture: "mor".into(),
        tensors: jobs.len(),
        aliases: layout.aliases.len(),
        input_bytes: jobs.iter().map(|job| job.bytes.len() as u64).sum(),
        output_bytes,
    })
}

/// Says where the checkpoint and its configuration disagree on whether the head is the embedding.
/// The checkpoint's tensors decide.
fn note_tying(source: &Source, config: &Document, progress: &mut dyn Progress) -> Result<()> {
    let tied = config.bool("tie_word_embeddings")?;
    let head = source.get("lm_head.weight");
    if tied == Some(false) && head.is_none() {
        progress.note("config.json says that the head is not tied to the embedding, but there is no lm_head.weight, so it is taken to be tied.");
    }
    let embedding = source.get("model.embed_tokens.weight");
    if let (Some(true), Some(head), Some(embedding)) = (tied, head, embedding)
        && !source.equal(head, embedding)
    {
        progress.note("config.json says that the head is tied to the embedding, but there is a different lm_head.weight, which is taken.");
    }
    Ok(())
}

fn read_documents(
    folder: &Path,
    training: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Documents> {
    let config = Document::json_beside(folder, "config.json")?;
    let path = match training {
        Some(path) => Some(path.to_path_buf()),
        None => find_training(folder),
    };
    let training = match path {
        Some(path) => {
            if !folder.join("mor.yaml").eq(&path) {
                let name = source::file_label(&path);
                progress.note(&format!("The training run's configuration is '{name}'."));
            }
            Document::yaml(&path)?
        }
        None => {
            progress.note("There is no mor.yaml, so the structure comes from the tensors' names and contents; --training-config names the training run's configuration (conf/pretrain/NAME.yaml).");
            Document::absent("mor.yaml")
        }
    };
    let config = match config {
        Some(config) => config,
        None => {
            progress.note("There is no config.json, so widths come from the tensors' shapes.");
            // What the run changed of its base model's, under the same names.
            training
                .part("model_config")
                .unwrap_or(Document::absent("config.json"))
        }
    };
    Ok(Documents { config, training })
}

/// Where the authors' scripts leave a run's configuration: nobody copies it to the weights, which lie in
/// `results/pretrain/NAME` or a `checkpoint-N` in there, while it stays `conf/pretrain/NAME.yaml`.
fn find_training(folder: &Path) -> Option<PathBuf> {
    let whole = folder.canonicalize().ok()?;
    let is_checkpoint = |name: &str| name.starts_with("checkpoint-");
    let name_of = |path: &Path| path.file_name()?.to_str().map(str::to_string);
    let run = match name_of(&whole).is_some_and(|name| is_checkpoint(&name)) {
        true => whole.parent()?.to_path_buf(),
        false => whole.clone(),
    };
    let mut candidates = Vec::new();
    for place in [folder, &run] {
        candidates.extend(["mor.yaml", "mor.yml"].map(|name| place.join(name)));
    }
    if let Some(name) = name_of(&run) {
        let file = format!("{name}.yaml");
        let stage = run.parent();
        candidates.push(run.join(&file));
        candidates.extend(stage.map(|stage| stage.join(&file)));
        if let Some(results) = stage.and_then(Path::parent)
            && name_of(results).as_deref() == Some("results")
            && let (Some(stage), Some(project)) = (stage.and_then(name_of), results.parent())
        {
            candidates.push(project.join("conf").join(stage).join(&file));
        }
    }
    candidates.into_iter().find(|path| path.is_file())
}

fn jobs<'s>(
    source: &'s Source,
    layout: &layout::Layout<'s>,
    ty: TensorType,
    arrangement: TensorLayout,
    progress: &mut dyn Progress,
) -> Result<Vec<Job<'s>>> {
    let mut jobs = Vec::with_capacity(layout.tensors.len());
    let mut fallen_back = 0usize;
    for planned in &layout.tensors {
        let tensor = planned.tensor;
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let to = if planned.matrix {
            encode::matrix_type(ty, columns)
        } else {
            TensorType::F32
        };
        fallen_back += usize::from(planned.matrix && to != ty);
        jobs.push(Job {
            name: planned.name.clone(),
            origin: tensor.name.clone(),
            bytes: source.bytes(tensor),
            from: Encoding::of(tensor.dtype, &tensor.name)?,
            from_tiles: false,
            to,
            to_tiles: encode::makes_tiles(arrangement, to),
            dims: tensor.shape.iter().rev().map(|&d| d as u64).collect(),
        });
    }
    note_fallback(fallen_back, ty, progress);
    Ok(jobs)
}

fn note_fallback(count: usize, ty: TensorType, progress: &mut dyn Progress) {
    if count > 0 {
        progress.note(&format!(
            "{count} matrices have rows that {} blocks do not divide and are stored as F16.",
            ty.name()
        ));
    }
}
