//! What the names and contents of a checkpoint's tensors tell about its structure.

use std::collections::{BTreeMap, BTreeSet};

use super::options::Sharing;
use super::source::Source;
use crate::error::{Error, Result};

/// More layers than any model has; keeps a hostile name or number from sizing anything.
pub(super) const MAX_LAYERS: usize = 4096;

/// The matrices that decide whether two plain layers are the same layer. Norms are left out: a
/// layer that is shared but for its norms is still a shared layer.
const MATRICES: [&str; 7] = [
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
];

const NORMS: [&str; 2] = ["input_layernorm.weight", "post_attention_layernorm.weight"];

/// How the checkpoint spells its recursed layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// `model.layers.I`
    Plain,
    /// `model.layers.I.block.J`: expert-choice.
    Block,
    /// `model.layers.I.block_list.R.J`: token-choice.
    BlockList,
}

/// The layers that appear in the tensors' names.
#[derive(Debug)]
pub(super) struct Census {
    pub style: Style,
    /// Layer numbers with tensors of their own directly below them.
    plain: BTreeSet<usize>,
    /// Layer numbers with a block or a block list.
    blocks: BTreeSet<usize>,
    /// Layers of the block, as far as names show.
    pub block_layers: usize,
    /// Recursions that appear in names: routed layers, or entries of the block list.
    pub recursions: usize,
}

impl Census {
    pub(super) fn take(source: &Source) -> Result<Census> {
        let mut plain = BTreeSet::new();
        let mut blocks = BTreeSet::new();
        let mut routed = BTreeSet::new();
        let (mut block_layers, mut listed) = (0usize, 0usize);
        let mut style = Style::Plain;
        for name in source.names() {
            let Some(rest) = name.strip_prefix("model.layers.") else {
                continue;
            };
            let parts: Vec<&str> = rest.split('.').collect();
            let number = |at: usize| parts.get(at).and_then(|p| p.parse::<usize>().ok());
            let Some(layer) = number(0) else {
                continue;
            };
            let mut highest = layer;
            match parts.get(1).copied() {
                Some("block") => {
                    style = Style::Block;
                    blocks.insert(layer);
                    let j = number(2).unwrap_or(0);
                    highest = highest.max(j);
                    block_layers = block_layers.max(j.saturating_add(1));
                }
                Some("block_list") => {
                    style = Style::BlockList;
                    blocks.insert(layer);
                    let (r, j) = (number(2).unwrap_or(0), number(3).unwrap_or(0));
                    highest = highest.max(r).max(j);
                    listed = listed.max(r.saturating_add(1));
                    block_layers = block_layers.max(j.saturating_add(1));
                }
                Some("mor_router") => {
                    routed.insert(layer);
                }
                Some("mlp_router" | "router_bias") => {}
                _ => {
                    plain.insert(layer);
                }
            }
            if highest >= MAX_LAYERS {
                return Err(Error::convert(format_args!(
                    "the tensor '{name}' counts beyond {MAX_LAYERS} layers, which no model has"
                )));
            }
        }
        let recursions = match style {
            Style::BlockList => listed.max(router_outputs(source, &routed)),
            Style::Block => routed.len().max(blocks.len()),
            Style::Plain => 0,
        };
        Ok(Census {
            style,
            plain,
            blocks,
            block_layers,
            recursions,
        })
    }

    /// Whether an own first layer stands before the block (never asked of the plain style).
    pub(super) fn has_own_first(&self) -> bool {
        self.blocks.first().is_some_and(|&b| b > 0)
    }

    /// How many plain layers from the first on have all their tensors.
    fn complete(&self, source: &Source) -> usize {
        let whole = |layer: &usize| {
            let mut parts = MATRICES.iter().chain(&NORMS);
            parts.all(|part| {
                source
                    .get(&format!("model.layers.{layer}.{part}"))
                    .is_some()
            })
        };
        (0..self.plain_end()).take_while(whole).count()
    }

    /// One more than the highest plain layer number.
    pub(super) fn plain_end(&self) -> usize {
        self.plain.last().map_or(0, |&last| last + 1)
    }
}

/// A token-choice router has an output for each depth.
fn router_outputs(source: &Source, routed: &BTreeSet<usize>) -> usize {
    let outputs = |layer: &usize| {
        ["weight", "2.weight"].iter().find_map(|leaf| {
            let name = format!("model.layers.{layer}.mor_router.router.{leaf}");
            source.get(&name)?.shape.first().copied()
        })
    };
    routed
        .first()
        .and_then(outputs)
        .unwrap_or(0)
        .min(MAX_LAYERS)
}

/// How plain layers repeat: the sharing, the number of recursions and the logical layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Repeat {
    pub sharing: Sharing,
    pub recursions: usize,
    pub layers: usize,
}

impl Repeat {
    /// The stored layer that stands for logical layer `layer`.
    fn base_of(&self, layer: usize) -> usize {
        let middle = usize::from(self.sharing.has_own_ends());
        if self.sharing.has_own_ends() && (layer == 0 || layer + 1 == self.layers) {
            return layer;
        }
        let inner = layer - middle;
        let block = (self.layers - 2 * middle) / self.recursions;
        middle
            + if self.sharing.repeats_in_place() {
                inner - inner % self.recursions
            } else {
                inner % block
            }
    }

    /// The layers of the shared block, if the count divides.
    fn block(&self) -> Option<usize> {
        let inner = self
            .layers
            .checked_sub(2 * usize::from(self.sharing.has_own_ends()))?;
        (self.recursions > 0 && inner % self.recursions == 0)
            .then_some(inner / self.recursions)
            .filter(|&b| b > 0)
    }
}

/// Equality classes of plain layers: `Some(first equal layer)`, or `None` where a layer's
/// matrices are absent.
pub(super) struct Classes(BTreeMap<usize, usize>);

impl Classes {
    pub(super) fn of(source: &Source, census: &Census) -> Classes {
        let mut classes: BTreeMap<usize, usize> = BTreeMap::new();
        for &layer in &census.plain {
            let name = |l: usize, m: &str| format!("model.layers.{l}.{m}");
            if !MATRICES
                .iter()
                .any(|m| source.get(&name(layer, m)).is_some())
            {
                continue;
            }
            let same = |other: usize| {
                MATRICES.iter().all(|m| {
                    match (source.get(&name(layer, m)), source.get(&name(other, m))) {
                        (Some(a), Some(b)) => source.equal(a, b),
                        (None, _) => true,
                        (Some(_), None) => false,
                    }
                })
            };
            let class = classes
                .iter()
                .filter(|&(l, c)| l == c)
                .map(|(&l, _)| l)
                .find(|&l| same(l))
                .unwrap_or(layer);
            classes.insert(layer, class);
        }
        Classes(classes)
    }

    /// Whether the layers at hand agree with a way of repeating.
    fn agree(&self, repeat: &Repeat) -> bool {
        repeat.block().is_some()
            && (0..repeat.layers).all(|layer| {
                let base = repeat.base_of(layer);
                match (self.0.get(&layer), self.0.get(&base)) {
                    (Some(a), Some(b)) => a == b,
                    (None, Some(_)) => true,
                    (_, None) => false,
                }
            })
    }
}

/// The logical layers of a recursive model of which the sharing and the recursions are known: what
/// the plain layers at hand are layers of. A deeper recursion may have its own version of some
/// tensors or of all, or copies of recursion 0's, or nothing.
pub(super) fn logical_layers(
    source: &Source,
    census: &Census,
    sharing: Sharing,
    recursions: usize,
) -> Result<usize> {
    let end = census.plain_end();
    let last_block = end.div_ceil(recursions);
    if sharing.has_own_ends() {
        // The own last layer is always stored.
        return Ok(end);
    }
    if sharing.repeats_in_place() {
        return Ok(last_block * recursions);
    }
    let complete = census.complete(source);
    let block = if complete < end {
        // Layers of which tensors are missing are those of deeper recursions.
        if complete > last_block {
            return Err(Error::convert(format_args!(
                "the layers of {} may be a block of {last_block} up to {complete} that is shared by {recursions} recursions; give the number of layers (num_hidden_layers, --layers)",
                source.label
            )));
        }
        last_block
    } else if shares_a_matrix(source, end) {
        last_block
    } else {
        end
    };
    Ok(block * recursions)
}

/// Whether a matrix is stored in two of the first `layers` plain layers: one of them is the
/// other's in a deeper recursion.
fn shares_a_matrix(source: &Source, layers: usize) -> bool {
    MATRICES.iter().any(|part| {
        let name = |layer| format!("model.layers.{layer}.{part}");
        let all: Vec<_> = (0..layers).filter_map(|l| source.get(&name(l))).collect();
        let same_later = |i: usize| all[i + 1..].iter().any(|b| source.equal(all[i], b));
        (0..all.len()).any(same_later)
    })
}

/// What is already known about how plain layers repeat.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known {
    pub sharing: Option<Sharing>,
    pub recursions: Option<usize>,
    pub layers: Option<usize>,
}

/// Finds the way of repeating that explains the plain layers and stores the fewest of them.
pub(super) fn infer_repeat(census: &Census, classes: &Classes, known: Known) -> Option<Repeat> {
    let sharings = [
        Sharing::MiddleCycle,
        Sharing::Cycle,
        Sharing::MiddleSequence,
        Sharing::Sequence,
    ];
    let mut best: Option<(usize, Repeat)> = None;
    for sharing in sharings {
        if known.sharing.is_some_and(|s| s != sharing) {
            continue;
        }
        let most = known.layers.unwrap_or(census.plain_end()).min(MAX_LAYERS);
        let counts = known.recursions.map_or(2..=most, |n| n..=n);
        for recursions in counts {
            for layers in layer_counts(census, sharing, recursions, known) {
                let repeat = Repeat {
                    sharing,
                    recursions,
                    layers,
                };
                if !classes.agree(&repeat) {
                    continue;
                }
                let saved = repeat.block().unwrap_or(0) * recursions.saturating_sub(1);
                if best.is_none_or(|(most, _)| saved > most) {
                    best = Some((saved, repeat));
                }
                break;
            }
        }
    }
    best.map(|(_, repeat)| repeat)
}

/// The numbers of logical layers to try: the known one; or all layers written out; or, where the
/// number of recursions is known (else any would do), only the stored ones written.
fn layer_counts(census: &Census, sharing: Sharing, recursions: usize, known: Known) -> Vec<usize> {
    if let Some(layers) = known.layers {
        return vec![layers];
    }
    let end = census.plain_end();
    let mut counts = vec![end];
    if known.recursions.is_some() {
        match sharing {
            Sharing::Cycle => counts.extend(census.plain.len().checked_mul(recursions)),
            Sharing::Sequence => {
                counts.extend(end.checked_add(recursions).and_then(|n| n.checked_sub(1)));
            }
            _ => {}
        }
    }
    counts.retain(|&n| n <= MAX_LAYERS);
    counts
}
