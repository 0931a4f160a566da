//! Attention of one query row: K rows, then V rows of each chunk stream past all heads of the part.
//! Bound by memory, so the products wait for the rows and not the other way round.

use super::attend::{CHUNK_KEYS, Part};
use super::decode_q4::{self, Span, coded};
use super::kv::{KvFormat, extent};
use super::math::exp;
use super::panel::Element;
use super::simd::{LANES, Simd, lanes, store_first};
use crate::dtype::Dtype;
use crate::machine::cpu::pool::SCRATCH_FLOATS;
use std::ops::Range;

/// Bytes of rows that are asked for ahead of the one in use, and of 4-bit ones.
const AHEAD_BYTES: usize = 8 * 1024;
const CODES_AHEAD_BYTES: usize = 12 * 1024;
/// From one head's scores to the next one's: a line more than a chunk has, so that the heads' scores of
/// one key do not share a set of the first cache.
pub(super) const SCORES_APART: usize = CHUNK_KEYS + LANES;
/// Rows that each head takes together, so that its query or sums are loaded once for them.
pub(super) const ROWS_TOGETHER: usize = 4;
/// What widening a row may need beyond the row itself.
const BUFFER_SLACK: usize = 128;

/// Heads for which queries, sums, scores and a widened row fit the scratch.
pub(super) fn heads_that_fit(head_size: usize) -> usize {
    let width = head_size.next_multiple_of(LANES);
    let rows = query_room(head_size) + (1 + ROWS_TOGETHER) * width + SCORES_APART + 2;
    (SCRATCH_FLOATS - ROWS_TOGETHER * BUFFER_SLACK) / rows
}

/// Floats that a head's query takes, in whichever form.
fn query_room(head_size: usize) -> usize {
    head_size
        .next_multiple_of(LANES)
        .max(decode_q4::query_room(head_size))
}

/// The scratch, carved; a head's queries are `query_room`, its sums `width` apart.
pub(super) struct Carved<'a> {
    pub(super) queries: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    scores: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
    pub(super) buffer: &'a mut [f32],
    pub(super) query_room: usize,
    pub(super) width: usize,
}

impl<'a> Carved<'a> {
    #[inline(always)]
    fn new(scratch: &'a mut [f32], heads: usize, head_size: usize) -> Carved<'a> {
        let width = head_size.next_multiple_of(LANES);
        let query_room = query_room(head_size);
        let (queries, rest) = scratch.split_at_mut(heads * query_room);
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
            query_room,
            width,
        }
    }

    /// What `weigh` left of a head's scores of N keys.
    #[inline(always)]
    pub(super) fn weights<V: Simd, const N: usize>(&self, head: usize, key: usize) -> [V::F; N] {
        let scores = &self.scores[head * SCORES_APART + key..][..N];
        let mut weights = [V::splat(0.0); N];
        for (weight, &score) in weights.iter_mut().zip(scores) {
            *weight = V::splat(score);
        }
        weights
    }
}

#[inline(always)]
pub(super) fn run<V: Simd, K: KvFormat>(mut part: Part) {
    let scratch = std::mem::take(&mut part.scratch);
    let size = part.problem.head_size;
    let mut carved = Carved::new(scratch, part.heads.len(), size);
    write_queries::<V, K>(&part, &mut carved);
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

/// Each head's query ÷ √size.
#[inline(always)]
fn write_queries<V: Simd, K: KvFormat>(part: &Part, carved: &mut Carved) {
    let size = part.problem.head_size;
    let scale = 1.0 / (size as f32).sqrt();
    let queries = carved.queries.chunks_exact_mut(carved.query_room);
    for (head, (to, from)) in queries.zip(part.query(0).chunks_exact(size)).enumerate() {
        if coded::<K>(part) {
            decode_q4::write_query::<V>(from, scale, Span::of(part, head), to);
            continue;
        }
        to.iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = from * scale);
    }
}

/// What is asked for while four rows are in use: their heads' places in the order of reading that lie
/// about as many bytes later, head by head, so that the requests are spread over the work. That order is
/// the chunks', in each all K rows and then all V rows, in fours, and of each four head after head.
pub(super) struct Ahead {
    /// Rows, shifted so that a head's own place in them is what is to be asked for: up to head `around`,
    /// and from there on.
    rows: [[*const u8; ROWS_TOGETHER]; 2],
    around: usize,
    head_bytes: usize,
}

impl Ahead {
    #[inline(always)]
    fn new(part: &Part, token: usize, side: usize) -> Ahead {
        let heads = part.heads.len();
        let (first, bytes) = extent(part.problem.format, &part.elements());
        let head_bytes = bytes.div_ceil(heads);
        let ahead_bytes = match part.problem.format {
            Dtype::Q4 => CODES_AHEAD_BYTES,
            _ => AHEAD_BYTES,
        };
        let later = (ahead_bytes / (ROWS_TOGETHER * head_bytes)).max(1);
        let (fours, turn) = (later / heads, later % heads);
        let shifts = [turn * head_bytes, (turn * head_bytes).wrapping_sub(bytes)];
        let mut rows = [[std::ptr::null(); ROWS_TOGETHER]; 2];
        for (i, (rows, shift)) in rows.iter_mut().zip(shifts).enumerate() {
            for (j, row) in rows.iter_mut().enumerate() {
                let by = ROWS_TOGETHER * (fours + i) + j;
                let (token, side) = later_row(part, (token, side), by);
                *row = part
                    .row(token, side)
                    .wrapping_add(first.wrapping_add(shift));
            }
        }
        Ahead {
            rows,
            around: heads - turn,
            head_bytes,
        }
    }

    #[inline(always)]
    pub(super) fn ask<V: Simd>(&self, head: usize) {
        let rows = &self.rows[usize::from(head >= self.around)];
        let (mut line, end) = (head * self.head_bytes, (head + 1) * self.head_bytes);
        while line < end {
            for row in rows {
                V::prefetch(row.wrapping_add(line));
            }
            line += 64;
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
        let scores = carved.scores[at..].as_mut_ptr();
        // SAFETY: a chunk's scores are whole fours; those of missing rows are overwritten by `weigh`.
        unsafe {
            match coded::<K>(part) {
                true => decode_q4::score::<V>(part, carved, (&rows, &ahead), scores),
                false => score_rows::<V, K>(part, carved, (&rows, &ahead), scores),
            }
        }
        at += together;
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
    for (j, row) in rows.iter_mut().enumerate() {
        *row = part.row(first + j.min(together - 1), side);
    }
    if coded::<K>(part) {
        let (bytes, group_bytes) = extent(part.problem.format, &part.elements());
        for row in rows.iter_mut() {
            *row = row.wrapping_add(bytes);
        }
        // SAFETY: `check` found the records inside the cache; the buffer has more room than that.
        unsafe { decode_q4::read_ends::<V>(&rows, group_bytes, carved.buffer) };
        return rows;
    }
    let room = part.elements().len() + BUFFER_SLACK;
    for (j, row) in rows.iter_mut().enumerate() {
        // SAFETY: `check` found the record inside the cache; `heads_that_fit` left each row its room.
        *row = unsafe {
            let buffer = carved.buffer.as_mut_ptr().add(j * room);
            K::open::<V>(*row, part.elements(), buffer)
        };
    }
    rows
}

/// Each head's query times four rows.
/// # Safety
/// Each head's scores, `SCORES_APART`, have room for four.
#[inline(always)]
unsafe fn score_rows<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &Carved,
    (rows, ahead): (&[*const u8; ROWS_TOGETHER], &Ahead),
    scores: *mut f32,
) {
    let size = part.problem.head_size;
    for head in 0..part.heads.len() {
        ahead.ask::<V>(head);
        let mut sums = [V::splat(0.0); ROWS_TOGETHER];
        // SAFETY: queries are padded with zeros to whole vectors, rows are read up to their end; the
        // caller's for the scores.
        unsafe {
            let query = carved.queries.as_ptr().add(head * carved.query_room);
            for d in (0..size).step_by(LANES) {
                let query = V::load(query.add(d));
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let from = row.add((head * size + d) * K::As::BYTES);
                    *sum = V::fma(query, K::As::load_first::<V>(from, size - d), *sum);
                }
            }
            let to = scores
                .add(head * SCORES_APART)
                .cast::<[f32; ROWS_TOGETHER]>();
            to.write(V::sums(sums));
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
            add_rows::<V, K, ROWS_TOGETHER>(part, carved, (rows, &ahead), (at, 0));
        } else {
            for (j, &row) in rows[..together].iter().enumerate() {
                add_rows::<V, K, 1>(part, carved, ([row], &ahead), (at + j, j));
            }
        }
        at += together;
    }
}

/// The same for N rows of which `first_row` is the first of the four that were opened.
#[inline(always)]
fn add_rows<V: Simd, K: KvFormat, const N: usize>(
    part: &Part,
    carved: &mut Carved,
    (rows, ahead): ([*const u8; N], &Ahead),
    (key, first_row): (usize, usize),
) {
    if coded::<K>(part) {
        // SAFETY: `open_rows` opened them.
        return unsafe { decode_q4::add::<V, N>(part, carved, (&rows, ahead), (key, first_row)) };
    }
    let size = part.problem.head_size;
    for head in 0..part.heads.len() {
        ahead.ask::<V>(head);
        let weights = carved.weights::<V, N>(head, key);
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
