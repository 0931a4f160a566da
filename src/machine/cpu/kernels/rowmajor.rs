//! The layout `gpu-rowmajor` (kernels/README.md): a panel's 64 rows one after the other. From row-major
//! weights to it, and from it to what the CPU multiplies. Group values of Q4 are `cpu-panel64`'s.

use super::isa::Isa;
use super::pack::{PackSource, pack_panels};
use super::panel::{CODES_AT, GROUP_BYTES, UNIT_BYTES, UNIT_INPUTS, UNITS_ACROSS, nibble_of};
use super::shared::Shared;
use super::simd::LANES;
use crate::dtype::{Dtype, PANEL_ROWS, Q4_GROUP, panels};
use crate::machine::cpu::pool::Pool;

/// Bytes of a group's codes in a row, and of its scale and minimum behind all codes.
const CODE_BYTES: usize = Q4_GROUP / 2;
const VALUE_BYTES: usize = 4;

/// Packs into ceil(rows / 64) panels of `format`, which is the source's own or Q4.
/// # Panics
/// As `pack_panels` does.
pub fn pack_rows(pool: &Pool, isa: Isa, source: PackSource, format: Dtype, out: &mut [u8]) {
    if format == Dtype::Q4 {
        pack_panels(pool, isa, source, format, out);
        let bytes = panels(source.rows) * format.panel_bytes(source.inputs) as usize;
        return each_panel(
            pool,
            &mut out[..bytes],
            (format, source.inputs),
            &codes_to_rows,
        );
    }
    let bytes = source.rows * format.row_bytes(source.inputs) as usize;
    let whole = panels(source.rows) * format.panel_bytes(source.inputs) as usize;
    out[..bytes].copy_from_slice(&source.bytes[..bytes]);
    out[bytes..whole].fill(0);
}

/// Turns whole `gpu-rowmajor` panels into `cpu-panel64` in place.
pub fn rows_to_panels(pool: &Pool, isa: Isa, bytes: &mut [u8], (format, inputs): (Dtype, usize)) {
    if format == Dtype::Q4 {
        return each_panel(pool, bytes, (format, inputs), &rows_to_codes);
    }
    let panel_bytes = format.panel_bytes(inputs) as usize;
    let mut rows = vec![0u8; panel_bytes];
    for panel in bytes.chunks_exact_mut(panel_bytes) {
        rows.copy_from_slice(panel);
        let source = PackSource {
            bytes: &rows,
            dtype: format,
            rows: PANEL_ROWS,
            inputs,
        };
        pack_panels(pool, isa, source, format, panel);
    }
}

/// Calls `work(from, to)` for every panel, `from` being a copy of it.
fn each_panel(
    pool: &Pool,
    bytes: &mut [u8],
    (format, inputs): (Dtype, usize),
    work: &(dyn Fn(&[u8], &mut [u8]) + Sync),
) {
    let panel_bytes = format.panel_bytes(inputs) as usize;
    let count = bytes.len() / panel_bytes;
    let out = Shared::new(bytes);
    pool.run(count, &|panel| {
        // SAFETY: every part has its own panel.
        let to = unsafe { out.piece(panel * panel_bytes, panel_bytes) };
        let from = to.to_vec();
        work(&from, to);
    });
}

/// Nibble of input `k` of a group among a row's codes: inputs 2i and 2i + 1 of eight are 16 bits apart.
fn nibble_in_row(k: usize) -> usize {
    8 * (k / 8) + (k % 8) / 2 + 4 * (k % 2)
}

/// Nibble of row `row`, input `k` of a group among a panel's codes of that group (panel.rs).
fn nibble_in_panel(row: usize, k: usize) -> usize {
    let unit = UNITS_ACROSS * (k / UNIT_INPUTS) + row / LANES;
    2 * unit * UNIT_BYTES + 8 * (row % LANES) + nibble_of(k % UNIT_INPUTS)
}

fn nibble(bytes: &[u8], at: usize) -> u8 {
    (bytes[at / 2] >> (4 * (at % 2))) & 15
}

/// Sets a nibble that is zero.
fn set_nibble(bytes: &mut [u8], at: usize, code: u8) {
    bytes[at / 2] |= code << (4 * (at % 2));
}

/// Calls `visit(in the panel, in rows)` with the two places of every nibble of a Q4 panel.
fn each_nibble(groups: usize, mut visit: impl FnMut(usize, usize)) {
    let values_at = PANEL_ROWS * groups * CODE_BYTES;
    for (g, row) in (0..groups).flat_map(|g| (0..PANEL_ROWS).map(move |row| (g, row))) {
        let (group, place) = (g * GROUP_BYTES, row * groups + g);
        for k in 0..Q4_GROUP {
            visit(
                2 * (group + CODES_AT) + nibble_in_panel(row, k),
                2 * place * CODE_BYTES + nibble_in_row(k),
            );
        }
        // Scale and minimum, four nibbles each.
        let value_at = values_at + place * VALUE_BYTES;
        for i in 0..4 {
            visit(2 * (group + 2 * row) + i, 2 * value_at + i);
            visit(
                2 * (group + 2 * (PANEL_ROWS + row)) + i,
                2 * (value_at + 2) + i,
            );
        }
    }
}

fn codes_to_rows(from: &[u8], to: &mut [u8]) {
    to.fill(0);
    each_nibble(from.len() / GROUP_BYTES, |panel, row| {
        set_nibble(to, row, nibble(from, panel));
    });
}

fn rows_to_codes(from: &[u8], to: &mut [u8]) {
    to.fill(0);
    each_nibble(to.len() / GROUP_BYTES, |panel, row| {
        set_nibble(to, panel, nibble(from, row));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::cpu::kernels::unpack_panel;

    fn source(rows: usize, inputs: usize) -> Vec<u8> {
        let value = |i: usize| half::f16::from_f32(((i * 37) % 101) as f32 / 101.0 - 0.4);
        (0..rows * inputs)
            .flat_map(|i| value(i).to_le_bytes())
            .collect()
    }

    fn from_fp16(bytes: &[u8], (rows, inputs): (usize, usize)) -> PackSource<'_> {
        PackSource {
            bytes,
            dtype: Dtype::F16,
            rows,
            inputs,
        }
    }

    #[test]
    fn rows_become_the_cpus_panels_and_q4_keeps_every_value() {
        let (pool, isa) = (Pool::new(2), Isa::detect());
        for (rows, inputs) in [(64, 64), (130, 90), (7, 200), (64, 33)] {
            let bytes = source(rows, inputs);
            let source = from_fp16(&bytes, (rows, inputs));
            for format in [Dtype::F16, Dtype::Q4] {
                let length = panels(rows) * format.panel_bytes(inputs) as usize;
                let (mut there, mut here) = (vec![7u8; length], vec![9u8; length]);
                pack_rows(&pool, isa, source, format, &mut there);
                pack_panels(&pool, isa, source, format, &mut here);
                assert_ne!(there, here, "{rows} {inputs} {format:?}");
                rows_to_panels(&pool, isa, &mut there, (format, inputs));
                assert!(there == here, "{rows} {inputs} {format:?}");
            }
        }
    }

    #[test]
    fn a_row_of_codes_reads_as_the_layout_says() {
        let (pool, isa) = (Pool::new(1), Isa::detect());
        let (rows, inputs) = (64, 128);
        let bytes = source(rows, inputs);
        let source = from_fp16(&bytes, (rows, inputs));
        let length = Dtype::Q4.panel_bytes(inputs) as usize;
        let (mut there, mut here) = (vec![0u8; length], vec![0u8; length]);
        pack_rows(&pool, isa, source, Dtype::Q4, &mut there);
        pack_panels(&pool, isa, source, Dtype::Q4, &mut here);
        let mut expected = vec![0.0f32; rows * inputs];
        unpack_panel(Dtype::Q4, &here, inputs, &mut expected);
        for row in [0, 1, 17, 63] {
            for k in 0..inputs {
                let place = row * 2 + k / 64;
                let word = &there[place * 32 + k % 64 / 8 * 4..][..4];
                let word = u32::from_le_bytes(word.try_into().expect("four bytes"));
                let code = word >> (4 * ((k % 8) / 2 + 4 * (k % 2))) & 15;
                let value = |at: usize| {
                    let at = 64 * 2 * 32 + place * 4 + at;
                    half::f16::from_le_bytes([there[at], there[at + 1]]).to_f32()
                };
                let ours = code as f32 * value(0) + value(2);
                let theirs = expected[row * inputs + k];
                assert!((ours - theirs).abs() <= 1e-6, "{row} {k}: {ours} {theirs}");
            }
        }
    }
}
