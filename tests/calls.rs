//! The tables of tests/calls through the Rust library; tests/calls/README.md says what they are,
//! and that other languages run them too. With `MOR_CALLS_RECORD=1` their results are written anew.
#![cfg(feature = "chat")]

mod common;

#[path = "calls/objects.rs"]
mod objects;

use objects::{Objects, Outcome};
use std::path::{Path, PathBuf};

/// A line's fields, their escapes undone; `-` alone is an empty text.
fn fields(line: &str) -> Vec<String> {
    line.split('\t').map(unescape).collect()
}

fn unescape(field: &str) -> String {
    if field == "-" {
        return String::new();
    }
    let mut text = String::new();
    let mut letters = field.chars();
    while let Some(letter) = letters.next() {
        text.push(match letter {
            '\\' => match letters.next() {
                Some('n') => '\n',
                Some('t') => '\t',
                Some('r') => '\r',
                Some('s') => ' ',
                Some('\\') => '\\',
                other => panic!("'\\{other:?}' is no escape: {field}"),
            },
            plain => plain,
        });
    }
    text
}

fn escape(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let text = text.replace('\\', "\\\\").replace('\n', "\\n");
    let text = text.replace('\t', "\\t").replace('\r', "\\r");
    match text.strip_suffix(' ') {
        Some(start) => format!("{start}\\s"), // a space at a line's end is easily lost
        None => text,
    }
}

/// Whether a line's last two fields say what came out.
fn as_said(outcome: &Outcome, status: &str, result: &str) -> bool {
    match outcome {
        Ok(value) => status == "OK" && value == result,
        Err((name, sentence)) => status == *name && sentence.contains(result),
    }
}

/// Runs a table; returns it with the results that came out, and the lines where they differ.
fn run(table: &Path, model: &Path, threads: usize) -> (String, Vec<String>) {
    let text = std::fs::read_to_string(table).unwrap();
    let mut objects = Objects::new(model.to_owned(), threads);
    let (mut written, mut wrong) = (String::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            written += &format!("{line}\n");
            continue;
        }
        let fields = fields(line);
        let [call @ .., status, result] = &fields[..] else {
            panic!("line {} has fewer than three fields: {line}", number + 1);
        };
        let call: Vec<&str> = call.iter().map(String::as_str).collect();
        // A device that is none cannot be written in Rust, and a build with GPUs answers otherwise.
        if let ["load_on", _, device] = call[..]
            && (device.parse::<u8>().is_ok() || cfg!(feature = "cuda"))
        {
            written += &format!("{line}\n");
            continue;
        }
        let outcome = objects.call(call[0], &call[1..]);
        if as_said(&outcome, status, result) {
            written += &format!("{line}\n");
            continue;
        }
        let (status, result) = match outcome {
            Ok(value) => ("OK", value),
            Err(failure) => failure,
        };
        let place = format!("{}:{}", table.display(), number + 1);
        wrong.push(format!("{place}: {line}\n  came out: {status} {result:?}"));
        let call: Vec<String> = call.iter().map(|field| escape(field)).collect();
        written += &format!("{}\t{status}\t{}\n", call.join("\t"), escape(&result));
    }
    (written, wrong)
}

fn check(name: &str, model: &Path) {
    let table = common::root().join("tests/calls").join(name);
    for threads in [1, 2] {
        let (written, wrong) = run(&table, model, threads);
        if std::env::var_os("MOR_CALLS_RECORD").is_some() && threads == 1 {
            std::fs::write(&table, written).unwrap();
            println!("{} results of {name} written anew", wrong.len());
        } else {
            let calls = written.lines().filter(|line| line.contains('\t'));
            assert!(calls.count() > 50, "{name} is no table");
            let count = wrong.len();
            assert!(count == 0, "{threads} threads:\n{}", wrong.join("\n"));
        }
    }
}

#[test]
fn the_default_model_answers_as_the_table_says() {
    check("austen.tsv", &common::default_model());
}

#[test]
fn smollm2_answers_as_the_table_says() {
    match std::env::var_os("MOR_TEST_SMOLLM2").map(PathBuf::from) {
        Some(model) => check("smollm2.tsv", &model),
        None => common::skip("calls, smollm2", "MOR_TEST_SMOLLM2 does not name the model"),
    }
}
