//! From row-major weights to panels (panel.rs has the layout) and back. Packing has to keep up with a
//! disk, so the transposes work on whole vectors. No files, no tensors' names.

use super::isa::Isa;
use super::pack_q4::Quantise;
use super::panel::{CODES_AT, GROUP_BYTES, UNIT_BYTES, UNIT_INPUTS, UNITS_ACROSS, nibble_of};
use super::shared::Shared;
use super::simd::LANES;
use crate::dtype::{Dtype, PANEL_ROWS, Q4_GROUP, panels};
use crate::machine::cpu::pool::Pool;
use half::{bf16, f16};

/// Row-major weights, as in a checkpoint: `rows × inputs` elements of F32, F16 or BF16.
#[derive(Clone, Copy)]
pub struct PackSource<'a> {
    pub bytes: &'a [u8],
    pub dtype: Dtype,
    pub rows: usize,
    pub inputs: usize,
}

/// Inputs transposed before the next rows are looked at: the block stays in the first cache.
const BLOCK_INPUTS: usize = 128;

/// Packs into ceil(rows / 64) panels of `format`, which is the source's own or Q4.
/// # Panics
/// When a slice is shorter than its shape says, or the format is neither.
pub fn pack_panels(pool: &Pool, isa: Isa, source: PackSource, format: Dtype, out: &mut [u8]) {
    let row_bytes = source.dtype.row_bytes(source.inputs) as usize;
    let panel_bytes = format.panel_bytes(source.inputs) as usize;
    assert!(
        source.dtype != Dtype::Q4,
        "packing starts from f32, f16 or bf16, not from q4"
    );
    assert!(
        format == source.dtype || format == Dtype::Q4,
        "packing keeps the format or makes q4"
    );
    assert!(
        source.bytes.len() >= source.rows * row_bytes,
        "pack: the source is too short"
    );
    assert!(
        out.len() >= panels(source.rows) * panel_bytes,
        "pack: out is too short"
    );
    let out = Shared::new(out);
    pool.run(panels(source.rows), &|panel| {
        // SAFETY: every part writes its own panel.
        let to = unsafe { out.piece(panel * panel_bytes, panel_bytes) };
        let first = panel * PANEL_ROWS;
        let rows = (source.rows - first).min(PANEL_ROWS);
        let bytes = &source.bytes[first * row_bytes..(first + rows) * row_bytes];
        let source = PackSource {
            bytes,
            rows,
            ..source
        };
        match (format, source.dtype) {
            (Dtype::Q4, _) => isa.call(Quantise { source, to }),
            (Dtype::F32, _) => interleave::<4>(source, to),
            _ => interleave::<2>(source, to),
        }
    });
}

/// Transposes one panel of elements of N bytes.
fn interleave<const N: usize>(source: PackSource, to: &mut [u8]) {
    let (row_bytes, tall) = (source.inputs * N, 16 / N);
    if source.rows < PANEL_ROWS {
        to.fill(0);
    }
    for from in (0..source.inputs).step_by(BLOCK_INPUTS) {
        let until = (from + BLOCK_INPUTS).min(source.inputs);
        ask_for::<N>(&source, until);
        for row in (0..source.rows).step_by(tall) {
            let whole = if row + tall <= source.rows {
                (until - from) / tall * tall
            } else {
                0
            };
            for k in (from..from + whole).step_by(tall) {
                let (at, there) = (row * row_bytes + k * N, (k * PANEL_ROWS + row) * N);
                square::<N>(
                    (&source.bytes[at..], row_bytes),
                    (&mut to[there..], PANEL_ROWS * N),
                );
            }
            for row in row..(row + tall).min(source.rows) {
                for k in from + whole..until {
                    let (at, there) = (row * row_bytes + k * N, (k * PANEL_ROWS + row) * N);
                    to[there..there + N].copy_from_slice(&source.bytes[at..at + N]);
                }
            }
        }
    }
}

/// Asks for the block of all rows that comes next: 64 short streams are too many for the hardware.
fn ask_for<const N: usize>(source: &PackSource, from: usize) {
    let until = (from + BLOCK_INPUTS).min(source.inputs);
    for row in 0..source.rows {
        for byte in (from * N..until * N).step_by(64) {
            super::simd::prefetch(&source.bytes[row * source.inputs * N + byte]);
        }
    }
}

/// Transposes 16 / N rows of 16 bytes.
#[inline(always)]
pub(super) fn square<const N: usize>(from: (&[u8], usize), to: (&mut [u8], usize)) {
    let tall = 16 / N;
    assert!(from.0.len() >= (tall - 1) * from.1 + 16 && to.0.len() >= (tall - 1) * to.1 + 16);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the bounds were checked; SSE2 belongs to x86-64.
    unsafe {
        super::transpose::transpose16::<N>((from.0.as_ptr(), from.1), (to.0.as_mut_ptr(), to.1));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for row in 0..tall {
        for k in 0..tall {
            let (at, there) = (row * from.1 + k * N, k * to.1 + row * N);
            to.0[there..there + N].copy_from_slice(&from.0[at..at + N]);
        }
    }
}

/// One element of a panel as f32.
pub(super) fn element(format: Dtype, panel: &[u8], row: usize, k: usize) -> f32 {
    let at = k * PANEL_ROWS + row;
    let half = |at: usize| [panel[at], panel[at + 1]];
    match format {
        Dtype::F32 => f32::from_le_bytes([0, 1, 2, 3].map(|i| panel[4 * at + i])),
        Dtype::F16 => f16::from_le_bytes(half(2 * at)).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes(half(2 * at)).to_f32(),
        Dtype::Q4 => {
            let group = k / Q4_GROUP * GROUP_BYTES;
            let scale = f16::from_le_bytes(half(group + 2 * row)).to_f32();
            let minimum = f16::from_le_bytes(half(group + 2 * (PANEL_ROWS + row))).to_f32();
            let unit = k % Q4_GROUP / UNIT_INPUTS * UNITS_ACROSS + row / LANES;
            let nibble = nibble_of(k % UNIT_INPUTS);
            let word = group + CODES_AT + unit * UNIT_BYTES + row % LANES * 4;
            let byte = panel[word + nibble / 2];
            let code = byte >> (nibble % 2 * 4) & 15;
            (code as f32).mul_add(scale, minimum)
        }
    }
}

/// Writes the 64 rows of one panel as row-major f32, 64 × inputs.
pub fn unpack_panel(format: Dtype, panel: &[u8], inputs: usize, out: &mut [f32]) {
    for (row, to) in out.chunks_exact_mut(inputs).take(PANEL_ROWS).enumerate() {
        for (k, value) in to.iter_mut().enumerate() {
            *value = element(format, panel, row, k);
        }
    }
}
