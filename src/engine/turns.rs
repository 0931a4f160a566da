//! The machine as the six tasks see it. Without overlap they take turns: every operation comes after all
//! that was submitted before its own task. Nobody waits for that on the host, whose waking up would come
//! between any two tasks. The host runs ahead, but not so far that what it queues would need memory of its own.

use crate::cost::figures::LaneFigures;
use crate::machine::ops::Op;
use crate::machine::{Fence, Fences, Machine, MachineError};
use crate::tier::{Lane, PerLane, Phase, Tier};

/// Operations of a window; at most two windows of them, about 2 MiB, are queued and not done.
const WINDOW: u64 = 4096;

/// A machine, and what the next operation comes after in any case.
pub struct Turns<'m> {
    machine: &'m mut dyn Machine,
    before: Fences,
    submitted: u64,
    /// All before the window before this one.
    old: Fences,
    /// All before this window.
    begun: Fences,
}

impl<'m> Turns<'m> {
    pub fn new(machine: &'m mut dyn Machine) -> Self {
        Turns {
            machine,
            before: Fences::none(),
            submitted: 0,
            old: Fences::none(),
            begun: Fences::none(),
        }
    }

    /// A failure comes back from every later wait, too.
    fn bound_queue(&mut self) {
        self.submitted += 1;
        if self.submitted.is_multiple_of(WINDOW) {
            self.old = std::mem::replace(&mut self.begun, self.machine.submitted());
            let _ = self.machine.wait(&self.old);
        }
    }

    /// What is submitted from now on comes after everything so far.
    pub fn next(&mut self) {
        self.before = self.machine.submitted();
    }
}

impl Machine for Turns<'_> {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        self.bound_queue();
        self.machine.submit(lane, op, &after.join(&self.before))
    }

    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        self.machine.wait(fences)
    }

    fn submitted(&self) -> Fences {
        self.machine.submitted()
    }

    fn put(&mut self, tier: Tier, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        self.machine.put(tier, offset, bytes)
    }

    fn values(&self, tier: Tier, offset: u64, count: usize) -> Option<&[f32]> {
        self.machine.values(tier, offset, count)
    }

    fn set_phase(&mut self, phase: Phase) {
        self.machine.set_phase(phase);
    }

    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.machine.lane_figures()
    }

    fn now_s(&self) -> f64 {
        self.machine.now_s()
    }
}
