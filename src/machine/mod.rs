//! The hands: memory, disk and devices as the rest of the program touches them.
//! A machine carries out the operations of the Schedule: it has one FIFO queue a lane, and an
//! operation starts when everything it comes after is done. `unsafe` lives on this floor alone.

pub mod arena;
pub mod cpu;
pub mod cuda;
pub mod disk;
pub mod lanes;
pub mod memory;
pub mod nvml;
pub mod ops;
pub mod os;
pub mod price;
mod spare;
pub mod threaded;
pub mod transfer;
pub mod virtual_time;

use crate::cost::figures::LaneFigures;
use crate::tier::{Lane, PerLane, Phase, Tier};
use ops::Op;
use thiserror::Error;

/// Why an operation failed.
#[derive(Clone, Debug, Error)]
pub enum MachineError {
    #[error("{0}")]
    Disk(String),
    #[error("{0}")]
    Memory(String),
    #[error("{0}")]
    Gpu(String),
    #[error("{lane} stopped: {cause} (this is a defect of loadmaster: please report it)")]
    Panic { lane: &'static str, cause: String },
    #[error("this plan needs {0}, which this machine lacks")]
    Unsupported(String),
}

/// One operation's end on its lane: done when the lane has finished `number` operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    pub lane: Lane,
    pub number: u64,
}

/// A set of fences: since lanes are FIFO, the latest of each lane says it all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fences {
    marks: PerLane<u64>,
}

impl Fences {
    pub fn none() -> Self {
        Fences::default()
    }

    pub fn add(&mut self, fence: Fence) {
        let mark = &mut self.marks[fence.lane];
        *mark = fence.number.max(*mark);
    }

    pub fn with(mut self, fence: Fence) -> Self {
        self.add(fence);
        self
    }

    pub fn join(mut self, other: &Fences) -> Self {
        Lane::ALL.into_iter().for_each(|lane| {
            self.add(Fence {
                lane,
                number: other.marks[lane],
            })
        });
        self
    }

    /// Finished operations needed on one lane.
    pub fn mark(&self, lane: Lane) -> u64 {
        self.marks[lane]
    }
}

impl From<Fence> for Fences {
    fn from(fence: Fence) -> Self {
        Fences::none().with(fence)
    }
}

/// Executes operations: on threads, or on a clock.
pub trait Machine {
    /// Queues an operation behind its lane's earlier ones; never blocks on work. Errors surface in `wait`.
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence;

    /// Until all of `fences` are done. The first failure of any lane comes back here.
    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError>;

    /// Everything submitted so far.
    fn submitted(&self) -> Fences;

    /// Writes from the host while no operation touches these bytes.
    fn put(&mut self, tier: Tier, offset: u64, bytes: &[u8]) -> Result<(), MachineError>;

    /// f32 values written by finished operations; None on a machine that has a clock only.
    fn values(&self, tier: Tier, offset: u64, count: usize) -> Option<&[f32]>;

    /// Operations submitted from now on belong to this phase.
    fn set_phase(&mut self, phase: Phase);

    /// Busy seconds, priced work and bytes of all finished operations.
    fn lane_figures(&self) -> PerLane<LaneFigures>;

    /// Seconds since the machine was opened.
    fn now_s(&self) -> f64;
}
