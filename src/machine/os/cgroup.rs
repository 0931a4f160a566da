//! The control groups that enclose this process, v1 and v2: memory headroom and CPU quota.
//! Files that are absent or unreadable say "no limit": that is how the kernel spells it, too.

use std::path::{Component, Path, PathBuf};

/// The memory limit of one enclosing group.
pub struct MemoryLimit {
    pub directory: PathBuf,
    pub limit_bytes: u64,
    /// What may still be taken before reclaim fails: file cache is given back first.
    pub headroom_bytes: u64,
}

/// How one version of control groups names its memory files.
struct MemoryFiles {
    limits: &'static [&'static str],
    /// The key in memory.stat of the tightest limit from here up, seen or not.
    stat_limit: Option<&'static str>,
    usage: &'static str,
    cache_keys: [&'static str; 2],
}

const V1_MEMORY: MemoryFiles = MemoryFiles {
    limits: &["memory.limit_in_bytes"],
    stat_limit: Some("hierarchical_memory_limit"),
    usage: "memory.usage_in_bytes",
    cache_keys: ["total_inactive_file", "total_active_file"],
};

/// Above `memory.high` a group is throttled to a crawl: for us that is a limit.
const V2_MEMORY: MemoryFiles = MemoryFiles {
    limits: &["memory.max", "memory.high"],
    stat_limit: None,
    usage: "memory.current",
    cache_keys: ["inactive_file", "active_file"],
};

/// Memory limits of every group around this process, innermost first.
pub fn memory_limits(root: &Path) -> Vec<MemoryLimit> {
    let v1 = directories(root, Some("memory"));
    let v2 = directories(root, None);
    let v1 = v1.into_iter().filter_map(|d| memory_limit(d, &V1_MEMORY));
    let v2 = v2.into_iter().filter_map(|d| memory_limit(d, &V2_MEMORY));
    v1.chain(v2).collect()
}

fn memory_limit(directory: PathBuf, files: &MemoryFiles) -> Option<MemoryLimit> {
    let limits = files
        .limits
        .iter()
        .filter_map(|f| number(&directory.join(f)));
    let stat = std::fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    // A container sees no group above its own, whose limits hold all the same.
    let above = files.stat_limit.and_then(|key| stat_value(&stat, key));
    let limit_bytes = limits.chain(above).min()?;
    let used_bytes = number(&directory.join(files.usage)).unwrap_or(0);
    let cache = files
        .cache_keys
        .iter()
        .filter_map(|key| stat_value(&stat, key));
    let held_bytes = used_bytes.saturating_sub(cache.sum());
    Some(MemoryLimit {
        directory,
        limit_bytes,
        headroom_bytes: limit_bytes.saturating_sub(held_bytes),
    })
}

/// CPUs' worth of time that the tightest enclosing quota allows, if there is one.
pub fn cpu_quota(root: &Path) -> Option<f64> {
    let v1 = directories(root, Some("cpu")).into_iter().filter_map(|d| {
        let quota = number(&d.join("cpu.cfs_quota_us"))?;
        Some(quota as f64 / number(&d.join("cpu.cfs_period_us"))?.max(1) as f64)
    });
    let v2 = directories(root, None).into_iter().filter_map(|d| {
        let text = std::fs::read_to_string(d.join("cpu.max")).ok()?;
        let mut words = text.split_whitespace().map(str::parse::<f64>);
        Some(words.next()?.ok()? / words.next()?.ok()?.max(1.0))
    });
    v1.chain(v2).min_by(f64::total_cmp)
}

/// Directories of the groups around this process, innermost first, up to the mount: of the v1
/// hierarchy that has `controller`, or of v2 (`None`).
fn directories(root: &Path, controller: Option<&str>) -> Vec<PathBuf> {
    let cgroup = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = std::fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let Some(group) = cgroup.lines().find_map(|line| group_path(line, controller)) else {
        return Vec::new();
    };
    let Some(mount) = mounts
        .lines()
        .find_map(|line| Mount::parse(line, controller))
    else {
        return Vec::new();
    };
    let top = root.join(mount.point.trim_start_matches('/'));
    let inside = below(&group, &mount.root);
    inside.ancestors().map(|p| top.join(p)).collect()
}

/// The group of this process in one hierarchy, where that is mounted.
pub(super) fn own_directory(root: &Path, controller: Option<&str>) -> Option<PathBuf> {
    directories(root, controller).into_iter().next()
}

/// The path in a line of /proc/self/cgroup ("4:cpu,memory:/a/b"), if it is the wanted hierarchy's.
fn group_path(line: &str, controller: Option<&str>) -> Option<String> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let wanted = match controller {
        Some(name) => controllers.split(',').any(|c| c == name),
        None => controllers.is_empty(),
    };
    wanted.then(|| path.to_owned())
}

/// The group's path below the mount's root. A path from outside (another cgroup namespace) cannot
/// be followed: then the mount itself is the nearest group that can be seen.
fn below(group: &str, mount_root: &str) -> PathBuf {
    let inside = Path::new(group).strip_prefix(mount_root);
    let plain = |p: &&Path| p.components().all(|c| matches!(c, Component::Normal(_)));
    inside
        .ok()
        .filter(plain)
        .map(Path::to_owned)
        .unwrap_or_default()
}

/// One mounted control group hierarchy.
struct Mount {
    root: String,
    point: String,
}

impl Mount {
    /// Reads a line of /proc/self/mountinfo, if it mounts the wanted hierarchy.
    fn parse(line: &str, controller: Option<&str>) -> Option<Mount> {
        let (left, right) = line.split_once(" - ")?;
        let mut kind = right.split(' ');
        let wanted = match (kind.next()?, controller) {
            ("cgroup2", None) => true,
            ("cgroup", Some(name)) => kind.next_back()?.split(',').any(|option| option == name),
            _ => false,
        };
        let fields: Vec<&str> = left.split(' ').collect();
        wanted.then_some(Mount {
            root: unescape(fields.get(3)?),
            point: unescape(fields.get(4)?),
        })
    }
}

/// mountinfo writes blanks and backslashes as "\040".
pub(crate) fn unescape(field: &str) -> String {
    let mut pieces = field.split('\\');
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let code = piece
            .get(..3)
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => text.push_str(&format!("{}{}", code as char, &piece[3..])),
            None => text.push_str(&format!("\\{piece}")),
        }
    }
    text
}

/// A file that holds one number; "max", "-1" and absence are no limit.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

pub(super) fn stat_value(stat: &str, key: &str) -> Option<u64> {
    let line = stat
        .lines()
        .find(|line| line.split(' ').next() == Some(key))?;
    line.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::os::tests::tree;

    #[test]
    fn quotas_of_both_versions_and_of_parents_count() {
        let v2 = tree(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            (
                "proc/self/mountinfo",
                "31 23 0:28 / /my\\040groups rw - cgroup2 cgroup2 rw\n",
            ),
            ("my groups/a/cpu.max", "150000 100000\n"),
            ("my groups/a/b/cpu.max", "max 100000\n"),
        ]);
        assert_eq!(cpu_quota(v2.path()), Some(1.5));
        let v1 = tree(&[
            ("proc/self/cgroup", "1:cpu,cpuacct:/x\n"),
            (
                "proc/self/mountinfo",
                "9 1 0:2 / /cg/cpu rw shared:4 - cgroup cgroup rw,cpu,cpuacct\n",
            ),
            ("cg/cpu/cpu.cfs_quota_us", "-1\n"),
            ("cg/cpu/cpu.cfs_period_us", "100000\n"),
            ("cg/cpu/x/cpu.cfs_quota_us", "400000\n"),
            ("cg/cpu/x/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(cpu_quota(v1.path()), Some(4.0));
        assert_eq!(cpu_quota(tree(&[]).path()), None);
    }

    #[test]
    fn mountinfo_escapes_are_read_back() {
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescape("/plain"), "/plain");
        assert_eq!(unescape("/odd\\9"), "/odd\\9");
    }
}
