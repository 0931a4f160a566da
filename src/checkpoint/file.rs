//! One file of a checkpoint: its length is taken once, and nothing beyond it is ever asked for.
//! What the bytes mean is in the modules of the formats.

use super::CheckpointError;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file open for reading at any offset, from several threads.
#[derive(Debug)]
pub(super) struct WeightFile {
    pub path: PathBuf,
    pub bytes: u64,
    /// Seconds and nanoseconds of the last change, for the fingerprint.
    pub changed: (u64, u32),
    file: File,
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
        let changed = meta.modified().ok();
        let since = changed.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(WeightFile {
            path: path.to_owned(),
            bytes: meta.len(),
            changed: since.map_or((0, 0), |s| (s.as_secs(), s.subsec_nanos())),
            file,
        })
    }

    /// Fills `out` from `offset` on. Beyond the end is damage, not an I/O error.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            let why = format!("it ends at byte {} but more is referred to", self.bytes);
            return Err(CheckpointError::damaged(&self.path, why));
        }
        self.file
            .read_exact_at(out, offset)
            .map_err(|e| CheckpointError::io(&self.path, e))
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
