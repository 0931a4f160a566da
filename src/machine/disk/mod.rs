//! The disk tier: files opened for direct I/O, never through the page cache where that can be had.
//! Filesystem facts live in `filesystem`, threads in `pool`; what is stored where is the store's.

mod file;
mod filesystem;
mod pool;
mod sys;

pub use file::{DiskFile, write_atomically};
pub use filesystem::{FileSystem, check_disk_tier, filesystem_of, filesystem_of_at, free_bytes};
pub use pool::{IoData, IoPool, IoRequest};
#[cfg(test)]
pub(crate) use sys::cached_bytes;

use crate::units::show_bytes;
use std::path::PathBuf;
use thiserror::Error;

/// Why the disk could not do what was asked.
#[derive(Debug, Error)]
pub enum DiskError {
    #[error(
        "{path}: cannot {action} ({source}): check the path, its owner and permissions, or give another --offload-dir"
    )]
    Path {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path}: cannot {action} {bytes} bytes at offset {offset} ({source}): the disk may be failing or full"
    )]
    Transfer {
        action: &'static str,
        path: PathBuf,
        offset: u64,
        bytes: u64,
        source: std::io::Error,
    },
    #[error(
        "{path}: ends {missing_bytes} bytes before the end of a read at offset {offset}: the file was cut, write it anew"
    )]
    Short {
        path: PathBuf,
        offset: u64,
        missing_bytes: u64,
    },
    #[error(
        "{path}: direct I/O of {bytes} bytes at offset {offset} is not in whole 4096-byte pages of file and memory: round it out"
    )]
    Unaligned {
        path: PathBuf,
        offset: u64,
        bytes: u64,
    },
    #[error(
        "{path} is on {kind}, which is memory, not a disk: give an --offload-dir on a real disk"
    )]
    MemoryBacked { path: PathBuf, kind: String },
    #[error(
        "{path}: {} are needed and {} are free, {} missing: free some space, lower --disk-space or give another --offload-dir",
        show_bytes(*needed_bytes), show_bytes(*free_bytes), show_bytes(*missing_bytes)
    )]
    Full {
        path: PathBuf,
        needed_bytes: u64,
        free_bytes: u64,
        missing_bytes: u64,
    },
    #[error("{threads} I/O threads could not be started ({source}): raise `ulimit -u`")]
    Threads {
        threads: usize,
        source: std::io::Error,
    },
}
