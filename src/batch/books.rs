//! The books of a batch: who is there, who runs next, and what comes of a tick.

use super::{Counters, Event, Finish, OnGpu, Pressure, SequenceId};
use crate::cpu::{Pass, logits};
use crate::error::{Error, Result};
use crate::memory::reserved;
use crate::order::sort_by;
use crate::plan::{Plan, Row};
use crate::sampling::{Sampler, SamplerParams};
use std::cmp::Reverse;
use std::ops::Range;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nobody is here.
    Free,
    /// For pages; `evicted` when it has run before.
    Waiting {
        evicted: bool,
    },
    Running,
    /// Stands still: there was no page for it.
    Full,
    Finished(Finish),
}

/// A sequence. Of its `known` tokens the first `entered` have begun to run, and the first `done` of
/// these have passed all layers: `done <= entered <= known`.
pub(super) struct Sequence {
    pub id: SequenceId,
    pub state: State,
    pub priority: i32,
    pub sampler: Sampler,
    pub known: usize,
    pub entered: usize,
    pub done: usize,
    /// Tokens of which it is known how deep they go: the most that were ever done.
    pub measured: usize,
    /// It ends when it knows so many tokens.
    pub end: usize,
    /// Why, when it does.
    pub end_reason: Finish,
    pub ignore_end: bool,
    pub failure: Option<Error>,
}

impl Sequence {
    /// Under pressure the least gives way first.
    pub fn rank(&self) -> (i32, Reverse<u64>) {
        (self.priority, Reverse(self.id.0 / SequenceId::PLACES))
    }

    /// Its token at `position` has passed all layers. Returns whether no known one is left.
    pub fn note_done(&mut self, position: usize) -> bool {
        self.done = position + 1;
        self.measured = self.measured.max(self.done);
        self.done == self.known
    }

    /// Tokens that could enter.
    fn pending(&self) -> usize {
        match self.state {
            State::Running => self.known - self.entered,
            _ => 0,
        }
    }
}

/// Events of a sequence in one tick: it is resumed, evicted or refused once, then may draw a token and
/// end.
pub(crate) const MAX_EVENTS: usize = 4;

pub(super) struct Books {
    /// One for each place.
    pub sequences: Vec<Sequence>,
    pub pressure: Pressure,
    pub in_step: bool,
    pub events: Vec<Event>,
    /// Whether the caller has got them.
    pub told: bool,
    pub counters: Counters,
    /// As in [`Pass`], between two ticks.
    pub flying: usize,
    pub left: usize,
    /// Slots that no row has.
    pub free_slots: Vec<u32>,
    /// Rows that wait for others before them, and then those whose logits are wanted; only during a tick.
    pub waiting: Vec<u32>,
    /// Places at which to begin when tokens are chosen: those with one to run, those with several.
    turns: [usize; 2],
    /// Whether an odd place, which cannot be halved, is for prompts this time.
    odd_to_prompts: bool,
    arrivals: u64,
    /// Rows of a pass.
    rows: usize,
    logit_rows: usize,
    pub context: usize,
}

/// Bytes of the heap that [`Books::new`] takes, and [`super::Batch`] for the settings.
pub(crate) fn heap_bytes(sequences: usize, slots: usize) -> usize {
    let each =
        size_of::<Sequence>() + size_of::<crate::cpu::Settings>() + MAX_EVENTS * size_of::<Event>();
    sequences * each + 2 * slots * size_of::<u32>()
}

impl Books {
    pub fn new(plan: &Plan) -> Result<Self> {
        let params = plan.params();
        let mut sequences = reserved(params.sequences)?;
        for _ in 0..params.sequences {
            sequences.push(Sequence {
                id: SequenceId(0),
                state: State::Free,
                priority: 0,
                sampler: Sampler::new(SamplerParams::default())?,
                known: 0,
                entered: 0,
                done: 0,
                measured: 0,
                end: 0,
                end_reason: Finish::Length,
                ignore_end: false,
                failure: None,
            });
        }
        let mut free_slots = reserved(plan.slots())?;
        free_slots.extend((0..plan.slots() as u32).rev());
        Ok(Books {
            sequences,
            pressure: Pressure::default(),
            in_step: false,
            events: reserved(MAX_EVENTS * params.sequences)?,
            told: true,
            counters: Counters::default(),
            flying: 0,
            left: 0,
            free_slots,
            waiting: reserved(plan.slots())?,
            turns: [0; 2],
            odd_to_prompts: true,
            arrivals: 0,
            rows: params.batch,
            logit_rows: params.logit_rows,
            context: params.context,
        })
    }

    /// Notes what happened. Where ticks have failed and there is no room, the first is forgotten.
    pub fn note(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS * self.sequences.len() {
            self.events.remove(0);
        }
        self.events.push(event);
    }

    /// Rows of a pass.
    #[cfg(feature = "cuda")]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The place of a sequence.
    pub fn find(&self, id: SequenceId) -> Result<usize> {
        let place = id.place();
        match self.sequences.get(place) {
            Some(s) if s.id == id && s.state != State::Free => Ok(place),
            _ => Err(Error::argument(format_args!(
                "there is no sequence {}; it may have been removed",
                id.0
            ))),
        }
    }

    /// A place for a new sequence, and its name.
    pub fn free_place(&mut self) -> Result<(usize, SequenceId)> {
        let free = self.sequences.iter().position(|s| s.state == State::Free);
        let place = free.ok_or_else(|| {
            Error::not_ready(format_args!(
                "all {} places of the batch are taken; remove a sequence first, or plan for more",
                self.sequences.len()
            ))
        })?;
        self.arrivals += 1;
        Ok((
            place,
            SequenceId(self.arrivals * SequenceId::PLACES + place as u64),
        ))
    }

    pub fn tick(&mut self, pass: &mut Pass, gpu: OnGpu) -> Result<()> {
        self.start_waiting(pass);
        let mut new = self.choose(pass);
        new = self.make_room(pass, new);
        // On a GPU rows may have to wait although nobody is before them: a launch takes so many.
        if pass.flying + new + pass.left == 0 {
            return Ok(());
        }
        pass.culprit = None;
        let outcome = match gpu {
            #[cfg(feature = "cuda")]
            Some(gpu) => self.run_on_gpu(pass, gpu, new),
            _ => self.run(pass, new),
        };
        let Err(error) = outcome else {
            return Ok(());
        };
        let culprit = pass
            .culprit
            .map(|slot| pass.buffers.rows[slot as usize].sequence);
        for place in 0..self.sequences.len() {
            if self.sequences[place].state == State::Running {
                self.set_back(pass, place, false);
            }
        }
        // Rows of sequences that ended before the error came.
        let rest = &pass.buffers.left[..pass.left];
        self.free_slots.extend_from_slice(rest);
        pass.left = 0;
        let Some(place) = culprit else {
            return Err(error);
        };
        self.sequences[place as usize].failure = Some(error);
        self.end(place as usize, Finish::Failed);
        Ok(())
    }

    /// Chooses the tokens that enter: slots `active[flying..]`. Sequences with one token to run come
    /// first, in turn; those with several, prompts, share what is left, and are sure of a quarter of
    /// the pass.
    fn choose(&mut self, pass: &mut Pass) -> usize {
        if self.in_step && pass.flying + pass.left > 0 {
            return 0;
        }
        let places = (self.rows - pass.flying).min(self.free_slots.len());
        let count = self.sequences.len();
        let prompts = self.sequences.iter().filter(|s| s.pending() > 1).count();
        let kept_free = match prompts {
            0 => 0,
            _ => (self.rows / 4)
                .max(1)
                .min((places + usize::from(self.odd_to_prompts)) / 2),
        };
        let single = |s: &Sequence| s.pending() == 1;
        if prompts > 0 && !places.is_multiple_of(2) && self.sequences.iter().any(single) {
            self.odd_to_prompts = !self.odd_to_prompts;
        }
        let mut new = 0;
        let begin = self.turns[0];
        for place in (begin..count).chain(0..begin) {
            if self.sequences[place].pending() != 1 {
                continue;
            }
            if new == places - kept_free {
                self.turns[0] = place;
                break;
            }
            new = self.let_in(pass, place, 1, new);
        }
        let begin = self.turns[1];
        let mut others = prompts;
        for place in (begin..count).chain(0..begin) {
            let pending = self.sequences[place].pending();
            if others == 0 || pending <= 1 {
                continue;
            }
            let share = (places - new).div_ceil(others).min(pending);
            if share == 0 {
                self.turns[1] = place;
                break;
            }
            new = self.let_in(pass, place, share, new);
            others -= 1;
            // The next tick begins with the next.
            if others + 1 == prompts {
                self.turns[1] = (place + 1) % count;
            }
        }
        new
    }

    fn let_in(&mut self, pass: &mut Pass, place: usize, rows: usize, mut new: usize) -> usize {
        let sequence = &mut self.sequences[place];
        for position in sequence.entered..sequence.entered + rows {
            let Some(slot) = self.free_slots.pop() else {
                break;
            };
            let b = &mut *pass.buffers;
            b.active[pass.flying + new] = slot;
            b.rows[slot as usize] = Row {
                sequence: place as u32,
                position: position as u32,
                token: b.tokens[place * self.context + position],
                recursion: 0,
            };
            sequence.entered += 1;
            new += 1;
        }
        new
    }

    fn run(&mut self, pass: &mut Pass, new: usize) -> Result<()> {
        pass.enter(new)?;
        self.counters.ticks += 1;
        self.counters.row_capacity += self.rows as u64;
        for slot in &pass.buffers.active[..pass.flying] {
            let recursion = pass.buffers.rows[*slot as usize].recursion;
            self.counters.rows[recursion as usize] += 1;
        }
        if pass.flying > 0 {
            pass.recurse()?;
        }
        let ready = self.find_ready(pass);
        for first in (0..ready).step_by(self.rows) {
            let rows = first..(first + self.rows).min(ready);
            pass.finish(rows.clone())?;
            self.counters.finished += rows.len() as u64;
            self.finish(pass, rows)?;
        }
        // The slots of those that are done are free; the others wait on.
        self.free_slots
            .extend_from_slice(&pass.buffers.left[..ready]);
        pass.buffers.left.copy_within(ready..pass.left, 0);
        pass.left -= ready;
        Ok(())
    }

    /// Of the rows that have left the recursions those may go on that follow upon their sequence's
    /// last done token: own last layers attend to all tokens before. They come to the front of
    /// `left`, by sequence and position; returns how many they are.
    fn find_ready(&mut self, pass: &mut Pass) -> usize {
        let mut next = (u32::MAX, 0);
        self.bring_forward(pass, |sequences, _, (sequence, position)| {
            if next.0 != sequence {
                next = (sequence, sequences[sequence as usize].done as u32);
            }
            let follows = position == next.1;
            next.1 += u32::from(follows);
            follows
        })
    }

    /// Brings those slots of `left` to its front for which `is_ready(sequences, slot, (sequence, position))` holds, by
    /// sequence and position, and the others behind them; returns how many they are.
    pub(super) fn bring_forward(
        &mut self,
        pass: &mut Pass,
        mut is_ready: impl FnMut(&[Sequence], u32, (u32, u32)) -> bool,
    ) -> usize {
        let b = &mut *pass.buffers;
        let rows = &*b.rows;
        let key = |slot: u32| {
            let row = rows[slot as usize];
            (row.sequence, row.position)
        };
        sort_by(&mut b.left[..pass.left], &|x, y| key(x).cmp(&key(y)));
        self.waiting.clear();
        let mut ready = 0;
        for i in 0..pass.left {
            let slot = b.left[i];
            if is_ready(&self.sequences, slot, key(slot)) {
                b.left[ready] = slot;
                ready += 1;
            } else {
                self.waiting.push(slot);
            }
        }
        b.left[ready..pass.left].copy_from_slice(&self.waiting);
        ready
    }

    /// Rows `left[rows]` have passed all layers: notes it, and draws what follows the last tokens.
    fn finish(&mut self, pass: &mut Pass, rows: Range<usize>) -> Result<()> {
        let h = pass.model.hyperparameters();
        let (d, vocab) = (h.hidden_size, h.vocab_size);
        self.waiting.clear();
        let b = &mut *pass.buffers;
        for (index, slot) in b.left[rows].iter().enumerate() {
            let row = b.rows[*slot as usize];
            let (place, position) = (row.sequence as usize, row.position as usize);
            b.depths[place * self.context + position] = b.depth[*slot as usize];
            let sequence = &mut self.sequences[place];
            if !sequence.note_done(position) {
                continue;
            }
            if sequence.known == sequence.end {
                let reason = sequence.end_reason;
                self.end(place, reason);
            } else {
                // Its logits are wanted, with those of others side by side.
                let to = self.waiting.len() * d;
                b.leaving.copy_within(index * d..(index + 1) * d, to);
                self.waiting.push(*slot);
            }
        }
        for first in (0..self.waiting.len()).step_by(self.logit_rows) {
            let count = self.logit_rows.min(self.waiting.len() - first);
            let b = &mut *pass.buffers;
            let computed = logits(pass.model, pass.team, pass.level, b, first, count);
            self.counters.logits += count as u64;
            if let Err(error) = computed {
                let bad = b.logits[..count * vocab]
                    .iter()
                    .position(|l| !l.is_finite());
                pass.culprit = bad.map(|at| self.waiting[first + at / vocab]);
                return Err(error);
            }
            for row in 0..count {
                let slot = self.waiting[first + row];
                self.draw(pass, slot, row * vocab..(row + 1) * vocab);
            }
        }
        Ok(())
    }

    /// Draws the token after the row in `slot`.
    fn draw(&mut self, pass: &mut Pass, slot: u32, logits: Range<usize>) {
        let b = &mut *pass.buffers;
        let place = b.rows[slot as usize].sequence as usize;
        let sequence = &mut self.sequences[place];
        let known = &b.tokens[place * self.context..][..sequence.known];
        let token = sequence
            .sampler
            .sample(&b.logits[logits], known, b.candidates);
        self.take(pass, slot, token);
    }

    /// Takes the token that was drawn after the row in `slot`.
    pub(super) fn take(&mut self, pass: &mut Pass, slot: u32, token: u32) {
        let b = &mut *pass.buffers;
        let place = b.rows[slot as usize].sequence as usize;
        let sequence = &mut self.sequences[place];
        let finish = sequence.end_reason;
        let tokens = &mut b.tokens[place * self.context..][..self.context];
        let ends = pass.model.tokenizer().is_ok_and(|t| t.is_end(token));
        if ends && !sequence.ignore_end {
            return self.end(place, Finish::End);
        }
        tokens[sequence.known] = token;
        sequence.known += 1;
        let done = sequence.known == sequence.end;
        let event = Event::Token {
            sequence: sequence.id,
            token,
            depth: b.depth[slot as usize],
        };
        self.note(event);
        if done {
            self.end(place, finish);
        }
    }

    pub(super) fn end(&mut self, place: usize, finish: Finish) {
        let sequence = &mut self.sequences[place];
        sequence.state = State::Finished(finish);
        let event = Event::Finished(sequence.id, finish);
        self.note(event);
    }
}
