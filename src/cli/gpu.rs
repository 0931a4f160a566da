//! The GPU of this machine as commands see it: which one, whether it can be used, what is free on it.
//! Nothing is opened on it here.

use super::failure::Failure;
use super::values::DeviceChoice;
use crate::machine::cuda::presence::{GpuError, find_gpu};
use crate::machine::cuda::{DeviceFacts, GpuChoice};
use crate::machine::nvml;
use std::path::Path;

/// A GPU that can be computed on.
#[derive(Clone, Debug)]
pub struct LocalGpu {
    pub index: usize,
    pub facts: DeviceFacts,
}

impl LocalGpu {
    /// GPU number `index`, or why not.
    pub fn find(index: usize) -> Result<LocalGpu, Failure> {
        match find_gpu(index) {
            Ok(facts) => Ok(LocalGpu { index, facts }),
            Err(GpuError::Absent(why)) => Err(Failure::usage(format!(
                "--device cuda:{index}: {why}"
            ))
            .with_hint(
                "give --device cpu; a GPU of another machine can be planned for with --profile",
            )),
            Err(GpuError::Unusable { cause, remedy }) => Err(unusable(&cause, &remedy)),
        }
    }

    /// What `--device` asks for: `auto` takes the first GPU, and no GPU where nobody knows of one. One that is
    /// there and cannot be used is an error: nobody should find out from a slow run.
    pub fn asked(device: &DeviceChoice) -> Result<Option<LocalGpu>, Failure> {
        match device {
            DeviceChoice::Cpu | DeviceChoice::Host { .. } => Ok(None),
            DeviceChoice::Cuda { index } => LocalGpu::find(*index).map(Some),
            DeviceChoice::Auto => match find_gpu(0) {
                Ok(facts) => Ok(Some(LocalGpu { index: 0, facts })),
                Err(GpuError::Absent(why)) => hidden(&why).map_or(Ok(None), Err),
                Err(GpuError::Unusable { cause, remedy }) => Err(unusable(&cause, &remedy)),
            },
        }
    }

    pub fn choice(&self, offload_dir: &Path) -> GpuChoice {
        GpuChoice {
            index: self.index,
            kernel_cache: offload_dir.join("kernels"),
        }
    }

    /// What the engine opens; of no GPU nothing.
    pub fn choice_of(gpu: Option<&LocalGpu>, offload_dir: &Path) -> GpuChoice {
        gpu.map_or_else(GpuChoice::default, |gpu| gpu.choice(offload_dir))
    }

    /// Device memory that a machine may take, its context included; None where nobody tells. Asked while none is
    /// open: what this process still holds, the next machine finds there. Of a part of a GPU (MIG), the management
    /// library tells what is free on the whole.
    pub fn free_bytes(&self) -> Option<u64> {
        let free = nvml::free_without_this_process(&self.facts.bus_id)?;
        Some(free.min(self.facts.total_bytes))
    }
}

/// A GPU that the management library sees and CUDA does not, as in a container without CUDA's part of the driver;
/// none where whoever calls has hidden the GPUs.
fn hidden(why: &str) -> Option<Failure> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES");
    let asked = visible
        .as_ref()
        .is_ok_and(|v| matches!(v.trim(), "" | "-1" | "NoDevFiles"));
    let gpu = (!asked).then(|| nvml::gpu(None))??;
    let remedy = match visible {
        Ok(devices) => format!("CUDA_VISIBLE_DEVICES is {devices}: name a device that is there"),
        Err(_) => "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or load the driver's kernel module anew".into(),
    };
    Some(unusable(
        &format!("{} is there, and CUDA says that {why}", gpu.name),
        &remedy,
    ))
}

fn unusable(cause: &str, remedy: &str) -> Failure {
    Failure::failed(format!("the GPU cannot be used: {cause}"))
        .with_hint(format!("{remedy}; or give --device cpu"))
}

/// The number in "cuda:1".
pub fn gpu_index(device: &str) -> usize {
    let number = device.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    number.unwrap_or(0)
}
