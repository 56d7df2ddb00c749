//! What only a GPU can get wrong: agreement with the CPU in the types that are used, faults at every point
//! where the driver can refuse, memory that stays as planned. The suites of sessions and batches run on a
//! GPU too, with MOR_TEST_DEVICE=cuda (tests/cuda/run.sh).
//!
//! Where there is no driver these tests are skipped, unless MOR_TEST_DEVICE says that they must run. Faults
//! need the fake driver, which MOR_TEST_FAKE_DRIVER says to be there.
#![cfg(all(feature = "cuda", feature = "convert"))]

mod common;

use common::cases::{gguf_bytes, saved, spoil_token_5};
use mor::batch::{Event, Pressure, Status};
use mor::convert::{ConvertOptions, Silent, SynthOptions, SynthShape, convert, synth};
use mor::gguf::{Gguf, GgufWriter, Metadata, TensorInfo, TensorPlan};
use mor::quant::TensorType;
use mor::{
    Batch, Device, Error, KvType, LoadParams, Model, Plan, Request, SamplerParams, SequenceId,
    Session, SessionParams,
};
use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::sync::{Mutex, MutexGuard};

fn gpu(case: &str, ty: TensorType) -> Result<Model, Error> {
    Model::from_bytes_on(gguf_bytes(case, ty), Device::Cuda(0))
}

/// The fake driver counts for the whole process, so these tests take turns.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// None where there is no device; else what keeps other tests away.
fn device() -> Option<MutexGuard<'static, ()>> {
    let alone = alone();
    match gpu("vanilla", TensorType::F32) {
        Ok(_) => Some(alone),
        Err(error) => {
            assert!(!common::on_gpu(), "{error}");
            common::skip_test(&error.to_string());
            None
        }
    }
}

/// What the fake driver lets its tests do.
struct Fake {
    reset: libloading::Symbol<'static, unsafe extern "C" fn()>,
    set: libloading::Symbol<'static, unsafe extern "C" fn(*const c_char, *const c_char)>,
    calls: libloading::Symbol<'static, unsafe extern "C" fn(*const c_char) -> u64>,
    kernels: libloading::Symbol<'static, unsafe extern "C" fn(*const c_char) -> u64>,
    blocks: libloading::Symbol<'static, unsafe extern "C" fn(*const c_char) -> u64>,
    shared: libloading::Symbol<'static, unsafe extern "C" fn(*const c_char) -> u64>,
    live: libloading::Symbol<'static, unsafe extern "C" fn() -> u64>,
}

impl Fake {
    /// None on a real driver; else it keeps other tests away too.
    fn find() -> Option<(Self, MutexGuard<'static, ()>)> {
        let alone = alone();
        match Self::loaded() {
            Some(fake) => Some((fake, alone)),
            None => {
                common::skip_test("no fake driver (tests/cuda/run.sh has it)");
                None
            }
        }
    }

    /// For tests that keep others away themselves. MOR_TEST_FAKE_DRIVER says that it must be there.
    fn loaded() -> Option<Self> {
        // SAFETY: a driver may be loaded at any time.
        let library = unsafe { libloading::Library::new("libcuda.so.1") };
        let library = library.ok().map(|library| &*Box::leak(Box::new(library)));
        let fake = library.filter(|library| {
            // SAFETY: only whether there is such a function.
            unsafe { library.get::<unsafe extern "C" fn()>(b"fakeCudaReset") }.is_ok()
        });
        let wanted = std::env::var_os("MOR_TEST_FAKE_DRIVER").is_some();
        assert!(fake.is_some() || !wanted, "this is not the fake driver");
        let fake = fake?;
        // SAFETY: these functions have these arguments.
        unsafe {
            Some(Fake {
                reset: fake.get(b"fakeCudaReset").unwrap(),
                set: fake.get(b"fakeCudaSet").unwrap(),
                calls: fake.get(b"fakeCudaCalls").unwrap(),
                kernels: fake.get(b"fakeCudaKernels").unwrap(),
                blocks: fake.get(b"fakeCudaBlocks").unwrap(),
                shared: fake.get(b"fakeCudaShared").unwrap(),
                live: fake.get(b"fakeCudaLive").unwrap(),
            })
        }
    }

    /// Kernels that ran, whose names have this in them.
    fn kernels(&self, part: &str) -> u64 {
        let part = CString::new(part).unwrap();
        // SAFETY: a text.
        unsafe { (self.kernels)(part.as_ptr()) }
    }

    /// Blocks of those kernels.
    fn blocks(&self, part: &str) -> u64 {
        let part = CString::new(part).unwrap();
        // SAFETY: a text.
        unsafe { (self.blocks)(part.as_ptr()) }
    }

    /// The most dynamic shared memory that one of them had.
    fn shared(&self, part: &str) -> u64 {
        let part = CString::new(part).unwrap();
        // SAFETY: a text.
        unsafe { (self.shared)(part.as_ptr()) }
    }

    fn set(&self, name: &str, value: &str) {
        let (name, value) = (CString::new(name).unwrap(), CString::new(value).unwrap());
        // SAFETY: two texts.
        unsafe { (self.set)(name.as_ptr(), value.as_ptr()) }
    }

    fn calls(&self, name: &str) -> u64 {
        let name = CString::new(name).unwrap();
        // SAFETY: a text.
        unsafe { (self.calls)(name.as_ptr()) }
    }

    fn live(&self) -> u64 {
        // SAFETY: takes nothing.
        unsafe { (self.live)() }
    }

    fn reset(&self) {
        // SAFETY: nothing of the driver is in use: every test drops what it made.
        unsafe { (self.reset)() }
    }
}

fn params() -> SessionParams {
    SessionParams {
        context: 64,
        batch: 16,
        threads: 1,
        logit_rows: 4,
        ..Default::default()
    }
}

fn scores(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut found = Vec::new();
    session
        .score(tokens, |_, row| {
            found.extend_from_slice(row);
            Ok(())
        })
        .unwrap();
    found
}

/// A file's weights as F32, without loss.
fn in_single_precision(bytes: &[u8]) -> Model {
    Model::from_bytes(converted(bytes, TensorType::F32)).unwrap()
}

/// Against the same weights in single precision on the CPU, whose keys are stored alike. What differs is
/// that the GPU rounds the inputs of products to 11 bits, 2^-12 of each at most. A logit is the end of some
/// twenty products in a row; were all roundings independent, their sum would deviate by
/// sqrt(20) · 2^-12 / sqrt(3) = 6e-4 of the logits' deviation; the worst of thousands is at five of those.
/// Routing and SwiGLU add up to threefold.
const TOLERANCE: f32 = 0.01;

/// Scores some tokens in both.
fn compare(name: &str, bytes: Vec<u8>, kv: KvType) {
    let cpu = in_single_precision(&bytes);
    let gpu = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
    let params = SessionParams { kv, ..params() };
    let mut here = Session::new(&cpu, &params).unwrap();
    let mut there = Session::new(&gpu, &params).unwrap();
    let vocab = cpu.hyperparameters().vocab_size;
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 % vocab) as u32).collect();
    let (a, b) = (scores(&mut here, &tokens), scores(&mut there, &tokens));
    let deviation = (a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32).sqrt();
    let (mut worst, mut compared) = (0.0f32, 0);
    for (i, (a, b)) in a.chunks(vocab).zip(b.chunks(vocab)).enumerate() {
        if here.depths()[i] == there.depths()[i] {
            worst = worst.max(common::worst_difference(a, b) / deviation);
            compared += 1;
        }
    }
    println!(
        "{name} with {kv:?}: worst {worst}, {} depths differ",
        40 - compared
    );
    assert!(worst < TOLERANCE, "{name} with {kv:?}: {worst}");
    // A score may lie at the cut, within the tolerance.
    assert!(compared >= 39, "{name} with {kv:?}");
}

#[test]
fn every_type_agrees_with_the_cpu() {
    let Some(_alone) = device() else { return };
    for ty in [
        TensorType::F16,
        TensorType::BF16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
    ] {
        for kv in [KvType::F16, KvType::F32] {
            compare(ty.name(), gguf_bytes("expert_middle_cycle", ty), kv);
        }
    }
}

/// Multiplies the weights of a tensor, of F32 or BF16, by a power of two.
fn scale(bytes: &mut [u8], name: &str, power: i32) {
    let gguf = Gguf::parse(bytes).unwrap();
    let tensor = gguf.tensor(name).unwrap();
    let data = &mut bytes[tensor.offset..][..tensor.bytes];
    let factor = 2f32.powi(power);
    match tensor.ty {
        TensorType::F32 => {
            for weight in data.as_chunks_mut::<4>().0 {
                *weight = (f32::from_le_bytes(*weight) * factor).to_le_bytes();
            }
        }
        TensorType::BF16 => {
            for weight in data.as_chunks_mut::<2>().0 {
                let whole = f32::from_bits(u32::from(u16::from_le_bytes(*weight)) << 16);
                let scaled = (whole * factor).to_bits() >> 16;
                *weight = (scaled as u16).to_le_bytes();
            }
        }
        other => panic!("{other}"),
    }
}

/// Tensor cores multiply halves, which have a narrower range than BF16: matrices beyond it go through single precision.
#[test]
fn weights_beyond_halves_agree_too() {
    let Some(_turn) = device() else { return };
    for power in [-40, -20, -14, 0, 14, 20] {
        for case in ["vanilla", "expert_middle_cycle"] {
            let mut bytes = gguf_bytes(case, TensorType::BF16);
            scale(&mut bytes, "output.weight", power);
            scale(&mut bytes, "output_norm.weight", -power);
            compare(
                &format!("{case}, the output matrix times 2^{power}"),
                bytes,
                KvType::F32,
            );
        }
        let mut bytes = gguf_bytes("vanilla", TensorType::BF16);
        scale(&mut bytes, "blk.0.ffn_up.weight", power);
        scale(&mut bytes, "blk.0.ffn_down.weight", -power);
        compare(&format!("ffn_up times 2^{power}"), bytes, KvType::F32);
    }
}

/// A random model of two small layers in single precision, as a file.
fn tiny(seed: u64) -> Vec<u8> {
    synthetic("tiny", Some(2), seed)
}

fn synthetic(shape: &str, layers: Option<usize>, seed: u64) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let options = SynthOptions {
        shape: SynthShape::parse(shape).unwrap(),
        layers,
        ty: TensorType::F32,
        seed,
        mean_depth: None,
    };
    synth(&path, &options, &mut Silent).unwrap();
    std::fs::read(&path).unwrap()
}

/// A model without its tokenizer and with other sizes: `sizes` are the numbers of the header that change,
/// `reshape` changes a tensor's dimensions by its name, `fill` gives the bytes of one whose dimensions are
/// new.
fn resized(
    file: &[u8],
    sizes: &[(&str, usize)],
    reshape: impl Fn(&str, &mut [u64]),
    mut fill: impl FnMut(&[u64], &[u8]) -> Vec<u8>,
) -> Vec<u8> {
    let gguf = Gguf::parse(file).unwrap();
    let plans: Vec<TensorPlan> = gguf
        .tensors()
        .iter()
        .map(|t| {
            let mut dims = t.dims.clone();
            reshape(&t.name, &mut dims);
            TensorPlan {
                name: t.name.to_string(),
                ty: t.ty,
                dims,
            }
        })
        .collect();
    let mut metadata = Metadata::new();
    for (key, value) in gguf.metadata.iter() {
        if !key.starts_with("tokenizer.") {
            metadata.insert(key, value.clone());
        }
    }
    let arch = metadata.str("general.architecture").unwrap().unwrap();
    let arch = arch.to_string();
    for (name, size) in sizes {
        metadata.insert(format!("{arch}.{name}"), *size as u32);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resized.gguf");
    let mut writer = GgufWriter::create(&path, &metadata, &plans).unwrap();
    for (t, plan) in gguf.tensors().iter().zip(&plans) {
        let bytes = &file[t.offset..][..t.bytes];
        if plan.dims == t.dims {
            writer.write_tensor_bytes(bytes).unwrap();
        } else {
            writer.write_tensor_bytes(&fill(&plan.dims, bytes)).unwrap();
        }
        writer.next_tensor().unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(&path).unwrap()
}

/// A matrix of single precision, of random weights of the usual size.
fn random_floats(random: &mut common::Random, dims: &[u64]) -> Vec<u8> {
    let size = (3.0 / dims[0] as f32).sqrt();
    (0..dims.iter().product())
        .flat_map(|_| (size * random.unit()).to_le_bytes())
        .collect()
}

/// A file with its matrices in another type.
fn converted(file: &[u8], ty: TensorType) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
    std::fs::write(&from, file).unwrap();
    let options = ConvertOptions {
        ty: Some(ty),
        ..Default::default()
    };
    convert(&from, &to, &options, &mut Silent).unwrap();
    std::fs::read(&to).unwrap()
}

/// A small model whose matrices are random blocks of a type that is only read, wherever rows are whole
/// blocks.
fn random_blocks(ty: TensorType, file: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("b.gguf");
    let gguf = Gguf::parse(file).unwrap();
    let fits = |t: &TensorInfo| {
        t.dims.len() == 2 && t.columns().is_multiple_of(ty.block_len()) && t.name.starts_with("blk")
    };
    let plans: Vec<TensorPlan> = gguf
        .tensors()
        .iter()
        .map(|t| TensorPlan {
            name: t.name.to_string(),
            ty: if fits(t) { ty } else { t.ty },
            dims: t.dims.clone(),
        })
        .collect();
    assert!(plans.iter().any(|plan| plan.ty == ty));
    let mut metadata = gguf.metadata.clone();
    metadata.remove("mor.tensor_data_layout");
    let mut writer = GgufWriter::create(&to, &metadata, &plans).unwrap();
    let mut random = common::Random(5);
    for (t, plan) in gguf.tensors().iter().zip(&plans) {
        if plan.ty != ty || ty == TensorType::F32 {
            writer
                .write_tensor_bytes(&file[t.offset..][..t.bytes])
                .unwrap();
            writer.next_tensor().unwrap();
            continue;
        }
        let blocks = t.columns() * t.rows() / ty.block_len();
        for _ in 0..blocks {
            let mut block: Vec<u8> = (0..ty.block_bytes())
                .map(|_| random.below(256) as u8)
                .collect();
            // Scales that give weights of the usual size.
            let halves: &[usize] = match ty {
                TensorType::Q6_K => &[208],
                TensorType::Q5_0 => &[0],
                _ => &[0, 2],
            };
            let size = match ty {
                TensorType::Q5_0 | TensorType::Q5_1 => 4e-3,
                TensorType::Q6_K => 5e-5,
                _ => 1e-4,
            };
            for at in halves {
                let scale = half::f16::from_f32(size * (0.5 + random.below(100) as f32 / 100.0));
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            writer.write_tensor_bytes(&block).unwrap();
        }
        writer.next_tensor().unwrap();
    }
    writer.finish().unwrap();
    std::fs::read(&to).unwrap()
}

#[test]
fn types_that_are_only_read_agree_too() {
    let Some(_alone) = device() else { return };
    for ty in [
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q4_K,
        TensorType::Q5_K,
        TensorType::Q6_K,
    ] {
        compare(ty.name(), random_blocks(ty, &tiny(3)), KvType::F32);
    }
    // With weights in single precision the keys differ too little to be rounded differently often.
    compare(
        "F32",
        random_blocks(TensorType::F32, &tiny(3)),
        KvType::Q8_0,
    );
}

/// A model of two layers whose matrices are larger than a test of results needs: so many columns that a
/// warp has several groups of them to read ahead, so many rows that a block takes several tiles of them.
fn large_matrices() -> Vec<u8> {
    of_sizes(HIDDEN, 2048, 17_000)
}

/// The types of matrices that tensor cores take.
fn by_tensor_cores() -> impl Iterator<Item = TensorType> {
    let all = TensorType::ALL.into_iter();
    all.filter(|ty| *ty != TensorType::F32)
}

/// A file with matrices of a type: one of these converted, or, of types that are only read, with random blocks.
fn in_type(ty: TensorType, to_convert: &[u8], to_fill: &[u8]) -> Vec<u8> {
    use TensorType::{BF16, F16, Q4_0, Q4_1, Q8_0};
    match ty {
        F16 | BF16 | Q8_0 | Q4_0 | Q4_1 => converted(to_convert, ty),
        _ => random_blocks(ty, to_fill),
    }
}

/// How wide the small model is.
const HIDDEN: usize = 128;

/// The model of two layers with other widths and another vocabulary.
fn of_sizes(hidden: usize, feed_forward: usize, vocab: usize) -> Vec<u8> {
    let mut random = common::Random(11);
    resized(
        &tiny(7),
        &[
            ("vocab_size", vocab),
            ("embedding_length", hidden),
            ("feed_forward_length", feed_forward),
        ],
        |name, dims| {
            let (hidden, feed_forward) = (hidden as u64, feed_forward as u64);
            let part = name.rsplit_once('.').map_or(name, |(name, _)| name);
            match part.rsplit_once('.').map_or(part, |(_, part)| part) {
                "token_embd" => dims.copy_from_slice(&[hidden, vocab as u64]),
                "ffn_gate" | "ffn_up" => dims.copy_from_slice(&[hidden, feed_forward]),
                "ffn_down" => dims.copy_from_slice(&[feed_forward, hidden]),
                "attn_output" => dims[1] = hidden,
                _ => dims[0] = hidden,
            }
        },
        |dims, _| random_floats(&mut random, dims),
    )
}

/// The logits after some tokens, in passes of up to `batch` rows.
fn logits_after(model: &Model, tokens: &[u32], context: usize, batch: usize) -> Vec<f32> {
    let params = SessionParams {
        context,
        batch,
        ..params()
    };
    let mut session = Session::new(model, &params).unwrap();
    session.prefill(tokens).unwrap();
    session.logits().unwrap().to_vec()
}

/// Large matrices agree with the CPU's, and one row at a time, some and many give the same bits.
#[test]
fn large_matrices_agree_however_many_rows_come() {
    let Some(_alone) = device() else { return };
    let original = large_matrices();
    for ty in [
        TensorType::F16,
        TensorType::Q8_0,
        TensorType::Q4_0,
        TensorType::Q4_1,
    ] {
        let bytes = converted(&original, ty);
        compare(&format!("large {}", ty.name()), bytes.clone(), KvType::F16);
        let model = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
        let tokens: Vec<u32> = (0..70).map(|i| (i * i * 31 % 17_000) as u32).collect();
        // The last row comes alone where one row is the most.
        let logits = |batch| logits_after(&model, &tokens, 80, batch);
        let many = logits(70);
        assert!(many.iter().all(|logit| logit.is_finite()));
        for batch in [1, 5, 34] {
            assert!(many == logits(batch), "{} with {batch} rows", ty.name());
        }
    }
}

/// The logits after up to 140 tokens on a device with other attributes: multiprocessors (16), shared memory of a block (97).
fn logits_on(fake: &Fake, attributes: &str, bytes: &[u8], count: usize, batch: usize) -> Vec<f32> {
    fake.reset();
    fake.set("MOR_FAKE_CUDA_ATTRIBUTE", attributes);
    if attributes.contains("97=") {
        fake.set("MOR_FAKE_CUDA_ARCH", "86");
    }
    let model = Model::from_bytes_on(bytes.to_vec(), Device::Cuda(0)).unwrap();
    let vocab = model.hyperparameters().vocab_size;
    let tokens: Vec<u32> = (0..count).map(|i| (i * i * 31 % vocab) as u32).collect();
    logits_after(&model, &tokens, 140, batch)
}

/// Products in blocks of each size, which the number of multiprocessors decides, give every type the same bits as
/// those for a few rows.
#[test]
fn blocks_of_every_size_agree_for_every_type() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    // Eleven groups of columns, so that a pair lacks one, and 22 tiles, so that blocks have some of both.
    let odd = of_sizes(HIDDEN, 352, 1024);
    // Runs that begin within a long block, and more of those than are copied at once.
    let long = of_sizes(HIDDEN, 2304, 1024);
    for ty in by_tensor_cores() {
        let bytes = in_type(ty, &odd, &long);
        let logits = |count: usize, attributes: &str, batch: usize| {
            logits_on(&fake, attributes, &bytes, count, batch)
        };
        let few = logits(130, "16=1", 8);
        for attributes in ["16=1", "16=2", "16=4", "16=8"] {
            let wide = logits(130, attributes, 130);
            assert!(wide == few, "{} with {attributes}", ty.name());
        }
        let few = logits(9, "16=1", 9);
        let small = "16=8,97=101376";
        for attributes in ["16=1", "16=8", small] {
            let lone = logits(9, attributes, 1);
            assert!(lone == few, "{} with {attributes}, alone", ty.name());
        }
        // Where there is little shared memory, blocks of many rows just have room for plain types, and not for all.
        let some = logits(34, "16=1", 8);
        assert!(logits(9, small, 9) == few && logits(34, small, 34) == some);
        let of_many = fake.kernels(&format!("many_product_{}", ty.name().to_lowercase()));
        assert!(of_many > 0 || ty.block_len() > 32, "{}", ty.name());
    }
    fake.reset();
}

/// Products of a few rows and of some, of one matrix and of a gate with what it lets through, give every type the same
/// bits as those of a lone row.
#[test]
fn however_few_rows_come_no_bit_changes() {
    let Some(_alone) = device() else { return };
    let fake = Fake::loaded();
    // Pairs of groups of which the last lacks one, and runs that begin within a long block.
    let odd = of_sizes(HIDDEN, 352, 1024);
    let long = of_sizes(256, 768, 1024);
    for ty in by_tensor_cores() {
        if let Some(fake) = &fake {
            fake.reset();
        }
        let bytes = in_type(ty, &odd, &long);
        let model = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
        let vocab = model.hyperparameters().vocab_size;
        let tokens: Vec<u32> = (0..70).map(|i| (i * i * 31 % vocab) as u32).collect();
        let logits = |batch| logits_after(&model, &tokens, 70, batch);
        let lone = logits(1);
        for batch in [5, 8, 32, 64] {
            assert!(logits(batch) == lone, "{}, {batch} rows", ty.name());
        }
        for kind in ["few_product", "few_swiglu", "many_product", "many_swiglu"] {
            let name = format!("{kind}_{}", ty.name().to_lowercase());
            let ran = fake.as_ref().is_none_or(|fake| fake.kernels(&name) > 0);
            assert!(ran, "{name}");
        }
    }
}

/// Blocks that go through all rows, for not all blocks run at once, give every type the same bits as those for a few
/// rows: where their rings hold all weights, and where these come again for each part of the rows.
#[test]
fn rows_that_a_block_takes_in_turn_change_no_bit() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    for hidden in [256, 3584] {
        let shape = of_sizes(hidden, 256, 512);
        for ty in by_tensor_cores() {
            let bytes = in_type(ty, &shape, &shape);
            let logits =
                |attributes: &str, batch: usize| logits_on(&fake, attributes, &bytes, 40, batch);
            // Gate and up have 16 tiles, so with a block for each part of the rows 32: more than run at once where a
            // multiprocessor has two, or has one.
            let few = logits("16=12", 8);
            let name = format!("many_swiglu_{}", ty.name().to_lowercase());
            let in_turn = ["16=12", "16=16"].map(|attributes| {
                let some = logits(attributes, 40);
                assert!(some == few, "{}, {hidden}, {attributes}", ty.name());
                let ran = fake.kernels(&name);
                ran > 0 && fake.blocks(&name) == 16 * ran
            });
            assert!(in_turn.contains(&true), "{name}");
            let some = logits("16=12,97=101376", 40);
            assert!(some == few, "{}, {hidden}, little shared memory", ty.name());
            if hidden > 256 {
                continue;
            }
            // Five parts of the rows: three blocks share them, of which the last has one. (Two layers, twice, for each
            // program runs when it is made; that for 64 rows then only, with a block for each of its two parts.)
            let five_parts = |batch| logits_on(&fake, "16=28", &bytes, 140, batch);
            let few = five_parts(8);
            let many = five_parts(140);
            assert!(many == few, "{}, five parts", ty.name());
            let blocks = fake.blocks(&name);
            let three_each = blocks == 16 * (4 * 3 + 2 * 2);
            assert!(three_each || ty.block_len() > 32, "{name}: {blocks}");
        }
    }
    fake.reset();
}

/// Where each block has a multiprocessor for itself, twice as many groups of activations come together, to the same bits.
#[test]
fn activations_that_come_together_change_no_bit() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    // Runs of ten groups, the last of which has fewer, and of twenty, for which weights come more than once.
    for feed_forward in [2304, 5120] {
        let shape = of_sizes(HIDDEN, feed_forward, 512);
        for ty in by_tensor_cores() {
            let bytes = in_type(ty, &shape, &shape);
            for kind in ["few", "many"] {
                let name = format!("{kind}_product_{}", ty.name().to_lowercase());
                let rows = if kind == "few" { 8 } else { 40 };
                // Down has eight tiles. (With fewer multiprocessors wide blocks would be enough for 40 rows.)
                let run = |attributes| {
                    let logits = logits_on(&fake, attributes, &bytes, 40, rows);
                    (logits, fake.shared(&name))
                };
                let (together, most) = run("16=132");
                let (one_by_one, least) = run("16=6");
                assert!(together == one_by_one, "{name}, {feed_forward}");
                assert!(
                    0 < least && least < most,
                    "{name}: {least} and {most} bytes"
                );
            }
        }
    }
    fake.reset();
}

/// Products by warpgroups give every type the same bits as those for few rows.
#[test]
fn products_for_prompts_change_no_bit() {
    let Some(_alone) = device() else { return };
    let fake = Fake::loaded();
    // How many multiprocessors decides which blocks there are; an emulated row takes its time.
    let (hidden, cases): (_, &[_]) = match fake {
        Some(_) => (HIDDEN, &[(130, "16=1"), (130, "16=4"), (67, "16=8")]),
        None => (768, &[(300, ""), (512, "")]),
    };
    // Runs of several pairs of groups, the last of which lacks one where the type's blocks are that short.
    let odd = of_sizes(hidden, 2336, 1024);
    let long = of_sizes(hidden, 2304, 1024);
    for ty in by_tensor_cores() {
        let mut seen = [0, 0];
        let bytes = in_type(ty, &odd, &long);
        for (count, attributes) in cases {
            if let Some(fake) = &fake {
                fake.reset();
                fake.set("MOR_FAKE_CUDA_ATTRIBUTE", attributes);
            }
            let model = Model::from_bytes_on(bytes.clone(), Device::Cuda(0)).unwrap();
            let vocab = model.hyperparameters().vocab_size;
            let tokens: Vec<u32> = (0..*count).map(|i| (i * i * 31 % vocab) as u32).collect();
            let logits = |batch| logits_after(&model, &tokens, 4 * count, batch);
            let few = logits(24);
            // Where more rows might have come, some blocks begin with none.
            for batch in [*count, 4 * count] {
                assert!(
                    logits(batch) == few,
                    "{}, {count} rows of {batch}, {attributes}",
                    ty.name()
                );
            }
            for (seen, size) in seen.iter_mut().zip(["128x64", "128x128"]) {
                let name = format!("warpgroup_product_{size}_{}", ty.name().to_lowercase());
                let launched = |fake: &Fake| fake.kernels(&name);
                *seen += match size == "128x128" && ty.block_len() > 1 {
                    // There is no such kernel.
                    true => 1,
                    false => fake.as_ref().map_or(1, launched),
                };
            }
        }
        assert!(seen.iter().all(|seen| *seen > 0), "{}: {seen:?}", ty.name());
    }
    if let Some(fake) = fake {
        fake.reset();
    }
}

/// More rows than a block has threads, more entries than a part of a context: the same as in small pieces,
/// to the bit, and the same depths as on the CPU.
#[test]
fn long_passes_change_no_bit() {
    let Some(_alone) = device() else { return };
    for case in ["expert_middle_cycle", "recursive_middle_sequence"] {
        let model = gpu(case, TensorType::F32).unwrap();
        let vocab = model.hyperparameters().vocab_size;
        let tokens: Vec<u32> = (0..600).map(|i| (i * i % vocab) as u32).collect();
        let run = |model: &Model, batch: usize| {
            let params = SessionParams {
                context: 640,
                batch,
                ..params()
            };
            let mut session = Session::new(model, &params).unwrap();
            session.prefill(&tokens).unwrap();
            let logits = session.logits().unwrap().to_vec();
            (logits, session.depths().to_vec())
        };
        let whole = run(&model, 600);
        assert!(whole == run(&model, 48), "{case}");
        let cpu = run(&in_single_precision(&gguf_bytes(case, TensorType::F32)), 64);
        assert_eq!(whole.1, cpu.1, "{case}");
        let worst = common::worst_difference(&whole.0, &cpu.0);
        // As in tests/reference.rs, but the keys are halves: those may round differently.
        assert!(worst < 1e-3, "{case}: {worst}");
    }
}

/// A small model whose two layers have attention of these sizes.
fn other_heads(head_dim: usize, heads: usize, kv_heads: usize, rotated: usize) -> Vec<u8> {
    with_heads(&tiny(9), head_dim, heads, kv_heads, rotated)
}

fn with_heads(
    file: &[u8],
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    rotated: usize,
) -> Vec<u8> {
    let mut random = common::Random(13);
    resized(
        file,
        &[
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("attention.key_length", head_dim),
            ("attention.value_length", head_dim),
            ("rope.dimension_count", rotated),
        ],
        |name, dims| {
            if name.ends_with("attn_q.weight") {
                dims[1] = (heads * head_dim) as u64;
            } else if name.ends_with("attn_k.weight") || name.ends_with("attn_v.weight") {
                dims[1] = (kv_heads * head_dim) as u64;
            } else if name.ends_with("attn_output.weight") {
                dims[0] = (heads * head_dim) as u64;
            }
        },
        |dims, _| random_floats(&mut random, dims),
    )
}

/// One row at a time, some and many give the same bits, across the border of two parts of a context, and what
/// the CPU gives: heads of whole chunks and of any size, one query head to a key head and more than a tile of
/// them, elements that are not rotated.
#[test]
fn attention_agrees_however_many_rows_come() {
    let Some(_alone) = device() else { return };
    for (kv, head_dim, heads, kv_heads, rotated) in [
        (KvType::F16, 64, 3, 1, 64),
        (KvType::F16, 128, 2, 2, 96),
        (KvType::F16, 22, 18, 2, 22),
        (KvType::F16, 7, 2, 1, 4),
        (KvType::F32, 22, 10, 2, 10),
        (KvType::Q8_0, 96, 6, 1, 96),
    ] {
        let name = format!("{kv:?}, {heads} heads of {head_dim} on {kv_heads}");
        let bytes = other_heads(head_dim, heads, kv_heads, rotated);
        let model = Model::from_bytes_on(bytes.clone(), Device::Cuda(0)).unwrap();
        let vocab = model.hyperparameters().vocab_size;
        let tokens: Vec<u32> = (0..262).map(|i| (i * i * 7 % vocab) as u32).collect();
        let run = |model: &Model, batch: usize, together: usize| {
            let params = SessionParams {
                context: 270,
                batch,
                kv,
                ..params()
            };
            let mut session = Session::new(model, &params).unwrap();
            let (first, last) = tokens.split_at(250);
            session.prefill(first).unwrap();
            for some in last.chunks(together) {
                session.prefill(some).unwrap();
            }
            session.logits().unwrap().to_vec()
        };
        let whole = run(&model, 250, 12);
        for (batch, together) in [(250, 1), (61, 5), (40, 12)] {
            let same = whole == run(&model, batch, together);
            assert!(same, "{name}: {batch} rows, then {together}");
        }
        let cpu = run(&Model::from_bytes(bytes).unwrap(), 64, 12);
        let deviation = (cpu.iter().map(|v| v * v).sum::<f32>() / cpu.len() as f32).sqrt();
        let worst = common::worst_difference(&whole, &cpu) / deviation;
        println!("{name}: worst {worst}");
        // Weights are in single precision. A key or value that lies between two halves may round the other way, by
        // 2^-11 of it; a score or an output is a sum of many, of which few do.
        assert!(worst < 1e-3, "{name}: {worst}");
    }
}

/// Attention made for prompts, and keys stored by pages, give the same bits: within a part of a context and across its
/// end, with rows that are fewer than a block takes and begin within a page, heads of both sizes, one query head to a key
/// head and several, and routers, so that rows see what others do not.
#[test]
fn attention_for_prompts_changes_no_bit() {
    let Some(_alone) = device() else { return };
    let fake = Fake::loaded();
    let routed = synthetic("tiny-mor3", None, 21);
    for (head_dim, heads, kv_heads, rotated, routers) in [
        (64, 3, 1, 64, false),
        (64, 2, 2, 64, true),
        (64, 10, 2, 40, false),
        (128, 4, 1, 96, true),
    ] {
        let name = format!("{heads} heads of {head_dim} on {kv_heads}, routers: {routers}");
        let tiny = if routers { routed.clone() } else { tiny(9) };
        let bytes = with_heads(&tiny, head_dim, heads, kv_heads, rotated);
        let kernels = ["attention_prompt", "store_f16_pages"];
        let count = || {
            fake.as_ref()
                .map(|fake| kernels.map(|name| fake.kernels(name)))
        };
        let before = count();
        let model = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
        let vocab = model.hyperparameters().vocab_size;
        let run = |batch, pieces: &[usize]| {
            let params = SessionParams {
                context: 600,
                batch,
                ..params()
            };
            let mut session = Session::new(&model, &params).unwrap();
            let (mut at, mut depths) = (0, Vec::new());
            for piece in pieces {
                let tokens: Vec<u32> = (at..at + piece)
                    .map(|i| (i * i * 7 % vocab) as u32)
                    .collect();
                session.prefill(&tokens).unwrap();
                depths.extend_from_slice(session.depths());
                at += piece;
            }
            (depths, session.logits().unwrap().to_vec())
        };
        for pieces in [&[270][..], &[100, 170, 66]] {
            assert!(run(300, pieces) == run(64, pieces), "{name}: {pieces:?}");
        }
        if let (Some(before), Some(after)) = (before, count()) {
            assert!(after[0] > before[0] && after[1] > before[1], "{name}");
        }
    }
}

/// A small model whose vocabulary of 1,024 tokens comes again and again, up to `vocab`: no token is the only
/// one with its logit.
fn repeated_vocabulary(vocab: usize) -> Vec<u8> {
    resized(
        &tiny(5),
        &[("vocab_size", vocab)],
        |name, dims| {
            if name == "token_embd.weight" {
                dims[1] = vocab as u64;
            }
        },
        |dims, bytes| {
            let all = dims.iter().product::<u64>() as usize * size_of::<f32>();
            bytes.iter().copied().cycle().take(all).collect()
        },
    )
}

/// The device draws what the host draws from the device's logits.
#[test]
fn the_device_draws_as_the_host() {
    let Some(_alone) = device() else { return };
    draw_on_both(&gpu("expert_middle_cycle", TensorType::F32).unwrap(), 20);
    // Several chunks; and so many that the candidates of 256 each are more than the kernel keeps.
    for (vocab, draws) in [(2050, 5), (9000, 2)] {
        let model = Model::from_bytes_on(repeated_vocabulary(vocab), Device::Cuda(0)).unwrap();
        draw_on_both(&model, draws);
    }
}

fn draw_on_both(model: &Model, draws: usize) {
    for (temperature, top_k, top_p, min_p, penalty) in [
        (0.0, 40, 1.0, 0.0, 1.0),
        (0.0, 40, 1.0, 0.0, 1.5),
        (0.8, 40, 0.95, 0.05, 1.0),
        (1.5, 7, 0.5, 0.0, 1.3),
        (1.0, 256, 1.0, 0.01, 1.0),
        (1.0, 1, 0.9, 0.1, 1.2),
        (3.0, 250, 0.99, 0.0, 1.1),
        (1.0, 0, 0.9, 0.0, 1.0),
    ] {
        let sampler = SamplerParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty: penalty,
            seed: 11,
            ..Default::default()
        };
        let run = |ask_for_logits: bool| {
            let mut session = Session::new(model, &params()).unwrap();
            session.set_sampler(sampler.clone()).unwrap();
            session.prefill(&[1, 2, 3, 4, 5]).unwrap();
            for _ in 0..draws {
                if ask_for_logits {
                    session.logits().unwrap();
                }
                let token = session.sample().unwrap();
                session.prefill(&[token]).unwrap();
            }
            session.tokens().to_vec()
        };
        assert_eq!(run(false), run(true), "{sampler:?}");
    }
}

/// One launch a pass, and no memory is taken or given back after creation.
#[test]
fn a_step_is_one_launch_and_takes_no_memory() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    let model = gpu("expert_middle_cycle", TensorType::Q8_0).unwrap();
    let mut session = Session::new(&model, &params()).unwrap();
    let memory = [
        "cuMemAlloc_v2",
        "cuMemFree_v2",
        "cuMemHostAlloc",
        "cuMemFreeHost",
    ];
    let before = memory.map(|name| fake.calls(name));
    session.prefill(&[1, 2, 3]).unwrap();
    let launches = fake.calls("cuGraphLaunch");
    for i in 0..40 {
        let token = session.sample().unwrap();
        session.prefill(&[token]).unwrap();
        assert_eq!(fake.calls("cuGraphLaunch"), launches + i + 1);
    }
    session.rewind(5).unwrap();
    session.prefill(&[7; 30]).unwrap();
    assert_eq!(memory.map(|name| fake.calls(name)), before);
    assert_eq!(fake.calls("cuLaunchKernel"), 0);
}

fn run(batch: &mut Batch) {
    while !batch.is_idle() {
        batch.tick().unwrap();
    }
}

/// The tokens of a session after a prompt and so many more, each drawn and run.
fn continued(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    session.prefill(prompt).unwrap();
    for _ in 0..count {
        let token = session.sample().unwrap();
        session.prefill(&[token]).unwrap();
    }
    session.tokens().to_vec()
}

/// The same of a session of its own, the likeliest tokens.
fn in_a_session(model: &Model, params: &SessionParams, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut session = Session::new(model, params).unwrap();
    session.set_sampler(SamplerParams::greedy()).unwrap();
    continued(&mut session, prompt, count)
}

fn request(prompt: &[u32], max_tokens: usize) -> Request<'_> {
    Request {
        prompt,
        max_tokens,
        sampler: SamplerParams::greedy(),
        ignore_end: true,
        ..Default::default()
    }
}

/// Rows of different sequences store their keys and values in attention, rows of one before it; either way a sequence
/// gets the bits that it gets alone.
#[test]
fn rows_apart_store_their_own_entries() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    let cases = [
        "vanilla",
        "recursive_sequence",
        "expert_own_attention",
        "expert_kv_shared",
        "token_cycle",
    ];
    let small = cases.map(|case| (case, gpu(case, TensorType::F32).unwrap()));
    let tiny = Model::from_bytes_on(tiny(7), Device::Cuda(0)).unwrap();
    for (case, model) in small.into_iter().chain([("tiny", tiny)]) {
        let blocks = model.hyperparameters().head_dim.is_multiple_of(32);
        let kinds = [KvType::F32, KvType::F16, KvType::Q8_0];
        for kv in kinds.into_iter().take(if blocks { 3 } else { 2 }) {
            let params = SessionParams { kv, ..params() };
            let expected = |prompt: &[u32], count| in_a_session(&model, &params, prompt, count);
            let of_five = SessionParams {
                sequences: 5,
                ..params.clone()
            };
            let mut batch = Batch::new(&model, &of_five).unwrap();
            let stored = || fake.kernels("mor_store");
            let before = stored();
            // More entries than a page has.
            let apart: [u32; 4] = [1, 2, 3, 4];
            let apart = apart.map(|token| (token, batch.add(&request(&[token], 20)).unwrap()));
            for _ in 0..6 {
                batch.tick().unwrap();
            }
            assert_eq!(stored(), before, "{case} {kv:?}");
            let prompt: Vec<u32> = (5..25).collect();
            let beside = batch.add(&request(&prompt, 3)).unwrap();
            run(&mut batch);
            assert!(stored() > before, "{case} {kv:?}");
            for (token, id) in apart {
                let tokens = batch.tokens(id).unwrap();
                assert_eq!(tokens, expected(&[token], 20), "{case} {kv:?}");
            }
            assert_eq!(batch.tokens(beside).unwrap(), expected(&prompt, 3));
        }
    }
}

/// The same where an entry goes to a page that a fork shares, which is copied first, and where a context has more parts
/// than one.
#[test]
fn rows_apart_store_into_pages_of_their_own() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    let model = Model::from_bytes_on(tiny(7), Device::Cuda(0)).unwrap();
    let params = SessionParams {
        context: 300,
        batch: 64,
        ..params()
    };
    let of_four = SessionParams {
        sequences: 4,
        ..params.clone()
    };
    let mut batch = Batch::new(&model, &of_four).unwrap();
    // Within a page, and just before the end of a part.
    for length in [20, 250] {
        let prompt: Vec<u32> = (0..length).map(|i| i * 7 % 1000).collect();
        let parent = batch.add(&request(&prompt, 12)).unwrap();
        run(&mut batch);
        let stored = fake.kernels("mor_store");
        let forks = [7, 8, 9].map(|token| {
            let after = [token];
            let request = request(&after, 12);
            (token, batch.fork(parent, prompt.len(), &request).unwrap())
        });
        run(&mut batch);
        assert_eq!(fake.kernels("mor_store"), stored);
        for (token, id) in forks {
            let prompt = [&prompt[..], &[token]].concat();
            let alone = in_a_session(&model, &params, &prompt, 12);
            assert_eq!(batch.tokens(id).unwrap(), alone, "{length}, {token}");
            batch.remove(id).unwrap();
        }
        batch.remove(parent).unwrap();
    }
}

/// An output matrix of 32 rows goes by warpgroups where they have enough to do, and each sequence has the tokens that it
/// has alone.
#[test]
fn an_output_matrix_of_32_rows_changes_no_token() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let bytes = converted(&of_sizes(HIDDEN, 256, 1024), TensorType::F16);
    // Sixteen blocks of 64 of its rows.
    for (multiprocessors, by_warpgroups) in [(4, true), (5, false)] {
        fake.reset();
        fake.set("MOR_FAKE_CUDA_ATTRIBUTE", &format!("16={multiprocessors}"));
        let model = Model::from_bytes_on(bytes.clone(), Device::Cuda(0)).unwrap();
        let of_32 = SessionParams {
            batch: 32,
            sequences: 32,
            ..params()
        };
        let mut batch = Batch::new(&model, &of_32).unwrap();
        let before = fake.kernels("warpgroup_product");
        let all = std::array::from_fn::<_, 32, _>(|i| {
            let token = 1 + 9 * i as u32;
            (token, batch.add(&request(&[token], 4)).unwrap())
        });
        run(&mut batch);
        let ran = fake.kernels("warpgroup_product") > before;
        assert_eq!(ran, by_warpgroups, "{multiprocessors}");
        for (token, id) in all {
            let alone = in_a_session(&model, &params(), &[token], 4);
            assert_eq!(batch.tokens(id).unwrap(), alone, "{token}");
        }
    }
    fake.reset();
}

/// A place of the page tables that changes twice before a launch has the last page, in whatever order the
/// device takes the changes; and a launch that fails loses none.
#[test]
fn a_page_that_changes_twice_is_the_last_one() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    for order in ["forward", "reverse"] {
        fake.reset();
        fake.set("MOR_EMULATED_ORDER", order);
        let model = gpu("expert_middle_cycle", TensorType::F32).unwrap();
        let of_three = SessionParams {
            sequences: 3,
            ..params()
        };
        let mut batch = Batch::new(&model, &of_three).unwrap();
        // Half of the second page.
        let prompts: [Vec<u32>; 2] = [(1..25).collect(), (30..54).collect()];
        let parents = prompts.each_ref().map(|prompt| {
            let id = batch.add(&request(prompt, 0)).unwrap();
            run(&mut batch);
            id
        });
        // One that never runs, and another at its place.
        let gone = batch.fork(parents[0], 24, &request(&[7], 3)).unwrap();
        batch.remove(gone).unwrap();
        let id = batch.fork(parents[1], 24, &request(&[7], 3)).unwrap();
        fake.set("MOR_FAKE_CUDA_FAIL", "cuGraphLaunch:1=719");
        assert!(matches!(batch.tick(), Err(Error::Device(_))));
        run(&mut batch);
        let prompt = [&prompts[1][..], &[7]].concat();
        let alone = in_a_session(&model, &params(), &prompt, 3);
        assert_eq!(batch.tokens(id).unwrap(), alone, "{order}");
    }
    fake.reset();
}

/// Loads, makes a session and a batch, runs both.
fn everything(case: &str) -> Result<Vec<u32>, Error> {
    let model = gpu(case, TensorType::F32)?;
    let mut session = Session::new(&model, &params())?;
    session.set_sampler(SamplerParams::greedy())?;
    session.prefill(&[1, 2, 3])?;
    for _ in 0..3 {
        let token = session.sample()?;
        session.prefill(&[token])?;
    }
    session.logits()?;
    let mut batch = Batch::new(
        &model,
        &SessionParams {
            sequences: 2,
            ..params()
        },
    )?;
    let request = Request {
        prompt: &[1, 2, 3],
        max_tokens: 3,
        sampler: SamplerParams::greedy(),
        ignore_end: true,
        ..Default::default()
    };
    let id = batch.add(&request)?;
    while !batch.is_idle() {
        batch.tick()?;
    }
    assert_eq!(batch.tokens(id)?, &session.tokens()[..6]);
    Ok(session.tokens().to_vec())
}

/// A launch that fails is not the fault of the sequence that made an earlier one fail.
#[test]
fn a_failed_launch_is_nobodys_fault() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    {
        let mut bytes = gguf_bytes("expert_middle_cycle", TensorType::F32);
        spoil_token_5(&mut bytes);
        let model = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
        let of_two = SessionParams {
            sequences: 2,
            ..params()
        };
        let mut batch = Batch::new(&model, &of_two).unwrap();
        let bad = batch.add(&request(&[5], 0)).unwrap();
        run(&mut batch);
        assert!(batch.failure(bad).unwrap().is_some());
        let good = batch.add(&request(&[6, 7], 2)).unwrap();
        fake.set("MOR_FAKE_CUDA_FAIL", "cuGraphLaunch:1=719");
        assert!(matches!(batch.tick(), Err(Error::Device(_))));
        run(&mut batch);
        assert!(batch.failure(good).unwrap().is_none());
        assert_eq!(batch.tokens(good).unwrap().len(), 4);
    }
    fake.reset();
}

/// A batch with a sequence that has run, of which there may be forks.
fn with_parent(model: &Model, params: &SessionParams, prompt: &[u32]) -> (Batch, SequenceId) {
    let of_three = SessionParams {
        sequences: 3,
        ..params.clone()
    };
    let mut batch = Batch::new(model, &of_three).unwrap();
    let parent = batch.add(&request(prompt, 0)).unwrap();
    run(&mut batch);
    (batch, parent)
}

/// A sequence whose copy of a shared page failed does not have the page, and gets it by the next tick: it, and who gets the
/// page of the sequence that it was shared with, have the tokens that they have alone.
#[test]
fn a_shared_page_that_was_not_copied_is_copied_later() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let prompt: Vec<u32> = (1..25).collect();
    let other: Vec<u32> = (30..60).rev().collect();
    let params = SessionParams {
        context: 64,
        ..params()
    };
    for case in ["expert_middle_cycle", "vanilla", "token_kv_shared"] {
        let model = gpu(case, TensorType::F32).unwrap();
        let forked = [&prompt[..], &[7, 8, 9]].concat();
        let expected = [&forked, &other].map(|prompt| in_a_session(&model, &params, prompt, 10));
        for failing in 1..4 {
            let (mut batch, parent) = with_parent(&model, &params, &prompt);
            let fork = batch.fork(parent, 24, &request(&[7, 8, 9], 10)).unwrap();
            fake.set(
                "MOR_FAKE_CUDA_FAIL",
                &format!("cuMemcpyDtoD_v2:{failing}=2"),
            );
            let error = batch.tick().unwrap_err();
            assert!(matches!(error, Error::Device(_)), "{error}");
            batch.remove(parent).unwrap();
            let id = batch.add(&request(&other, 10)).unwrap();
            run(&mut batch);
            let tokens = [fork, id].map(|id| batch.tokens(id).unwrap().to_vec());
            assert_eq!(tokens, expected, "{case}, copy {failing}");
        }
    }
    fake.reset();
}

/// Without graphs a pass may fail between its kernels: the session stays as it was, also where the row of its last token
/// had to be put aside for the pass.
#[test]
fn a_pass_that_fails_between_its_kernels_loses_nothing() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    fake.set("MOR_FAKE_CUDA_VERSION", "11040");
    let model = gpu("expert_middle_cycle", TensorType::F32).unwrap();
    let mut session = Session::new(&model, &params()).unwrap();
    session.prefill(&[1, 2, 3]).unwrap();
    let expected = session.logits().unwrap().to_vec();
    let state = saved(&mut session);
    let launches = fake.calls("cuLaunchKernel");
    let after = scores(&mut session, &[9, 8, 7]);
    let launches = fake.calls("cuLaunchKernel") - launches;
    assert!(launches > 50, "{launches} kernels");
    for failing in (1..launches).step_by(7) {
        let mut session = Session::new(&model, &params()).unwrap();
        session.prefill(&[1, 2, 3]).unwrap();
        for _ in 0..2 {
            fake.set("MOR_FAKE_CUDA_FAIL", &format!("cuLaunchKernel:{failing}=2"));
            session.prefill(&[9, 8, 7]).unwrap_err();
            assert!(saved(&mut session) == state, "kernel {failing}");
            assert!(session.logits().unwrap() == expected, "kernel {failing}");
        }
        assert!(
            scores(&mut session, &[9, 8, 7]) == after,
            "kernel {failing}"
        );
    }
    fake.reset();
}

/// What a tick that failed had brought comes with the next one.
#[test]
fn a_tick_that_fails_loses_no_event() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let prompts: [Vec<u32>; 3] = [(1..20).collect(), (30..49).collect(), (5..24).collect()];
    // The launch fails, or what comes after it: the logits of one of the sequences.
    for (fault, top_k) in [("cuGraphLaunch:1=719", 40), ("cuMemcpyDtoH_v2:2=719", 0)] {
        for round in 0..10 {
            let (phase, pressure) = (round / 2, [Pressure::Evict, Pressure::Refuse][round % 2]);
            fake.reset();
            let model = gpu("expert_middle_cycle", TensorType::F32).unwrap();
            let of_three = SessionParams {
                sequences: 3,
                // Two of them fit.
                kv_pages: 2 * model.schedule().planes.len() * 2,
                ..params()
            };
            let mut batch = Batch::new(&model, &of_three).unwrap();
            batch.set_pressure(pressure);
            let ids = prompts.each_ref().map(|prompt| {
                let sampler = SamplerParams {
                    top_k,
                    ..Default::default()
                };
                let request = Request {
                    sampler,
                    ..request(prompt, 6)
                };
                batch.add(&request).unwrap()
            });
            let (mut drawn, mut failures, mut done) = (prompts.clone(), 0, 0);
            let mut told: HashMap<SequenceId, Status> = HashMap::new();
            for tick in 0..200 {
                // A tick may go by without such a call: the fault waits for its time.
                if tick % 9 == phase {
                    fake.set("MOR_FAKE_CUDA_FAIL", fault);
                }
                let Ok(events) = batch.tick() else {
                    failures += 1;
                    continue;
                };
                for event in events {
                    let (id, status) = match *event {
                        Event::Token {
                            sequence, token, ..
                        } => {
                            let at = ids.iter().position(|id| *id == sequence).unwrap();
                            drawn[at].push(token);
                            continue;
                        }
                        Event::Evicted(id) => (id, Status::Waiting),
                        Event::Resumed(id) => (id, Status::Running),
                        Event::Full(id) => (id, Status::Full),
                        Event::Finished(id, finish) => {
                            done += 1;
                            (id, Status::Finished(finish))
                        }
                        other => panic!("{other:?}"),
                    };
                    told.insert(id, status);
                }
                for (id, drawn) in ids.iter().zip(&drawn) {
                    assert_eq!(batch.tokens(*id).unwrap(), drawn);
                    let status = batch.status(*id).unwrap();
                    // That it begins is no event.
                    let new = status == Status::Waiting || status == Status::Running;
                    match told.get(id) {
                        Some(known) => assert_eq!(*known, status),
                        None => assert!(new),
                    }
                    if status == Status::Full {
                        batch.resume(*id).unwrap();
                        told.insert(*id, Status::Running);
                    }
                }
                if batch.is_idle() {
                    break;
                }
            }
            assert!(failures > 0 && done > 0, "{failures}, {done}");
        }
    }
    fake.reset();
}

/// A copy that fails leaves neither pages nor entries where a sequence was to be.
#[test]
fn a_failed_fork_or_restore_leaves_nothing() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    let model = gpu("expert_middle_cycle", TensorType::F32).unwrap();
    let prompt: Vec<u32> = (1..25).collect();
    let (mut batch, parent) = with_parent(&model, &params(), &prompt);
    fake.set("MOR_FAKE_CUDA_FAIL", "cuMemcpyHtoD_v2:1=719");
    let failed = batch.fork(parent, 24, &request(&[7], 3));
    assert!(matches!(failed, Err(Error::Device(_))));
    let id = batch.add(&request(&[1, 2, 3], 3)).unwrap();
    run(&mut batch);
    let mut session = Session::new(&model, &params()).unwrap();
    session.set_sampler(SamplerParams::greedy()).unwrap();
    let expected = continued(&mut session, &[1, 2, 3], 3);
    assert_eq!(batch.tokens(id).unwrap(), expected);
    // Nobody has pages any more.
    batch.remove(id).unwrap();
    batch.remove(parent).unwrap();
    assert_eq!(batch.kv_bytes_used(), 0);

    session.rewind(0).unwrap();
    let whole = continued(&mut session, &prompt, 3);
    let state = saved(&mut session);
    fake.set("MOR_FAKE_CUDA_FAIL", "cuMemcpyHtoD_v2:3=719");
    let failed = session.restore(&state);
    assert!(matches!(failed, Err(Error::Device(_))));
    assert!(session.tokens().is_empty());
    assert_eq!(session.kv_bytes_used(), 0);
    assert_eq!(continued(&mut session, &prompt, 3), whole);
    session.restore(&state).unwrap();
    assert_eq!(session.tokens(), whole);
    fake.reset();
}

/// Whatever call of the driver fails, the result is an error, nothing leaks, and the next attempt works.
#[test]
fn every_call_of_the_driver_may_fail() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    fake.reset();
    let expected = everything("expert_middle_cycle").unwrap();
    assert_eq!(fake.live(), 0, "something was left behind");
    let mut failures = 0;
    for (name, code) in [
        ("cuInit", 100),
        ("cuDriverGetVersion", 1),
        ("cuDeviceGetCount", 100),
        ("cuDeviceGet", 101),
        ("cuDeviceGetAttribute", 1),
        ("cuDevicePrimaryCtxRetain", 2),
        ("cuCtxPushCurrent_v2", 201),
        ("cuMemGetInfo_v2", 1),
        ("cuMemAlloc_v2", 2),
        ("cuMemHostAlloc", 2),
        ("cuMemsetD8_v2", 700),
        ("cuMemcpyHtoD_v2", 700),
        ("cuMemcpyDtoH_v2", 700),
        ("cuModuleLoadData", 209),
        ("cuModuleGetFunction", 500),
        ("cuFuncSetAttribute", 1),
        ("cuStreamCreate", 2),
        ("cuGraphCreate", 2),
        ("cuGraphConditionalHandleCreate", 2),
        ("cuGraphAddKernelNode_v2", 2),
        ("cuGraphAddMemcpyNode", 2),
        ("cuGraphAddNode_v2", 2),
        ("cuGraphInstantiateWithFlags", 2),
        ("cuGraphUpload", 2),
        ("cuGraphLaunch", 719),
        ("cuStreamSynchronize", 719),
    ] {
        fake.reset();
        everything("expert_middle_cycle").unwrap();
        let calls = fake.calls(name);
        assert!(calls > 0, "{name} is never called");
        // Some calls are many and alike: the first ones, one in the middle, the last.
        let mut which = vec![1, 2, 3, calls / 2, calls - 1, calls];
        which.retain(|call| (1..=calls).contains(call));
        which.dedup();
        for call in which {
            fake.reset();
            fake.set("MOR_FAKE_CUDA_FAIL", &format!("{name}:{call}={code}"));
            match everything("expert_middle_cycle") {
                Err(Error::Device(_) | Error::OutOfMemory { .. }) => failures += 1,
                Err(other) => panic!("{name}, call {call}: {other}"),
                // The module of conditions may be missing, and what fails while things are freed, after
                // all work is done, is the driver's own trouble.
                Ok(tokens) => {
                    assert!(
                        matches!(
                            name,
                            "cuModuleLoadData" | "cuCtxPushCurrent_v2" | "cuStreamSynchronize"
                        ),
                        "{name}, call {call} failed and nobody noticed"
                    );
                    assert_eq!(tokens, expected);
                }
            }
            if name != "cuCtxPushCurrent_v2" {
                assert_eq!(
                    fake.live(),
                    0,
                    "{name}, call {call} leaves something behind"
                );
            }
        }
    }
    println!("{failures} failures told");
    assert!(failures > 80);
    // A device that is lost stays lost for what was made on it; the CPU works on.
    for call in [1, 3, 6] {
        fake.reset();
        fake.set("MOR_FAKE_CUDA_LOST", &format!("cuGraphLaunch:{call}"));
        let error = everything("expert_middle_cycle").unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error}");
        let cpu = Model::from_bytes(gguf_bytes("expert_middle_cycle", TensorType::F32)).unwrap();
        let mut session = Session::new(&cpu, &params()).unwrap();
        session.prefill(&[1, 2, 3]).unwrap();
        session.logits().unwrap();
    }
    fake.reset();
    assert_eq!(everything("expert_middle_cycle").unwrap(), expected);
}

/// A file that the device could read itself is copied if its tensors lie where the widest loads may not begin.
#[test]
fn tensors_that_lie_oddly_are_copied() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let file = tiny(3);
    let gguf = Gguf::parse(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("a.gguf");
    // A file whose first tensor begins at `rest` of sixteen bytes.
    let lying = |rest: usize| {
        for pad in 0..16 {
            let mut metadata = gguf.metadata.clone();
            metadata.insert("general.alignment", 8u32);
            metadata.insert("general.name", "x".repeat(pad));
            common::write_copy(&to, &metadata, &gguf, &file);
            let bytes = std::fs::read(&to).unwrap();
            if Gguf::parse(&bytes).unwrap().tensors()[0].offset % 16 == rest {
                return bytes;
            }
        }
        panic!("no file begins its tensors there");
    };
    let scores_of = |bytes: Vec<u8>, in_place: bool| {
        fake.reset();
        fake.set("MOR_FAKE_CUDA_INTEGRATED", "1");
        let model = Model::from_bytes_on(bytes, Device::Cuda(0)).unwrap();
        assert_eq!(model.is_in_place_on_gpu(), in_place);
        let mut session = Session::new(&model, &params()).unwrap();
        scores(&mut session, &[1, 2, 3])
    };
    assert!(scores_of(lying(0), true) == scores_of(lying(8), false));
    // Whoever is the last to use a mapped file, the device lets go of it before it is unmapped; the fake
    // driver looks.
    lying(0);
    fake.reset();
    fake.set("MOR_FAKE_CUDA_INTEGRATED", "1");
    let params = LoadParams {
        device: Device::Cuda(0),
        ..Default::default()
    };
    for of_batch in [false, true] {
        let model = Model::open_with(&to, &params).unwrap();
        assert!(model.is_in_place_on_gpu());
        let session = Session::new(&model, &SessionParams::default()).unwrap();
        let batch = Batch::new(&model, &SessionParams::default()).unwrap();
        drop(model);
        match of_batch {
            true => drop((session, batch)),
            false => drop((batch, session)),
        }
    }
    assert_eq!(fake.calls("cuMemHostUnregister"), 2);
    fake.reset();
}

/// Halves that lie row by row, as the device finds them in the file, give the same bits as in the tiles of a copy: in every
/// kind of product, with a last group that has no partner and a last tile that is not full.
#[test]
fn halves_in_place_and_in_tiles_give_the_same_bits() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let original = of_sizes(HIDDEN, 2336, 1001);
    for ty in [TensorType::F16, TensorType::BF16] {
        let bytes = converted(&original, ty);
        let name = ty.name().to_lowercase();
        let mut kernels: Vec<String> = [
            "lone_product_norm",
            "lone_product_plain",
            "lone_product_attention",
            "lone_swiglu",
            "few_product",
            "few_swiglu",
            "many_product",
            "many_swiglu",
            "wide_product_128x128",
            "warpgroup_product_128x64",
            "warpgroup_product_128x128",
        ]
        .map(|kind| format!("{kind}_{name}"))
        .into();
        kernels.extend(["mor_exact", "mor_lone_exact"].map(String::from));
        for (arch, multiprocessors) in [("72", 8), ("80", 1), ("90", 1), ("90", 4), ("90", 8)] {
            for (count, batch) in [(3, 1), (7, 7), (40, 20), (130, 130)] {
                let run = |integrated| {
                    fake.reset();
                    fake.set("MOR_FAKE_CUDA_ARCH", arch);
                    fake.set("MOR_FAKE_CUDA_ATTRIBUTE", &format!("16={multiprocessors}"));
                    fake.set("MOR_FAKE_CUDA_INTEGRATED", integrated);
                    let model = Model::from_bytes_on(bytes.clone(), Device::Cuda(0)).unwrap();
                    assert_eq!(model.is_in_place_on_gpu(), integrated == "1");
                    let tokens: Vec<u32> = (0..count).map(|i| i * i * 31 % 1001).collect();
                    logits_after(&model, &tokens, 140, batch)
                };
                let same = run("0") == run("1");
                assert!(same, "{name} on {arch}: {count} rows, {batch} at a time");
                kernels.retain(|kernel| fake.kernels(kernel) == 0);
            }
        }
        assert!(kernels.is_empty(), "these did not run: {kernels:?}");
    }
    fake.reset();
}

/// Rows that are longer than what is sent at a time arrive whole.
#[test]
fn long_rows_agree_with_the_cpu() {
    let Some(_alone) = device() else { return };
    let original = of_sizes(HIDDEN, 70_016, 100);
    for ty in [TensorType::F16, TensorType::Q8_0] {
        let name = format!("long rows {}", ty.name());
        compare(&name, converted(&original, ty), KvType::F16);
    }
    // The last tile has eight rows, as many bytes as half of sixteen.
    let half = of_sizes(136, 65_536, 100);
    let half = converted(&half, TensorType::F16);
    compare("long rows, half a tile", half, KvType::F16);
}

/// A file that is refused is refused before anything of it is on the device.
#[test]
fn what_is_refused_is_not_sent() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let file = tiny(3);
    let gguf = Gguf::parse(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("a.gguf");
    let mut metadata = gguf.metadata.clone();
    let architecture = metadata.str("general.architecture").unwrap().unwrap();
    let key = format!("{architecture}.attention.causal");
    metadata.insert(key.as_str(), false);
    common::write_copy(&to, &metadata, &gguf, &file);
    fake.reset();
    let calls = fake.calls("cuInit");
    let refused = Model::from_bytes_on(std::fs::read(&to).unwrap(), Device::Cuda(0));
    let error = refused.err().unwrap().to_string();
    assert!(error.contains("attention.causal"), "{error}");
    assert_eq!(fake.calls("cuInit"), calls);
}

/// What the kernels' numbers, or a launch, cannot hold is refused by the plan.
#[test]
fn sizes_that_cannot_be_counted_are_refused() {
    let Some(_alone) = device() else { return };
    let model = gpu("expert_middle_cycle", TensorType::F32).unwrap();
    let plan = |context, sequences| {
        let params = SessionParams {
            context,
            sequences,
            batch: 16,
            kv_pages: 1000,
            ..Default::default()
        };
        Plan::batch(&model, &params).map(drop)
    };
    assert!(plan(1 << 20, 100).is_ok());
    for (context, sequences) in [(1 << 20, 100_000), (1 << 25, 1)] {
        let error = plan(context, sequences).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }
}

/// A driver that refuses the module of conditions costs the conditions only: all recursions run.
#[test]
fn without_conditions_all_recursions_run() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 60).collect();
    for case in ["expert_middle_cycle", "token_kv_shared"] {
        let results = ["", "cuModuleLoadData:2=209"].map(|failure| {
            fake.reset();
            fake.set("MOR_FAKE_CUDA_FAIL", failure);
            let model = gpu(case, TensorType::F32).unwrap();
            let mut session = Session::new(&model, &params()).unwrap();
            let logits = scores(&mut session, &tokens);
            let conditions = fake.kernels("mor_condition");
            (session.depths().to_vec(), logits, conditions)
        });
        let [(depths, logits, conditions), without] = results;
        assert!(conditions > 0 && without.2 == 0, "{case}");
        assert!(depths.iter().any(|&depth| depth > 1), "{case}: {depths:?}");
        assert_eq!((depths, logits), (without.0, without.1), "{case}");
    }
    fake.reset();
}

/// Older drivers and devices take other ways to the same tokens.
#[test]
fn other_drivers_and_devices_give_the_same() {
    let Some((fake, _alone)) = Fake::find() else {
        return;
    };
    for case in [
        "expert_middle_cycle",
        "expert_own_attention",
        "token_kv_shared",
    ] {
        fake.reset();
        let expected = everything(case).unwrap();
        for (name, value) in [
            ("MOR_FAKE_CUDA_VERSION", "12000"),
            ("MOR_FAKE_CUDA_VERSION", "11040"),
            ("MOR_FAKE_CUDA_ARCH", "72"),
            ("MOR_FAKE_CUDA_ARCH", "87"),
            ("MOR_FAKE_CUDA_INTEGRATED", "1"),
        ] {
            fake.reset();
            fake.set(name, value);
            assert_eq!(
                everything(case).unwrap(),
                expected,
                "{case}, {name}={value}"
            );
        }
    }
    fake.reset();
    fake.set("MOR_FAKE_CUDA_ARCH", "61");
    let error = gpu("vanilla", TensorType::F32).err().unwrap().to_string();
    assert!(error.contains("compute capability 6.1"), "{error}");
    fake.reset();
    fake.set("MOR_FAKE_CUDA_MEMORY", "100000");
    let error = everything("vanilla").unwrap_err().to_string();
    assert!(error.contains("bytes free"), "{error}");
    fake.reset();
    let model = Model::from_bytes_on(gguf_bytes("vanilla", TensorType::F32), Device::Cuda(9));
    let error = model.err().unwrap().to_string();
    assert!(error.contains("no CUDA device 9"), "{error}");
    fake.reset();
}
