//! The CPU machine and the host machine: the same lanes on threads, with one arena or with a second one
//! that plays the Gpu tier. Also the only place that starts lanes' threads.

use super::arena::AlignedBuffer;
use super::cpu::execute::ComputeExecutor;
use super::disk::{DiskFile, IoPool};
use super::lanes::{Executor, Lanes};
use super::memory::Memory;
use super::ops::Op;
use super::price::Pricer;
use super::transfer::{BOUNCE_BYTES, CopyExecutor, DiskExecutor};
use super::{Fence, Fences, Machine, MachineError};
use crate::cost::figures::LaneFigures;
use crate::policy::DeviceKind;
use crate::tier::{Lane, PerLane, Phase, Tier};
use std::sync::Arc;

/// Threads that keep the disk busy. One nearly does; four also cover many small extents.
pub const IO_THREADS: usize = 4;

/// What to open.
pub struct OpenRequest {
    pub device: DeviceKind,
    pub gpu_bytes: u64,
    pub cpu_bytes: u64,
    pub threads: usize,
    pub files: Vec<Arc<DiskFile>>,
    /// Prices operations for the log of each lane's work.
    pub pricer: Pricer,
}

/// Lanes on threads over one or two arenas.
pub struct ThreadedMachine {
    lanes: Lanes,
    memory: Arc<Memory>,
    pricer: Pricer,
}

impl ThreadedMachine {
    /// Maps and writes the arenas, then starts the lanes. Everything that can be missing is missing now.
    pub fn open(request: OpenRequest) -> Result<Self, MachineError> {
        let failed = |error: &dyn std::fmt::Display| MachineError::Memory(error.to_string());
        // First what is small: the arenas then take the rest of the budget.
        let mut bounce = Some(AlignedBuffer::new(BOUNCE_BYTES).map_err(|e| failed(&e))?);
        let memory =
            Arc::new(Memory::new(request.gpu_bytes, request.cpu_bytes).map_err(|e| failed(&e))?);
        let files: Arc<[Arc<DiskFile>]> = request.files.into();
        let mut executors: Vec<(Lane, Box<dyn Executor>)> = Vec::new();
        for lane in [Lane::DiskToCpu, Lane::CpuToDisk] {
            let pool = IoPool::new(IO_THREADS).map_err(|e| failed(&e))?;
            let bounce = bounce.take_if(|_| lane == Lane::DiskToCpu);
            let disk = DiskExecutor {
                memory: memory.clone(),
                files: files.clone(),
                pool,
                bounce,
            };
            executors.push((lane, Box::new(disk)));
        }
        let compute = |lane: Lane| ComputeExecutor::new(memory.clone(), lane, request.threads);
        executors.push((Lane::CpuCompute, Box::new(compute(Lane::CpuCompute))));
        if request.device.has_gpu() {
            executors.push((Lane::GpuCompute, Box::new(compute(Lane::GpuCompute))));
            for lane in [Lane::CpuToGpu, Lane::GpuToCpu] {
                executors.push((
                    lane,
                    Box::new(CopyExecutor {
                        memory: memory.clone(),
                        lane,
                    }),
                ));
            }
        }
        let lanes = Lanes::start(executors).map_err(|e| failed(&e))?;
        Ok(ThreadedMachine {
            lanes,
            memory,
            pricer: request.pricer,
        })
    }
}

impl ThreadedMachine {
    /// Bringing weights home is set-up, not part of either phase: its time and bytes are left out.
    pub fn forget_log(&mut self) {
        self.lanes.forget_log();
    }
}

impl Machine for ThreadedMachine {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let work_s = self.pricer.seconds(lane, &op);
        self.lanes.submit(lane, op, after, work_s)
    }

    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        self.lanes.wait(fences)
    }

    fn submitted(&self) -> Fences {
        self.lanes.submitted()
    }

    fn put(&mut self, tier: Tier, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        let all = self.submitted();
        self.wait(&all)?;
        // SAFETY: no operation is left that could touch these bytes.
        let target = unsafe { self.memory.write::<u8>(tier, offset, bytes.len()) };
        target.copy_from_slice(bytes);
        Ok(())
    }

    fn values(&self, tier: Tier, offset: u64, count: usize) -> Option<&[f32]> {
        // SAFETY: the caller waited for the operation that wrote these values, and the next pass, which
        // would write them anew, is only submitted through the same exclusive reference.
        Some(unsafe { self.memory.read::<f32>(tier, offset, count) })
    }

    fn set_phase(&mut self, phase: Phase) {
        self.lanes.set_phase(phase);
    }

    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.lanes.figures()
    }

    fn now_s(&self) -> f64 {
        self.lanes.now_s()
    }
}
