//! Attention of one query row. The cache streams past all heads of the part in the order in which it lies: of
//! sixteen tokens the K rows, then their V rows, and meanwhile the next sixteen are asked for. Each sixteen is
//! folded into a running maximum, sum and weighted value. Bound by memory, so the products wait for the rows
//! and not the other way round. Halves of many keys are summed up apart (halves.rs): two threads can share a
//! sequence and read whole rows.

use super::attend::Part;
use super::decode_q4::{self, Span, coded};
use super::halves::{halves, is_halved, join, state_floats};
use super::kv::{KvFormat, extent};
use super::math::exp;
use super::panel::Element;
use super::simd::{LANES, Simd, store_first};
use crate::machine::cpu::pool::SCRATCH_FLOATS;
use std::ops::Range;

/// Tokens folded together: one for each lane of a head's scores.
pub(super) const BLOCK: usize = LANES;
/// Rows that each head takes together, so that its query or sums are loaded once for them.
pub(super) const ROWS_TOGETHER: usize = 4;
/// What widening a row may need beyond the row itself.
const BUFFER_SLACK: usize = 128;
const LINE_BYTES: usize = 64;

/// Heads for which queries, sums, scores and widened rows fit the scratch.
pub(super) fn heads_that_fit(head_size: usize) -> usize {
    let width = head_size.next_multiple_of(LANES);
    let own = query_room(head_size)
        + (1 + ROWS_TOGETHER) * width
        + 2 * BLOCK
        + 1
        + 2 * state_floats(head_size);
    (SCRATCH_FLOATS - ROWS_TOGETHER * BUFFER_SLACK) / own
}

/// Floats that a head's query takes, in whichever form.
fn query_room(head_size: usize) -> usize {
    head_size
        .next_multiple_of(LANES)
        .max(decode_q4::query_room(head_size))
}

/// The scratch, carved; a head's queries are `query_room`, its sums `width`, its scores and its total's
/// parts `BLOCK` apart.
pub(super) struct Carved<'a> {
    pub(super) queries: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    pub(super) scores: &'a mut [f32],
    totals: &'a mut [f32],
    maxima: &'a mut [f32],
    /// Of each half, where the keys are summed up in halves.
    kept: [&'a mut [f32]; 2],
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
        let (scores, rest) = rest.split_at_mut(heads * BLOCK);
        let (totals, rest) = rest.split_at_mut(heads * BLOCK);
        let (maxima, rest) = rest.split_at_mut(heads);
        let (first, rest) = rest.split_at_mut(heads * state_floats(head_size));
        let (second, buffer) = rest.split_at_mut(heads * state_floats(head_size));
        queries.fill(0.0);
        Carved {
            queries,
            sums,
            scores,
            totals,
            maxima,
            kept: [first, second],
            buffer,
            query_room,
            width,
        }
    }

    /// Nothing has been summed up.
    #[inline(always)]
    fn begin(&mut self) {
        self.sums.fill(0.0);
        self.totals.fill(0.0);
        self.maxima.fill(f32::NEG_INFINITY);
    }

    /// Each head's sums, total and maximum.
    #[inline(always)]
    fn keep<V: Simd>(&self, to: &mut [f32]) {
        for (head, to) in to.chunks_exact_mut(self.width + LANES).enumerate() {
            let (sums, rest) = to.split_at_mut(self.width);
            sums.copy_from_slice(&self.sums[head * self.width..][..self.width]);
            (rest[0], rest[1]) = (self.total::<V>(head), self.maxima[head]);
        }
    }

    #[inline(always)]
    fn total<V: Simd>(&self, head: usize) -> f32 {
        let totals = &self.totals[head * BLOCK..][..BLOCK];
        // SAFETY: sixteen parts of the total.
        V::sum(unsafe { V::load(totals.as_ptr()) })
    }

    /// What `weigh` left of a head's scores of four keys.
    #[inline(always)]
    pub(super) fn weights<V: Simd>(&self, head: usize, at: usize) -> [V::F; ROWS_TOGETHER] {
        let mut weights = [V::splat(0.0); ROWS_TOGETHER];
        let found = &self.scores[head * BLOCK + at..][..ROWS_TOGETHER];
        for (weight, &found) in weights.iter_mut().zip(found) {
            *weight = V::splat(found);
        }
        weights
    }
}

/// A part's heads over all keys, or over one half of them, which is then kept.
#[inline(always)]
pub(super) fn run<V: Simd, K: KvFormat>(mut part: Part) {
    let scratch = std::mem::take(&mut part.scratch);
    let size = part.problem.head_size;
    let mut carved = Carved::new(scratch, part.heads.len(), size);
    write_queries::<V, K>(&part, &mut carved);
    let (halved, halves) = (is_halved(&part.item), halves(&part.item));
    let mut kept = std::mem::take(&mut carved.kept);
    let shared = part.half.take();
    let alone = shared.is_none();
    let chosen = match shared {
        Some((half, states)) => {
            kept[half] = states;
            half..half + 1
        }
        None => 0..1 + usize::from(halved),
    };
    // What the part reads to its end is asked for across the middle.
    let end = halves[chosen.end - 1].end;
    // One loop, so that its body is compiled once.
    for half in chosen {
        stream::<V, K>(&part, &mut carved, (halves[half].clone(), end));
        if halved {
            carved.keep::<V>(kept[half]);
        }
    }
    match (halved, alone) {
        (false, _) => finish::<V>(&part, &carved),
        (true, true) => join::<V>(kept.map(|half| &*half), (part.out(0), size)),
        (true, false) => {}
    }
}

/// Sums up some of the keys, and asks for what comes then up to `end`.
#[inline(always)]
fn stream<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (keys, end): (Range<usize>, usize),
) {
    carved.begin();
    let mut block = Block::new(part, keys.start..end);
    for first in keys.clone().step_by(BLOCK) {
        let count = BLOCK.min(keys.end - first);
        let mut ahead = Ahead::new();
        score::<V, K>(part, carved, (&block, &mut ahead), count);
        for head in 0..part.heads.len() {
            weigh::<V>(carved, head, count);
        }
        add::<V, K>(part, carved, (&block, &mut ahead), count);
        block.turn(part, first + BLOCK);
    }
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

/// Where the records of sixteen tokens are: of those in use, and of those to be used next.
pub(super) struct Block {
    own: [*const u8; BLOCK],
    next: [*const u8; BLOCK],
    /// Of `next`, those that are there.
    coming: usize,
    /// One past the last key that the part reads.
    end: usize,
    /// From a record's K row to its V row.
    row_bytes: usize,
    /// Bytes of each that the part's heads cover, from `first_byte` on.
    bytes: usize,
    first_byte: usize,
}

impl Block {
    #[inline(always)]
    fn new(part: &Part, keys: Range<usize>) -> Block {
        let (first_byte, bytes) = extent(part.problem.format, &part.elements());
        let mut block = Block {
            own: [std::ptr::null(); BLOCK],
            next: records(part, keys.start),
            coming: 0,
            end: keys.end,
            row_bytes: part.row_bytes(),
            bytes,
            first_byte,
        };
        block.turn(part, keys.start);
        block
    }

    /// What was next is in use; the token `first` begins it.
    #[inline(always)]
    fn turn(&mut self, part: &Part, first: usize) {
        self.own = self.next;
        self.next = records(part, first + BLOCK);
        self.coming = self.end.saturating_sub(first + BLOCK).min(BLOCK);
    }

    /// Where row `at` of the K rows (side 0) or V rows (side 1) in use begins.
    #[inline(always)]
    fn record(&self, at: usize, side: usize) -> *const u8 {
        self.own[at].wrapping_add(side * self.row_bytes)
    }

    /// Where the part's elements begin in row `at` of the next tokens' K and V rows in turn, and how many lines
    /// they touch; none where there is no such row.
    #[cold]
    #[inline(never)]
    fn lines_ahead(&self, at: usize) -> (*const u8, usize) {
        if at >= 2 * self.coming {
            return (self.next[0], 0);
        }
        let row = self.next[at / 2].wrapping_add(at % 2 * self.row_bytes + self.first_byte);
        let lines = (row as usize % LINE_BYTES + self.bytes).div_ceil(LINE_BYTES);
        (row, lines)
    }
}

/// What is asked for next of the next tokens: token after token, K and V as they lie, a line or two at a time
/// between the products. (Memory gives a quarter less where K rows are read past the V rows between them, in
/// whatever order they are asked for, and the core drops what it is asked for all at once.)
pub(super) struct Ahead {
    line: *const u8,
    /// Lines of the row.
    left: usize,
    /// The row that comes then: K and V of the tokens in turn.
    row: usize,
}

impl Ahead {
    fn new() -> Ahead {
        Ahead {
            line: std::ptr::null(),
            left: 0,
            row: 0,
        }
    }

    /// Asks for N lines.
    #[inline(always)]
    pub(super) fn ask<V: Simd, const N: usize>(&mut self, block: &Block) {
        if self.left >= N {
            for line in 0..N {
                V::prefetch(self.line.wrapping_add(line * LINE_BYTES));
            }
            self.line = self.line.wrapping_add(N * LINE_BYTES);
            self.left -= N;
            return;
        }
        for line in 0..self.left {
            V::prefetch(self.line.wrapping_add(line * LINE_BYTES));
        }
        (self.line, self.left) = block.lines_ahead(self.row);
        self.row += 1;
    }
}

/// As many lines as a vector of four rows takes.
#[inline(always)]
fn ask_for<V: Simd, K: KvFormat>(ahead: &mut Ahead, block: &Block) {
    match K::As::BYTES {
        2 => ahead.ask::<V, { ROWS_TOGETHER * LANES * 2 / LINE_BYTES }>(block),
        _ => ahead.ask::<V, { ROWS_TOGETHER * LANES * 4 / LINE_BYTES }>(block),
    }
}

/// Where sixteen tokens' records begin; missing ones repeat the last.
#[inline(always)]
fn records(part: &Part, first: usize) -> [*const u8; BLOCK] {
    let mut records = [std::ptr::null(); BLOCK];
    for (j, record) in records.iter_mut().enumerate() {
        *record = part.row((first + j).min(part.item.past), 0);
    }
    records
}

/// scores[head][key] = query · key, a sum of sixteen lanes per head and key.
#[inline(always)]
fn score<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (block, ahead): (&Block, &mut Ahead),
    count: usize,
) {
    for at in (0..count).step_by(ROWS_TOGETHER) {
        let rows = open_rows::<V, K>(part, carved, (block, at), 0);
        // SAFETY: a block's scores are whole fours; those of missing rows are overwritten by `weigh`.
        unsafe {
            match coded::<K>(part) {
                true => decode_q4::score::<V>(part, carved, (&rows, block, ahead), at),
                false => score_rows::<V, K>(part, carved, (&rows, block, ahead), at),
            }
        }
    }
}

/// Four rows of one side, from `at` of the block on.
#[inline(always)]
fn open_rows<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (block, at): (&Block, usize),
    side: usize,
) -> [*const u8; ROWS_TOGETHER] {
    let mut rows = [std::ptr::null(); ROWS_TOGETHER];
    if coded::<K>(part) {
        for (j, row) in rows.iter_mut().enumerate() {
            *row = block.record(at + j, side).wrapping_add(block.first_byte);
        }
        // SAFETY: `check` found the records inside the cache; the buffer has more room than that.
        unsafe { decode_q4::read_ends::<V>(&rows, block.bytes, carved.buffer) };
        return rows;
    }
    let room = part.elements().len() + BUFFER_SLACK;
    for (j, row) in rows.iter_mut().enumerate() {
        // SAFETY: `check` found the record inside the cache; `heads_that_fit` left each row its room.
        *row = unsafe {
            let buffer = carved.buffer.as_mut_ptr().add(j * room);
            K::open::<V>(block.record(at + j, side), part.elements(), buffer)
        };
    }
    rows
}

/// Each head's query times four rows.
/// # Safety
/// Each head's scores have room for four from `at` on.
#[inline(always)]
unsafe fn score_rows<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (rows, block, ahead): (&[*const u8; ROWS_TOGETHER], &Block, &mut Ahead),
    at: usize,
) {
    let size = part.problem.head_size;
    for head in 0..part.heads.len() {
        let mut sums = [V::splat(0.0); ROWS_TOGETHER];
        // SAFETY: queries are padded with zeros to whole vectors, rows are read up to their end; the
        // caller's for the scores.
        unsafe {
            let query = carved.queries.as_ptr().add(head * carved.query_room);
            for d in (0..size).step_by(LANES) {
                ask_for::<V, K>(ahead, block);
                let query = V::load(query.add(d));
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let from = row.add((head * size + d) * K::As::BYTES);
                    *sum = V::fma(query, K::As::load_first::<V>(from, size - d), *sum);
                }
            }
            let to = carved.scores.as_mut_ptr().add(head * BLOCK + at);
            to.cast::<[f32; ROWS_TOGETHER]>().write(V::sums(sums));
        }
    }
}

/// Turns a head's scores into weights against the new maximum and, where that has grown, rescales what was
/// there.
#[inline(always)]
fn weigh<V: Simd>(carved: &mut Carved, head: usize, count: usize) {
    let scores = &mut carved.scores[head * BLOCK..][..BLOCK];
    if count < BLOCK {
        scores[count..].fill(f32::NEG_INFINITY);
    }
    let old = carved.maxima[head];
    // SAFETY: sixteen scores.
    let found = unsafe { V::load(scores.as_ptr()) };
    let maximum = V::largest(V::max(found, V::splat(old)));
    let weights = exp::<V>(V::sub(found, V::splat(maximum)));
    // SAFETY: as above.
    unsafe { V::store(scores.as_mut_ptr(), weights) };
    // What lies past the last key is not the smallest weight, but none.
    if count < BLOCK {
        scores[count..].fill(0.0);
    }
    let totals = carved.totals[head * BLOCK..][..BLOCK].as_mut_ptr();
    if maximum > old {
        carved.maxima[head] = maximum;
        let shrink = exp::<V>(V::splat(old - maximum));
        let sums = carved.sums[head * carved.width..][..carved.width].chunks_exact_mut(LANES);
        for sums in sums {
            // SAFETY: sixteen f32.
            unsafe { V::store(sums.as_mut_ptr(), V::mul(V::load(sums.as_ptr()), shrink)) };
        }
        // SAFETY: a part of the total for each lane.
        unsafe { V::store(totals, V::mul(V::load(totals), shrink)) };
    }
    // SAFETY: as above, and sixteen weights.
    unsafe { V::store(totals, V::add(V::load(totals), V::load(scores.as_ptr()))) };
}

/// sums[head] += weight of each key × its V row, keys in order.
#[inline(always)]
fn add<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (block, ahead): (&Block, &mut Ahead),
    count: usize,
) {
    for at in (0..count).step_by(ROWS_TOGETHER) {
        let rows = open_rows::<V, K>(part, carved, (block, at), 1);
        match coded::<K>(part) {
            // SAFETY: they were opened.
            true => unsafe { decode_q4::add::<V>(part, carved, (&rows, block, ahead), at) },
            false => add_rows::<V, K>(part, carved, (&rows, block, ahead), at),
        }
    }
}

/// The same for four rows; the weights of missing ones are zero.
#[inline(always)]
fn add_rows<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    (rows, block, ahead): (&[*const u8; ROWS_TOGETHER], &Block, &mut Ahead),
    at: usize,
) {
    let size = part.problem.head_size;
    for head in 0..part.heads.len() {
        let weights = carved.weights::<V>(head, at);
        for d in (0..size).step_by(LANES) {
            ask_for::<V, K>(ahead, block);
            // SAFETY: sums are padded to whole vectors, rows are read up to their end.
            unsafe {
                let to = carved.sums.as_mut_ptr().add(head * carved.width + d);
                let mut sum = V::load(to);
                for (row, weight) in rows.iter().zip(weights) {
                    let from = row.add((head * size + d) * K::As::BYTES);
                    sum = V::fma(weight, K::As::load_first::<V>(from, size - d), sum);
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
        let total = carved.total::<V>(head);
        let sums = &carved.sums[head * carved.width..][..carved.width];
        for d in (0..size).step_by(LANES) {
            // SAFETY: sums are padded to whole vectors, out is written up to its end.
            unsafe {
                let value = V::div(V::load(sums.as_ptr().add(d)), V::splat(total));
                store_first::<V>(out.as_mut_ptr().add(d), value, size - d);
            }
        }
    }
}
