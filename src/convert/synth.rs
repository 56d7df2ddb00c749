//! Random models of known shapes, for benchmarks: as large and as fast as trained ones, and their
//! tokens take different depths.

use std::path::Path;

use rayon::prelude::*;

use super::encode;
use super::hyper::Shape as Widths;
use super::layout::Layout;
use super::metadata;
use super::options::{
    Gating, Kind, KvStrategy, Overrides, Progress, RouterFunction, Selection, Sharing, advance,
};
use super::output::Output;
use super::random::{Random, RandomTokens};
use super::rope::Scaling;
use super::router::{Router, Rule, TRAINED_CUT};
use super::spec::Spec;
use super::{census::Style, synth_tokenizer};
use crate::error::{Error, Result};
use crate::gguf::{GgufWriter, Metadata, TensorPlan, Value};
use crate::model::{MAX_BLOCKS, Model};
use crate::plan::SessionParams;
use crate::quant::{TensorType, quantize_row};
use crate::session::Session;

/// A vanilla model's sizes.
#[derive(Debug, PartialEq)]
struct Base {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    layers: usize,
    vocab: usize,
    context: usize,
}

/// Heads of all shapes are as wide as SmolLM2's, and so is the base of the rotary angles.
const HEAD_DIM: usize = 64;
const ROPE_THETA: f32 = 100_000.0;
const RMS_EPS: f32 = 1e-5;

/// SmolLM2's models, and one that a test can afford.
const BASES: [Base; 4] = [
    Base {
        name: "tiny",
        hidden: 128,
        ffn: 256,
        heads: 2,
        kv_heads: 1,
        layers: 8,
        vocab: 1024,
        context: 2048,
    },
    Base {
        name: "smollm-135m",
        hidden: 576,
        ffn: 1536,
        heads: 9,
        kv_heads: 3,
        layers: 30,
        vocab: 49_152,
        context: 8192,
    },
    Base {
        name: "smollm-360m",
        hidden: 960,
        ffn: 2560,
        heads: 15,
        kv_heads: 5,
        layers: 32,
        vocab: 49_152,
        context: 8192,
    },
    Base {
        name: "smollm-1.7b",
        hidden: 2048,
        ffn: 8192,
        heads: 32,
        kv_heads: 32,
        layers: 24,
        vocab: 49_152,
        context: 8192,
    },
];

/// What a vanilla shape may become: the suffix of its name, the kind, the recursions.
const VARIANTS: [(&str, Kind, usize); 7] = [
    ("", Kind::Vanilla, 1),
    ("-mor2", Kind::Expert, 2),
    ("-mor3", Kind::Expert, 3),
    ("-mor4", Kind::Expert, 4),
    ("-recursive2", Kind::Recursive, 2),
    ("-recursive3", Kind::Recursive, 3),
    ("-recursive4", Kind::Recursive, 4),
];

/// A known shape: a vanilla Llama model, or a relative of it that shares a block between an own
/// first and an own last layer, with expert-choice routers or without.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SynthShape {
    base: &'static Base,
    suffix: &'static str,
    kind: Kind,
    recursions: usize,
}

impl SynthShape {
    /// Every shape.
    pub fn all() -> impl Iterator<Item = SynthShape> {
        let variants = |base| {
            VARIANTS.map(|(suffix, kind, recursions)| SynthShape {
                base,
                suffix,
                kind,
                recursions,
            })
        };
        BASES.iter().flat_map(variants)
    }

    /// The name: `smollm-135m`, `smollm-135m-mor3`, `smollm-135m-recursive3`, ….
    pub fn name(&self) -> String {
        format!("{}{}", self.base.name, self.suffix)
    }

    /// The shape of this name.
    pub fn parse(name: &str) -> Option<SynthShape> {
        Self::all().find(|shape| shape.name() == name)
    }

    /// Everything about the model but its numbers. `layers` are logical ones; where they do not
    /// divide into recursions, the nearest number that does is taken.
    fn spec(&self, layers: Option<usize>) -> Result<Spec> {
        let base = self.base;
        let layers = layers.unwrap_or(base.layers);
        let vanilla = self.kind == Kind::Vanilla;
        let ends = if vanilla { 0 } else { 2 };
        let least = ends + self.recursions;
        if !(least..=MAX_BLOCKS).contains(&layers) {
            return Err(Error::argument(format_args!(
                "{} cannot have {layers} layers; {least} to {MAX_BLOCKS} are possible",
                self.name()
            )));
        }
        // To the nearest, halves up.
        let block = (2 * (layers - ends) + self.recursions) / (2 * self.recursions);
        Ok(Spec {
            kind_is_given: true,
            kind: self.kind,
            style: Style::Plain,
            sharing: if vanilla {
                Sharing::None
            } else {
                Sharing::MiddleCycle
            },
            recursions: self.recursions,
            block,
            shape: Widths {
                hidden: base.hidden,
                vocab: base.vocab,
                ffn: base.ffn,
                heads: base.heads,
                kv_heads: base.kv_heads,
                head_dim: HEAD_DIM,
                context: base.context,
                rope_theta: ROPE_THETA,
                rope_scaling: Scaling::None,
                rms_eps: RMS_EPS,
            },
            router: (self.kind == Kind::Expert).then(|| router(self.recursions)),
            kv: KvStrategy::RecursionWise,
        })
    }
}

/// The paper's router.
fn router(recursions: usize) -> Router {
    let n = recursions as f64;
    Router {
        mlp: false,
        function: RouterFunction::Sigmoid,
        alpha: 0.1,
        temperature: 1.0,
        gating: Gating::Weighted,
        rule: Rule::Expert {
            selection: Selection::AuxLoss,
            aux_mlp: false,
            capacities: (0..recursions).map(|i| (n - i as f64) / n).collect(),
        },
    }
}

/// What to make.
#[derive(Debug, Clone, PartialEq)]
pub struct SynthOptions {
    /// The shape.
    pub shape: SynthShape,
    /// Logical layers instead of the shape's own; with recursions, the nearest number that divides.
    pub layers: Option<usize>,
    /// The format of the matrices. Norms and routers stay F32.
    pub ty: TensorType,
    /// Start of the random sequence.
    pub seed: u64,
    /// Recursions that a random token runs on average, from 0 to all; the routers' cut is set by it.
    /// `None` leaves the cut as models are trained, 0.5.
    pub mean_depth: Option<f64>,
}

/// What was made.
#[derive(Debug, Clone, PartialEq)]
pub struct SynthSummary {
    /// Blocks in the file.
    pub stored_layers: usize,
    /// Layers that a token of full depth passes.
    pub logical_layers: usize,
    /// Where the routers cut, and the mean depth that was measured there.
    pub calibrated: Option<(f32, f64)>,
    /// Bytes of the whole file.
    pub output_bytes: u64,
}

/// Writes a random model to `output`, which appears whole or not at all. The same options give the
/// same bytes everywhere.
///
/// A vanilla shape becomes a file of architecture `llama`, which other programs open too.
///
/// # Errors
/// [`Error::InvalidArgument`] when the type cannot be written, or the number of layers or the mean
/// depth is none that the shape can have; [`Error::Thread`] where the system refuses threads.
pub fn synth(
    output: &Path,
    options: &SynthOptions,
    progress: &mut dyn Progress,
) -> Result<SynthSummary> {
    encode::check_target(options.ty)?;
    let spec = options.shape.spec(options.layers)?;
    check_mean_depth(options, &spec)?;
    let output = Output::new(output)?;
    let write = |cut: f32, progress: &mut dyn Progress| {
        let metadata = metadata(&spec, options, cut);
        write(output.temporary(), &metadata, &spec, options, progress)
            .map_err(|error| output.named(error))
    };
    write(TRAINED_CUT, progress)?;
    let calibrated = match options.mean_depth {
        None => None,
        Some(depth) => {
            let (cut, measured) = calibrate(output.temporary(), depth, options.seed, progress)?;
            write(cut, progress)?;
            Some((cut, measured))
        }
    };
    let model = Model::open(output.temporary())?;
    let h = model.hyperparameters();
    let summary = SynthSummary {
        stored_layers: h.stored_blocks,
        logical_layers: h.logical_layers(),
        calibrated,
        output_bytes: model.bytes().len() as u64,
    };
    // Windows renames no file that is mapped.
    drop(model);
    output.keep()?;
    Ok(summary)
}

fn check_mean_depth(options: &SynthOptions, spec: &Spec) -> Result<()> {
    let Some(depth) = options.mean_depth else {
        return Ok(());
    };
    let most = spec.recursions;
    if spec.router.is_none() {
        return Err(Error::argument(format_args!(
            "{} has no routers, so every token takes the same depth; leave the mean depth out",
            options.shape.name()
        )));
    }
    if !(0.0..=most as f64).contains(&depth) {
        return Err(Error::argument(format_args!(
            "the mean depth is {depth}; {} can have 0 to {most}",
            options.shape.name()
        )));
    }
    Ok(())
}

fn metadata(spec: &Spec, options: &SynthOptions, cut: f32) -> Metadata {
    let (layout, overrides) = (Layout::default(), Overrides::default());
    let name = options.shape.name();
    let mut metadata = metadata::build(spec, &layout, options.ty, &name, &overrides);
    if spec.router.is_some() {
        metadata.insert("mor.router.cut", Value::F32(cut));
    }
    if spec.kind == Kind::Vanilla {
        metadata = as_llama(&metadata);
    }
    synth_tokenizer::insert(&mut metadata, spec.shape.vocab);
    metadata
}

/// The keys of a vanilla model as every program of the Llama family knows them.
fn as_llama(metadata: &Metadata) -> Metadata {
    let mut llama = Metadata::new();
    for (key, value) in metadata.iter() {
        match key.strip_prefix("mor.") {
            None => llama.insert(key, value.clone()),
            Some("rope.pairing" | "kv.strategy") => None,
            Some(key) if key.starts_with("recursion.") || key.starts_with("router.") => None,
            Some(key) => llama.insert(format!("llama.{key}"), value.clone()),
        };
    }
    llama.insert("general.architecture", "llama");
    llama
}

/// A tensor to be filled.
struct Tensor {
    plan: TensorPlan,
    fill: Fill,
}

/// With what.
#[derive(Clone, Copy)]
enum Fill {
    /// Ones: a norm.
    Ones,
    /// Random numbers of mean 0 and this deviation.
    Random(f32),
}

/// Every tensor of the file.
///
/// Deviations keep the residual stream of the same size at every depth: what comes out of a matrix
/// is as large as what goes in, and the two that write into the stream are smaller by the number of
/// layers. Attention adds what all tokens of a text have in common, and little of it, so that depths
/// differ by token and not by text. The embedding is small beside what layers add, for it is the head
/// too, and a token would be followed by itself. Routers' scores then spread by about 1.
fn tensors(spec: &Spec, ty: TensorType) -> Vec<Tensor> {
    let s = &spec.shape;
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let layers = spec.block * spec.recursions + 2 * spec.middle();
    let even = |columns: usize| 1.0 / (columns as f32).sqrt();
    let last = |columns: usize| even(columns) / (2.0 * layers as f32).sqrt();
    let tensor = |name: String, ty, dims: &[usize], fill| Tensor {
        plan: TensorPlan {
            name,
            ty,
            dims: dims.iter().map(|n| *n as u64).collect(),
        },
        fill,
    };
    let norm = |name: String| tensor(name, TensorType::F32, &[s.hidden], Fill::Ones);
    let matrix = |name: String, columns: usize, rows: usize, deviation: f32| {
        let ty = encode::matrix_type(ty, columns);
        tensor(name, ty, &[columns, rows], Fill::Random(deviation))
    };
    let mut all = vec![matrix("token_embd.weight".into(), s.hidden, s.vocab, 0.02)];
    for block in 0..spec.blocks() {
        let name = |part: &str| format!("blk.{block}.{part}.weight");
        all.push(norm(name("attn_norm")));
        all.push(norm(name("ffn_norm")));
        for (part, columns, rows, deviation) in [
            ("attn_q", s.hidden, q, even(s.hidden)),
            ("attn_k", s.hidden, kv, even(s.hidden)),
            ("attn_v", s.hidden, kv, even(s.hidden)),
            ("attn_output", q, s.hidden, last(q) / 4.0),
            ("ffn_gate", s.hidden, s.ffn, even(s.hidden)),
            ("ffn_up", s.hidden, s.ffn, even(s.hidden)),
            ("ffn_down", s.ffn, s.hidden, last(s.ffn)),
        ] {
            all.push(matrix(name(part), columns, rows, deviation));
        }
    }
    let routers = if spec.router.is_some() {
        spec.recursions
    } else {
        0
    };
    for r in 0..routers {
        let (name, fill) = (
            format!("router.{r}.weight"),
            Fill::Random(16.0 * even(s.hidden)),
        );
        all.push(tensor(name, TensorType::F32, &[s.hidden, 1], fill));
    }
    all.push(norm("output_norm.weight".into()));
    all
}

/// Writes the file. Every row has a random sequence of its own, so that neither the number of
/// threads nor the order matters.
fn write(
    path: &Path,
    metadata: &Metadata,
    spec: &Spec,
    options: &SynthOptions,
    progress: &mut dyn Progress,
) -> Result<()> {
    /// Rows that are made at once: enough to keep the threads busy.
    const ROWS: usize = 1024;
    let tensors = tensors(spec, options.ty);
    let plans: Vec<_> = tensors.iter().map(|t| t.plan.clone()).collect();
    let sizes = plans.iter().map(|plan| plan.dims.iter().product::<u64>());
    progress.start(sizes.sum());
    let mut writer = GgufWriter::create(path, metadata, &plans)?;
    let mut out = Vec::new();
    for (number, Tensor { plan, fill }) in (0u64..).zip(&tensors) {
        let columns = plan.dims[0] as usize;
        let rows = plan.dims.get(1).map_or(1, |n| *n as usize);
        let row_bytes = plan.ty.row_bytes(columns).unwrap_or(0);
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            out.resize(count * row_bytes, 0);
            let rows = out.par_chunks_mut(row_bytes).enumerate();
            encode::workers()?.install(|| {
                rows.try_for_each_init(
                    || vec![1.0f32; columns],
                    |row, (i, bytes)| {
                        if let Fill::Random(deviation) = *fill {
                            let stream = number << 32 | (first + i) as u64;
                            let mut random = Random::new(options.seed, stream);
                            row.fill_with(|| random.normal() * deviation);
                        }
                        quantize_row(plan.ty, row, bytes)
                    },
                )
            })?;
            writer.write_tensor_bytes(&out)?;
            advance(progress, count * columns)?;
        }
        writer.next_tensor()?;
    }
    writer.finish()
}

/// Finds the cut at which random tokens run `depth` recursions on average. Returns it and the mean
/// depth there.
fn calibrate(
    path: &Path,
    depth: f64,
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<(f32, f64)> {
    /// Tokens of a text, and texts: a first guess from one, the result from all, so that the mean
    /// over other tokens is off by a few hundredths.
    const TOKENS: usize = 512;
    const TEXTS: usize = 4;
    const GUESSES: usize = 8;
    const CORRECTIONS: usize = 3;
    /// Below what another choice of tokens changes.
    const CLOSE: f64 = 0.02;
    let model = Model::open(path)?;
    let h = model.hyperparameters();
    let most = h.recursions as f64;
    // A cut of 0 lets every token pass, a cut of 1 none.
    if depth == most {
        return Ok((0.0, most));
    }
    if depth == 0.0 {
        return Ok((1.0, 0.0));
    }
    let params = SessionParams {
        context: TOKENS,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params)?;
    let rows = session.plan().params().batch;
    let tokens = RandomTokens::new(h.vocab_size, seed).take(TEXTS * TOKENS);
    let tokens: Vec<u32> = tokens.collect();
    progress.start(((GUESSES + CORRECTIONS * TEXTS) * TOKENS) as u64);
    // How much deeper than asked for the tokens of so many texts run.
    let mut excess = |cut: f64, texts: usize| -> Result<f64> {
        session.set_cut(cut as f32)?;
        let mut sum = 0;
        for text in tokens[..texts * TOKENS].chunks(TOKENS) {
            session.rewind(0)?;
            for chunk in text.chunks(rows) {
                session.prefill(chunk)?;
                advance(progress, chunk.len())?;
            }
            sum += session
                .depths()
                .iter()
                .map(|d| usize::from(*d))
                .sum::<usize>();
        }
        Ok(sum as f64 / (texts * TOKENS) as f64 - depth)
    };
    // The zero of a falling function, by the Illinois method: where the straight line between both
    // sides passes zero; a side that stays weighs less, so that the other one moves too.
    let (mut low, mut high) = ((0.0, most - depth), (1.0, -depth));
    let (mut low_weight, mut high_weight) = (1.0, 1.0);
    let mut cut = f64::from(TRAINED_CUT);
    for _ in 0..GUESSES {
        let (above, below) = (low.1 * low_weight, high.1 * high_weight);
        cut = (low.0 * below - high.0 * above) / (below - above);
        let found = excess(cut, 1)?;
        if found.abs() <= CLOSE {
            break;
        }
        if found > 0.0 {
            (low, low_weight, high_weight) = ((cut, found), 1.0, high_weight / 2.0);
        } else {
            (high, high_weight, low_weight) = ((cut, found), 1.0, low_weight / 2.0);
        }
    }
    // The secant method from there on: the other texts differ little.
    let mut slope = (high.1 - low.1) / (high.0 - low.0);
    let mut best = (cut, excess(cut, TEXTS)?);
    let mut last = best;
    for _ in 1..CORRECTIONS {
        let next = (last.0 - last.1 / slope).clamp(0.0, 1.0);
        if best.1.abs() <= CLOSE || next == last.0 {
            break;
        }
        let found = (next, excess(next, TEXTS)?);
        if found.1 != last.1 {
            slope = (found.1 - last.1) / (found.0 - last.0);
        }
        if found.1.abs() < best.1.abs() {
            best = found;
        }
        last = found;
    }
    Ok((best.0 as f32, depth + best.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relatives_have_about_the_layers_of_their_shape() {
        let layers = |name: &str, layers| {
            let spec = SynthShape::parse(name).unwrap().spec(layers).unwrap();
            (spec.block, spec.block * spec.recursions + 2 * spec.middle())
        };
        assert_eq!(layers("smollm-135m", None), (30, 30));
        assert_eq!(layers("smollm-135m-mor2", None), (14, 30));
        assert_eq!(layers("smollm-135m-mor3", None), (9, 29));
        assert_eq!(layers("smollm-135m-recursive3", None), (9, 29));
        assert_eq!(layers("smollm-135m-mor4", None), (7, 30));
        assert_eq!(layers("smollm-360m-mor3", None), (10, 32));
        assert_eq!(layers("smollm-360m-mor4", None), (8, 34));
        assert_eq!(layers("smollm-135m", Some(29)), (29, 29));
        assert_eq!(layers("smollm-135m-mor3", Some(5)), (1, 5));
        for (name, wrong) in [("tiny", 0), ("tiny-mor3", 2), ("tiny", MAX_BLOCKS + 1)] {
            assert!(SynthShape::parse(name).unwrap().spec(Some(wrong)).is_err());
        }
    }
}
