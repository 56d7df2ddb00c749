//! Equal to the reference: logits, depths and greedy tokens of every case, in both routing modes.
#![cfg(feature = "convert")]

mod common;

use common::cases::*;
use mor::quant::TensorType;
use mor::{Routing, SamplerParams};

/// The reference's README: float32 agrees to 1e-4 at a standard deviation of the logits near 1.
const TOLERANCE: f32 = 1e-4;

fn standard_deviation(values: &[f32]) -> f32 {
    let n = values.len() as f32;
    let mean = values.iter().sum::<f32>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt()
}

#[test]
fn logits_and_depths_equal_the_reference_in_both_modes() {
    let mut compared = 0;
    for case in cases() {
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
                let mut session = session(&model, 128, 2);
                session.set_routing(routing);
                let mut found = Vec::new();
                session
                    .score(tokens, |_, row| {
                        found.extend_from_slice(row);
                        Ok(())
                    })
                    .unwrap();
                let found_depths: Vec<i64> =
                    session.depths().iter().map(|d| i64::from(*d)).collect();
                assert_eq!(found_depths, depths[b], "{case}, {name}, sequence {b}");
                let scale = standard_deviation(&logits[b]);
                let worst = common::worst_difference(&found, &logits[b]) / scale;
                assert!(worst < TOLERANCE, "{case}, {name}, sequence {b}: {worst}");
                compared += 1;
            }
        }
    }
    println!("{compared} sequences compared");
    assert!(compared >= 70);
}

#[test]
fn greedy_tokens_equal_the_reference() {
    for case in cases() {
        let (model, expected) = (model(&case, TensorType::F32), Expected::of(&case));
        let greedy = &expected.integers("greedy").unwrap()[0];
        let mut session = session(&model, 64, 1);
        session.set_sampler(SamplerParams::greedy()).unwrap();
        session.prefill(&expected.inputs()[0][..8]).unwrap();
        for _ in 8..greedy.len() {
            let token = session.sample().unwrap();
            session.prefill(&[token]).unwrap();
        }
        let tokens: Vec<i64> = session.tokens().iter().map(|t| i64::from(*t)).collect();
        assert_eq!(&tokens, greedy, "{case}");
    }
}
