//! What kind of model a checkpoint is: the caller's word first, then the training run's
//! configuration, then what the tensors show, then the paper's defaults, each of which is said.

use super::census::{Census, Classes, Known, MAX_LAYERS, Style, infer_repeat, logical_layers};
use super::document::Document;
use super::hyper::{self, Shape};
use super::options::{Kind, KvStrategy, Overrides, Progress, Sharing};
use super::router::{self, Router};
use super::source::Source;
use crate::error::{Error, Result};

/// The documents beside a checkpoint.
pub(super) struct Documents {
    /// `config.json`
    pub config: Document,
    /// `mor.yaml`
    pub training: Document,
}

/// Everything about a model except its numbers.
#[derive(Debug)]
pub(super) struct Spec {
    pub kind: Kind,
    /// Whether the caller has said that kind.
    pub kind_is_given: bool,
    pub style: Style,
    pub sharing: Sharing,
    pub recursions: usize,
    /// Layers of the shared block (of the whole model when vanilla).
    pub block: usize,
    pub shape: Shape,
    pub router: Option<Router>,
    pub kv: KvStrategy,
}

impl Spec {
    /// Works out what the checkpoint is.
    pub(super) fn resolve(
        source: &Source,
        documents: &Documents,
        overrides: &Overrides,
        progress: &mut dyn Progress,
    ) -> Result<Spec> {
        let training = &documents.training;
        if training.bool("relaxation.enable")? == Some(true) {
            return Err(Error::convert(
                "the training configuration enables relaxation (low-rank adapters per recursion), which mor does not run yet",
            ));
        }
        let census = Census::take(source)?;
        let known = Known {
            sharing: named_sharing(training, overrides)?,
            recursions: match overrides.recursions {
                Some(n) => Some(n as usize),
                None => training.usize("recursive.num_recursion")?,
            },
            layers: match overrides.layers {
                Some(n) => Some(n as usize),
                None => documents.config.usize("num_hidden_layers")?,
            },
        };
        for (what, count) in [
            ("num_recursion", known.recursions),
            ("num_hidden_layers", known.layers),
        ] {
            if let Some(count) = count.filter(|n| !(1..=MAX_LAYERS).contains(n)) {
                return Err(Error::convert(format_args!(
                    "{what} is {count}; it must be from 1 to {MAX_LAYERS}"
                )));
            }
        }
        let kind = named_kind(training, overrides)?;
        let structure = match census.style {
            Style::Plain => plain(source, &census, kind, known, progress)?,
            _ => blocks(&census, kind, known, progress)?,
        };
        let mut spec = Spec {
            style: census.style,
            shape: hyper::resolve(source, &structure, &documents.config, overrides, progress)?,
            kind: structure.kind,
            kind_is_given: overrides.kind.is_some(),
            sharing: structure.sharing,
            recursions: structure.recursions,
            block: structure.block,
            router: None,
            kv: KvStrategy::RecursionWise,
        };
        spec.router = router::resolve(source, &spec, training, overrides, progress)?;
        spec.kv = kv_strategy(&spec, documents, overrides, progress)?;
        Ok(spec)
    }

    /// 1 where an own first (and last) layer stands around the block.
    pub(super) fn middle(&self) -> usize {
        usize::from(self.sharing.has_own_ends())
    }

    /// Stored blocks.
    pub(super) fn blocks(&self) -> usize {
        self.block + 2 * self.middle()
    }

    /// The checkpoint's name for layer `j` of the block in recursion `r`.
    pub(super) fn layer_name(&self, r: usize, j: usize) -> String {
        layer_name(self.style, self.sharing, self.recursions, self.block, r, j)
    }

    /// The checkpoint's name for the own last layer.
    pub(super) fn last_name(&self) -> String {
        let middle = self.middle();
        let layer = match self.style {
            Style::Block => middle + self.recursions,
            Style::BlockList => middle + 1,
            Style::Plain => middle + self.recursions * self.block,
        };
        format!("model.layers.{layer}")
    }

    /// The checkpoint's layer that holds recursion `r`'s router.
    pub(super) fn router_layer(&self, r: usize) -> String {
        let at = match self.style {
            Style::Block => r,
            _ => 0,
        };
        format!("model.layers.{}", self.middle() + at)
    }

    /// The sharing as the engine executes it: a routed model always runs its block as a cycle,
    /// whatever order the training configuration names.
    pub(super) fn executed_sharing(&self) -> Sharing {
        match (self.kind, self.sharing) {
            (Kind::Expert | Kind::Token, Sharing::Sequence) => Sharing::Cycle,
            (Kind::Expert | Kind::Token, Sharing::MiddleSequence) => Sharing::MiddleCycle,
            (_, sharing) => sharing,
        }
    }
}

/// The recursion structure, before any width is known.
pub(super) struct Structure {
    pub kind: Kind,
    pub style: Style,
    pub sharing: Sharing,
    pub recursions: usize,
    pub block: usize,
}

impl Structure {
    /// The checkpoint's name for the first layer of the block.
    pub(super) fn first_block_layer(&self) -> String {
        layer_name(self.style, self.sharing, self.recursions, self.block, 0, 0)
    }
}

fn layer_name(
    style: Style,
    sharing: Sharing,
    recursions: usize,
    block: usize,
    r: usize,
    j: usize,
) -> String {
    let middle = usize::from(sharing.has_own_ends());
    match style {
        Style::Block => format!("model.layers.{}.block.{j}", middle + r),
        Style::BlockList => format!("model.layers.{middle}.block_list.{r}.{j}"),
        Style::Plain if sharing.repeats_in_place() => {
            format!("model.layers.{}", middle + j * recursions + r)
        }
        Style::Plain => format!("model.layers.{}", middle + r * block + j),
    }
}

fn named_kind(training: &Document, overrides: &Overrides) -> Result<Option<Kind>> {
    if overrides.kind.is_some() || !training.is_present() {
        return Ok(overrides.kind);
    }
    if training.bool("mor.enable")? == Some(true) {
        let kind = training.named("mor.type", Kind::parse, "expert, token")?;
        return kind.map(Some).ok_or_else(|| {
            Error::convert(format_args!(
                "'{}' enables mor without mor.type; say expert or token",
                training.label()
            ))
        });
    }
    let recursive = training.bool("recursive.enable")? == Some(true);
    Ok(Some(if recursive {
        Kind::Recursive
    } else {
        Kind::Vanilla
    }))
}

fn named_sharing(training: &Document, overrides: &Overrides) -> Result<Option<Sharing>> {
    match overrides.sharing {
        Some(sharing) => Ok(Some(sharing)),
        None => training.named(
            "recursive.sharing",
            Sharing::parse,
            "cycle, sequence, middle_cycle, middle_sequence",
        ),
    }
}

/// Structure of a checkpoint that spells its layers `model.layers.I`.
fn plain(
    source: &Source,
    census: &Census,
    kind: Option<Kind>,
    known: Known,
    progress: &mut dyn Progress,
) -> Result<Structure> {
    if let Some(routed @ (Kind::Expert | Kind::Token)) = kind {
        return Err(Error::convert(format_args!(
            "the model is said to be of kind '{}', but {} names no layer as such checkpoints do (model.layers.1.block.0 or model.layers.1.block_list.0.0)",
            routed.name(),
            source.label
        )));
    }
    let layers = known.layers.unwrap_or(census.plain_end());
    let vanilla = Structure {
        kind: Kind::Vanilla,
        style: Style::Plain,
        sharing: Sharing::None,
        recursions: 1,
        block: layers,
    };
    if kind == Some(Kind::Vanilla) {
        return Ok(vanilla);
    }
    let recursive = |sharing, recursions, layers| {
        Ok(Structure {
            kind: Kind::Recursive,
            style: Style::Plain,
            sharing,
            recursions,
            block: block_layers(layers, sharing, recursions)?,
        })
    };
    if let (None | Some(Kind::Recursive), Some(sharing), Some(recursions)) =
        (kind, known.sharing, known.recursions)
        && (kind.is_some() || sharing != Sharing::None)
    {
        let layers = match known.layers {
            Some(layers) => layers,
            None => {
                let layers = logical_layers(source, census, sharing, recursions)?;
                progress.note(&format!(
                    "From the layers that are stored, the model is taken to have {layers} layers: num_hidden_layers (--layers) would say it."
                ));
                layers
            }
        };
        return recursive(sharing, recursions, layers);
    }
    match infer_repeat(census, &Classes::of(source, census), known) {
        Some(repeat) => {
            progress.note(&format!(
                "From the layers that are missing or equal, the model is taken to be recursive: {} layers, {} recursions, sharing {}.",
                repeat.layers,
                repeat.recursions,
                repeat.sharing.name()
            ));
            recursive(repeat.sharing, repeat.recursions, repeat.layers)
        }
        None if kind == Some(Kind::Recursive) => Err(Error::convert(format_args!(
            "the layers of {} do not show how they are shared; give the sharing and the number of recursions (--sharing, --recursions)",
            source.label
        ))),
        None => {
            progress.note("No mor.yaml says otherwise and no layers repeat, so the model is taken to be vanilla: one recursion, no router.");
            Ok(vanilla)
        }
    }
}

/// Structure of a checkpoint that spells its layers as routed ones.
fn blocks(
    census: &Census,
    kind: Option<Kind>,
    known: Known,
    progress: &mut dyn Progress,
) -> Result<Structure> {
    let kind = kind.unwrap_or_else(|| {
        let kind = match census.style {
            Style::BlockList => Kind::Token,
            _ => Kind::Expert,
        };
        progress.note(&format!(
            "From the tensors' names, the model is taken to be of kind '{}'.",
            kind.name()
        ));
        kind
    });
    if kind == Kind::Vanilla {
        return Err(Error::convert(
            "the model is said to be vanilla, but its layers are those of a routed model",
        ));
    }
    let sharing = known.sharing.unwrap_or_else(|| {
        let sharing = if census.has_own_first() {
            Sharing::MiddleCycle
        } else {
            Sharing::Cycle
        };
        progress.note(&format!(
            "From the tensors' names, the sharing is taken to be {}.",
            sharing.name()
        ));
        sharing
    });
    let recursions = known.recursions.unwrap_or_else(|| {
        progress.note(&format!(
            "From the tensors' names, the number of recursions is taken to be {}.",
            census.recursions
        ));
        census.recursions
    });
    let block = match known.layers {
        Some(layers) => block_layers(layers, sharing, recursions)?,
        None => census.block_layers,
    };
    Ok(Structure {
        kind,
        style: census.style,
        sharing,
        recursions,
        block,
    })
}

/// Layers of the shared block.
fn block_layers(layers: usize, sharing: Sharing, recursions: usize) -> Result<usize> {
    if sharing == Sharing::None && recursions > 1 {
        return Err(Error::convert(format_args!(
            "{recursions} recursions share their layers in some way, but the sharing is said to be none"
        )));
    }
    let inner = layers.checked_sub(2 * usize::from(sharing.has_own_ends()));
    inner
        .filter(|inner| recursions > 0 && inner % recursions == 0 && *inner > 0)
        .map(|inner| inner / recursions)
        .ok_or_else(|| {
            Error::convert(format_args!(
                "{layers} layers cannot be shared as {} by {recursions} recursions; check num_hidden_layers, num_recursion and sharing (--layers, --recursions, --sharing)",
                sharing.name()
            ))
        })
}

fn kv_strategy(
    spec: &Spec,
    documents: &Documents,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<KvStrategy> {
    let routed = matches!(spec.kind, Kind::Expert | Kind::Token);
    // The authors' trainer writes that to config.json too.
    let said = |key: &str| match documents.training.bool(key)? {
        Some(on) => Ok(Some(on)),
        None => documents.config.bool(key),
    };
    let named = match overrides.kv_strategy {
        Some(strategy) => Some(strategy),
        None => said("kv_sharing.enable")?.map(|on| match on {
            true => KvStrategy::Shared,
            false => KvStrategy::RecursionWise,
        }),
    };
    if !routed {
        return match named {
            Some(KvStrategy::Shared) => Err(Error::unsupported(
                "a model without a router whose recursions share keys and values (kv_sharing.enable); --kv-strategy recursion_wise converts it to one that does not",
            )),
            _ => Ok(KvStrategy::RecursionWise),
        };
    }
    // In a block that runs first the new entries are those that stand there already.
    let updates = named == Some(KvStrategy::Shared)
        && spec.kind == Kind::Expert
        && spec.sharing.has_own_ends()
        && said("kv_sharing.update_cache")? == Some(true);
    if updates && overrides.kv_strategy.is_none() {
        return Err(Error::unsupported(
            "a shared cache that later recursions update (kv_sharing.update_cache); --kv-strategy shared converts it to one that recursion 0 alone fills",
        ));
    }
    Ok(named.unwrap_or_else(|| {
        progress.note("Nothing says whether KV is shared, so each recursion is taken to have its own (recursion_wise); --kv-strategy says otherwise.");
        KvStrategy::RecursionWise
    }))
}
