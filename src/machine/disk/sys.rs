//! The few system calls of the disk tier that the standard library does not offer, one by one.
//! Each returns plain io results; policy (fallbacks, errors with paths) is the callers'.

use std::fs::File;
use std::io;
use std::path::Path;

/// Free bytes for an unprivileged user, from statvfs.
pub fn space_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: `name` is a C string and statvfs fills the struct that it is given.
    let stat = unsafe {
        check(libc::statvfs(name.as_ptr(), stat.as_mut_ptr()))?;
        stat.assume_init()
    };
    Ok((stat.f_frsize as u64).saturating_mul(stat.f_bavail as u64))
}

/// Bytes of the file that are in the page cache, whoever read them.
#[cfg(test)]
pub fn cached_bytes(file: &File) -> io::Result<u64> {
    // SAFETY: nothing is read through the mapping.
    let map = unsafe { memmap2::MmapOptions::new().map(file)? };
    let mut resident = vec![0u8; map.len().div_ceil(crate::units::PAGE_BYTES as usize)];
    // SAFETY: the mapping lives, and `resident` has a byte for each of its pages.
    check(unsafe { libc::mincore(map.as_ptr() as *mut _, map.len(), resident.as_mut_ptr()) })?;
    let pages = resident.iter().filter(|&&page| page & 1 == 1).count();
    Ok(pages as u64 * crate::units::PAGE_BYTES)
}

fn check(rc: libc::c_int) -> io::Result<()> {
    match rc {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// True where the filesystem has no such operation.
pub fn unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOSYS].map(Some);
    error.kind() == io::ErrorKind::Unsupported || codes.contains(&error.raw_os_error())
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use std::os::fd::AsRawFd;

    pub const O_DIRECT: i32 = libc::O_DIRECT;
    pub const O_TMPFILE: i32 = libc::O_TMPFILE;

    /// "tmpfs" or "ramfs" where the file's bytes are memory.
    pub fn memory_backed(file: &File) -> io::Result<Option<&'static str>> {
        const TMPFS_MAGIC: u32 = 0x0102_1994;
        const RAMFS_MAGIC: u32 = 0x8584_58f6;
        let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: the descriptor is open for as long as `file` is borrowed; the struct is filled.
        let stat = unsafe {
            check(libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()))?;
            stat.assume_init()
        };
        Ok(match stat.f_type as u32 {
            TMPFS_MAGIC => Some("tmpfs"),
            RAMFS_MAGIC => Some("ramfs"),
            _ => None,
        })
    }

    /// Turns O_DIRECT off on an open descriptor.
    pub fn clear_direct(file: &File) -> io::Result<()> {
        // SAFETY: plain calls on an open descriptor.
        unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            check(libc::fcntl(
                file.as_raw_fd(),
                libc::F_SETFL,
                flags & !libc::O_DIRECT,
            ))
        }
    }

    /// Reserves the blocks of `[0, bytes)`, so that no later write can find the disk full.
    pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
        loop {
            // SAFETY: a plain call on an open descriptor.
            let rc = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) };
            match check(rc) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Drops what a buffered read left in the page cache.
    pub fn drop_read(file: &File, offset: u64, bytes: u64) {
        // SAFETY: advice on an open descriptor; a refusal only costs memory, so it is not checked.
        unsafe {
            libc::posix_fadvise(
                file.as_raw_fd(),
                offset as libc::off_t,
                bytes as libc::off_t,
                libc::POSIX_FADV_DONTNEED,
            )
        };
    }

    /// Writes a buffered range out and drops it from the page cache: dirty pages cannot be dropped.
    pub fn drop_written(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
        let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        // SAFETY: a plain call on an open descriptor.
        let rc = unsafe {
            libc::sync_file_range(
                file.as_raw_fd(),
                offset as libc::off64_t,
                bytes as libc::off64_t,
                wait,
            )
        };
        check(rc)?;
        drop_read(file, offset, bytes);
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use super::*;

    pub const O_DIRECT: i32 = 0;
    pub const O_TMPFILE: i32 = 0;

    pub fn memory_backed(_file: &File) -> io::Result<Option<&'static str>> {
        Ok(None)
    }

    pub fn clear_direct(_file: &File) -> io::Result<()> {
        Ok(())
    }

    pub fn reserve(_file: &File, _bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn drop_read(_file: &File, _offset: u64, _bytes: u64) {}

    pub fn drop_written(file: &File, _offset: u64, _bytes: u64) -> io::Result<()> {
        file.sync_data()
    }
}

#[cfg(target_os = "linux")]
pub use linux::*;
#[cfg(not(target_os = "linux"))]
pub use other::*;
