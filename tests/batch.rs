//! Properties of a batch: a sequence gets the same bits whoever else is there, whatever gives way to
//! whom; nothing leaks; memory follows the tokens that were active.
#![cfg(feature = "convert")]

mod common;

use common::Random;
use common::cases::*;
use mor::batch::{Event, Finish, Pressure, Status};
use mor::kv::PAGE_TOKENS;
use mor::model::PlaneTokens;
use mor::quant::TensorType;
use mor::sampling::SamplerParams;
use mor::{Batch, Error, KvType, Model, Plan, Request, SequenceId, Session, SessionParams};
use std::collections::HashMap;

/// Kinds that differ in what a pass does.
const KINDS: [&str; 9] = [
    "vanilla",
    "recursive_middle_sequence",
    "expert_middle_cycle",
    "expert_kv_shared",
    "expert_own_attention",
    "expert_mlp_router",
    "expert_aux_router",
    "token_kv_shared",
    "token_loss_free",
];

const CONTEXT: usize = 64;

fn params(sequences: usize, rows: usize, threads: usize, kv_pages: usize) -> SessionParams {
    SessionParams {
        context: CONTEXT,
        sequences,
        batch: rows,
        threads,
        kv: KvType::F16,
        kv_pages,
        logit_rows: 3,
        ..Default::default()
    }
}

/// What a sequence is to do, and what came of it.
#[derive(Clone, Debug)]
struct Job {
    prompt: Vec<u32>,
    max_tokens: usize,
    seed: u64,
    cut: Option<f32>,
}

impl Job {
    fn random(random: &mut Random, vocab: usize) -> Self {
        let length = 1 + random.below(40);
        Job {
            prompt: (0..length).map(|_| random.below(vocab) as u32).collect(),
            max_tokens: random.below(30),
            seed: random.below(1 << 20) as u64,
            cut: [None, None, Some(0.0), Some(0.45), Some(0.55), Some(1.0)][random.below(6)],
        }
    }

    fn sampler(&self) -> SamplerParams {
        SamplerParams {
            seed: self.seed,
            repeat_penalty: 1.1,
            ..Default::default()
        }
    }

    fn request(&self) -> Request<'_> {
        Request {
            prompt: &self.prompt,
            max_tokens: self.max_tokens,
            sampler: self.sampler(),
            cut: self.cut,
            ignore_end: true,
            ..Default::default()
        }
    }

    /// Tokens and depths of a run alone. (The last token that was drawn is not run.)
    fn alone(&self, session: &mut Session) -> (Vec<u32>, Vec<u8>) {
        let trained = session.model().hyperparameters().router.as_ref();
        let trained = trained.map_or(0.5, |r| r.cut);
        session.rewind(0).unwrap();
        session.set_cut(self.cut.unwrap_or(trained)).unwrap();
        session.set_sampler(self.sampler()).unwrap();
        session.prefill(&self.prompt).unwrap();
        let end = (self.prompt.len() + self.max_tokens).min(CONTEXT);
        for known in self.prompt.len()..end {
            let token = session.sample().unwrap();
            if known + 1 == end {
                let tokens = [session.tokens(), &[token]].concat();
                return (tokens, session.depths().to_vec());
            }
            session.prefill(&[token]).unwrap();
        }
        (session.tokens().to_vec(), session.depths().to_vec())
    }
}

fn alone(model: &Model) -> Session {
    Session::new(model, &params(1, 16, 1, 0)).unwrap()
}

/// Runs until nothing more happens. A batch that stands still is a failure.
fn run(batch: &mut Batch) -> Vec<Event> {
    let mut all = Vec::new();
    for _ in 0..100_000 {
        if batch.is_idle() {
            return all;
        }
        all.extend_from_slice(batch.tick().unwrap());
    }
    panic!("the batch does not come to an end: {:?}", batch.counters());
}

#[test]
fn every_sequence_gets_what_it_gets_alone() {
    for case in KINDS {
        for ty in [TensorType::F32, TensorType::Q8_0] {
            let model = model(case, ty);
            let vocab = model.hyperparameters().vocab_size;
            let mut random = Random(11);
            let jobs: Vec<Job> = (0..12).map(|_| Job::random(&mut random, vocab)).collect();
            let mut session = alone(&model);
            let expected: Vec<_> = jobs.iter().map(|job| job.alone(&mut session)).collect();
            for (rows, threads, in_step) in
                [(1, 1, false), (5, 2, false), (24, 1, false), (24, 2, true)]
            {
                let mut batch = Batch::new(&model, &params(12, rows, threads, 0)).unwrap();
                batch.set_in_step(in_step);
                let add = |job: &Job| batch.add(&job.request()).unwrap();
                let ids: Vec<SequenceId> = jobs.iter().map(add).collect();
                let events = run(&mut batch);
                for ((id, job), (tokens, depths)) in ids.iter().zip(&jobs).zip(&expected) {
                    let what = format!("{case} {ty:?} {rows} rows, {threads} threads, {job:?}");
                    assert_eq!(batch.tokens(*id).unwrap(), tokens, "{what}");
                    assert_eq!(batch.depths(*id).unwrap(), depths, "{what}");
                    let told = events.iter().filter_map(|event| match event {
                        Event::Token {
                            sequence, token, ..
                        } if sequence == id => Some(*token),
                        _ => None,
                    });
                    assert_eq!(
                        told.collect::<Vec<_>>(),
                        tokens[job.prompt.len()..],
                        "{what}"
                    );
                    let full = job.prompt.len() + job.max_tokens > CONTEXT;
                    let finish = if full {
                        Finish::ContextFull
                    } else {
                        Finish::Length
                    };
                    assert_eq!(batch.status(*id).unwrap(), Status::Finished(finish));
                    assert!(events.contains(&Event::Finished(*id, finish)));
                    batch.remove(*id).unwrap();
                }
                assert_eq!(batch.kv_bytes_used(), 0);
            }
        }
    }
}

#[test]
fn memory_follows_the_tokens_that_were_active() {
    for case in KINDS {
        let model = model(case, TensorType::F32);
        let vocab = model.hyperparameters().vocab_size;
        let mut random = Random(5);
        let mut batch = Batch::new(&model, &params(6, 16, 1, 0)).unwrap();
        let ids: Vec<_> = (0..6)
            .map(|_| {
                batch
                    .add(&Job::random(&mut random, vocab).request())
                    .unwrap()
            })
            .collect();
        run(&mut batch);
        let mut pages = 0;
        for id in ids {
            // What was drawn last was not run.
            let depths = batch.depths(id).unwrap();
            for plane in &model.schedule().planes {
                let active = |depth: &&u8| match plane.tokens {
                    PlaneTokens::All => true,
                    PlaneTokens::DeeperThan(r) => usize::from(**depth) > r,
                };
                pages += depths.iter().filter(active).count().div_ceil(PAGE_TOKENS);
            }
        }
        let plan = batch.plan();
        let page = plan.kv_bytes() / plan.params().kv_pages;
        assert_eq!(batch.kv_bytes_used(), pages * page, "{case}");
    }
}

/// A storm of sequences of random length, arrival, priority, cancellation and forks through a pool that
/// is too small: every finished one equals its run alone, and the pool is empty at the end.
#[test]
fn a_storm_changes_no_bit_and_leaks_nothing() {
    let total = 1000;
    for (case, share) in [
        ("expert_middle_cycle", total),
        ("expert_kv_shared", total / 10),
        ("token_loss_free", total / 10),
        ("vanilla", total / 10),
        ("recursive_middle_sequence", total / 10),
    ] {
        for pressure in [Pressure::Evict, Pressure::Refuse] {
            storm(case, share, pressure);
        }
    }
}

fn storm(case: &str, total: usize, pressure: Pressure) {
    let model = model(case, TensorType::Q8_0);
    let vocab = model.hyperparameters().vocab_size;
    let planes = model.schedule().planes.len();
    // Enough for about three of the ten sequences, and for the largest one alone.
    let pages = 3 * planes * CONTEXT / PAGE_TOKENS;
    let mut batch = Batch::new(&model, &params(10, 12, 2, pages)).unwrap();
    batch.set_pressure(pressure);
    let mut random = Random(77);
    let mut session = alone(&model);
    let mut jobs: HashMap<SequenceId, Job> = HashMap::new();
    let (mut added, mut compared, mut forks, mut stopped) = (0, 0, 0, 0);
    let (mut evicted, mut resumed, mut full) = (0, 0, 0);
    while added < total || !jobs.is_empty() {
        // Arrivals.
        while added < total && batch.free_places() > 0 && random.below(3) > 0 {
            let ids: Vec<_> = jobs.keys().copied().collect();
            let mut job = Job::random(&mut random, vocab);
            let priority = random.below(3) as i32;
            let id = if !ids.is_empty() && random.below(3) == 0 {
                let mut ids = ids;
                ids.sort();
                let parent = ids[random.below(ids.len())];
                let tokens = batch.tokens(parent).unwrap();
                let length = (1 + random.below(tokens.len())).min(CONTEXT - job.prompt.len());
                let whole = [&tokens[..length], &job.prompt].concat();
                job.cut = jobs[&parent].cut;
                let request = Request {
                    priority,
                    cut: None,
                    ..job.request()
                };
                let id = batch.fork(parent, length, &request).unwrap();
                job.prompt = whole;
                forks += 1;
                id
            } else {
                let request = Request {
                    priority,
                    ..job.request()
                };
                batch.add(&request).unwrap()
            };
            jobs.insert(id, job);
            added += 1;
        }
        let events = batch.tick().unwrap().to_vec();
        let mut done = Vec::new();
        for event in events {
            match event {
                Event::Token { .. } => {}
                Event::Evicted(_) => evicted += 1,
                Event::Resumed(_) => resumed += 1,
                Event::Full(id) => {
                    assert_eq!(batch.status(id).unwrap(), Status::Full);
                    full += 1;
                }
                Event::Finished(id, _) => done.push(id),
                other => panic!("{other:?}"),
            }
        }
        let mut ids: Vec<_> = jobs.keys().copied().collect();
        ids.sort();
        for id in ids {
            let status = batch.status(id).unwrap();
            if matches!(status, Status::Finished(_)) && !done.contains(&id) && random.below(4) > 0 {
                continue;
            }
            if matches!(status, Status::Finished(_)) {
                let (tokens, depths) = jobs[&id].alone(&mut session);
                assert_eq!(batch.tokens(id).unwrap(), tokens, "{case} {pressure:?}");
                assert_eq!(batch.depths(id).unwrap(), depths, "{case} {pressure:?}");
                compared += 1;
                // Some stay for a while, to be forked.
                if random.below(2) == 0 {
                    batch.remove(id).unwrap();
                    jobs.remove(&id);
                }
            } else if random.below(400) == 0 {
                batch.stop(id).unwrap();
                assert_eq!(batch.status(id).unwrap(), Status::Finished(Finish::Stopped));
                let whole = jobs[&id].alone(&mut session).0;
                let part = batch.tokens(id).unwrap();
                assert_eq!(part, &whole[..part.len()]);
                batch.remove(id).unwrap();
                jobs.remove(&id);
                stopped += 1;
            } else if status == Status::Full {
                batch.resume(id).unwrap();
            }
        }
    }
    assert_eq!(batch.kv_bytes_used(), 0, "{case}");
    assert_eq!(batch.free_places(), 10);
    println!(
        "{case} {pressure:?}: {added} sequences, {compared} comparisons, {forks} forks, {stopped} stopped, {evicted} evicted, {resumed} resumed, {full} times full"
    );
    assert!(forks > total / 10 && stopped > 0);
    match pressure {
        Pressure::Evict => assert!(evicted > 0 && resumed > 0),
        Pressure::Refuse => assert!(full > 0 && evicted == 0),
    }
}

/// Sequences that share pages go on in copies of them. Nobody's tokens may depend on when those copies
/// are made, the parent's least of all: here it goes on too.
#[test]
fn forks_get_what_they_get_alone() {
    for case in ["expert_middle_cycle", "vanilla"] {
        let model = model(case, TensorType::Q8_0);
        let vocab = model.hyperparameters().vocab_size as u32;
        let mut batch = Batch::new(&model, &params(4, 16, 1, 0)).unwrap();
        let prompt = |from: u32, length: u32| (from..from + length).map(|i| i * 29 % vocab);
        let job = |prompt: Vec<u32>| Job {
            prompt,
            max_tokens: 5,
            seed: 3,
            cut: None,
        };
        let parent = job(prompt(1, 22).collect());
        let mut all = vec![(batch.add(&parent.request()).unwrap(), parent)];
        while batch.tokens(all[0].0).unwrap().len() < 24 {
            batch.tick().unwrap();
        }
        // Within the first page and the second, and behind all that was run.
        for length in [5, 20, 24] {
            let mut child = job(prompt(length, 2).collect());
            let request = child.request();
            let id = batch.fork(all[0].0, length as usize, &request).unwrap();
            let shared = &batch.tokens(all[0].0).unwrap()[..length as usize];
            child.prompt = [shared, &child.prompt].concat();
            all.push((id, child));
        }
        run(&mut batch);
        let mut session = alone(&model);
        for (id, job) in all {
            let (tokens, depths) = job.alone(&mut session);
            assert_eq!(batch.tokens(id).unwrap(), tokens, "{case} {job:?}");
            assert_eq!(batch.depths(id).unwrap(), depths, "{case} {job:?}");
        }
    }
}

#[test]
fn forks_share_pages() {
    let model = model("expert_middle_cycle", TensorType::F32);
    let mut batch = Batch::new(&model, &params(4, 32, 1, 0)).unwrap();
    let prompt: Vec<u32> = (0..40).collect();
    let only_prompt = Request {
        prompt: &prompt,
        max_tokens: 0,
        ..Default::default()
    };
    let parent = batch.add(&only_prompt).unwrap();
    run(&mut batch);
    let before = batch.kv_bytes_used();
    let child = Request {
        prompt: &[7],
        max_tokens: 0,
        ..Default::default()
    };
    let forks: Vec<_> = (0..3)
        .map(|_| batch.fork(parent, 40, &child).unwrap())
        .collect();
    assert_eq!(batch.kv_bytes_used(), before);
    run(&mut batch);
    // A page at most for each plane: the one that the new token is written to.
    let planes = model.schedule().planes.len();
    let page = batch.plan().kv_bytes() / batch.plan().params().kv_pages;
    assert!(batch.kv_bytes_used() <= before + 3 * planes * page);
    assert!(batch.kv_bytes_used() > before);
    for id in [vec![parent], forks].concat() {
        batch.remove(id).unwrap();
    }
    assert_eq!(batch.kv_bytes_used(), 0);
}

/// A prompt that would need too many pages if all its rows went deep runs in smaller pieces.
#[test]
fn a_tight_pool_takes_fewer_rows_at_a_time() {
    let model = model("expert_middle_cycle", TensorType::F32);
    let planes = &model.schedule().planes;
    let of_all = planes.iter().filter(|p| p.tokens == PlaneTokens::All);
    let first = PlaneTokens::DeeperThan(0);
    let of_first = planes.iter().filter(|p| p.tokens == first).count();
    let prompt: Vec<u32> = (0..CONTEXT as u32).collect();
    for pressure in [Pressure::Evict, Pressure::Refuse] {
        // No token goes on, which nobody knows before: pages for the whole context, and for a sixteenth of one
        // recursion.
        let pages = of_all.clone().count() * CONTEXT / PAGE_TOKENS + of_first;
        let mut batch = Batch::new(&model, &params(1, CONTEXT, 1, pages)).unwrap();
        batch.set_pressure(pressure);
        let request = Request {
            prompt: &prompt,
            max_tokens: 0,
            cut: Some(1.0),
            ..Default::default()
        };
        let id = batch.add(&request).unwrap();
        let events = run(&mut batch);
        assert_eq!(
            events,
            [Event::Finished(id, Finish::Length)],
            "{pressure:?}"
        );
        assert_eq!(batch.depths(id).unwrap(), [0; CONTEXT]);
    }
}

fn with_a_bad_embedding(bytes: &mut [u8]) -> bool {
    spoil_token_5(bytes);
    true
}

/// Of token 5 all is finite until the first router, whose score is too large. Says whether there is a router of one matrix.
fn with_a_bad_score(bytes: &mut [u8]) -> bool {
    let model = Model::from_bytes(bytes.to_vec()).unwrap();
    let Some(router) = model.gguf().tensor("router.0.weight") else {
        return false;
    };
    let embedding = model.gguf().tensor("token_embd.weight").unwrap();
    let columns = embedding.columns();
    for column in 0..columns {
        let weight = router.offset + 4 * column;
        let weight = f32::from_le_bytes(bytes[weight..weight + 4].try_into().unwrap());
        let at = embedding.offset + 4 * (5 * columns + column);
        let value = f32::MAX.copysign(weight);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    for weight in bytes[router.offset..][..router.bytes].chunks_exact_mut(4) {
        let value = 10.0 * f32::from_le_bytes(weight.try_into().unwrap());
        weight.copy_from_slice(&value.to_le_bytes());
    }
    true
}

#[test]
fn what_goes_wrong_with_one_sequence_ends_that_one_only() {
    let poisons: [fn(&mut [u8]) -> bool; 2] = [with_a_bad_embedding, with_a_bad_score];
    let mut bad_scores = 0;
    for (case, poison) in KINDS.iter().flat_map(|case| poisons.map(|p| (*case, p))) {
        let mut bytes = gguf_bytes(case, TensorType::F32);
        if !poison(&mut bytes) {
            continue;
        }
        let bad = Model::from_bytes_on(bytes, device()).unwrap();
        let mut batch = Batch::new(&bad, &params(4, 7, 2, 0)).unwrap();
        let prompt = |length: u32| -> Vec<u32> { (6..6 + length).collect() };
        let jobs = [
            prompt(20),
            prompt(1),
            [prompt(9), vec![5], prompt(9)].concat(),
            prompt(30),
        ];
        let jobs = jobs.map(|prompt| Job {
            prompt,
            max_tokens: 0,
            seed: 1,
            cut: None,
        });
        let ids: Vec<_> = jobs
            .iter()
            .map(|job| batch.add(&job.request()).unwrap())
            .collect();
        run(&mut batch);
        let mut session = alone(&bad);
        for (index, (id, job)) in ids.iter().zip(&jobs).enumerate() {
            if index == 2 {
                let failed = Status::Finished(Finish::Failed);
                assert_eq!(batch.status(*id).unwrap(), failed, "{case}");
                let why = batch.failure(*id).unwrap().unwrap();
                assert!(matches!(why, Error::NotFinite(_)), "{case}: {why}");
                bad_scores += usize::from(why.to_string().contains("router's score"));
                continue;
            }
            let finished = Status::Finished(Finish::Length);
            assert_eq!(batch.status(*id).unwrap(), finished, "{case}");
            assert!(batch.failure(*id).unwrap().is_none());
            assert_eq!(
                batch.depths(*id).unwrap(),
                job.alone(&mut session).1,
                "{case}"
            );
        }
        ids.into_iter().for_each(|id| batch.remove(id).unwrap());
        assert_eq!(batch.kv_bytes_used(), 0);
    }
    assert!(bad_scores > 2, "{bad_scores} scores were too large");
}

/// Some sequences have ended in the tick in which another's logits turn out not to be finite: nothing of
/// theirs may stay in flight, which an ordinary batch would wait for.
#[test]
fn who_ends_beside_a_failure_leaves_nothing_in_flight() {
    let mut bytes = gguf_bytes("expert_middle_cycle", TensorType::F32);
    let model = Model::from_bytes(bytes.clone()).unwrap();
    let own_last = model.gguf().tensor("blk.3.ffn_down.weight").unwrap();
    // So large that the last layer overflows for some tokens.
    for weight in bytes[own_last.offset..][..own_last.bytes].chunks_exact_mut(4) {
        let value = f32::from_le_bytes(weight.try_into().unwrap());
        let value = (f64::from(value) * 10f64.powf(38.4)).clamp(-3e38, 3e38);
        weight.copy_from_slice(&(value as f32).to_le_bytes());
    }
    let bad = Model::from_bytes_on(bytes, device()).unwrap();
    let mut batch = Batch::new(&bad, &params(12, 24, 1, 0)).unwrap();
    batch.set_in_step(true);
    let prompts: Vec<_> = (6..16).map(|token| [token]).collect();
    let add = |batch: &mut Batch, prompt: &[u32]| {
        let request = Request {
            prompt,
            max_tokens: 1,
            ..Default::default()
        };
        batch.add(&request).unwrap()
    };
    let ids: Vec<_> = prompts.iter().map(|p| add(&mut batch, p)).collect();
    run(&mut batch);
    let end = |batch: &Batch, id| batch.status(id).unwrap();
    let count = |finish| {
        let ended = Status::Finished(finish);
        ids.iter().filter(|id| end(&batch, **id) == ended).count()
    };
    assert!(count(Finish::Length) > 0 && count(Finish::Failed) > 0);
    let good = ids
        .iter()
        .position(|id| end(&batch, *id) == Status::Finished(Finish::Length));
    let again = add(&mut batch, &prompts[good.unwrap()]);
    run(&mut batch);
    assert_eq!(end(&batch, again), Status::Finished(Finish::Length));
}

/// With `Refuse` only who needs a page stands still, whatever its rank.
#[test]
fn who_needs_no_page_is_not_halted() {
    let model = model("vanilla", TensorType::F32);
    let planes = model.schedule().planes.len();
    let mut batch = Batch::new(&model, &params(2, 32, 1, 2 * planes)).unwrap();
    batch.set_pressure(Pressure::Refuse);
    // One page is enough for the second to its end, but not for the first.
    let [more, enough] = [(15, 1), (3, 0)].map(|(length, priority)| {
        let prompt: Vec<u32> = (1..=length).collect();
        let request = Request {
            prompt: &prompt,
            max_tokens: 10,
            ignore_end: true,
            priority,
            ..Default::default()
        };
        batch.add(&request).unwrap()
    });
    run(&mut batch);
    assert_eq!(batch.status(more).unwrap(), Status::Full);
    let ended = Status::Finished(Finish::Length);
    assert_eq!(batch.status(enough).unwrap(), ended);
    batch.remove(enough).unwrap();
    batch.resume(more).unwrap();
    run(&mut batch);
    assert_eq!(batch.status(more).unwrap(), ended);
}

/// Who stands still gives its pages to those that run, when that is wanted again; resumed, it goes on as if nothing had been.
#[test]
fn who_stands_still_gives_way_when_sequences_are_evicted() {
    let model = model("vanilla", TensorType::F32);
    let planes = model.schedule().planes.len();
    // One full context.
    let pages = planes * CONTEXT / PAGE_TOKENS;
    let prompt: Vec<u32> = (1..31).collect();
    let request = |priority| Request {
        prompt: &prompt,
        ignore_end: true,
        priority,
        ..Default::default()
    };
    let tokens = {
        let mut batch = Batch::new(&model, &params(1, 32, 1, pages)).unwrap();
        let id = batch.add(&request(0)).unwrap();
        run(&mut batch);
        batch.tokens(id).unwrap().to_vec()
    };
    assert_eq!(tokens.len(), CONTEXT);
    for resumed_first in [0, 1] {
        let mut batch = Batch::new(&model, &params(2, 32, 1, pages)).unwrap();
        batch.set_pressure(Pressure::Refuse);
        let ids = [0, 1].map(|priority| batch.add(&request(priority)).unwrap());
        run(&mut batch);
        assert!(
            ids.iter()
                .all(|id| batch.status(*id).unwrap() == Status::Full)
        );
        batch.set_pressure(Pressure::Evict);
        for id in [ids[resumed_first], ids[1 - resumed_first]] {
            batch.resume(id).unwrap();
            run(&mut batch);
            let ended = Status::Finished(Finish::ContextFull);
            assert_eq!(batch.status(id).unwrap(), ended);
            assert_eq!(batch.tokens(id).unwrap(), tokens);
        }
    }
}

/// Of a pass that generating sequences would fill alone, a prompt has a quarter, and they the rest.
#[test]
fn a_prompt_has_a_quarter_of_a_full_pass() {
    let model = model("vanilla", TensorType::F32);
    let mut batch = Batch::new(&model, &params(9, 8, 1, 0)).unwrap();
    let request = |prompt, max_tokens| Request {
        prompt,
        max_tokens,
        ignore_end: true,
        ..Default::default()
    };
    for _ in 0..8 {
        batch.add(&request(&[6], usize::MAX)).unwrap();
    }
    batch.tick().unwrap();
    let prompt: Vec<u32> = (5..45).collect();
    let id = batch.add(&request(&prompt, 1)).unwrap();
    let (mut ticks, mut others) = (0, 0);
    while !matches!(batch.status(id).unwrap(), Status::Finished(_)) {
        let events = batch.tick().unwrap();
        others += events
            .iter()
            .filter(|event| matches!(event, Event::Token { sequence, .. } if *sequence != id))
            .count();
        ticks += 1;
    }
    assert_eq!((ticks, others), (20, 20 * 6));
}

/// Prompts and generated tokens have their share also of passes of one row.
#[test]
fn passes_of_one_row_starve_nobody() {
    for case in ["vanilla", "expert_middle_cycle"] {
        let model = model(case, TensorType::F32);
        let long = SessionParams {
            context: 2048,
            ..params(3, 1, 1, 0)
        };
        let mut batch = Batch::new(&model, &long).unwrap();
        let request = |prompt, max_tokens| Request {
            prompt,
            max_tokens,
            ignore_end: true,
            ..Default::default()
        };
        let generating = batch.add(&request(&[1], 2000)).unwrap();
        let prompt: Vec<u32> = (1..40).collect();
        let mut prompts: Vec<_> = Vec::new();
        let mut done = 0;
        for _ in 0..1000 {
            while prompts.len() < 2 {
                prompts.push(batch.add(&request(&prompt, 0)).unwrap());
            }
            batch.tick().unwrap();
            prompts.retain(|id| {
                let ended = matches!(batch.status(*id).unwrap(), Status::Finished(_));
                if ended {
                    batch.remove(*id).unwrap();
                    done += 1;
                }
                !ended
            });
        }
        // Each has half of the passes, of which a token takes as many as there are recursions at most; a
        // tenth less, for those that had begun.
        let fair = 1000 / 2 * 9 / 10 / model.hyperparameters().recursions;
        let drawn = batch.tokens(generating).unwrap().len() - 1;
        assert!(
            drawn >= fair,
            "{case}: {drawn} tokens beside {done} prompts"
        );
        assert!(done * prompt.len() >= fair, "{case}: {done} prompts");
    }
}

#[test]
fn what_can_never_run_is_refused_and_changes_nothing() {
    let routed = model("expert_middle_cycle", TensorType::F32);
    let mut batch = Batch::new(&routed, &params(2, 8, 1, 0)).unwrap();
    let argument = |result: mor::Result<SequenceId>, words: &str| match result {
        Err(error @ Error::InvalidArgument(_)) => {
            assert!(error.to_string().contains(words), "{error}");
        }
        other => panic!("{other:?}"),
    };
    let request = |prompt| Request {
        prompt,
        max_tokens: 3,
        ..Default::default()
    };
    argument(batch.add(&request(&[])), "no tokens");
    argument(batch.add(&request(&[1 << 30])), "vocabulary");
    let cut = Some(2.0);
    argument(
        batch.add(&Request {
            cut,
            ..request(&[1])
        }),
        "cut",
    );
    let depth_limit = Some(9);
    argument(
        batch.add(&Request {
            depth_limit,
            ..request(&[1])
        }),
        "depth limit",
    );
    let long = vec![1; CONTEXT + 1];
    assert!(matches!(
        batch.add(&request(&long)),
        Err(Error::ContextFull { .. })
    ));
    let a = batch.add(&request(&[1, 2])).unwrap();
    argument(batch.fork(a, 3, &request(&[1])), "has 2");
    let cut = Some(0.9);
    argument(
        batch.fork(
            a,
            2,
            &Request {
                cut,
                ..request(&[1])
            },
        ),
        "parent",
    );
    let b = batch.add(&request(&[3])).unwrap();
    assert!(matches!(batch.add(&request(&[1])), Err(Error::NotReady(_))));
    batch.remove(a).unwrap();
    assert!(batch.remove(a).is_err() && batch.tokens(a).is_err() && batch.status(a).is_err());
    let c = batch.add(&request(&[1])).unwrap();
    assert!(c != a && c != b);
    run(&mut batch);
    assert_eq!(batch.tokens(b).unwrap().len(), 4);

    let plain = model("recursive_middle_cycle", TensorType::F32);
    let mut batch = Batch::new(&plain, &params(2, 8, 1, 0)).unwrap();
    let depth_limit = Some(1);
    argument(
        batch.add(&Request {
            depth_limit,
            ..request(&[1])
        }),
        "without routers",
    );
}

#[test]
fn the_plan_answers_in_both_directions() {
    let model = model("expert_middle_cycle", TensorType::F32);
    let wanted = params(1, 16, 1, 0);
    // Where keys and values are.
    let takes = |plan: &Plan| match plan.device_bytes() {
        0 => plan.bytes(),
        on_gpu => on_gpu,
    };
    for bytes in [400_000, 1 << 20, 8 << 20] {
        let plan = Plan::batch_in(&model, &wanted, 2.0, bytes).unwrap();
        assert!(takes(&plan) <= bytes);
        let more = SessionParams {
            sequences: plan.params().sequences + 1,
            ..wanted.clone()
        };
        let kv_pages = Plan::pages_for(&model, &more, 2.0).unwrap();
        let more = Plan::batch(&model, &SessionParams { kv_pages, ..more }).unwrap();
        assert!(takes(&more) > bytes);
        // A deeper mean leaves room for fewer.
        let deeper = Plan::batch_in(&model, &wanted, 3.0, bytes).unwrap();
        assert!(deeper.params().sequences <= plan.params().sequences);
    }
    // Pages for the context in each plane, of the three recursions' planes for the share of tokens
    // that come there, and half a page for each plane's last.
    let long = params(5, 16, 1, 0);
    let planes = &model.schedule().planes;
    let everyone = planes
        .iter()
        .filter(|p| p.tokens == PlaneTokens::All)
        .count();
    let block = (planes.len() - everyone) / 3;
    let pages = CONTEXT / PAGE_TOKENS;
    for mean_depth in [1, 2, 3] {
        let sequence = 2 * pages * (everyone + mean_depth * block) + planes.len();
        let all = Plan::pages_for(&model, &long, mean_depth as f64).unwrap();
        assert_eq!(all, (5 * sequence).div_ceil(2));
    }
    // Many short sequences: more rows than one of them has tokens, and rows of logits for all.
    let short = SessionParams {
        context: 8,
        logit_rows: 0,
        ..params(12, 32, 1, 0)
    };
    let plan = Plan::batch(&model, &short).unwrap();
    assert_eq!((plan.params().batch, plan.params().logit_rows), (32, 12));
    for (sequences, context) in [(0, 16), (1 << 20, 16), (1, usize::MAX)] {
        let nobodys = SessionParams {
            sequences,
            context,
            ..wanted.clone()
        };
        assert!(Plan::pages_for(&model, &nobodys, 2.0).is_err());
    }
    assert!(Plan::batch_in(&model, &wanted, 2.0, 1000).is_err());
    assert!(Plan::batch_in(&model, &wanted, 4.0, 1 << 20).is_err());
}
