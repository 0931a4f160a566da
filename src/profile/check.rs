//! Whether a profile can be computed with: a figure that is not possible is refused with its key, before it becomes
//! a plan of no number. What the figures mean is profile.rs.

use super::{AttentionRates, GemmCurve, GpuLink, HardwareProfile, ProfileError, QuantiseRates};
use std::collections::BTreeMap;

/// Figures by their keys.
type Rates = Vec<(String, f64)>;

impl HardwareProfile {
    /// Every figure that something is divided by is positive and finite; every table has a point.
    pub(super) fn check(&self) -> Result<(), ProfileError> {
        let mut rates = vec![
            ("machine.threads".to_owned(), self.machine.threads as f64),
            (
                "memory.cpu_total_bytes".to_owned(),
                self.memory.cpu_total_bytes as f64,
            ),
        ];
        self.collect_links(&mut rates)?;
        self.collect_cpu(&mut rates)?;
        self.collect_gpu(&mut rates)?;
        let terms = self.calibration.terms.iter();
        rates.extend(terms.map(|(k, v)| (format!("calibration.{k}"), *v)));
        for (pair, keeps) in &self.contention {
            let key = format!("contention.{pair}");
            rates.extend(keeps.iter().map(|keep| (key.clone(), *keep)));
        }
        for (key, seconds) in self.delays_s() {
            need_not_negative(key, seconds)?;
        }
        rates
            .into_iter()
            .try_for_each(|(key, value)| need_positive(key, value))
    }

    fn collect_links(&self, rates: &mut Rates) -> Result<(), ProfileError> {
        let links = &self.links;
        for (key, points) in [
            ("links.disk_to_cpu.direct", &links.disk_to_cpu.direct),
            ("links.cpu_to_disk.fresh", &links.cpu_to_disk.fresh),
            ("links.cpu_to_disk.overwrite", &links.cpu_to_disk.overwrite),
        ] {
            need_point(key, points.len())?;
            rates.extend(points.iter().map(|p| (key.to_owned(), p.2)));
        }
        for (name, link) in self.gpu_links() {
            let points = link.pinned.iter().chain(&link.unpinned);
            rates.extend(points.map(|p| (format!("links.{name}"), p.1)));
        }
        Ok(())
    }

    fn collect_cpu(&self, rates: &mut Rates) -> Result<(), ProfileError> {
        let cpu = &self.cpu;
        let figures = [
            ("dram_read_bytes_per_s", Some(cpu.dram_read_bytes_per_s)),
            ("dram_copy_bytes_per_s", Some(cpu.dram_copy_bytes_per_s)),
            ("sampling_bytes_per_s", cpu.sampling_bytes_per_s),
            ("rowwise_bytes_per_s", cpu.rowwise_bytes_per_s),
            ("append_bytes_per_s", cpu.append_bytes_per_s),
        ];
        let there = figures.into_iter().filter_map(|(key, rate)| {
            let key = format!("cpu.{key}");
            Some((key, rate?))
        });
        rates.extend(there);
        collect_compute("cpu", &cpu.gemm, &cpu.attention, rates)?;
        collect_quantise("cpu", &cpu.quantise, rates);
        self.check_cache(rates)
    }

    fn collect_gpu(&self, rates: &mut Rates) -> Result<(), ProfileError> {
        let Some(gpu) = &self.gpu else {
            return Ok(());
        };
        rates.extend([
            ("gpu.total_bytes".to_owned(), gpu.total_bytes as f64),
            ("gpu.copy_bytes_per_s".to_owned(), gpu.copy_bytes_per_s),
        ]);
        let widen = gpu.widen_q4_bytes_per_s.iter();
        rates.extend(widen.map(|p| ("gpu.widen_q4_bytes_per_s".to_owned(), p.1)));
        collect_quantise("gpu", &gpu.quantise, rates);
        collect_compute("gpu", &gpu.gemm, &gpu.attention, rates)
    }

    fn gpu_links(&self) -> impl Iterator<Item = (&'static str, &GpuLink)> {
        let links = [
            ("cpu_to_gpu", &self.links.cpu_to_gpu),
            ("gpu_to_cpu", &self.links.gpu_to_cpu),
        ];
        let there = links.into_iter();
        there.filter_map(|(name, link)| Some((name, link.as_ref()?)))
    }

    fn check_cache(&self, rates: &mut Rates) -> Result<(), ProfileError> {
        for (table, points) in &self.cpu.gemm_cached {
            let key = format!("cpu.gemm_cached.{table}");
            rates.extend(points.iter().map(|p| (key.clone(), p.1)));
        }
        for &(passed, kept) in &self.cpu.cache_keeps {
            let key = "cpu.cache_keeps".to_owned();
            rates.push((key.clone(), passed));
            need(
                (0.0..=1.0).contains(&kept),
                "a part from 0 to 1",
                (key, kept),
            )?;
        }
        Ok(())
    }

    /// Seconds that are added to others, and parts that have a floor of their own: they may be zero.
    fn delays_s(&self) -> Vec<(String, f64)> {
        let mut delays_s = vec![
            ("cpu.launch_s".to_owned(), self.cpu.launch_s),
            ("cpu.handover_s".to_owned(), self.cpu.handover_s),
            (
                "cpu.handover_busy_s".to_owned(),
                self.cpu.handover_busy_s.unwrap_or(0.0),
            ),
            ("cpu.wake_takes_s".to_owned(), self.cpu.wake_takes_s),
            ("cpu.append_call_s".to_owned(), self.cpu.append_call_s),
            (
                "links.disk_to_cpu.latency_s".to_owned(),
                self.links.disk_to_cpu.latency_s,
            ),
            (
                "links.cpu_to_disk.latency_s".to_owned(),
                self.links.cpu_to_disk.latency_s,
            ),
        ];
        for (name, link) in self.gpu_links() {
            let percent = link.both_directions_pct;
            delays_s.push((format!("links.{name}.latency_s"), link.latency_s));
            delays_s.push((format!("links.{name}.both_directions_pct"), percent));
        }
        let mut calls = |device: &str, attention: &BTreeMap<String, AttentionRates>| {
            let key = |format| format!("{device}.attention.{format}.decode_call_s");
            delays_s.extend(attention.iter().map(|(f, a)| (key(f), a.decode_call_s)));
        };
        calls("cpu", &self.cpu.attention);
        if let Some(gpu) = &self.gpu {
            calls("gpu", &gpu.attention);
            delays_s.push(("gpu.launch_s".to_owned(), gpu.launch_s));
        }
        delays_s
    }
}

fn collect_compute(
    device: &str,
    gemm: &BTreeMap<String, GemmCurve>,
    attention: &BTreeMap<String, AttentionRates>,
    rates: &mut Rates,
) -> Result<(), ProfileError> {
    for (format, curve) in gemm {
        let key = format!("{device}.gemm.{format}");
        need_point(&key, curve.points.len())?;
        rates.extend(curve.points.iter().map(|p| (key.clone(), p.3)));
    }
    for (format, a) in attention {
        let key = format!("{device}.attention.{format}");
        rates.extend(a.clone().all_mut().map(|rate| (key.clone(), *rate)));
    }
    Ok(())
}

fn collect_quantise(device: &str, quantise: &Option<QuantiseRates>, rates: &mut Rates) {
    let key = |name| format!("{device}.quantise.{name}");
    if let Some(q) = quantise {
        rates.push((key("pack_bytes_per_s"), q.pack_bytes_per_s));
        rates.push((key("append_bytes_per_s"), q.append_bytes_per_s));
    }
}

fn need_point(key: &str, points: usize) -> Result<(), ProfileError> {
    let error = || ProfileError::Value {
        key: key.to_owned(),
        rule: "a table of at least one point",
        value: "empty".into(),
    };
    (points > 0).then_some(()).ok_or_else(error)
}

fn need_not_negative(key: String, value: f64) -> Result<(), ProfileError> {
    need(value >= 0.0, "zero or more", (key, value))
}

fn need_positive(key: String, value: f64) -> Result<(), ProfileError> {
    need(value > 0.0, "positive", (key, value))
}

fn need(holds: bool, rule: &'static str, (key, value): (String, f64)) -> Result<(), ProfileError> {
    if holds && value.is_finite() {
        return Ok(());
    }
    Err(ProfileError::Value {
        key,
        rule,
        value: value.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::compiled_in;

    /// The T4's profile with every figure that a probe takes besides.
    fn whole() -> toml::Table {
        let text = compiled_in("t4-gcp").unwrap();
        let mut profile: toml::Table = text.parse().unwrap();
        for (key, value) in [
            ("cpu.sampling_bytes_per_s", 1e10),
            ("cpu.append_bytes_per_s", 1e10),
            ("cpu.handover_s", 1e-5),
        ] {
            set(&mut profile, key, value);
        }
        profile
    }

    /// Sets a figure by its dotted key.
    fn set(profile: &mut toml::Table, key: &str, value: f64) {
        let mut at = profile;
        let (path, last) = key.rsplit_once('.').unwrap();
        for part in path.split('.') {
            at = at[part].as_table_mut().unwrap();
        }
        at.insert(last.to_owned(), value.into());
    }

    fn read_with(key: &str, value: f64) -> Result<HardwareProfile, ProfileError> {
        let mut profile = whole();
        set(&mut profile, key, value);
        HardwareProfile::from_toml(&profile.to_string())
    }

    #[test]
    fn what_something_is_divided_by_must_be_positive() {
        for key in [
            "cpu.dram_read_bytes_per_s",
            "cpu.dram_copy_bytes_per_s",
            "cpu.sampling_bytes_per_s",
            "cpu.rowwise_bytes_per_s",
            "cpu.append_bytes_per_s",
            "cpu.quantise.pack_bytes_per_s",
            "cpu.quantise.append_bytes_per_s",
            "gpu.copy_bytes_per_s",
            "gpu.quantise.pack_bytes_per_s",
            "gpu.quantise.append_bytes_per_s",
        ] {
            for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
                let error = read_with(key, value).expect_err(key).to_string();
                assert!(error.contains(key), "{error}");
            }
        }
    }

    #[test]
    fn what_is_added_may_be_zero_and_nothing_less() {
        for key in [
            "cpu.launch_s",
            "cpu.handover_s",
            "gpu.launch_s",
            "links.disk_to_cpu.latency_s",
            "links.cpu_to_disk.latency_s",
            "links.cpu_to_gpu.latency_s",
            "links.gpu_to_cpu.latency_s",
            "links.gpu_to_cpu.both_directions_pct",
        ] {
            read_with(key, 0.0).expect(key);
            for value in [-1.0, f64::NAN, f64::INFINITY] {
                let error = read_with(key, value).expect_err(key).to_string();
                assert!(error.contains(key), "{error}");
            }
        }
    }
}
