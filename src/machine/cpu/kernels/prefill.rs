//! Attention of a tile of up to 64 query rows of one head. The queries are the columns of the score
//! product (a panel), so softmax runs over keys with one query per lane and needs no sums across lanes.

use super::attend::{CHUNK_KEYS, Part};
use super::kv::KvFormat;
use super::math::exp;
use super::panel::{Element, Weights, Widened};
use super::simd::{LANES, Simd, store_first};
use super::tile::{Ahead, Finish, Sums, TILE_ROWS, Tile, multiply};
use crate::dtype::PANEL_ROWS;
use crate::machine::cpu::pool::SCRATCH_FLOATS;

/// Query rows of one tile: the columns of one panel.
pub(super) const TILE_QUERIES: usize = PANEL_ROWS;

/// The scratch, carved. A query is a column (64 apart), a key a row.
struct Carved<'a> {
    /// [head element][64 queries], scaled.
    queries: &'a mut [f32],
    /// K as [key][width]; V as panels of 64 elements, [key][64] each.
    rows: &'a mut [f32],
    /// [key][64 queries].
    scores: &'a mut [f32],
    /// [query][width].
    sums: &'a mut [f32],
    maxima: &'a mut [f32],
    totals: &'a mut [f32],
    shrink: &'a mut [f32],
    /// Room to widen one row.
    buffer: &'a mut [f32],
    width: usize,
}

const _: () = assert!(
    super::MAX_HEAD_SIZE * (2 * TILE_QUERIES + CHUNK_KEYS)
        + TILE_QUERIES * (CHUNK_KEYS + 3)
        + super::MAX_HEAD_SIZE
        + 128
        <= SCRATCH_FLOATS
);

impl<'a> Carved<'a> {
    #[inline(always)]
    fn new(scratch: &'a mut [f32], size: usize) -> Carved<'a> {
        let width = size.next_multiple_of(LANES);
        let (queries, rest) = scratch.split_at_mut(size * TILE_QUERIES);
        let (rows, rest) = rest.split_at_mut(CHUNK_KEYS * size.next_multiple_of(PANEL_ROWS));
        let (scores, rest) = rest.split_at_mut(CHUNK_KEYS * TILE_QUERIES);
        let (sums, rest) = rest.split_at_mut(TILE_QUERIES * width);
        let (maxima, rest) = rest.split_at_mut(TILE_QUERIES);
        let (totals, rest) = rest.split_at_mut(TILE_QUERIES);
        let (shrink, buffer) = rest.split_at_mut(TILE_QUERIES);
        sums.fill(0.0);
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        queries.fill(0.0);
        Carved {
            queries,
            rows,
            scores,
            sums,
            maxima,
            totals,
            shrink,
            buffer,
            width,
        }
    }
}

/// A chunk of keys as this tile sees it.
#[derive(Clone, Copy)]
struct Chunk {
    first: usize,
    keys: usize,
    /// Query rows of the tile, and in whole vectors.
    queries: usize,
    vectors: usize,
}

#[inline(always)]
pub(super) fn run<V: Simd, K: KvFormat>(mut part: Part) {
    let scratch = std::mem::take(&mut part.scratch);
    let mut carved = Carved::new(scratch, part.problem.head_size);
    place_queries(&part, &mut carved);
    let keys = part.item.past + part.queries.end;
    let queries = part.queries.len();
    for first in (0..keys).step_by(CHUNK_KEYS) {
        let vectors = queries.div_ceil(LANES);
        let chunk = Chunk {
            first,
            keys: (keys - first).min(CHUNK_KEYS),
            queries,
            vectors,
        };
        widen_keys::<V, K>(&part, &mut carved, chunk);
        score::<V>(&part, &mut carved, chunk);
        weigh::<V>(&part, &mut carved, chunk);
        rescale::<V>(&mut carved, queries);
        widen_values::<V, K>(&part, &mut carved, chunk);
        add_values::<V>(&part, &mut carved, chunk);
    }
    finish::<V>(&part, &carved);
}

#[inline(always)]
fn place_queries(part: &Part, carved: &mut Carved) {
    let scale = 1.0 / (part.problem.head_size as f32).sqrt();
    for (column, row) in part.queries.clone().enumerate() {
        let lines = carved.queries.chunks_exact_mut(TILE_QUERIES);
        for (line, value) in lines.zip(part.query(row)) {
            line[column] = value * scale;
        }
    }
}

/// Where element `d` of the widened V row of `key` lies.
#[inline(always)]
fn value_at(keys: usize, key: usize, d: usize) -> usize {
    (d / PANEL_ROWS * keys + key) * PANEL_ROWS + d % PANEL_ROWS
}

#[inline(always)]
fn widen_keys<V: Simd, K: KvFormat>(part: &Part, carved: &mut Carved, chunk: Chunk) {
    let width = carved.width;
    widen::<V, K>(part, carved, chunk, (0, &|key, d| key * width + d));
}

#[inline(always)]
fn widen_values<V: Simd, K: KvFormat>(part: &Part, carved: &mut Carved, chunk: Chunk) {
    widen::<V, K>(
        part,
        carved,
        chunk,
        (1, &|key, d| value_at(chunk.keys, key, d)),
    );
}

/// Widens K (side 0) or V (side 1) rows of the chunk to where `place` wants each vector.
#[inline(always)]
fn widen<V: Simd, K: KvFormat>(
    part: &Part,
    carved: &mut Carved,
    chunk: Chunk,
    (side, place): (usize, &impl Fn(usize, usize) -> usize),
) {
    let size = part.problem.head_size;
    for key in 0..chunk.keys {
        // SAFETY: `check` found the record inside the cache; the buffer has room for a head and 128.
        unsafe {
            let row = part.row(chunk.first + key, side);
            let row = K::open::<V>(row, part.elements(), carved.buffer.as_mut_ptr());
            for d in (0..size).step_by(LANES) {
                let vector = K::As::load_first::<V>(row.add(d * K::As::BYTES), size - d);
                V::store(carved.rows[place(key, d)..][..LANES].as_mut_ptr(), vector);
            }
        }
    }
}

/// `rows` cut into tiles: (first row, rows of the tile).
#[inline(always)]
fn tiles(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(TILE_ROWS);
    (0..count).map(move |tile| {
        let first = rows * tile / count;
        (first, rows * (tile + 1) / count - first)
    })
}

/// scores[key][query] = key · query.
#[inline(always)]
fn score<V: Simd>(part: &Part, carved: &mut Carved, chunk: Chunk) {
    let weights = Weights {
        panel: carved.queries.as_ptr().cast(),
        first_input: 0,
        keep: std::ptr::null_mut(),
    };
    for (first, rows) in tiles(chunk.keys) {
        let tile = Tile {
            x: carved.rows[first * carved.width..].as_ptr(),
            x_stride: carved.width,
            x_step: 1,
            out: carved.scores[first * TILE_QUERIES..].as_mut_ptr(),
            out_stride: TILE_QUERIES,
            columns: chunk.vectors * LANES,
            inputs: part.problem.head_size,
            sums: Sums::Fresh,
            ahead: Ahead::nothing(carved.rows.as_ptr()),
        };
        // SAFETY: the scratch was carved for a whole chunk and a whole tile.
        unsafe { multiply::<V, Widened>(tile, rows, weights, Finish::NOTHING) };
    }
}

/// Queries of the tile (the first so many) that do not see this key of the chunk.
#[inline(always)]
fn blind(part: &Part, chunk: Chunk, key: usize) -> usize {
    (chunk.first + key)
        .saturating_sub(part.item.past + part.queries.start)
        .min(chunk.queries)
}

/// Writes `value` where a query may not look.
#[inline(always)]
fn mask(part: &Part, carved: &mut Carved, chunk: Chunk, value: f32) {
    for (key, line) in carved
        .scores
        .chunks_exact_mut(TILE_QUERIES)
        .take(chunk.keys)
        .enumerate()
    {
        line[..blind(part, chunk, key)].fill(value);
    }
}

/// Scores to weights against each query's new maximum; sums and totals are brought to it.
#[inline(always)]
fn weigh<V: Simd>(part: &Part, carved: &mut Carved, chunk: Chunk) {
    mask(part, carved, chunk, f32::NEG_INFINITY);
    for vector in 0..chunk.vectors {
        exponents::<V>(carved, chunk.keys, vector * LANES);
    }
    mask(part, carved, chunk, 0.0);
    for column in (0..chunk.vectors * LANES).step_by(LANES) {
        // SAFETY: columns are whole vectors inside 64.
        unsafe {
            let mut total = V::splat(0.0);
            for key in 0..chunk.keys {
                total = V::add(
                    total,
                    V::load(carved.scores.as_ptr().add(key * TILE_QUERIES + column)),
                );
            }
            let totals = carved.totals.as_mut_ptr().add(column);
            let shrink = V::load(carved.shrink.as_ptr().add(column));
            V::store(totals, V::fma(V::load(totals), shrink, total));
        }
    }
}

/// The new maximum, weights and shrinking factor of sixteen queries.
#[inline(always)]
fn exponents<V: Simd>(carved: &mut Carved, keys: usize, column: usize) {
    let scores = carved.scores[..keys * TILE_QUERIES].as_mut_ptr();
    // SAFETY: columns are whole vectors inside 64, keys were scored.
    unsafe {
        let maxima = carved.maxima.as_mut_ptr().add(column);
        let before = V::load(maxima);
        let mut maximum = before;
        for key in 0..keys {
            maximum = V::max(V::load(scores.add(key * TILE_QUERIES + column)), maximum);
        }
        V::store(maxima, maximum);
        V::store(
            carved.shrink.as_mut_ptr().add(column),
            exp::<V>(V::sub(before, maximum)),
        );
        for key in 0..keys {
            let at = scores.add(key * TILE_QUERIES + column);
            V::store(at, exp::<V>(V::sub(V::load(at), maximum)));
        }
    }
}

#[inline(always)]
fn rescale<V: Simd>(carved: &mut Carved, queries: usize) {
    let rows = carved.sums.chunks_exact_mut(carved.width);
    for (row, &factor) in rows.take(queries).zip(carved.shrink.iter()) {
        for sums in row.chunks_exact_mut(LANES) {
            // SAFETY: sixteen f32.
            unsafe {
                V::store(
                    sums.as_mut_ptr(),
                    V::mul(V::load(sums.as_ptr()), V::splat(factor)),
                )
            };
        }
    }
}

/// sums[query] += weight of each key × its V row, keys in order.
#[inline(always)]
fn add_values<V: Simd>(part: &Part, carved: &mut Carved, chunk: Chunk) {
    let width = carved.width;
    for element in (0..width).step_by(PANEL_ROWS) {
        let panel = carved.rows[value_at(chunk.keys, 0, element)..]
            .as_ptr()
            .cast();
        let weights = Weights {
            panel,
            first_input: 0,
            keep: std::ptr::null_mut(),
        };
        for (first, rows) in tiles(part.queries.len()) {
            let tile = Tile {
                x: carved.scores[first..].as_ptr(),
                x_stride: 1,
                x_step: TILE_QUERIES,
                out: carved.sums[first * width + element..].as_mut_ptr(),
                out_stride: width,
                columns: (width - element).min(PANEL_ROWS),
                inputs: chunk.keys,
                sums: Sums::Away,
                ahead: Ahead::nothing(carved.rows.as_ptr()),
            };
            // SAFETY: the scratch was carved for a whole chunk and a whole tile.
            unsafe { multiply::<V, Widened>(tile, rows, weights, Finish::NOTHING) };
        }
    }
}

#[inline(always)]
fn finish<V: Simd>(part: &Part, carved: &Carved) {
    let size = part.problem.head_size;
    for (i, row) in part.queries.clone().enumerate() {
        let out = part.out(row);
        let total = V::splat(carved.totals[i]);
        for d in (0..size).step_by(LANES) {
            // SAFETY: sums are padded to whole vectors, out is written up to its end.
            unsafe {
                let sum = V::load(carved.sums.as_ptr().add(i * carved.width + d));
                store_first::<V>(out.as_mut_ptr().add(d), V::div(sum, total), size - d);
            }
        }
    }
}
