//! After load nothing is allocated and nothing is freed, on any thread, whatever mix of calls comes.
//! A program without the test harness, whose own threads allocate now and then: it counts the
//! allocations of all threads.

mod common;

use common::Random;
use common::allocator::{Allocator, everywhere};
use mor::ffi::{mor_status::*, *};
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Calls, or as many as MOR_TEST_STEPS says, for devices that are emulated.
fn steps() -> usize {
    let steps = std::env::var("MOR_TEST_STEPS").ok();
    steps.map_or(10_000, |steps| steps.parse().unwrap())
}

const CONTEXT: usize = 96;
const KINDS: usize = 20;
const SEQUENCES: usize = 5;

/// Everything that a host would keep, made before the counting begins.
struct Host {
    model: *mut mor_model,
    tokenizer: *mut mor_tokenizer,
    session: *mut mor_session,
    batch: *mut mor_batch,
    /// Sequences of the batch, and what was seen of its events by kind.
    sequences: Vec<u64>,
    events: [usize; 5],
    info: mor_model_info,
    random: Random,
    tokens: Vec<u32>,
    text: Vec<u8>,
    state: Vec<u8>,
    saved: usize,
    /// How often each kind of call ran.
    calls: [usize; KINDS],
}

impl Host {
    fn new(path: &str) -> Self {
        let path = CString::new(path).unwrap();
        let (mut model, mut tokenizer, mut session) = (null_mut(), null_mut(), null_mut());
        let mut info: mor_model_info = unsafe { std::mem::zeroed() };
        info.struct_size = size_of_val(&info);
        let mut params: mor_session_params = unsafe { std::mem::zeroed() };
        unsafe {
            let none = null_mut();
            let mut load: mor_model_params = std::mem::zeroed();
            mor_model_params_init(&mut load, size_of_val(&load));
            if common::on_gpu() {
                load.device = mor_device::MOR_DEVICE_CUDA as u8;
            }
            assert_eq!(
                mor_model_load(path.as_ptr(), &load, &mut model, none),
                MOR_OK
            );
            assert_eq!(mor_model_describe(model, &mut info), MOR_OK);
            assert_eq!(
                mor_tokenizer_create(model, null(), &mut tokenizer, none),
                MOR_OK
            );
            mor_session_params_init(&mut params, size_of_val(&params));
            (params.context, params.batch, params.threads) = (CONTEXT, 8, 2);
            assert_eq!(
                mor_session_create(model, &params, &mut session, none),
                MOR_OK
            );
            // The largest state: a full context in which every token took every recursion.
            let mut plan: mor_session_plan_info = std::mem::zeroed();
            plan.struct_size = size_of_val(&plan);
            assert_eq!(mor_session_plan(model, &params, &mut plan, none), MOR_OK);
            let mut params: mor_batch_params = std::mem::zeroed();
            mor_batch_params_init(&mut params, size_of_val(&params));
            (params.context, params.rows, params.threads) = (CONTEXT, 8, 2);
            (params.sequences, params.logit_rows) = (SEQUENCES, 2);
            // For half of a sequence that takes every recursion: some give way, some never fit.
            params.kv_pages = info.logical_layers as usize * (CONTEXT / 2).div_ceil(16);
            let mut batch = null_mut();
            assert_eq!(mor_batch_create(model, &params, &mut batch, none), MOR_OK);
            Host {
                model,
                tokenizer,
                session,
                batch,
                sequences: Vec::with_capacity(SEQUENCES),
                events: [0; 5],
                info,
                random: Random(7),
                tokens: vec![0; 256],
                text: vec![0; 4096],
                state: vec![0; plan.kv_bytes + CONTEXT * 8 + 8 * info.hidden_size as usize + 256],
                saved: 0,
                calls: [0; KINDS],
            }
        }
    }

    fn length(&self) -> usize {
        let mut length = 0;
        unsafe { mor_session_length(self.session, &mut length) };
        length
    }

    fn some_tokens(&mut self, count: usize) {
        // Early ids: every vocabulary has them, and they are no control tokens of SmolLM2's.
        for i in 0..count {
            self.tokens[i] = 300 + self.random.below(3000) as u32;
        }
    }

    /// One random call; every outcome must be one of those that it may have.
    fn step(&mut self) {
        let session = self.session;
        // Often enough room, sometimes not.
        if self.length() + 8 > CONTEXT && self.random.below(10) > 0 {
            let to = self.random.below(40);
            assert_eq!(unsafe { mor_session_rewind(session, to) }, MOR_OK);
        }
        let kind = self.random.below(KINDS);
        self.calls[kind] += 1;
        unsafe {
            match kind {
                0..=2 => {
                    self.some_tokens(1);
                    let mut logits = null();
                    let status = mor_session_step(session, self.tokens[0], &mut logits);
                    assert!(matches!(status, MOR_OK | MOR_ERROR_CONTEXT_FULL));
                }
                3 => {
                    let count = 1 + self.random.below(12);
                    self.some_tokens(count);
                    let tokens = self.tokens.as_ptr();
                    if self.random.below(2) == 0 {
                        let status = mor_session_prefill(session, tokens, count);
                        assert!(matches!(status, MOR_OK | MOR_ERROR_CONTEXT_FULL));
                    } else {
                        let mut numbers = [1.0; 12];
                        let out = numbers.as_mut_ptr();
                        let status = mor_session_log_probabilities(session, tokens, count, out);
                        match status {
                            MOR_OK => assert!(numbers[..count].iter().all(|n| *n <= 0.0)),
                            MOR_ERROR_CONTEXT_FULL | MOR_ERROR_NOT_READY => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
                4 => {
                    let mut params: mor_sampler_params = std::mem::zeroed();
                    mor_sampler_params_init(&mut params, size_of_val(&params));
                    params.temperature = [0.0, 0.7, 1.5][self.random.below(3)];
                    params.top_k = [0, 1, 40][self.random.below(3)];
                    params.top_p = [1.0, 0.9][self.random.below(2)];
                    params.min_p = [0.0, 0.05][self.random.below(2)];
                    params.repeat_penalty = [1.0, 1.2][self.random.below(2)];
                    params.seed = self.random.next();
                    assert_eq!(mor_session_set_sampler(session, &params), MOR_OK);
                    let mut token = 0;
                    let status = mor_session_sample(session, &mut token);
                    assert!(matches!(status, MOR_OK | MOR_ERROR_NOT_READY));
                }
                5 | 6 => {
                    self.some_tokens(3);
                    mor_session_prefill(session, self.tokens.as_ptr(), 3);
                    self.generate();
                }
                7 => self.tokenize(),
                8 => {
                    let mut size = 0;
                    assert_eq!(mor_session_save_size(session, &mut size), MOR_OK);
                    let buffer = self.state.as_mut_ptr().cast::<c_void>();
                    let capacity = self.state.len();
                    assert_eq!(
                        mor_session_save(session, buffer, capacity, &mut self.saved),
                        MOR_OK
                    );
                    assert_eq!(size, self.saved);
                }
                9 => {
                    let state = self.state.as_ptr().cast();
                    let status = mor_session_restore(session, state, self.saved);
                    let expected = match self.saved {
                        0 => MOR_ERROR_STATE,
                        _ => MOR_OK,
                    };
                    assert_eq!(status, expected);
                }
                10 => {
                    let to = self.random.below(self.length() + 1);
                    assert_eq!(mor_session_rewind(session, to), MOR_OK);
                }
                11 => {
                    self.some_tokens(5);
                    assert_eq!(mor_session_cancel(session), MOR_OK);
                    let status = mor_session_prefill(session, self.tokens.as_ptr(), 5);
                    // A text that does not fit is refused before it can be cancelled.
                    assert!(matches!(
                        status,
                        MOR_ERROR_CANCELLED | MOR_ERROR_CONTEXT_FULL
                    ));
                    mor_session_reset_cancel(session);
                }
                12 => {
                    let limit = 1 + self.random.below(self.info.recursions as usize) as u32;
                    assert_eq!(mor_session_set_depth_limit(session, limit), MOR_OK);
                    let cut = [0.0, 0.5, 0.6][self.random.below(3)];
                    assert_eq!(mor_session_set_cut(session, cut), MOR_OK);
                    let budget = [0, 1, 100_000][self.random.below(3)];
                    assert_eq!(mor_session_set_time_budget(session, budget), MOR_OK);
                }
                13 => {
                    let mut counts = [0; 65];
                    let status =
                        mor_session_depth_histogram(session, counts.as_mut_ptr(), counts.len());
                    assert_eq!(status, MOR_OK);
                    assert_eq!(counts.iter().sum::<u64>(), self.length() as u64);
                    let length = self.length();
                    let tokens = self.tokens.as_mut_ptr();
                    assert_eq!(mor_session_tokens(session, 0, length, tokens), MOR_OK);
                    let depths = self.text.as_mut_ptr();
                    assert_eq!(mor_session_depths(session, 0, length, depths), MOR_OK);
                }
                // Mistakes cost nothing either.
                14 => {
                    let outside = [self.info.vocab_size];
                    let status = mor_session_prefill(session, outside.as_ptr(), 1);
                    assert_eq!(status, MOR_ERROR_INVALID_ARGUMENT);
                    let sentence = CStr::from_ptr(mor_session_last_error(session));
                    assert!(sentence.to_bytes().starts_with(b"token "));
                    let status = mor_session_set_cut(session, f32::NAN);
                    assert_eq!(status, MOR_ERROR_INVALID_ARGUMENT);
                }
                15 => {
                    let mut logits = null();
                    let status = mor_session_logits(session, &mut logits, null_mut());
                    assert!(matches!(status, MOR_OK | MOR_ERROR_NOT_READY));
                }
                16 | 17 => self.tick(),
                18 => self.request(),
                _ => self.ask_batch(),
            }
        }
    }

    unsafe fn generate(&mut self) {
        unsafe extern "C" fn each(_: *mut c_void, piece: *const mor_piece) -> bool {
            // Found where it is said to end.
            unsafe { *(*piece).text.add((*piece).text_bytes) == 0 }
        }
        let stop = [c"the".as_ptr(), c"\n\n".as_ptr()];
        unsafe {
            let mut params: mor_generate_params = std::mem::zeroed();
            mor_generate_params_init(&mut params, size_of_val(&params));
            params.max_tokens = self.random.below(4);
            (params.stop, params.stop_count) = (stop.as_ptr(), stop.len());
            params.callback = Some(each);
            let mut finish = mor_finish::MOR_FINISH_CANCELLED;
            let status = mor_session_generate(self.session, &params, &mut finish);
            assert!(matches!(status, MOR_OK | MOR_ERROR_NOT_READY));
            // Nobody cancels, and the callback ends it only where the zero byte is missing.
            let ended_by = [
                mor_finish::MOR_FINISH_CANCELLED,
                mor_finish::MOR_FINISH_CALLBACK,
            ];
            assert!(
                status != MOR_OK || !ended_by.contains(&finish),
                "{finish:?}"
            );
        }
    }

    unsafe fn tick(&mut self) {
        for _ in 0..1 + self.random.below(8) {
            let (mut events, mut count) = (null(), 0);
            unsafe {
                assert_eq!(mor_batch_tick(self.batch, &mut events, &mut count), MOR_OK);
                for event in std::slice::from_raw_parts(events, count) {
                    assert!(self.sequences.contains(&event.sequence));
                    self.events[event.kind as usize] += 1;
                }
            }
        }
    }

    /// A new sequence, or a fork; when there is no place for it, another is removed.
    unsafe fn request(&mut self) {
        let count = 1 + self.random.below(12);
        self.some_tokens(count);
        let mut sequence = 0;
        unsafe {
            let mut sampler: mor_sampler_params = std::mem::zeroed();
            mor_sampler_params_init(&mut sampler, size_of_val(&sampler));
            (sampler.seed, sampler.repeat_penalty) = (self.random.next(), 1.1);
            let mut request: mor_batch_request = std::mem::zeroed();
            mor_batch_request_init(&mut request, size_of_val(&request));
            (request.prompt, request.prompt_count) = (self.tokens.as_ptr(), count);
            request.max_tokens = [0, 3, 30, usize::MAX][self.random.below(4)];
            request.sampler = &sampler;
            request.priority = self.random.below(3) as i32;
            let full = self.sequences.len() == SEQUENCES;
            let status = if self.random.below(3) == 0 && !self.sequences.is_empty() {
                let parent = self.sequences[self.random.below(self.sequences.len())];
                mor_batch_fork(self.batch, parent, 1, &request, &mut sequence)
            } else {
                request.cut = [-1.0, 0.0, 0.6][self.random.below(3)];
                mor_batch_add(self.batch, &request, &mut sequence)
            };
            if full {
                assert_eq!(status, MOR_ERROR_NOT_READY);
                let which = self.random.below(SEQUENCES);
                let oldest = self.sequences.swap_remove(which);
                assert_eq!(mor_batch_remove(self.batch, oldest), MOR_OK);
                let status = mor_batch_remove(self.batch, oldest);
                assert_eq!(status, MOR_ERROR_INVALID_ARGUMENT);
            } else {
                assert_eq!(status, MOR_OK);
                self.sequences.push(sequence);
            }
        }
    }

    /// Everything else that a batch can be asked, of one of its sequences.
    unsafe fn ask_batch(&mut self) {
        let batch = self.batch;
        let (mut idle, mut bytes, mut count) = (false, 0, 0);
        unsafe {
            let mut counters: mor_batch_counters_info = std::mem::zeroed();
            counters.struct_size = size_of_val(&counters);
            assert_eq!(mor_batch_counters(batch, &mut counters), MOR_OK);
            assert_eq!(mor_batch_is_idle(batch, &mut idle), MOR_OK);
            assert_eq!(mor_batch_kv_bytes_used(batch, &mut bytes), MOR_OK);
            let in_step = self.random.below(4) == 0;
            assert_eq!(mor_batch_set_in_step(batch, in_step), MOR_OK);
            let Some(sequence) = self.sequences.last().copied() else {
                return;
            };
            let mut state = mor_sequence_status::MOR_SEQUENCE_WAITING;
            let status = mor_batch_sequence_status(batch, sequence, &mut state, null_mut());
            assert_eq!(status, MOR_OK);
            let tokens = self.tokens.as_mut_ptr();
            let status = mor_batch_tokens(batch, sequence, tokens, CONTEXT, &mut count);
            assert_eq!(status, MOR_OK);
            let depths = self.text.as_mut_ptr();
            let status = mor_batch_depths(batch, sequence, depths, CONTEXT, &mut count);
            assert_eq!(status, MOR_OK);
            let status = mor_batch_tokens(batch, sequence, null_mut(), 0, &mut count);
            assert_eq!(status, MOR_ERROR_BUFFER_TOO_SMALL);
            let mut failure: mor_error = std::mem::zeroed();
            assert_eq!(mor_batch_failure(batch, sequence, &mut failure), MOR_OK);
            assert_eq!(failure.status, MOR_OK);
            assert_eq!(mor_batch_resume(batch, sequence), MOR_OK);
            if self.random.below(4) == 0 {
                assert_eq!(mor_batch_stop(batch, sequence), MOR_OK);
            }
        }
    }

    unsafe fn tokenize(&mut self) {
        const TEXT: &CStr =
            c"It is a truth, 1234 of them: na\xc3\xafve \xe6\xbc\xa2\xe5\xad\x97!\n";
        let mut count = 0;
        let flags = MOR_ENCODE_ADD_SPECIAL | MOR_ENCODE_PARSE_SPECIAL;
        let tokens = self.tokens.as_mut_ptr();
        unsafe {
            let status = mor_tokenizer_encode(
                self.tokenizer,
                TEXT.as_ptr(),
                MOR_ZERO_TERMINATED,
                flags,
                tokens,
                self.tokens.len(),
                &mut count,
            );
            assert_eq!(status, MOR_OK);
            let mut bytes = 0;
            let buffer = self.text.as_mut_ptr().cast::<c_char>();
            let capacity = self.text.len();
            let status = mor_tokenizer_decode(
                self.tokenizer,
                tokens,
                count,
                0,
                buffer,
                capacity,
                &mut bytes,
            );
            assert_eq!(status, MOR_OK);
            assert_eq!(CStr::from_ptr(buffer), TEXT);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        unsafe {
            mor_model_free(self.model);
            assert_eq!(mor_session_free(self.session), MOR_OK);
            assert_eq!(mor_batch_free(self.batch), MOR_OK);
            assert_eq!(mor_tokenizer_free(self.tokenizer), MOR_OK);
        }
    }
}

fn main() {
    // Once: asking for it allocates.
    let steps = steps();
    let model = common::default_model();
    let mut models = vec![model.into_os_string().into_string().unwrap()];
    // The real Llama file, where there is one (see tests/smollm2.rs).
    models.extend(std::env::var("MOR_TEST_SMOLLM2"));
    for path in models {
        let before = everywhere();
        let mut host = Host::new(&path);
        let loaded = everywhere();
        for _ in 0..steps {
            host.step();
        }
        let after = everywhere();
        // Each kind is as likely as another, but some calls need what others leave behind.
        let least = steps / KINDS / 4;
        assert!(host.calls.iter().all(|n| *n > least), "{:?}", host.calls);
        // Some events are rare.
        let enough = steps < 10_000 || host.events.iter().all(|n| *n > 0);
        assert!(enough, "{:?}", host.events);
        assert_eq!(after, loaded, "{path}");
        assert!(
            loaded.allocations > before.allocations,
            "the counter counts"
        );
        drop(host);
        assert_eq!(everywhere().live, before.live, "{path}: all is given back");
        println!("{steps} mixed calls on {path}: 0 allocations, 0 frees");
    }
}
