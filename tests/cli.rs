//! What the program writes with the model that it carries.

use std::process::{Command, Output};

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
    assert!(json["unshared_weight_bytes"].as_u64() > json["weight_bytes"].as_u64());
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

#[test]
fn chat_answers_each_line() {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_mor"))
        .args(["chat", "-n", "8", "--seed", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.as_mut().unwrap();
    stdin
        .write_all(b"My dear Emma,\nWhat do you say?\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(
        text(&output.stdout)
            .lines()
            .filter(|l| !l.trim().is_empty())
            .count()
            >= 2
    );
    // One summary for each answer.
    assert_eq!(text(&output.stderr).matches("mean depth").count(), 2);
}

#[test]
fn the_default_model_s_routers_have_not_collapsed() {
    // Held-out text (see models/README.md), scored in both modes.
    let prose = include_str!("data/prose.txt");
    let model = mor::Model::open(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/models/austen-mor-5m-q8_0.gguf"
    ))
    .unwrap();
    let tokenizer = mor::Tokenizer::from_metadata(&model.gguf().metadata).unwrap();
    let tokens = tokenizer.encode(prose, Default::default()).unwrap();
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
