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
    /// Times as fast in both directions, whatever the size of a request.
    pub disk_speed: Option<f64>,
    pub link_speed: Option<f64>,
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
            speed("disk", self.disk_speed),
            speed("GPU link", self.link_speed),
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
        if let Some(factor) = self.disk_speed {
            let links = &mut other.links;
            let write = &mut links.cpu_to_disk;
            let curves = [
                &mut links.disk_to_cpu.direct,
                &mut write.fresh,
                &mut write.overwrite,
            ];
            curves
                .into_iter()
                .for_each(|curve| faster_disk(curve, factor));
        }
        if let Some(factor) = self.link_speed {
            let both = [&mut other.links.cpu_to_gpu, &mut other.links.gpu_to_cpu];
            let links = both.into_iter().flatten();
            links.for_each(|link| faster_link(link, factor));
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
    faster_disk(points, factor);
}

fn faster_disk(points: &mut [DiskPoint], factor: f64) {
    points.iter_mut().for_each(|p| p.2 *= factor);
}

fn link_to(link: &mut GpuLink, rate: f64) {
    let factor = rate / fastest(link.pinned.iter().map(|p| p.1));
    faster_link(link, factor);
}

fn faster_link(link: &mut GpuLink, factor: f64) {
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
    cpu.sampling_bytes_per_s = cpu.sampling_bytes_per_s.map(|r| r * factor);
    cpu.quantise = cpu.quantise.map(|rates| rates.times(factor));
    for rates in cpu.attention.values_mut() {
        rates.all_mut().for_each(|rate| *rate *= factor);
    }
}

fn faster_gpu(profile: &mut HardwareProfile, factor: f64) -> Option<()> {
    let gpu = profile.gpu.as_mut()?;
    faster_gemm(&mut gpu.gemm, factor);
    gpu.copy_bytes_per_s *= factor;
    gpu.quantise = gpu.quantise.map(|rates| rates.times(factor));
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
    let none = Changes::default();
    let disk = Changes {
        disk_speed: Some(2.0),
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
    if gpu && profile.gpu.is_some() && profile.links.cpu_to_gpu.is_some() {
        let link = Changes {
            link_speed: Some(2.0),
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
    use crate::profile::{QuantiseRates, compiled_in};

    #[test]
    fn twice_as_fast_is_twice_for_every_rate_of_a_part() {
        let mut t4 = HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap();
        let slow = |points: &mut Vec<DiskPoint>| points.iter_mut().for_each(|p| p.2 *= 0.5);
        slow(&mut t4.links.cpu_to_disk.overwrite);
        let back = t4.links.gpu_to_cpu.as_mut().unwrap();
        back.pinned.iter_mut().for_each(|p| p.1 *= 0.25);
        let quantise = QuantiseRates {
            pack_bytes_per_s: 1e9,
            append_bytes_per_s: 2e9,
        };
        (t4.cpu.quantise, t4.cpu.sampling_bytes_per_s) = (Some(quantise), Some(3e9));
        let parts = twice_as_fast(&t4, true);
        let with = |part: &str| {
            let change = parts.iter().find(|(name, _)| name.contains(part)).unwrap();
            change.1.apply(&t4).unwrap()
        };
        let rates = |points: &[DiskPoint]| points.iter().map(|p| p.2).collect::<Vec<_>>();
        let twice = |points: &[DiskPoint]| points.iter().map(|p| 2.0 * p.2).collect::<Vec<_>>();
        let (disk, link, cpu) = (with("disk"), with("link"), with("CPU"));
        let (now, then) = (&t4.links.cpu_to_disk, &disk.links.cpu_to_disk);
        assert_eq!(rates(&then.overwrite), twice(&now.overwrite));
        assert_eq!(rates(&then.fresh), twice(&now.fresh));
        let direct = |p: &HardwareProfile| p.links.disk_to_cpu.direct.clone();
        assert_eq!(rates(&direct(&disk)), twice(&direct(&t4)));
        let back = |p: &HardwareProfile| p.links.gpu_to_cpu.as_ref().unwrap().pinned[0].1;
        assert_eq!(back(&link), 2.0 * back(&t4));
        assert_eq!(cpu.cpu.quantise, Some(quantise.times(2.0)));
        assert_eq!(cpu.cpu.sampling_bytes_per_s, Some(6e9));
    }

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
