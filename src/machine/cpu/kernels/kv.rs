//! A token's record in the KV cache, [K row | V row]: where it lies, how it is written and read.
//! No attention, and no idea of pages or tiers: a record is an index into a slice.

use super::isa::Isa;
use super::panel::{Element, F16, F32};
use super::q4::{read_group, write_row};
use super::shared::Shared;
use super::simd::{Body, LANES, Simd, load_first};
use crate::dtype::{Dtype, Q4_GROUP, Q4_GROUP_BYTES};
use crate::machine::cpu::pool::Pool;
use std::ops::Range;

/// Which record a token has.
#[derive(Clone, Copy, Debug)]
pub enum Slots<'a> {
    Contiguous { first: usize },
    Table(&'a [u32]),
}

impl Slots<'_> {
    #[inline(always)]
    pub(super) fn record(&self, token: usize) -> usize {
        match self {
            Slots::Contiguous { first } => first + token,
            Slots::Table(table) => table[token] as usize,
        }
    }
}

/// The records of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a> {
    pub bytes: &'a [u8],
    pub slots: Slots<'a>,
}

/// Bytes of a record: K row and V row.
pub fn record_bytes(format: Dtype, hidden: usize) -> usize {
    2 * format.row_bytes(hidden) as usize
}

/// Writes the K and V of `count` rows of qkv, [q | k | v] each `hidden` wide, into their records.
pub struct AppendArgs<'a> {
    pub qkv: &'a [f32],
    pub ld: usize,
    pub first_row: usize,
    pub count: usize,
    pub hidden: usize,
    /// F32, F16 (finite values beyond its range saturate) or Q4.
    pub format: Dtype,
    pub bytes: &'a mut [u8],
    /// Record of each appended token, no record twice.
    pub slots: Slots<'a>,
}

/// # Panics
/// When a slice is shorter than the shape says, the format is bf16, or a record is named twice.
pub fn append_kv(pool: &Pool, isa: Isa, args: AppendArgs) {
    let AppendArgs {
        qkv,
        ld,
        first_row,
        count,
        hidden,
        format,
        bytes,
        slots,
    } = args;
    assert!(format != Dtype::Bf16, "KV is kept in f32, f16 or q4");
    if let Slots::Table(table) = slots {
        super::rows::assert_distinct(&table[..count]);
    }
    let row_bytes = format.row_bytes(hidden) as usize;
    let bytes = Shared::new(bytes);
    pool.run(count, &|token| {
        for side in 0..2 {
            let from = (first_row + token) * ld + (1 + side) * hidden;
            let at = (2 * slots.record(token) + side) * row_bytes;
            // SAFETY: records are distinct and a token is one part.
            let row = unsafe { bytes.piece(at, row_bytes) };
            isa.call(WriteRow {
                values: &qkv[from..from + hidden],
                row,
                format,
            });
        }
    });
}

struct WriteRow<'a> {
    values: &'a [f32],
    row: &'a mut [u8],
    format: Dtype,
}

impl Body for WriteRow<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        match self.format {
            Dtype::Q4 => write_row::<V>(self.values, self.row),
            Dtype::F16 => write_halves::<V>(self.values, self.row),
            _ => self.row.copy_from_slice(bytemuck::cast_slice(self.values)),
        }
    }
}

#[inline(always)]
fn write_halves<V: Simd>(values: &[f32], row: &mut [u8]) {
    let (low, high) = (V::splat(-65504.0), V::splat(65504.0));
    for (values, to) in values.chunks(LANES).zip(row.chunks_mut(2 * LANES)) {
        let mut halves = [0u16; LANES];
        // SAFETY: a chunk has the length that is given; `halves` holds sixteen.
        unsafe {
            let x = load_first::<V>(values.as_ptr(), values.len());
            V::store_f16(halves.as_mut_ptr(), V::min(high, V::max(low, x)));
        }
        to.copy_from_slice(&bytemuck::cast_slice(&halves)[..to.len()]);
    }
}

/// How a row of a format is read, sixteen elements at a time from any element on.
pub(super) trait KvFormat {
    /// Kept in 4-bit groups.
    const CODED: bool = false;
    /// The format of what `open` returns.
    type As: Element;
    /// Where elements `range` of the row begin, widened into `buffer` where they cannot be read in place.
    /// # Safety
    /// A whole row at `row`; `buffer` holds range.len() + 128 f32.
    unsafe fn open<V: Simd>(row: *const u8, range: Range<usize>, buffer: *mut f32) -> *const u8;
}

pub(super) struct KvF32;
pub(super) struct KvF16;
pub(super) struct KvQ4;

impl KvFormat for KvF32 {
    type As = F32;
    #[inline(always)]
    unsafe fn open<V: Simd>(row: *const u8, range: Range<usize>, _: *mut f32) -> *const u8 {
        // SAFETY: the range lies in the row.
        unsafe { row.add(range.start * F32::BYTES) }
    }
}

impl KvFormat for KvF16 {
    type As = F16;
    #[inline(always)]
    unsafe fn open<V: Simd>(row: *const u8, range: Range<usize>, _: *mut f32) -> *const u8 {
        // SAFETY: the range lies in the row.
        unsafe { row.add(range.start * F16::BYTES) }
    }
}

impl KvFormat for KvQ4 {
    const CODED: bool = true;
    type As = F32;
    #[inline(always)]
    unsafe fn open<V: Simd>(row: *const u8, range: Range<usize>, buffer: *mut f32) -> *const u8 {
        let first = range.start / Q4_GROUP;
        // SAFETY: whole groups are stored, and at most two are begun beyond the range's length.
        unsafe {
            for group in first..range.end.div_ceil(Q4_GROUP) {
                let to = buffer.add((group - first) * Q4_GROUP);
                read_group::<V>(row.add(group * Q4_GROUP_BYTES), to);
            }
            buffer.add(range.start % Q4_GROUP).cast()
        }
    }
}

/// Bytes that elements `range` of a row occupy, for asking ahead: (first, count).
pub(super) fn extent(format: Dtype, range: &Range<usize>) -> (usize, usize) {
    match format {
        Dtype::Q4 => {
            let first = range.start / Q4_GROUP;
            (
                first * Q4_GROUP_BYTES,
                (range.end.div_ceil(Q4_GROUP) - first) * Q4_GROUP_BYTES,
            )
        }
        _ => {
            let one = format.row_bytes(1) as usize;
            (range.start * one, range.len() * one)
        }
    }
}
