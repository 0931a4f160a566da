//! The virtual-time machine: runs the Schedule's operations on a clock, priced from a profile, with
//! the lanes slowing each other down as measured. No arithmetic, no memory, no files.

use super::lanes::note;
use super::ops::Op;
use super::price::Pricer;
use super::{Fence, Fences, Machine, MachineError};
use crate::cost::figures::LaneFigures;
use crate::tier::{Lane, PerLane, Phase, Tier};
use std::cell::Cell;
use std::collections::VecDeque;

/// A lane that stood still for longer than its threads look for work has gone to sleep.
const SLEEPS_AFTER_S: f64 = 20e-6;

struct Task {
    /// When its lane begins it, once its fences are reached.
    begins_s: Option<f64>,
    left_s: f64,
    work_s: f64,
    busy_s: f64,
    bytes: u64,
    /// How small its requests are.
    smallness: f64,
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
    /// When each lane last finished an operation.
    ended_s: PerLane<f64>,
    /// What the host has spent drawing tokens.
    host_s: Cell<f64>,
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
            ended_s: PerLane::default(),
            host_s: Cell::new(0.0),
        }
    }

    fn reached(&self, fences: &Fences) -> bool {
        Lane::ALL
            .iter()
            .all(|&lane| self.finished[lane] >= fences.mark(lane))
    }

    /// Lanes whose first operation has its fences: a lane that slept meanwhile takes a moment to begin.
    fn ready(&mut self) -> Vec<(Lane, f64)> {
        let mut ready = Vec::with_capacity(Lane::ALL.len());
        for lane in Lane::ALL {
            let slept = self.now_s - self.ended_s[lane] > SLEEPS_AFTER_S;
            let reached = self.queues[lane]
                .front()
                .is_some_and(|task| self.reached(&task.after));
            if let Some(task) = self.queues[lane].front_mut().filter(|_| reached) {
                let wake_s = if slept { self.pricer.handover_s() } else { 0.0 };
                let begins_s = *task.begins_s.get_or_insert(self.now_s + wake_s);
                ready.push((lane, begins_s));
            }
        }
        ready
    }

    /// Moves the clock to the next begin or end of an operation. False when nothing can run.
    fn step(&mut self) -> bool {
        let ready = self.ready();
        let now_s = self.now_s;
        let runs = |(_, begins_s): &&(Lane, f64)| *begins_s <= now_s;
        let small = |lane| self.queues[lane].front().map_or(0.0, |task| task.smallness);
        let with_small = |&(lane, _): &(Lane, f64)| (lane, small(lane));
        let active: Vec<(Lane, f64)> = ready.iter().filter(runs).map(with_small).collect();
        let rates: Vec<f64> = active
            .iter()
            .map(|&lane| self.pricer.keep(lane, &active))
            .collect();
        let time_left = |((lane, _), rate): (&(Lane, f64), &f64)| {
            self.queues[*lane].front().map_or(0.0, |t| t.left_s / rate)
        };
        let ends = active.iter().zip(&rates).map(time_left);
        let begins = ready.iter().map(|(_, begins_s)| begins_s - now_s);
        let next = ends.chain(begins.filter(|&dt_s| dt_s > 0.0));
        let Some(dt_s) = next.min_by(f64::total_cmp) else {
            return false;
        };
        self.now_s += dt_s;
        for (&(lane, _), &rate) in active.iter().zip(&rates) {
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
            self.ended_s[lane] = self.now_s;
            self.queues[lane].pop_front();
        }
    }
}

impl Machine for VirtualMachine {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let work_s = self.pricer.seconds(lane, &op);
        let (after, phase, bytes) = (*after, self.phase, op.bytes());
        let smallness = self.pricer.smallness(&op);
        self.queues[lane].push_back(Task {
            begins_s: None,
            left_s: work_s,
            work_s,
            busy_s: 0.0,
            bytes,
            smallness,
            after,
            phase,
        });
        self.submitted[lane] += 1;
        Fence {
            lane,
            number: self.submitted[lane],
        }
    }

    /// The host wakes up too, once what it waited for is done.
    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        self.now_s += self.host_s.take();
        let before_s = self.now_s;
        while !self.reached(fences) {
            if !self.step() {
                return Err(MachineError::Unsupported(
                    "operations in an order that can finish".into(),
                ));
            }
        }
        if self.now_s - before_s > SLEEPS_AFTER_S {
            self.now_s += self.pricer.handover_s();
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

    /// No values, but the time of drawing a token from them.
    fn values(&self, _: Tier, _: u64, count: usize) -> Option<&[f32]> {
        let drawn_s = self.pricer.sampling_s(count);
        self.host_s.set(self.host_s.get() + drawn_s);
        None
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.figures
    }

    fn now_s(&self) -> f64 {
        self.now_s + self.host_s.get()
    }
}
