//! What a host program needs of a session besides its results: memory of its own, cancelling, a time
//! budget, saving and restoring, a file that changes underneath.
#![cfg(feature = "convert")]

mod common;

use common::cases::{Expected, gguf_bytes, model, saved, session};
use common::to_bits;
use mor::generate::{Finish, GenerateParams};
use mor::quant::TensorType;
use mor::{
    Batch, Error, KvType, LoadParams, Model, Plan, Request, SamplerParams, Session, SessionParams,
};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One of each kind of routing and KV strategy.
const KINDS: [&str; 8] = [
    "vanilla",
    "recursive_middle_cycle",
    "recursive_sequence",
    "expert_cycle",
    "expert_middle_cycle",
    "expert_kv_shared",
    "token_cycle",
    "token_kv_shared",
];

fn default_model() -> Model {
    Model::open(common::default_model()).unwrap()
}

fn short() -> SessionParams {
    SessionParams {
        context: 64,
        batch: 16,
        kv: KvType::F16,
        ..Default::default()
    }
}

#[test]
fn a_session_lives_in_the_caller_s_memory_and_stays_inside() {
    #[repr(C, align(64))]
    struct Memory([u8; 1 << 20]);
    const GUARD: usize = 256;
    for case in KINDS {
        let model = model(case, TensorType::F32);
        let tokens = Expected::of(case).inputs()[0].clone();
        let expected = to_bits(session(&model, 7, 1).step_through(&tokens));
        for threads in [1, 3] {
            let params = SessionParams {
                context: 128,
                batch: 7,
                threads,
                kv: KvType::F32,
                ..Default::default()
            };
            let bytes = Plan::new(&model, &params).unwrap().bytes();
            let memory = Box::into_raw(Box::new(Memory([0xA5; 1 << 20])));
            assert!(bytes + GUARD <= size_of::<Memory>(), "{case}: {bytes}");
            // SAFETY: a part of the memory, of which no other is in use: every session is dropped before the next.
            let part = |range: Range<usize>| unsafe {
                std::slice::from_raw_parts_mut(memory.cast::<u8>().add(range.start), range.len())
            };
            let short = Session::new_in(&model, &params, part(0..bytes - 1));
            assert!(matches!(short, Err(Error::BufferTooSmall { .. })));
            drop(short);
            let misplaced = Session::new_in(&model, &params, part(8..1 << 20));
            assert!(matches!(misplaced, Err(Error::InvalidArgument(_))));
            drop(misplaced);
            let mut session = Session::new_in(&model, &params, part(0..bytes)).unwrap();
            assert!(to_bits(session.step_through(&tokens)) == expected, "{case}");
            drop(session);
            // SAFETY: nobody uses it any more.
            let memory = unsafe { Box::from_raw(memory) };
            assert!(memory.0[bytes..].iter().all(|b| *b == 0xA5), "{case}");
        }
    }
}

/// Runs a prompt in two parts and answers with the last logits.
trait StepThrough {
    fn step_through(&mut self, tokens: &[u32]) -> &[f32];
}

impl StepThrough for Session {
    fn step_through(&mut self, tokens: &[u32]) -> &[f32] {
        let (last, first) = tokens.split_last().unwrap();
        self.prefill(first).unwrap();
        self.step(*last).unwrap()
    }
}

#[test]
fn a_restored_session_goes_on_with_the_same_bits() {
    for case in KINDS {
        for kv in [KvType::F32, KvType::F16] {
            let model = model(case, TensorType::F32);
            let tokens = Expected::of(case).inputs()[0].clone();
            let params = SessionParams {
                context: 128,
                batch: 5,
                kv,
                ..Default::default()
            };
            let mut first = Session::new(&model, &params).unwrap();
            for length in [0, 1, 16, 17, tokens.len() - 3] {
                first.rewind(0).unwrap();
                if length > 0 {
                    first.prefill(&tokens[..length]).unwrap();
                }
                let mut state = vec![1; first.save_bytes()];
                let short = state.len() - 1;
                assert!(matches!(
                    first.save(&mut state[..short]),
                    Err(Error::BufferTooSmall { .. })
                ));
                assert_eq!(first.save(&mut state).unwrap(), state.len());
                // The other session has other memory, another batch, and was mostly used before.
                let other = SessionParams {
                    context: 100,
                    batch: 64,
                    ..params.clone()
                };
                let mut second = Session::new(&model, &other).unwrap();
                if length != 16 {
                    second.prefill(&tokens[5..25]).unwrap();
                }
                second.restore(&state).unwrap();
                assert_eq!(second.tokens(), &tokens[..length]);
                assert_eq!(second.depths(), first.depths());
                assert_eq!(second.kv_bytes_used(), first.kv_bytes_used());
                if length == 0 {
                    assert!(matches!(second.logits(), Err(Error::NotReady(_))));
                    continue;
                }
                assert!(to_bits(second.logits().unwrap()) == to_bits(first.logits().unwrap()));
                assert_eq!(second.sample().unwrap(), first.sample().unwrap());
                for token in &tokens[length..length + 3] {
                    let expected = to_bits(first.step(*token).unwrap());
                    assert!(to_bits(second.step(*token).unwrap()) == expected, "{case}");
                }
                assert_eq!(second.sample().unwrap(), first.sample().unwrap());
            }
        }
    }
}

#[test]
fn states_that_do_not_fit_are_refused_and_change_nothing() {
    let case = "expert_middle_cycle";
    let one = model(case, TensorType::F32);
    let tokens = Expected::of(case).inputs()[0].clone();
    let params = short();
    let mut session = Session::new(&one, &params).unwrap();
    session.prefill(&tokens[..20]).unwrap();
    let state = saved(&mut session);
    session.rewind(7).unwrap();
    let refused = |session: &mut Session, state: &[u8]| {
        let error = session.restore(state).unwrap_err();
        assert!(!error.to_string().is_empty());
        error
    };
    // Every cut, and every byte changed.
    for length in 0..state.len() {
        let error = refused(&mut session, &state[..length]);
        assert!(matches!(error, Error::State(_)), "{length}: {error}");
    }
    for at in 0..state.len() {
        let mut damaged = state.clone();
        damaged[at] ^= 1 << (at % 8);
        let error = refused(&mut session, &damaged);
        assert!(matches!(error, Error::State(_)), "{at}: {error}");
    }
    assert_eq!(session.tokens(), &tokens[..7]);
    session.restore(&state).unwrap();
    assert_eq!(session.tokens(), &tokens[..20]);
    // Another training of the same shape, another storage of keys, a smaller session.
    let mut bytes = gguf_bytes(case, TensorType::F32);
    bytes[one.gguf().tensors()[5].offset + 3] ^= 1;
    let trained_on = Model::from_bytes(bytes).unwrap();
    let mut trained_on = Session::new(&trained_on, &params).unwrap();
    assert!(matches!(refused(&mut trained_on, &state), Error::State(_)));
    let exact = SessionParams {
        kv: KvType::F32,
        ..params.clone()
    };
    let mut exact = Session::new(&one, &exact).unwrap();
    let told = refused(&mut exact, &state);
    assert!(
        matches!(told, Error::State(_)) && told.to_string().contains("as F32"),
        "{told}"
    );
    // The same tensors with another rule.
    let mut bytes = gguf_bytes(case, TensorType::F32);
    let key = b"rope.freq_base";
    let at = bytes.windows(key.len()).position(|bytes| bytes == key);
    let at = at.unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&500.0f32.to_le_bytes());
    let other_rule = Model::from_bytes(bytes).unwrap();
    let mut other_rule = Session::new(&other_rule, &params).unwrap();
    assert!(matches!(refused(&mut other_rule, &state), Error::State(_)));
    let different = model("expert_cycle", TensorType::F32);
    let mut different = Session::new(&different, &params).unwrap();
    assert!(matches!(refused(&mut different, &state), Error::State(_)));
    let small = SessionParams {
        context: 19,
        ..params.clone()
    };
    let mut small = Session::new(&one, &small).unwrap();
    assert!(matches!(
        refused(&mut small, &state),
        Error::ContextFull { .. }
    ));
    let few = SessionParams {
        kv_pages: 3,
        ..params
    };
    let mut few = Session::new(&one, &few).unwrap();
    assert!(matches!(refused(&mut few, &state), Error::KvFull { .. }));
}

/// A state whose checksum is right, though no session of that model can have written it.
#[test]
fn depths_that_no_token_can_have_are_refused() {
    let case = "token_kv_shared";
    let model = model(case, TensorType::F32);
    let params = short();
    let mut session = Session::new(&model, &params).unwrap();
    session.prefill(&[1, 2, 3]).unwrap();
    let state = saved(&mut session);
    // Twenty tokens of no recursion, and the entries that follow from that.
    let h = model.hyperparameters();
    let all = |plane: &&mor::model::Plane| plane.tokens == mor::model::PlaneTokens::All;
    let entries = 20 * model.schedule().planes.iter().filter(all).count();
    let row = (48usize + 5 * 20).next_multiple_of(8);
    let kv = (row + 4 * h.hidden_size).next_multiple_of(8);
    let end = (kv + entries * 4 * h.kv_heads * h.head_dim).next_multiple_of(8);
    let mut forged = vec![0; end + 8];
    forged[..48].copy_from_slice(&state[..48]);
    forged[32..40].copy_from_slice(&20u64.to_le_bytes());
    seal(&mut forged);
    let error = session.restore(&forged).unwrap_err();
    assert!(matches!(error, Error::State(_)), "{error}");
    assert_eq!(session.tokens(), [1, 2, 3]);
}

/// Gives a state the size and the checksum that it should have.
fn seal(state: &mut [u8]) {
    let bytes = state.len() as u64;
    state[8..16].copy_from_slice(&bytes.to_le_bytes());
    let (content, checksum) = state.split_at_mut(bytes as usize - 8);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for word in content.as_chunks::<8>().0 {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x100_0000_01b3);
        hash ^= hash >> 32;
    }
    checksum.copy_from_slice(&hash.to_le_bytes());
}

/// With checksums that are right.
#[test]
fn sizes_that_do_not_fit_together_are_refused() {
    let model = model("token_kv_shared", TensorType::F32);
    let mut session = Session::new(&model, &short()).unwrap();
    session.prefill(&[1, 2, 3]).unwrap();
    let with_row = saved(&mut session);
    session.rewind(2).unwrap();
    let without_row = saved(&mut session);
    let mut resealed = with_row.clone();
    seal(&mut resealed);
    assert_eq!(resealed, with_row);
    let longer = {
        let mut state = with_row.clone();
        state.extend([0; 8]);
        state
    };
    let shorter = with_row[..with_row.len() - 8].to_vec();
    let flagged = |state: &[u8], flag: u32| {
        let mut state = state.to_vec();
        state[28..32].copy_from_slice(&flag.to_le_bytes());
        state
    };
    let forged = [
        ("longer", longer),
        ("shorter", shorter),
        ("a row that is missing", flagged(&without_row, 1)),
        ("a row that is too much", flagged(&with_row, 0)),
        ("another flag", flagged(&with_row, 2)),
        ("another flag, no row", flagged(&without_row, 2)),
    ];
    for (what, mut state) in forged {
        seal(&mut state);
        let error = session.restore(&state).unwrap_err();
        let told = error.to_string();
        assert!(told.contains("do not fit together"), "{what}: {told}");
        assert_eq!(session.tokens(), [1, 2], "{what}");
    }
}

#[test]
fn a_cancel_ends_one_call_and_loses_nothing() {
    let model = default_model();
    let params = SessionParams {
        context: 200,
        threads: 2,
        ..Default::default()
    };
    let mut session = Session::new(&model, &params).unwrap();
    let prompt: Vec<u32> = (10..40).collect();
    session.prefill(&prompt).unwrap();
    let canceller = session.canceller().unwrap();
    canceller.cancel();
    canceller.reset();
    session.step(40).unwrap();
    let kv = session.kv_bytes_used();
    let logits = to_bits(session.logits().unwrap());
    // A cancel before a call, once for each kind.
    canceller.cancel();
    assert!(matches!(session.prefill(&prompt), Err(Error::Cancelled)));
    assert_eq!((session.tokens().len(), session.kv_bytes_used()), (31, kv));
    canceller.cancel();
    let none = session.log_probabilities(&prompt, &mut [0.0; 30]);
    assert!(matches!(none, Err(Error::Cancelled)));
    assert_eq!((session.tokens().len(), session.kv_bytes_used()), (31, kv));
    canceller.cancel();
    assert!(matches!(session.step(1), Err(Error::Cancelled)));
    assert!(
        to_bits(session.logits().unwrap()) == logits,
        "as it was before"
    );
    let state = saved(&mut session);
    session.restore(&state).unwrap();
    assert!(to_bits(session.logits().unwrap()) == logits);
    session.rewind(30).unwrap();
    assert!(to_bits(session.step(40).unwrap()) == logits);
    canceller.cancel();
    let go_on = |_: mor::generate::Piece| ControlFlow::Continue(());
    let params = GenerateParams {
        max_tokens: 5,
        ..Default::default()
    };
    assert_eq!(session.generate(&params, go_on).unwrap(), Finish::Cancelled);
    assert_eq!(session.tokens().len(), 31);
    // During a call, from another thread.
    let endless = GenerateParams {
        max_tokens: usize::MAX,
        ..Default::default()
    };
    session.set_sampler(SamplerParams::greedy()).unwrap();
    let mut shown = 0;
    let finish = std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (cancelled, is_cancelled) = std::sync::mpsc::channel();
        let canceller = canceller.clone();
        scope.spawn(move || {
            receiver.recv().unwrap();
            canceller.cancel();
            cancelled.send(()).unwrap();
        });
        session
            .generate(&endless, |_| {
                shown += 1;
                if shown == 3 {
                    sender.send(()).unwrap();
                    is_cancelled.recv().unwrap();
                }
                ControlFlow::Continue(())
            })
            .unwrap()
    });
    assert_eq!(finish, Finish::Cancelled);
    assert_eq!(session.tokens().len(), 31 + 3);
    session.step(1).unwrap();
}

/// Where generating ends without having run the token that it drew, nothing is lost: neither the draw nor text
/// that was held back.
#[test]
fn a_token_that_was_drawn_in_vain_is_drawn_again() {
    let model = default_model();
    let of = |seed, context, kv_pages| {
        let params = SessionParams {
            context,
            kv_pages,
            ..Default::default()
        };
        let mut session = Session::new(&model, &params).unwrap();
        let sampler = SamplerParams {
            temperature: 5.0,
            seed,
            ..Default::default()
        };
        session.set_sampler(sampler).unwrap();
        session.prefill(&[10, 11, 12]).unwrap();
        session
    };
    // Its text, and what a full context or pool makes of it.
    let generate = |session: &mut Session, stop: &str| {
        let params = GenerateParams {
            max_tokens: 60,
            stop: &[stop],
        };
        let mut text = String::new();
        let finish = session.generate(&params, |piece| {
            text += piece.text;
            ControlFlow::Continue(())
        });
        (text, finish)
    };
    for seed in 0..4 {
        let mut free = of(seed, 200, 0);
        assert_eq!(generate(&mut free, "").1.unwrap(), Finish::Length);
        let tokens = free.tokens().to_vec();

        let mut short = of(seed, 20, 0);
        for _ in 0..2 {
            assert_eq!(generate(&mut short, "").1.unwrap(), Finish::ContextFull);
            assert_eq!(short.tokens(), &tokens[..20]);
        }
        assert_eq!(short.sample().unwrap(), tokens[20]);

        let pages = model.schedule().planes.len() + 2;
        let mut small = of(seed, 200, pages);
        let (all, failed) = generate(&mut small, "");
        assert!(matches!(failed, Err(Error::KvFull { .. })));
        let known = small.tokens().len();
        assert!(known > 3 && small.tokens() == &tokens[..known]);
        assert_eq!(small.sample().unwrap(), tokens[known]);
        // All of it might have been the beginning of this.
        let (held, _) = generate(&mut of(seed, 200, pages), &format!("{all}\0"));
        assert_eq!(held, all);
    }
}

#[test]
fn a_flag_of_the_caller_cancels_too() {
    let model = model("expert_cycle", TensorType::F32);
    static FLAG: AtomicBool = AtomicBool::new(false);
    let flag = &FLAG;
    let memory = vec![0u8; 1 << 20].leak();
    let start = memory.as_ptr().align_offset(64);
    let params = SessionParams {
        context: 32,
        ..Default::default()
    };
    let mut session = Session::new_in(&model, &params, &mut memory[start..]).unwrap();
    session.set_cancel_flag(flag);
    flag.store(true, Ordering::Relaxed);
    assert!(matches!(session.prefill(&[1, 2]), Err(Error::Cancelled)));
    assert!(!flag.load(Ordering::Relaxed));
    session.prefill(&[1, 2]).unwrap();
}

/// With a budget that nothing meets every token takes one recursion, as under a limit of one; with
/// one that everything meets, as many as its router says. What lies between depends on the clock.
#[test]
fn a_time_budget_leaves_out_recursions() {
    for case in KINDS {
        let model = model(case, TensorType::F32);
        let tokens = Expected::of(case).inputs()[0].clone();
        let run = |set: &dyn Fn(&mut Session)| {
            let mut session = session(&model, 16, 1);
            // Measures this machine's rate.
            session.set_time_budget(Some(Duration::from_secs(3600)));
            session.step(tokens[0]).unwrap();
            session.step(tokens[0]).unwrap();
            session.rewind(0).unwrap();
            session.set_time_budget(None);
            set(&mut session);
            let mut logits = Vec::new();
            for token in &tokens {
                logits = to_bits(session.step(*token).unwrap());
            }
            (session.depths().to_vec(), logits)
        };
        let free = run(&|_| ());
        let generous = run(&|s| s.set_time_budget(Some(Duration::from_secs(3600))));
        assert!(free == generous, "{case}");
        let one = run(&|s| s.set_depth_limit(1).unwrap());
        let hasty = run(&|s| s.set_time_budget(Some(Duration::from_nanos(1))));
        assert!(one == hasty, "{case}");
        assert!(hasty.0.iter().all(|d| *d <= 1));
        // Nor does the first token of all bet on a speed that nobody measured.
        let mut fresh = session(&model, 16, 1);
        fresh.set_time_budget(Some(Duration::from_nanos(1)));
        fresh.step(tokens[0]).unwrap();
        assert!(fresh.depths()[0] <= 1, "{case}");
        // A prompt is not limited, nor is its last chunk of one token.
        for batch in [128, 1, tokens.len() - 1] {
            let mut prompted = session(&model, batch, 1);
            prompted.set_time_budget(Some(Duration::from_nanos(1)));
            prompted.prefill(&tokens).unwrap();
            assert_eq!(prompted.depths(), free.0);
        }
    }
}

#[test]
fn a_file_that_is_truncated_is_an_error_and_a_copy_does_not_care() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let bytes = gguf_bytes("expert_cycle", TensorType::F32);
    for (copy, part) in [(false, false), (false, true), (true, false), (true, true)] {
        let before = if part { vec![7; 100] } else { Vec::new() };
        std::fs::write(&path, [&before[..], &bytes].concat()).unwrap();
        let params = LoadParams {
            copy,
            prefault: true,
            ..Default::default()
        };
        let model = if part {
            let file = std::fs::File::open(&path).unwrap();
            Model::from_file(file, 100, Some(bytes.len() as u64), &params)
        } else {
            Model::open_with(&path, &params)
        };
        let model = model.unwrap();
        let mut session = session(&model, 8, 1);
        let logits = to_bits(session.step(3).unwrap());
        let mut state = saved(&mut session);
        session.rewind(0).unwrap();
        let mut batch = Batch::new(&model, &SessionParams::default()).unwrap();
        let request = Request {
            prompt: &[3],
            ..Default::default()
        };
        batch.add(&request).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1000).unwrap();
        match session.step(3) {
            Ok(again) => assert!(copy && to_bits(again) == logits),
            Err(error) => assert!(!copy && matches!(error, Error::FileChanged { .. })),
        }
        // Whatever else looks at the file.
        let told = |outcome: Result<(), Error>| match outcome {
            Ok(()) => assert!(copy),
            Err(error) => assert!(
                !copy && matches!(error, Error::FileChanged { .. }),
                "{error}"
            ),
        };
        told(session.restore(&state));
        told(session.save(&mut state).map(drop));
        told(Session::new(&model, &SessionParams::default()).map(drop));
        told(Batch::new(&model, &SessionParams::default()).map(drop));
        told(batch.tick().map(drop));
        if !copy {
            assert!(session.tokens().is_empty());
            // The same bytes again: the session goes on.
            std::fs::write(&path, [&before[..], &bytes].concat()).unwrap();
            assert!(to_bits(session.step(3).unwrap()) == logits);
            batch.tick().unwrap();
        }
    }
}

/// As an asset lies in an Android package: on a page (`zipalign -P 16`), on four bytes (`zipalign`), or
/// anywhere. Kernels read weights at any address.
#[test]
fn a_part_of_a_file_at_any_offset_computes_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("package.apk");
    for ty in [TensorType::F32, TensorType::Q4_0, TensorType::Q8_0] {
        let bytes = gguf_bytes("expert_cycle", ty);
        let whole = Model::from_bytes(bytes.clone()).unwrap();
        let wanted = to_bits(session(&whole, 8, 1).step(3).unwrap());
        for offset in [0, 1, 2, 3, 4, 4096, 4097, 12_340, 65_535] {
            let parts = [&vec![7; offset][..], &bytes, &[7; 100]];
            std::fs::write(&path, parts.concat()).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            let length = Some(bytes.len() as u64);
            let params = LoadParams::default();
            let model = Model::from_file(file, offset as u64, length, &params).unwrap();
            assert!(to_bits(session(&model, 8, 1).step(3).unwrap()) == wanted);
        }
    }
}

#[test]
fn locked_and_prefaulted_memory_computes_the_same() {
    let bytes = gguf_bytes("expert_cycle", TensorType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let run = |lock, prefault| -> mor::Result<Vec<u32>> {
        let load = LoadParams {
            lock,
            prefault,
            ..Default::default()
        };
        let model = Model::open_with(&path, &load)?;
        let params = SessionParams {
            context: 32,
            lock,
            prefault,
            ..Default::default()
        };
        Ok(to_bits(Session::new(&model, &params)?.step(3)?))
    };
    let plain = run(false, false).unwrap();
    assert!(run(false, true).unwrap() == plain);
    // What of the caller's memory is not needed is not touched.
    let params = SessionParams {
        context: 32,
        prefault: true,
        ..Default::default()
    };
    let model = Model::open_with(&path, &LoadParams::default()).unwrap();
    let bytes = Plan::new(&model, &params).unwrap().bytes();
    let memory = Box::leak(vec![0xabu8; bytes + (1 << 20)].into_boxed_slice());
    let (start, end) = (memory.as_ptr().align_offset(64), memory.as_ptr_range().end);
    drop(Session::new_in(&model, &params, &mut memory[start..]).unwrap());
    // SAFETY: the memory is never freed, and the session that had it is gone.
    let behind = unsafe { std::slice::from_raw_parts(end.sub((1 << 20) - 64), (1 << 20) - 64) };
    assert!(behind.iter().all(|byte| *byte == 0xab));
    match run(true, true) {
        Ok(locked) => assert!(locked == plain),
        // A machine may allow no locking; then it is this error and nothing else.
        Err(error) => assert!(matches!(error, Error::Lock { .. }), "{error}"),
    }
}
