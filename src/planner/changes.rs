//! What another machine would do: a profile's figures replaced or multiplied, and said so. Used where a
//! person asks "what if", and where a plan explains what faster parts would bring.

use crate::profile::{DiskPoint, GemmCurve, GpuLink, HardwareProfile};
use crate::units::show_rate;
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a change says nothing about this machine.
#[derive(Debug, Error, PartialEq)]
pub enum ChangeError {
    #[error("{flag} says nothing here: profile \"{profile}\" has no GPU")]
    NoGpu { flag: &'static str, profile: String },
}

/// None leaves what the profile says. Rates are those of the largest blocks: curves keep their shape.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Changes {
    pub disk_read_bytes_per_s: Option<f64>,
    pub disk_write_bytes_per_s: Option<f64>,
    /// Both directions between DRAM and GPU.
    pub link_bytes_per_s: Option<f64>,
    /// Times as fast, DRAM included.
    pub cpu_speed: Option<f64>,
    /// Times as fast, its memory included.
    pub gpu_speed: Option<f64>,
}

impl Changes {
    /// One line a change, as a person would say it.
    pub fn describe(&self) -> Vec<String> {
        let rate =
            |what: &str, rate: Option<f64>| rate.map(|r| format!("{what} at {}", show_rate(r)));
        let speed =
            |what: &str, factor: Option<f64>| factor.map(|f| format!("{what} {f} times as fast"));
        let all = [
            rate("disk read", self.disk_read_bytes_per_s),
            rate("disk written", self.disk_write_bytes_per_s),
            rate("GPU link", self.link_bytes_per_s),
            speed("CPU and DRAM", self.cpu_speed),
            speed("GPU", self.gpu_speed),
        ];
        all.into_iter().flatten().collect()
    }

    /// The profile of the other machine.
    pub fn apply(&self, profile: &HardwareProfile) -> Result<HardwareProfile, ChangeError> {
        let mut other = profile.clone();
        let no_gpu = |flag| ChangeError::NoGpu {
            flag,
            profile: profile.machine.name.clone(),
        };
        if let Some(rate) = self.disk_read_bytes_per_s {
            disk_to(&mut other.links.disk_to_cpu.direct, rate);
        }
        if let Some(rate) = self.disk_write_bytes_per_s {
            disk_to(&mut other.links.cpu_to_disk.fresh, rate);
            disk_to(&mut other.links.cpu_to_disk.overwrite, rate);
        }
        if let Some(rate) = self.link_bytes_per_s {
            let links = &mut other.links;
            let both = [&mut links.cpu_to_gpu, &mut links.gpu_to_cpu];
            for link in both {
                link_to(link.as_mut().ok_or_else(|| no_gpu("--link"))?, rate);
            }
        }
        if let Some(factor) = self.cpu_speed {
            faster_cpu(&mut other, factor);
        }
        if let Some(factor) = self.gpu_speed {
            faster_gpu(&mut other, factor).ok_or_else(|| no_gpu("--gpu-speed"))?;
        }
        Ok(other)
    }
}

/// The fastest rate of a curve, or 1 where there is none.
fn fastest(rates: impl Iterator<Item = f64>) -> f64 {
    let most = rates.fold(0.0, f64::max);
    if most > 0.0 { most } else { 1.0 }
}

fn disk_to(points: &mut [DiskPoint], rate: f64) {
    let factor = rate / fastest(points.iter().map(|p| p.2));
    points.iter_mut().for_each(|p| p.2 *= factor);
}

fn link_to(link: &mut GpuLink, rate: f64) {
    let factor = rate / fastest(link.pinned.iter().map(|p| p.1));
    let points = link.pinned.iter_mut().chain(&mut link.unpinned);
    points.for_each(|p| p.1 *= factor);
}

fn faster_cpu(profile: &mut HardwareProfile, factor: f64) {
    let cpu = &mut profile.cpu;
    faster_gemm(&mut cpu.gemm, factor);
    cpu.dram_read_bytes_per_s *= factor;
    cpu.dram_copy_bytes_per_s *= factor;
    cpu.rowwise_bytes_per_s = cpu.rowwise_bytes_per_s.map(|r| r * factor);
    cpu.append_bytes_per_s = cpu.append_bytes_per_s.map(|r| r * factor);
    for rates in cpu.attention.values_mut() {
        rates.all_mut().for_each(|rate| *rate *= factor);
    }
}

fn faster_gpu(profile: &mut HardwareProfile, factor: f64) -> Option<()> {
    let gpu = profile.gpu.as_mut()?;
    faster_gemm(&mut gpu.gemm, factor);
    gpu.copy_bytes_per_s *= factor;
    let widen = gpu.widen_q4_bytes_per_s.iter_mut();
    widen.for_each(|point| point.1 *= factor);
    for rates in gpu.attention.values_mut() {
        rates.all_mut().for_each(|rate| *rate *= factor);
    }
    Some(())
}

fn faster_gemm(tables: &mut BTreeMap<String, GemmCurve>, factor: f64) {
    let points = tables.values_mut().flat_map(|t| &mut t.points);
    points.for_each(|p| p.3 /= factor);
}

/// A part and the change that makes it twice as fast.
pub fn twice_as_fast(profile: &HardwareProfile, gpu: bool) -> Vec<(&'static str, Changes)> {
    let twice = |rates: f64| Some(2.0 * rates);
    let links = &profile.links;
    let none = Changes::default();
    let disk = Changes {
        disk_read_bytes_per_s: twice(fastest(links.disk_to_cpu.direct.iter().map(|p| p.2))),
        disk_write_bytes_per_s: twice(fastest(links.cpu_to_disk.fresh.iter().map(|p| p.2))),
        ..none
    };
    let cpu = Changes {
        cpu_speed: Some(2.0),
        ..none
    };
    let mut list = vec![
        ("a disk twice as fast", disk),
        ("a CPU and DRAM twice as fast", cpu),
    ];
    if let (true, Some(up)) = (gpu && profile.gpu.is_some(), &links.cpu_to_gpu) {
        let link = Changes {
            link_bytes_per_s: twice(fastest(up.pinned.iter().map(|p| p.1))),
            ..none
        };
        let gpu = Changes {
            gpu_speed: Some(2.0),
            ..none
        };
        list.push(("a GPU link twice as fast", link));
        list.push(("a GPU twice as fast", gpu));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::compiled_in;

    #[test]
    fn a_change_replaces_what_it_names_and_nothing_else() {
        let t4 = HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap();
        assert_eq!(Changes::default().apply(&t4).unwrap(), t4);
        let changes = Changes {
            disk_read_bytes_per_s: Some(7e9),
            gpu_speed: Some(2.0),
            ..Changes::default()
        };
        assert_eq!(
            changes.describe(),
            ["disk read at 7.00 GB/s", "GPU 2 times as fast"]
        );
        let other = changes.apply(&t4).unwrap();
        assert_eq!(other.links.disk_to_cpu.direct[1].2, 7e9);
        assert!((other.links.disk_to_cpu.direct[0].2 - 7e9 * 0.6 / 1.6).abs() < 1.0);
        assert_eq!(other.links.cpu_to_disk, t4.links.cpu_to_disk);
        assert_eq!(other.cpu, t4.cpu);
        let mut bare = t4.clone();
        bare.gpu = None;
        assert!(
            changes
                .apply(&bare)
                .unwrap_err()
                .to_string()
                .contains("--gpu-speed")
        );
    }
}
