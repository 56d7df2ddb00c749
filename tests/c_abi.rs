//! The C interface as a Rust program can test it: every export is guarded and declared, memory is
//! what the plan says, and every refused allocation is an error that leaves nothing behind. What a
//! C compiler and the sanitizers can say is in `tests/c`.
#![cfg(feature = "ffi")]

mod common;

use common::allocator::{Allocator, Refuse, here, refusing};
use mor::ffi::{mor_status::*, *};
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn default_model() -> CString {
    CString::new(common::default_model().to_str().unwrap()).unwrap()
}

fn text(pointer: *const std::ffi::c_char) -> &'static str {
    unsafe { CStr::from_ptr(pointer) }.to_str().unwrap()
}

/// Each `extern "C" fn` that C can call: its name and its body's first line.
fn exports() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(common::root().join("src/ffi")).unwrap() {
        let source = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for part in source.split("#[unsafe(no_mangle)]").skip(1) {
            let head = part.split("fn ").nth(1).unwrap();
            let name = head.split('(').next().unwrap();
            let body = part.split("{\n").nth(1).unwrap();
            found.push((name.to_owned(), body.trim().to_owned()));
        }
        // An export by another road would be missed above.
        for road in ["export_name", "link_section", "#[no_mangle]"] {
            assert!(!source.contains(road), "{road}");
        }
    }
    found
}

#[test]
fn every_export_stops_panics_and_is_declared() {
    let exports = exports();
    for (name, body) in &exports {
        assert!(body.starts_with("boundary!("), "{name} begins with {body}");
    }
    let names: BTreeSet<&str> = exports.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.len() > 40 && names.iter().all(|name| name.starts_with("mor_")));
    let header = std::fs::read_to_string(common::root().join("include/mor.h")).unwrap();
    // A declaration stands at the beginning of a line, with its parameters behind it.
    let declared: BTreeSet<&str> = header
        .lines()
        .filter(|line| {
            line.starts_with("enum mor_status mor_")
                || line.contains(" *mor_")
                || line.starts_with("void mor_")
        })
        .filter(|line| !line.starts_with(' '))
        .filter_map(|line| line.split('(').next()?.rsplit([' ', '*']).next())
        .collect();
    assert_eq!(names, declared);
}

#[test]
fn statuses_have_sentences() {
    for status in MOR_OK as i32..=MOR_ERROR_DEVICE as i32 {
        assert_ne!(text(mor_status_text(status)), "unknown status");
    }
    for status in [-1, MOR_ERROR_DEVICE as i32 + 1, i32::MAX, i32::MIN] {
        assert_eq!(text(mor_status_text(status)), "unknown status");
    }
    assert_eq!(text(mor_version()), env!("CARGO_PKG_VERSION"));
}

/// A model, a tokenizer, a session and a batch.
struct Objects(
    *mut mor_model,
    *mut mor_tokenizer,
    *mut mor_session,
    *mut mor_batch,
);

fn batch_params(threads: u32) -> mor_batch_params {
    unsafe {
        let mut params: mor_batch_params = std::mem::zeroed();
        mor_batch_params_init(&mut params, size_of_val(&params));
        (params.threads, params.context) = (threads, 64);
        (params.sequences, params.rows, params.logit_rows) = (6, 16, 4);
        params
    }
}

/// Loads, creates and runs one token; what was made before a failure is freed.
fn make(path: &CStr, copy: bool, threads: u32) -> Result<Objects, mor_status> {
    let mut objects = Objects(null_mut(), null_mut(), null_mut(), null_mut());
    let mut error: mor_error = unsafe { std::mem::zeroed() };
    let mut steps = || -> mor_status {
        unsafe {
            let mut params: mor_model_params = std::mem::zeroed();
            mor_model_params_init(&mut params, size_of_val(&params));
            params.copy = copy.into();
            let mut status = mor_model_load(path.as_ptr(), &params, &mut objects.0, &mut error);
            if status == MOR_OK {
                status = mor_tokenizer_create(objects.0, null(), &mut objects.1, &mut error);
            }
            if status == MOR_OK {
                let mut params: mor_session_params = std::mem::zeroed();
                mor_session_params_init(&mut params, size_of_val(&params));
                (params.threads, params.context) = (threads, 64);
                status = mor_session_create(objects.0, &params, &mut objects.2, &mut error);
            }
            if status == MOR_OK {
                let params = batch_params(threads);
                status = mor_batch_create(objects.0, &params, &mut objects.3, &mut error);
            }
            status
        }
    };
    match steps() {
        MOR_OK => Ok(objects),
        status => {
            assert_eq!(error.status, status);
            assert!(!text(error.text.as_ptr()).is_empty());
            Err(status)
        }
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        unsafe {
            mor_model_free(self.0);
            assert_eq!(mor_tokenizer_free(self.1), MOR_OK);
            assert_eq!(mor_session_free(self.2), MOR_OK);
            assert_eq!(mor_batch_free(self.3), MOR_OK);
        }
    }
}

#[test]
fn every_refused_allocation_is_an_error_and_leaks_nothing() {
    let path = default_model();
    for (copy, threads) in [(false, 1), (true, 2)] {
        let mut points = 0;
        for n in 1.. {
            let before = here().live;
            let (outcome, refused) = refusing(Refuse::Nth(n), || make(&path, copy, threads));
            let outcome = outcome.map(drop);
            assert_eq!(here().live, before, "allocation {n} refused: a leak");
            if refused == 0 {
                assert_eq!(outcome, Ok(()));
                break;
            }
            assert_eq!(outcome, Err(MOR_ERROR_OUT_OF_MEMORY), "allocation {n}");
            // The next attempt works.
            assert!(make(&path, copy, threads).is_ok());
            points = n;
        }
        assert!(points > 100);
        println!("copy {copy}, {threads} threads: {points} allocations refused one by one");
    }
}

/// The address space of this process, in bytes.
#[cfg(target_os = "linux")]
fn address_space() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = pages.split(' ').next().unwrap().parse().unwrap();
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize
}

/// In a process of its own, for other tests map memory meanwhile.
#[cfg(target_os = "linux")]
#[test]
fn a_session_takes_its_plan_and_nothing_else() {
    const CHILD: &str = "MOR_TEST_ALONE";
    if std::env::var_os(CHILD).is_none() {
        let name = "a_session_takes_its_plan_and_nothing_else";
        let program = std::env::current_exe().unwrap();
        let mut child = std::process::Command::new(program);
        let child = child.args([name, "--exact", "--test-threads=1"]);
        let output = child.env(CHILD, "1").output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && told.contains(" 1 passed"),
            "{told}"
        );
        return;
    }
    let path = default_model();
    let mut model = null_mut();
    unsafe {
        let status = mor_model_load(path.as_ptr(), null(), &mut model, null_mut());
        assert_eq!(status, MOR_OK);
        for (context, batch) in [(16, 1), (100, 7), (256, 64)] {
            let mut params: mor_session_params = std::mem::zeroed();
            mor_session_params_init(&mut params, size_of_val(&params));
            (params.context, params.batch, params.threads) = (context, batch, 1);
            let mut plan: mor_session_plan_info = std::mem::zeroed();
            plan.struct_size = size_of_val(&plan);
            let status = mor_session_plan(model, &params, &mut plan, null_mut());
            assert_eq!(status, MOR_OK);
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let mut session = null_mut();
            let space = address_space();
            let heap = here();
            let status = mor_session_create(model, &params, &mut session, null_mut());
            assert_eq!(status, MOR_OK);
            // One map, of whole pages; from the heap nothing.
            assert_eq!(here(), heap);
            let taken = address_space() - space;
            assert_eq!(taken, plan.bytes.next_multiple_of(page));
            assert_eq!(mor_session_free(session), MOR_OK);
            assert_eq!(address_space(), space);
            // In the caller's memory: no byte more, and one byte less is refused.
            let alignment = plan.alignment;
            let layout = std::alloc::Layout::from_size_align(plan.bytes + 64, alignment).unwrap();
            let memory = std::alloc::alloc(layout);
            memory.write_bytes(0xA5, layout.size());
            let space = address_space();
            let heap = here();
            let mut create = |bytes| {
                let memory = memory.cast::<c_void>();
                mor_session_create_in(model, &params, memory, bytes, &mut session, null_mut())
            };
            assert_eq!(create(plan.bytes - 1), MOR_ERROR_BUFFER_TOO_SMALL);
            assert_eq!(create(plan.bytes), MOR_OK);
            let tokens = [1u32; 16];
            let status = mor_session_prefill(session, tokens.as_ptr(), tokens.len());
            assert_eq!(status, MOR_OK);
            assert_eq!(here(), heap);
            assert_eq!(address_space(), space);
            assert_eq!(mor_session_free(session), MOR_OK);
            let behind = std::slice::from_raw_parts(memory.add(plan.bytes), 64);
            assert!(behind.iter().all(|b| *b == 0xA5));
            std::alloc::dealloc(memory, layout);
        }
        mor_model_free(model);
    }
}

/// One block, and from the heap what the plan says.
#[test]
fn a_batch_takes_its_plan() {
    let objects = make(&default_model(), false, 1).unwrap();
    unsafe {
        let mut params = batch_params(1);
        for sequences in [1, 6, 40] {
            params.sequences = sequences;
            let mut plan: mor_batch_plan_info = std::mem::zeroed();
            plan.struct_size = size_of_val(&plan);
            let status = mor_batch_plan(objects.0, &params, &mut plan, null_mut());
            assert_eq!(status, MOR_OK);
            let before = here().live.bytes;
            let mut batch = null_mut();
            let status = mor_batch_create(objects.0, &params, &mut batch, null_mut());
            assert_eq!(status, MOR_OK);
            assert_eq!(here().live.bytes - before, plan.heap_bytes);
            assert_eq!(mor_batch_free(batch), MOR_OK);
            assert_eq!(here().live.bytes, before);

            // The two questions, as Rust answers them.
            let model = mor::Model::open(common::default_model()).unwrap();
            let wanted = rust_params(&params);
            let mut pages = 0;
            let status = mor_batch_pages_for(objects.0, &params, 1.5, &mut pages, null_mut());
            assert_eq!(status, MOR_OK);
            assert_eq!(pages, mor::Plan::pages_for(&model, &wanted, 1.5).unwrap());
            let bytes = plan.bytes;
            let status = mor_batch_plan_in(objects.0, &params, 1.5, bytes, &mut plan, null_mut());
            assert_eq!(status, MOR_OK);
            let expected = mor::Plan::batch_in(&model, &wanted, 1.5, bytes).unwrap();
            let p = expected.params();
            assert_eq!(
                (plan.bytes, plan.sequences, plan.kv_pages),
                (expected.bytes(), p.sequences, p.kv_pages)
            );
        }
    }
}

fn rust_params(params: &mor_batch_params) -> mor::SessionParams {
    mor::SessionParams {
        context: params.context,
        sequences: params.sequences,
        batch: params.rows,
        threads: params.threads as usize,
        kv_pages: params.kv_pages,
        logit_rows: params.logit_rows,
        ..Default::default()
    }
}

/// Structs of earlier and later versions of a program, and wrong ones.
#[test]
fn structs_say_their_size() {
    unsafe {
        let mut params: mor_session_params = std::mem::zeroed();
        let size = size_of_val(&params);
        params.batch = 7;
        assert_eq!(mor_session_params_init(&mut params, size), MOR_OK);
        assert_eq!((params.struct_size, params.batch), (size, 0));
        for wrong in [0, 1, size - 1, 4097, usize::MAX] {
            let status = mor_session_params_init(&mut params, wrong);
            assert_eq!(status, MOR_ERROR_INVALID_ARGUMENT);
        }
        assert_eq!(
            mor_session_params_init(null_mut(), size),
            MOR_ERROR_INVALID_ARGUMENT
        );
        // A later version's struct: fields that are not known here must be zero.
        #[repr(C)]
        struct Later {
            known: mor_sampler_params,
            more: [u64; 2],
        }
        let mut later: Later = std::mem::zeroed();
        let pointer = (&raw mut later).cast::<mor_sampler_params>();
        assert_eq!(mor_sampler_params_init(pointer, size_of::<Later>()), MOR_OK);
        assert_eq!(later.known.struct_size, size_of::<Later>());
        let objects = make(&default_model(), false, 1).unwrap();
        assert_eq!(mor_session_set_sampler(objects.2, pointer), MOR_OK);
        later.more[1] = 1;
        let pointer = (&raw mut later).cast::<mor_sampler_params>();
        assert_eq!(
            mor_session_set_sampler(objects.2, pointer),
            MOR_ERROR_INVALID_ARGUMENT
        );
        let sentence = text(mor_session_last_error(objects.2));
        assert!(sentence.contains("does not know"), "{sentence}");
    }
}

#[test]
fn a_callback_can_cancel_and_nothing_else() {
    struct Seen {
        session: *mut mor_session,
        pieces: usize,
    }
    unsafe extern "C" fn each(seen: *mut c_void, _: *const mor_piece) -> bool {
        unsafe {
            let seen = &mut *seen.cast::<Seen>();
            seen.pieces += 1;
            assert_eq!(mor_session_prefill(seen.session, &1, 1), MOR_ERROR_BUSY);
            assert_eq!(mor_session_free(seen.session), MOR_ERROR_BUSY);
            if seen.pieces == 3 {
                assert_eq!(mor_session_cancel(seen.session), MOR_OK);
            }
        }
        true
    }
    let objects = make(&default_model(), false, 1).unwrap();
    unsafe {
        let session = objects.2;
        assert_eq!(
            mor_session_generate(session, null(), null_mut()),
            MOR_ERROR_NOT_READY
        );
        assert_eq!(mor_session_prefill(session, [5, 6].as_ptr(), 2), MOR_OK);
        assert_eq!(text(mor_session_last_error(session)), "");
        let mut seen = Seen { session, pieces: 0 };
        let mut params: mor_generate_params = std::mem::zeroed();
        mor_generate_params_init(&mut params, size_of_val(&params));
        params.callback = Some(each);
        params.user_data = (&raw mut seen).cast();
        let mut finish = mor_finish::MOR_FINISH_END;
        assert_eq!(mor_session_generate(session, &params, &mut finish), MOR_OK);
        assert_eq!(finish, mor_finish::MOR_FINISH_CANCELLED);
        // The third piece, and the rest of the text, if any was held back.
        assert!((3..=4).contains(&seen.pieces));
        let mut length = 0;
        assert_eq!(mor_session_length(session, &mut length), MOR_OK);
        assert_eq!(length, 5);
    }
}

/// The model's handle goes first; what was made of it lives on.
#[test]
fn a_session_outlives_the_handle_of_its_model() {
    let mut objects = make(&default_model(), true, 2).unwrap();
    unsafe {
        mor_model_free(std::mem::replace(&mut objects.0, null_mut()));
        let (mut token, mut logits) = (0, null());
        assert_eq!(mor_session_step(objects.2, 9, &mut logits), MOR_OK);
        assert_eq!(mor_session_sample(objects.2, &mut token), MOR_OK);
        let (mut bytes, mut count) = (null(), 0);
        let status = mor_tokenizer_token_bytes(objects.1, token, 0, &mut bytes, &mut count);
        assert_eq!(status, MOR_OK);
        let mut request: mor_batch_request = std::mem::zeroed();
        mor_batch_request_init(&mut request, size_of_val(&request));
        (request.prompt, request.prompt_count) = (&token, 1);
        let (mut sequence, mut events) = (0, null());
        let status = mor_batch_add(objects.3, &request, &mut sequence);
        assert_eq!(status, MOR_OK);
        let status = mor_batch_tick(objects.3, &mut events, &mut count);
        assert_eq!(status, MOR_OK);
    }
}

/// An event as Rust has it, told as C does.
fn told(event: &mor::batch::Event) -> mor_batch_event {
    use mor::batch::Event;
    let plain = |sequence: &mor::SequenceId, kind| mor_batch_event {
        sequence: number(*sequence),
        kind,
        token: 0,
        depth: 0,
        finish: mor_finish::MOR_FINISH_END,
    };
    match event {
        Event::Token {
            sequence,
            token,
            depth,
        } => mor_batch_event {
            token: *token,
            depth: (*depth).into(),
            ..plain(sequence, mor_event_kind::MOR_EVENT_TOKEN)
        },
        Event::Evicted(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_EVICTED),
        Event::Resumed(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_RESUMED),
        Event::Full(sequence) => plain(sequence, mor_event_kind::MOR_EVENT_FULL),
        Event::Finished(sequence, finish) => mor_batch_event {
            finish: (*finish).into(),
            ..plain(sequence, mor_event_kind::MOR_EVENT_FINISHED)
        },
        other => panic!("{other:?}"),
    }
}

/// The number that C has for a sequence, which Rust shows in its `Debug` only.
fn number(sequence: mor::SequenceId) -> u64 {
    let text = format!("{sequence:?}");
    let digits = text.trim_start_matches("SequenceId(").trim_end_matches(')');
    digits.parse().unwrap()
}

/// The same requests to a batch by either language: the same events, tokens and depths.
#[test]
fn c_and_rust_run_the_same_batch() {
    let model = mor::Model::open(common::default_model()).unwrap();
    let objects = make(&default_model(), false, 1).unwrap();
    for pressure in [
        mor_pressure::MOR_PRESSURE_EVICT,
        mor_pressure::MOR_PRESSURE_REFUSE,
    ] {
        let mut params = batch_params(2);
        let layers = model.schedule().planes.len();
        // For one that takes every recursion, so that some give way.
        (params.kv_pages, params.pressure) = (layers * 64 / 16, pressure as u32);
        let mut rust = mor::Batch::new(&model, &rust_params(&params)).unwrap();
        rust.set_pressure(match pressure {
            mor_pressure::MOR_PRESSURE_EVICT => mor::batch::Pressure::Evict,
            mor_pressure::MOR_PRESSURE_REFUSE => mor::batch::Pressure::Refuse,
        });
        let mut batch = null_mut();
        unsafe {
            let status = mor_batch_create(objects.0, &params, &mut batch, null_mut());
            assert_eq!(status, MOR_OK);
        }
        let prompt: Vec<u32> = (300..330).collect();
        let mut ids = Vec::new();
        for i in 0..5usize {
            let sampler = mor::SamplerParams {
                seed: i as u64,
                ..Default::default()
            };
            let fork = i == 4;
            let request = mor::Request {
                prompt: &prompt[..3 + 6 * i],
                max_tokens: [usize::MAX, 40, 0, 20, 9][i],
                sampler,
                cut: [None, Some(0.0), None, Some(1.0), None][i],
                depth_limit: [None, None, Some(1), None, None][i],
                priority: [0, 0, 2, -1, 1][i],
                ignore_end: true,
            };
            let mut sequence = 0;
            unsafe {
                let mut sampler: mor_sampler_params = std::mem::zeroed();
                mor_sampler_params_init(&mut sampler, size_of_val(&sampler));
                sampler.seed = i as u64;
                let mut same: mor_batch_request = std::mem::zeroed();
                mor_batch_request_init(&mut same, size_of_val(&same));
                same.prompt = request.prompt.as_ptr();
                same.prompt_count = request.prompt.len();
                same.max_tokens = request.max_tokens;
                same.sampler = &sampler;
                same.cut = request.cut.unwrap_or(same.cut);
                same.depth_limit = request.depth_limit.unwrap_or(0) as u32;
                (same.priority, same.ignore_end) = (request.priority, 1);
                let status = match fork {
                    false => mor_batch_add(batch, &same, &mut sequence),
                    true => mor_batch_fork(batch, number(ids[1]), 5, &same, &mut sequence),
                };
                assert_eq!(status, MOR_OK);
            }
            let id = match fork {
                false => rust.add(&request).unwrap(),
                true => rust.fork(ids[1], 5, &request).unwrap(),
            };
            assert_eq!(number(id), sequence);
            ids.push(id);
        }
        let mut kinds = BTreeSet::new();
        loop {
            let expected: Vec<_> = rust.tick().unwrap().iter().map(told).collect();
            let (mut events, mut count, mut idle) = (null(), 0, false);
            unsafe {
                assert_eq!(mor_batch_tick(batch, &mut events, &mut count), MOR_OK);
                assert_eq!(std::slice::from_raw_parts(events, count), expected);
                assert_eq!(mor_batch_is_idle(batch, &mut idle), MOR_OK);
            }
            kinds.extend(expected.iter().map(|event| event.kind as u32));
            assert_eq!(idle, rust.is_idle());
            if idle {
                break;
            }
        }
        use mor_event_kind::*;
        let given_way = match pressure {
            mor_pressure::MOR_PRESSURE_EVICT => MOR_EVENT_EVICTED,
            mor_pressure::MOR_PRESSURE_REFUSE => MOR_EVENT_FULL,
        };
        for kind in [MOR_EVENT_TOKEN, MOR_EVENT_FINISHED, given_way] {
            assert!(kinds.contains(&(kind as u32)), "{kind:?} in {kinds:?}");
        }
        let (mut tokens, mut depths, mut count) = ([0; 64], [0; 64], 0);
        for id in ids {
            let sequence = number(id);
            let mut state = mor_sequence_status::MOR_SEQUENCE_RUNNING;
            let mut finish = mor_finish::MOR_FINISH_CALLBACK;
            unsafe {
                let to = tokens.as_mut_ptr();
                assert_eq!(
                    mor_batch_tokens(batch, sequence, to, 64, &mut count),
                    MOR_OK
                );
                assert_eq!(&tokens[..count], rust.tokens(id).unwrap());
                let to = depths.as_mut_ptr();
                assert_eq!(
                    mor_batch_depths(batch, sequence, to, 64, &mut count),
                    MOR_OK
                );
                assert_eq!(&depths[..count], rust.depths(id).unwrap());
                let status = mor_batch_sequence_status(batch, sequence, &mut state, &mut finish);
                assert_eq!(status, MOR_OK);
            }
            let expected = match rust.status(id).unwrap() {
                mor::batch::Status::Finished(why) => {
                    (mor_sequence_status::MOR_SEQUENCE_FINISHED, why.into())
                }
                mor::batch::Status::Full => (mor_sequence_status::MOR_SEQUENCE_FULL, finish),
                other => panic!("{other:?} though nothing runs"),
            };
            assert_eq!((state, finish), expected);
        }
        unsafe {
            let mut counters: mor_batch_counters_info = std::mem::zeroed();
            counters.struct_size = size_of_val(&counters);
            assert_eq!(mor_batch_counters(batch, &mut counters), MOR_OK);
            let expected = rust.counters();
            assert_eq!(counters.ticks, expected.ticks);
            assert_eq!(counters.rows, expected.rows);
            assert_eq!(
                (
                    counters.row_capacity,
                    counters.finished,
                    counters.logits,
                    counters.evictions
                ),
                (
                    expected.row_capacity,
                    expected.finished,
                    expected.logits,
                    expected.evictions
                )
            );
            let mut bytes = 0;
            assert_eq!(mor_batch_kv_bytes_used(batch, &mut bytes), MOR_OK);
            assert_eq!(bytes, rust.kv_bytes_used());
            assert_eq!(mor_batch_free(batch), MOR_OK);
        }
    }
}

/// The same objects by either language.
#[test]
fn c_and_rust_compute_the_same_bits() {
    let objects = make(&default_model(), false, 2).unwrap();
    let model = mor::Model::open(common::default_model()).unwrap();
    let params = mor::SessionParams {
        context: 64,
        threads: 1,
        ..Default::default()
    };
    let mut session = mor::Session::new(&model, &params).unwrap();
    for token in [3, 99, 1000, 7] {
        let expected = session.step(token).unwrap();
        let mut logits = null();
        let status = unsafe { mor_session_step(objects.2, token, &mut logits) };
        assert_eq!(status, MOR_OK);
        let logits = unsafe { std::slice::from_raw_parts(logits, expected.len()) };
        assert!(
            logits
                .iter()
                .zip(expected)
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }
}
