//! Moving and adding rows: embeddings, positions, gathers, residual sums. Additions are one per element,
//! so nothing here can round differently on another machine.

use super::pack::element;
use super::shared::Shared;
use super::simd::prefetch;
use crate::dtype::{Dtype, PANEL_ROWS};
use crate::machine::cpu::pool::Pool;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Columns of one part of what is gathered element by element.
const PART_COLUMNS: usize = 2048;
/// Elements of one part: enough that starting it does not count.
const PART_FLOATS: usize = 16 * 1024;
/// Elements that are widened together.
const TOGETHER: usize = 64;
/// Elements of a panel's row that are asked for ahead of the one in use: each lies in lines of its own.
const AHEAD: usize = 24;

/// Which row is the i-th.
#[inline(always)]
pub(super) fn row_of(rows: Option<&[u32]>, i: usize) -> usize {
    rows.map_or(i, |rows| rows[i] as usize)
}

/// # Panics
/// When a row is named twice: two threads would write it.
pub(super) fn assert_distinct(rows: &[u32]) {
    let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
    let distinct = || (1..rows.len()).all(|i| !rows[..i].contains(&rows[i]));
    assert!(
        ascending || distinct(),
        "a row table names a row twice: each row is written by one part"
    );
}

/// Runs `work(i)` over rows, cut alike for all row-wise work: a row is mostly read by the thread that wrote
/// it before, and few rows, which would not be worth a hand-over, stay with the caller.
pub(super) fn each_row(pool: &Pool, (m, width): (usize, usize), work: &(dyn Fn(usize) + Sync)) {
    let rows = (PART_FLOATS / width.max(1)).max(1);
    pool.run(m.div_ceil(rows), &|part| {
        (part * rows..((part + 1) * rows).min(m)).for_each(work);
    });
}

/// Runs `work(i, columns)` over pieces of an m × width matrix, for work that waits for memory.
fn each_piece(
    pool: &Pool,
    (m, width): (usize, usize),
    work: &(dyn Fn(usize, std::ops::Range<usize>) + Sync),
) {
    let across = width.div_ceil(PART_COLUMNS).max(1);
    let together = (PART_FLOATS / width.clamp(1, PART_COLUMNS))
        .clamp(1, m.div_ceil(2 * pool.threads()).max(1));
    pool.run(m.div_ceil(together) * across, &|part| {
        let from = part % across * PART_COLUMNS;
        let columns = from..(from + PART_COLUMNS).min(width);
        let first = part / across * together;
        (first..(first + together).min(m)).for_each(|i| work(i, columns.clone()));
    });
}

/// out[out_rows[i]] = the row `ids[i]` of a table kept in panels.
pub struct EmbedArgs<'a> {
    /// Panels of F32, F16 or BF16, the first of them holding the ids 0..64.
    pub table: &'a [u8],
    pub format: Dtype,
    pub width: usize,
    pub ids: &'a [u32],
    pub out: &'a mut [f32],
    pub ldo: usize,
    pub out_rows: &'a [u32],
}

/// # Panics
/// When a slice is shorter than the shape says, an id lies outside, or an out row is named twice.
pub fn embed_rows(pool: &Pool, args: EmbedArgs) {
    let EmbedArgs {
        table,
        format,
        width,
        ids,
        out,
        ldo,
        out_rows,
    } = args;
    assert!(
        ids.len() == out_rows.len() && ldo >= width,
        "embed: ids, rows or strides do not match"
    );
    assert_distinct(out_rows);
    let panel_bytes = format.panel_bytes(width) as usize;
    let out = Shared::new(out);
    each_piece(pool, (ids.len(), width), &|i, columns| {
        let id = ids[i] as usize;
        let panel = &table[id / PANEL_ROWS * panel_bytes..][..panel_bytes];
        let at = out_rows[i] as usize * ldo + columns.start;
        // SAFETY: out rows are distinct, pieces of a row too.
        let to = unsafe { out.piece(at, columns.len()) };
        row_of_panel((format, panel), (id % PANEL_ROWS, columns.start), to);
    });
}

/// Values of one row of a panel from input `first` on.
fn row_of_panel((format, panel): (Dtype, &[u8]), (row, first): (usize, usize), to: &mut [f32]) {
    let half = |j: usize| {
        let at = 2 * ((first + j) * PANEL_ROWS + row);
        prefetch(&panel[(at + 2 * AHEAD * PANEL_ROWS).min(panel.len() - 1)]);
        [panel[at], panel[at + 1]]
    };
    match format {
        Dtype::F16 => widen(to, |j| f16::from_le_bytes(half(j))),
        Dtype::Bf16 => widen(to, |j| bf16::from_le_bytes(half(j))),
        Dtype::F32 | Dtype::Q4 => {
            let values = to.iter_mut().enumerate();
            values.for_each(|(j, to)| *to = element(format, panel, row, first + j));
        }
    }
}

/// to[j] = narrow(j): some at a time, so that whole vectors are widened.
fn widen<T: Copy + Default>(to: &mut [f32], narrow: impl Fn(usize) -> T)
where
    [T]: HalfFloatSliceExt,
{
    let mut some = [T::default(); TOGETHER];
    for (number, to) in to.chunks_mut(TOGETHER).enumerate() {
        let some = &mut some[..to.len()];
        let values = some.iter_mut().enumerate();
        values.for_each(|(j, value)| *value = narrow(number * TOGETHER + j));
        some.convert_to_f32_slice(to);
    }
}

/// A row-major table of F32, F16 or BF16.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    pub bytes: &'a [u8],
    pub format: Dtype,
    pub width: usize,
}

/// x[rows[i]] += table[indices[i]], rows of x as wide as the table's.
/// # Panics
/// When a slice is shorter than the shape says, or a row of x is named twice.
pub fn add_rows_typed(pool: &Pool, x: &mut [f32], rows: &[u32], table: Table, indices: &[u32]) {
    assert!(
        rows.len() == indices.len(),
        "add rows: as many rows as indices are needed"
    );
    assert_distinct(rows);
    let width = table.width;
    let x = Shared::new(x);
    each_row(pool, (rows.len(), width), &|i| {
        // SAFETY: rows are distinct.
        let to = unsafe { x.piece(rows[i] as usize * width, width) };
        let from = indices[i] as usize * width;
        let mut wide = [0.0; TOGETHER];
        for (number, to) in to.chunks_mut(TOGETHER).enumerate() {
            let wide = &mut wide[..to.len()];
            table.widen(from + number * TOGETHER, wide);
            to.iter_mut().zip(wide).for_each(|(to, from)| *to += *from);
        }
    });
}

impl Table<'_> {
    /// Elements from `first` on.
    fn widen(&self, first: usize, to: &mut [f32]) {
        let half = |j: usize| [0, 1].map(|b| self.bytes[2 * (first + j) + b]);
        let whole = |j: usize| [0, 1, 2, 3].map(|b| self.bytes[4 * (first + j) + b]);
        match self.format {
            Dtype::F16 => widen(to, |j| f16::from_le_bytes(half(j))),
            Dtype::Bf16 => widen(to, |j| bf16::from_le_bytes(half(j))),
            Dtype::F32 => {
                let values = to.iter_mut().enumerate();
                values.for_each(|(j, to)| *to = f32::from_le_bytes(whole(j)));
            }
            Dtype::Q4 => {
                unreachable!("positions are never 4-bit: store them in the model's format")
            }
        }
    }
}

/// out[i] = x[rows[i]], rows `width` long.
/// # Panics
/// When a slice is shorter than the shape says.
pub fn copy_rows(pool: &Pool, x: &[f32], rows: &[u32], width: usize, out: &mut [f32]) {
    let out = Shared::new(out);
    each_row(pool, (rows.len(), width), &|i| {
        let from = rows[i] as usize * width;
        // SAFETY: every row of out belongs to one part.
        let to = unsafe { out.piece(i * width, width) };
        to.copy_from_slice(&x[from..from + width]);
    });
}

/// x[rows[i]] += y[i] (without a table: row i), rows `width` long, m of them.
/// # Panics
/// When a slice is shorter than the shape says, or a row of x is named twice.
pub fn add_rows(pool: &Pool, x: &mut [f32], rows: Option<&[u32]>, y: &[f32], width: usize) {
    let m = y.len() / width.max(1);
    assert_distinct(rows.map(|rows| &rows[..m]).unwrap_or(&[]));
    let x = Shared::new(x);
    each_row(pool, (m, width), &|i| {
        // SAFETY: rows are distinct.
        let to = unsafe { x.piece(row_of(rows, i) * width, width) };
        let from = &y[i * width..(i + 1) * width];
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    });
}
