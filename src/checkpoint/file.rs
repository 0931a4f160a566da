//! One file of a checkpoint: its length is taken once, and nothing beyond it is ever asked for.
//! What the bytes mean is in the modules of the formats.

use super::CheckpointError;
use crate::machine::arena::AlignedBuffer;
use crate::machine::disk::DiskFile;
use crate::units::PAGE_BYTES;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// From this on a read goes past the page cache: several times faster cold, and the memory that a
/// plan counts on is not filled with a file that is read once.
const PAGES_LEAST_BYTES: usize = 256 << 10;
/// Such reads go through a buffer of this, since tensors begin anywhere.
const PIECE_BYTES: u64 = 4 << 20;

/// How a file begins that stands for one that git has not fetched.
const POINTER: &[u8] = b"version https://git-lfs";

/// A file open for reading at any offset, from several threads.
pub(super) struct WeightFile {
    pub path: PathBuf,
    pub bytes: u64,
    /// Seconds and nanoseconds of the last change, for the fingerprint.
    pub changed: (u64, u32),
    file: File,
    /// Past the page cache, or what a read leaves there dropped; none on a memory filesystem, which is one.
    pages: Option<DiskFile>,
    /// Kept between reads, one for each that was under way at once.
    buffers: Mutex<Vec<AlignedBuffer>>,
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.bytes)
    }
}

impl WeightFile {
    pub fn open(path: &Path) -> Result<WeightFile, CheckpointError> {
        let open = || {
            let file = File::open(path)?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(std::io::Error::other("not a regular file"));
            }
            Ok((file, meta))
        };
        let (file, meta) = open().map_err(|e| CheckpointError::io(path, e))?;
        let mut front = [0; POINTER.len()];
        if file.read_exact_at(&mut front, 0).is_ok() && front == POINTER {
            let path = path.to_owned();
            return Err(CheckpointError::Pointer { path });
        }
        let changed = meta.modified().ok();
        let since = changed.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(WeightFile {
            path: path.to_owned(),
            bytes: meta.len(),
            changed: since.map_or((0, 0), |s| (s.as_secs(), s.subsec_nanos())),
            file,
            pages: DiskFile::open_read(path).ok(),
            buffers: Mutex::new(Vec::new()),
        })
    }

    /// Fills `out` from `offset` on. Beyond the end is damage, not an I/O error.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            let why = format!("it ends at byte {} but more is referred to", self.bytes);
            return Err(CheckpointError::damaged(&self.path, why));
        }
        if out.len() >= PAGES_LEAST_BYTES && self.read_pages(offset, out).is_some() {
            return Ok(());
        }
        let read = self.file.read_exact_at(out, offset);
        read.map_err(|e| CheckpointError::io(&self.path, e))
    }

    /// Whole pages into the buffer, what was asked for out of it. None where that fails: the
    /// buffered read that follows then says why, or succeeds.
    fn read_pages(&self, offset: u64, out: &mut [u8]) -> Option<()> {
        let file = self.pages.as_ref()?;
        let kept = || self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = kept().pop();
        let mut buffer = waiting.or_else(|| AlignedBuffer::new(PIECE_BYTES).ok())?;
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let skip = (at % PAGE_BYTES) as usize;
            let wanted = (out.len() - done).min(buffer.len() - skip);
            let pages = (skip + wanted).next_multiple_of(PAGE_BYTES as usize);
            file.read_at(&mut buffer[..pages], at - skip as u64).ok()?;
            out[done..done + wanted].copy_from_slice(&buffer[skip..skip + wanted]);
            done += wanted;
        }
        kept().push(buffer);
        Some(())
    }

    /// `bytes` bytes from `offset` on; the caller has bounded `bytes`.
    pub fn read_vec(&self, offset: u64, bytes: usize) -> Result<Vec<u8>, CheckpointError> {
        // Checked before the allocation, so that a hostile length costs nothing.
        self.read(offset.saturating_add(bytes as u64), &mut [])?;
        let mut out = vec![0; bytes];
        self.read(offset, &mut out)?;
        Ok(out)
    }
}

/// SHA-256 over several pieces, each with its length, so that their borders count too.
pub(super) fn hash_hex(pieces: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for piece in pieces {
        hash.update((piece.len() as u64).to_le_bytes());
        hash.update(piece);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// A whole text file of at most `most_bytes`.
pub(super) fn read_text(path: &Path, most_bytes: u64) -> Result<String, CheckpointError> {
    let file = WeightFile::open(path)?;
    if file.bytes > most_bytes {
        let why = format!("{} bytes where at most {most_bytes} make sense", file.bytes);
        return Err(CheckpointError::damaged(path, why));
    }
    let bytes = file.read_vec(0, file.bytes as usize)?;
    String::from_utf8(bytes).map_err(|_| CheckpointError::damaged(path, "it is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_and_buffered_reads_agree_anywhere() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("weights");
        let bytes: Vec<u8> = (0..9_000_001u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect();
        std::fs::write(&path, &bytes).expect("written");
        let file = WeightFile::open(&path).expect("open");
        let end = bytes.len();
        for (from, to) in [
            (0, end),
            (1, end),
            (4096, 4096 + (4 << 20)),
            (4095, 5_000_000),
            (end - 300_000, end),
        ] {
            let mut out = vec![0; to - from];
            file.read(from as u64, &mut out).expect("inside");
            assert!(out == bytes[from..to], "{from}..{to}");
            if file.pages.is_some() {
                out.fill(0);
                file.read_pages(from as u64, &mut out).expect("pages");
                assert!(out == bytes[from..to], "pages {from}..{to}");
            }
        }
        assert!(file.read(1, &mut vec![0; end]).is_err());
        assert!(file.read(u64::MAX, &mut [0]).is_err());
    }

    #[test]
    fn a_filesystem_without_direct_reads_keeps_nothing_in_its_cache_either() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("weights");
        std::fs::write(&path, vec![7u8; 8 << 20]).expect("written");
        let Ok(mut pages) = DiskFile::open_read(&path) else {
            return; // temporary files lie in memory
        };
        pages.clear_direct().expect("an open file's flag");
        let mut file = WeightFile::open(&path).expect("open");
        file.file.sync_all().expect("on the disk");
        file.pages = Some(pages);
        for direct in [false, true] {
            if direct {
                file.pages = DiskFile::open_read(&path).ok();
            }
            file.read(3, &mut vec![0; (8 << 20) - 3]).expect("inside");
            let cached = cached_bytes(&path);
            assert!(cached <= 1 << 20, "{cached} bytes in the page cache");
        }
    }

    fn cached_bytes(path: &Path) -> u64 {
        crate::machine::disk::cached_bytes(&File::open(path).expect("open")).expect("a mapping")
    }
}
