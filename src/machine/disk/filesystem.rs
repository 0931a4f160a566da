//! Filesystems: which one a path is on, how much is free, whether it is a disk at all.
//! Reads only; nothing is created here.

use super::{DiskError, sys};
use crate::machine::os::unescape;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where a path's bytes live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// "ext4", "xfs", "nfs4"; "unknown" where the system does not say.
    pub kind: String,
    /// "/dev/vda1", "server:/export".
    pub device: String,
    pub mount_point: PathBuf,
}

impl FileSystem {
    /// True where every byte goes over a network or through another program: worth a warning.
    pub fn is_network(&self) -> bool {
        const KINDS: [&str; 14] = [
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "9p",
            "ceph",
            "lustre",
            "beegfs",
            "gpfs",
            "glusterfs",
            "afs",
            "ocfs2",
            "fuse",
        ];
        KINDS.contains(&self.kind.as_str()) || self.kind.starts_with("fuse.")
    }

    /// "ext4 on /dev/vda": a part of a profile's key.
    pub fn describe(&self) -> String {
        format!("{} on {}", self.kind, self.device)
    }
}

/// The filesystem of a path; for a path that does not exist yet, that of its nearest parent.
pub fn filesystem_of(path: &Path) -> FileSystem {
    filesystem_of_at(Path::new("/"), path)
}

/// As `filesystem_of`, with the /proc/self/mountinfo below `root`.
pub fn filesystem_of_at(root: &Path, path: &Path) -> FileSystem {
    let place = nearest_existing(path);
    let text = std::fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mounts = text.lines().filter_map(parse_mount);
    let around = mounts.filter(|mount| place.starts_with(&mount.mount_point));
    // Of equally deep mount points the last one mounted covers the others.
    let nearest = around.max_by_key(|mount| mount.mount_point.components().count());
    nearest.unwrap_or_else(|| FileSystem {
        kind: "unknown".to_owned(),
        device: "unknown".to_owned(),
        mount_point: PathBuf::from("/"),
    })
}

fn parse_mount(line: &str) -> Option<FileSystem> {
    let (left, right) = line.split_once(" - ")?;
    let mut facts = right.split(' ');
    Some(FileSystem {
        kind: facts.next()?.to_owned(),
        device: unescape(facts.next()?),
        mount_point: PathBuf::from(unescape(left.split(' ').nth(4)?)),
    })
}

/// The path, or the nearest of its parents that exists, without symbolic links.
fn nearest_existing(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut candidates = absolute.ancestors();
    let found = candidates.find_map(|p| p.canonicalize().ok());
    found.unwrap_or_else(|| PathBuf::from("/"))
}

/// Free bytes for an unprivileged user on the filesystem that a path is or will be on.
pub fn free_bytes(path: &Path) -> Result<u64, DiskError> {
    let space = sys::space_bytes(&nearest_existing(path));
    space.map_err(|source| DiskError::Path {
        action: "ask for the free space",
        path: path.to_owned(),
        source,
    })
}

/// Refuses a place that is memory: a disk tier there would take what it is meant to save.
pub fn check_disk_tier(path: &Path) -> Result<(), DiskError> {
    let place = nearest_existing(path);
    let opened = File::open(&place).map_err(|source| DiskError::Path {
        action: "open",
        path: place.clone(),
        source,
    })?;
    refuse_memory(&opened, path)
}

pub fn refuse_memory(file: &File, path: &Path) -> Result<(), DiskError> {
    let kind = sys::memory_backed(file).map_err(|source| DiskError::Path {
        action: "ask for the filesystem",
        path: path.to_owned(),
        source,
    })?;
    match kind {
        None => Ok(()),
        Some(kind) => Err(DiskError::MemoryBacked {
            path: path.to_owned(),
            kind: kind.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::os::tests::tree;

    #[test]
    fn the_deepest_and_last_mount_wins() {
        let mounts = "27 1 254:0 / / rw - ext4 /dev/vda rw\n\
                      28 27 0:30 / /tmp rw - nfs4 server:/a\\040b rw\n\
                      29 27 0:31 / /tmp rw - xfs /dev/sdb rw\n\
                      30 27 0:32 / /tmpfoo rw - tmpfs x rw\n";
        let root = tree(&[("proc/self/mountinfo", mounts)]);
        let at = |path: &str| filesystem_of_at(root.path(), Path::new(path));
        assert_eq!(at("/tmp/no/such/path").describe(), "xfs on /dev/sdb");
        assert_eq!(at("/etc").describe(), "ext4 on /dev/vda");
        assert!(!at("/etc").is_network());
        let empty = tree(&[]);
        assert_eq!(
            filesystem_of_at(empty.path(), Path::new("/etc")).kind,
            "unknown"
        );
    }

    #[test]
    fn network_mounts_are_known() {
        let line = "28 27 0:30 / /n rw - nfs4 server:/a\\040b rw";
        let mount = parse_mount(line).unwrap();
        assert!(mount.is_network());
        assert_eq!(mount.device, "server:/a b");
        for kind in ["cifs", "9p", "fuse.sshfs"] {
            assert!(
                FileSystem {
                    kind: kind.into(),
                    ..mount.clone()
                }
                .is_network()
            );
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_refused_as_a_disk() {
        let error = check_disk_tier(Path::new("/dev/shm/not/there")).unwrap_err();
        assert!(error.to_string().contains("tmpfs"), "{error}");
        assert!(error.to_string().contains("--offload-dir"), "{error}");
    }

    #[test]
    fn free_space_is_read_for_paths_to_come() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a/b/c")).unwrap() > 0);
    }
}
