//! What the operating system says: free memory, this process's peak, threads, names, limits.
//! Every reader of /proc and /sys takes a root directory, so that tests can feed made-up trees.
//! Reading only (and resetting our own peak); what to do with the figures is the planner's.

mod cgroup;
mod confine;
mod cores;
mod process;
mod turns;

pub(crate) use cgroup::unescape;
pub use confine::{ConfineError, GroupAccount, MemoryGroup, wait_for_peak};
pub use cores::{CpuInfo, cpu_info, cpu_info_at, default_threads, default_threads_at};
pub use cores::{bind_current_thread, core_of_each, last_level_cache_bytes};
pub use process::{ProcessMemory, process_memory, process_memory_at};
pub use process::{busy_cores, keep_heap_small, kernel_version, release_free_heap, reset_peak};
pub use turns::take_short_turns;

use crate::units::GIB;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why the operating system's figures could not be had.
#[derive(Debug, Error)]
pub enum OsError {
    #[error("{path}: cannot be read ({source}): is /proc mounted?")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: has no {key}: give --cpu-mem and --threads by hand")]
    Missing { path: PathBuf, key: &'static str },
    #[error("the system's memory cannot be read ({0}): give --cpu-mem by hand")]
    System(String),
}

/// Memory at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryNow {
    /// The smaller of the machine's memory and the tightest limit of an enclosing cgroup.
    pub total_bytes: u64,
    /// What may be taken without swapping, without a kill, whoever's limit comes first.
    pub free_bytes: u64,
    /// What `free_bytes` comes from: "MemAvailable" or the directory of a cgroup.
    pub bound_by: String,
}

/// Memory of this machine now, within every enclosing cgroup. Swap never counts.
#[cfg(target_os = "linux")]
pub fn memory_now() -> Result<MemoryNow, OsError> {
    memory_now_at(Path::new("/"))
}

/// Memory of this machine now.
#[cfg(not(target_os = "linux"))]
pub fn memory_now() -> Result<MemoryNow, OsError> {
    let mut system = sysinfo::System::new().map_err(|e| OsError::System(format!("{e:?}")))?;
    system.refresh_memory();
    Ok(MemoryNow {
        total_bytes: system.total_memory(),
        free_bytes: system.available_memory(),
        bound_by: "MemAvailable".to_owned(),
    })
}

/// As `memory_now`, over the /proc and /sys below `root`.
pub fn memory_now_at(root: &Path) -> Result<MemoryNow, OsError> {
    let path = root.join("proc/meminfo");
    let meminfo = read(&path)?;
    let field = |key: &'static str| {
        let bytes = kilobytes(&meminfo, key);
        bytes.ok_or_else(|| OsError::Missing {
            path: path.clone(),
            key,
        })
    };
    let mut now = MemoryNow {
        total_bytes: field("MemTotal:")?,
        free_bytes: field("MemAvailable:")?,
        bound_by: "MemAvailable".to_owned(),
    };
    for limit in cgroup::memory_limits(root) {
        now.total_bytes = now.total_bytes.min(limit.limit_bytes);
        if limit.headroom_bytes < now.free_bytes {
            now.free_bytes = limit.headroom_bytes;
            now.bound_by = format!("cgroup {}", limit.directory.display());
        }
    }
    Ok(now)
}

/// What a process should plan with when nobody says: free memory less a reserve.
pub fn default_cpu_budget() -> Result<u64, OsError> {
    memory_now().map(|now| budget_within(&now))
}

/// Free memory less the larger of 1 GiB and 10 %; less just 10 % where the limit is under 4 GiB,
/// since a whole gibibyte would leave such a machine nothing.
pub fn budget_within(now: &MemoryNow) -> u64 {
    let tenth = now.free_bytes / 10;
    let reserve = if now.total_bytes < 4 * GIB {
        tenth
    } else {
        tenth.max(GIB)
    };
    now.free_bytes.saturating_sub(reserve)
}

fn read(path: &Path) -> Result<String, OsError> {
    std::fs::read_to_string(path).map_err(|source| OsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The value of a "Key:   123 kB" line, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::units::MIB;

    /// A made-up root directory: (path, content) pairs under a temporary directory.
    pub fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12582912 kB\nSwapFree: 99999999 kB\n",
    );

    #[test]
    fn without_cgroups_mem_available_counts_and_swap_does_not() {
        let root = tree(&[MEMINFO]);
        let now = memory_now_at(root.path()).unwrap();
        assert_eq!(now.total_bytes, 16 * GIB);
        assert_eq!(now.free_bytes, 12 * GIB);
        assert_eq!(now.bound_by, "MemAvailable");
        assert_eq!(budget_within(&now), 12 * GIB - 12 * GIB / 10);
    }

    #[test]
    fn a_missing_proc_is_an_error_that_names_it() {
        let root = tree(&[]);
        let error = memory_now_at(root.path()).unwrap_err().to_string();
        assert!(error.contains("proc/meminfo"), "{error}");
        let root = tree(&[("proc/meminfo", "MemTotal: 5 kB\n")]);
        let error = memory_now_at(root.path()).unwrap_err().to_string();
        assert!(error.contains("MemAvailable"), "{error}");
    }

    #[test]
    fn reserves_are_a_gibibyte_a_tenth_or_less_on_small_limits() {
        let budget = |total_bytes, free_bytes| {
            budget_within(&MemoryNow {
                total_bytes,
                free_bytes,
                bound_by: String::new(),
            })
        };
        assert_eq!(budget(8 * GIB, 6 * GIB), 5 * GIB);
        assert_eq!(budget(64 * GIB, 40 * GIB), 36 * GIB);
        assert_eq!(budget(2 * GIB, 1000 * MIB), 900 * MIB);
        assert_eq!(budget(8 * GIB, 512 * MIB), 0);
    }

    #[test]
    fn nested_v2_groups_bind_by_the_tightest_headroom() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user.slice/job.scope\n"),
            (
                "proc/self/mountinfo",
                "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/memory.stat", ""),
            ("sys/fs/cgroup/user.slice/memory.max", "4294967296\n"),
            ("sys/fs/cgroup/user.slice/memory.current", "3221225472\n"),
            (
                "sys/fs/cgroup/user.slice/memory.stat",
                "anon 1\ninactive_file 268435456\nactive_file 268435456\n",
            ),
            ("sys/fs/cgroup/user.slice/job.scope/memory.max", "max\n"),
            (
                "sys/fs/cgroup/user.slice/job.scope/memory.high",
                "8589934592\n",
            ),
            (
                "sys/fs/cgroup/user.slice/job.scope/memory.current",
                "1073741824\n",
            ),
        ]);
        let now = memory_now_at(root.path()).unwrap();
        assert_eq!(now.total_bytes, 4 * GIB);
        assert_eq!(now.free_bytes, GIB + 512 * MIB);
        assert!(now.bound_by.ends_with("user.slice"), "{}", now.bound_by);
    }

    #[test]
    fn v1_groups_give_back_their_file_cache() {
        let v1 = |limit| {
            [
                MEMINFO,
                ("proc/self/cgroup", "4:memory:/a/b\n1:cpu:/\n0::/\n"),
                (
                    "proc/self/mountinfo",
                    "35 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
                ),
                (
                    "sys/fs/cgroup/memory/memory.limit_in_bytes",
                    "9223372036854771712\n",
                ),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "9999999999\n"),
                ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", limit),
                (
                    "sys/fs/cgroup/memory/a/memory.usage_in_bytes",
                    "2147483648\n",
                ),
                (
                    "sys/fs/cgroup/memory/a/memory.stat",
                    "inactive_file 1\ntotal_inactive_file 1073741824\ntotal_active_file 536870912\n",
                ),
                (
                    "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
                    "9223372036854771712\n",
                ),
            ]
        };
        let now = memory_now_at(tree(&v1("3221225472\n")).path()).unwrap();
        assert_eq!(now.free_bytes, 3 * GIB - 512 * MIB);
        assert_eq!(now.total_bytes, 3 * GIB);
        let now = memory_now_at(tree(&v1("9223372036854771712\n")).path()).unwrap();
        assert_eq!(now.free_bytes, 12 * GIB);
        assert_eq!(now.total_bytes, 16 * GIB);
    }

    #[test]
    fn a_v1_limit_of_a_group_that_cannot_be_seen_counts() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/docker/abc\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:31 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1073741824\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "cache 5\nhierarchical_memory_limit 2147483648\ntotal_inactive_file 0\n",
            ),
        ]);
        let now = memory_now_at(root.path()).unwrap();
        assert_eq!((now.total_bytes, now.free_bytes), (2 * GIB, GIB));
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_mount() {
        // The mount shows only the container's subtree; the path in /proc/self/cgroup is the host's.
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/docker/abc\n"),
            (
                "proc/self/mountinfo",
                "31 23 0:28 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            ),
            ("sys/fs/cgroup/memory.max", "2147483648\n"),
            ("sys/fs/cgroup/memory.current", "2147483000\n"),
        ]);
        let now = memory_now_at(root.path()).unwrap();
        assert_eq!((now.total_bytes, now.free_bytes), (2 * GIB, 648));
    }

    #[test]
    fn over_its_limit_a_group_has_nothing_free() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/../outside\n"),
            (
                "proc/self/mountinfo",
                "31 23 0:28 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
            ),
            ("sys/fs/cgroup/memory.max", "1000\n"),
            ("sys/fs/cgroup/memory.current", "2000\n"),
        ]);
        assert_eq!(memory_now_at(root.path()).unwrap().free_bytes, 0);
    }

    #[test]
    fn this_machine_has_memory() {
        let now = memory_now().unwrap();
        assert!(
            now.free_bytes > 0 && now.free_bytes <= now.total_bytes,
            "{now:?}"
        );
        assert!(default_cpu_budget().unwrap() < now.total_bytes);
    }
}
