//! The machines that run: lanes on threads over one arena (cpu), a second one that plays the Gpu tier
//! (host), or a real GPU's memory (cuda). Also the only place that starts lanes' threads.

use super::arena::{AlignedBuffer, Region};
use super::cpu::execute::ComputeExecutor;
use super::cuda::{Gpu, GpuChoice, GpuPlaces, Held, Refused};
use super::disk::{DiskFile, IoPool};
use super::lanes::{Lanes, Worker};
use super::memory::Memory;
use super::ops::Op;
use super::price::Pricer;
use super::transfer::{BOUNCE_BYTES, CopyExecutor, DiskExecutor};
use super::{Fence, Fences, Machine, MachineError};
use crate::cost::figures::LaneFigures;
use crate::cost::requests::READ_THREADS;
use crate::dtype::Dtype;
use crate::policy::DeviceKind;
use crate::tier::{Lane, PerLane, Phase, Tier};
use std::sync::Arc;

/// Threads that keep the disk busy with writes: those of a step's cached tokens are a page or two of each sequence,
/// and each waits behind what is being read, all of them together no longer than one.
pub const WRITE_THREADS: usize = 16;

/// What to open.
pub struct OpenRequest {
    pub device: DeviceKind,
    pub gpu_bytes: u64,
    pub cpu_bytes: u64,
    pub threads: usize,
    pub files: Vec<Arc<DiskFile>>,
    /// Prices operations for the log of each lane's work.
    pub pricer: Pricer,
    /// Of a CUDA machine: which GPU, and where the machine's own buffers are.
    pub gpu: Option<(GpuChoice, GpuPlaces)>,
}

/// Lanes on threads over one or two arenas.
pub struct ThreadedMachine {
    // First: the lanes run dry before what they use goes.
    lanes: Lanes,
    held: Option<Held>,
    memory: Arc<Memory>,
    pricer: Pricer,
}

impl ThreadedMachine {
    /// Maps and writes the arenas, then starts the lanes. Everything that can be missing is missing now.
    pub fn open(request: OpenRequest) -> Result<Self, MachineError> {
        // First what is small: the arenas then take the rest of the budget.
        let bounce = AlignedBuffer::new(BOUNCE_BYTES).map_err(failed)?;
        let gpu = request.gpu.as_ref();
        let gpu = gpu.map(|(choice, places)| Gpu::open(choice, places.clone()));
        let gpu = gpu.transpose()?;
        let memory = match &gpu {
            Some(gpu) => Memory::with_remote(gpu.remote(), request.cpu_bytes),
            None => Memory::new(request.gpu_bytes, request.cpu_bytes),
        };
        let memory = Arc::new(memory.map_err(failed)?);
        let mut workers = disk_workers(&request, &memory, bounce)?;
        let compute = |lane: Lane| ComputeExecutor::new(memory.clone(), lane, request.threads);
        let here = |lane: Lane| (lane, Worker::Here(Box::new(compute(lane))));
        workers.push(here(Lane::CpuCompute));
        let mut held = None;
        if let Some(gpu) = gpu {
            let (lanes, rest) = gpu.lanes(&memory)?;
            workers.extend(lanes);
            held = Some(rest);
        } else if request.device.has_gpu() {
            workers.push(here(Lane::GpuCompute));
            for lane in [Lane::CpuToGpu, Lane::GpuToCpu] {
                let memory = memory.clone();
                let copies = CopyExecutor { memory, lane };
                workers.push((lane, Worker::Here(Box::new(copies))));
            }
        }
        Ok(ThreadedMachine {
            lanes: Lanes::start(workers).map_err(failed)?,
            held,
            memory,
            pricer: request.pricer,
        })
    }

    /// What the GPU could not do as planned, in a line; the run goes on without it.
    pub fn notice(&self) -> Option<&str> {
        Some(&self.refused()?.why)
    }

    /// Whether all of this part of the DRAM arena was to be page-locked and could not be.
    pub fn could_not_lock(&self, region: Region) -> bool {
        self.refused()
            .is_some_and(|refused| refused.regions.contains(&region))
    }

    /// Whether many rows of activations can be multiplied by weights in this format.
    pub fn multiplies(&self, format: Dtype) -> bool {
        let held = self.held.as_ref();
        format != Dtype::Bf16 || held.is_none_or(|held| held.multiplies_bf16)
    }

    fn refused(&self) -> Option<&Refused> {
        self.held.as_ref()?.refused.as_ref()
    }
}

fn failed(error: impl std::fmt::Display) -> MachineError {
    MachineError::Memory(error.to_string())
}

/// Reading and writing lanes; only the reading one loads.
fn disk_workers(
    request: &OpenRequest,
    memory: &Arc<Memory>,
    bounce: AlignedBuffer,
) -> Result<Vec<(Lane, Worker)>, MachineError> {
    let files: Arc<[Arc<DiskFile>]> = request.files.clone().into();
    let mut bounce = Some(bounce);
    let mut workers = Vec::new();
    for (lane, threads) in [
        (Lane::DiskToCpu, READ_THREADS),
        (Lane::CpuToDisk, WRITE_THREADS),
    ] {
        let disk = DiskExecutor {
            memory: memory.clone(),
            files: files.clone(),
            pool: IoPool::new(threads).map_err(failed)?,
            bounce: bounce.take_if(|_| lane == Lane::DiskToCpu),
        };
        workers.push((lane, Worker::Here(Box::new(disk) as _)));
    }
    Ok(workers)
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
        unsafe { self.memory.fill(tier, offset, bytes) }
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
