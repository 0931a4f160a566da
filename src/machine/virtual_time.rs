//! The virtual-time machine: runs the Schedule's operations on a clock, priced from a profile, with
//! the lanes slowing each other down as measured. No arithmetic, no memory, no files.

use super::lanes::note;
use super::ops::Op;
use super::price::Pricer;
use super::{Fence, Fences, Machine, MachineError};
use crate::cost::figures::LaneFigures;
use crate::cost::load::Load;
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
    load: Load,
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

    fn slept(&self, lane: Lane) -> bool {
        self.now_s - self.ended_s[lane] > SLEEPS_AFTER_S
    }

    /// The CPU computes now, or goes on at once.
    fn computes(&self) -> bool {
        let first = self.queues[Lane::CpuCompute].front();
        first.is_some_and(|task| match task.begins_s {
            Some(at_s) => at_s <= self.now_s,
            None => self.reached(&task.after) && !self.slept(Lane::CpuCompute),
        })
    }

    /// When each lane begins its first operation, where that has its fences: a lane that slept meanwhile
    /// takes a moment, which the CPU's computing loses in part.
    fn begins_s(&mut self) -> PerLane<Option<f64>> {
        let mut begins_s = PerLane::default();
        let computing = self.computes();
        let mut taken_s = 0.0;
        for lane in Lane::ALL {
            let slept = self.slept(lane);
            let reached = self.queues[lane]
                .front()
                .is_some_and(|task| self.reached(&task.after));
            if let Some(task) = self.queues[lane].front_mut().filter(|_| reached) {
                let wake_s = match slept {
                    true => self.pricer.handover_s(computing),
                    false => 0.0,
                };
                if task.begins_s.is_none() && slept && computing {
                    taken_s += self.pricer.wake_takes_s(lane);
                }
                begins_s[lane] = Some(*task.begins_s.get_or_insert(self.now_s + wake_s));
            }
        }
        if let Some(computed) = self.queues[Lane::CpuCompute].front_mut() {
            computed.left_s += taken_s;
        }
        begins_s
    }

    /// Moves the clock to the next begin or end of an operation. False when nothing can run.
    fn step(&mut self) -> bool {
        let begins_s = self.begins_s();
        let mut running = [(Lane::CpuCompute, Load::default()); Lane::ALL.len()];
        let mut count = 0;
        let mut dt_s = f64::INFINITY;
        for lane in Lane::ALL {
            match begins_s[lane] {
                Some(at_s) if at_s > self.now_s => dt_s = dt_s.min(at_s - self.now_s),
                Some(_) => {
                    let task = self.queues[lane].front();
                    running[count] = (lane, task.map_or(Load::default(), |task| task.load));
                    count += 1;
                }
                None => {}
            }
        }
        let running = &running[..count];
        let mut rates = PerLane::default();
        for &lane in running {
            let rate = self.pricer.keep(lane, running);
            let left_s = self.queues[lane.0].front().map_or(0.0, |task| task.left_s);
            dt_s = dt_s.min(left_s / rate);
            rates[lane.0] = rate;
        }
        if dt_s == f64::INFINITY {
            return false;
        }
        self.now_s += dt_s;
        for &(lane, _) in running {
            self.progress(lane, (dt_s, rates[lane]));
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
        let load = self.pricer.load((lane, work_s), &op);
        self.queues[lane].push_back(Task {
            begins_s: None,
            left_s: work_s,
            work_s,
            busy_s: 0.0,
            bytes,
            load,
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
            self.now_s += self.pricer.handover_s(false);
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
