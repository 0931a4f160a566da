//! Decode attention of one head over 4-bit rows, where heads are whole vectors: codes are multiplied as they
//! lie in the groups. A query is brought to integers of 16 bits once (two planes of bytes, off by at most
//! 1.6e-5 of its largest element), so that query · row = Σ over groups scale × (integers · codes) × step +
//! minimum × Σ query, of which the inner sums are exact in any order.

use super::attend::Part;
use super::decode::{Ahead, BLOCK, Block, Carved, ROWS_TOGETHER};
use super::kv::KvFormat;
use super::q4::{CODE_BYTES, ROUNDER, Reader};
use super::simd::{CODES_TOGETHER, LANES, Simd};
use crate::dtype::{Q4_GROUP, Q4_GROUP_BYTES};
use std::ops::Range;

/// Vectors of a group: vector j is nibble j of its sixteen words.
const VECTORS: usize = Q4_GROUP / LANES;
/// The largest 256 × high + low of two signed bytes whose negative is one too.
const LARGEST_INTEGER: f32 = 127.0 * 256.0 + 127.0;
/// Bytes of a group's integers: for the low and the high nibbles the high bytes, then the low ones.
const INTEGER_BYTES: usize = 4 * CODE_BYTES;
/// Floats that they take.
const INTEGER_FLOATS: usize = INTEGER_BYTES / 4;
/// What `dots` reads at once: 16 bytes of each of four rows.
const QUARTER_BYTES: usize = 16;
/// Scales, then minima, of a group of four rows.
const ENDS: usize = 2 * ROWS_TOGETHER;

/// Heads are whole vectors, so that none of those lies in two groups. Else rows are widened.
#[inline(always)]
pub(super) fn coded<K: KvFormat>(part: &Part) -> bool {
    K::CODED && part.problem.head_size.is_multiple_of(LANES)
}

/// Where a head lies in the groups of the part's rows: vectors first..first + count of all theirs.
#[derive(Clone, Copy)]
pub(super) struct Span {
    first: usize,
    count: usize,
}

impl Span {
    #[inline(always)]
    pub(super) fn of(part: &Part, head: usize) -> Span {
        let size = part.problem.head_size;
        let first = part.elements().start % Q4_GROUP + head * size;
        Span {
            first: first / LANES,
            count: size / LANES,
        }
    }

    /// The groups that it touches: first, and one past the last.
    #[inline(always)]
    fn groups(self) -> (usize, usize) {
        (
            self.first / VECTORS,
            (self.first + self.count).div_ceil(VECTORS),
        )
    }

    /// Its vectors in a group.
    #[inline(always)]
    fn in_group(self, group: usize) -> Range<usize> {
        let start = (group * VECTORS).max(self.first) - group * VECTORS;
        let end = ((group + 1) * VECTORS).min(self.first + self.count) - group * VECTORS;
        start..end
    }
}

/// Groups that a head can touch.
fn most_groups(head_size: usize) -> usize {
    let aligned = head_size.is_multiple_of(Q4_GROUP) || Q4_GROUP.is_multiple_of(head_size);
    head_size.div_ceil(Q4_GROUP) + usize::from(!aligned)
}

/// Floats of a query as `write_query` leaves it: each group's integers, each group's sum, the step.
pub(super) fn query_room(head_size: usize) -> usize {
    ((INTEGER_FLOATS + 1) * most_groups(head_size) + 1).next_multiple_of(LANES)
}

/// Writes `query` × scale as integers × step; elements of the groups that are not the head's are zero.
#[inline(always)]
pub(super) fn write_query<V: Simd>(query: &[f32], scale: f32, span: Span, to: &mut [f32]) {
    let scale = V::splat(scale);
    let mut high = V::splat(0.0);
    for vector in query.chunks_exact(LANES) {
        // SAFETY: sixteen f32.
        let x = V::mul(unsafe { V::load(vector.as_ptr()) }, scale);
        high = V::max(V::max(x, V::sub(V::splat(0.0), x)), high);
    }
    let largest = V::largest(high);
    // A query that is not finite has no integers: its scores are not numbers, as its products would be.
    let step = match largest < f32::INFINITY {
        true => largest / LARGEST_INTEGER,
        false => f32::NAN,
    };
    let steps_per_unit = match step > 0.0 {
        true => V::splat(LARGEST_INTEGER / largest),
        false => V::splat(0.0),
    };
    let (first, end) = span.groups();
    let (integers, rest) = to.split_at_mut(INTEGER_FLOATS * (end - first));
    let planes: &mut [u8] = bytemuck::cast_slice_mut(integers);
    let mut vectors = query.chunks_exact(LANES);
    for (group, planes) in (first..end).zip(planes.chunks_exact_mut(INTEGER_BYTES)) {
        let mut sum = V::splat(0.0);
        let mut bytes = [[0i8; 2 * LANES]; VECTORS];
        for j in span.in_group(group) {
            let Some(vector) = vectors.next() else { break };
            // SAFETY: sixteen f32.
            let x = V::mul(unsafe { V::load(vector.as_ptr()) }, scale);
            sum = V::add(sum, x);
            split_integers::<V>(V::mul(x, steps_per_unit), &mut bytes[j]);
        }
        interleave(&bytes, planes);
        rest[group - first] = V::sum(sum);
    }
    rest[end - first] = step;
}

/// The nearest integers as high bytes, then low bytes: 256 × high + low, both signed.
#[inline(always)]
fn split_integers<V: Simd>(steps: V::F, to: &mut [i8; 2 * LANES]) {
    let rounder = V::splat(ROUNDER);
    let whole = V::sub(V::add(steps, rounder), rounder);
    // A quarter more, so that no half is left to be rounded to even: low bytes are -128..=127.
    let nearly = V::mul(V::add(whole, V::splat(0.25)), V::splat(1.0 / 256.0));
    let high = V::sub(V::add(nearly, rounder), rounder);
    let low = V::fma(high, V::splat(-256.0), whole);
    // SAFETY: sixteen bytes each.
    unsafe {
        V::store_bytes(to.as_mut_ptr(), V::to_ints(high));
        V::store_bytes(to.as_mut_ptr().add(LANES), V::to_ints(low));
    }
}

/// In the order of the codes: byte 2 i + (j >> 1) of a group has vector j's element i, its low nibble where j
/// is even. `to`: high bytes for low nibbles, low bytes for low nibbles, the same for high nibbles.
#[inline(always)]
fn interleave(bytes: &[[i8; 2 * LANES]; VECTORS], to: &mut [u8]) {
    for (plane, to) in to.chunks_exact_mut(CODE_BYTES).enumerate() {
        let (nibble, part) = (plane / 2, plane % 2 * LANES);
        for (i, pair) in to.chunks_exact_mut(2).enumerate() {
            pair[0] = bytes[nibble][part + i] as u8;
            pair[1] = bytes[nibble + 2][part + i] as u8;
        }
    }
}

/// Scales and minima of all groups in `group_bytes` of four rows, each group's beside each other.
/// # Safety
/// The rows have the groups, `to` room for `ENDS` of each.
#[inline(always)]
pub(super) unsafe fn read_ends<V: Simd>(
    rows: &[*const u8; ROWS_TOGETHER],
    group_bytes: usize,
    to: &mut [f32],
) {
    for (group, to) in (0..group_bytes / Q4_GROUP_BYTES).zip(to.chunks_exact_mut(ENDS)) {
        let mut ends = [rows[0]; ROWS_TOGETHER];
        for (end, row) in ends.iter_mut().zip(rows) {
            *end = row.wrapping_add(group * Q4_GROUP_BYTES + CODE_BYTES);
        }
        // SAFETY: the caller's.
        unsafe { V::store_half_pairs(to.as_mut_ptr(), ends) };
    }
}

/// Each head's query times four rows.
/// # Safety
/// `open_rows` opened them; each head's scores have room for four from `at` on.
#[inline(always)]
pub(super) unsafe fn score<V: Simd>(
    part: &Part,
    carved: &mut Carved,
    (rows, block, ahead): (&[*const u8; ROWS_TOGETHER], &Block, &mut Ahead),
    at: usize,
) {
    let whole = whole_groups(part);
    for head in 0..part.heads.len() {
        ask_for::<V>(whole, (block, ahead));
        // SAFETY: rows, queries and the buffer's ends are of these heads; the caller's for the scores.
        unsafe {
            let query = carved.queries.as_ptr().add(head * carved.query_room);
            let ends = carved.buffer.as_ptr();
            // The usual counts as constants, for which the compiler unrolls.
            let dots = match whole {
                1 => dots::<V>(rows, (head, 1), query, ends),
                2 => dots::<V>(rows, (2 * head, 2), query, ends),
                _ => {
                    let (first, end) = Span::of(part, head).groups();
                    dots::<V>(rows, (first, end - first), query, ends)
                }
            };
            let to = carved.scores.as_mut_ptr().add(head * BLOCK + at);
            to.cast::<[f32; ROWS_TOGETHER]>().write(dots);
        }
    }
}

/// Groups of a head, where heads and groups begin together: 0 where they do not.
#[inline(always)]
fn whole_groups(part: &Part) -> usize {
    match part.problem.head_size % Q4_GROUP {
        0 => part.problem.head_size / Q4_GROUP,
        _ => 0,
    }
}

/// A query times `count` groups, from `first` on, of four rows.
/// # Safety
/// The rows have them; `query` is of `write_query`, `ends` of `read_ends`.
#[inline(always)]
unsafe fn dots<V: Simd>(
    rows: &[*const u8; ROWS_TOGETHER],
    (first, count): (usize, usize),
    query: *const f32,
    ends: *const f32,
) -> [f32; ROWS_TOGETHER] {
    let (mut steps, mut scores) = ([0f32; ROWS_TOGETHER], [0f32; ROWS_TOGETHER]);
    // SAFETY: the caller's.
    unsafe {
        let rest = query.add(INTEGER_FLOATS * count);
        for group in 0..count {
            let at = (first + group) * Q4_GROUP_BYTES;
            let sums = group_dots::<V>(rows, at, query.add(INTEGER_FLOATS * group).cast());
            let ends = ends.add((first + group) * ENDS);
            let scales = ends.cast::<[f32; ROWS_TOGETHER]>().read();
            let minima = ends
                .add(ROWS_TOGETHER)
                .cast::<[f32; ROWS_TOGETHER]>()
                .read();
            let sum = rest.add(group).read();
            for r in 0..ROWS_TOGETHER {
                steps[r] = scales[r].mul_add(sums[r] as f32, steps[r]);
                scores[r] = minima[r].mul_add(sum, scores[r]);
            }
        }
        let step = rest.add(count).read();
        for r in 0..ROWS_TOGETHER {
            scores[r] = steps[r].mul_add(step, scores[r]);
        }
    }
    scores
}

/// A group's integers times the codes of four rows that lie `at` in them.
/// # Safety
/// The rows have the group, `x` its integers.
#[inline(always)]
unsafe fn group_dots<V: Simd>(
    rows: &[*const u8; ROWS_TOGETHER],
    at: usize,
    x: *const u8,
) -> [i32; ROWS_TOGETHER] {
    const { assert!(2 * CODE_BYTES / QUARTER_BYTES <= CODES_TOGETHER) };
    let none = V::splat_word(0);
    let (mut high, mut low) = (V::begin_codes(none), V::begin_codes(none));
    for half in 0..CODE_BYTES / QUARTER_BYTES {
        let from = at + half * QUARTER_BYTES;
        // SAFETY: the caller's.
        unsafe {
            let words = V::load_quarters([
                rows[0].add(from),
                rows[1].add(from),
                rows[2].add(from),
                rows[3].add(from),
            ]);
            let plane = |plane: usize| x.add(plane * CODE_BYTES + half * QUARTER_BYTES);
            let (lows, highs) = (V::low_nibbles(words), V::high_nibbles(words));
            high = V::dot_codes(high, lows, V::splat_quarter(plane(0)));
            low = V::dot_codes(low, lows, V::splat_quarter(plane(1)));
            high = V::dot_codes(high, highs, V::splat_quarter(plane(2)));
            low = V::dot_codes(low, highs, V::splat_quarter(plane(3)));
        }
    }
    V::sum_quarters(V::code_sums(none, high), V::code_sums(none, low))
}

/// As many lines as four rows of a head take.
#[inline(always)]
fn ask_for<V: Simd>(whole: usize, (block, ahead): (&Block, &mut Ahead)) {
    match whole {
        1 => ahead.ask::<V, 3>(block),
        2 => ahead.ask::<V, 5>(block),
        _ => ahead.ask::<V, 4>(block),
    }
}

/// sums[head] += weight of each of four keys × its V row.
/// # Safety
/// `open_rows` opened them, from `at` of the block on.
#[inline(always)]
pub(super) unsafe fn add<V: Simd>(
    part: &Part,
    carved: &mut Carved,
    (rows, block, ahead): (&[*const u8; ROWS_TOGETHER], &Block, &mut Ahead),
    at: usize,
) {
    let whole = whole_groups(part);
    for head in 0..part.heads.len() {
        ask_for::<V>(whole, (block, ahead));
        let weights = carved.weights::<V>(head, at);
        // SAFETY: rows, sums and the buffer's ends are of these heads.
        unsafe {
            let sums = carved.sums.as_mut_ptr().add(head * carved.width);
            let ends = carved.buffer.as_ptr();
            match whole {
                1 => add_groups::<V>(sums, (head, 1), (rows, ends), &weights),
                2 => add_groups::<V>(sums, (2 * head, 2), (rows, ends), &weights),
                _ => add_span::<V>(sums, Span::of(part, head), (rows, ends), &weights),
            }
        }
    }
}

/// Adds `count` whole groups, from `first` on.
/// # Safety
/// The rows have them, `ends` is of `read_ends`; there are as many sums.
#[inline(always)]
unsafe fn add_groups<V: Simd>(
    sums: *mut f32,
    (first, count): (usize, usize),
    (rows, ends): (&[*const u8; ROWS_TOGETHER], *const f32),
    weights: &[V::F; ROWS_TOGETHER],
) {
    for group in 0..count {
        // SAFETY: the caller's.
        unsafe {
            let readers = readers::<V>(rows, first + group, ends);
            let sums = sums.add(group * Q4_GROUP);
            add_vectors::<V>(sums, &readers, weights, 0..VECTORS);
        }
    }
}

/// As `add_groups`, for a head that has groups in part.
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_span<V: Simd>(
    sums: *mut f32,
    span: Span,
    (rows, ends): (&[*const u8; ROWS_TOGETHER], *const f32),
    weights: &[V::F; ROWS_TOGETHER],
) {
    let (first, end) = span.groups();
    let mut sums = sums;
    for group in first..end {
        let vectors = span.in_group(group);
        // SAFETY: the caller's.
        unsafe {
            if vectors.len() == VECTORS {
                add_groups::<V>(sums, (group, 1), (rows, ends), weights);
            } else {
                let readers = readers::<V>(rows, group, ends);
                add_vectors::<V>(sums, &readers, weights, vectors.clone());
            }
            sums = sums.add(vectors.len() * LANES);
        }
    }
}

/// A group of each row.
/// # Safety
/// The rows have it, `ends` is of `read_ends`.
#[inline(always)]
unsafe fn readers<V: Simd>(
    rows: &[*const u8; ROWS_TOGETHER],
    group: usize,
    ends: *const f32,
) -> [Reader<V>; ROWS_TOGETHER] {
    // SAFETY: the caller's.
    unsafe {
        let ends = ends.add(group * ENDS);
        let mut readers = [reader(rows[0], group, ends); ROWS_TOGETHER];
        for r in 1..ROWS_TOGETHER {
            readers[r] = reader(rows[r], group, ends.add(r));
        }
        readers
    }
}

/// A row's group, whose scale is at `ends` and its minimum a four behind.
/// # Safety
/// As for `readers`.
#[inline(always)]
unsafe fn reader<V: Simd>(row: *const u8, group: usize, ends: *const f32) -> Reader<V> {
    // SAFETY: the caller's.
    unsafe {
        let (scale, minimum) = (V::splat(*ends), V::splat(*ends.add(ROWS_TOGETHER)));
        Reader::of(row.add(group * Q4_GROUP_BYTES), scale, minimum)
    }
}

/// Adds some vectors of a group of each row, times its weight.
/// # Safety
/// There are as many sums.
#[inline(always)]
unsafe fn add_vectors<V: Simd>(
    sums: *mut f32,
    readers: &[Reader<V>; ROWS_TOGETHER],
    weights: &[V::F; ROWS_TOGETHER],
    vectors: Range<usize>,
) {
    for (at, j) in vectors.enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let to = sums.add(at * LANES);
            let mut sum = V::load(to);
            for (reader, weight) in readers.iter().zip(weights) {
                sum = V::fma(*weight, reader.vector(j), sum);
            }
            V::store(to, sum);
        }
    }
}
