//! The GPU: equal to the reference and to the CPU. Where there is none, tests/cuda/run.sh brings the
//! emulated one; without any driver these tests are skipped, unless MOR_TEST_CUDA says that they must run.
#![cfg(all(feature = "cuda", feature = "convert"))]

mod common;

use common::cases::*;
use mor::quant::TensorType;
use mor::{Device, KvType, Model, Routing, SamplerParams, Session, SessionParams};

/// As in tests/reference.rs.
const TOLERANCE: f32 = 1e-4;

fn there_is_a_device() -> bool {
    let bytes = gguf_bytes("vanilla", TensorType::F32);
    match Model::from_bytes_on(bytes, Device::Cuda(0)) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("MOR_TEST_CUDA").is_none(), "{error}");
            println!("SKIPPED: {error}");
            false
        }
    }
}

fn gpu_model(case: &str, ty: TensorType) -> Model {
    Model::from_bytes_on(gguf_bytes(case, ty), Device::Cuda(0)).unwrap()
}

fn standard_deviation(values: &[f32]) -> f32 {
    let n = values.len() as f32;
    let mean = values.iter().sum::<f32>() / n;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt()
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

#[test]
fn logits_and_depths_equal_the_reference_in_both_modes() {
    if !there_is_a_device() {
        return;
    }
    let mut compared = 0;
    for case in cases() {
        let (model, expected) = (gpu_model(&case, TensorType::F32), Expected::of(&case));
        for (name, routing) in [
            ("capacity", Routing::Capacity),
            ("threshold", Routing::Threshold),
        ] {
            let Some(logits) = expected.floats(&format!("logits_{name}")) else {
                continue;
            };
            let depths = expected.integers(&format!("depth_{name}")).unwrap();
            for (b, tokens) in expected.inputs().iter().enumerate() {
                let mut session = session(&model, 128, 1);
                session.set_routing(routing);
                let found = scores(&mut session, tokens);
                let found_depths: Vec<i64> =
                    session.depths().iter().map(|d| i64::from(*d)).collect();
                assert_eq!(found_depths, depths[b], "{case}, {name}, sequence {b}");
                let scale = standard_deviation(&logits[b]);
                assert_eq!(found.len(), logits[b].len());
                let worst = found.iter().zip(&logits[b]).map(|(a, b)| (a - b).abs());
                let worst = worst.fold(0.0, f32::max) / scale;
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
    if !there_is_a_device() {
        return;
    }
    for case in cases() {
        let (model, expected) = (gpu_model(&case, TensorType::F32), Expected::of(&case));
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
