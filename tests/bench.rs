//! `mor synth` and `mor bench`, with the smallest shape.
#![cfg(feature = "cli")]

use mor::convert::RandomTokens;
use mor::{Model, Session, SessionParams};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn mor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.args(args).output().unwrap()
}

/// What a command that succeeds writes.
fn text(args: &[&str]) -> String {
    let output = mor(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The sentence of a command that fails.
fn refusal(args: &[&str], code: i32) -> String {
    let output = mor(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

/// A model that `mor synth` makes.
fn synth(folder: &TempDir, args: &[&str]) -> String {
    let path = folder.path().join(format!("{}.gguf", args.join("")));
    let path = path.to_str().unwrap();
    text(&[&["synth", "-o", path, "--shape"], args].concat());
    path.to_string()
}

#[test]
fn the_same_seed_makes_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let make = |more: &[&str]| {
        let args = ["tiny-mor2", "--type", "q4_0", "--mean-depth", "1.2"];
        std::fs::read(synth(&folder, &[&args[..], more].concat())).unwrap()
    };
    let first = make(&["--seed", "3"]);
    assert!(first == make(&["--seed", "3"]));
    assert!(first != make(&["--seed", "4"]));
}

#[test]
fn every_kind_of_shape_and_type_runs() {
    let folder = tempfile::tempdir().unwrap();
    for (shape, ty, stored, logical) in [
        ("tiny", "q4_0", 8, 8),
        ("tiny", "q8_0", 8, 8),
        ("tiny-mor2", "q4_1", 5, 8),
        ("tiny-mor3", "f16", 4, 8),
        ("tiny-mor4", "bf16", 4, 10),
        ("tiny-recursive3", "f32", 4, 8),
    ] {
        let model = synth(&folder, &[shape, "--type", ty]);
        let json = text(&["inspect", "--json", &model]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["stored_layers"], stored, "{shape}");
        assert_eq!(json["logical_layers"], logical, "{shape}");
        let architecture = if shape == "tiny" { "llama" } else { "mor" };
        assert_eq!(json["metadata"]["general.architecture"], architecture);
        let written = text(&["run", &model, "-p", "It is é", "-n", "4"]);
        assert!(written.starts_with("It is é"), "{written}");
    }
    let model = synth(&folder, &["tiny", "--layers", "10"]);
    assert_eq!(
        Model::open(model).unwrap().hyperparameters().stored_blocks,
        10
    );
}

/// A session with random tokens that the model was not calibrated with, and their mean depth.
fn run_random(model: &Model, texts: usize) -> (Session, f64) {
    const LENGTH: usize = 256;
    let params = SessionParams {
        context: LENGTH,
        ..Default::default()
    };
    let mut session = Session::new(model, &params).unwrap();
    let mut random = RandomTokens::new(model.hyperparameters().vocab_size, 99);
    let mut sum = 0.0;
    for _ in 0..texts {
        session.rewind(0).unwrap();
        let tokens: Vec<u32> = random.by_ref().take(LENGTH).collect();
        session.prefill(&tokens).unwrap();
        sum += session.depths().iter().map(|d| f64::from(*d)).sum::<f64>();
    }
    (session, sum / (texts * LENGTH) as f64)
}

#[test]
fn other_tokens_run_as_deep_as_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    for depth in ["0", "0.7", "1.5", "2.2", "3"] {
        let args = ["tiny-mor3", "--type", "q4_0", "--mean-depth", depth];
        let model = Model::open(synth(&folder, &args)).unwrap();
        let (session, mean) = run_random(&model, 8);
        let asked: f64 = depth.parse().unwrap();
        assert!((mean - asked).abs() < 0.12, "{mean} instead of {asked}");
        if depth == "1.5" {
            // And they differ.
            let counts = session.depth_histogram();
            assert!(counts[..4].iter().all(|n| *n > 10), "{counts:?}");
        }
    }
}

#[test]
fn what_a_token_reads_is_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let open = |shape| Model::open(synth(&folder, &[shape, "--type", "q4_0"])).unwrap();
    // Every matrix once, and no norm.
    let vanilla = open("tiny");
    let tensors = vanilla.gguf().tensors().iter();
    let matrices = tensors
        .filter(|t| t.dims.len() == 2)
        .map(|t| t.bytes as u64);
    assert_eq!(vanilla.weight_bytes_read(1), matrices.sum::<u64>());
    // A recursion costs the block.
    let shared = open("tiny-mor3");
    let read = |depth| shared.weight_bytes_read(depth);
    assert_eq!(read(3) - read(2), read(1) - read(0));
    let saved = shared.unshared_weight_bytes() - shared.weight_bytes();
    assert_eq!(read(3) - read(1), saved);
    // A token of full depth reads every key that is kept.
    let (mut session, _) = run_random(&shared, 1);
    let tokens = session.depths().iter().rposition(|depth| *depth == 3);
    session.rewind(tokens.unwrap() + 1).unwrap();
    let read = shared.kv_entries_read(session.depths());
    assert_eq!(read, session.kv_entries() as u64);
}

#[test]
fn bench_measures_what_it_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["tiny-mor3", "--type", "q4_0", "--mean-depth", "1.5"];
    let model = synth(&folder, &args);
    let bench = |more: &[&str]| text(&[&["bench", &model], more].concat());
    let json = |more: &[&str]| -> Value {
        serde_json::from_str(&bench(&[&["--json"], more].concat())).unwrap()
    };
    let lists = [
        "-p", "8,16", "-n", "4", "-d", "0,32", "-t", "1,2", "-r", "3",
    ];
    let measured = json(&lists);
    let tests = measured["tests"].as_array().unwrap();
    let names: Vec<_> = tests.iter().map(|t| t["test"].as_str().unwrap()).collect();
    let once = ["pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"];
    assert_eq!(names, [once, once].concat());
    assert_eq!(measured["threads"], 1);
    assert_eq!(measured["sequences"], 1);
    let speed = |test: &Value| test["tokens_per_second"].clone();
    assert_eq!(measured["prompt_tokens_per_second"], speed(&tests[0]));
    assert_eq!(measured["generation_tokens_per_second"], speed(&tests[2]));
    assert_eq!(measured["mean_depth"], tests[2]["mean_depth"]);
    assert!(measured["memory_bandwidth_bytes_per_second"].as_f64() > Some(0.0));
    let plan = ["plan", &model, "-c", "48", "-t", "1", "--json"];
    let plan: Value = serde_json::from_str(&text(&plan)).unwrap();
    for key in ["weight_bytes", "session_bytes", "device_bytes"] {
        assert_eq!(measured[key], plan[key]);
    }
    for test in tests {
        assert_eq!(test["samples"].as_array().unwrap().len(), 3);
        assert!(test["median"].as_f64() > Some(0.0));
        let generates = test["kind"] == "generation";
        assert_eq!(test["weight_bytes_per_token"].is_f64(), generates);
    }
    assert!(tests[5]["kv_bytes_per_token"].as_f64() > tests[2]["kv_bytes_per_token"].as_f64());
    // Only what was asked for, as deep as it may be.
    let measured = json(&[
        "-p",
        "0",
        "-n",
        "4",
        "-r",
        "1",
        "--cut",
        "0",
        "--max-depth",
        "2",
    ]);
    assert!(measured["prompt_tokens_per_second"].is_null());
    assert_eq!(measured["mean_depth"], 2.0);
    // For people: a line for the model, a heading, a line for each test, one for memory.
    let shown = bench(&["-p", "8", "-n", "4", "-t", "1", "-r", "2"]);
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!(lines.len(), 5, "{shown}");
    assert!(lines[0].starts_with("tiny-mor3: expert-choice MoR, Q4_0, "));
    assert!(lines[3].starts_with("tg4 "), "{shown}");
}

#[test]
fn many_sequences_are_measured_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = synth(&folder, &["tiny-mor3", "--mean-depth", "2"]);
    let command = [
        "bench", &model, "-b", "1,6", "-t", "1", "-n", "12", "-p", "3",
    ];
    for more in [&[][..], &["--in-step"], &["--arrivals", "200"]] {
        let json = text(&[&command[..], more, &["--json"]].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let tests = json["tests"].as_array().unwrap();
        assert_eq!(tests.len(), 2);
        assert_eq!(
            json["generation_tokens_per_second"],
            tests[0]["tokens_per_second"]
        );
        for key in ["mean_depth", "threads", "sequences"] {
            assert_eq!(json[key], tests[0][key]);
        }
        assert_eq!(json["session_bytes"], tests[0]["plan_bytes"]);
        for (test, sequences) in tests.iter().zip([1, 6]) {
            let number = |name: &str| test[name].as_f64().unwrap();
            assert_eq!(test["sequences"], sequences);
            assert!(number("tokens_per_second") > 0.0 && number("first_token_seconds") > 0.0);
            assert!(number("share_of_places") <= 1.0);
            let rows: Vec<f64> = serde_json::from_value(test["rows_per_tick"].clone()).unwrap();
            // Recursions come one after another, so each has at most as many rows as the one before.
            assert!(
                rows.len() == 3 && rows.is_sorted_by(|a, b| a >= b),
                "{rows:?}"
            );
            let places = number("rows") * number("share_of_places");
            assert!((rows.iter().sum::<f64>() - places).abs() < 1e-6);
        }
    }
    let shown = text(&command);
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 4, "{shown}");
    assert!(lines[0].contains("prompts of 3 tokens, answers of 12 ± 3 tokens"));
}

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let model = synth(&folder, &["tiny"]);
    let out = folder.path().join("no.gguf");
    let out = out.to_str().unwrap();
    let vanilla = ["synth", "--shape", "tiny", "-o", out];
    let shared = ["synth", "--shape", "tiny-mor3", "-o", out];
    let bench = ["bench", &model];
    for (command, more, code, sentence) in [
        (&vanilla[..], ["--mean-depth", "1"], 1, "has no routers"),
        (&shared[..], ["--mean-depth", "3.5"], 1, "can have 0 to 3"),
        (&shared[..], ["--mean-depth", "NaN"], 1, "can have 0 to 3"),
        (&shared[..], ["--layers", "2"], 1, "cannot have 2 layers"),
        (&shared[..], ["--type", "q4_k"], 2, "possible are f32, f16"),
        (&vanilla[..3], ["-o", "/no/such/folder/x"], 1, "no folder"),
        (&bench[..], ["-b", "0"], 1, "sequences: 0"),
        (&bench[..], ["--arrivals", "2"], 2, "--sequences"),
        (&bench[..], ["-r", "0"], 1, "0 repetitions"),
        (&bench[..], ["-t", "0"], 2, "whole number from 1"),
        (&bench[..], ["-p", "1,x"], 2, "whole number of tokens"),
    ] {
        let told = refusal(&[command, &more].concat(), code);
        assert!(told.contains(sentence), "{told}");
        assert!(code == 2 || told.lines().count() == 1, "{told}");
    }
    let nothing = refusal(&["bench", &model, "-p", "0,0", "-n", "0"], 1);
    assert!(nothing.contains("nothing to measure"), "{nothing}");
    let unknown = refusal(&["synth", "--shape", "huge", "-o", out], 2);
    assert!(unknown.contains("smollm-135m-mor3"), "{unknown}");
    assert!(!Path::new(out).exists());
}
