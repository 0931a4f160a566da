//! The virtual-time machine: runs the Schedule's operations on a clock, priced from a profile, with
//! the lanes slowing each other down as measured. No arithmetic, no memory, no files.

use super::lanes::note;
use super::ops::Op;
use super::price::Pricer;
use super::{Fence, Fences, Machine, MachineError};
use crate::cost::figures::LaneFigures;
use crate::tier::{Lane, PerLane, Phase, Tier};
use std::collections::VecDeque;

struct Task {
    left_s: f64,
    work_s: f64,
    busy_s: f64,
    bytes: u64,
    after: Fences,
    phase: Phase,
}

/// A clock and a queue a lane.
pub struct VirtualMachine {
    pricer: Pricer,
    queues: PerLane<VecDeque<Task>>,
    submitted: PerLane<u64>,
    finished: PerLane<u64>,
    figures: PerLane<LaneFigures>,
    phase: Phase,
    now_s: f64,
}

impl VirtualMachine {
    pub fn new(pricer: Pricer) -> Self {
        VirtualMachine {
            pricer,
            queues: PerLane::default(),
            submitted: PerLane::default(),
            finished: PerLane::default(),
            figures: PerLane::default(),
            phase: Phase::Prefill,
            now_s: 0.0,
        }
    }

    fn reached(&self, fences: &Fences) -> bool {
        Lane::ALL
            .iter()
            .all(|&lane| self.finished[lane] >= fences.mark(lane))
    }

    fn active(&self) -> Vec<Lane> {
        let runs = |&lane: &Lane| {
            self.queues[lane]
                .front()
                .is_some_and(|task| self.reached(&task.after))
        };
        Lane::ALL.into_iter().filter(runs).collect()
    }

    /// Moves the clock to the next end of an operation. False when nothing can run.
    fn step(&mut self) -> bool {
        let active = self.active();
        let rates: Vec<f64> = active
            .iter()
            .map(|&lane| self.pricer.keep(lane, &active))
            .collect();
        let time_left = |(lane, rate): (&Lane, &f64)| {
            self.queues[*lane].front().map_or(0.0, |t| t.left_s / rate)
        };
        let Some(dt_s) = active
            .iter()
            .zip(&rates)
            .map(time_left)
            .min_by(f64::total_cmp)
        else {
            return false;
        };
        self.now_s += dt_s;
        for (&lane, &rate) in active.iter().zip(&rates) {
            self.progress(lane, (dt_s, rate));
        }
        true
    }

    fn progress(&mut self, lane: Lane, (dt_s, rate): (f64, f64)) {
        let Some(task) = self.queues[lane].front_mut() else {
            return;
        };
        task.busy_s += dt_s;
        task.left_s -= dt_s * rate;
        if task.left_s <= 1e-12 {
            note(
                &mut self.figures[lane],
                task.phase,
                (task.busy_s, task.work_s, task.bytes),
            );
            self.finished[lane] += 1;
            self.queues[lane].pop_front();
        }
    }
}

impl Machine for VirtualMachine {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let work_s = self.pricer.seconds(lane, &op);
        let (after, phase, bytes) = (*after, self.phase, op.bytes());
        self.queues[lane].push_back(Task {
            left_s: work_s,
            work_s,
            busy_s: 0.0,
            bytes,
            after,
            phase,
        });
        self.submitted[lane] += 1;
        Fence {
            lane,
            number: self.submitted[lane],
        }
    }

    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        while !self.reached(fences) {
            if !self.step() {
                return Err(MachineError::Unsupported(
                    "operations in an order that can finish".into(),
                ));
            }
        }
        Ok(())
    }

    fn submitted(&self) -> Fences {
        let all = Lane::ALL.map(|lane| Fence {
            lane,
            number: self.submitted[lane],
        });
        all.into_iter().fold(Fences::none(), Fences::with)
    }

    fn put(&mut self, _: Tier, _: u64, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }

    fn values(&self, _: Tier, _: u64, _: usize) -> Option<&[f32]> {
        None
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.figures
    }

    fn now_s(&self) -> f64 {
        self.now_s
    }
}
