//! What the conversion tests share: the reference's cases, and a second, independent reading of a
//! checkpoint's names to compare a converted file with.

pub use crate::common::cases::{case_folder, cases};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mor::convert::{ConvertOptions, Progress, Summary, convert};
use mor::gguf::Gguf;
use mor::model::TensorLayout;
use mor::quant::{TensorType, dequantize_row};

/// The parts of a decoder layer: the checkpoint's name and the file's.
pub const PARTS: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Keeps the notes of a conversion.
#[derive(Default)]
pub struct Notes {
    pub lines: Vec<String>,
    pub total: u64,
    pub done: u64,
}

impl Progress for Notes {
    fn start(&mut self, total_bytes: u64) {
        self.total = total_bytes;
    }
    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
    }
    fn note(&mut self, text: &str) {
        self.lines.push(text.to_string());
    }
}

/// The result of a conversion that went well.
#[derive(Debug)]
pub struct Converted {
    pub bytes: Vec<u8>,
    pub summary: Summary,
    pub notes: Vec<String>,
}

impl Converted {
    pub fn gguf(&self) -> Gguf {
        Gguf::parse(&self.bytes).unwrap()
    }
}

pub fn data_folder() -> PathBuf {
    crate::common::root().join("tests/data/convert")
}

/// Converts, or gives the error's sentence after checking that it is one and that no file is left.
pub fn convert_folder(input: &Path, options: &ConvertOptions) -> Result<Converted, String> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.gguf");
    let mut notes = Notes::default();
    let result = convert(input, &output, options, &mut notes);
    for note in &notes.lines {
        assert!(note.ends_with('.') && note.lines().count() == 1, "{note}");
    }
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    match result {
        Ok(summary) => {
            assert_eq!(left, 1, "only the output may be left");
            assert_eq!(notes.total, notes.done);
            Ok(Converted {
                bytes: std::fs::read(&output).unwrap(),
                summary,
                notes: notes.lines,
            })
        }
        Err(error) => {
            assert_eq!(left, 0, "a failure leaves no file");
            let text = error.to_string();
            assert_eq!(text.lines().count(), 1, "{text}");
            Err(text)
        }
    }
}

pub fn convert_case(case: &str, ty: TensorType) -> (Vec<u8>, Summary) {
    let converted = convert_folder(&case_folder(case), &options(ty)).unwrap();
    (converted.bytes, converted.summary)
}

/// Matrices row by row, so that tests can look at them.
pub fn options(ty: TensorType) -> ConvertOptions {
    ConvertOptions {
        ty: Some(ty),
        layout: TensorLayout::Rows,
        ..ConvertOptions::default()
    }
}

/// A checkpoint's tensors as bytes of F32, with the two documents.
pub struct Checkpoint {
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
    pub config: serde_json::Value,
    pub training: serde_json::Value,
}

impl Checkpoint {
    pub fn read(case: &str) -> Checkpoint {
        Self::read_folder(&case_folder(case))
    }

    pub fn read_folder(folder: &Path) -> Checkpoint {
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
            .collect();
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
        Checkpoint {
            tensors,
            config: serde_json::from_str(&text("config.json")).unwrap(),
            training: serde_saphyr::from_str(&text("mor.yaml")).unwrap(),
        }
    }

    /// Writes the checkpoint's tensors as one safetensors file.
    pub fn write(&self, path: &Path) {
        write_safetensors(path, self.tensors.iter());
    }

    fn flag(&self, section: &str) -> bool {
        self.training[section]["enable"].as_bool().unwrap()
    }

    /// The names that layer `j` of the block may have in recursion `r`, as the reference looks
    /// them up.
    pub fn names(&self, r: usize, j: usize) -> Vec<String> {
        [r, 0].iter().map(|&r| self.name(r, j)).collect()
    }

    pub fn kind(&self) -> &str {
        if self.flag("mor") {
            self.training["mor"]["type"].as_str().unwrap()
        } else if self.flag("recursive") {
            "recursive"
        } else {
            "vanilla"
        }
    }

    pub fn recursions(&self) -> usize {
        match self.kind() {
            "vanilla" => 1,
            _ => self.training["recursive"]["num_recursion"]
                .as_u64()
                .unwrap() as usize,
        }
    }

    pub fn sharing(&self) -> &str {
        match self.kind() {
            "vanilla" => "none",
            _ => self.training["recursive"]["sharing"].as_str().unwrap(),
        }
    }

    pub fn middle(&self) -> usize {
        usize::from(self.sharing().starts_with("middle"))
    }

    pub fn block(&self) -> usize {
        let layers = self.config["num_hidden_layers"].as_u64().unwrap() as usize;
        (layers - 2 * self.middle()) / self.recursions()
    }

    fn name(&self, r: usize, j: usize) -> String {
        let off = self.middle();
        match self.kind() {
            "expert" => format!("model.layers.{}.block.{j}", off + r),
            "token" => format!("model.layers.{off}.block_list.{r}.{j}"),
            _ if self.sharing().ends_with("sequence") => {
                format!("model.layers.{}", off + j * self.recursions() + r)
            }
            _ => format!("model.layers.{}", off + r * self.block() + j),
        }
    }

    fn last_name(&self) -> String {
        let layer = match self.kind() {
            "expert" => self.middle() + self.recursions(),
            "token" => self.middle() + 1,
            _ => self.config["num_hidden_layers"].as_u64().unwrap() as usize - 1,
        };
        format!("model.layers.{layer}")
    }

    fn find(&self, names: &[String], part: &str) -> &[u8] {
        names
            .iter()
            .find_map(|n| self.tensors.get(&format!("{n}.{part}.weight")))
            .map(|(_, bytes)| bytes.as_slice())
            .unwrap()
    }
}

pub fn write_safetensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a String, &'a (Vec<usize>, Vec<u8>))>,
) {
    let views: Vec<_> = tensors
        .map(|(name, (shape, bytes))| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name.clone(), view.unwrap())
        })
        .collect();
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A tensor of the file as F32 bytes.
pub fn decoded(gguf: &Gguf, bytes: &[u8], name: &str) -> Vec<u8> {
    let info = gguf
        .tensor(name)
        .unwrap_or_else(|| panic!("{name} is missing"));
    let mut out = vec![0f32; info.columns() * info.rows()];
    let raw = &bytes[info.offset..info.offset + info.bytes];
    dequantize_row(info.ty, raw, &mut out).unwrap();
    out.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The file's name for what recursion `r` uses, as the engine will look it up.
pub fn resolve(gguf: &Gguf, stored: usize, r: usize, part: &str) -> String {
    let own = format!("blk.{stored}.rec.{r}.{part}.weight");
    if gguf.tensor(&own).is_some() {
        return own;
    }
    let aliases = gguf.metadata.strings("mor.recursion.aliases").unwrap();
    for alias in aliases.unwrap_or_default().iter() {
        if let Some((_, target)) = alias.split_once('=').filter(|(name, _)| *name == own) {
            return target.to_string();
        }
    }
    format!("blk.{stored}.{part}.weight")
}

/// Every (recursion, layer, tensor) of an F32 file is what the reference would use.
pub fn check_every_tensor(case: &str, gguf: &Gguf, bytes: &[u8], c: &Checkpoint) {
    let m = &gguf.metadata;
    assert_eq!(m.require_str("general.architecture").unwrap(), "mor");
    assert_eq!(
        m.require_u32("mor.recursion.count").unwrap() as usize,
        c.recursions()
    );
    assert_eq!(m.require_str("mor.recursion.sharing").unwrap(), c.sharing());
    assert_eq!(
        m.require_u32("mor.block_count").unwrap() as usize,
        c.block() + 2 * c.middle()
    );
    let kind = match c.kind() {
        "expert" => "expert",
        "token" => "token",
        _ => "none",
    };
    assert_eq!(m.require_str("mor.router.kind").unwrap(), kind);
    let same = |name: &str, wanted: &[u8]| {
        assert!(decoded(gguf, bytes, name) == wanted, "{case}: {name}");
    };
    same(
        "token_embd.weight",
        &c.tensors["model.embed_tokens.weight"].1,
    );
    same("output_norm.weight", &c.tensors["model.norm.weight"].1);
    match c.tensors.get("lm_head.weight") {
        Some((_, head)) => same("output.weight", head),
        None => assert!(gguf.tensor("output.weight").is_none()),
    }
    for (source, target) in PARTS {
        for r in 0..c.recursions() {
            for j in 0..c.block() {
                let name = resolve(gguf, c.middle() + j, r, target);
                same(&name, c.find(&c.names(r, j), source));
            }
        }
        if c.middle() == 1 {
            same(
                &format!("blk.0.{target}.weight"),
                c.find(&["model.layers.0".into()], source),
            );
            let last = format!("blk.{}.{target}.weight", c.block() + 1);
            same(&last, c.find(&[c.last_name()], source));
        }
    }
    check_routers(case, gguf, bytes, c);
}

fn check_routers(case: &str, gguf: &Gguf, bytes: &[u8], c: &Checkpoint) {
    let mut routers = 0;
    for (name, (_, wanted)) in &c.tensors {
        let Some((layer, rest)) = name
            .strip_prefix("model.layers.")
            .and_then(|n| n.split_once('.'))
        else {
            continue;
        };
        let r = layer.parse::<usize>().unwrap().saturating_sub(c.middle());
        let target = if let Some(leaf) = rest.strip_prefix("mor_router.router.") {
            format!("router.{r}.{leaf}")
        } else if let Some(leaf) = rest.strip_prefix("mlp_router.router.") {
            format!("aux_router.{r}.{leaf}")
        } else if rest == "router_bias" {
            "router.0.bias".to_string()
        } else {
            continue;
        };
        routers += 1;
        assert!(decoded(gguf, bytes, &target) == *wanted, "{case}: {target}");
    }
    let stored = gguf.tensors().iter().filter(|t| t.name.contains("router"));
    assert_eq!(stored.count(), routers, "{case}");
}

/// A copy of a case that a test may spoil: the folder and its tensors.
pub struct Copy {
    pub folder: tempfile::TempDir,
    pub checkpoint: Checkpoint,
}

impl Copy {
    pub fn of(case: &str) -> Copy {
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "mor.yaml"] {
            std::fs::copy(case_folder(case).join(file), folder.path().join(file)).unwrap();
        }
        Copy {
            folder,
            checkpoint: Checkpoint::read(case),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn without(self, file: &str) -> Copy {
        std::fs::remove_file(self.path().join(file)).unwrap();
        self
    }

    pub fn replace_in(&self, file: &str, from: &str, to: &str) {
        let path = self.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        std::fs::write(path, text.replacen(from, to, 1)).unwrap();
    }

    pub fn convert(&self, options: &ConvertOptions) -> Result<Converted, String> {
        self.checkpoint
            .write(&self.path().join("model.safetensors"));
        convert_folder(self.path(), options)
    }

    /// Converts to F32 and compares every tensor with the reference's lookup.
    pub fn check(&self, case: &str, options: &ConvertOptions) -> Converted {
        let converted = self.convert(options).unwrap();
        let original = Checkpoint::read(case);
        check_every_tensor(case, &converted.gguf(), &converted.bytes, &original);
        converted
    }

    pub fn error(&self) -> String {
        self.convert(&options(TensorType::F32)).unwrap_err()
    }

    pub fn tensor(&mut self, name: &str) -> &mut (Vec<usize>, Vec<u8>) {
        self.checkpoint.tensors.get_mut(name).unwrap()
    }

    pub fn add(&mut self, name: &str, tensor: (Vec<usize>, Vec<u8>)) {
        self.checkpoint.tensors.insert(name.to_string(), tensor);
    }
}
