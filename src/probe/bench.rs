//! What all measurements share: the memory they rotate through, the compute threads, the stop flag.
//! Which figures are taken is written in the areas (disk, compute, contention).

use super::ProbeError;
use super::compute::{HIDDEN, MAX_SEQUENCES};
use super::scale::Extent;
use crate::machine::arena::AlignedBuffer;
use crate::machine::cpu::kernels::Isa;
use crate::machine::cpu::pool::Pool;
use crate::machine::os;
use crate::units::{GIB, MIB, PAGE_BYTES, round_up};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// However large a cache is.
const MOST_ARENA_BYTES: u64 = GIB;
/// Numbers that are drawn; the rest of the arena has them again.
const DRAWN_BYTES: usize = 16 * MIB as usize;

/// Memory, threads and limits of one probe.
pub struct Bench<'a> {
    pub extent: &'static Extent,
    pub pool: Pool,
    pub isa: Isa,
    /// Weights, KV records, I/O buffers: numbers that are finite and normal in every format.
    pub arena: AlignedBuffer,
    /// Inputs of operations, fp32.
    pub inputs: AlignedBuffer,
    /// Outputs of operations, fp32.
    pub outputs: AlignedBuffer,
    pub stop: &'a AtomicBool,
    next: usize,
}

impl<'a> Bench<'a> {
    /// `room_bytes` is what all buffers together may take; a larger cache makes use of more of it.
    pub fn new(
        extent: &'static Extent,
        room_bytes: u64,
        (threads, isa): (usize, Isa),
        stop: &'a AtomicBool,
    ) -> Result<Bench<'a>, ProbeError> {
        let spare_bytes = room_bytes.saturating_sub(Self::least_bytes(extent));
        let arena_bytes = arena_bytes(extent).min(extent.arena_bytes + spare_bytes) / MIB * MIB;
        let mut bench = Bench {
            extent,
            pool: Pool::new(threads),
            isa,
            arena: AlignedBuffer::new(arena_bytes)?,
            inputs: AlignedBuffer::new(4 * input_floats(extent) as u64)?,
            outputs: AlignedBuffer::new(4 * output_floats(extent) as u64)?,
            stop,
            next: 0,
        };
        fill_with_numbers(&mut bench.arena);
        for (i, x) in bench.inputs.as_mut_slice_of::<f32>().iter_mut().enumerate() {
            *x = ((i * 37) % 101) as f32 / 101.0 - 0.5;
        }
        Ok(bench)
    }

    /// Bytes that all buffers take where there is room for as much as they make use of.
    pub fn most_bytes(extent: &Extent) -> u64 {
        Self::least_bytes(extent) - extent.arena_bytes + arena_bytes(extent)
    }

    /// The least bytes that all buffers take.
    pub fn least_bytes(extent: &Extent) -> u64 {
        let floats = 4 * (input_floats(extent) + output_floats(extent)) as u64;
        extent.arena_bytes + round_up(floats, PAGE_BYTES) + 2 * PAGE_BYTES
    }

    /// True where figures of "memory" would be those of a cache.
    pub fn is_within_cache(&self) -> bool {
        let cache_bytes = os::last_level_cache_bytes().unwrap_or(0);
        (self.arena.len() as u64) < 2 * cache_bytes
    }

    pub fn check_stop(&self) -> Result<(), ProbeError> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(ProbeError::Stopped),
            false => Ok(()),
        }
    }

    /// Where in the arena the next operation over `bytes` begins: one after the other, so that
    /// nothing is still in a cache when its turn comes again.
    pub fn rotate(&mut self, bytes: usize) -> usize {
        let begin = match self.next + bytes <= self.arena.len() {
            true => self.next,
            false => 0,
        };
        self.next = (begin + bytes).next_multiple_of(64);
        begin
    }

    /// As `rotate`, at a whole page.
    pub fn rotate_pages(&mut self, bytes: usize) -> usize {
        self.next = self.next.next_multiple_of(PAGE_BYTES as usize);
        self.rotate(bytes)
    }

    /// Seconds of one call: the mean of as many calls as fill a sample. A run, too, pays for what interrupts
    /// it now and then; a sample that was hit badly is no median of the rounds.
    pub fn time(&mut self, mut call: impl FnMut(&mut Self)) -> Result<f64, ProbeError> {
        self.check_stop()?;
        let (mut calls, begin) = (0, Instant::now());
        loop {
            call(self);
            calls += 1;
            let seconds = begin.elapsed().as_secs_f64();
            if seconds >= self.extent.sample_s {
                // A clock too coarse for the call would make it look free.
                return Ok((seconds / f64::from(calls)).max(1e-9));
            }
        }
    }
}

/// Bytes to rotate through: so many times the largest cache that next to nothing is still there when its turn
/// comes again, caches that keep a part of what passes by among them.
fn arena_bytes(extent: &Extent) -> u64 {
    let cache_bytes = os::last_level_cache_bytes().unwrap_or(0);
    let wanted_bytes = extent.cache_multiple * cache_bytes;
    extent.arena_bytes.max(wanted_bytes.min(MOST_ARENA_BYTES)) / MIB * MIB
}

/// Query, key and value rows; products take theirs from the arena.
fn input_floats(extent: &Extent) -> usize {
    3 * HIDDEN * attention_rows(extent)
}

/// Rows of a prompt, or one of each sequence.
fn attention_rows(extent: &Extent) -> usize {
    extent.rows().max(MAX_SEQUENCES)
}

fn output_floats(extent: &Extent) -> usize {
    let outputs = extent.gemm_shapes.iter().map(|s| s.1).max().unwrap_or(1);
    let rows = extent.gemm_rows.iter().max().unwrap_or(&1);
    (rows * outputs).max(HIDDEN * attention_rows(extent))
}

/// Random 16-bit words around 0.06 as fp16; the same bits are small normal numbers as bf16, fp32 and
/// 4-bit scales. Random, because drives that compress would shine on anything else.
fn fill_with_numbers(arena: &mut AlignedBuffer) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let drawn_bytes = DRAWN_BYTES.min(arena.len());
    let (drawn, rest) = arena.split_at_mut(drawn_bytes);
    for word in bytemuck::cast_slice_mut::<u8, u64>(drawn) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state & 0x83ff_83ff_83ff_83ff | 0x2c00_2c00_2c00_2c00;
    }
    rest.chunks_mut(drawn.len().max(1))
        .for_each(|part| part.copy_from_slice(&drawn[..part.len()]));
}
