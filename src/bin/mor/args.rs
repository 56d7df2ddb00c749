//! The command line as types.

use clap::{Parser, Subcommand, ValueEnum};
use mor::KvType;
use mor::convert::{
    Balancing, Gating, Kind, KvStrategy, Overrides, RouterFunction, Selection, Sharing,
};
use std::path::PathBuf;

/// Runs Mixture-of-Recursions language models.
#[derive(Parser)]
#[command(version, propagate_version = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Continue a text
    Run(RunArgs),
    /// Talk with a model, line by line
    Chat(ChatArgs),
    /// Show what a model file holds: metadata, schedule, stored and logical layers, bytes
    Inspect(InspectArgs),
    /// Show the memory of a session, to the byte, before it exists
    Plan(PlanArgs),
    /// Make a GGUF file from a checkpoint folder or another GGUF file
    Convert(ConvertArgs),
    /// Score token sequences: logits and depth of every token, as safetensors
    Eval(EvalArgs),
    /// Continue token sequences greedily
    GenerateTokens(GenerateTokensArgs),
    /// Perplexity of a text, windows and scoring as llama-perplexity's default
    Perplexity(PerplexityArgs),
}

/// What every command that runs a model takes.
#[derive(clap::Args, Clone)]
pub struct EngineArgs {
    /// Threads [default: one per core]
    #[arg(short, long)]
    pub threads: Option<usize>,
    /// How keys and values are stored
    #[arg(long, value_enum)]
    pub kv: Option<Kv>,
    /// Cut of the routers, 0 to 1: higher is faster and coarser [default: as trained]
    #[arg(long)]
    pub cut: Option<f32>,
    /// Most recursions that a token takes
    #[arg(long, value_name = "D")]
    pub max_depth: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Kv {
    F32,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<Kv> for KvType {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::F32 => KvType::F32,
            Kv::F16 => KvType::F16,
            Kv::Q8_0 => KvType::Q8_0,
        }
    }
}

#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.8)]
    pub temp: f32,
    /// Draw from the K likeliest tokens only; 0 is off
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that add up to P only; 1 is off
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Draw from tokens at least P times as likely as the likeliest only; 0 is off
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Divide the logits of the last 64 tokens by R; 1 is off
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// Start of the random sequence [default: the clock]
    #[arg(long)]
    pub seed: Option<u64>,
}

#[derive(clap::Args)]
pub struct RunArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    /// The text to continue
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: String,
    /// Most tokens to write
    #[arg(short, default_value_t = 128)]
    pub n: usize,
    /// Tokens that prompt and answer may take [default: as trained, at most 4096]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Colour each token by the recursions it took
    #[arg(long)]
    pub depths: bool,
    /// End when this text comes up; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(clap::Args)]
pub struct ChatArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    /// A first message that sets the tone
    #[arg(long)]
    pub system: Option<String>,
    /// Most tokens of an answer
    #[arg(short, default_value_t = 512)]
    pub n: usize,
    /// Tokens that the conversation may take [default: as trained, at most 4096]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Colour each token by the recursions it took
    #[arg(long)]
    pub depths: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(clap::Args)]
pub struct InspectArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    /// One JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
}

#[derive(clap::Args)]
pub struct PlanArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    /// Tokens that a sequence can hold [default: as trained]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Sequences that run at once
    #[arg(long, value_name = "B", default_value_t = 1)]
    pub sequences: usize,
    /// How keys and values are stored
    #[arg(long, value_enum, default_value = "f16")]
    pub kv: Kv,
    /// Threads [default: one per core]
    #[arg(short, long)]
    pub threads: Option<usize>,
    /// One JSON object and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct EvalArgs {
    /// GGUF file
    pub model: PathBuf,
    /// Token ids separated by white space, one sequence a line
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Who decides which tokens go on: the causal cut, or the paper's top-k over the whole line
    #[arg(long, value_enum, default_value = "threshold")]
    pub routing: RoutingArg,
    /// Where logits_<line> [T, V] f32 and depth_<line> [T] i64 go
    #[arg(short, long, value_name = "OUT.safetensors")]
    pub output: PathBuf,
    /// Rows of one pass over the weights [default: 64; capacity routing takes a whole line]
    #[arg(long)]
    pub batch: Option<usize>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoutingArg {
    Threshold,
    Capacity,
}

#[derive(clap::Args)]
pub struct GenerateTokensArgs {
    /// GGUF file
    pub model: PathBuf,
    /// Token ids separated by white space, one sequence a line
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Tokens to write after each line
    #[arg(short)]
    pub n: usize,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(clap::Args)]
pub struct PerplexityArgs {
    /// GGUF file
    pub model: PathBuf,
    /// The text
    pub text: PathBuf,
    /// Tokens of a window
    #[arg(short, long, default_value_t = 512)]
    pub context: usize,
    /// One JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(clap::Args)]
pub struct ConvertArgs {
    /// A checkpoint folder, or a GGUF file
    pub input: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "OUT.gguf")]
    pub output: PathBuf,
    /// Type of the matrices: f32, f16, bf16, q8_0, q4_0, q4_1 [default: f16]
    #[arg(long = "type", value_name = "TYPE")]
    pub ty: Option<String>,
    /// tokenizer.json, or a GGUF file with the right vocabulary
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

/// What the checkpoint and its configuration do not say, or say wrongly.
#[derive(clap::Args)]
#[command(next_help_heading = "What the checkpoint does not say")]
pub struct OverrideArgs {
    /// Name of the model
    #[arg(long)]
    pub name: Option<String>,
    /// vanilla, recursive, expert or token
    #[arg(long)]
    pub kind: Option<String>,
    /// none, cycle, sequence, middle_cycle or middle_sequence
    #[arg(long)]
    pub sharing: Option<String>,
    /// N_r
    #[arg(long, value_name = "N")]
    pub recursions: Option<u32>,
    /// Factor on the router's weight
    #[arg(long)]
    pub alpha: Option<f32>,
    /// sigmoid, tanh, softmax or none
    #[arg(long, value_name = "FUNCTION")]
    pub router_function: Option<String>,
    /// aux_loss or aux_router (expert-choice)
    #[arg(long)]
    pub selection: Option<String>,
    /// loss or loss_free (token-choice)
    #[arg(long)]
    pub balancing: Option<String>,
    /// What the router's input is divided by
    #[arg(long)]
    pub temperature: Option<f32>,
    /// weighted or none
    #[arg(long)]
    pub gating: Option<String>,
    /// Share of the text that each recursion takes, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub capacities: Option<Vec<f64>>,
    /// recursion_wise or shared
    #[arg(long, value_name = "STRATEGY")]
    pub kv_strategy: Option<String>,
    /// Query heads
    #[arg(long)]
    pub heads: Option<u32>,
    /// Key and value heads
    #[arg(long)]
    pub kv_heads: Option<u32>,
    /// Size of a head
    #[arg(long)]
    pub head_dim: Option<u32>,
    /// Base of the rotary angles
    #[arg(long)]
    pub rope_theta: Option<f32>,
    /// Epsilon of the norms
    #[arg(long)]
    pub rms_eps: Option<f32>,
    /// Tokens that the model was trained for
    #[arg(long)]
    pub context_length: Option<u32>,
}

impl OverrideArgs {
    /// The library's form of it.
    pub fn to_overrides(&self) -> crate::Result<Overrides> {
        Ok(Overrides {
            name: self.name.clone(),
            kind: named("--kind", &self.kind, Kind::parse)?,
            sharing: named("--sharing", &self.sharing, Sharing::parse)?,
            num_recursion: self.recursions,
            alpha: self.alpha,
            router_function: named(
                "--router-function",
                &self.router_function,
                RouterFunction::parse,
            )?,
            sampling: named("--selection", &self.selection, Selection::parse)?,
            balancing: named("--balancing", &self.balancing, Balancing::parse)?,
            temperature: self.temperature,
            gating: named("--gating", &self.gating, Gating::parse)?,
            capacities: self.capacities.clone(),
            kv_sharing: named("--kv-strategy", &self.kv_strategy, KvStrategy::parse)?,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rope_theta: self.rope_theta,
            rms_eps: self.rms_eps,
            context_length: self.context_length,
        })
    }
}

/// One of a list of names.
fn named<T>(
    option: &str,
    value: &Option<String>,
    parse: impl Fn(&str) -> Option<T>,
) -> crate::Result<Option<T>> {
    match value {
        None => Ok(None),
        Some(text) => match parse(text) {
            Some(value) => Ok(Some(value)),
            None => {
                Err(format!("{option} does not know '{text}'; see 'mor convert --help'").into())
            }
        },
    }
}
