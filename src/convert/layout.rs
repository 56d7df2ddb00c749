//! Which tensor of the checkpoint becomes which tensor of the file, and which recursions share
//! one.

use std::collections::HashSet;

use super::options::{Balancing, Progress, Selection};
use super::router::Rule;
use super::source::{Source, SourceTensor};
use super::spec::Spec;
use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct Planned<'s> {
    /// Its name in the file.
    pub name: String,
    pub tensor: &'s SourceTensor,
    /// A matrix in the chosen format; all else stays F32.
    pub matrix: bool,
}

/// Everything that is written, and what is not because another tensor holds it.
#[derive(Debug, Default)]
pub(super) struct Layout<'s> {
    pub tensors: Vec<Planned<'s>>,
    /// `name=target`: a recursion's tensor that is stored as another recursion's.
    pub aliases: Vec<String>,
    pub tied: bool,
    /// Recursions' tensors that recursion 0 holds, found by equal content.
    pub collapsed: usize,
}

/// A tensor of a decoder layer: the checkpoint's name, the file's name, the shape.
struct Part {
    source: &'static str,
    target: &'static str,
    shape: Vec<usize>,
    optional: bool,
}

fn parts(spec: &Spec) -> Vec<Part> {
    let s = &spec.shape;
    let (q, kv) = (
        s.heads.saturating_mul(s.head_dim),
        s.kv_heads.saturating_mul(s.head_dim),
    );
    let norm = |source, target| Part {
        source,
        target,
        shape: vec![s.hidden],
        optional: false,
    };
    let mut parts = vec![
        norm("input_layernorm.weight", "attn_norm.weight"),
        norm("post_attention_layernorm.weight", "ffn_norm.weight"),
    ];
    let linear = [
        (
            "self_attn.q_proj.weight",
            "attn_q.weight",
            "self_attn.q_proj.bias",
            "attn_q.bias",
            q,
            s.hidden,
        ),
        (
            "self_attn.k_proj.weight",
            "attn_k.weight",
            "self_attn.k_proj.bias",
            "attn_k.bias",
            kv,
            s.hidden,
        ),
        (
            "self_attn.v_proj.weight",
            "attn_v.weight",
            "self_attn.v_proj.bias",
            "attn_v.bias",
            kv,
            s.hidden,
        ),
        (
            "self_attn.o_proj.weight",
            "attn_output.weight",
            "self_attn.o_proj.bias",
            "attn_output.bias",
            s.hidden,
            q,
        ),
        (
            "mlp.gate_proj.weight",
            "ffn_gate.weight",
            "mlp.gate_proj.bias",
            "ffn_gate.bias",
            s.ffn,
            s.hidden,
        ),
        (
            "mlp.up_proj.weight",
            "ffn_up.weight",
            "mlp.up_proj.bias",
            "ffn_up.bias",
            s.ffn,
            s.hidden,
        ),
        (
            "mlp.down_proj.weight",
            "ffn_down.weight",
            "mlp.down_proj.bias",
            "ffn_down.bias",
            s.hidden,
            s.ffn,
        ),
    ];
    for (weight, target, bias, bias_target, rows, columns) in linear {
        parts.push(Part {
            source: weight,
            target,
            shape: vec![rows, columns],
            optional: false,
        });
        parts.push(Part {
            source: bias,
            target: bias_target,
            shape: vec![rows],
            optional: true,
        });
    }
    parts
}

/// Assigns every tensor of the checkpoint its place.
pub(super) fn plan<'s>(
    source: &'s Source,
    spec: &Spec,
    progress: &mut dyn Progress,
) -> Result<Layout<'s>> {
    let mut planner = Planner {
        source,
        spec,
        used: HashSet::new(),
        layout: Layout::default(),
    };
    planner.embedding()?;
    planner.layers()?;
    planner.routers()?;
    planner.head()?;
    planner.account_for_the_rest(progress)?;
    if planner.layout.collapsed > 0 {
        progress.note(&format!(
            "{} tensors equal those of recursion 0 and are stored once.",
            planner.layout.collapsed
        ));
    }
    Ok(planner.layout)
}

struct Planner<'s, 'a> {
    source: &'s Source,
    spec: &'a Spec,
    /// Names in the checkpoint that have a place (or were found to be copies).
    used: HashSet<String>,
    layout: Layout<'s>,
}

impl<'s> Planner<'s, '_> {
    /// Looks a tensor up and checks its shape.
    fn find(&mut self, name: &str, shape: &[usize]) -> Result<Option<&'s SourceTensor>> {
        let Some(tensor) = self.source.get(name) else {
            return Ok(None);
        };
        if tensor.shape != shape {
            return Err(Error::convert(format_args!(
                "'{name}' has shape {:?}, but the model's configuration asks for {shape:?}",
                tensor.shape
            )));
        }
        self.used.insert(name.to_string());
        Ok(Some(tensor))
    }

    fn require(&mut self, name: &str, shape: &[usize]) -> Result<&'s SourceTensor> {
        self.find(name, shape)?.ok_or_else(|| {
            Error::convert(format_args!(
                "the tensor '{name}' is missing; it was looked for in {}",
                self.source.label
            ))
        })
    }

    fn store(&mut self, name: String, tensor: &'s SourceTensor, matrix: bool) {
        self.layout.tensors.push(Planned {
            name,
            tensor,
            matrix,
        });
    }

    fn embedding(&mut self) -> Result<()> {
        let shape = [self.spec.shape.vocab, self.spec.shape.hidden];
        let tensor = self.require("model.embed_tokens.weight", &shape)?;
        self.store("token_embd.weight".into(), tensor, true);
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let shape = [self.spec.shape.vocab, self.spec.shape.hidden];
        let norm = self.require("model.norm.weight", &shape[1..])?;
        self.store("output_norm.weight".into(), norm, false);
        let embedding = self.require("model.embed_tokens.weight", &shape)?;
        match self.find("lm_head.weight", &shape)? {
            Some(head) if !self.source.equal(head, embedding) => {
                self.store("output.weight".into(), head, true);
            }
            _ => self.layout.tied = true,
        }
        Ok(())
    }

    fn layers(&mut self) -> Result<()> {
        let parts = parts(self.spec);
        let middle = self.spec.middle();
        if middle > 0 {
            self.own_layer("model.layers.0", 0, &parts)?;
        }
        for j in 0..self.spec.block {
            for part in &parts {
                self.shared(j, part)?;
            }
        }
        if middle > 0 {
            self.own_layer(&self.spec.last_name(), middle + self.spec.block, &parts)?;
        }
        Ok(())
    }

    /// A layer that belongs to no recursion.
    fn own_layer(&mut self, layer: &str, stored: usize, parts: &[Part]) -> Result<()> {
        for part in parts {
            let name = format!("{layer}.{}", part.source);
            let tensor = if part.optional {
                self.find(&name, &part.shape)?
            } else {
                Some(self.require(&name, &part.shape)?)
            };
            if let Some(tensor) = tensor {
                self.store(
                    format!("blk.{stored}.{}", part.target),
                    tensor,
                    part.shape.len() == 2,
                );
            }
        }
        Ok(())
    }

    /// One tensor of one layer of the block, in every recursion: recursion 0 holds it, and a
    /// deeper recursion stores its own only where it has one that nobody before it has.
    fn shared(&mut self, j: usize, part: &Part) -> Result<()> {
        let stored = self.spec.middle() + j;
        let matrix = part.shape.len() == 2;
        let name = |spec: &Spec, r| format!("{}.{}", spec.layer_name(r, j), part.source);
        let base_name = name(self.spec, 0);
        let base = if part.optional {
            self.find(&base_name, &part.shape)?
        } else {
            Some(self.require(&base_name, &part.shape)?)
        };
        if let Some(base) = base {
            self.store(format!("blk.{stored}.{}", part.target), base, matrix);
        }
        let mut own: Vec<(&'s SourceTensor, String)> = Vec::new();
        for r in 1..self.spec.recursions {
            let Some(tensor) = self.find(&name(self.spec, r), &part.shape)? else {
                continue;
            };
            if base.is_some_and(|base| self.source.equal(base, tensor)) {
                self.layout.collapsed += 1;
                continue;
            }
            let target = format!("blk.{stored}.rec.{r}.{}", part.target);
            match own.iter().find(|(t, _)| self.source.equal(t, tensor)) {
                Some((_, first)) => self.layout.aliases.push(format!("{target}={first}")),
                None => {
                    own.push((tensor, target.clone()));
                    self.store(target, tensor, matrix);
                }
            }
        }
        Ok(())
    }

    fn routers(&mut self) -> Result<()> {
        let Some(router) = &self.spec.router else {
            return Ok(());
        };
        let recursions = self.spec.recursions;
        match &router.rule {
            Rule::Token { balancing } => {
                let layer = self.spec.router_layer(0);
                self.router(
                    &format!("{layer}.mor_router"),
                    "router.0",
                    router.mlp,
                    recursions,
                )?;
                if *balancing == Balancing::LossFree {
                    let bias = self.require(&format!("{layer}.router_bias"), &[recursions])?;
                    self.store("router.0.bias".into(), bias, false);
                }
            }
            Rule::Expert {
                selection, aux_mlp, ..
            } => {
                for r in 0..recursions {
                    let layer = self.spec.router_layer(r);
                    self.router(
                        &format!("{layer}.mor_router"),
                        &format!("router.{r}"),
                        router.mlp,
                        1,
                    )?;
                    if *selection == Selection::AuxRouter {
                        self.router(
                            &format!("{layer}.mlp_router"),
                            &format!("aux_router.{r}"),
                            *aux_mlp,
                            1,
                        )?;
                    }
                }
            }
        }
        Ok(())
    }

    fn router(&mut self, source: &str, target: &str, mlp: bool, outputs: usize) -> Result<()> {
        let hidden = self.spec.shape.hidden;
        if !mlp {
            let weight = self.require(&format!("{source}.router.weight"), &[outputs, hidden])?;
            self.store(format!("{target}.weight"), weight, false);
            return Ok(());
        }
        let first = format!("{source}.router.0.weight");
        // The inner width is the tensor's own to say.
        let inner = self
            .source
            .get(&first)
            .and_then(|t| t.shape.first().copied());
        let weight = self.require(&first, &[inner.unwrap_or(hidden), hidden])?;
        self.store(format!("{target}.0.weight"), weight, false);
        let second = format!("{source}.router.2.weight");
        let weight = self.require(&second, &[outputs, inner.unwrap_or(hidden)])?;
        self.store(format!("{target}.2.weight"), weight, false);
        Ok(())
    }

    /// Every tensor of the checkpoint must have found its place, or be known not to matter: one
    /// that nobody read would change what the model computes.
    fn account_for_the_rest(&self, progress: &mut dyn Progress) -> Result<()> {
        let mut skipped: Vec<&str> = Vec::new();
        for name in self.source.names().filter(|n| !self.used.contains(*n)) {
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            // A router that is not asked changes what is computed, unless the caller wants it so.
            let router = [".mlp_router.", ".router_bias"]
                .iter()
                .any(|part| name.contains(part))
                || (self.spec.kind_is_given && name.contains(".mor_router."));
            let parts = [
                "model.layers.",
                "model.norm.",
                "model.embed_tokens.",
                "lm_head.",
            ];
            if parts.iter().any(|part| name.starts_with(part)) && !router {
                return Err(Error::convert(format_args!(
                    "the checkpoint holds '{name}', which has no place in a model of kind '{}' with {} layers shared as {} by {} recursions; check the training configuration, or say what it is (--kind, --sharing, --recursions)",
                    self.spec.kind.name(),
                    self.logical_layers(),
                    self.spec.sharing.name(),
                    self.spec.recursions
                )));
            }
            skipped.push(name);
        }
        if let Some(first) = skipped.first() {
            progress.note(&format!(
                "{} tensors of the checkpoint take no part and were left out, '{first}' first.",
                skipped.len()
            ));
        }
        Ok(())
    }

    fn logical_layers(&self) -> usize {
        self.spec.block * self.spec.recursions + 2 * self.spec.middle()
    }
}
