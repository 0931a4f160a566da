//! The machine as the six tasks see it. Without overlap they take turns: every operation comes after all
//! that was submitted before its own task. Nobody waits for that on the host, whose waking up would come
//! between any two tasks.

use crate::cost::figures::LaneFigures;
use crate::machine::ops::Op;
use crate::machine::{Fence, Fences, Machine, MachineError};
use crate::tier::{Lane, PerLane, Phase, Tier};

/// A machine, and what the next operation comes after in any case.
pub struct Turns<'m> {
    machine: &'m mut dyn Machine,
    before: Fences,
}

impl<'m> Turns<'m> {
    pub fn new(machine: &'m mut dyn Machine) -> Self {
        Turns {
            machine,
            before: Fences::none(),
        }
    }

    /// What is submitted from now on comes after everything so far.
    pub fn next(&mut self) {
        self.before = self.machine.submitted();
    }
}

impl Machine for Turns<'_> {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
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
