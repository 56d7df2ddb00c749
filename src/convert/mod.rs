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
/// [`Error::Io`], [`Error::Convert`] and [`Error::Unsupported`] with the reason, [`Error::Format`] of a GGUF file,
/// [`Error::InvalidArgument`] for an option that does not go with such an input, [`Error::Thread`] where the system
/// refuses threads, [`Error::Cancelled`] by `progress`. The output is then as it was.
pub fn convert(
    input: &Path,
    output: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    options.ty.map_or(Ok(()), encode::check_target)?;
    let output = Output::new(output)?;
    for file in [&options.tokenizer, &options.training]
        .into_iter()
        .flatten()
    {
        output.differs_from(file)?;
    }
    // A GGUF file may be converted in its place: it is there until the new one is verified.
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
    source::regular(input)?;
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
        match input.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    };
    output.differs_from(input)?;
    output.differs_from_all_in(folder)?;
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
    let training = match training {
        Some(path) => Some((path.to_path_buf(), Document::yaml(path)?)),
        None => find_training(folder)?,
    };
    let training = match training {
        Some((path, document)) => {
            if path != folder.join("mor.yaml") {
                progress.note(&format!(
                    "The training run's configuration is '{}'.",
                    document.label()
                ));
            }
            document
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

/// The run's configuration as `mor.yaml`, or where the authors' scripts leave it, which copy it nowhere: weights lie in
/// `results/pretrain/NAME`, in a `checkpoint-N` in there, or in `checkpoints/NAME`, of a project in which it is
/// `conf/pretrain/NAME.yaml`.
fn find_training(folder: &Path) -> Result<Option<(PathBuf, Document)>> {
    // As it is called, and, where links lead elsewhere, as it is.
    let called = std::path::absolute(folder).unwrap_or_else(|_| folder.into());
    let mut places = vec![called];
    places.extend(folder.canonicalize());
    let mut by_name = Vec::new();
    for place in &places {
        let name_of = |path: &Path| path.file_name()?.to_str().map(str::to_string);
        let is_checkpoint = name_of(place).is_some_and(|name| name.starts_with("checkpoint-"));
        let run = match place.parent() {
            Some(parent) if is_checkpoint => parent,
            _ => place,
        };
        for folder in [folder, run] {
            for file in ["mor.yaml", "mor.yml"] {
                let path = folder.join(file);
                if path.is_file() {
                    return Document::yaml(&path).map(|document| Some((path, document)));
                }
            }
        }
        let Some(file) = name_of(run).map(|name| format!("{name}.yaml")) else {
            continue;
        };
        by_name.push(run.join(&file));
        by_name.extend(run.parent().map(|beside| beside.join(&file)));
        let above = run.ancestors().skip(1).take(3);
        by_name.extend(above.map(|project| project.join("conf/pretrain").join(&file)));
    }
    // Another program's file may have that name too.
    Ok(by_name.into_iter().find_map(|path| {
        let document = Document::yaml(&path).ok()?;
        let is_ours = document.get("mor").is_some() || document.get("recursive").is_some();
        is_ours.then_some((path, document))
    }))
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
