//! What a file says about its model: sizes, recursion, routing. Read from GGUF metadata once, with
//! every value checked against a named limit, so that nothing later has to doubt a size.

use crate::error::{Error, Result};
use crate::gguf::Metadata;
use crate::memory::{try_collect, try_string};
use crate::text::{Text, listed};

/// Largest width (hidden, feed-forward, heads × head size) that is taken seriously. Products of
/// two such widths stay far inside `usize` on 64-bit machines.
pub const MAX_WIDTH: usize = 1 << 20;
/// Most stored blocks.
pub const MAX_BLOCKS: usize = 1024;
/// Most recursions; a token's depth is kept in a byte.
pub const MAX_RECURSIONS: usize = 64;
/// Largest head: attention keeps one head in a fixed array on the stack.
pub const MAX_HEAD_DIM: usize = 512;
/// Largest vocabulary that a file may declare.
pub const MAX_VOCAB: usize = 1 << 24;
/// Longest context that a file may declare.
pub const MAX_CONTEXT: usize = 1 << 28;

/// The family of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// A plain Llama file from anywhere: `N_r = 1`, no router.
    Llama,
    /// This project's own: recursion and routing described by `mor.*` keys.
    Mor,
}

/// Which two elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// Element `i` with `i + d/2`: Hugging Face checkpoints, and what `mor convert` writes.
    Neox,
    /// Element `2i` with `2i + 1`: llama.cpp permutes Q and K of Llama files to this.
    Norm,
}

/// Rotary position embedding (Su et al., 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// θ: frequency `i` is `base^(-2i/dims)`.
    pub base: f64,
    /// Rotated elements of each head, even, at most the head size.
    pub dims: usize,
    /// Which elements rotate together.
    pub pairing: RopePairing,
    /// Linear scaling: positions are divided by this.
    pub scale: f64,
}

/// An enum whose values have a spelling of their own in files and options.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$item_doc])* $item,)* }

        impl $name {
            /// Every value.
            pub const ALL: [Self; [$($text,)*].len()] = [$(Self::$item,)*];

            /// The spelling in files and options.
            pub fn name(self) -> &'static str {
                match self { $(Self::$item => $text,)* }
            }

            /// The value that is spelled `name`.
            pub fn parse(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$item),)* _ => None }
            }
        }
    };
}

#[cfg(feature = "convert")]
pub(crate) use named;

named! {
    /// Which layers of a recursive model share one stored layer.
    Sharing {
        /// None: each layer is its own.
        None = "none",
        /// 1 2 3 · 1 2 3
        Cycle = "cycle",
        /// 1 1 · 2 2 · 3 3
        Sequence = "sequence",
        /// `Cycle` between an own first and an own last layer.
        MiddleCycle = "middle_cycle",
        /// `Sequence` between an own first and an own last layer.
        MiddleSequence = "middle_sequence",
    }
}

impl Sharing {
    /// True when the model has an own first and an own last layer.
    pub fn has_own_ends(self) -> bool {
        matches!(self, Sharing::MiddleCycle | Sharing::MiddleSequence)
    }
    /// True when a layer is repeated in place before the next one runs.
    pub fn repeats_in_place(self) -> bool {
        matches!(self, Sharing::Sequence | Sharing::MiddleSequence)
    }
}

named! {
    /// The function that turns a router's score into a weight.
    RouterFunction {
        /// Logistic sigmoid.
        Sigmoid = "sigmoid",
        /// Hyperbolic tangent (expert-choice only).
        Tanh = "tanh",
        /// Softmax over the depths (token-choice only).
        Softmax = "softmax",
        /// The raw score (expert-choice only).
        Identity = "none",
    }
}

/// Who chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterKind {
    /// Before each recursion a router decides which tokens stay.
    Expert,
    /// One router gives each token its depth before recursion 0.
    Token,
}

/// Everything that routing needs besides the routers' weights.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// Who chooses.
    pub kind: RouterKind,
    /// Score to weight.
    pub function: RouterFunction,
    /// Factor on the weight (not applied to [`RouterFunction::Identity`]).
    pub alpha: f32,
    /// The router's input is divided by this.
    pub temperature: f32,
    /// Whether the block's result is multiplied by the weight.
    pub weighted: bool,
    /// Expert-choice: a second router, trained to predict the top-k, decides in threshold mode.
    pub auxiliary: bool,
    /// The cut that the model was trained for.
    pub cut: f32,
    /// Share of all tokens that each recursion takes in capacity mode, `N_r` values.
    pub capacities: Vec<f64>,
}

/// How the file arranges quantized matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TensorLayout {
    /// Row by row, as GGUF's own: `reference`.
    Rows,
    /// Sixteen rows interleaved, as the kernels take them: `tiles16`. What `mor convert` writes.
    #[default]
    Tiles16,
}

impl TensorLayout {
    /// The name in the file.
    pub fn name(self) -> &'static str {
        match self {
            TensorLayout::Rows => "reference",
            TensorLayout::Tiles16 => "tiles16",
        }
    }
}

named! {
    /// Where keys and values of a recursion come from.
    KvStrategy {
        /// Each recursion keeps the keys and values of the tokens active in it.
        RecursionWise = "recursion_wise",
        /// Recursion 0 keeps those of all tokens; deeper recursions compute queries only.
        Shared = "shared",
    }
}

/// Sizes and rules of one model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Hyperparameters {
    /// The family of the file.
    pub architecture: Architecture,
    /// `general.name`, when the file has one.
    pub name: Option<String>,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Positions that the model was trained for.
    pub context_length: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU layer.
    pub feed_forward_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Size of one head.
    pub head_dim: usize,
    /// ε of RMSNorm.
    pub norm_epsilon: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Blocks that the file stores.
    pub stored_blocks: usize,
    /// N_r, 1 for a vanilla model.
    pub recursions: usize,
    /// How blocks are shared.
    pub sharing: Sharing,
    /// Routing; `None` for vanilla and recursive models.
    pub router: Option<RouterSpec>,
    /// The KV strategy.
    pub kv: KvStrategy,
    /// How quantized matrices are arranged.
    pub layout: TensorLayout,
}

impl Hyperparameters {
    /// Reads and checks them.
    ///
    /// # Errors
    /// [`Error::Format`] and [`Error::Unsupported`], which name the key.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let keys = Keys::of(metadata)?;
        let heads = keys.size("attention.head_count", MAX_WIDTH)?;
        let kv_heads = keys.size_or("attention.head_count_kv", heads, MAX_WIDTH)?;
        if heads % kv_heads != 0 {
            return Err(Error::format(format_args!(
                "{heads} query heads cannot share {kv_heads} key heads evenly"
            )));
        }
        let hidden_size = keys.size("embedding_length", MAX_WIDTH)?;
        let head_dim = keys.size_or("attention.key_length", hidden_size / heads, MAX_HEAD_DIM)?;
        if heads * head_dim > MAX_WIDTH {
            return Err(Error::format(format_args!(
                "{heads} heads of width {head_dim} are wider than the limit of {MAX_WIDTH}"
            )));
        }
        if keys.size_or("attention.value_length", head_dim, MAX_HEAD_DIM)? != head_dim {
            return Err(Error::unsupported(
                "a model whose keys and values have different lengths",
            ));
        }
        let stored_blocks = keys.size("block_count", MAX_BLOCKS)?;
        let recursion = keys.recursion(stored_blocks)?;
        if keys.optional_size("expert_count", MAX_WIDTH)?.unwrap_or(0) > 0 {
            return Err(Error::unsupported("mixture-of-experts feed-forward layers"));
        }
        Ok(Hyperparameters {
            architecture: keys.architecture,
            name: metadata.str("general.name")?.map(try_string).transpose()?,
            vocab_size: keys.vocab_size()?,
            context_length: keys.size("context_length", MAX_CONTEXT)?,
            hidden_size,
            feed_forward_size: keys.size("feed_forward_length", MAX_WIDTH)?,
            heads,
            kv_heads,
            head_dim,
            norm_epsilon: keys.positive_f32("attention.layer_norm_rms_epsilon", None)?,
            rope: keys.rope(head_dim)?,
            stored_blocks,
            recursions: recursion.0,
            sharing: recursion.1,
            router: keys.router(recursion.0)?,
            kv: keys.kv_strategy()?,
            layout: keys.layout()?,
        })
    }

    /// Layers of the shared block (all layers of a vanilla model).
    pub fn block_layers(&self) -> usize {
        self.stored_blocks - 2 * usize::from(self.sharing.has_own_ends())
    }

    /// Layers that a token of full depth passes.
    pub fn logical_layers(&self) -> usize {
        self.stored_blocks - self.block_layers() + self.block_layers() * self.recursions
    }

    /// Whether a token's depth must be known before its first recursion: a token-choice router
    /// gives it then, and layers that repeat in place run to it one by one.
    pub fn decides_depth_first(&self) -> bool {
        match &self.router {
            Some(router) => router.kind == RouterKind::Token,
            None => self.sharing.repeats_in_place(),
        }
    }

    /// Whether routers choose tokens, not tokens their depth: only then one may run no recursion.
    pub(crate) fn is_expert_choice(&self) -> bool {
        let router = self.router.as_ref();
        router.is_some_and(|router| router.kind == RouterKind::Expert)
    }

    /// The fewest recursions that a token may run.
    pub(crate) fn least_depth(&self) -> usize {
        usize::from(!self.is_expert_choice())
    }

    /// Width of one token's keys (or values).
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of one token's queries.
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// What kind of model this is, in a word.
    pub fn kind(&self) -> &'static str {
        match (&self.router, self.recursions) {
            (Some(router), _) if router.kind == RouterKind::Expert => "expert-choice MoR",
            (Some(_), _) => "token-choice MoR",
            (None, 1) => "vanilla",
            (None, _) => "recursive",
        }
    }
}

/// The architecture's keys, with its prefix put in front.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: Architecture,
}

impl<'a> Keys<'a> {
    fn of(metadata: &'a Metadata) -> Result<Self> {
        let architecture = match metadata.str("general.architecture")? {
            Some("llama") => Architecture::Llama,
            Some("mor") => Architecture::Mor,
            Some(other) => {
                return Err(Error::unsupported(format_args!(
                    "the file holds a model of architecture '{other}'; mor runs 'mor' and 'llama' files"
                )));
            }
            None => return Err(Error::format("the key general.architecture is missing")),
        };
        Ok(Keys {
            metadata,
            architecture,
        })
    }

    fn key(&self, name: &str) -> Text {
        match self.architecture {
            Architecture::Llama => Text::new(format_args!("llama.{name}")),
            Architecture::Mor => Text::new(format_args!("mor.{name}")),
        }
    }

    fn optional_size(&self, name: &str, limit: usize) -> Result<Option<usize>> {
        let key = self.key(name);
        let Some(value) = self.metadata.u32(&key)? else {
            return Ok(None);
        };
        let value = value as usize;
        if value > limit {
            return Err(Error::format(format_args!(
                "{key} is {value}, more than the limit of {limit}"
            )));
        }
        Ok(Some(value))
    }

    /// A size that must be there and not zero.
    fn size(&self, name: &str, limit: usize) -> Result<usize> {
        match self.optional_size(name, limit)? {
            Some(0) => Err(Error::format(format_args!("{} is zero", self.key(name)))),
            Some(value) => Ok(value),
            None => Err(Error::format(format_args!(
                "the key {} is missing",
                self.key(name)
            ))),
        }
    }

    /// A size with a default, above zero.
    fn size_or(&self, name: &str, default: usize, limit: usize) -> Result<usize> {
        match self.optional_size(name, limit)?.unwrap_or(default) {
            0 => Err(Error::format(format_args!("{} is zero", self.key(name)))),
            value if value > limit => Err(Error::format(format_args!(
                "{} comes to {value}, more than the limit of {limit}",
                self.key(name)
            ))),
            value => Ok(value),
        }
    }

    fn positive_f32(&self, name: &str, default: Option<f32>) -> Result<f32> {
        let key = self.key(name);
        let value = self.metadata.f32(&key)?.or(default);
        match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(Error::format(format_args!(
                "{key} is {value}, where a positive number is needed"
            ))),
            None => Err(Error::format(format_args!("the key {key} is missing"))),
        }
    }

    fn choice<T: Copy>(&self, name: &str, default: Option<T>, choices: &[(&str, T)]) -> Result<T> {
        let key = self.key(name);
        match (self.metadata.str(&key)?, default) {
            (Some(text), _) => choices
                .iter()
                .find(|(known, _)| *known == text)
                .map(|(_, value)| *value)
                .ok_or_else(|| {
                    Error::unsupported(format_args!(
                        "{key} is '{text}'; known are {}",
                        listed(choices.iter().map(|(name, _)| name))
                    ))
                }),
            (None, Some(value)) => Ok(value),
            (None, None) => Err(Error::format(format_args!("the key {key} is missing"))),
        }
    }

    /// `mor.vocab_size`, or the length of the token list. In Llama files the list comes first, for there the key
    /// informs only, and is stale where tokens were added.
    fn vocab_size(&self) -> Result<usize> {
        let named = self
            .optional_size("vocab_size", MAX_VOCAB)?
            .filter(|size| *size > 0);
        let tokens = self.metadata.strings("tokenizer.ggml.tokens")?;
        let listed = tokens
            .map(|tokens| tokens.len())
            .filter(|count| (1..=MAX_VOCAB).contains(count));
        let size = match self.architecture {
            Architecture::Llama => listed.or(named),
            Architecture::Mor => named.or(listed),
        };
        size.ok_or_else(|| {
            Error::format(format_args!(
                "neither {} nor a token list says how large the vocabulary is",
                self.key("vocab_size")
            ))
        })
    }

    fn rope(&self, head_dim: usize) -> Result<Rope> {
        let dims = self.size_or("rope.dimension_count", head_dim, MAX_HEAD_DIM)?;
        if dims > head_dim || dims % 2 != 0 {
            return Err(Error::format(format_args!(
                "{dims} rotated elements do not fit a head of {head_dim}: an even number, at most the head, is needed"
            )));
        }
        let pairing = match self.architecture {
            Architecture::Llama => RopePairing::Norm,
            Architecture::Mor => self.choice(
                "rope.pairing",
                Some(RopePairing::Neox),
                &[("neox", RopePairing::Neox), ("norm", RopePairing::Norm)],
            )?,
        };
        let scaled = self.choice(
            "rope.scaling.type",
            Some(None),
            &[("none", Some(false)), ("linear", Some(true))],
        )?;
        // Older Llama files give a factor alone, under another key.
        let older = || self.positive_f32("rope.scale_linear", Some(1.0));
        let has_factor = self
            .metadata
            .get(&self.key("rope.scaling.factor"))
            .is_some();
        let scale = f64::from(match scaled {
            Some(false) => 1.0,
            Some(true) if has_factor => self.positive_f32("rope.scaling.factor", None)?,
            Some(true) | None => older()?,
        });
        Ok(Rope {
            base: f64::from(self.positive_f32("rope.freq_base", Some(10_000.0))?),
            dims,
            pairing,
            scale,
        })
    }

    fn recursion(&self, stored_blocks: usize) -> Result<(usize, Sharing)> {
        if self.architecture == Architecture::Llama {
            return Ok((1, Sharing::None));
        }
        let count = self.size_or("recursion.count", 1, MAX_RECURSIONS)?;
        let sharing = self.choice(
            "recursion.sharing",
            (count == 1).then_some(Sharing::None),
            &Sharing::ALL.map(|sharing| (sharing.name(), sharing)),
        )?;
        if count > 1 && sharing == Sharing::None {
            return Err(Error::format(
                "more than one recursion, but mor.recursion.sharing is 'none'",
            ));
        }
        if sharing.has_own_ends() && stored_blocks < 3 {
            return Err(Error::format(format_args!(
                "sharing '{}' needs at least 3 stored blocks, the file has {stored_blocks}",
                sharing.name()
            )));
        }
        Ok((count, sharing))
    }

    fn router(&self, recursions: usize) -> Result<Option<RouterSpec>> {
        if self.architecture == Architecture::Llama {
            return Ok(None);
        }
        let kinds = [
            ("none", None),
            ("expert", Some(RouterKind::Expert)),
            ("token", Some(RouterKind::Token)),
        ];
        let Some(kind) = self.choice("router.kind", Some(None), &kinds)? else {
            return Ok(None);
        };
        let named = |function: RouterFunction| (function.name(), function);
        let functions: &[_] = match kind {
            RouterKind::Expert => &[
                RouterFunction::Sigmoid,
                RouterFunction::Tanh,
                RouterFunction::Identity,
            ]
            .map(named),
            RouterKind::Token => &[RouterFunction::Sigmoid, RouterFunction::Softmax].map(named),
        };
        let alpha = self.metadata.f32(&self.key("router.alpha"))?.unwrap_or(0.1);
        let cut = self.metadata.f32(&self.key("router.cut"))?.unwrap_or(0.5);
        if !alpha.is_finite() || !(0.0..=1.0).contains(&cut) {
            return Err(Error::format(format_args!(
                "router.alpha ({alpha}) must be finite and router.cut ({cut}) between 0 and 1"
            )));
        }
        Ok(Some(RouterSpec {
            kind,
            function: self.choice("router.function", Some(RouterFunction::Sigmoid), functions)?,
            alpha,
            temperature: self.positive_f32("router.temperature", Some(1.0))?,
            weighted: self.choice(
                "router.gating",
                Some(true),
                &[("weighted", true), ("none", false)],
            )?,
            auxiliary: self.choice(
                "router.selection",
                Some(false),
                &[("aux_loss", false), ("aux_router", true)],
            )?,
            cut,
            capacities: self.capacities(recursions)?,
        }))
    }

    /// The given shares, or the paper's (N_r − i) / N_r.
    fn capacities(&self, recursions: usize) -> Result<Vec<f64>> {
        let key = self.key("router.capacities");
        let Some(capacities) = self.metadata.f64s(&key)? else {
            let n = recursions as f64;
            return try_collect((0..recursions).map(|i| Ok((n - i as f64) / n)));
        };
        if capacities.len() != recursions || !capacities.iter().all(|c| (0.0..=1.0).contains(c)) {
            return Err(Error::format(format_args!(
                "{key} must hold {recursions} shares between 0 and 1"
            )));
        }
        Ok(capacities)
    }

    fn layout(&self) -> Result<TensorLayout> {
        // Llama files name layouts of other kinds with this key, all of them row by row.
        if self.architecture == Architecture::Llama {
            return Ok(TensorLayout::Rows);
        }
        let layouts = [TensorLayout::Rows, TensorLayout::Tiles16].map(|l| (l.name(), l));
        self.choice("tensor_data_layout", Some(TensorLayout::Rows), &layouts)
    }

    fn kv_strategy(&self) -> Result<KvStrategy> {
        self.choice(
            "kv.strategy",
            Some(KvStrategy::RecursionWise),
            &KvStrategy::ALL.map(|kv| (kv.name(), kv)),
        )
    }
}
