//! The zig-zag: which of the six tasks comes when in one pass over the stages (FlexGen, Algorithm 1).
//! Only order lives here. Every machine, real or virtual, runs this one schedule.

/// One of the six tasks; a layer's computation is cut in two where batches are staggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskKind {
    LoadWeight,
    LoadCache,
    LoadHidden,
    Compute,
    /// A layer up to its attention, and everything after.
    Begin,
    End,
    StoreCache,
    StoreHidden,
}

/// A task on one stage (0 = embedding, 1..=layers, layers + 1 = head) and batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Task {
    pub kind: TaskKind,
    pub stage: usize,
    pub batch: usize,
    /// True for weights that the next pass will use.
    pub next_pass: bool,
}

/// The stages and batches of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub stages: usize,
    pub batches: usize,
    /// A layer's end comes after the next batch's beginning: while the CPU attends for the one batch, the
    /// compute device has the other. Needs two batches, and three where hidden states travel.
    pub staggered: bool,
}

/// Batches whose hidden states visit at once: one that is computed, its neighbour on the way, and, where two
/// are computed in turn, a third.
pub fn hidden_parts(staggered: bool) -> usize {
    match staggered {
        true => 3,
        false => 2,
    }
}

impl Schedule {
    /// Tasks of one pass. At (j, k): part k of stage j + 1's weights, the next batch's cache, the last
    /// batch's hidden state out, the next one's in, compute, and the cache of what was computed out.
    /// With one batch, the hidden state that a layer reads is what the layer before just stored, so it
    /// is loaded after that instead of a step ahead.
    pub fn pass(self) -> impl Iterator<Item = Task> {
        (0..self.stages * self.batches)
            .flat_map(move |step| match self.staggered {
                true => self.staggered_step(step),
                false => self.step(step),
            })
            .flatten()
    }

    fn step(self, step: usize) -> [Option<Task>; 8] {
        let (stage, batch) = (step / self.batches, step % self.batches);
        let ahead = self.batches > 1;
        let next = self.at(step + 1);
        let before = step.checked_sub(1).and_then(|s| self.at(s));
        let here = Some((stage, batch));
        [
            Some(self.next_weights(stage, batch)),
            task(TaskKind::LoadCache, next.filter(|n| self.is_layer(n.0))),
            task(
                TaskKind::StoreHidden,
                before.filter(|b| ahead && self.stores_hidden(b.0)),
            ),
            match ahead {
                true => task(TaskKind::LoadHidden, next.filter(|n| n.0 > 0)),
                false => task(TaskKind::LoadHidden, here.filter(|h| h.0 > 0)),
            },
            task(TaskKind::Compute, here),
            task(
                TaskKind::StoreHidden,
                here.filter(|h| !ahead && self.stores_hidden(h.0)),
            ),
            task(TaskKind::StoreCache, here.filter(|h| self.is_layer(h.0))),
            None,
        ]
    }

    /// At (j, k): weights and cache as ever, the hidden state of the batch before the last one out and the next one's
    /// into its place, this layer's beginning and the last batch's end.
    fn staggered_step(self, step: usize) -> [Option<Task>; 8] {
        let (stage, batch) = (step / self.batches, step % self.batches);
        let here = Some((stage, batch));
        let before = step.checked_sub(1).and_then(|s| self.at(s));
        let ended = before.filter(|b| self.is_layer(b.0));
        let layer = self.is_layer(stage);
        let kind = match layer {
            true => TaskKind::Begin,
            false => TaskKind::Compute,
        };
        let left = step.checked_sub(2).and_then(|s| self.at(s));
        let next = self.at(step + 1);
        [
            Some(self.next_weights(stage, batch)),
            task(TaskKind::LoadCache, next.filter(|n| self.is_layer(n.0))),
            task(
                TaskKind::StoreHidden,
                left.filter(|l| self.stores_hidden(l.0)),
            ),
            task(TaskKind::LoadHidden, next.filter(|n| n.0 > 0)),
            // The head has no beginning of its own.
            task(TaskKind::End, ended.filter(|_| !layer)),
            task(kind, here),
            task(TaskKind::StoreCache, here.filter(|_| layer)),
            task(TaskKind::End, ended.filter(|_| layer)),
        ]
    }

    fn at(self, step: usize) -> Option<(usize, usize)> {
        (step < self.stages * self.batches).then_some((step / self.batches, step % self.batches))
    }

    fn is_layer(self, stage: usize) -> bool {
        stage > 0 && stage + 1 < self.stages
    }

    /// The head's output is no hidden state.
    fn stores_hidden(self, stage: usize) -> bool {
        stage + 1 < self.stages
    }

    fn next_weights(self, stage: usize, batch: usize) -> Task {
        let next_pass = stage + 1 == self.stages;
        let stage = if next_pass { 0 } else { stage + 1 };
        Task {
            kind: TaskKind::LoadWeight,
            stage,
            batch,
            next_pass,
        }
    }
}

fn task(kind: TaskKind, at: Option<(usize, usize)>) -> Option<Task> {
    at.map(|(stage, batch)| Task {
        kind,
        stage,
        batch,
        next_pass: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn positions(schedule: Schedule) -> HashMap<Task, usize> {
        let list: Vec<Task> = schedule.pass().collect();
        let map: HashMap<Task, usize> = list.iter().copied().zip(0..).collect();
        assert_eq!(map.len(), list.len(), "no task twice");
        map
    }

    proptest! {
        /// Whatever a task reads has been produced by an earlier task of the pass.
        #[test]
        fn loads_come_before_their_use_and_after_their_source(stages in 3usize..9, batches in 1usize..6) {
            let schedule = Schedule { stages, batches, staggered: false };
            let at = positions(schedule);
            let find = |kind, stage, batch| at.get(&Task { kind, stage, batch, next_pass: false }).copied();
            for stage in 0..stages {
                for batch in 0..batches {
                    let compute = find(TaskKind::Compute, stage, batch).expect("every batch computes");
                    if stage > 0 {
                        let load = find(TaskKind::LoadHidden, stage, batch).expect("hidden comes in");
                        let store = find(TaskKind::StoreHidden, stage - 1, batch).expect("and went out");
                        prop_assert!(store < load && load < compute);
                        prop_assert!(find(TaskKind::LoadWeight, stage, batch).expect("weights") < compute || batch > 0);
                    }
                    if schedule.is_layer(stage) {
                        let load = find(TaskKind::LoadCache, stage, batch).expect("cache comes in");
                        let store = find(TaskKind::StoreCache, stage, batch).expect("and goes out");
                        prop_assert!(load < compute && compute < store);
                    }
                    prop_assert_eq!(find(TaskKind::StoreHidden, stages - 1, batch), None);
                }
            }
        }

        /// The same of a staggered pass, in which a layer ends after the next batch's beginning, and nothing comes
        /// into a place before what was there has left.
        #[test]
        fn a_layer_ends_while_the_next_batch_is_attended(stages in 3usize..9, batches in 2usize..6) {
            let travels = batches > 2;
            let schedule = Schedule { stages, batches, staggered: true };
            let at = positions(schedule);
            let find = |kind, step: usize| {
                let task = Task { kind, stage: step / batches, batch: step % batches, next_pass: false };
                at.get(&task).copied()
            };
            let parts = hidden_parts(true);
            for step in 0..stages * batches {
                let layer = schedule.is_layer(step / batches);
                let begin = find(if layer { TaskKind::Begin } else { TaskKind::Compute }, step).expect("it begins");
                let end = find(TaskKind::End, step);
                prop_assert_eq!(end.is_some(), layer);
                if step >= batches && travels {
                    let store = find(TaskKind::StoreHidden, step - batches).expect("hidden went out");
                    let load = find(TaskKind::LoadHidden, step).expect("and comes in");
                    prop_assert!(store < load && load < begin);
                    prop_assert!(find(TaskKind::End, step - batches).is_none_or(|e| e < store));
                    // The place's last visitor leaves; the head has nothing to store.
                    let left = find(TaskKind::StoreHidden, step - parts);
                    prop_assert!(left.is_none_or(|left| left < load));
                    prop_assert_eq!(left.is_none(), (step - parts) / batches + 1 == stages);
                }
                if layer {
                    let load = find(TaskKind::LoadCache, step).expect("cache comes in");
                    let store = find(TaskKind::StoreCache, step).expect("and goes out");
                    prop_assert!(load < begin && begin < store);
                    let next = find(TaskKind::Begin, step + 1);
                    prop_assert!(next.is_none_or(|next| Some(next) < end));
                    // Two halves of what is attended.
                    prop_assert!(find(TaskKind::Begin, step + 2).is_none_or(|next| end < Some(next)));
                }
            }
        }
    }
}
