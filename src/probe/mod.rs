//! Measures this machine into a `HardwareProfile`: memory, products, attention, disk, and what they
//! cost each other. Measurements are interleaved in rounds and reported as medians, because machines
//! are noisy; the disk is measured on files without a name, so that nothing can be left behind.

mod bench;
mod burst;
mod cached;
mod calls;
mod compute;
mod contention;
mod disk;
mod gpu;
mod gpu_work;
mod launch;
mod products;
mod rounds;
mod samples;
mod saved;
mod scale;

pub use burst::{Burst, BurstPlace, Bursts, Products, burst_bytes, said_to_keep};
pub use calls::{CALL_BYTES, CallSize, Reads, WRITE_CALL_BYTES};
pub use gpu::GpuProbe;
pub use samples::median;
pub use saved::{ProfileKey, find_profile, profiles_dir, save_profile, timestamp};
pub use scale::{MAX_WRITTEN_BYTES, ProbeScale};

use crate::cost::rates::RatesError;
use crate::machine::MachineError;
use crate::machine::arena::MemoryError;
use crate::machine::cpu::kernels::Isa;
use crate::machine::cpu::pool;
use crate::machine::disk::{DiskError, check_disk_tier, filesystem_of};
use crate::machine::nvml;
use crate::machine::os::{self, OsError};
use crate::profile::{HardwareProfile, Links, MachineKey, MemoryTotals, ProfileError};
use crate::units::{MIB, show_bytes, show_rate, show_seconds};
use bench::Bench;
use compute::ComputeArea;
use contention::ContentionArea;
use disk::DiskArea;
use launch::LaunchBench;
use rounds::Rounds;
use scale::Extent;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use thiserror::Error;

/// Program text and what a run holds when it probes, besides a full probe's threads and buffers.
const HELD_BYTES: u64 = 100 * MIB;
/// What a probe needs beside its buffers and what the process already holds.
const SLACK_BYTES: u64 = 16 * MIB;
/// A probe takes so many times its time where DRAM changes its speed meanwhile.
const MORE_TIME: f64 = 2.0;
/// What a compute thread touches of its stack, generously.
const STACK_BYTES: u64 = 64 * 1024;

/// Enough for a full probe on this machine.
pub fn default_budget_bytes(threads: usize) -> u64 {
    HELD_BYTES + thread_bytes(threads) + Bench::most_bytes(ProbeScale::Full.extent())
}

/// Scratch and touched stacks of the threads that compute.
fn thread_bytes(threads: usize) -> u64 {
    threads as u64 * (pool::THREAD_BYTES + STACK_BYTES)
}

/// Why a machine could not be measured.
#[derive(Debug, Error)]
pub enum ProbeError {
    #[error("the probe was stopped; nothing was saved and nothing is left on the disk")]
    Stopped,
    #[error(
        "the probe needs {} of memory and may use {}: raise --cpu-mem or give a profile with --profile",
        show_bytes(*needed_bytes), show_bytes(*budget_bytes)
    )]
    Budget {
        needed_bytes: u64,
        budget_bytes: u64,
    },
    #[error("{path}: cannot be created ({source}): give another --offload-dir")]
    Directory {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Os(#[from] OsError),
    #[error(transparent)]
    Rates(#[from] RatesError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the measured figures make no profile ({0}): probe again on a quieter machine")]
    Profile(#[from] ProfileError),
}

/// What to measure and within which limits.
pub struct ProbeOptions<'a> {
    /// The disk of this directory is measured; it is created when it is not there.
    pub offload_dir: &'a Path,
    pub threads: usize,
    /// The whole process's memory while it probes.
    pub budget_bytes: u64,
    pub isa: Isa,
    pub scale: ProbeScale,
    /// How the figures were asked for, written into the profile.
    pub command: &'a str,
    /// Measured too, after everything else.
    pub gpu: Option<GpuProbe>,
    /// Hears of each stage in a line.
    pub progress: &'a mut dyn FnMut(&str),
    /// Set from a signal handler: ends the probe within a sample.
    pub stop: &'a AtomicBool,
}

/// Measures this machine. Writes at most `MAX_WRITTEN_BYTES`, all of them gone at the end.
pub fn probe(options: ProbeOptions) -> Result<HardwareProfile, ProbeError> {
    let extent = options.scale.extent();
    check_place(options.offload_dir)?;
    let room_bytes = room_within(options.budget_bytes, options.threads, extent)?;
    let mut bench = Bench::new(
        extent,
        room_bytes,
        (options.threads, options.isa),
        options.stop,
    )?;
    let mut areas = Areas {
        provenance: provenance(os::busy_cores(), options.threads),
        disk: DiskArea::new(options.offload_dir, &bench)?,
        compute: Rounds::default(),
        contention: ContentionArea::default(),
    };
    areas.tell_what_is_there(&bench, options.gpu.is_some(), options.progress);
    areas.measure(&mut bench, options.progress)?;
    let gpu = options.gpu.as_ref();
    let key = ProfileKey::of_this_machine(options.offload_dir, options.threads, options.isa.name())
        .with_gpu(gpu.map(|gpu| gpu.facts.name.as_str()));
    let mut profile = areas.profile(key, options.command)?;
    // Arenas and buffers of the measurements are gone before another machine is opened.
    drop(bench);
    let mut launches = LaunchBench::new(&profile, options.threads, options.offload_dir)?;
    launches.measure(&mut profile.cpu)?;
    drop(launches);
    if let Some(gpu) = gpu {
        let talk = (options.progress, options.stop);
        let how = (options.threads, options.scale.gpu());
        gpu::measure(&mut profile, gpu, how, talk)?;
    }
    // What is handed out is what a saved file would give back: checked by the same reader.
    Ok(HardwareProfile::from_toml(&profile.to_toml())?)
}

fn check_place(dir: &Path) -> Result<(), ProbeError> {
    check_disk_tier(dir)?;
    std::fs::create_dir_all(dir).map_err(|source| ProbeError::Directory {
        path: dir.to_owned(),
        source,
    })
}

/// Bytes that the probe's buffers may take of a budget for the whole process.
fn room_within(budget_bytes: u64, threads: usize, extent: &Extent) -> Result<u64, ProbeError> {
    let held_bytes = os::process_memory()?.resident_bytes + thread_bytes(threads) + SLACK_BYTES;
    let needed_bytes = held_bytes + Bench::least_bytes(extent);
    if needed_bytes > budget_bytes {
        return Err(ProbeError::Budget {
            needed_bytes,
            budget_bytes,
        });
    }
    Ok(budget_bytes - held_bytes)
}

/// Says so in the profile when the cores were busy before the probe began: figures will be low.
fn provenance(busy: Option<f64>, threads: usize) -> String {
    match busy.filter(|busy| *busy > 0.25 * threads as f64) {
        None => "measured".to_owned(),
        Some(busy) => format!("measured while other programs kept {busy:.1} cores busy"),
    }
}

/// Everything that is measured.
struct Areas {
    provenance: String,
    disk: DiskArea,
    /// Each round for itself.
    compute: Rounds,
    contention: ContentionArea,
}

impl Areas {
    fn tell_what_is_there(&self, bench: &Bench, gpu: bool, progress: &mut dyn FnMut(&str)) {
        if self.provenance != "measured" {
            progress(&format!(
                "{}: probe again when it is quiet",
                self.provenance
            ));
        }
        if !self.disk.file.is_direct() {
            progress("direct I/O is refused here: measuring buffered I/O with drop-behind");
        }
        let place = filesystem_of(self.disk.file.path());
        if place.is_network() {
            progress(&format!(
                "{} is a network mount: its rates may not last",
                place.describe()
            ));
        }
        if bench.is_within_cache() {
            progress(
                "the processor's cache is as large as the probe's memory: raise its budget for figures of DRAM",
            );
        }
        for gpu in nvml::gpus()
            .unwrap_or_default()
            .into_iter()
            .filter(|_| !gpu)
        {
            let (name, total) = (gpu.name, show_bytes(gpu.total_bytes));
            progress(&format!(
                "GPU {name} ({total}) is there; this profile is of the CPU and the disk"
            ));
        }
    }

    /// Rounds over all areas, until there are enough while DRAM has one speed or the time is up; at least one.
    fn measure(
        &mut self,
        bench: &mut Bench,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(), ProbeError> {
        let begin = Instant::now();
        let extent = bench.extent;
        for round in 1.. {
            let so_far = begin.elapsed().as_secs_f64();
            let done_s = so_far + so_far / (round - 1).max(1) as f64;
            if self
                .compute
                .are_enough(extent.rounds, done_s > extent.limit_s)
            {
                break;
            }
            if round > 1 && done_s > MORE_TIME * extent.limit_s {
                progress("this machine is slow: fewer rounds are measured");
                break;
            }
            progress(&self.about(round, extent.rounds, so_far));
            self.disk.round(bench)?;
            let mut area = ComputeArea::new(extent);
            let reads = area.round(bench)?;
            self.compute.push(reads, area);
            let writes = round <= extent.write_rounds;
            self.contention.round(bench, &self.disk, writes)?;
        }
        if let Some(left_out) = self.compute.left_out() {
            progress(&left_out);
            self.provenance += &format!("; {left_out}");
        }
        Ok(())
    }

    fn about(&self, round: usize, rounds: usize, so_far_s: f64) -> String {
        let so_far = show_seconds(so_far_s);
        match round > rounds {
            false => format!("round {round} of {rounds} ({so_far} so far)"),
            true => format!("round {round}, because DRAM changed its speed ({so_far} so far)"),
        }
    }

    fn profile(self, key: ProfileKey, command: &str) -> Result<HardwareProfile, ProbeError> {
        let memory = os::memory_now()?;
        let compute = self.compute.joined();
        let compute = compute.expect("at least one round is measured");
        Ok(HardwareProfile {
            schema: 1,
            machine: MachineKey {
                name: key.name(),
                date: saved::today(),
                command: command.to_owned(),
                provenance: self.provenance.clone(),
                cpu: key.cpu,
                threads: key.threads,
                kernels: key.kernels,
                disk: key.disk,
            },
            memory: MemoryTotals {
                cpu_total_bytes: memory.total_bytes,
                // Unknown: the GPU's driver page-locks by rules of its own, which RLIMIT_MEMLOCK does not bound.
                // What it refuses is planned anew.
                page_locked_limit_bytes: 0,
            },
            gpu: None,
            links: Links {
                cpu_to_gpu: None,
                gpu_to_cpu: None,
                disk_to_cpu: self.disk.read_link(),
                cpu_to_disk: self.disk.write_link(),
            },
            cpu: compute.facts(),
            contention: self.contention.shares(),
            calibration: Default::default(),
        })
    }
}

/// The main figures of a profile in a few lines, for people.
pub fn summary(profile: &HardwareProfile) -> Vec<String> {
    let cpu = &profile.cpu;
    let fastest =
        |points: &[crate::profile::DiskPoint]| points.iter().map(|p| p.2).fold(0.0, f64::max);
    let links = &profile.links;
    let mut lines = vec![
        format!(
            "{}, {} threads",
            profile.machine.cpu, profile.machine.threads
        ),
        format!(
            "memory {}: read {}, copy {}",
            show_bytes(profile.memory.cpu_total_bytes),
            show_rate(cpu.dram_read_bytes_per_s),
            show_rate(cpu.dram_copy_bytes_per_s)
        ),
        format!(
            "disk {}: read {}, first write {}, overwrite {}",
            profile.machine.disk,
            show_rate(fastest(&links.disk_to_cpu.direct)),
            show_rate(fastest(&links.cpu_to_disk.fresh)),
            show_rate(fastest(&links.cpu_to_disk.overwrite))
        ),
    ];
    for (format, curve) in &cpu.gemm {
        let rate = |p: &(usize, usize, usize, f64)| 2.0 * (p.0 * p.1 * p.2) as f64 / p.3;
        let best = curve.points.iter().map(rate).fold(0.0, f64::max);
        lines.push(format!(
            "products with {format} weights: up to {:.0} GFLOP/s",
            best / 1e9
        ));
    }
    lines.extend(profile.gpu.iter().map(|gpu| {
        let link = |link: &Option<crate::profile::GpuLink>| {
            let points = link.iter().flat_map(|l| &l.pinned);
            show_rate(points.map(|p| p.1).fold(0.0, f64::max))
        };
        format!(
            "{} ({}; context and libraries {}): memory {}, up {}, down {}",
            gpu.name,
            show_bytes(gpu.total_bytes),
            show_bytes(gpu.context_bytes),
            show_rate(gpu.copy_bytes_per_s),
            link(&links.cpu_to_gpu),
            link(&links.gpu_to_cpu)
        )
    }));
    lines
}

#[cfg(test)]
mod tests;
