//! From one GGUF file to another: the same model, its matrices in another format.

use std::path::Path;

use super::document::Document;
use super::encode::{self, Encoding, Job};
use super::metadata::{set_file_type, set_layout};
use super::note_fallback;
use super::options::{ConvertOptions, Overrides, Progress, Summary};
use super::output::Output;
use super::source::map_file;
use super::tokenizer;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Metadata, Strings, TensorInfo, Value};
use crate::model::{Hyperparameters, check_keys, is_llama_key};
use crate::quant::TensorType;

pub(super) fn convert(
    input: &Path,
    output: Output,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    let map = map_file(input)?;
    let gguf = Gguf::parse(&map)?;
    check(&options.overrides)?;
    if options.training.is_some() {
        return Err(Error::argument(
            "a GGUF file already says what the model is; a training configuration goes with a checkpoint",
        ));
    }
    let h = Hyperparameters::from_metadata(&gguf.metadata)?;
    check_keys(&gguf.metadata, &h)?;
    let from_layout = h.layout;
    let target = |info: &TensorInfo| match options.ty {
        _ if !is_matrix(info) => TensorType::F32,
        None => info.ty,
        Some(ty) => encode::matrix_type(ty, info.columns()),
    };
    // Of a file without block formats nothing is arranged, so it stays what it is for other programs.
    let mut types = gguf.tensors().iter().map(target);
    let arranged = types.any(|ty| encode::makes_tiles(options.layout, ty));
    let mut metadata = new_metadata(&gguf, &h, options, arranged)?;
    if let Some(path) = &options.tokenizer {
        let vocab = gguf.tensor("token_embd.weight").map_or(0, TensorInfo::rows);
        tokenizer::replace(
            &mut metadata,
            path,
            vocab,
            &Document::absent("config.json"),
            progress,
        )?;
    }
    let mut jobs = Vec::with_capacity(gguf.tensors().len());
    let (mut fallen_back, mut lossy) = (0usize, 0usize);
    for info in gguf.tensors() {
        let to = target(info);
        fallen_back += usize::from(is_matrix(info) && options.ty.is_some_and(|ty| ty != to));
        lossy += usize::from(info.ty.block_len() > 1 && to != info.ty && to.block_len() > 1);
        jobs.push(Job {
            from_tiles: encode::makes_tiles(from_layout, info.ty),
            to_tiles: encode::makes_tiles(options.layout, to),
            ..job(&map, info, to)?
        });
    }
    if let Some(ty) = options.ty {
        note_fallback(fallen_back, ty, progress);
    }
    if lossy > 0 {
        progress.note(&format!(
            "{lossy} matrices were quantized already and lose precision a second time; convert from the checkpoint where there is one."
        ));
    }
    let output_bytes = encode::write_file(output, &metadata, &jobs, progress)?;
    let architecture = metadata.str("general.architecture")?.unwrap_or_default();
    Ok(Summary {
        architecture: architecture.to_string(),
        tensors: jobs.len(),
        aliases: metadata
            .strings("mor.recursion.aliases")?
            .map_or(0, Strings::len),
        input_bytes: jobs.iter().map(|job| job.bytes.len() as u64).sum(),
        output_bytes,
    })
}

/// Refuses what would not be the same model afterwards.
fn check(overrides: &Overrides) -> Result<()> {
    let only_name = Overrides {
        name: overrides.name.clone(),
        ..Overrides::default()
    };
    if *overrides != only_name {
        return Err(Error::argument(
            "a GGUF file already says what the model is; of the overrides only the name can be changed",
        ));
    }
    Ok(())
}

fn new_metadata(
    gguf: &Gguf,
    h: &Hyperparameters,
    options: &ConvertOptions,
    arranged: bool,
) -> Result<Metadata> {
    let mut metadata = gguf.metadata.clone();
    if let Some(name) = &options.overrides.name {
        metadata.insert("general.name", Value::String(name.clone()));
    }
    if let Some(ty) = options.ty {
        set_file_type(&mut metadata, ty);
    }
    if metadata.str("general.architecture")? == Some("mor") {
        set_layout(&mut metadata, options.layout);
    } else if arranged {
        // Programs that know Llama files do not know tiles and must not take them for rows.
        metadata = from_llama(&metadata);
        // A Llama file's own may be that of before tokens were added.
        metadata.insert("mor.vocab_size", Value::U32(h.vocab_size as u32));
        set_layout(&mut metadata, options.layout);
    }
    Ok(metadata)
}

/// A Llama file's metadata as this project's own. Keys that the engine does not heed are left out.
fn from_llama(llama: &Metadata) -> Metadata {
    let mut metadata = Metadata::default();
    for (key, value) in llama.iter() {
        match key.strip_prefix("llama.") {
            None => metadata.insert(key, value.clone()),
            Some(name) if is_llama_key(name) => {
                metadata.insert(format!("mor.{name}"), value.clone())
            }
            Some(_) => None,
        };
    }
    let text = |s: &str| Value::String(s.to_string());
    metadata.insert("general.architecture", text("mor"));
    metadata.insert("mor.rope.pairing", text("norm"));
    metadata
}

/// Norms, biases, rotary factors and routers are never quantized.
fn is_matrix(info: &TensorInfo) -> bool {
    let router = info.name.starts_with("router.") || info.name.starts_with("aux_router.");
    info.dims.len() >= 2 && !router && !info.name.contains("norm")
}

fn job<'a>(map: &'a [u8], info: &TensorInfo, to: TensorType) -> Result<Job<'a>> {
    let bytes = &map[info.offset..info.offset + info.bytes];
    Ok(Job {
        name: info.name.clone(),
        origin: info.name.clone(),
        bytes,
        from: Encoding::Block(info.ty),
        from_tiles: false,
        to,
        to_tiles: false,
        dims: info.dims.clone(),
    })
}
