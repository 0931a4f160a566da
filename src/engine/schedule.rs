//! The zig-zag: which of the six tasks comes when in one pass over the stages (FlexGen, Algorithm 1).
//! Only order lives here. Every machine, real or virtual, runs this one schedule.

/// One of the six tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskKind {
    LoadWeight,
    LoadCache,
    LoadHidden,
    Compute,
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
}

impl Schedule {
    /// Tasks of one pass. At (j, k): part k of stage j + 1's weights, the next batch's cache, the last
    /// batch's hidden state out, the next one's in, compute, and the cache of what was computed out.
    /// With one batch, the hidden state that a layer reads is what the layer before just stored, so it
    /// is loaded after that instead of a step ahead.
    pub fn pass(self) -> impl Iterator<Item = Task> {
        (0..self.stages * self.batches)
            .flat_map(move |step| self.step(step))
            .flatten()
    }

    fn step(self, step: usize) -> [Option<Task>; 7] {
        let (stage, batch) = (step / self.batches, step % self.batches);
        let ahead = self.batches > 1;
        let next = self.at(step + 1);
        let before = step.checked_sub(1).and_then(|s| self.at(s));
        let task = |kind, at: Option<(usize, usize)>| {
            at.map(|(stage, batch)| Task {
                kind,
                stage,
                batch,
                next_pass: false,
            })
        };
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
            let schedule = Schedule { stages, batches };
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
    }
}
