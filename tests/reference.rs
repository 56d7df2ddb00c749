//! Equal to the reference: logits, depths and greedy tokens of every case, in both routing modes, alone and in
//! a batch.
#![cfg(feature = "convert")]

mod common;

use common::cases::*;
use mor::quant::TensorType;
use mor::{Batch, KvType, Model, Request, Routing, SamplerParams, Session, SessionParams};

/// The reference's README: float32 agrees to 1e-4 at a standard deviation of the logits near 1.
const TOLERANCE: f32 = 1e-4;

fn standard_deviation(values: &[f32]) -> f32 {
    let n = values.len() as f32;
    let mean = values.iter().sum::<f32>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt()
}

fn as_integers<T: Copy + Into<i64>>(values: &[T]) -> Vec<i64> {
    values.iter().map(|value| (*value).into()).collect()
}

/// All cases, and for each how many rows a pass takes and how many threads work, neither of which changes anything.
fn all() -> impl Iterator<Item = (String, usize, usize)> {
    let cases = cases().into_iter().chain(shapes()).enumerate();
    cases.map(|(at, case)| (case, [128, 1, 5, 16, 33][at % 5], 1 + at % 2))
}

/// Room for a case's texts, with exact keys and values.
fn params(expected: &Expected, batch: usize, threads: usize) -> SessionParams {
    let longest = expected.inputs().iter().map(Vec::len).max().unwrap();
    SessionParams {
        context: longest.max(32) + 1,
        batch,
        threads,
        kv: KvType::F32,
        sequences: 3,
        ..Default::default()
    }
}

fn session(model: &Model, params: &SessionParams) -> Session {
    let alone = SessionParams {
        sequences: 1,
        ..*params
    };
    Session::new(model, &alone).unwrap()
}

#[test]
fn logits_and_depths_equal_the_reference_in_both_modes() {
    let mut compared = 0;
    for (case, batch, threads) in all() {
        let (model, expected) = (model(&case, TensorType::F32), Expected::of(&case));
        for (name, routing) in [
            ("capacity", Routing::Capacity),
            ("threshold", Routing::Threshold),
        ] {
            let Some(logits) = expected.floats(&format!("logits_{name}")) else {
                continue;
            };
            let depths = expected.integers(&format!("depth_{name}")).unwrap();
            for (b, tokens) in expected.inputs().iter().enumerate() {
                // The capacity mode looks at the whole text, so a pass takes it whole.
                let batch = match routing {
                    Routing::Capacity => tokens.len(),
                    Routing::Threshold => batch,
                };
                let mut session = session(&model, &params(&expected, batch, threads));
                session.set_routing(routing);
                let mut found = Vec::new();
                session
                    .score(tokens, |_, row| {
                        found.extend_from_slice(row);
                        Ok(())
                    })
                    .unwrap();
                assert_eq!(
                    as_integers(session.depths()),
                    depths[b],
                    "{case}, {name}, sequence {b}"
                );
                let scale = standard_deviation(&logits[b]);
                let worst = common::worst_difference(&found, &logits[b]) / scale;
                assert!(worst < TOLERANCE, "{case}, {name}, sequence {b}: {worst}");
                compared += 1;
            }
        }
    }
    println!("{compared} sequences compared");
    assert!(compared >= 122);
}

#[test]
fn greedy_tokens_equal_the_reference() {
    for (case, batch, threads) in all() {
        let (model, expected) = (model(&case, TensorType::F32), Expected::of(&case));
        let params = params(&expected, batch, threads);
        let greedy = &expected.integers("greedy").unwrap()[0];
        let (prompt, drawn) = (&expected.inputs()[0][..8], greedy.len() - 8);
        let mut session = session(&model, &params);
        session.set_sampler(SamplerParams::greedy()).unwrap();
        session.prefill(prompt).unwrap();
        for _ in 0..drawn {
            let token = session.sample().unwrap();
            session.prefill(&[token]).unwrap();
        }
        assert_eq!(&as_integers(session.tokens()), greedy, "{case}");

        // Beside others, whose depths are known.
        let mut batch = Batch::new(&model, &params).unwrap();
        let mut add = |prompt, max_tokens| {
            let request = Request {
                prompt,
                max_tokens,
                sampler: SamplerParams::greedy(),
                ignore_end: true,
                ..Default::default()
            };
            batch.add(&request).unwrap()
        };
        let generated = add(prompt, drawn);
        let inputs = expected.inputs();
        let others: Vec<_> = inputs.iter().map(|tokens| add(tokens, 1)).collect();
        while !batch.is_idle() {
            batch.tick().unwrap();
        }
        assert_eq!(
            &as_integers(batch.tokens(generated).unwrap()),
            greedy,
            "{case}, batch"
        );
        let depths = expected.integers("depth_threshold").unwrap();
        for (id, depths) in others.into_iter().zip(depths) {
            assert_eq!(
                as_integers(batch.depths(id).unwrap()),
                depths,
                "{case}, batch"
            );
        }
    }
}
