//! A file written by direct I/O: buffers are filled from front to back on one side while full ones are
//! written on the other, two at a time. What the bytes are is the caller's business.

use crate::machine::arena::{AlignedBuffer, MemoryError};
use crate::machine::disk::{DiskError, DiskFile};
use crate::units::PAGE_BYTES;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use thiserror::Error;

/// Why a stream could not be written.
#[derive(Debug, Error)]
pub enum StreamError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What to write and with how much memory.
pub(crate) struct StreamJob<'a> {
    pub path: &'a Path,
    /// Whole length: reserved first, so that a full disk is an error before the work.
    pub total_bytes: u64,
    pub buffer_bytes: u64,
    pub buffers: usize,
}

/// A full buffer on its way to the disk.
struct Full {
    buffer: AlignedBuffer,
    bytes: usize,
    offset: u64,
}

/// The front end of a stream: hands out room to fill, in order.
pub(crate) struct Sink {
    current: AlignedBuffer,
    used_bytes: usize,
    /// Offset in the file of the current buffer's first byte.
    offset: u64,
    full: Sender<Full>,
    empty: Receiver<AlignedBuffer>,
    failed: bool,
}

impl Sink {
    /// Bytes written or about to be.
    pub fn position(&self) -> u64 {
        self.offset + self.used_bytes as u64
    }

    /// Room for `bytes` more, at most a buffer less a page. After a failure of the other side the
    /// room leads nowhere; the failure comes out at the end.
    pub fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.used_bytes + bytes > self.current.len() {
            self.flush();
        }
        let start = self.used_bytes;
        self.used_bytes += bytes;
        &mut self.current[start..start + bytes]
    }

    /// Zeros up to the next multiple of `step` bytes (at most a page).
    pub fn align(&mut self, step: u64) {
        let missing = self.position().next_multiple_of(step) - self.position();
        self.room(missing as usize).fill(0);
    }

    /// Zeros up to `position`, at most a page ahead: where the layout says that the next part begins.
    pub fn align_to(&mut self, position: u64) {
        let missing = position.saturating_sub(self.position()).min(PAGE_BYTES);
        self.room(missing as usize).fill(0);
        assert!(
            self.failed || self.position() == position,
            "parts out of order"
        );
    }

    /// True when writing failed: filling on is in vain.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Sends the whole pages off; a started page moves to the front of the next buffer.
    fn flush(&mut self) {
        let whole = self.used_bytes - self.used_bytes % PAGE_BYTES as usize;
        let tail = self.used_bytes - whole;
        let Ok(mut next) = self.empty.recv() else {
            self.failed = true;
            self.used_bytes = tail;
            return;
        };
        next[..tail].copy_from_slice(&self.current[whole..whole + tail]);
        let buffer = std::mem::replace(&mut self.current, next);
        let full = Full {
            buffer,
            bytes: whole,
            offset: self.offset,
        };
        self.failed |= self.full.send(full).is_err();
        self.offset += whole as u64;
        self.used_bytes = tail;
    }
}

/// Writes a file through `fill`. On an error of either side the file is left for the caller to
/// remove; the writing side's error is told first, since the other one follows from it.
pub(crate) fn write_stream<E: From<StreamError>>(
    job: &StreamJob,
    fill: impl FnOnce(&mut Sink) -> Result<(), E>,
) -> Result<(), E> {
    let file = DiskFile::create(job.path).map_err(StreamError::from)?;
    file.reserve(job.total_bytes).map_err(StreamError::from)?;
    let (full_in, full_out) = channel::<Full>();
    let (empty_in, empty_out) = channel();
    let buffer = || AlignedBuffer::new(job.buffer_bytes).map_err(StreamError::from);
    for _ in 1..job.buffers.max(2) {
        // The receiver is at hand, so this cannot fail.
        let _ = empty_in.send(buffer()?);
    }
    let mut sink = Sink {
        current: buffer()?,
        used_bytes: 0,
        offset: 0,
        full: full_in,
        empty: empty_out,
        failed: false,
    };
    let full = &(Mutex::new(full_out), AtomicBool::new(false));
    let disk = &file;
    let (filled, written) = std::thread::scope(|scope| {
        let start = |empty| scope.spawn(move || drain(disk, full, empty));
        // No sender stays here: when all writers have ended, the front hears of it.
        let writers = [empty_in.clone(), empty_in].map(start);
        let filled = fill(&mut sink);
        let end = sink.position();
        if filled.is_ok() {
            sink.align(PAGE_BYTES);
            sink.flush();
        }
        // Without its sender the writers come to their end.
        drop(sink);
        let ends = writers.into_iter().map(|writer| {
            let joined = writer.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let written: Vec<Result<(), DiskError>> = ends.collect();
        (
            filled.map(|()| end),
            written.into_iter().collect::<Result<(), _>>(),
        )
    });
    written.map_err(StreamError::from)?;
    let end = filled?;
    file.set_len(end).map_err(StreamError::from)?;
    file.sync().map_err(StreamError::from)?;
    Ok(())
}

/// Writes full buffers until there will be no more, or a write has failed. Every buffer goes back, so
/// that the front never waits for one in vain.
fn drain(
    file: &DiskFile,
    (full, failed): &(Mutex<Receiver<Full>>, AtomicBool),
    empty: Sender<AlignedBuffer>,
) -> Result<(), DiskError> {
    loop {
        let next = full.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Some(Full {
            buffer,
            bytes,
            offset,
        }) = next.ok().filter(|_| !failed.load(Ordering::Relaxed))
        else {
            return Ok(());
        };
        let wrote = file.write_at(&buffer[..bytes], offset);
        failed.fetch_or(wrote.is_err(), Ordering::Relaxed);
        // Nobody waits for the last buffers.
        let _ = empty.send(buffer);
        wrote?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_pieces_arrive_in_order() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("stream");
        let job = StreamJob {
            path: &path,
            total_bytes: 1 << 16,
            buffer_bytes: 3 * 4096,
            buffers: 2,
        };
        let mut expected = Vec::new();
        let written = write_stream(&job, |sink| {
            for i in 0..40usize {
                let piece = vec![i as u8 + 1; 97 * i];
                sink.room(piece.len()).copy_from_slice(&piece);
                expected.extend(&piece);
            }
            sink.align(64);
            expected.resize(expected.len().next_multiple_of(64), 0);
            sink.room(5).fill(9);
            expected.extend([9; 5]);
            Ok::<(), StreamError>(())
        });
        written.expect("written");
        assert_eq!(std::fs::read(&path).expect("there"), expected);
    }

    #[test]
    fn more_than_the_disk_holds_is_an_error_at_the_start() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let job = StreamJob {
            path: &dir.path().join("stream"),
            total_bytes: 1 << 60,
            buffer_bytes: 8192,
            buffers: 2,
        };
        let error = write_stream(&job, |_| -> Result<(), StreamError> { panic!("began") });
        assert!(error.expect_err("no room").to_string().contains("missing"));
    }
}
