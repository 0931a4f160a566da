//! What NVIDIA's management library says about the GPUs: names, memory, bus. Facts only, no copies
//! and no kernels; without the library there are no facts, and that is no error.

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml, error::NvmlError};
use std::sync::Mutex;

/// One GPU, as the management library describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    pub name: String,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// "00000000:01:00.0": what CUDA's devices are matched by, since the two number them differently.
    pub bus_id: String,
    /// The highest that card and slot can do: at idle a link runs slower than in a copy.
    pub pcie_generation: Option<u32>,
    pub pcie_width: Option<u32>,
}

/// The GPUs of this machine; `None` where the library or its driver is absent.
pub fn gpus() -> Option<Vec<GpuInfo>> {
    let nvml = Nvml::init().ok()?;
    let count = nvml.device_count().ok()?;
    let devices = (0..count).filter_map(|index| nvml.device_by_index(index).ok());
    Some(
        devices
            .filter_map(|device| describe(&device).ok())
            .collect(),
    )
}

/// The GPU with a bus id, or the first one.
pub fn gpu(bus_id: Option<&str>) -> Option<GpuInfo> {
    let wanted = |gpu: &GpuInfo| bus_id.is_none_or(|id| same_bus(id, &gpu.bus_id));
    gpus()?.into_iter().find(wanted)
}

static UNOPENED: Mutex<Vec<GpuInfo>> = Mutex::new(Vec::new());

/// Notes the GPU as it is: told before this process opens a machine on it, of which the first time counts.
pub fn about_to_open(bus_id: &str) {
    if before_the_first(bus_id).is_none() {
        let mut noted = UNOPENED.lock().expect("nobody panics with it");
        noted.extend(gpu(Some(bus_id)));
    }
}

/// The GPU as it was before this process opened its first machine on it; None where there was none. What the
/// process holds is the difference from that: cuBLAS may keep the context of one machine for the next.
pub fn before_the_first(bus_id: &str) -> Option<GpuInfo> {
    let noted = UNOPENED.lock().expect("nobody panics with it");
    let found = noted.iter().find(|gpu| same_bus(bus_id, &gpu.bus_id));
    found.cloned()
}

/// What would be free on a GPU without this process: cuBLAS may keep the context of a closed machine, and the next
/// one does not take it again.
pub fn free_without_this_process(bus_id: &str) -> Option<u64> {
    let free = gpu(Some(bus_id))?.free_bytes;
    // Before the first machine there is nothing, whatever a container's numbers of processes say.
    let held = before_the_first(bus_id).map(|before| {
        let difference = || before.free_bytes.saturating_sub(free);
        process_bytes(bus_id).unwrap_or_else(difference)
    });
    Some(free + held.unwrap_or(0))
}

/// Device memory of this process on a GPU, as the driver counts it; None where it does not tell.
pub fn process_bytes(bus_id: &str) -> Option<u64> {
    let nvml = Nvml::init().ok()?;
    let count = nvml.device_count().ok()?;
    let mut devices = (0..count).filter_map(|index| nvml.device_by_index(index).ok());
    let device = devices.find(|d| d.pci_info().is_ok_and(|p| same_bus(bus_id, &p.bus_id)))?;
    let mine = |p: &ProcessInfo| p.pid == std::process::id();
    let processes = device.running_compute_processes().ok()?;
    match processes.into_iter().find(mine)?.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    }
}

fn describe(device: &Device) -> Result<GpuInfo, NvmlError> {
    let memory = device.memory_info()?;
    Ok(GpuInfo {
        name: device.name()?,
        total_bytes: memory.total,
        free_bytes: memory.free,
        bus_id: device.pci_info()?.bus_id,
        pcie_generation: device.max_pcie_link_gen().ok(),
        pcie_width: device.max_pcie_link_width().ok(),
    })
}

/// CUDA writes "0000:01:00.0" where NVML writes "00000000:01:00.0".
fn same_bus(a: &str, b: &str) -> bool {
    let short = |id: &str| id.trim_start_matches('0').to_ascii_lowercase();
    short(a) == short(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bus_ids_match_in_both_spellings() {
        assert!(same_bus("0000:0A:00.0", "00000000:0a:00.0"));
        assert!(!same_bus("0000:01:00.0", "00000000:02:00.0"));
    }

    #[test]
    fn with_or_without_a_gpu_nothing_panics() {
        let all = gpus().unwrap_or_default();
        assert!(
            all.iter()
                .all(|g| g.total_bytes > 0 && g.free_bytes <= g.total_bytes)
        );
        assert_eq!(
            gpu(None).map(|g| g.bus_id),
            all.first().map(|g| g.bus_id.clone())
        );
        assert_eq!(gpu(Some("no such bus")), None);
    }
}
