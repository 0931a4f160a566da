//! Processors: how many threads to use by default, what the CPU is called, how big its cache is.
//! The threads themselves are the pool's (machine/cpu).

use super::cgroup::cpu_quota;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Threads to use when nobody says: physical cores within affinity and every enclosing CPU quota.
#[cfg(target_os = "linux")]
pub fn default_threads() -> usize {
    default_threads_at(Path::new("/"))
}

/// Threads to use when nobody says: physical cores.
#[cfg(not(target_os = "linux"))]
pub fn default_threads() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    sysinfo::System::physical_core_count().map_or(logical, |n| n.clamp(1, logical))
}

/// As `default_threads`, over the /proc and /sys below `root`. Half a core more would only be
/// throttled at every join, so that a quota is rounded down.
pub fn default_threads_at(root: &Path) -> usize {
    let cores = physical_cores(root).len().max(1);
    match cpu_quota(root) {
        Some(quota) => cores.min((quota.floor() as usize).max(1)),
        None => cores,
    }
}

/// CPUs that this process may run on.
fn allowed_cpus(root: &Path) -> Vec<usize> {
    let status = std::fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let list = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    let cpus = list.map(cpu_list).unwrap_or_default();
    if !cpus.is_empty() {
        return cpus;
    }
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

/// Reads "0-3,8,10-11". A range that no machine has is cut, not expanded.
fn cpu_list(text: &str) -> Vec<usize> {
    const MAX_CPUS: usize = 1 << 16;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        Some(first..=last.min(first.saturating_add(MAX_CPUS)))
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// The cores within affinity, each as its CPUs: hyperthreads share (package, core).
fn physical_cores(root: &Path) -> Vec<Vec<usize>> {
    let topology = |cpu: usize, file: &str| {
        let path = format!("sys/devices/system/cpu/cpu{cpu}/topology/{file}");
        std::fs::read_to_string(root.join(path)).ok()
    };
    let core = |cpu: usize| {
        let known = topology(cpu, "physical_package_id").zip(topology(cpu, "core_id"));
        known.unwrap_or_else(|| (String::new(), format!("unknown {cpu}")))
    };
    let mut cores = BTreeMap::<_, Vec<usize>>::new();
    for cpu in allowed_cpus(root) {
        cores.entry(core(cpu)).or_default().push(cpu);
    }
    cores.into_values().collect()
}

/// A core for each of so many threads that compute together, as its CPUs, where they are as many as there are
/// cores: two that wake up on one core would take twice as long, and the scheduler may leave them there for
/// milliseconds. Empty where they are not, since others may want the same cores.
pub fn core_of_each(threads: usize) -> Vec<Vec<usize>> {
    core_of_each_at(Path::new("/"), threads)
}

fn core_of_each_at(root: &Path, threads: usize) -> Vec<Vec<usize>> {
    let mut cores = physical_cores(root);
    if threads < 2 || cores.len() != threads {
        cores.clear();
    }
    cores
}

/// What the processor is called and which instructions matter to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuInfo {
    pub model: String,
    /// Physical cores within affinity.
    pub cores: usize,
    /// Of the flags that the kernels care for, those that are there.
    pub flags: Vec<&'static str>,
}

impl CpuInfo {
    /// "AMD EPYC, 2 cores, avx512f avx512_bf16": a part of a profile's key.
    pub fn describe(&self) -> String {
        let cores = match self.cores {
            1 => "1 core".to_owned(),
            n => format!("{n} cores"),
        };
        let words = [self.model.clone(), cores, self.flags.join(" ")];
        words
            .into_iter()
            .filter(|w| !w.is_empty())
            .collect::<Vec<_>>()
            .join(", ")
    }
}

const FLAGS: [&str; 12] = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimdhp",
    "bf16",
];

/// This machine's processor.
pub fn cpu_info() -> CpuInfo {
    cpu_info_at(Path::new("/"))
}

/// As `cpu_info`, over the /proc and /sys below `root`.
pub fn cpu_info_at(root: &Path) -> CpuInfo {
    let text = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let value = |keys: &[&str]| {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        let mut wanted = pairs.filter(|(key, _)| keys.contains(&key.trim()));
        wanted.next().map(|(_, value)| value.trim().to_owned())
    };
    let model = value(&["model name", "Model", "cpu model"]).filter(|m| !m.is_empty());
    let flags = value(&["flags", "Features"]).unwrap_or_default();
    let present: BTreeSet<&str> = flags.split_whitespace().collect();
    CpuInfo {
        model: model.unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: physical_cores(root).len(),
        flags: FLAGS
            .into_iter()
            .filter(|flag| present.contains(flag))
            .collect(),
    }
}

/// Bytes of the largest cache of the first processor, where the kernel says.
pub fn last_level_cache_bytes() -> Option<u64> {
    last_level_cache_bytes_at(Path::new("/"))
}

fn last_level_cache_bytes_at(root: &Path) -> Option<u64> {
    let size = |index: usize| {
        let path = format!("sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(root.join(path)).ok()?;
        let kibibytes: u64 = text.trim().strip_suffix('K')?.parse().ok()?;
        kibibytes.checked_mul(1024)
    };
    (0..8).filter_map(size).max()
}

/// Keeps the calling thread on these CPUs. False where that is not possible.
#[cfg(target_os = "linux")]
pub fn bind_current_thread(cpus: &[usize]) -> bool {
    let mut set = std::mem::MaybeUninit::<libc::cpu_set_t>::zeroed();
    let most = 8 * size_of::<libc::cpu_set_t>();
    if cpus.is_empty() || cpus.iter().any(|&cpu| cpu >= most) {
        return false;
    }
    // SAFETY: a zeroed cpu_set_t is the empty set, each CPU is within it, and the size is its own.
    unsafe {
        cpus.iter()
            .for_each(|&cpu| libc::CPU_SET(cpu, set.assume_init_mut()));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), set.as_ptr()) == 0
    }
}

#[cfg(not(target_os = "linux"))]
pub fn bind_current_thread(_cpus: &[usize]) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::os::tests::tree;

    const TOPOLOGY: [(&str, &str); 8] = [
        ("sys/devices/system/cpu/cpu0/topology/core_id", "0\n"),
        (
            "sys/devices/system/cpu/cpu0/topology/physical_package_id",
            "0\n",
        ),
        ("sys/devices/system/cpu/cpu1/topology/core_id", "1\n"),
        (
            "sys/devices/system/cpu/cpu1/topology/physical_package_id",
            "0\n",
        ),
        ("sys/devices/system/cpu/cpu2/topology/core_id", "0\n"),
        (
            "sys/devices/system/cpu/cpu2/topology/physical_package_id",
            "0\n",
        ),
        ("sys/devices/system/cpu/cpu3/topology/core_id", "1\n"),
        (
            "sys/devices/system/cpu/cpu3/topology/physical_package_id",
            "0\n",
        ),
    ];

    fn machine(more: &[(&str, &str)]) -> tempfile::TempDir {
        tree(&[&TOPOLOGY[..], more].concat())
    }

    #[test]
    fn threads_are_physical_cores_within_affinity_and_quota() {
        let all = (
            "proc/self/status",
            "Cpus_allowed:\tf\nCpus_allowed_list:\t0-3\n",
        );
        assert_eq!(default_threads_at(machine(&[all]).path()), 2);
        let one_core = ("proc/self/status", "Cpus_allowed_list:\t0,2\n");
        assert_eq!(default_threads_at(machine(&[one_core]).path()), 1);
        let quota = [
            all,
            ("proc/self/cgroup", "0::/\n"),
            (
                "proc/self/mountinfo",
                "31 23 0:28 / /cg rw - cgroup2 cgroup2 rw\n",
            ),
            ("cg/cpu.max", "50000 100000\n"),
        ];
        assert_eq!(default_threads_at(machine(&quota).path()), 1);
    }

    #[test]
    fn as_many_threads_as_cores_have_one_each() {
        let all = ("proc/self/status", "Cpus_allowed_list:\t0-3\n");
        let of_each = |threads| core_of_each_at(machine(&[all]).path(), threads);
        assert_eq!(of_each(2), [[0, 2], [1, 3]]);
        assert!(of_each(1).is_empty() && of_each(3).is_empty() && of_each(4).is_empty());
    }

    #[test]
    fn without_topology_every_cpu_is_a_core() {
        let root = tree(&[("proc/self/status", "Cpus_allowed_list:\t0-2,7\n")]);
        assert_eq!(default_threads_at(root.path()), 4);
        assert_eq!(cpu_list("0-1,4"), [0, 1, 4]);
        assert!(cpu_list("x,,-").is_empty());
    }

    #[test]
    fn the_cpu_is_named_with_the_flags_that_matter() {
        let info = (
            "proc/cpuinfo",
            "processor: 0\nmodel name\t: Some CPU\nflags\t: fpu fma avx2\n",
        );
        let status = ("proc/self/status", "Cpus_allowed_list:\t0-3\n");
        let cpu = cpu_info_at(machine(&[info, status]).path());
        assert_eq!(cpu.describe(), "Some CPU, 2 cores, avx2 fma");
        assert!(!cpu_info().model.is_empty());
    }

    #[test]
    fn the_largest_cache_counts() {
        let root = tree(&[
            ("sys/devices/system/cpu/cpu0/cache/index0/size", "48K\n"),
            ("sys/devices/system/cpu/cpu0/cache/index3/size", "32768K\n"),
        ]);
        assert_eq!(last_level_cache_bytes_at(root.path()), Some(32 << 20));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_can_be_bound() {
        let bound = std::thread::spawn(|| {
            let first = allowed_cpus(Path::new("/"))[0];
            bind_current_thread(&[first])
                && !bind_current_thread(&[1 << 20])
                && !bind_current_thread(&[])
        });
        assert!(bound.join().unwrap());
    }
}
