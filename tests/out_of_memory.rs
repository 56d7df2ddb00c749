//! Loading a model when memory runs out, at each place where any is asked for: an error, nothing
//! leaked, and the next attempt works.

mod common;

use common::allocator::{Allocator, Refuse, here, refusing};
use common::default_model;
use mor::gguf::Gguf;
use mor::model::LoadParams;
use mor::{Batch, EncodeOptions, Error, Model, SessionParams, Tokenizer};
use std::fs::File;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// One refusal, and memory that is gone for good.
const KINDS: [fn(usize) -> Refuse; 2] = [Refuse::Nth, Refuse::From];

/// A file as a part of the program would be.
fn kept(bytes: Vec<u8>) -> &'static [u8] {
    Box::leak(bytes.into_boxed_slice())
}

/// Refuses the first allocation of `work`, then the second, and so on until all are granted.
/// Returns their number and how the work ends with all of them.
#[track_caller]
fn exhaust<T>(what: &str, work: impl Fn() -> Result<T, Error>) -> (usize, Result<(), String>) {
    let end = |result: Result<T, Error>| result.map(drop).map_err(|error| error.to_string());
    // What the standard library makes once and keeps is made now.
    let granted = end(work());
    let mut points = 0;
    for kind in KINDS {
        for n in 1.. {
            let what = format!("{what}, {:?}", kind(n));
            let before = here().live;
            let (result, refused) = refusing(kind(n), &work);
            if refused == 0 {
                assert_eq!(end(result), granted, "{what}");
                points = n - 1;
                break;
            }
            let error = result.map(drop).expect_err(&what);
            assert!(
                matches!(error, Error::OutOfMemory { .. }),
                "{what}: {error}"
            );
            assert_eq!(here().live, before, "{what}");
            let again = work();
            assert_eq!(end(again), granted, "after {what}");
        }
    }
    println!("{what}: {points} allocations");
    (points, granted)
}

/// As [`exhaust`], for work that succeeds.
#[track_caller]
fn exhaust_sound<T>(what: &str, work: impl Fn() -> Result<T, Error>) -> usize {
    let (points, end) = exhaust(what, work);
    assert_eq!(end, Ok(()), "{what}");
    assert!(points > 0, "{what}: nothing was refused");
    points
}

#[test]
fn the_default_model() {
    let path = default_model();
    let bytes = kept(std::fs::read(&path).unwrap());
    let copy = LoadParams {
        copy: true,
        ..Default::default()
    };
    let file = File::open(&path).unwrap();
    let counts = [
        exhaust_sound("a map", || Model::open(&path)),
        exhaust_sound("a copy", || Model::open_with(&path, &copy)),
        exhaust_sound("a descriptor", || {
            Model::from_file(file.try_clone().unwrap(), 0, None, &copy)
        }),
        exhaust_sound("the program's bytes", || Model::from_static(bytes)),
    ];
    // A vocabulary is some blocks, not one for each token.
    assert!(counts.iter().all(|&count| count < 400), "{counts:?}");
}

/// A batch takes its list of sequences from the heap; its block of memory, and its threads, are refused in
/// `tests/c/out_of_memory.c`.
#[test]
fn a_batch() {
    let model = Model::open(default_model()).unwrap();
    for threads in [1, 2] {
        let params = SessionParams {
            context: 64,
            sequences: 5,
            threads,
            ..Default::default()
        };
        let points = exhaust_sound("a batch", || Batch::new(&model, &params));
        assert!(points >= 5, "{points}: places, settings, events and slots");
    }
}

/// Weights, sessions and batches on a GPU, as far as this library asks for memory; a driver may do as it likes.
#[test]
#[cfg(all(feature = "cuda", feature = "convert"))]
fn on_a_gpu() {
    use mor::{Device, Session};
    let bytes = common::cases::gguf_bytes("expert_middle_cycle", mor::quant::TensorType::Q8_0);
    let bytes = kept(bytes);
    let load = || Model::from_static_on(bytes, Device::Cuda(0));
    let model = match load() {
        Ok(model) => model,
        Err(error) => {
            assert!(!common::on_gpu(), "{error}");
            return common::skip_test(&error.to_string());
        }
    };
    let params = SessionParams {
        context: 32,
        batch: 8,
        sequences: 1,
        ..Default::default()
    };
    exhaust_sound("a session", || Session::new(&model, &params));
    exhaust_sound("a batch", || Batch::new(&model, &params));
    exhaust_sound("weights", load);
}

/// The standard library copies long paths to the heap, and ends the process where it cannot.
#[test]
#[cfg(unix)]
fn a_long_path() {
    let folder = tempfile::tempdir().unwrap();
    let long = ["long", "path"].map(|part| part.repeat(50));
    let long = folder.path().join(long.join("/"));
    std::fs::create_dir_all(&long).unwrap();
    let path = long.join("model.gguf");
    std::fs::copy(default_model(), &path).unwrap();
    exhaust_sound("a long path", || Model::open(&path));
    let missing = long.join("missing.gguf");
    let (points, end) = exhaust("a long path to nothing", || Model::open(&missing));
    assert_eq!(points, 1);
    assert!(end.unwrap_err().contains("No such file or directory"));
}

/// Telling an error takes no memory.
#[test]
#[cfg(unix)]
fn errors_are_printed() {
    use std::io::Write;
    let missing = Model::open("missing.gguf").map(drop).unwrap_err();
    let mut sentence = [0; 100];
    let (written, _) = refusing(Refuse::From(1), || write!(&mut sentence[..], "{missing}"));
    written.unwrap();
    let sentence = String::from_utf8_lossy(&sentence);
    assert!(sentence.starts_with("cannot use 'missing.gguf': No such file or directory"));
}

#[test]
#[cfg(feature = "convert")]
fn every_kind_of_model() {
    let mut points = 0;
    for case in common::cases::cases() {
        let bytes = kept(common::cases::gguf_bytes(
            &case,
            mor::quant::TensorType::Q8_0,
        ));
        points += exhaust_sound(&case, || Model::from_static(bytes));
    }
    println!("{points} allocations in all");
}

/// The vocabularies of the tokenizer's tests.
#[test]
fn every_kind_of_tokenizer() {
    let names = [
        "smollm",
        "gpt-2",
        "default",
        "llama-bpe",
        "qwen2",
        "spm",
        "spm-unknown",
    ];
    for name in names {
        let bytes = common::data(&format!("tokenizer/{name}.gguf"));
        let load = || Tokenizer::from_metadata(&Gguf::parse(&bytes)?.metadata);
        exhaust_sound(name, load);
        let tokenizer = load().unwrap();
        let text = "The 123 foxes, 漢字 👩🏽‍🚀 <tool>";
        let ids = tokenizer.encode(text, EncodeOptions::PLAIN).unwrap();
        exhaust_sound("encode", || tokenizer.encode(text, EncodeOptions::PLAIN));
        // Cut within characters, so that the text must be mended.
        let odd: Vec<u32> = ids.into_iter().rev().collect();
        exhaust_sound("decode", || tokenizer.decode(&odd, true));
    }
}

/// `bytes` with the first `from` replaced by `to`, which is as long.
#[track_caller]
fn spoilt(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let places = bytes.windows(from.len());
    let at = places.into_iter().position(|w| w == from.as_bytes());
    let at = at.unwrap_or_else(|| panic!("the model has no {from}"));
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    bytes
}

/// As a string of a file, its length before it.
fn string(text: &str) -> String {
    let length = (text.len() as u64).to_le_bytes().map(char::from);
    length.into_iter().collect::<String>() + text
}

#[test]
fn damaged_files() {
    let sound = std::fs::read(default_model()).unwrap();
    let replaced = |from: &str, to: &str| spoilt(&sound, from, to);
    let files = [
        ("empty", Vec::new()),
        ("a magic number", sound[..4].to_vec()),
        ("wrong magic", replaced("GGUF", "GGML")),
        ("truncated in the pairs", sound[..200].to_vec()),
        ("truncated in the tokens", sound[..20_000].to_vec()),
        (
            "truncated in the weights",
            sound[..sound.len() - 100].to_vec(),
        ),
        (
            "a key of another name",
            replaced("block_count", "block_coumt"),
        ),
        (
            "another architecture",
            replaced(&string("mor"), &string("mar")),
        ),
        (
            "a key twice",
            replaced("mor.router.alpha", "mor.rope.pairing"),
        ),
        ("unknown sharing", replaced("cycle", "cyclo")),
        ("unknown routing", replaced("expert", "expirt")),
        (
            "no output norm",
            replaced("output_norm.weight", "output_norm.weighT"),
        ),
        ("no queries", replaced("attn_q.weight", "attn_Q.weight")),
        ("no router", replaced("router.0.weight", "router.0.weighT")),
        (
            "a tensor twice",
            replaced("blk.1.attn_q.weight", "blk.0.attn_q.weight"),
        ),
        ("an unknown tokenizer", replaced("gpt2", "gpt8")),
        ("no merges", replaced("ggml.merges", "ggml.merge5")),
        ("a token of another name", replaced("Ġthe", "Ġthq")),
    ];
    let mut points = 0;
    for (what, bytes) in files {
        let bytes = kept(bytes);
        let load = || Model::from_static(bytes)?.tokenizer().map(drop);
        let (count, end) = exhaust(what, load);
        println!("    {}", end.expect_err(what));
        points += count;
    }
    println!("{points} allocations in all");
}
