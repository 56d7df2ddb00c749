//! The command line as types.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use mor::convert::{
    Balancing, Gating, Kind, KvStrategy, Overrides, RouterFunction, Selection, Sharing, SynthShape,
};
use mor::model::TensorLayout;
use mor::quant::TensorType;
use mor::{Device, KvType};
use std::path::PathBuf;

/// Takes the names of one of the library's enumerations.
macro_rules! one_of {
    ($type:ty) => {
        PossibleValuesParser::new(<$type>::ALL.iter().map(|value| value.name()))
            .try_map(|name| <$type>::parse(&name).ok_or("it has no such value"))
    };
}

/// Runs Mixture-of-Recursions language models.
#[derive(Parser)]
#[command(version, propagate_version = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// Those that the program was called with. What looks like a negative number behind an option is its value, about
    /// which it can say what is wrong, and no option.
    pub fn read() -> Result<Self, clap::Error> {
        let mut command = Self::command();
        let names: Vec<String> = command
            .get_subcommands()
            .map(|c| c.get_name().to_owned())
            .collect();
        for name in names {
            command = command.mut_subcommand(name, |subcommand| {
                subcommand.mut_args(|arg| {
                    let takes = !arg.is_positional() && arg.get_action().takes_values();
                    arg.allow_negative_numbers(takes)
                })
            });
        }
        Self::from_arg_matches(&command.try_get_matches()?)
    }
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
    /// Show the tokens of a text, as eval and generate-tokens read them
    Tokenize(TokenizeArgs),
    /// Show the text of token sequences, a line each
    Detokenize(DetokenizeArgs),
    /// Perplexity of a text, windows and scoring as llama-perplexity's default
    Perplexity(PerplexityArgs),
    /// Measure prompt and generation rates, mean depth and memory
    Bench(BenchArgs),
    /// Make a random model of a known shape, for benchmarks
    Synth(SynthArgs),
}

/// What every command that runs a model takes.
#[derive(clap::Args, Clone)]
pub struct EngineArgs {
    /// Where it runs: cpu, cuda, or cuda:N for the GPU of that number [default: cpu]
    #[arg(long, value_parser = device, default_value = "cpu", hide_default_value = true)]
    pub device: Device,
    /// Threads [default: one per core]
    #[arg(short, long, value_parser = from_one)]
    pub threads: Option<usize>,
    /// How keys and values are stored [default: f16, of eval and generate-tokens f32]
    #[arg(long, value_enum)]
    pub kv: Option<Kv>,
    /// Cut of the routers, 0 to 1: higher is faster and coarser [default: as trained]
    #[arg(long)]
    pub cut: Option<f32>,
    /// Most recursions that a token takes [default: all]
    #[arg(long, value_name = "D")]
    pub max_depth: Option<usize>,
}

fn device(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", index)) if index.parse::<u32>().is_ok() => {
            Ok(Device::Cuda(index.parse().unwrap_or_default()))
        }
        _ => Err("say cpu, cuda, or cuda:N".to_owned()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Layout {
    Tiles,
    Rows,
}

impl From<Layout> for TensorLayout {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Tiles => TensorLayout::Tiles16,
            Layout::Rows => TensorLayout::Rows,
        }
    }
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
    /// Divide the logits of the last tokens by R; 1 is off
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// How many of the last tokens that is for
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub repeat_last_n: usize,
    /// Start of the random sequence [default: the clock]
    #[arg(long)]
    pub seed: Option<u64>,
}

/// A text, typed or in a file.
#[derive(clap::Args)]
pub struct TextArgs {
    /// The text
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        required_unless_present = "file"
    )]
    pub prompt: Option<String>,
    /// A file with the text, of which the last line's end is left out; - is standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct RunArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub text: TextArgs,
    /// Most tokens to write
    #[arg(short, default_value_t = 128, value_parser = tokens)]
    pub n: usize,
    /// Tokens that prompt and answer may take [default: as trained, at most 4096]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Colour each token by the recursions it took
    #[arg(long)]
    pub depths: bool,
    /// End when this text comes up; may be given more than once
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
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
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Most tokens of an answer
    #[arg(short, default_value_t = 512, value_parser = tokens)]
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
    /// Tokens that a sequence can hold [default: as trained, at most 4096]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Sequences that run at once, as a batch [default: one, as a session]
    #[arg(short = 'b', long, value_name = "B", conflicts_with = "memory")]
    pub sequences: Option<usize>,
    /// As many sequences as fit so many bytes (on a GPU of its memory), weights not counted; K, M and G
    /// behind the number mean powers of 1024
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub memory: Option<usize>,
    /// With --sequences or --memory: KV pages for tokens that run D recursions on average [default: all]
    #[arg(long, value_name = "D")]
    pub mean_depth: Option<f64>,
    /// Rows of one pass over the weights [default: 64, on a GPU 512]
    #[arg(long, value_parser = from_one)]
    pub batch: Option<usize>,
    /// How keys and values are stored
    #[arg(long, value_enum, default_value = "f16")]
    pub kv: Kv,
    /// Threads [default: one per core]
    #[arg(short, long, value_parser = from_one)]
    pub threads: Option<usize>,
    /// One JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// Where it runs: cpu, cuda, or cuda:N for the GPU of that number [default: cpu]
    #[arg(long, value_parser = device, default_value = "cpu", hide_default_value = true)]
    pub device: Device,
}

#[derive(clap::Args)]
pub struct EvalArgs {
    /// GGUF file
    pub model: PathBuf,
    /// Token ids separated by white space, one sequence a line; blank lines are skipped; - is standard input
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Who decides which tokens go on: the causal cut, or the paper's top-k over the whole line
    #[arg(long, value_enum, default_value = "threshold")]
    pub routing: RoutingArg,
    /// Where logits_<line> [T, V] f32 and depth_<line> [T] i64 go; lines are counted from 0, blank
    /// ones too
    #[arg(short, long, value_name = "OUT.safetensors")]
    pub output: PathBuf,
    /// Rows of one pass over the weights [default: 64, on a GPU 512; capacity routing takes a whole line]
    #[arg(long, value_parser = from_one)]
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
    /// Token ids separated by white space, one sequence a line; blank lines are skipped; - is standard input
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Tokens to write after each line
    #[arg(short, value_parser = tokens)]
    pub n: usize,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(clap::Args)]
pub struct TokenizeArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub text: TextArgs,
    /// The text alone: nothing is put around it, and the names of special tokens are text
    #[arg(long)]
    pub plain: bool,
    /// A line for each token: its id, and what it says
    #[arg(long)]
    pub pieces: bool,
}

#[derive(clap::Args)]
pub struct DetokenizeArgs {
    /// GGUF file [default: the model inside this program]
    pub model: Option<PathBuf>,
    /// Token ids separated by white space, one sequence a line; blank lines are skipped; - is standard input
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// Show the names of special tokens too
    #[arg(long)]
    pub special: bool,
}

#[derive(clap::Args)]
pub struct PerplexityArgs {
    /// GGUF file
    pub model: PathBuf,
    /// A file with the text; - is standard input
    #[arg(value_name = "TEXTFILE")]
    pub text: PathBuf,
    /// Tokens of a window
    #[arg(short, long, default_value_t = 512)]
    pub context: usize,
    /// Also tell how far the predictions are from this model's, which runs as trained and with
    /// keys and values in f32
    #[arg(long, value_name = "BASE.gguf")]
    pub against: Option<PathBuf>,
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
    /// Type of the matrices: f32, f16, bf16, q8_0, q4_0 or q4_1 [default: f16; as they are for a
    /// GGUF file]
    #[arg(long = "type", value_name = "TYPE", value_parser = matrix_type)]
    pub ty: Option<TensorType>,
    /// How quantized matrices are arranged: interleaved for speed, or as other GGUF programs know it
    #[arg(long, value_enum, default_value = "tiles")]
    pub layout: Layout,
    /// tokenizer.json, or a GGUF file with the right vocabulary
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// The training run's configuration (YAML) [default: mor.yaml beside the checkpoint, or the run's conf/pretrain/NAME.yaml]
    #[arg(long, value_name = "FILE")]
    pub training_config: Option<PathBuf>,
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

#[derive(clap::Args)]
pub struct BenchArgs {
    /// GGUF file
    pub model: PathBuf,
    /// Tokens of a prompt; several tests are separated by commas, 0 leaves prompts out [default: 512;
    /// with -b 1]
    #[arg(short, value_name = "N", value_delimiter = ',', value_parser = tokens)]
    pub prompt: Option<Vec<usize>>,
    /// Tokens to generate, in the same way [default: 128; with -b 256 on average, normally distributed]
    #[arg(short = 'n', value_name = "N", value_delimiter = ',', value_parser = tokens)]
    pub generation: Option<Vec<usize>>,
    /// Without -b: tokens that are in the context before a test begins, in the same way
    #[arg(short = 'd', value_name = "N", default_value = "0", value_delimiter = ',', value_parser = tokens)]
    pub before: Vec<usize>,
    /// Threads, in the same way [default: one per core]
    #[arg(short, long, value_name = "T", value_delimiter = ',', value_parser = from_one)]
    pub threads: Vec<usize>,
    /// Throughput of so many sequences at once, batched by depth; several separated by commas
    #[arg(short = 'b', long, value_name = "B", value_delimiter = ',')]
    pub sequences: Vec<usize>,
    /// With -b: so many sequences come in a second, at random [default: the next comes when there is a
    /// place]
    #[arg(long, value_name = "RATE", requires = "sequences")]
    pub arrivals: Option<f64>,
    /// With -b: ordinary batching, in which everyone waits for the deepest, to compare with
    #[arg(long, requires = "sequences")]
    pub in_step: bool,
    /// Without -b: repetitions of each test, after one that is not counted [default: 5]
    #[arg(short, long, value_name = "R")]
    pub repeats: Option<usize>,
    /// Rows of one pass over the weights [default: 64, on a GPU 512; with -b as many as sequences, or tokens of a prompt up to 64]
    #[arg(long, value_parser = from_one)]
    pub batch: Option<usize>,
    /// How keys and values are stored [default: f16]
    #[arg(long, value_enum)]
    pub kv: Option<Kv>,
    /// Cut of the routers, 0 to 1: higher is faster and coarser [default: the file's]
    #[arg(long)]
    pub cut: Option<f32>,
    /// Most recursions that a token takes [default: all]
    #[arg(long, value_name = "D")]
    pub max_depth: Option<usize>,
    /// One JSON object and nothing else
    #[arg(long)]
    pub json: bool,
    /// Where it runs: cpu, cuda, or cuda:N for the GPU of that number [default: cpu]
    #[arg(long, value_parser = device, default_value = "cpu", hide_default_value = true)]
    pub device: Device,
}

impl BenchArgs {
    pub fn repeats(&self) -> usize {
        self.repeats.unwrap_or(5)
    }

    /// Each number of threads to measure with.
    pub fn threads(&self) -> Vec<usize> {
        match self.threads.is_empty() {
            true => vec![mor::cpu::thread::cores()],
            false => self.threads.clone(),
        }
    }
}

#[derive(clap::Args)]
pub struct SynthArgs {
    /// smollm-135m, smollm-360m, smollm-1.7b or tiny; with -mor2, -mor3 or -mor4 behind it a relative that routes
    /// tokens through a shared block, with -recursive2, 3 or 4 one without routers
    #[arg(long, value_name = "NAME", value_parser = shape)]
    pub shape: SynthShape,
    /// Layers that a token of full depth passes; the nearest number that divides into the recursions
    /// is taken [default: the shape's]
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Start of the random sequence
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Set the routers' cut so that random tokens run D recursions on average [default: the cut is 0.5]
    #[arg(long, value_name = "D")]
    pub mean_depth: Option<f64>,
    /// Type of the matrices: f32, f16, bf16, q8_0, q4_0 or q4_1
    #[arg(long = "type", value_name = "TYPE", default_value = "f16", value_parser = matrix_type)]
    pub ty: TensorType,
    /// The file to write
    #[arg(short, long, value_name = "OUT.gguf")]
    pub output: PathBuf,
}

/// Rows or threads; the library's 0, which is its default, is none here.
fn from_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("give a whole number from 1 on".to_owned()),
        Ok(number) => Ok(number),
    }
}

/// A number of bytes, perhaps with K, M or G behind it.
fn bytes(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: usize = digits
        .parse()
        .map_err(|_| "give a whole number, perhaps with K, M or G behind it".to_string())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than can be addressed".to_string())
}

/// What the checkpoint and its configuration do not say, or say wrongly.
#[derive(clap::Args)]
#[command(next_help_heading = "What the checkpoint does not say")]
pub struct OverrideArgs {
    /// Name of the model
    #[arg(long)]
    pub name: Option<String>,
    /// How the model decides which tokens go through a recursion
    #[arg(long, value_parser = one_of!(Kind))]
    pub kind: Option<Kind>,
    /// How layers are shared
    #[arg(long, value_parser = one_of!(Sharing))]
    pub sharing: Option<Sharing>,
    /// How often the shared block can run
    #[arg(long, value_name = "N")]
    pub recursions: Option<u32>,
    /// Layers that a token of full depth passes, num_hidden_layers in config.json
    #[arg(long, value_name = "N")]
    pub layers: Option<u32>,
    /// Factor on the router's weight
    #[arg(long)]
    pub alpha: Option<f32>,
    /// What turns a router's score into a weight
    #[arg(long, value_name = "FUNCTION", value_parser = one_of!(RouterFunction))]
    pub router_function: Option<RouterFunction>,
    /// What decides causally (expert-choice)
    #[arg(long, value_parser = one_of!(Selection))]
    pub selection: Option<Selection>,
    /// How the depths were balanced (token-choice)
    #[arg(long, value_parser = one_of!(Balancing))]
    pub balancing: Option<Balancing>,
    /// What the router's input is divided by
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Whether the router's weight scales what a recursion adds
    #[arg(long, value_parser = one_of!(Gating))]
    pub gating: Option<Gating>,
    /// Share of the text that each recursion takes, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub capacities: Option<Vec<f64>>,
    /// What deeper recursions attend to
    #[arg(long, value_name = "STRATEGY", value_parser = one_of!(KvStrategy))]
    pub kv_strategy: Option<KvStrategy>,
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
    pub fn to_overrides(&self) -> Overrides {
        Overrides {
            name: self.name.clone(),
            kind: self.kind,
            sharing: self.sharing,
            recursions: self.recursions,
            layers: self.layers,
            alpha: self.alpha,
            router_function: self.router_function,
            selection: self.selection,
            balancing: self.balancing,
            temperature: self.temperature,
            gating: self.gating,
            capacities: self.capacities.clone(),
            kv_strategy: self.kv_strategy,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            rope_theta: self.rope_theta,
            rms_eps: self.rms_eps,
            context_length: self.context_length,
        }
    }
}

/// A number of tokens.
fn tokens(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| "a whole number of tokens is needed, 0 or more".to_string())
}

/// A shape that models can be made in.
fn shape(name: &str) -> Result<SynthShape, String> {
    SynthShape::parse(name).ok_or_else(|| {
        let known: Vec<_> = SynthShape::all().map(|shape| shape.name()).collect();
        format!("there is no such shape; possible are {}", known.join(", "))
    })
}

/// A type that matrices can be written in.
fn matrix_type(name: &str) -> Result<TensorType, String> {
    let known = || TensorType::ALL.into_iter().filter(|ty| ty.can_encode());
    let named = TensorType::parse(name).filter(|ty| ty.can_encode());
    named.ok_or_else(|| {
        let known: Vec<_> = known().map(|ty| ty.name().to_lowercase()).collect();
        format!("it cannot be written; possible are {}", known.join(", "))
    })
}
