//! A memory cgroup of our own with a limit, and a child inside it: how `campaign` shows that a plan's
//! bytes suffice. Version 1 where its memory controller is mounted, else version 2.

use super::cgroup;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;
use thiserror::Error;

/// Why no group could be made.
#[derive(Debug, Error)]
pub enum ConfineError {
    #[error(
        "no memory cgroup can be made here ({why}): run as root, or inside `systemd-run --user --scope -p Delegate=yes`, or in a container with a writable /sys/fs/cgroup"
    )]
    NoGroup { why: String },
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// What the kernel has counted in a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupAccount {
    /// Charges that met the limit.
    pub failed_charges: u64,
    pub kills: u64,
}

/// A cgroup that is removed again when dropped.
pub struct MemoryGroup {
    dir: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, PartialEq)]
enum Version {
    One,
    Two,
}

impl MemoryGroup {
    /// A group below this process's own, with a limit of memory (and of swap, where that is counted).
    pub fn new(name: &str, limit_bytes: u64) -> Result<MemoryGroup, ConfineError> {
        let root = Path::new("/");
        let one = cgroup::own_directory(root, Some("memory"));
        let (above, version) = match one.filter(|d| d.join("memory.limit_in_bytes").exists()) {
            Some(dir) => (dir, Version::One),
            None => (two_above(root)?, Version::Two),
        };
        let dir = above.join(name);
        let why = |e: std::io::Error| ConfineError::NoGroup {
            why: format!("{}: {e}", dir.display()),
        };
        std::fs::create_dir(&dir).map_err(why)?;
        let group = MemoryGroup { dir, version };
        let limit = match version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        group.write(limit, &limit_bytes.to_string())?;
        // Nothing may be swapped out instead. Absent where swap is not counted.
        let _ = match version {
            Version::One => group.write("memory.memsw.limit_in_bytes", &limit_bytes.to_string()),
            Version::Two => group.write("memory.swap.max", "0"),
        };
        Ok(group)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), ConfineError> {
        let path = self.dir.join(file);
        std::fs::write(&path, text).map_err(|source| ConfineError::File { path, source })
    }

    /// A command whose process is inside the group before the program begins.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.dir.join("cgroup.procs"))
            .arg(program);
        command
    }

    pub fn account(&self) -> GroupAccount {
        let read = |file: &str| std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        match self.version {
            Version::One => GroupAccount {
                failed_charges: read("memory.failcnt").trim().parse().unwrap_or(0),
                kills: cgroup::stat_value(&read("memory.oom_control"), "oom_kill").unwrap_or(0),
            },
            Version::Two => {
                let events = read("memory.events");
                GroupAccount {
                    failed_charges: cgroup::stat_value(&events, "max").unwrap_or(0),
                    kills: cgroup::stat_value(&events, "oom_kill").unwrap_or(0),
                }
            }
        }
    }
}

impl Drop for MemoryGroup {
    /// The last process may take a moment to leave.
    fn drop(&mut self) {
        for _ in 0..50 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Version 2 gives controllers to groups without processes only: this process moves into a leaf.
fn two_above(root: &Path) -> Result<PathBuf, ConfineError> {
    let refuse = |why: &str| ConfineError::NoGroup {
        why: why.to_owned(),
    };
    let own = cgroup::own_directory(root, None).ok_or_else(|| refuse("no cgroups are mounted"))?;
    let own = match own.ends_with(LEAF) {
        true => own.parent().unwrap_or(&own).to_owned(),
        false => own,
    };
    let controllers = std::fs::read_to_string(own.join("cgroup.controllers")).unwrap_or_default();
    if !controllers.split_whitespace().any(|c| c == "memory") {
        return Err(refuse("the memory controller is not given to this group"));
    }
    let enabled = |own: &Path| {
        let text = std::fs::read_to_string(own.join("cgroup.subtree_control"));
        text.is_ok_and(|t| t.split_whitespace().any(|c| c == "memory"))
    };
    if !enabled(&own) {
        let leaf = own.join(LEAF);
        let failed = |e: std::io::Error| ConfineError::NoGroup {
            why: format!("{}: {e}", own.display()),
        };
        std::fs::create_dir_all(&leaf).map_err(failed)?;
        let pid = std::process::id().to_string();
        std::fs::write(leaf.join("cgroup.procs"), pid).map_err(failed)?;
        std::fs::write(own.join("cgroup.subtree_control"), "+memory").map_err(failed)?;
    }
    Ok(own)
}

const LEAF: &str = "loadmaster-itself";

/// How often a child's peak is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Waits for a child: its peak of resident bytes (VmHWM, which begins anew with the program that the
/// child becomes; the account that `wait4` gives would begin with ours), and whether it ended well.
pub fn wait_for_peak(child: &mut Child) -> std::io::Result<(u64, bool)> {
    let proc = PathBuf::from(format!("/proc/{}", child.id()));
    let shell = std::fs::read_link("/bin/sh").map(|p| p.file_name().map(|n| n.to_owned()));
    let shell = shell.ok().flatten().unwrap_or_else(|| "sh".into());
    let mut peak_bytes = 0;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((peak_bytes, status.success()));
        }
        let exe = std::fs::read_link(proc.join("exe")).unwrap_or_default();
        if exe
            .file_name()
            .is_some_and(|name| name != shell && name != "sh")
        {
            let status = std::fs::read_to_string(proc.join("status")).unwrap_or_default();
            peak_bytes = super::kilobytes(&status, "VmHWM:")
                .unwrap_or(0)
                .max(peak_bytes);
        }
        std::thread::sleep(LOOK);
    }
}
