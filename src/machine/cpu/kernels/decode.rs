//! Attention of one query row: K rows, then V rows of each chunk stream past all heads of the part.
//! Bound by memory, so the products wait for the rows and not the other way round.

use super::attend::{CHUNK_KEYS, Part};
use super::kv::{KvFormat, extent};
use super::math::exp;
use super::panel::Element;
use super::q4::Reader;
use super::simd::{LANES, Simd, lanes, store_first};
use crate::dtype::{Q4_GROUP, Q4_GROUP_BYTES};
use crate::machine::cpu::pool::SCRATCH_FLOATS;
use std::ops::Range;

/// Bytes of rows that are asked for ahead of the one in use.
const AHEAD_BYTES: usize = 8 * 1024;
/// From one head's scores to the next one's: a line more than a chunk has, so that the heads' scores of
/// one key do not share a set of the first cache.
const SCORES_APART: usize = CHUNK_KEYS + LANES;
/// Rows that each head takes together, so that its query or sums are loaded once for them.
const ROWS_TOGETHER: usize = 4;
/// What widening a row may need beyond the row itself.
const BUFFER_SLACK: usize = 128;

/// Heads for which queries, sums, scores and a widened row fit the scratch.
pub(super) fn heads_that_fit(head_size: usize) -> usize {
    let width = head_size.next_multiple_of(LANES);
    let rows = (2 + ROWS_TOGETHER) * width + SCORES_APART + 2;
    (SCRATCH_FLOATS - ROWS_TOGETHER * BUFFER_SLACK) / rows
}

/// The scratch, carved; a head's queries and sums are `width` apart.
struct Carved<'a> {
    queries: &'a mut [f32],
    sums: &'a mut [f32],
    scores: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
    buffer: &'a mut [f32],
    width: usize,
}

impl<'a> Carved<'a> {
    #[inline(always)]
    fn new(scratch: &'a mut [f32], heads: usize, head_size: usize) -> Carved<'a> {
        let width = head_size.next_multiple_of(LANES);
        let (queries, rest) = scratch.split_at_mut(heads * width);
        let (sums, rest) = rest.split_at_mut(heads * width);
        let (scores, rest) = rest.split_at_mut(heads * SCORES_APART);
        let (maxima, rest) = rest.split_at_mut(heads);
        let (totals, buffer) = rest.split_at_mut(heads);
        queries.fill(0.0);
        sums.fill(0.0);
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        Carved {
            queries,
            sums,
            scores,
            maxima,
            totals,
            buffer,
            width,
        }
    }
}

#[inline(always)]
pub(super) fn run<V: Simd, K: KvFormat>(mut part: Part) {
    let scratch = std::mem::take(&mut part.scratch);
    let size = part.problem.head_size;
    let mut carved = Carved::new(scratch, part.heads.len(), size);
    let scale = 1.0 / (size as f32).sqrt();
    let queries = carved.queries.chunks_exact_mut(carved.width);
    for (to, from) in queries.zip(part.query(0).chunks_exact(size)) {
        to.iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = from * scale);
    }
    let keys = part.item.past + 1;
    for first in (0..keys).step_by(CHUNK_KEYS) {
        let chunk = first..(first + CHUNK_KEYS).min(keys);
        score::<V, K>(&part, &mut carved, chunk.clone());
        for head in 0..part.heads.len() {
            weigh::<V>(&mut carved, head, chunk.len());
        }
        add_values::<V, K>(&part, &mut carved, chunk);
    }
    finish::<V>(&part, &carved);
}

/// What is asked for while four rows are in use: their heads' places in the order of reading that lie
/// about `AHEAD_BYTES` later, head by head, so that the requests are spread over the work. That order is
/// the chunks', in each all K rows and then all V rows, in fours, and of each four head after head.
struct Ahead {
    /// Rows of the heads that come `turn` later among the part's, and of those that go round.
    near: [*const u8; ROWS_TOGETHER],
    far: [*const u8; ROWS_TOGETHER],
    turn: usize,
    heads: usize,
    head_bytes: usize,
}

impl Ahead {
    #[inline(always)]
    fn new(part: &Part, token: usize, side: usize) -> Ahead {
        let heads = part.heads.len();
        let (first, bytes) = extent(part.problem.format, &part.elements());
        let head_bytes = bytes.div_ceil(heads);
        let later = (AHEAD_BYTES / (ROWS_TOGETHER * head_bytes)).max(1);
        let rows = |fours: usize| {
            std::array::from_fn(|j| {
                let (token, side) = later_row(part, (token, side), ROWS_TOGETHER * fours + j);
                part.row(token, side).wrapping_add(first)
            })
        };
        Ahead {
            near: rows(later / heads),
            far: rows(later / heads + 1),
            turn: later % heads,
            heads,
            head_bytes,
        }
    }

    #[inline(always)]
    fn ask<V: Simd>(&self, head: usize) {
        let (rows, head) = match head + self.turn {
            near if near < self.heads => (&self.near, near),
            far => (&self.far, far - self.heads),
        };
        for row in rows {
            for line in (0..self.head_bytes).step_by(64) {
                V::prefetch(row.wrapping_add(head * self.head_bytes + line));
            }
        }
    }
}

/// The row (token, side) that is read `by` rows after one; the last one where there are no more.
#[inline(always)]
fn later_row(part: &Part, (token, side): (usize, usize), by: usize) -> (usize, usize) {
    let keys = part.item.past + 1;
    let start = token / CHUNK_KEYS * CHUNK_KEYS;
    let end = (start + CHUNK_KEYS).min(keys);
    match token + by {
        same if same < end => (same, side),
        // From a chunk's keys to its values, which are as many.
        turn if side == 0 => ((start + turn - end).min(end - 1), 1),
        next if next < keys => (next, 0),
        _ => (keys - 1, 1),
    }
}

/// scores[head][key] = query · key, a sum of sixteen lanes per head and key.
#[inline(always)]
fn score<V: Simd, K: KvFormat>(part: &Part, carved: &mut Carved, keys: Range<usize>) {
    let mut at = 0;
    while at < keys.len() {
        let together = ROWS_TOGETHER.min(keys.len() - at);
        let rows = open_rows::<V, K>(part, carved, (keys.start + at, together), 0);
        let ahead = Ahead::new(part, keys.start + at, 0);
        for head in 0..part.heads.len() {
            ahead.ask::<V>(head);
            let scores = dots::<V, K>(part, carved, &rows, head);
            // Those of missing rows are overwritten by `weigh`.
            carved.scores[head * SCORES_APART + at..][..ROWS_TOGETHER].copy_from_slice(&scores);
        }
        at += together;
    }
}

/// Heads are whole vectors, so that none lies in two 4-bit groups: codes are decoded where they are used.
/// Else rows are widened.
#[inline(always)]
fn coded<K: KvFormat>(part: &Part) -> bool {
    K::CODED && part.problem.head_size.is_multiple_of(LANES)
}

/// What a head has in one group: the first of the group's vectors, and how many.
#[derive(Clone, Copy)]
struct Stretch {
    vector: usize,
    vectors: usize,
}

impl Stretch {
    /// The one at the `d`th element of a head that begins at element `first` of the rows' groups.
    #[inline(always)]
    fn at(first: usize, d: usize, size: usize) -> Stretch {
        if size.is_multiple_of(Q4_GROUP) {
            // Then every head begins with a group.
            return Stretch {
                vector: 0,
                vectors: Q4_GROUP / LANES,
            };
        }
        let vector = (first + d) % Q4_GROUP / LANES;
        Stretch {
            vector,
            vectors: ((size - d) / LANES).min(Q4_GROUP / LANES - vector),
        }
    }

    /// The usual one, for which the compiler unrolls.
    #[inline(always)]
    fn is_whole(&self) -> bool {
        self.vectors == Q4_GROUP / LANES
    }
}

/// The 4-bit groups that hold `element` in each of the rows.
/// # Safety
/// The rows have them.
#[inline(always)]
unsafe fn groups<V: Simd, const N: usize>(rows: &[*const u8; N], element: usize) -> [Reader<V>; N] {
    let bytes = element / Q4_GROUP * Q4_GROUP_BYTES;
    // SAFETY: the caller's.
    unsafe {
        let mut readers = [Reader::new(rows[0].add(bytes)); N];
        for j in 1..N {
            readers[j] = Reader::new(rows[j].add(bytes));
        }
        readers
    }
}

/// The `together` rows of one side from token `first` on; missing ones repeat the last.
#[inline(always)]
fn open_rows<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (first, together): (usize, usize),
    side: usize,
) -> [*const u8; ROWS_TOGETHER] {
    let mut rows = [std::ptr::null(); ROWS_TOGETHER];
    if coded::<K>(part) {
        let (bytes, _) = extent(part.problem.format, &part.elements());
        for (j, row) in rows.iter_mut().enumerate() {
            let token = first + j.min(together - 1);
            *row = part.row(token, side).wrapping_add(bytes);
        }
        return rows;
    }
    let room = part.elements().len() + BUFFER_SLACK;
    for (j, row) in rows.iter_mut().enumerate() {
        let token = first + j.min(together - 1);
        // SAFETY: `check` found the record inside the cache; `heads_that_fit` left each row its room.
        *row = unsafe {
            let buffer = carved.buffer.as_mut_ptr().add(j * room);
            K::open::<V>(part.row(token, side), part.elements(), buffer)
        };
    }
    rows
}

/// One head's query times four rows.
#[inline(always)]
fn dots<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &Carved,
    rows: &[*const u8; ROWS_TOGETHER],
    head: usize,
) -> [f32; ROWS_TOGETHER] {
    let size = part.problem.head_size;
    let mut sums = [V::splat(0.0); ROWS_TOGETHER];
    if coded::<K>(part) {
        let first = part.elements().start % Q4_GROUP + head * size;
        let query = carved.queries[head * carved.width..].as_ptr();
        let mut d = 0;
        while d < size {
            let stretch = Stretch::at(first, d, size);
            // SAFETY: rows have the head's groups, the query its elements.
            unsafe {
                let groups = groups::<V, ROWS_TOGETHER>(rows, first + d);
                match stretch.is_whole() {
                    true => dot_vectors::<V>(&mut sums, &groups, query.add(d), 0..Q4_GROUP / LANES),
                    false => {
                        let vectors = stretch.vector..stretch.vector + stretch.vectors;
                        dot_vectors::<V>(&mut sums, &groups, query.add(d), vectors);
                    }
                }
            }
            d += stretch.vectors * LANES;
        }
        return V::sums(sums);
    }
    for d in (0..size).step_by(LANES) {
        // SAFETY: queries are padded with zeros to whole vectors, rows are read up to their end.
        unsafe {
            let query = V::load(carved.queries.as_ptr().add(head * carved.width + d));
            for (sum, row) in sums.iter_mut().zip(rows) {
                let from = row.add((head * size + d) * K::As::BYTES);
                *sum = V::fma(query, K::As::load_first::<V>(from, size - d), *sum);
            }
        }
    }
    V::sums(sums)
}

/// Adds a query's elements times some vectors of the groups.
/// # Safety
/// The query has as many.
#[inline(always)]
unsafe fn dot_vectors<V: Simd>(
    sums: &mut [V::F; ROWS_TOGETHER],
    groups: &[Reader<V>; ROWS_TOGETHER],
    query: *const f32,
    vectors: Range<usize>,
) {
    for (at, j) in vectors.enumerate() {
        // SAFETY: the caller's.
        let query = unsafe { V::load(query.add(at * LANES)) };
        for (sum, group) in sums.iter_mut().zip(groups) {
            *sum = V::fma(query, group.vector(j), *sum);
        }
    }
}

/// Turns a head's scores into weights against the new maximum and rescales what was there.
#[inline(always)]
fn weigh<V: Simd>(carved: &mut Carved, head: usize, keys: usize) {
    let scores = &mut carved.scores[head * SCORES_APART..][..CHUNK_KEYS];
    scores[keys..].fill(f32::NEG_INFINITY);
    let mut high = V::splat(carved.maxima[head]);
    for at in (0..keys).step_by(LANES) {
        // SAFETY: inside the 256 scores.
        high = V::max(unsafe { V::load(scores.as_ptr().add(at)) }, high);
    }
    let maximum = V::largest(high);
    for at in (0..keys).step_by(LANES) {
        // SAFETY: as above.
        unsafe {
            let to = scores.as_mut_ptr().add(at);
            V::store(to, exp::<V>(V::sub(V::load(to), V::splat(maximum))));
        }
    }
    // What lies past the last key is not the smallest weight, but none.
    scores[keys..].fill(0.0);
    let mut total = V::splat(0.0);
    for at in (0..keys).step_by(LANES) {
        // SAFETY: as above.
        total = V::add(total, unsafe { V::load(scores.as_ptr().add(at)) });
    }
    let shrink = exp::<V>(V::splat(carved.maxima[head] - maximum));
    let factor = lanes::<V>(shrink)[0];
    carved.totals[head] = carved.totals[head].mul_add(factor, V::sum(total));
    carved.maxima[head] = maximum;
    for sums in carved.sums[head * carved.width..][..carved.width].chunks_exact_mut(LANES) {
        // SAFETY: sixteen f32.
        unsafe { V::store(sums.as_mut_ptr(), V::mul(V::load(sums.as_ptr()), shrink)) };
    }
}

/// sums[head] += weight of each key × its V row, keys in order.
#[inline(always)]
fn add_values<V: Simd, K: KvFormat>(part: &Part, carved: &mut Carved, keys: Range<usize>) {
    let mut at = 0;
    while at < keys.len() {
        let together = ROWS_TOGETHER.min(keys.len() - at);
        let rows = open_rows::<V, K>(part, carved, (keys.start + at, together), 1);
        let ahead = Ahead::new(part, keys.start + at, 1);
        if together == ROWS_TOGETHER {
            add_rows::<V, K, ROWS_TOGETHER>(part, carved, (rows, &ahead), at);
        } else {
            for (j, &row) in rows[..together].iter().enumerate() {
                add_rows::<V, K, 1>(part, carved, ([row], &ahead), at + j);
            }
        }
        at += together;
    }
}

#[inline(always)]
fn add_rows<V: Simd, K: KvFormat, const N: usize>(
    part: &Part,
    carved: &mut Carved,
    (rows, ahead): ([*const u8; N], &Ahead),
    key: usize,
) {
    let size = part.problem.head_size;
    for head in 0..part.heads.len() {
        ahead.ask::<V>(head);
        let scores = &carved.scores[head * SCORES_APART + key..][..N];
        let mut weights = [V::splat(0.0); N];
        for (weight, &score) in weights.iter_mut().zip(scores) {
            *weight = V::splat(score);
        }
        if coded::<K>(part) {
            let first = part.elements().start % Q4_GROUP + head * size;
            let sums = carved.sums[head * carved.width..].as_mut_ptr();
            // SAFETY: rows and sums have the head.
            unsafe { add_groups::<V, N>(sums, (first, size), &rows, &weights) };
            continue;
        }
        for d in (0..size).step_by(LANES) {
            // SAFETY: sums are padded to whole vectors, rows are read up to their end.
            unsafe {
                let to = carved.sums.as_mut_ptr().add(head * carved.width + d);
                let mut sum = V::load(to);
                for j in 0..N {
                    let from = rows[j].add((head * size + d) * K::As::BYTES);
                    sum = V::fma(weights[j], K::As::load_first::<V>(from, size - d), sum);
                }
                V::store(to, sum);
            }
        }
    }
}

/// As the rest of `add_rows`, for one head in 4-bit groups that begins at element `first` of them.
/// # Safety
/// The rows and sums have the head.
#[inline(always)]
unsafe fn add_groups<V: Simd, const N: usize>(
    sums: *mut f32,
    (first, size): (usize, usize),
    rows: &[*const u8; N],
    weights: &[V::F; N],
) {
    let mut d = 0;
    while d < size {
        let stretch = Stretch::at(first, d, size);
        // SAFETY: the caller's.
        unsafe {
            let groups = groups::<V, N>(rows, first + d);
            match stretch.is_whole() {
                true => add_vectors::<V, N>(sums.add(d), &groups, weights, 0..Q4_GROUP / LANES),
                false => {
                    let vectors = stretch.vector..stretch.vector + stretch.vectors;
                    add_vectors::<V, N>(sums.add(d), &groups, weights, vectors);
                }
            }
        }
        d += stretch.vectors * LANES;
    }
}

/// Adds some vectors of the groups, each times its row's weight, to the sums.
/// # Safety
/// There are as many sums.
#[inline(always)]
unsafe fn add_vectors<V: Simd, const N: usize>(
    sums: *mut f32,
    groups: &[Reader<V>; N],
    weights: &[V::F; N],
    vectors: Range<usize>,
) {
    for (at, j) in vectors.enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let to = sums.add(at * LANES);
            let mut sum = V::load(to);
            for (group, weight) in groups.iter().zip(weights) {
                sum = V::fma(*weight, group.vector(j), sum);
            }
            V::store(to, sum);
        }
    }
}

#[inline(always)]
fn finish<V: Simd>(part: &Part, carved: &Carved) {
    let size = part.problem.head_size;
    for (head, out) in part.out(0).chunks_exact_mut(size).enumerate() {
        let total = V::splat(carved.totals[head]);
        for d in (0..size).step_by(LANES) {
            // SAFETY: sums are padded to whole vectors, out is written up to its end.
            unsafe {
                let sum = V::load(carved.sums.as_ptr().add(head * carved.width + d));
                store_first::<V>(out.as_mut_ptr().add(d), V::div(sum, total), size - d);
            }
        }
    }
}
