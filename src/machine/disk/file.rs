//! One file of the disk tier: opened past the page cache where the filesystem allows, else buffered
//! with drop-behind. Whole pages only; splitting and threads are the pool's.

use super::filesystem::{free_bytes, refuse_memory};
use super::{DiskError, sys};
use crate::machine::arena::AlignedBuffer;
use crate::units::{PAGE_BYTES, round_up};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// One write of `write_out`.
const WRITE_OUT_BYTES: u64 = 1 << 20;

/// A file for direct I/O. Reads and writes are positioned, so that threads may share it.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    direct: bool,
}

impl DiskFile {
    /// Opens an existing file for reading.
    pub fn open_read(path: &Path) -> Result<DiskFile, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true);
        let disk = Self::open(path, options, "open")?;
        disk.settle(|page, file| file.read_at(page, 0).map(drop))
    }

    /// Opens an existing file for reading and writing.
    pub fn open_write(path: &Path) -> Result<DiskFile, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let disk = Self::open(path, options, "open for writing")?;
        disk.settle(|page, file| file.read_at(page, 0).map(drop))
    }

    /// Makes an empty file for reading and writing; what was there is lost.
    pub fn create(path: &Path) -> Result<DiskFile, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Self::open(path, options, "create")?.settle(try_write)
    }

    /// Makes a spill file of `bytes` that has no name, is readable by its owner only and vanishes
    /// with its last handle, however the process ends. Its space is reserved: a full disk is an
    /// error now.
    pub fn create_unlinked(dir: &Path, bytes: u64) -> Result<DiskFile, DiskError> {
        let disk = Self::open_unlinked(dir)?;
        disk.reserve(bytes)?;
        disk.settle(|page, file| file.write_at(page, 0).map(drop))
    }

    fn open_unlinked(dir: &Path) -> Result<DiskFile, DiskError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        if sys::O_TMPFILE != 0 {
            let mut nameless = options.clone();
            nameless.custom_flags(sys::O_TMPFILE);
            // Not every filesystem has nameless files: then a name is given and taken away.
            if let Ok(disk) = Self::open_flags(dir, &nameless, sys::O_TMPFILE, "create a file in") {
                return Ok(disk);
            }
        }
        let path = unused_name(dir, "spill");
        options.create_new(true);
        let disk = Self::open(&path, options, "create")?;
        std::fs::remove_file(&path).map_err(|e| failed("unlink", &path, e))?;
        Ok(DiskFile {
            path: dir.to_owned(),
            ..disk
        })
    }

    fn open(path: &Path, options: OpenOptions, action: &'static str) -> Result<Self, DiskError> {
        Self::open_flags(path, &options, 0, action)
    }

    /// Opens with O_DIRECT, or without where the filesystem refuses it.
    fn open_flags(
        path: &Path,
        options: &OpenOptions,
        flags: i32,
        action: &'static str,
    ) -> Result<DiskFile, DiskError> {
        let open = |more: i32| options.clone().custom_flags(flags | more).open(path);
        let (file, direct) = match open(sys::O_DIRECT) {
            Ok(file) => (file, sys::O_DIRECT != 0),
            Err(e) if refuses_direct(&e) => (open(0).map_err(|e| failed(action, path, e))?, false),
            Err(e) => return Err(failed(action, path, e)),
        };
        refuse_memory(&file, path)?;
        let path = path.to_owned();
        Ok(DiskFile { file, path, direct })
    }

    /// Some filesystems take O_DIRECT at the open and refuse it at the first transfer: try one.
    fn settle(
        mut self,
        transfer: impl Fn(&mut [u8], &File) -> io::Result<()>,
    ) -> Result<DiskFile, DiskError> {
        if !self.direct {
            return Ok(self);
        }
        let page = AlignedBuffer::new(PAGE_BYTES);
        let mut page =
            page.map_err(|e| failed("try direct I/O on", &self.path, io::Error::other(e)))?;
        match transfer(&mut page, &self.file) {
            Ok(()) => Ok(self),
            Err(e) if refuses_direct(&e) => {
                self.clear_direct()?;
                Ok(self)
            }
            Err(e) => Err(failed("try direct I/O on", &self.path, e)),
        }
    }

    /// The same descriptor without O_DIRECT: works for files that have no name, too.
    pub(crate) fn clear_direct(&mut self) -> Result<(), DiskError> {
        sys::clear_direct(&self.file).map_err(|e| failed("use buffered I/O on", &self.path, e))?;
        self.direct = false;
        Ok(())
    }

    /// Reserves the blocks of `[0, bytes)`; an error names what is missing.
    pub fn reserve(&self, bytes: u64) -> Result<(), DiskError> {
        if bytes == 0 {
            return Ok(());
        }
        self.check_space(bytes)?;
        let Err(error) = sys::reserve(&self.file, bytes) else {
            return Ok(());
        };
        match error.kind() {
            // Filesystems without reservation: the space was just checked, the size is set.
            _ if sys::unsupported(&error) => self.set_len(bytes),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                // What was reserved before it failed counts as free again: a quota, or a race lost.
                self.set_len(0)?;
                self.check_space(bytes)?;
                Err(failed("reserve space for", &self.path, error))
            }
            _ => Err(failed("reserve space for", &self.path, error)),
        }
    }

    /// Writes zeros to all of `range`, whole pages. Pages that are reserved and not yet written become so one by
    /// one, with whatever is written to each first: small writes and all reads of such a file take longer, and ext4
    /// lets nobody else use it while a request has pages of both kinds.
    pub fn write_out(&self, range: Range<u64>) -> Result<(), DiskError> {
        let zeros = AlignedBuffer::new(WRITE_OUT_BYTES);
        let zeros = zeros.map_err(|e| failed("write", &self.path, io::Error::other(e)))?;
        for offset in range.clone().step_by(WRITE_OUT_BYTES as usize) {
            let part = WRITE_OUT_BYTES.min(range.end - offset);
            self.write_at(&zeros[..part as usize], offset)?;
        }
        Ok(())
    }

    fn check_space(&self, needed_bytes: u64) -> Result<(), DiskError> {
        let free_bytes = free_bytes(&self.path)?;
        if needed_bytes <= free_bytes {
            return Ok(());
        }
        Err(DiskError::Full {
            path: self.path.clone(),
            needed_bytes,
            free_bytes,
            missing_bytes: needed_bytes - free_bytes,
        })
    }

    /// False where the page cache could not be avoided and drop-behind is used.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The file's path; of an unlinked file its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn len_bytes(&self) -> Result<u64, DiskError> {
        let metadata = self.file.metadata();
        metadata
            .map(|m| m.len())
            .map_err(|e| failed("ask for the size of", &self.path, e))
    }

    pub fn set_len(&self, bytes: u64) -> Result<(), DiskError> {
        self.file
            .set_len(bytes)
            .map_err(|e| failed("set the size of", &self.path, e))
    }

    /// Makes everything written so far survive a power cut.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file
            .sync_data()
            .map_err(|e| failed("sync", &self.path, e))
    }

    /// Fills `target` from `offset`. Past the end of the file, what remains of its last page is zero.
    pub fn read_at(&self, target: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.check_pages(target.as_ptr(), target.len(), offset)?;
        let mut done = 0;
        while done < target.len() {
            let read = self.file.read_at(&mut target[done..], offset + done as u64);
            match read {
                Ok(0) => break,
                Ok(bytes) => done = self.whole_pages(done + bytes, target.len(), offset)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.transfer("read", offset, target.len(), e)),
            }
        }
        if !self.direct {
            sys::drop_read(&self.file, offset, target.len() as u64);
        }
        self.zero_past_the_end(&mut target[done..], offset + done as u64)
    }

    /// Direct I/O goes on from whole pages only, unless the file ends here.
    fn whole_pages(&self, done: usize, wanted: usize, offset: u64) -> Result<usize, DiskError> {
        let odd = done % PAGE_BYTES as usize;
        if odd == 0 || !self.direct || done == wanted || offset + done as u64 >= self.len_bytes()? {
            return Ok(done);
        }
        Ok(done - odd)
    }

    fn zero_past_the_end(&self, rest: &mut [u8], offset: u64) -> Result<(), DiskError> {
        if rest.is_empty() {
            return Ok(());
        }
        let end = offset + rest.len() as u64;
        let last_page = round_up(self.len_bytes()?, PAGE_BYTES);
        if end > last_page {
            return Err(DiskError::Short {
                path: self.path.clone(),
                offset,
                missing_bytes: end - last_page,
            });
        }
        rest.fill(0);
        Ok(())
    }

    /// Writes all of `source` at `offset`.
    pub fn write_at(&self, source: &[u8], offset: u64) -> Result<(), DiskError> {
        self.check_pages(source.as_ptr(), source.len(), offset)?;
        let mut done = 0;
        while done < source.len() {
            let wrote = self.file.write_at(&source[done..], offset + done as u64);
            match wrote {
                Ok(bytes) if bytes >= PAGE_BYTES as usize || !self.direct && bytes > 0 => {
                    done += bytes;
                    // A direct write cut within a page is written again from that page's start.
                    done -= if self.direct {
                        done % PAGE_BYTES as usize
                    } else {
                        0
                    };
                }
                Ok(_) => {
                    let none = io::ErrorKind::WriteZero.into();
                    return Err(self.transfer("write", offset, source.len(), none));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.transfer("write", offset, source.len(), e)),
            }
        }
        if self.direct {
            return Ok(());
        }
        let dropped = sys::drop_written(&self.file, offset, source.len() as u64);
        dropped.map_err(|e| self.transfer("write", offset, source.len(), e))
    }

    fn transfer(
        &self,
        action: &'static str,
        offset: u64,
        bytes: usize,
        source: io::Error,
    ) -> DiskError {
        DiskError::Transfer {
            action,
            path: self.path.clone(),
            offset,
            bytes: bytes as u64,
            source,
        }
    }

    /// Pages are asked for on buffered files as well: the same program must run on any disk.
    pub(super) fn check_pages(
        &self,
        address: *const u8,
        bytes: usize,
        offset: u64,
    ) -> Result<(), DiskError> {
        if (address as u64 | bytes as u64 | offset).is_multiple_of(PAGE_BYTES) {
            return Ok(());
        }
        Err(DiskError::Unaligned {
            path: self.path.clone(),
            offset,
            bytes: bytes as u64,
        })
    }
}

/// One page written and taken back.
fn try_write(page: &mut [u8], file: &File) -> io::Result<()> {
    file.write_at(page, 0)?;
    file.set_len(0)
}

fn refuses_direct(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput || sys::unsupported(error)
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError::Path {
        action,
        path: path.to_owned(),
        source,
    }
}

/// A name in `dir` that no other thread or process of this machine uses.
fn unused_name(dir: &Path, what: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".{what}.{}.{count}.tmp", std::process::id()))
}

/// Replaces a small file as a whole: readers see the old content or the new, never a part, and
/// after a power cut one of them is there.
///
/// A device or a pipe is written to as it is: replacing it by a file would lose it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
    if std::fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return std::fs::write(path, bytes).map_err(|e| failed("write", path, e));
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let temporary = unused_name(dir, "write");
    let written = write_whole(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    if let Err(source) = written {
        // The temporary file may not exist: the first error is the one worth telling.
        let _ = std::fs::remove_file(&temporary);
        return Err(failed("write", path, source));
    }
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| failed("sync the directory of", path, e))
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
