//! What a token reads on its way to its logits: the bytes that bound the speed of generation.

use crate::model::{Keys, LayerRun, Model, PlaneTokens, Schedule, Stage};

impl Model {
    /// Bytes of the matrices that a token of `depth` recursions reads. A matrix counts once for each
    /// recursion that runs it, though a cache may keep it between two.
    pub fn weight_bytes_read(&self, depth: usize) -> u64 {
        let schedule = self.schedule();
        let passed = schedule
            .stages
            .iter()
            .filter(|s| passes(schedule, s, depth));
        let runs = schedule.prelude.iter().chain(passed.flat_map(|s| &s.runs));
        runs.map(|run| self.matrix_bytes(run)).sum::<u64>() + self.tail_bytes()
    }

    fn matrix_bytes(&self, run: &LayerRun) -> u64 {
        let all = self.run_bytes(std::slice::from_ref(run));
        let layer = self.layer(run.layer);
        match run.keys {
            Keys::Append => all,
            Keys::Shared => all - layer.k.weight.bytes() - layer.v.weight.bytes(),
        }
    }

    /// How many keys (and values) the last of tokens of these depths reads, summed over the layers
    /// that it passes.
    pub fn kv_entries_read(&self, depths: &[u8]) -> u64 {
        let schedule = self.schedule();
        let Some(depth) = depths.last() else { return 0 };
        let passed = |stage: &&Stage| passes(schedule, stage, usize::from(*depth));
        let stages = schedule.stages.iter().filter(passed);
        let ends = schedule.prelude.iter().chain(&schedule.coda);
        let runs = ends.chain(stages.flat_map(|stage| &stage.runs));
        // Planes of one kind have as many entries, so each kind is counted once.
        let (mut known, mut sum) = (Vec::new(), 0);
        for run in runs {
            let tokens = schedule.planes[run.plane].tokens;
            let found = known.iter().find(|(kind, _)| *kind == tokens);
            let entries = found.map_or_else(|| tokens.entries(depths), |(_, entries)| *entries);
            if found.is_none() {
                known.push((tokens, entries));
            }
            sum += entries as u64;
        }
        sum
    }
}

/// Whether a token of `depth` recursions runs this stage: those that it chose, and one that gives
/// every token its keys.
fn passes(schedule: &Schedule, stage: &Stage, depth: usize) -> bool {
    let for_all = |run: &LayerRun| {
        run.keys == Keys::Append && schedule.planes[run.plane].tokens == PlaneTokens::All
    };
    stage.recursion < depth || stage.runs.iter().any(for_all)
}
