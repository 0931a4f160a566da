//! Whether there is room for a plan right now, in DRAM, on disk and on the GPU; what is missing, and the way out.

use super::failure::Failure;
use super::gpu::LocalGpu;
use crate::engine::open::{RunJob, footprint};
use crate::machine::{disk, os};
use crate::policy::DeviceKind;
use crate::tier::Tier;
use crate::units::{MIB, show_bytes};
use std::path::Path;

/// What is missing is missing now: memory and disk against what is free at this moment.
/// `to_pack_bytes` of weights are to be packed on the same disk first.
pub fn check_room(run: &RunJob, offload_dir: &Path, to_pack_bytes: u64) -> Result<(), Failure> {
    let needed = footprint(run);
    // DRAM plays the GPU of the host machine.
    let played = if run.device == DeviceKind::Host {
        needed.arena_bytes(Tier::Gpu)
    } else {
        0
    };
    let memory = needed.total(Tier::Cpu) + played;
    // What this process holds already is part of what the plan counts.
    let own = os::process_memory().map_or(0, |m| m.resident_bytes);
    let free = os::memory_now().map_err(Failure::failed)?.free_bytes + own;
    if memory > free {
        return Err(Failure::failed(format!(
            "the plan needs {} of memory and {} are free: {} are missing",
            show_bytes(memory),
            show_bytes(free),
            show_bytes(memory - free)
        ))
        .with_hint(format!(
            "end other programs, or plan again with --cpu-mem {}MiB",
            free / MIB * 9 / 10
        )));
    }
    let written = needed.spill.total() + to_pack_bytes;
    let room = disk::free_bytes(offload_dir).map_err(Failure::failed)?;
    if written > room {
        let packed = match to_pack_bytes {
            0 => "",
            _ => "packed weights, ",
        };
        return Err(Failure::failed(format!(
            "the plan writes {} of {packed}cache, hidden state and turned weights to disk and {} are free: {} are missing",
            show_bytes(written),
            show_bytes(room),
            show_bytes(written - room)
        ))
        .with_hint("make room, or name another disk with --offload-dir"));
    }
    Ok(())
}

/// Device memory against what is free on the GPU now, context and libraries included.
pub fn check_gpu_room(run: &RunJob, gpu: Option<&LocalGpu>) -> Result<(), Failure> {
    let needed = footprint(run).total(Tier::Gpu);
    let free = gpu.and_then(LocalGpu::free_bytes).unwrap_or(u64::MAX);
    if needed <= free {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "the plan needs {} of GPU memory and {} are free: {} are missing",
        show_bytes(needed),
        show_bytes(free),
        show_bytes(needed - free)
    ))
    .with_hint(format!(
        "end other programs on the GPU, or plan again with --gpu-mem {}MiB",
        free / MIB
    )))
}
