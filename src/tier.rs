//! The words of the way of data: tiers, items, lanes, resources and phases, and tables over them.
//! No rate, no size, no policy: only what things are called.

use serde::{Deserialize, Serialize};
use std::ops::{Index, IndexMut};

/// Where bytes can live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Gpu,
    Cpu,
    Disk,
}

impl Tier {
    pub const ALL: [Tier; 3] = [Tier::Gpu, Tier::Cpu, Tier::Disk];

    pub fn name(self) -> &'static str {
        ["gpu", "cpu", "disk"][self as usize]
    }
}

/// What is placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Item {
    Weights,
    Cache,
    Activations,
}

/// What can be busy at the same time as the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    DiskToCpu,
    CpuToDisk,
    CpuToGpu,
    GpuToCpu,
    GpuCompute,
    CpuCompute,
}

impl Lane {
    pub const ALL: [Lane; 6] = [
        Lane::DiskToCpu,
        Lane::CpuToDisk,
        Lane::CpuToGpu,
        Lane::GpuToCpu,
        Lane::GpuCompute,
        Lane::CpuCompute,
    ];

    /// The lane that has most of something; of several, the last.
    pub fn with_most(of: impl Fn(Lane) -> f64) -> Lane {
        let most = Lane::ALL
            .into_iter()
            .max_by(|&a, &b| of(a).total_cmp(&of(b)));
        most.unwrap_or(Lane::CpuCompute)
    }

    pub fn name(self) -> &'static str {
        [
            "disk_to_cpu",
            "cpu_to_disk",
            "cpu_to_gpu",
            "gpu_to_cpu",
            "gpu_compute",
            "cpu_compute",
        ][self as usize]
    }
}

/// What lanes share: their uses of one resource add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    DramBus,
    DiskDevice,
    CpuCores,
}

impl Resource {
    pub const ALL: [Resource; 3] = [Resource::DramBus, Resource::DiskDevice, Resource::CpuCores];

    pub fn name(self) -> &'static str {
        ["dram_bus", "disk_device", "cpu_cores"][self as usize]
    }
}

/// Reading the prompts, or making one token after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Prefill,
    Decode,
}

/// One value per tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerTier<T> {
    pub gpu: T,
    pub cpu: T,
    pub disk: T,
}

impl<T> Index<Tier> for PerTier<T> {
    type Output = T;
    fn index(&self, tier: Tier) -> &T {
        match tier {
            Tier::Gpu => &self.gpu,
            Tier::Cpu => &self.cpu,
            Tier::Disk => &self.disk,
        }
    }
}

impl<T> IndexMut<Tier> for PerTier<T> {
    fn index_mut(&mut self, tier: Tier) -> &mut T {
        match tier {
            Tier::Gpu => &mut self.gpu,
            Tier::Cpu => &mut self.cpu,
            Tier::Disk => &mut self.disk,
        }
    }
}

/// One value per lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLane<T> {
    pub disk_to_cpu: T,
    pub cpu_to_disk: T,
    pub cpu_to_gpu: T,
    pub gpu_to_cpu: T,
    pub gpu_compute: T,
    pub cpu_compute: T,
}

impl<T> Index<Lane> for PerLane<T> {
    type Output = T;
    fn index(&self, lane: Lane) -> &T {
        match lane {
            Lane::DiskToCpu => &self.disk_to_cpu,
            Lane::CpuToDisk => &self.cpu_to_disk,
            Lane::CpuToGpu => &self.cpu_to_gpu,
            Lane::GpuToCpu => &self.gpu_to_cpu,
            Lane::GpuCompute => &self.gpu_compute,
            Lane::CpuCompute => &self.cpu_compute,
        }
    }
}

impl<T> IndexMut<Lane> for PerLane<T> {
    fn index_mut(&mut self, lane: Lane) -> &mut T {
        match lane {
            Lane::DiskToCpu => &mut self.disk_to_cpu,
            Lane::CpuToDisk => &mut self.cpu_to_disk,
            Lane::CpuToGpu => &mut self.cpu_to_gpu,
            Lane::GpuToCpu => &mut self.gpu_to_cpu,
            Lane::GpuCompute => &mut self.gpu_compute,
            Lane::CpuCompute => &mut self.cpu_compute,
        }
    }
}
