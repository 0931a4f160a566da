//! The transfer lanes of machines whose tiers are files and DRAM: direct reads and writes, loads
//! through a bounce buffer, and copies between the two arenas.

use super::MachineError;
use super::arena::AlignedBuffer;
use super::cpu::kernels::{Isa, rows_to_panels};
use super::cpu::pool::Pool;
use super::disk::{DiskFile, IoPool, IoRequest};
use super::lanes::Executor;
use super::memory::Memory;
use super::ops::{Copy2d, FileSpan, LoadSpan, Op};
use crate::tier::{Lane, Tier};
use crate::units::{MIB, PAGE_BYTES, round_up};
use std::sync::Arc;

/// Loads go through a buffer of this size, since tensors at home need not be page-aligned.
pub const BOUNCE_BYTES: u64 = 8 * MIB;

/// Moves bytes between files and the Cpu arena (and any arena, for loads).
pub struct DiskExecutor {
    pub memory: Arc<Memory>,
    pub files: Arc<[Arc<DiskFile>]>,
    pub pool: IoPool,
    /// Only the reading lane loads.
    pub bounce: Option<AlignedBuffer>,
}

impl Executor for DiskExecutor {
    fn run(&mut self, op: Op) -> Result<(), MachineError> {
        let outcome = match op {
            Op::Read(spans) => self.pool.run(&mut self.reads(&spans)),
            Op::Write(spans) => self.pool.run(&mut self.writes(&spans)),
            Op::Load(span) => return self.load(&span),
            _ => return Err(wrong_lane(&op)),
        };
        outcome.map_err(|error| MachineError::Disk(error.to_string()))
    }
}

fn wrong_lane(op: &Op) -> MachineError {
    MachineError::Unsupported(format!("another lane for {op:?}"))
}

impl DiskExecutor {
    fn reads(&self, spans: &[FileSpan]) -> Vec<IoRequest<'_>> {
        let request = |s: &FileSpan| {
            // SAFETY: the fences of a read come after all users of these bytes.
            let target = unsafe {
                self.memory
                    .write::<u8>(Tier::Cpu, s.memory, s.bytes as usize)
            };
            IoRequest::read(&self.files[s.file.0], s.offset, target)
        };
        spans.iter().map(request).collect()
    }

    fn writes(&self, spans: &[FileSpan]) -> Vec<IoRequest<'_>> {
        let request = |s: &FileSpan| {
            // SAFETY: the fences of a write come after its source was written; nothing changes it before
            // the write's own fence.
            let source = unsafe {
                self.memory
                    .read::<u8>(Tier::Cpu, s.memory, s.bytes as usize)
            };
            IoRequest::write(&self.files[s.file.0], s.offset, source)
        };
        spans.iter().map(request).collect()
    }

    fn load(&mut self, span: &LoadSpan) -> Result<(), MachineError> {
        let bounce = self
            .bounce
            .as_mut()
            .ok_or_else(|| MachineError::Unsupported("loads on this lane".into()))?;
        let mut done = 0;
        while done < span.bytes {
            let wanted = span.offset + done;
            let start = wanted / PAGE_BYTES * PAGE_BYTES;
            let skip = wanted - start;
            let bytes = (span.bytes - done).min(BOUNCE_BYTES - skip);
            let whole = round_up(skip + bytes, PAGE_BYTES) as usize;
            let mut request = [IoRequest::read(
                &self.files[span.file.0],
                start,
                &mut bounce[..whole],
            )];
            self.pool
                .run(&mut request)
                .map_err(|error| MachineError::Disk(error.to_string()))?;
            let loaded = &bounce[skip as usize..(skip + bytes) as usize];
            // SAFETY: loads run before any other operation uses the arenas.
            unsafe { self.memory.fill(span.to, span.memory + done, loaded)? };
            done += bytes;
        }
        if let Some(form) = span.repack {
            // SAFETY: as above.
            let panels = unsafe {
                self.memory
                    .write::<u8>(span.to, span.memory, span.bytes as usize)
            };
            rows_to_panels(&Pool::new(1), Isa::detect(), panels, form);
        }
        Ok(())
    }
}

/// Copies between the arenas of the host machine.
pub struct CopyExecutor {
    pub memory: Arc<Memory>,
    pub lane: Lane,
}

impl Executor for CopyExecutor {
    fn run(&mut self, op: Op) -> Result<(), MachineError> {
        let Op::Copy { pieces, .. } = &op else {
            return Err(wrong_lane(&op));
        };
        pieces.iter().for_each(|piece| self.copy(piece));
        Ok(())
    }
}

impl CopyExecutor {
    fn copy(&self, piece: &Copy2d) {
        let (from, to) = match self.lane {
            Lane::CpuToGpu => (Tier::Cpu, Tier::Gpu),
            _ => (Tier::Gpu, Tier::Cpu),
        };
        for row in 0..piece.rows {
            let bytes = piece.row_bytes as usize;
            // SAFETY: the fences of a copy come after its source was written and its target was last used.
            unsafe {
                let source =
                    self.memory
                        .read::<u8>(from, piece.from + row * piece.from_stride, bytes);
                let target = self
                    .memory
                    .write::<u8>(to, piece.to + row * piece.to_stride, bytes);
                target.copy_from_slice(source);
            }
        }
    }
}
