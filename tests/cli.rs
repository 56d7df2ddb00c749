//! What the program writes with the model that it carries.
#![cfg(feature = "cli")]

mod common;

use mor::gguf::{Array, Value};
use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/models/austen-mor-5m-q8_0.gguf"
);

fn mor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    let output = command.args(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_default_model_writes_the_golden_text() {
    let greedy = ["run", "-p", "It is a truth", "--temp", "0", "-n", "32"];
    let golden = include_str!("data/golden/it-is-a-truth.txt");
    for threads in ["1", "2", "3"] {
        let output = mor(&[&greedy[..], &["-t", threads]].concat());
        // In a pipe: the text, no colour, no progress bar.
        assert_eq!(text(&output.stdout), golden, "{threads} threads");
        let summary = text(&output.stderr);
        for word in [
            "prompt 5 tokens",
            "generation 32 tokens",
            "mean depth",
            "weights 4.8 MiB",
        ] {
            assert!(summary.contains(word), "'{word}' is not in: {summary}");
        }
        assert_eq!(summary.lines().count(), 1);
    }
}

#[test]
fn the_same_seed_writes_the_same_and_stop_strings_end_it() {
    let run = |more: &[&str]| {
        let args = ["run", "-p", "Emma was", "-n", "40", "--seed", "3"];
        text(&mor(&[&args[..], more].concat()).stdout)
    };
    let whole = run(&[]);
    assert_eq!(whole, run(&[]));
    let generated = whole.strip_prefix("Emma was").unwrap();
    let stop = generated.split_whitespace().nth(8).unwrap();
    let at = generated.find(stop).unwrap();
    assert_eq!(
        run(&["--stop", stop]),
        format!("Emma was{}\n", &generated[..at])
    );
}

/// What the program writes that is given `input`.
fn piped(args: &[&str], input: &[u8]) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{args:?}");
    text(&output.stdout)
}

/// A prompt from a file or a pipe, of which the last line's end is no part.
#[test]
fn a_prompt_may_stand_in_a_file() {
    let said = |more: &[&str]| {
        let args = [&["run", "-n", "8", "--temp", "0", "-t", "1"], more].concat();
        text(&mor(&args).stdout)
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.txt");
    let expected = said(&["-p", "My dear\nEmma,"]);
    for line_end in ["", "\n", "\r\n"] {
        std::fs::write(&path, format!("My dear\nEmma,{line_end}")).unwrap();
        assert_eq!(said(&["-f", path.to_str().unwrap()]), expected);
    }
    let args = ["run", "-n", "8", "--temp", "0", "-t", "1", "-f", "-"];
    assert_eq!(piped(&args, b"My dear\nEmma,\n"), expected);
    for (args, phrase) in [
        (&["run", "-f", "no/such/file"][..], "check the spelling"),
        (&["run", "-f", "x", "-p", "y"], "cannot be used with"),
        (&["run"], "--prompt"),
    ] {
        let mut program = Command::new(env!("CARGO_BIN_EXE_mor"));
        let output = program.args(args).output().unwrap();
        assert!(!output.status.success());
        let told = text(&output.stderr);
        assert!(told.contains(phrase), "{told}");
    }
}

#[test]
fn a_context_beyond_the_trained_one_is_told() {
    let told = |context| text(&mor(&["run", "-p", "It", "-n", "1", "-c", context]).stderr);
    assert!(told("257").contains("longer than the 256"));
    assert!(!told("256").contains("longer than"));
}

/// What goes to a pipe is text.
#[test]
fn help_has_no_colours_in_a_pipe() {
    for args in [&["--help"][..], &["help", "run"], &["run", "--help"]] {
        let help = text(&mor(args).stdout);
        assert!(
            help.contains("Usage: mor") && !help.contains('\x1b'),
            "{help}"
        );
    }
}

#[test]
fn depths_are_coloured_and_counted() {
    let args = [
        "run",
        "-p",
        "It is a truth",
        "--depths",
        "-n",
        "24",
        "--seed",
        "1",
    ];
    let output = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(args)
        .env("CLICOLOR_FORCE", "1")
        .output()
        .unwrap();
    assert!(text(&output.stdout).contains("\u{1b}[38;5;"));
    let plain = mor(&args);
    assert!(!text(&plain.stdout).contains('\u{1b}'));
    assert!(text(&plain.stderr).contains("tokens by depth  0: 0  1: "));
}

#[test]
fn inspect_shows_what_sharing_saves() {
    let json = mor(&["inspect", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["stored_layers"], 5);
    assert_eq!(json["logical_layers"], 11);
    // Blocks 1 to 3 run three times: their matrices would be there twice more.
    let matrices = json["tensors"].as_array().unwrap().iter().filter(|t| {
        let name = t["name"].as_str().unwrap();
        ["blk.1.", "blk.2.", "blk.3."]
            .iter()
            .any(|blk| name.starts_with(blk))
            && t["dims"].as_array().unwrap().len() == 2
    });
    let block: u64 = matrices.map(|t| t["bytes"].as_u64().unwrap()).sum();
    let saved =
        json["unshared_weight_bytes"].as_u64().unwrap() - json["weight_bytes"].as_u64().unwrap();
    assert_eq!(saved, 2 * block);
    let shown = text(&mor(&["inspect"]).stdout);
    for word in [
        "recursion 2  1 2 3",
        "5 stored",
        "11 logical",
        "expert-choice",
    ] {
        assert!(shown.contains(word), "'{word}' is not in: {shown}");
    }
}

#[test]
fn plan_is_what_run_takes() {
    let json = mor(&["plan", "-c", "64", "-t", "2", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let bytes = json["session_bytes"].as_u64().unwrap();
    let lines = json["lines"].as_object().unwrap().values();
    assert_eq!(lines.map(|v| v.as_u64().unwrap()).sum::<u64>(), bytes);
    let summary = text(&mor(&["run", "-p", "It", "-n", "1", "-c", "64", "-t", "2"]).stderr);
    let session = format!("session {:.1} MiB", bytes as f64 / (1 << 20) as f64);
    assert!(
        summary.contains(&session),
        "'{session}' is not in: {summary}"
    );
}

/// A running chat.
fn chat(more: &[&str]) -> Child {
    let args = [&["chat", "--seed", "1"], more].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.args(args).stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// What a chat answers to `lines`.
fn chat_with(more: &[&str], lines: &[u8]) -> (String, String) {
    chat_ends(more, lines, 0)
}

/// The same, and with which code it ends.
fn chat_ends(more: &[&str], lines: &[u8], code: i32) -> (String, String) {
    let mut child = chat(more);
    child.stdin.as_mut().unwrap().write_all(lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    (text(&output.stdout), errors)
}

/// How many answers a chat gave: each has a summary.
fn answers(errors: &str) -> usize {
    errors.matches("mean depth").count()
}

#[test]
fn chat_answers_each_line() {
    let lines = b"My dear Emma,\n\nWhat do you say?\n";
    let (said, errors) = chat_with(&["-n", "8"], lines);
    assert!(said.lines().filter(|l| !l.trim().is_empty()).count() >= 2);
    assert_eq!(answers(&errors), 2);
}

#[test]
fn chat_goes_on_after_what_it_cannot_answer() {
    let long = "My dear Emma, ".repeat(40);
    let lines = format!("{long}\nMy dear\n");
    let (_, errors) = chat_ends(&["-n", "4", "-c", "24"], lines.as_bytes(), 1);
    assert!(errors.contains("holds 24"), "{errors}");
    assert!(errors.contains("; -c makes the context larger"), "{errors}");
    assert_eq!(answers(&errors), 1);
    let last = "mor: no answer was given to 1 message";
    assert_eq!(errors.lines().last(), Some(last));
    // Only where there were others is it a help to forget them.
    let lines = format!("My dear\n{long}\n");
    let (_, errors) = chat_ends(&["-n", "4", "-c", "24"], lines.as_bytes(), 1);
    assert!(
        errors.contains("; /clear begins anew, -c makes"),
        "{errors}"
    );
    let (_, errors) = chat_ends(&["-n", "4"], b"\xff\n/exit\n", 1);
    assert_eq!(errors.lines().last(), Some(last));
    let lines = b"one \xff two\nMy dear Emma,\n";
    let (_, errors) = chat_ends(&["-n", "4"], lines, 1);
    assert!(errors.contains("no UTF-8 text and is skipped"), "{errors}");
    assert_eq!(answers(&errors), 1);
}

#[test]
fn chat_has_commands() {
    let lines = b"/help\n/frobnicate\n/usr/bin is full\n/exit\nMy dear Emma,\n";
    let (_, errors) = chat_with(&["-n", "4"], lines);
    for word in ["/clear", "/exit", "/help", "no command /frobnicate"] {
        assert!(errors.contains(word), "'{word}' is not in: {errors}");
    }
    assert_eq!(answers(&errors), 1);
    // A full context is left by beginning anew.
    let lines = "My dear Emma,\n".repeat(4) + "/clear\nMy dear Emma,\n";
    let (_, errors) = chat_ends(&["-n", "8", "-c", "20"], lines.as_bytes(), 1);
    let full = errors.find("holds 20").expect(&errors);
    assert!(answers(&errors[full..]) == 1, "{errors}");
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    // SAFETY: the child has not been waited for, so its number is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
}

/// Waits until it has a handler of Ctrl-C, before which an interrupt would just end it.
#[cfg(target_os = "linux")]
fn wait_for_handler(child: &mut Child) {
    let status = format!("/proc/{}/status", child.id());
    let caught = || {
        let text = std::fs::read_to_string(&status).unwrap();
        let mask = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        u64::from_str_radix(mask.unwrap().trim(), 16).unwrap()
    };
    while caught() & 1 << (libc::SIGINT - 1) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// What comes out of a pipe, as it comes.
#[cfg(unix)]
fn follow(mut pipe: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut bytes) {
            if sender.send(bytes[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_answer_and_then_the_program() {
    use std::time::Duration;
    let long = Duration::from_secs(60);
    // No answer ends by itself.
    let mut child = chat(&["-n", "1000000", "-c", "20000", "--temp", "0", "-t", "1"]);
    let mut stdin = child.stdin.take().unwrap();
    let stdout = follow(child.stdout.take().unwrap());
    let stderr = follow(child.stderr.take().unwrap());
    let mut errors = Vec::new();
    for answer in 1..=2 {
        stdin.write_all(b"My dear Emma,\n").unwrap();
        let mut said = 0;
        while said < 40 {
            said += stdout.recv_timeout(long).unwrap().len();
        }
        interrupt(&child);
        while answers(&text(&errors)) < answer {
            errors.extend(stderr.recv_timeout(long).unwrap());
        }
        // All that was said before the summary, so that it is not taken for the next answer, and
        // the moment after the summary, in which an interrupt is still one of an answer.
        while stdout.recv_timeout(Duration::from_millis(300)).is_ok() {}
    }
    let ended = text(&errors).matches("the answer was ended").count();
    assert_eq!(ended, 2, "{}", text(&errors));
    // Where no answer is being given, the program ends.
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// The transcript at the top of the README is what the program writes.
#[test]
fn the_readme_shows_what_is_written() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("```text\n$ mor ").unwrap();
    let (command, shown) = rest.split_once('\n').unwrap();
    let (shown, _) = shown.split_once("```").unwrap();
    // Words in quotes are one argument.
    let parts = command.split('"').enumerate();
    let args: Vec<&str> = parts
        .flat_map(|(i, part)| match i % 2 {
            0 => part.split_whitespace().collect(),
            _ => vec![part],
        })
        .collect();
    let output = mor(&args);
    let errors = text(&output.stderr);
    let (depths, _) = errors.split_once('\n').unwrap();
    assert_eq!(format!("{}{depths}\n", text(&output.stdout)), shown);
}

#[test]
fn texts_may_begin_with_a_hyphen() {
    for prompt in ["-5 degrees", "- item", "--depths"] {
        let output = mor(&["run", "-p", prompt, "-n", "1", "--stop", "- x"]);
        assert!(text(&output.stdout).starts_with(prompt));
        assert!(text(&output.stderr).contains("generation 1 token,"));
    }
    chat_with(&["-n", "1", "--system", "- be kind"], b"My dear Emma,\n");
}

#[test]
fn a_prompt_is_shown_as_it_was_typed() {
    for prompt in ["It was<|endoftext|>It was", " It", "é 漢 😀"] {
        let output = mor(&["run", "-p", prompt, "-n", "0"]);
        assert_eq!(text(&output.stdout), format!("{prompt}\n"));
    }
}

#[test]
fn a_batch_is_planned_in_both_directions() {
    let plan = |more: &[&str]| -> serde_json::Value {
        let command = [&["plan", "-c", "128", "-t", "1", "--json"], more].concat();
        serde_json::from_slice(&mor(&command).stdout).unwrap()
    };
    let eight = plan(&["-b", "8", "--mean-depth", "2"]);
    let bytes = eight["session_bytes"].as_u64().unwrap().to_string();
    let fits = plan(&["--memory", &bytes, "--mean-depth", "2"]);
    assert_eq!(fits["sequences"], 8);
    // Pages for deeper tokens leave room for fewer sequences.
    let deep = plan(&["--memory", &bytes]);
    assert!(deep["sequences"].as_u64() < Some(8), "{deep}");
    let shown = text(&mor(&["plan", "-c", "128", "--memory", "4M", "--mean-depth", "1.5"]).stdout);
    assert!(shown.contains("runs 1.5 recursions on average"), "{shown}");
}

/// What cannot have an effect is told, or refused where the user may think that a model is made so.
#[test]
fn options_for_routers_need_routers() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    mor(&["synth", "--shape", "tiny", "-o", &at("a.gguf")]);
    let told = text(&mor(&["run", &at("a.gguf"), "-p", "a", "-n", "1", "--cut", "0.7"]).stderr);
    assert!(
        told.starts_with("mor: the model has no routers, so --cut changes nothing\n"),
        "{told}"
    );
    let told = text(&mor(&["run", "-p", "a", "-n", "1", "--cut", "0.7"]).stderr);
    assert!(!told.contains("--cut"), "{told}");
    let several = [
        "bench",
        &at("a.gguf"),
        "-t",
        "1,2",
        "-p",
        "1",
        "-n",
        "0",
        "-r",
        "1",
        "--cut",
        "0.7",
    ];
    let told = text(&mor(&several).stderr);
    assert_eq!(told.matches("--cut changes nothing").count(), 1, "{told}");
    let vanilla = common::cases::case_folder("vanilla");
    let convert = [
        "convert",
        vanilla.to_str().unwrap(),
        "-o",
        "b.gguf",
        "--alpha",
        "1",
    ];
    let refused = refusal(folder.path(), &convert);
    assert!(
        refused.contains("has no routers, to which the alpha"),
        "{refused}"
    );
}

#[test]
fn short_arrays_are_shown_in_full() {
    let capacities = "[1.0,0.6666666666666666,0.3333333333333333]";
    let shown = text(&mor(&["inspect"]).stdout);
    let line = format!("mor.router.capacities = {capacities}");
    assert!(shown.contains(&line), "{shown}");
    assert!(shown.contains("tokenizer.ggml.tokens = 4,096 values"));
    let json = mor(&["inspect", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let metadata = &json["metadata"];
    assert_eq!(metadata["mor.router.capacities"].to_string(), capacities);
    assert_eq!(metadata["tokenizer.ggml.tokens"]["length"], 4096);
    let plan = text(&mor(&["plan", "-c", "64", "-t", "1"]).stdout);
    assert!(plan.starts_with("1 sequence of 64 tokens, 1 thread, "));
}

#[test]
fn lines_of_tokens_keep_their_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("tokens"), folder.path().join("out"));
    std::fs::write(&tokens, "\n1 2 3\n \t\n4 5\n").unwrap();
    let (tokens, out) = (tokens.to_str().unwrap(), out.to_str().unwrap());
    mor(&["eval", MODEL, "--tokens", tokens, "-o", out]);
    let bytes = std::fs::read(out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    assert_eq!(names, ["depth_1", "depth_3", "logits_1", "logits_3"]);
    assert_eq!(file.tensor("logits_1").unwrap().shape(), [3, 4096]);
    let written = mor(&["generate-tokens", MODEL, "--tokens", tokens, "-n", "2"]);
    let lengths = text(&written.stdout);
    let lengths = lengths.lines().map(|line| line.split(' ').count());
    assert_eq!(lengths.collect::<Vec<_>>(), [5, 4]);
}

/// From text to tokens, through what reads tokens, and back.
#[test]
fn tokens_and_text_become_each_other() {
    let typed = "It is a\ntruth, caf\u{e9} \u{65e5} <|endoftext|>";
    let ids = text(&mor(&["tokenize", "-p", typed]).stdout);
    let decoded = |ids: &str, more: &[&str]| {
        let args = [&["detokenize", "--tokens", "-"], more].concat();
        piped(&args, ids.as_bytes())
    };
    assert_eq!(
        decoded(&ids, &["--special"]),
        format!("<|endoftext|>{typed}\n")
    );
    assert_eq!(
        decoded(&ids, &[]),
        format!("{}\n", &typed[..typed.len() - 13])
    );
    let plain = text(&mor(&["tokenize", "--plain", "-p", typed]).stdout);
    assert_eq!(decoded(&plain, &[]), format!("{typed}\n"));
    assert_eq!(decoded("0 1116 365\n\n259", &[]), "It is\n a\n");

    let pieces = text(&mor(&["tokenize", MODEL, "--pieces", "-p", typed]).stdout);
    let first = pieces.lines().map(|line| line.split_once(' ').unwrap().0);
    assert_eq!(first.collect::<Vec<_>>().join(" "), ids.trim_end());
    assert!(pieces.starts_with("0 \"<|endoftext|>\"\n1116 \"It\"\n"));
    assert!(
        pieces.contains(" \"\\n\"\n") && pieces.contains(" \"\\x97\"\n"),
        "{pieces}"
    );

    let written = ["generate-tokens", MODEL, "--tokens", "-", "-n", "3"];
    let written = piped(&written, b"0 1116\n");
    let run = mor(&[
        "run", MODEL, "-n", "3", "--temp", "0", "--kv", "f32", "-p", "It",
    ]);
    assert_eq!(decoded(&written, &[]), text(&run.stdout));
}

#[test]
fn perplexity_tells_how_far_a_model_is_from_its_base() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (base, coarse) = (file("f32.gguf"), file("q4_0.gguf"));
    let prose = &*file("prose.txt");
    std::fs::write(prose, &include_bytes!("data/prose.txt")[..6000]).unwrap();
    mor(&["convert", MODEL, "-o", &base, "--type", "f32"]);
    mor(&["convert", MODEL, "-o", &coarse, "--type", "q4_0"]);
    let measure = |model: &str, more: &[&str]| {
        let args = ["perplexity", model, prose, "-c", "256", "--json"];
        let json = mor(&[&args[..], more].concat()).stdout;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        println!("{more:?}: {json}");
        json
    };
    let number = |json: &serde_json::Value, key: &str| json[key].as_f64().unwrap();

    // A model is no way off itself, to the bit.
    let itself = measure(&base, &["--kv", "f32", "--against", &base]);
    for key in ["kl_mean", "kl_standard_error", "kl_p99", "kl_max"] {
        assert_eq!(number(&itself, key), 0.0, "{key}");
    }
    assert_eq!(number(&itself, "same_top"), 1.0);

    // The rest is as without a base.
    let alone = measure(&base, &["--kv", "f32"]);
    assert_eq!(alone["perplexity"], itself["perplexity"]);
    assert_eq!(alone["tokens"], itself["tokens"]);
    assert!(alone.get("kl_mean").is_none());

    // Coarser keys cost something, coarser weights more. The base keeps its cut when the model's is
    // moved.
    let kv = measure(&base, &["--kv", "q8_0", "--against", &base]);
    let weights = measure(&coarse, &["--against", &base]);
    let cut = measure(&base, &["--cut", "1", "--against", &base]);
    let mut last = 0.0;
    for json in [&kv, &weights, &cut] {
        let mean = number(json, "kl_mean");
        assert!(mean > last, "{mean} after {last}");
        assert!(number(json, "kl_standard_error") < mean);
        assert!(number(json, "kl_p99") > mean);
        assert!(number(json, "kl_max") > number(json, "kl_p99"));
        last = mean;
    }
    assert!(number(&kv, "kl_mean") < 1e-2);
    assert!(number(&kv, "same_top") > 0.9);
    assert!(number(&weights, "kl_mean") < 0.2);

    let args = ["perplexity", &coarse, prose, "-c", "64", "--against", &base];
    let shown = text(&mor(&args).stdout);
    for word in [
        "perplexity ",
        "divergence from the base 0.",
        "same most likely token ",
    ] {
        assert!(shown.contains(word), "'{word}' is not in: {shown}");
    }
}

#[test]
fn the_default_model_s_routers_have_not_collapsed() {
    // Held-out text (see models/README.md), scored in both modes.
    let prose = include_str!("data/prose.txt");
    let model = mor::Model::open(MODEL).unwrap();
    let tokenizer = mor::Tokenizer::from_metadata(&model.gguf().metadata).unwrap();
    let tokens = tokenizer.encode(prose, mor::EncodeOptions::PLAIN).unwrap();
    let params = mor::SessionParams {
        context: 256,
        batch: 256,
        ..Default::default()
    };
    let mut session = mor::Session::new(&model, &params).unwrap();
    let mut losses = Vec::new();
    for routing in [mor::Routing::Threshold, mor::Routing::Capacity] {
        session.set_routing(routing);
        let (mut sum, mut counts) = (0.0, [0; 4]);
        let windows = tokens.chunks_exact(256);
        let total = windows.len() * 255;
        for window in windows {
            session.rewind(0).unwrap();
            session
                .score(window, |i, logits| {
                    if let Some(next) = window.get(i + 1) {
                        let z: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
                        sum += z.ln() - f64::from(logits[*next as usize]);
                    }
                    Ok(())
                })
                .unwrap();
            session
                .depths()
                .iter()
                .for_each(|d| counts[usize::from(*d)] += 1);
        }
        println!(
            "{routing:?}: loss {:.4}, depths {counts:?}",
            sum / total as f64
        );
        let all: usize = counts.iter().sum();
        if routing == mor::Routing::Threshold {
            assert!(counts[1..].iter().all(|c| c * 10 >= all), "{counts:?}");
        }
        losses.push(sum / total as f64);
    }
    assert!((losses[0] / losses[1] - 1.0).abs() < 0.03, "{losses:?}");
}

/// The default model with other metadata.
fn with_metadata(path: &std::path::Path, change: impl Fn(&mut mor::gguf::Metadata)) {
    let bytes = std::fs::read(MODEL).unwrap();
    let gguf = mor::gguf::Gguf::parse(&bytes).unwrap();
    let mut metadata = gguf.metadata.clone();
    change(&mut metadata);
    common::write_copy(path, &metadata, &gguf, &bytes);
}

/// The number of tokens that a Llama file gives may be that of before some were added; its list of them counts.
#[test]
fn a_stale_number_of_tokens_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    mor(&[
        "synth",
        "--shape",
        "tiny",
        "--type",
        "q8_0",
        "-o",
        &at("a.gguf"),
    ]);
    mor(&[
        "convert",
        &at("a.gguf"),
        "--layout",
        "rows",
        "-o",
        &at("rows.gguf"),
    ]);
    let bytes = std::fs::read(at("rows.gguf")).unwrap();
    let gguf = mor::gguf::Gguf::parse(&bytes).unwrap();
    let mut metadata = gguf.metadata.clone();
    assert_eq!(metadata.u32("llama.vocab_size").unwrap(), Some(1024));
    metadata.insert("llama.vocab_size", mor::gguf::Value::U32(1000));
    common::write_copy(
        folder.path().join("stale.gguf").as_path(),
        &metadata,
        &gguf,
        &bytes,
    );
    mor(&["convert", &at("stale.gguf"), "-o", &at("tiles.gguf")]);
    let bytes = std::fs::read(at("tiles.gguf")).unwrap();
    let metadata = mor::gguf::Gguf::parse(&bytes).unwrap().metadata;
    assert_eq!(metadata.u32("mor.vocab_size").unwrap(), Some(1024));
}

#[test]
fn what_a_pipe_gets_is_what_was_meant() {
    for prompt in ["a\u{7}b\u{7f}c", "a\u{1b}]b", "\u{1b}[31mred"] {
        let output = mor(&["run", "-p", prompt, "-n", "0"]);
        assert_eq!(text(&output.stdout), format!("{prompt}\n"));
    }
    // But names out of a file are shown on a line of their own.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    let name = "x\u{1b}[2J\nweights  0 MiB";
    with_metadata(&path, |metadata| {
        metadata.insert("general.name", name);
        metadata.insert("general.\u{1b}c\nkey", name);
    });
    let path = path.to_str().unwrap();
    let shown = text(&mor(&["inspect", path]).stdout);
    assert!(
        !shown.contains('\u{1b}') && !shown.contains("\nweights  0 MiB"),
        "{shown}"
    );
    let json: serde_json::Value =
        serde_json::from_slice(&mor(&["inspect", path, "--json"]).stdout).unwrap();
    assert_eq!(json["name"], name);
}

#[test]
fn a_tokenizer_that_is_larger_than_its_model_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    with_metadata(&path, |metadata| {
        use mor::gguf::{Array, Value};
        let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        let mut tokens: Vec<String> = tokens.iter().map(str::to_owned).collect();
        metadata.insert("mor.vocab_size", tokens.len() as u32);
        tokens.push("ZZTOP".into());
        let mut kinds = vec![1; tokens.len()];
        kinds[tokens.len() - 1] = 4;
        metadata.insert(
            "tokenizer.ggml.tokens",
            Value::Array(Array::String(tokens.into_iter().collect())),
        );
        metadata.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    });
    let words = folder.path().join("text.txt");
    std::fs::write(&words, "q q q q ZZTOP".repeat(200)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args([
            "perplexity",
            path.to_str().unwrap(),
            words.to_str().unwrap(),
            "-c",
            "5",
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("token 4096"),
        "{}",
        text(&output.stderr)
    );
}

/// Where there is no template a conversation begins as every other text.
#[test]
fn chat_begins_as_run() {
    let begins = |errors: &str| {
        errors
            .lines()
            .last()
            .unwrap()
            .split(',')
            .next()
            .unwrap()
            .to_owned()
    };
    let (_, chatted) = chat_with(&["-n", "1"], b"hello\n");
    let ran = text(&mor(&["run", "-p", "hello\n\n", "-n", "1"]).stderr);
    assert_eq!(begins(&chatted), begins(&ran));
}

/// The one line with which the program refuses something.
fn refusal(folder: &std::path::Path, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    let output = command.args(args).current_dir(folder).output().unwrap();
    let errors = text(&output.stderr);
    assert!(!output.status.success(), "{args:?} succeeded");
    assert!(output.stdout.is_empty(), "{args:?}");
    errors
}

#[test]
fn what_is_read_is_not_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    mor(&[
        "synth",
        "--shape",
        "tiny",
        "-o",
        at("a.gguf").to_str().unwrap(),
    ]);
    std::fs::write(at("tokens"), "1 2 3").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("tokens", at("link")).unwrap();
    let checkpoint = at("checkpoint");
    std::fs::create_dir(&checkpoint).unwrap();
    for file in ["config.json", "mor.yaml", "model.safetensors"] {
        let from = common::cases::case_folder("vanilla").join(file);
        std::fs::copy(from, checkpoint.join(file)).unwrap();
    }
    let bytes_of = |name: &str| std::fs::read(at(name)).unwrap();
    let names = ["a.gguf", "tokens", "checkpoint/config.json"];
    let before = names.map(bytes_of);
    for output in ["a.gguf", "tokens", "link"] {
        let args = ["eval", "a.gguf", "--tokens", "tokens", "-o", output];
        let refused = refusal(folder.path(), &args);
        let expected = format!(
            "mor: cannot write '{output}': it would take the place of the input; name another file\n"
        );
        if cfg!(unix) || output != "link" {
            assert_eq!(refused, expected);
        }
    }
    // As in caches of downloads, where a checkpoint's files are links.
    #[cfg(unix)]
    {
        std::fs::rename(checkpoint.join("mor.yaml"), at("1234")).unwrap();
        std::os::unix::fs::symlink("../1234", checkpoint.join("mor.yaml")).unwrap();
    }
    for entry in std::fs::read_dir(&checkpoint).unwrap() {
        let output = entry.unwrap().path();
        let args = ["convert", "checkpoint", "-o", output.to_str().unwrap()];
        assert!(refusal(folder.path(), &args).contains("the place of the input"));
    }
    assert!(before == names.map(bytes_of));
    // A GGUF file may take its own place, and one beside a checkpoint that of another.
    mor(&[
        "convert",
        at("a.gguf").to_str().unwrap(),
        "-o",
        at("a.gguf").to_str().unwrap(),
    ]);
    for _ in 0..2 {
        let output = checkpoint.join("model.gguf");
        mor(&[
            "convert",
            checkpoint.to_str().unwrap(),
            "-o",
            output.to_str().unwrap(),
        ]);
    }
}

#[test]
fn refusals_say_what_was_wrong_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    mor(&["synth", "--shape", "tiny", "-o", &at("a.gguf")]);
    std::fs::write(at("tokens"), "1 2\n\n3 99999\n").unwrap();
    let where_it_is =
        "mor: 'tokens', line 3: the model has no token 99999; its vocabulary ends at 1023\n";
    let eval = ["eval", "a.gguf", "--tokens", "tokens", "-o", "out"];
    assert_eq!(refusal(folder.path(), &eval), where_it_is);
    let generate = ["generate-tokens", "a.gguf", "--tokens", "tokens", "-n", "3"];
    assert_eq!(refusal(folder.path(), &generate), where_it_is);
    let empty = refusal(folder.path(), &["run", "a.gguf", "-p", ""]);
    assert!(empty.starts_with("mor: the prompt is empty") && empty.lines().count() == 1);
    for option in [
        "--seed",
        "--top-k",
        "--repeat-last-n",
        "--max-depth",
        "-c",
        "-t",
    ] {
        let refused = refusal(folder.path(), &["run", "-p", "a", option, "-1"]);
        assert!(refused.contains("invalid value '-1'"), "{refused}");
    }
    let depth = ["plan", "a.gguf", "-b", "4", "-c", "64", "--mean-depth", "0"];
    let refused = refusal(folder.path(), &depth);
    assert!(refused.contains("between 1 and 1"), "{refused}");
    // What can be seen before is said before anything is printed or measured.
    let long = "x".repeat(1025);
    let stop = ["run", "a.gguf", "-p", "a", "-n", "3", "--stop", &long];
    assert!(refusal(folder.path(), &stop).contains("has 1025 bytes"));
    let threads = [
        "bench", "a.gguf", "-p", "2", "-n", "2", "-r", "1", "-t", "1,300",
    ];
    assert!(refusal(folder.path(), &threads).contains("300 was asked for"));
    let sequences = ["bench", "a.gguf", "-b", "1,9999999", "-n", "4"];
    assert!(refusal(folder.path(), &sequences).contains("9999999 was asked for"));
    // Options that would do nothing, and a name that is a stream elsewhere.
    let repeats = ["bench", "a.gguf", "-b", "2", "-n", "4", "-r", "3"];
    assert!(refusal(folder.path(), &repeats).contains("-r goes with one sequence"));
    let training = [
        "convert",
        "a.gguf",
        "-o",
        "b.gguf",
        "--training-config",
        "tokens",
    ];
    assert!(refusal(folder.path(), &training).contains("goes with a checkpoint"));
    std::fs::write(at("sound"), "1 2\n").unwrap();
    for args in [
        &["convert", "a.gguf", "-o", "-"][..],
        &["synth", "--shape", "tiny", "-o", "-"],
        &["eval", "a.gguf", "--tokens", "sound", "-o", "-"],
    ] {
        let refused = refusal(folder.path(), args);
        assert!(
            refused.contains("cannot write to standard output"),
            "{refused}"
        );
    }
}

#[test]
#[cfg(unix)]
fn what_only_its_owner_reads_stays_so() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
    // Some editors begin a text with a byte order mark.
    std::fs::write(at("tokens"), "\u{feff}1 2 3").unwrap();
    std::fs::copy(MODEL, at("a.gguf")).unwrap();
    std::fs::write(at("out"), "").unwrap();
    for name in ["a.gguf", "out"] {
        std::fs::set_permissions(at(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    mor(&["convert", &at("a.gguf"), "-o", &at("a.gguf")]);
    mor(&["eval", MODEL, "--tokens", &at("tokens"), "-o", &at("out")]);
    assert_eq!((mode("a.gguf"), mode("out")), (0o600, 0o600));
    assert!(std::fs::metadata(at("out")).unwrap().len() > 0);
}

/// A template that writes nothing, and one that is nothing.
#[test]
fn a_template_may_be_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    for (template, code) in [("{% if false %}x{% endif %}", 1), ("", 0)] {
        with_metadata(&path, |metadata| {
            metadata.insert("tokenizer.chat_template", template);
        });
        let path = path.to_str().unwrap();
        let (_, errors) = chat_ends(&[path, "-n", "4"], b"My dear\n", code);
        assert_eq!(
            errors.contains("template writes nothing"),
            code == 1,
            "{errors}"
        );
        assert_eq!(answers(&errors), 1 - code as usize);
    }
}

/// Rows of a model that its tokenizer has no text for.
#[test]
fn tokens_without_a_text_are_shown_as_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (path, tokens) = (folder.path().join("a.gguf"), folder.path().join("tokens"));
    with_metadata(&path, |metadata| {
        for key in ["tokens", "token_type"].map(|key| format!("tokenizer.ggml.{key}")) {
            let some = match metadata.get(&key) {
                Some(Value::Array(Array::String(all))) => {
                    Array::String(all.iter().take(600).collect())
                }
                Some(Value::Array(Array::I32(all))) => Array::I32(all[..600].to_vec()),
                _ => continue,
            };
            metadata.insert(key, Value::Array(some));
        }
        metadata.insert(
            "tokenizer.ggml.merges",
            Value::Array(Array::String(std::iter::empty::<&str>().collect())),
        );
    });
    std::fs::write(&tokens, "300 725 301\n300 301\n").unwrap();
    let args = [
        "detokenize",
        path.to_str().unwrap(),
        "--tokens",
        tokens.to_str().unwrap(),
    ];
    let shown = text(&mor(&args).stdout);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(
        lines.len() == 2 && lines[0] == lines[1] && !lines[0].is_empty(),
        "{shown}"
    );
}

/// Programs that know Llama files go on knowing one in which nothing was arranged.
#[test]
fn a_file_without_block_formats_stays_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    mor(&["synth", "--shape", "tiny", "-o", &at("a.gguf")]);
    for (ty, architecture) in [("f16", "llama"), ("q8_0", "mor")] {
        mor(&["convert", &at("a.gguf"), "--type", ty, "-o", &at("b.gguf")]);
        let json = text(&mor(&["inspect", &at("b.gguf"), "--json"]).stdout);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["metadata"]["general.architecture"], architecture);
    }
}

/// A prompt is no text yet.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupt_ends_the_reading_of_a_prompt() {
    let prompt = "a ".repeat(19_000);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.args(["run", "-p", &prompt, "-c", "20000", "-t", "1"]);
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    wait_for_handler(&mut child);
    // By then it reads, which takes a minute.
    std::thread::sleep(std::time::Duration::from_secs(1));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(output.stdout.is_empty());
    assert_eq!(
        text(&output.stderr).lines().last(),
        Some("mor: the call was cancelled")
    );
}

/// Nothing is left of a file in the making.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_no_half_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.args(["synth", "--shape", "smollm-1.7b", "-o", "a.gguf"]);
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.current_dir(&folder).spawn().unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap();
    let bytes = |file: std::io::Result<std::fs::DirEntry>| file.unwrap().metadata().unwrap().len();
    // Of three gigabytes.
    while !files().any(|file| bytes(file) > 1 << 20) {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(text(&output.stderr), "mor: the call was cancelled\n");
    assert_eq!(files().count(), 0);
}

/// What was written so far, and the summary.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_a_text() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mor"));
    command.args([
        "run", "-p", "Emma was", "-n", "1000000", "-c", "20000", "-t", "1",
    ]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let written = follow(child.stdout.take().unwrap());
    let mut all = Vec::new();
    while all.len() < 60 {
        all.extend(written.recv().unwrap());
    }
    interrupt(&child);
    let status = child.wait().unwrap();
    all.extend(written.iter().flatten());
    assert_eq!(status.code(), Some(130));
    assert!(all.ends_with(b"\n"));
    let mut summary = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut summary)
        .unwrap();
    assert!(summary.contains("mean depth"), "{summary}");
}
