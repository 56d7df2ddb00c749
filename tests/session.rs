//! Properties of a session: the same bits however a text is cut and however many threads work,
//! memory that follows the tokens that were active, and errors that lose nothing.
#![cfg(feature = "convert")]

mod common;

use common::Random;
use common::cases::*;
use common::to_bits;
use mor::gguf::{Gguf, Value};
use mor::kv::PAGE_TOKENS;
use mor::model::PlaneTokens;
use mor::quant::TensorType;
use mor::{Error, KvType, Model, Plan, Routing, SamplerParams, Session, SessionParams};
use std::sync::Arc;

/// Bits of the logits after each of `tokens`, fed in pieces of the given sizes.
fn bits(session: &mut Session, tokens: &[u32], pieces: &[usize]) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    let mut rest = tokens;
    session.rewind(0).unwrap();
    for size in pieces {
        let (piece, after) = rest.split_at(*size);
        let keep = |_, row: &[f32]| {
            rows.push(to_bits(row));
            Ok(())
        };
        session.score(piece, keep).unwrap();
        rest = after;
    }
    assert!(rest.is_empty());
    rows
}

/// Kinds that differ in what a pass does.
const KINDS: [&str; 7] = [
    "vanilla",
    "recursive_middle_sequence",
    "expert_middle_cycle",
    "expert_kv_shared",
    "expert_aux_router",
    "token_kv_shared",
    "token_loss_free",
];

#[test]
fn splits_batches_and_threads_change_no_bit() {
    for case in KINDS {
        for ty in [TensorType::F32, TensorType::Q8_0] {
            let model = model(case, ty);
            let tokens = &Expected::of(case).inputs()[0];
            let n = tokens.len();
            let whole = bits(&mut session(&model, 128, 1), tokens, &[n]);
            let mut team = session(&model, 128, 2);
            for at in 1..n {
                let split = bits(&mut team, tokens, &[at, n - at]);
                assert!(split == whole, "{case}, {ty:?}: split at {at}");
            }
            for (batch, threads) in [(1, 1), (5, 2), (16, 3), (128, 3)] {
                let mut session = session(&model, batch, threads);
                let chunks = bits(&mut session, tokens, &[n]);
                assert!(
                    chunks == whole,
                    "{case}, {ty:?}: batch {batch}, {threads} threads"
                );
                let steps = bits(&mut session, tokens, &vec![1; n]);
                assert!(steps == whole, "{case}, {ty:?}: steps, {threads} threads");
            }
        }
    }
}

/// Widths that divide into no block, tile, panel or vector, in every type of weights, keys and values.
#[test]
fn odd_shapes_change_no_bit_in_any_type() {
    for case in shapes() {
        let inputs = Expected::of(&case).inputs();
        let tokens = &inputs[0][..inputs[0].len().min(24)]; // more than a page
        for ty in TensorType::ALL.into_iter().filter(|ty| ty.can_encode()) {
            let model = model(&case, ty);
            for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
                if kv == KvType::Q8_0 && !model.hyperparameters().head_dim.is_multiple_of(32) {
                    continue;
                }
                let bits = |batch, threads, pieces: &[usize]| {
                    let params = SessionParams {
                        context: tokens.len(),
                        batch,
                        threads,
                        kv,
                        ..Default::default()
                    };
                    bits(&mut Session::new(&model, &params).unwrap(), tokens, pieces)
                };
                let whole = bits(tokens.len(), 1, &[tokens.len()]);
                let mut numbers = whole.iter().flatten().map(|bits| f32::from_bits(*bits));
                assert!(numbers.all(f32::is_finite), "{case}, {ty:?}, {kv:?}");
                for (batch, threads) in [(1, 2), (3, 2), (17, 1)] {
                    let chunks = bits(batch, threads, &[tokens.len()]);
                    assert!(chunks == whole, "{case}, {ty:?}, {kv:?}: batch {batch}");
                }
            }
        }
    }
}

#[test]
fn rewinding_and_going_on_changes_no_bit() {
    for case in KINDS {
        let model = model(case, TensorType::F32);
        let tokens = &Expected::of(case).inputs()[0];
        let whole = bits(&mut session(&model, 128, 1), tokens, &[tokens.len()]);
        let mut session = session(&model, 7, 2);
        for back in [0, 1, 5, PAGE_TOKENS, PAGE_TOKENS + 1, tokens.len() - 1] {
            session.rewind(0).unwrap();
            session.prefill(tokens).unwrap();
            session.rewind(back).unwrap();
            assert_eq!(session.tokens(), &tokens[..back]);
            let rest = &tokens[back..];
            session.prefill(rest).unwrap();
            let last = to_bits(session.logits().unwrap());
            assert_eq!(Some(&last), whole.last(), "{case}: back to {back}");
            // And from a text that differs from there on, or goes on, or is the same.
            let mut other = tokens[..back].to_vec();
            other.extend(tokens[back..].iter().map(|token| (token + 1) % 8));
            session.prefill_whole(&other).unwrap();
            let same = other.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            let kept = session.prefill_whole(tokens).unwrap();
            assert_eq!(kept, same, "{case}");
            assert!(
                to_bits(session.logits().unwrap()) == *whole.last().unwrap(),
                "{case}: back to {back}"
            );
            assert_eq!(session.prefill_whole(tokens).unwrap(), tokens.len());
            // To where it stands: nothing is forgotten, the logits neither.
            session.rewind(tokens.len()).unwrap();
            assert!(to_bits(session.logits().unwrap()) == *whole.last().unwrap());
            // After a rewind there are no logits, though the text is the same.
            session.rewind(tokens.len() - 1).unwrap();
            let shorter = &tokens[..tokens.len() - 1];
            assert_eq!(session.prefill_whole(shorter).unwrap(), shorter.len() - 1);
            assert!(
                to_bits(session.logits().unwrap()) == whole[shorter.len() - 1],
                "{case}"
            );
            session.prefill_whole(tokens).unwrap();
            let part = &tokens[..(back + 1).min(tokens.len() - 1)];
            assert_eq!(session.prefill_whole(part).unwrap(), part.len() - 1);
            assert!(
                to_bits(session.logits().unwrap()) == whole[part.len() - 1],
                "{case}: back to {back}"
            );
        }
    }
}

#[test]
fn every_kv_type_runs_and_stays_near() {
    let model = model("expert_middle_cycle", TensorType::F32);
    let tokens = &Expected::of("expert_middle_cycle").inputs()[0];
    let params = |kv| SessionParams {
        context: 64,
        kv,
        ..Default::default()
    };
    let run = |kv| {
        let mut session = Session::new(&model, &params(kv)).unwrap();
        session.set_cut(0.0).unwrap(); // No route can flip.
        session.prefill(tokens).unwrap();
        session.logits().unwrap().to_vec()
    };
    let exact = run(KvType::F32);
    let near = run(KvType::F16);
    // f16 rounds a value by at most 2^-11 of it, a key's error moves a score by as much, and some
    // ten layers add up; logits are of size 1.
    let worst = common::worst_difference(&exact, &near);
    assert!(worst < 10.0 * 2.0 / 2048.0 && worst > 0.0, "{worst}");
    // Heads of 8 cannot be q8_0.
    let error = Plan::new(&model, &params(KvType::Q8_0)).unwrap_err();
    assert!(error.to_string().contains("multiple of 32"), "{error}");
}

#[test]
fn kv_memory_is_that_of_the_active_tokens() {
    for case in cases() {
        let model = model(&case, TensorType::F32);
        let tokens = &Expected::of(&case).inputs()[0];
        let mut session = session(&model, 16, 1);
        assert_eq!(session.kv_bytes_used(), 0);
        session.prefill(tokens).unwrap();
        let depths = session.depths().to_vec();
        let entries = |tokens: PlaneTokens| match tokens {
            PlaneTokens::All => depths.len(),
            PlaneTokens::DeeperThan(r) => depths.iter().filter(|d| usize::from(**d) > r).count(),
        };
        let planes = model.schedule().planes.iter().map(|p| entries(p.tokens));
        let planes: Vec<usize> = planes.collect();
        let h = model.hyperparameters();
        // Values lie in whole vectors of sixteen.
        let head = h.head_dim + h.head_dim.next_multiple_of(16);
        let page = 4 * PAGE_TOKENS * h.kv_heads * head;
        let pages: usize = planes.iter().map(|n| n.div_ceil(PAGE_TOKENS)).sum();
        assert_eq!(session.kv_entries(), planes.iter().sum::<usize>(), "{case}");
        assert_eq!(session.kv_bytes_used(), pages * page, "{case}");
        if depths.iter().any(|d| usize::from(*d) < h.recursions) && !case.contains("shared") {
            assert!(
                session.kv_entries() < tokens.len() * h.logical_layers(),
                "{case}"
            );
        }
        session.rewind(0).unwrap();
        assert_eq!(session.kv_bytes_used(), 0, "{case}");
    }
}

#[test]
fn weight_bytes_do_not_grow_with_recursions() {
    // The same blocks, run twice and four times.
    let bytes = gguf_bytes("recursive_middle_cycle", TensorType::F32);
    let with = |recursions: u32| {
        let gguf = mor::gguf::Gguf::parse(&bytes).unwrap();
        let mut metadata = gguf.metadata.clone();
        metadata.insert("mor.recursion.count", Value::U32(recursions));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        common::write_copy(&path, &metadata, &gguf, &bytes);
        let model = Model::open(&path).unwrap();
        assert_eq!(model.hyperparameters().recursions, recursions as usize);
        let mut session = session(&model, 16, 1);
        session.prefill(&[1, 2, 3]).unwrap();
        assert_eq!(session.depths(), [recursions as u8; 3]);
        (model.weight_bytes(), model.unshared_weight_bytes())
    };
    let ((two, two_unshared), (four, four_unshared)) = (with(2), with(4));
    assert_eq!(two, four);
    assert!(four_unshared > two_unshared && two_unshared > two);
}

fn depths_with(session: &mut Session, tokens: &[u32]) -> Vec<u8> {
    session.rewind(0).unwrap();
    session.prefill(tokens).unwrap();
    session.depths().to_vec()
}

#[test]
fn cut_and_depth_limit_rule_the_depth() {
    for case in [
        "expert_cycle",
        "expert_aux_router",
        "expert_kv_shared",
        "expert_tanh",
    ] {
        let model = model(case, TensorType::F32);
        let most = model.hyperparameters().recursions as u8;
        let tokens = &Expected::of(case).inputs()[0];
        let mut session = session(&model, 16, 2);
        let trained = depths_with(&mut session, tokens);
        session.set_cut(0.0).unwrap();
        assert!(
            depths_with(&mut session, tokens).iter().all(|d| *d == most),
            "{case}"
        );
        session.set_depth_limit(1).unwrap();
        assert!(
            depths_with(&mut session, tokens).iter().all(|d| *d == 1),
            "{case}"
        );
        session.set_cut(1.0).unwrap();
        assert!(
            depths_with(&mut session, tokens).iter().all(|d| *d == 0),
            "{case}"
        );
        session.set_cut(0.5).unwrap();
        session.set_depth_limit(usize::from(most)).unwrap();
        assert_eq!(depths_with(&mut session, tokens), trained, "{case}");
        assert!(session.set_cut(f32::NAN).is_err());
        assert!(session.set_depth_limit(usize::from(most) + 1).is_err());
    }
    for case in [
        "token_cycle",
        "recursive_cycle",
        "recursive_middle_sequence",
    ] {
        let model = model(case, TensorType::F32);
        let tokens = &Expected::of(case).inputs()[0];
        let mut session = session(&model, 16, 2);
        session.set_depth_limit(1).unwrap();
        assert!(
            depths_with(&mut session, tokens).iter().all(|d| *d == 1),
            "{case}"
        );
    }
}

#[test]
fn errors_lose_nothing() {
    let model = model("expert_middle_cycle", TensorType::F32);
    let tokens = Expected::of("expert_middle_cycle").inputs()[0].clone();
    let vocab = model.hyperparameters().vocab_size as u32;
    let whole = bits(&mut session(&model, 128, 1), &tokens, &[tokens.len()]);
    // A pool that holds the first ten tokens, and not all of them.
    let planes = model.schedule().planes.len();
    let params = SessionParams {
        context: tokens.len(),
        batch: 4,
        kv: KvType::F32,
        kv_pages: planes + 2,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params).unwrap();
    session.set_sampler(SamplerParams::greedy()).unwrap();
    session.prefill(&tokens[..10]).unwrap();
    let used = session.kv_bytes_used();
    let best = greatest(&whole[9]);
    let all = |session: &mut Session, used: usize| {
        assert_eq!(session.tokens(), &tokens[..10]);
        assert_eq!(session.kv_bytes_used(), used);
        let saved_bytes = session.save_bytes();
        let mut saved = vec![0; saved_bytes];
        session.save(&mut saved).unwrap();
        // What follows the last token is what it was, drawn, as logits, and saved.
        assert_eq!(session.sample().unwrap(), best);
        assert!(to_bits(session.logits().unwrap()) == whole[9]);
        session.restore(&saved).unwrap();
        assert!(to_bits(session.logits().unwrap()) == whole[9]);
    };
    all(&mut session, used);
    assert!(matches!(
        session.prefill(&tokens[10..]),
        Err(Error::KvFull { .. })
    ));
    all(&mut session, used);
    let too_many = vec![1; tokens.len()];
    assert!(matches!(
        session.prefill(&too_many),
        Err(Error::ContextFull { .. })
    ));
    assert!(matches!(
        session.prefill(&[1, vocab]),
        Err(Error::InvalidArgument(_))
    ));
    assert!(matches!(
        session.prefill(&[]),
        Err(Error::InvalidArgument(_))
    ));
    session.set_routing(Routing::Capacity);
    assert!(matches!(
        session.prefill(&[1]),
        Err(Error::InvalidArgument(_))
    ));
    session.set_routing(Routing::Threshold);
    all(&mut session, used);
    // Whether its first chunk or a later one fails, and several times in a row.
    for end in [11, 12, 16] {
        let mut after = 0;
        let stop = session.score(&tokens[10..end], |_, _| {
            after += 1;
            match 10 + after == end {
                true => Err(Error::argument("enough")),
                false => Ok(()),
            }
        });
        assert!(stop.is_err());
        all(&mut session, used);
    }
    // And it goes on as if nothing had been.
    assert_eq!(to_bits(session.step(tokens[10]).unwrap()), whole[10]);
}

/// The token that is drawn greedily.
fn greatest(bits: &[u32]) -> u32 {
    let value = |token: &usize| f32::from_bits(bits[*token]);
    let mut best = 0;
    for token in 1..bits.len() {
        if value(&token) > value(&best) {
            best = token;
        }
    }
    best as u32
}

/// They are the softmax of the logits, in pieces and chunks of any length.
#[test]
fn log_probabilities_are_the_softmax_s() {
    for (case, batch) in [
        ("expert_middle_cycle", 128),
        ("expert_middle_cycle", 7),
        ("token_kv_shared", 16),
        ("vanilla", 7),
    ] {
        let model = model(case, TensorType::F32);
        let mut session = session(&model, batch, 2);
        let mut random = Random(3);
        let vocab = model.hyperparameters().vocab_size;
        let tokens: Vec<u32> = (0..60).map(|_| random.below(vocab) as u32).collect();
        let mut expected = Vec::new();
        let next = |row: &[f32], token: u32| {
            let weight = |logit: f32| f64::from(logit).exp();
            let sum: f64 = row.iter().map(|logit| weight(*logit)).sum();
            (weight(row[token as usize]) / sum).ln()
        };
        session
            .score(&tokens, |i, row| {
                expected.extend(tokens.get(i + 1).map(|token| next(row, *token)));
                Ok(())
            })
            .unwrap();
        let last: Vec<f32> = session.logits().unwrap().to_vec();
        session.rewind(0).unwrap();
        let mut out = [0.0; 60];
        let none = session.log_probabilities(&tokens, &mut out);
        assert!(matches!(none, Err(Error::NotReady(_))), "{case}");
        let short = session.log_probabilities(&tokens, &mut out[..59]);
        assert!(matches!(short, Err(Error::InvalidArgument(_))), "{case}");
        session.prefill(&tokens[..1]).unwrap();
        let mut at = 1;
        for piece in [1, 2, 20, 14, 22] {
            let range = at..at + piece;
            let out = &mut out[range.clone()];
            session.log_probabilities(&tokens[range], out).unwrap();
            at += piece;
        }
        assert_eq!(session.tokens(), tokens);
        assert!(session.logits().unwrap() == last, "{case}");
        for (i, (out, expected)) in out[1..].iter().zip(&expected).enumerate() {
            // One rounding to single precision; the terms of the sum are right to two units in the last place, and
            // their exponents, below 16 where it matters, to half of one.
            let epsilon = f64::from(f32::EPSILON);
            let tolerance = expected.abs() * epsilon / 2.0 + 2.0 * epsilon + 8.0 * epsilon / 2.0;
            let error = (f64::from(*out) - expected).abs();
            assert!(error <= tolerance, "{case}, {i}: {out}, not {expected}");
        }
    }
}

/// Those of tokens before the one that fails are known by then; the session is as before all the same.
#[test]
fn log_probabilities_that_fail_leave_the_session_as_it_was() {
    let mut bytes = gguf_bytes("expert_middle_cycle", TensorType::F32);
    spoil_token_5(&mut bytes);
    let model = Model::from_bytes_on(bytes, device()).unwrap();
    let mut session = session(&model, 7, 1);
    session.prefill(&[6, 7, 8]).unwrap();
    let logits = session.logits().unwrap().to_vec();
    let kv = session.kv_bytes_used();
    let mut tokens: Vec<u32> = (10..30).collect();
    tokens[12] = 5;
    let failed = session.log_probabilities(&tokens, &mut [0.0; 20]);
    assert!(matches!(failed, Err(Error::NotFinite(_))), "{failed:?}");
    assert_eq!(session.tokens(), [6, 7, 8]);
    assert_eq!(session.kv_bytes_used(), kv);
    assert!(session.logits().unwrap() == logits);
    // Nobody asks what follows a last token.
    let mut out = [0.0; 12];
    session.log_probabilities(&tokens[..12], &mut out).unwrap();
}

/// A token whose logits cannot be computed did not run, whoever computes them.
#[test]
fn a_step_without_logits_is_no_step() {
    let mut bytes = gguf_bytes("expert_middle_cycle", TensorType::F32);
    let gguf = Gguf::parse(&bytes).unwrap();
    let output = gguf.tensor("output.weight").unwrap().offset;
    bytes[output..output + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let model = Model::from_bytes_on(bytes, device()).unwrap();
    let mut session = session(&model, 128, 1);
    // On a GPU a pass and its logits are one.
    let runs = session.prefill(&[1]).is_ok();
    assert_eq!(runs, !model.is_on_gpu());
    for _ in 0..2 {
        assert!(matches!(session.step(2), Err(Error::NotFinite(_))));
        assert_eq!(session.tokens().len(), usize::from(runs));
    }
}

/// What a function does that gets the logits is its own; the session is as before.
#[test]
fn a_panic_of_the_callers_is_undone() {
    for case in ["expert_cycle", "token_cycle", "vanilla"] {
        let model = model(case, TensorType::F32);
        let (mut panicked, mut sound) = (session(&model, 128, 1), session(&model, 128, 1));
        for start in [0, 3] {
            for session in [&mut panicked, &mut sound] {
                session.prefill(&[3, 4, 5][..start]).unwrap_or_default();
            }
            let entries = panicked.kv_entries();
            let work = std::panic::AssertUnwindSafe(|| {
                panicked.score(&[5, 6, 7, 8], |_, _| panic!("the caller's"))
            });
            assert!(std::panic::catch_unwind(work).is_err());
            assert_eq!(panicked.kv_entries(), entries);
            assert_eq!(panicked.tokens().len(), start);
        }
        let [a, b] = [&mut panicked, &mut sound].map(|session| {
            session.prefill(&[9, 10, 11]).unwrap();
            to_bits(session.logits().unwrap())
        });
        assert!(a == b, "{case}");
    }
}

/// Keys and values of sound weights may be too large for halves.
#[test]
fn values_that_a_type_cannot_keep_are_told_apart_from_damage() {
    let mut bytes = gguf_bytes("vanilla", TensorType::F32);
    let gguf = Gguf::parse(&bytes).unwrap();
    let value = gguf.tensor("blk.0.attn_v.weight").unwrap().offset;
    let model_with = |bytes: Vec<u8>, kv| {
        let model = Model::from_bytes_on(bytes, device()).unwrap();
        let params = SessionParams {
            context: 16,
            kv,
            ..Default::default()
        };
        Session::new(&model, &params).unwrap().prefill(&[1, 2, 3])
    };
    let at = value..value + 4;
    bytes[at.clone()].copy_from_slice(&1e8f32.to_le_bytes());
    assert!(model_with(bytes.clone(), KvType::F32).is_ok());
    let told = model_with(bytes.clone(), KvType::F16)
        .unwrap_err()
        .to_string();
    assert!(
        told.contains("too large for") && told.contains("as F32"),
        "{told}"
    );
    bytes[at].copy_from_slice(&f32::NAN.to_le_bytes());
    let told = model_with(bytes, KvType::F16).unwrap_err().to_string();
    assert!(told.contains("weights are damaged"), "{told}");
}

#[test]
fn the_plan_is_what_a_session_takes_and_adds_up() {
    for case in KINDS {
        let model = model(case, TensorType::F32);
        let params = SessionParams {
            context: 100,
            ..Default::default()
        };
        let plan = Plan::new(&model, &params).unwrap();
        assert_eq!(
            plan.lines().iter().map(|(_, bytes)| bytes).sum::<usize>(),
            plan.bytes()
        );
        let line = |name| plan.lines().iter().find(|l| l.0 == name).unwrap().1;
        let pages_here = usize::from(!model.is_on_gpu());
        assert_eq!(line("KV pages"), pages_here * plan.kv_bytes());
        // Four bytes of a token, one of a depth.
        assert_eq!(line("tokens and depths"), 500);
        let mut twice = params.clone();
        twice.sequences = 2;
        let two = Plan::new(&model, &twice).unwrap();
        assert_eq!(two.kv_bytes(), 2 * plan.kv_bytes());
        assert!(Session::with_plan(&model, two).is_err());
        // Sizes that nobody has are refused, not attempted.
        for (context, sequences) in [(1 << 28, 1 << 20), (usize::MAX, 1), (0, 0)] {
            let params = SessionParams {
                context,
                sequences,
                ..Default::default()
            };
            assert!(Plan::new(&model, &params).is_err());
        }
    }
    let (one, other) = (
        model("vanilla", TensorType::F32),
        model("token_cycle", TensorType::F32),
    );
    let plan = Plan::new(&one, &SessionParams::default()).unwrap();
    assert!(Session::with_plan(&other, plan).is_err());
}

#[test]
fn many_sessions_share_a_model_on_many_threads() {
    let model = model("expert_kv_shared", TensorType::Q4_0);
    let tokens = Arc::new(Expected::of("expert_kv_shared").inputs()[0].clone());
    let expected = bits(&mut session(&model, 128, 1), &tokens, &[tokens.len()]);
    let workers: Vec<_> = (1..=4)
        .map(|threads| {
            let (model, tokens) = (model.clone(), Arc::clone(&tokens));
            std::thread::spawn(move || {
                bits(&mut session(&model, 9, threads), &tokens, &[tokens.len()])
            })
        })
        .collect();
    for worker in workers {
        assert!(worker.join().unwrap() == expected);
    }
}
