//! Who has the pages of the KV pool when there are not enough.

use super::books::{Books, State};
use super::{Event, Pressure};
use crate::cpu::Pass;
use crate::model::{Keys, LayerRun};

impl Books {
    /// Waiting sequences run in the order of their rank as long as there are pages for all that they
    /// know, each token as deep as it can be. When none runs, the first does whatever it needs.
    pub(super) fn start_waiting(&mut self, pass: &mut Pass) {
        loop {
            let waits =
                |place: &usize| matches!(self.sequences[*place].state, State::Waiting { .. });
            let places = (0..self.sequences.len()).filter(waits);
            let Some(place) = places.max_by_key(|place| self.sequences[*place].rank()) else {
                return;
            };
            let alone = !self.sequences.iter().any(|s| s.state == State::Running);
            let needed = self.pages_to_start(pass, place);
            while !alone && pass.buffers.kv.pages_free() < needed {
                if !self.reclaim(pass) {
                    return;
                }
            }
            let sequence = &mut self.sequences[place];
            let (before, id) = (sequence.state, sequence.id);
            sequence.state = State::Running;
            if before == (State::Waiting { evicted: true }) {
                self.note(Event::Resumed(id));
            }
        }
    }

    /// The most pages that a sequence takes for the tokens that it knows, besides those that it has.
    fn pages_to_start(&self, pass: &Pass, place: usize) -> usize {
        let sequence = &self.sequences[place];
        let (kv, planes) = (&pass.buffers.kv, &pass.model.schedule().planes);
        let depths = &pass.buffers.depths[place * self.context..][..sequence.measured];
        let pages = planes.iter().enumerate().map(|(plane, description)| {
            let unmeasured = sequence.known - sequence.measured;
            let entries = description.tokens.entries(depths) + unmeasured;
            let list = kv.list(place, plane);
            kv.pages_for(list, entries - kv.length(list))
        });
        pages.sum()
    }

    /// Sees to it that this tick, with `new` more rows, finds the pages that it may take at most.
    /// Sequences give way until it does. Returns the new rows that are left.
    pub(super) fn make_room(&mut self, pass: &mut Pass, mut new: usize) -> usize {
        // A page for each entry that there may be is more than enough, and mostly there.
        let rows = pass.flying + new + pass.left;
        if rows * pass.model.schedule().planes.len() <= pass.buffers.kv.pages_free() {
            return new;
        }
        while self.pages_for_rows(pass, new, |_| true) > pass.buffers.kv.pages_free() {
            if self.reclaim(pass) {
                continue;
            }
            let (victim, count) = self.who_gives_way(pass, new);
            let Some(victim) = victim else {
                // Pages are needed, so somebody runs.
                return new;
            };
            let evicts = self.pressure == Pressure::Evict;
            let waits = self.stands_still(victim);
            let first_new = pass.flying;
            let its_new = self.new_rows_of(pass, victim, new);
            let its_others = self.sequences[victim].entered - self.sequences[victim].done - its_new;
            // The last one would be resumed at once, to the same end.
            let is_evicted = waits || evicts && count > 1;
            if !is_evicted && its_new > usize::from(its_others == 0) {
                // Fewer rows at a time may do.
                self.drop_new(pass, victim, its_new / 2, &mut new);
                self.sequences[victim].entered -= its_new - its_new / 2;
                continue;
            }
            self.drop_new(pass, victim, 0, &mut new);
            self.set_back(pass, victim, waits || evicts);
            // What is new follows the rows in flight.
            let moved = first_new..first_new + new;
            pass.buffers.active.copy_within(moved, pass.flying);
            let sequence = &mut self.sequences[victim];
            if waits {
                continue;
            }
            let id = sequence.id;
            if is_evicted {
                sequence.state = State::Waiting { evicted: true };
                self.note(Event::Evicted(id));
                self.counters.evictions += 1;
            } else {
                sequence.state = State::Full;
                self.note(Event::Full(id));
            }
        }
        new
    }

    /// Who gives way next, and how many might: who does not run gives its pages first, else who has begun has pages or is
    /// about to take some; where none are taken away, only who takes some is in the way.
    fn who_gives_way(&self, pass: &Pass, new: usize) -> (Option<usize>, usize) {
        let evicts = self.pressure == Pressure::Evict;
        let may_give_way = |place: &usize| {
            let sequence = &self.sequences[*place];
            match sequence.state {
                State::Running if evicts => sequence.entered > 0,
                State::Running => sequence.entered > sequence.done,
                _ => self.stands_still(*place) && sequence.done > 0,
            }
        };
        let is_in_the_way = |place: usize| {
            let of_place = |other| other == place;
            evicts || self.stands_still(place) || self.pages_for_rows(pass, new, of_place) > 0
        };
        let order = |place: usize| (!self.stands_still(place), self.sequences[place].rank());
        let (mut first, mut count) = (None, 0);
        for place in (0..self.sequences.len()).filter(may_give_way) {
            count += 1;
            if first.is_none_or(|first| order(place) < order(first)) && is_in_the_way(place) {
                first = Some(place);
            }
        }
        (first, count)
    }

    /// Whether a sequence does not run, and gives its pages to those that do.
    fn stands_still(&self, place: usize) -> bool {
        match self.sequences[place].state {
            State::Waiting { .. } => true,
            State::Full => self.pressure == Pressure::Evict,
            _ => false,
        }
    }

    /// How many of the `new` rows that are to enter are a sequence's.
    fn new_rows_of(&self, pass: &Pass, place: usize, new: usize) -> usize {
        let b = &*pass.buffers;
        let slots = b.active[pass.flying..][..new].iter();
        let of_place = slots.filter(|slot| b.rows[**slot as usize].sequence as usize == place);
        of_place.count()
    }

    /// Takes a sequence's rows, but for its first `kept`, out of those that were to enter.
    fn drop_new(&mut self, pass: &mut Pass, place: usize, mut kept: usize, new: &mut usize) {
        let (b, first) = (&mut *pass.buffers, pass.flying);
        let mut to = first;
        for from in first..first + *new {
            let slot = b.active[from];
            let of_place = b.rows[slot as usize].sequence as usize == place;
            if of_place && kept == 0 {
                self.free_slots.push(slot);
            } else {
                kept -= usize::from(of_place);
                b.active[to] = slot;
                to += 1;
            }
        }
        *new = to - first;
    }

    /// Drops a sequence's rows in flight: it stands after its last done token or, when it loses its
    /// pages, before its first.
    pub(super) fn set_back(&mut self, pass: &mut Pass, place: usize, lose_pages: bool) {
        let of_place =
            |pass: &Pass, slot: u32| pass.buffers.rows[slot as usize].sequence as usize == place;
        pass.keep(0, |pass, c| !of_place(pass, pass.buffers.active[c]));
        let mut to = 0;
        for from in 0..pass.left {
            let slot = pass.buffers.left[from];
            if of_place(pass, slot) {
                self.free_slots.push(slot);
            } else {
                pass.buffers.left[to] = slot;
                to += 1;
            }
        }
        pass.left = to;
        let sequence = &mut self.sequences[place];
        // What follows the last token that is known was perhaps not drawn: it is run again.
        let most = if lose_pages {
            0
        } else {
            sequence.known.saturating_sub(1)
        };
        sequence.done = sequence.done.min(most);
        sequence.entered = sequence.done;
        let b = &mut *pass.buffers;
        let depths = &b.depths[place * self.context..][..sequence.done];
        for (plane, description) in pass.model.schedule().planes.iter().enumerate() {
            let list = b.kv.list(place, plane);
            b.kv.truncate(list, description.tokens.entries(depths));
        }
    }

    /// Takes the pages of the earliest sequence that is finished and has any.
    fn reclaim(&mut self, pass: &mut Pass) -> bool {
        let has_pages = |place: &usize| {
            let sequence = &self.sequences[*place];
            matches!(sequence.state, State::Finished(_)) && sequence.done > 0
        };
        let places = (0..self.sequences.len()).filter(has_pages);
        let Some(place) = places.min_by_key(|place| self.sequences[*place].id) else {
            return false;
        };
        self.set_back(pass, place, true);
        true
    }

    /// The most pages that a tick takes for the rows in flight and `new` more of the sequences at some places: for
    /// their next recursion, and for the last layers, which any of them may reach.
    fn pages_for_rows(&self, pass: &Pass, new: usize, of: impl Fn(usize) -> bool) -> usize {
        let (b, schedule) = (&*pass.buffers, pass.model.schedule());
        let active = &b.active[..pass.flying + new];
        let row = |slot: &u32| b.rows[*slot as usize];
        let mut pages = 0;
        let mut first = 0;
        while first < active.len() {
            let here = row(&active[first]);
            let same = |slot: &&u32| {
                let row = row(slot);
                (row.sequence, row.recursion) == (here.sequence, here.recursion)
            };
            let count = active[first..].iter().take_while(same).count();
            if !of(here.sequence as usize) {
                first += count;
                continue;
            }
            let takes = |runs: &[LayerRun]| -> usize {
                let runs = runs.iter().filter(|run| run.keys == Keys::Append);
                let lists = runs.map(|run| b.kv.list(here.sequence as usize, run.plane));
                lists.map(|list| b.kv.pages_for(list, count)).sum()
            };
            if first >= pass.flying {
                pages += takes(&schedule.prelude);
            }
            if pass.model.hyperparameters().router.is_some() {
                pages += takes(&schedule.stages[here.recursion as usize].runs);
            } else {
                pages += schedule
                    .stages
                    .iter()
                    .map(|s| takes(&s.runs))
                    .sum::<usize>();
            }
            first += count;
        }
        for (place, sequence) in self
            .sequences
            .iter()
            .enumerate()
            .filter(|(place, _)| of(*place))
        {
            let rows = sequence.entered - sequence.done;
            let lists = schedule.coda.iter().map(|run| b.kv.list(place, run.plane));
            pages += lists.map(|list| b.kv.pages_for(list, rows)).sum::<usize>();
        }
        pages
    }
}
