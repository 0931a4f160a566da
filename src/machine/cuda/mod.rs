//! The CUDA machine: a real GPU behind the same lanes. Three streams (compute, up, down) tied by events,
//! one allocation of device memory, kernels of our own and cuBLAS. Opening it is all that lives here.

mod api;
mod attend;
mod blas;
mod compute;
mod copies;
mod issue;
mod launch;
mod libraries;
mod modules;
pub mod presence;
mod product;
mod tables;
mod timeline;
mod toolkit;

pub use api::{DeviceFacts, fault};
pub use blas::NO_BF16;

use super::MachineError;
use super::arena::Region;
use super::lanes::Worker;
use super::memory::{Memory, RemoteArena};
use super::{nvml, os};
use crate::dtype::Dtype;
use crate::tier::Lane;
use crate::units::show_bytes;
use api::{Context, CudaError, DeviceBuffer, PinnedRange};
use blas::Blas;
use compute::ComputeWork;
use copies::{Copies, Pinned, Relay};
use issue::{Timelines, worker};
use modules::{Kernels, Target};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tables::{Mapped, TablePlaces, Tables};
use timeline::Timeline;

fn gpu_error(error: CudaError) -> MachineError {
    let remedy = match error.is_fault() {
        true => {
            ": a kernel or the GPU itself went wrong, and this process can no longer use it; start the program again, and please report it if that does not help"
        }
        false => "",
    };
    MachineError::Gpu(format!("{error}{remedy}"))
}

/// Where things of the machine itself lie in the two arenas; everything else is the engine's.
#[derive(Clone, Debug, Default)]
pub struct GpuPlaces {
    pub arena_bytes: u64,
    /// Of the device: narrowed activations, widened weights, attention's parts.
    pub scratch: Region,
    /// Of the device: cuBLAS's workspace.
    pub blas: Region,
    /// Small tables on the device, and page-locked in DRAM before that.
    pub tables: Region,
    pub host_tables: Region,
    /// Of DRAM: what other memory travels through.
    pub relay: Region,
    /// Of DRAM: to be page-locked in place.
    pub pinned: Vec<Region>,
}

/// Which GPU, and where its kernels are kept.
#[derive(Clone, Debug, Default)]
pub struct GpuChoice {
    pub index: usize,
    pub kernel_cache: PathBuf,
}

/// An opened GPU, before its lanes start.
pub struct Gpu {
    // First: cuBLAS's handle goes before its stream and its workspace.
    blas: Blas,
    context: Arc<Context>,
    arena: Arc<DeviceBuffer>,
    kernels: Arc<Kernels>,
    timelines: Timelines,
    places: GpuPlaces,
}

impl RemoteArena for DeviceBuffer {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        DeviceBuffer::write(self, offset, bytes).map_err(gpu_error)
    }
}

static OPENING_BYTES: AtomicU64 = AtomicU64::new(0);
static LIBRARY_BYTES: AtomicU64 = AtomicU64::new(0);

/// DRAM of this process that opening a GPU took at most, its libraries included. The first machine's opening takes
/// most of it, and what cuBLAS keeps of that is not taken again.
pub fn opening_bytes() -> u64 {
    OPENING_BYTES.load(Ordering::Relaxed) + LIBRARY_BYTES.load(Ordering::Relaxed)
}

/// Looks for the libraries, and notes what that takes.
fn counted<T>(look: impl FnOnce() -> T) -> T {
    let before = resident_bytes();
    let found = look();
    LIBRARY_BYTES.store(resident_bytes().saturating_sub(before), Ordering::Relaxed);
    found
}

/// Compiles what is not kept yet, so that a run does not hold what the compiler does beside its own memory.
pub fn compile_kernels(choice: &GpuChoice) -> Result<(), MachineError> {
    let target = target(choice, &found(choice)?)?;
    modules::compile_missing(&target).map_err(MachineError::Gpu)
}

fn found(choice: &GpuChoice) -> Result<DeviceFacts, MachineError> {
    presence::find_gpu(choice.index).map_err(|error| MachineError::Gpu(error.to_string()))
}

fn target<'a>(choice: &'a GpuChoice, facts: &DeviceFacts) -> Result<Target<'a>, MachineError> {
    Ok(Target {
        capability: facts.capability,
        driver: api::driver_version().map_err(gpu_error)?,
        cache: &choice.kernel_cache,
    })
}

fn resident_bytes() -> u64 {
    os::process_memory().map_or(0, |memory| memory.resident_bytes)
}

impl Gpu {
    /// Context, kernels, cuBLAS and the device's arena: everything that can be missing is missing now.
    pub fn open(choice: &GpuChoice, places: GpuPlaces) -> Result<Gpu, MachineError> {
        let facts = found(choice)?;
        nvml::about_to_open(&facts.bus_id);
        let before = resident_bytes();
        let context = Context::new(choice.index).map_err(no_context)?;
        let target = target(choice, &facts)?;
        let kernels = Kernels::load(&context, &target).map_err(MachineError::Gpu)?;
        let arena = DeviceBuffer::new(&context, places.arena_bytes)
            .map_err(|error| no_room(&context, places.arena_bytes, error))?;
        let timeline = || Timeline::new(&context).map(|t| Some(Arc::new(t)));
        let mut timelines = Timelines::default();
        for lane in issue::GPU_LANES {
            timelines[lane] = timeline().map_err(gpu_error)?;
        }
        let compute = timelines[Lane::GpuCompute].clone();
        let stream = compute.as_ref().expect("just made").stream();
        let workspace = arena.at(places.blas.offset, places.blas.bytes);
        let blas_error = |why: String| blas_error(&why, target.driver);
        let mut blas =
            Blas::new(&context, stream, (workspace, places.blas.bytes)).map_err(blas_error)?;
        let unused = (arena.at(0, places.blas.offset), places.blas.offset);
        // SAFETY: nothing uses the arena yet; the range ends where cuBLAS's workspace begins.
        unsafe { blas.warm_up(stream, unused) }.map_err(blas_error)?;
        let taken = resident_bytes().saturating_sub(before);
        OPENING_BYTES.fetch_max(taken, Ordering::Relaxed);
        Ok(Gpu {
            blas,
            context,
            arena: Arc::new(arena),
            kernels: Arc::new(kernels),
            timelines,
            places,
        })
    }

    /// The device's memory, for the two arenas of a machine.
    pub fn remote(&self) -> Arc<dyn RemoteArena> {
        self.arena.clone()
    }

    /// The three lanes, and what must live as long as they do.
    pub fn lanes(self, memory: &Arc<Memory>) -> Result<(Vec<(Lane, Worker)>, Held), MachineError> {
        let (mut pinned, regions) = pin(&self.context, memory, &self.places.pinned);
        let relay = lock_relay((&self.context, memory), &mut pinned, self.places.relay);
        let refused = refused(regions, relay);
        let pinned = Arc::new(pinned);
        let down = self.timeline(Lane::GpuToCpu);
        let relay = Relay::new(&self.context, memory.clone(), relay, down);
        let mut relay = Some(relay.map_err(gpu_error)?);
        let mut lanes = Vec::new();
        for lane in [Lane::CpuToGpu, Lane::GpuToCpu] {
            let up = lane == Lane::CpuToGpu;
            let work = Copies {
                memory: memory.clone(),
                device: self.arena.clone(),
                timeline: self.timeline(lane),
                pinned: pinned.clone(),
                up,
                relay: if up { relay.take() } else { None },
            };
            lanes.push((lane, worker(&self.context, lane, &self.timelines, work)));
        }
        let multiplies_bf16 = self.blas.multiplies(Dtype::Bf16);
        let lane = Lane::GpuCompute;
        let places = TablePlaces {
            host: self.places.host_tables,
            mapped: self.mapped_tables(memory, &pinned),
            device_offset: self.places.tables.offset,
        };
        let timeline = self.timeline(lane);
        let work = ComputeWork {
            blas: self.blas,
            device: self.arena.clone(),
            kernels: self.kernels.clone(),
            tables: Tables::new(memory.clone(), self.arena.clone(), timeline.clone(), places),
            timeline,
            scratch: self.places.scratch,
        };
        lanes.push((lane, worker(&self.context, lane, &self.timelines, work)));
        let held = Held {
            refused,
            multiplies_bf16,
            _pinned: pinned,
            _kernels: self.kernels,
            _memory: memory.clone(),
        };
        Ok((lanes, held))
    }

    /// The tables' DRAM for the kernel that copies them; None where it is not page-locked, or not to be mapped.
    fn mapped_tables(&self, memory: &Memory, pinned: &Pinned) -> Option<Mapped> {
        let Region { offset, bytes } = self.places.host_tables;
        let address = pinned.device_address(memory.cpu_address(offset, bytes), bytes)?;
        let kernel = self.kernels.get("copy_table");
        Some(Mapped { address, kernel })
    }

    fn timeline(&self, lane: Lane) -> Arc<Timeline> {
        let timeline = self.timelines[lane].clone();
        timeline.expect("every lane of the GPU has a stream")
    }
}

/// What of the DRAM could not be page-locked: it travels through the relay.
pub struct Refused {
    pub regions: Vec<Region>,
    /// In a line.
    pub why: String,
}

/// What outlives the lanes: page locks go before the memory that they lock.
pub struct Held {
    pub refused: Option<Refused>,
    /// Old GPUs do not.
    pub multiplies_bf16: bool,
    _pinned: Arc<Pinned>,
    _kernels: Arc<Kernels>,
    _memory: Arc<Memory>,
}

/// `driver`'s CUDA decides what could be installed instead: a GPU may be newer than the library knows.
fn blas_error(why: &str, driver: u32) -> MachineError {
    let remedy = match why.contains("ALLOC_FAILED") {
        true => {
            "the GPU has no memory left for cuBLAS; end other programs on it or lower --gpu-mem"
                .into()
        }
        false => format!(
            "the library is {}; where it is older than the GPU, {}",
            presence::BLAS.file(),
            presence::toolkit_remedy(driver)
        ),
    };
    MachineError::Gpu(format!("{why}: {remedy}"))
}

fn no_context(error: CudaError) -> MachineError {
    match error.is_out_of_memory() {
        true => MachineError::Gpu(format!(
            "{error}: the GPU has no memory left for a context; end other programs on it"
        )),
        false => gpu_error(error),
    }
}

fn no_room(context: &Context, bytes: u64, error: CudaError) -> MachineError {
    if !error.is_out_of_memory() {
        return gpu_error(error);
    }
    let free = context.memory().map_or(0, |(free, _)| free);
    MachineError::Gpu(format!(
        "{} of GPU memory are needed in one piece and {} are free: end other programs on the GPU or lower --gpu-mem",
        show_bytes(bytes),
        show_bytes(free)
    ))
}

/// Page-locks what can be; also what could not, and why.
fn pin(
    context: &Arc<Context>,
    memory: &Memory,
    wanted: &[Region],
) -> (Pinned, Vec<(Region, CudaError)>) {
    let mut pinned = Pinned::default();
    let mut refused = Vec::new();
    for region in wanted.iter().filter(|r| r.bytes > 0) {
        let address = memory.cpu_address(region.offset, region.bytes);
        // SAFETY: the arena outlives the range: both are held together, the range is dropped first.
        match unsafe { PinnedRange::new(context, address, region.bytes) } {
            Ok(range) => pinned.ranges.push(range),
            Err(error) => refused.push((*region, error)),
        }
    }
    (pinned, refused)
}

/// A smaller relay costs more in waiting than in copying.
const LEAST_RELAY_BYTES: u64 = 256 * 1024;

/// The relay, page-locked with what is around it or else alone: halved until the system allows it. Where it
/// allows nothing, it works all the same, as slowly as memory that is not page-locked.
fn lock_relay(
    (context, memory): (&Arc<Context>, &Memory),
    pinned: &mut Pinned,
    relay: Region,
) -> Region {
    let address = memory.cpu_address(relay.offset, relay.bytes);
    let mut bytes = relay.bytes;
    while bytes >= LEAST_RELAY_BYTES && !pinned.contains(address, bytes) {
        // SAFETY: the arena outlives the range: both are held together, the range is dropped first.
        match unsafe { PinnedRange::new(context, address, bytes) } {
            Ok(range) => pinned.ranges.push(range),
            Err(_) => bytes /= 2,
        }
    }
    match bytes < LEAST_RELAY_BYTES {
        true => relay,
        false => Region { bytes, ..relay },
    }
}

fn refused(refused: Vec<(Region, CudaError)>, relay: Region) -> Option<Refused> {
    let why = refused.first()?.1.to_string();
    let regions: Vec<Region> = refused.into_iter().map(|(region, _)| region).collect();
    let bytes = show_bytes(regions.iter().map(|region| region.bytes).sum());
    let through = show_bytes(relay.bytes);
    Some(Refused {
        regions,
        why: format!(
            "{bytes} of DRAM could not be page-locked ({why}): copies of it go through a relay of {through} and are slower"
        ),
    })
}
