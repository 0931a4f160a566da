//! This process and this kernel: memory used and its peak, the kernel's version.

use super::{OsError, kilobytes, read};
use std::path::Path;

/// Resident memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMemory {
    /// The highest it was since the start or the last `reset_peak` (VmHWM).
    pub peak_bytes: u64,
    /// What it is now (VmRSS).
    pub resident_bytes: u64,
}

/// This process's memory.
#[cfg(target_os = "linux")]
pub fn process_memory() -> Result<ProcessMemory, OsError> {
    process_memory_at(Path::new("/"))
}

/// This process's memory. The peak is not kept by sysinfo: it is what is resident now.
#[cfg(not(target_os = "linux"))]
pub fn process_memory() -> Result<ProcessMemory, OsError> {
    let failed = |e: String| OsError::System(e);
    let mut system = sysinfo::System::new().map_err(|e| failed(format!("{e:?}")))?;
    let pid = sysinfo::get_current_pid().map_err(|e| failed(format!("{e:?}")))?;
    system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), true);
    let process = system.process(pid);
    let resident_bytes = process
        .ok_or_else(|| failed("no such process".into()))?
        .memory();
    Ok(ProcessMemory {
        peak_bytes: resident_bytes,
        resident_bytes,
    })
}

/// As `process_memory`, over the /proc below `root`.
pub fn process_memory_at(root: &Path) -> Result<ProcessMemory, OsError> {
    let path = root.join("proc/self/status");
    let status = read(&path)?;
    let field = |key: &'static str| {
        kilobytes(&status, key).ok_or_else(|| OsError::Missing {
            path: path.clone(),
            key,
        })
    };
    Ok(ProcessMemory {
        peak_bytes: field("VmHWM:")?,
        resident_bytes: field("VmRSS:")?,
    })
}

/// Largest free block that the heap keeps for later.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAP_KEEPS_BYTES: libc::c_int = 256 << 10;

/// Large blocks come from the system and go back to it when they are freed. Left to itself, glibc raises
/// both limits to the largest block freed so far, and a thread's heap then keeps tens of MiB that
/// `release_free_heap` cannot reach.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_heap_small() {
    // SAFETY: mallopt takes no pointer and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, HEAP_KEEPS_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_KEEPS_BYTES);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_heap_small() {}

/// Gives heap that planning and packing have freed back to the system, so that a run begins with what
/// it needs alone.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn release_free_heap() {
    // SAFETY: malloc_trim takes no pointer and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn release_free_heap() {}

/// Starts the peak anew from what is resident now. False where the kernel does not allow it.
pub fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Cores that were busy over a quarter of a second from now; `None` where nobody counts. The load average
/// would still count what ended a minute ago, such as the build of this very program.
pub fn busy_cores() -> Option<f64> {
    let first = cpu_ticks_at(Path::new("/"))?;
    std::thread::sleep(std::time::Duration::from_millis(250));
    let second = cpu_ticks_at(Path::new("/"))?;
    let (all, idle) = (second.0 - first.0, second.1 - first.1);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
    (all > 0.0).then(|| cores * (1.0 - idle / all))
}

/// Ticks of all cores since the start: all, and idle ones (waiting for the disk among them).
fn cpu_ticks_at(root: &Path) -> Option<(f64, f64)> {
    let text = std::fs::read_to_string(root.join("proc/stat")).ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|t| t.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user already.
    (ticks.len() >= 5).then(|| (ticks.iter().take(8).sum(), ticks[3] + ticks[4]))
}

/// The operating system and its version: "Linux 6.1.0".
pub fn kernel_version() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let release = release.or_else(|| sysinfo::System::kernel_version().ok());
    let release = release.unwrap_or_default();
    let name = match std::env::consts::OS {
        "linux" => "Linux",
        other => other,
    };
    format!("{name} {}", release.trim()).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::os::tests::tree;

    #[test]
    fn status_is_read_in_bytes() {
        let root = tree(&[(
            "proc/self/status",
            "Name:\tx\nVmHWM:\t  20 kB\nVmRSS:\t 10 kB\n",
        )]);
        let memory = process_memory_at(root.path()).unwrap();
        assert_eq!((memory.peak_bytes, memory.resident_bytes), (20480, 10240));
        let root = tree(&[("proc/self/status", "VmRSS:\t 10 kB\n")]);
        let error = process_memory_at(root.path()).unwrap_err().to_string();
        assert!(error.contains("VmHWM"), "{error}");
    }

    #[test]
    fn busy_cores_come_from_the_kernel_s_ticks() {
        let root = tree(&[(
            "proc/stat",
            "cpu  20 0 10 60 10 0 0 0 0 0\ncpu0 1 1 1 1 1\n",
        )]);
        assert_eq!(cpu_ticks_at(root.path()), Some((100.0, 70.0)));
        assert_eq!(cpu_ticks_at(tree(&[]).path()), None);
        assert!(busy_cores().is_none_or(|cores| cores >= -0.01));
    }

    #[test]
    fn this_process_has_a_peak_and_a_kernel() {
        let memory = process_memory().unwrap();
        assert!(memory.peak_bytes > 100_000 && memory.resident_bytes > 100_000);
        assert!(kernel_version().len() > 3);
    }
}
