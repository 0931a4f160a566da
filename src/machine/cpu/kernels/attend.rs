//! Attention of many sequences at once: what is asked for, checked and cut into parts. The arithmetic is
//! decode.rs (one query row, streaming the cache) and prefill.rs (tiles of query rows).
//!
//! Both take the keys from key 0 on, in chunks of 256 (prompts) or blocks of sixteen (decoding, many keys in two
//! halves), and fold each into a running maximum, sum and weighted value, so that results depend neither on how a
//! prompt is cut nor on the other sequences.

use super::halves::{Joining, States, is_halved};
use super::isa::Isa;
use super::kv::{KvF16, KvF32, KvQ4, KvView, record_bytes};
use super::shared::Shared;
use super::simd::{Body, Simd};
use super::{decode, prefill};
use crate::dtype::Dtype;
use crate::machine::cpu::pool::Pool;
use std::ops::Range;

/// Keys folded together.
pub(super) const CHUNK_KEYS: usize = 256;
/// The widest head that a thread's scratch has room for.
pub const MAX_HEAD_SIZE: usize = 256;

/// Query rows first_row.. of one sequence, of which `past` tokens came before; all keys are appended.
#[derive(Clone, Copy, Debug)]
pub struct AttendItem<'a> {
    pub first_row: usize,
    pub q_rows: usize,
    pub past: usize,
    /// The streaming kernel, for one query row.
    pub decode: bool,
    pub kv: KvView<'a>,
}

/// Rows of qkv are [q | k | v], each heads × head_size wide; only q is read. Rows of out are as wide.
pub struct AttendArgs<'a> {
    pub qkv: &'a [f32],
    pub ld: usize,
    pub heads: usize,
    pub head_size: usize,
    /// F32, F16 or Q4.
    pub format: Dtype,
    pub items: &'a [AttendItem<'a>],
    pub out: &'a mut [f32],
    pub ldo: usize,
}

/// # Panics
/// When a slice is shorter than the shape says, or a head wider than MAX_HEAD_SIZE.
pub fn attend(pool: &Pool, isa: Isa, args: AttendArgs) {
    check(&args);
    let mut kept = pool.keep();
    let kept = kept.floats();
    let cut = Cut::new(&args, pool.threads(), kept.len());
    let out = Shared::new(args.out);
    let problem = Problem {
        qkv: args.qkv,
        ld: args.ld,
        heads: args.heads,
        head_size: args.head_size,
        format: args.format,
        out: &out,
        ldo: args.ldo,
    };
    let shape = (args.heads, args.head_size);
    let states = States::new(kept, shape);
    let parts = args.items.iter().map(|item| cut.parts_of(item)).sum();
    pool.run_with_scratch(parts, &|part, scratch| {
        let (mut index, mut number) = (part, 0);
        for item in args.items {
            let own = cut.parts_of(item);
            if index < own {
                let mut part = problem.part(item, (index, &cut), scratch);
                if item.decode && cut.halved {
                    let half = index / cut.groups;
                    // SAFETY: parts of an item differ in half or heads.
                    let state = unsafe { states.of((number, half), part.heads.clone()) };
                    part.half = Some((half, state));
                }
                return isa.call(part);
            }
            index -= own;
            number += usize::from(item.decode);
        }
    });
    if cut.halved {
        join_all((pool, isa), problem, (args.items, &states));
    }
}

/// The results of items of which both halves have been kept.
fn join_all(
    (pool, isa): (&Pool, Isa),
    problem: Problem,
    (items, states): (&[AttendItem], &States),
) {
    let decoding = || items.iter().filter(|item| item.decode);
    pool.run(decoding().count(), &|number| {
        let Some(&item) = decoding().nth(number) else {
            return;
        };
        let all = 0..problem.heads;
        // SAFETY: the run that wrote them is over.
        let halves = [0, 1].map(|half| unsafe { &*states.of((number, half), all.clone()) });
        isa.call(Joining {
            problem,
            item,
            halves,
        });
    });
}

fn check(args: &AttendArgs) {
    let hidden = args.heads * args.head_size;
    assert!(
        args.head_size <= MAX_HEAD_SIZE,
        "attention: heads wider than {MAX_HEAD_SIZE} do not fit the scratch"
    );
    assert!(args.format != Dtype::Bf16, "KV is kept in f32, f16 or q4");
    for (i, item) in args.items.iter().enumerate() {
        assert!(
            !item.decode || item.q_rows == 1,
            "attention: decoding takes one query row"
        );
        let Some(last) = (item.first_row + item.q_rows).checked_sub(1) else {
            continue;
        };
        assert!(
            args.qkv.len() >= last * args.ld + hidden,
            "attention: qkv is too short"
        );
        assert!(
            args.out.len() >= last * args.ldo + hidden,
            "attention: out is too short"
        );
        check_records(item, record_bytes(args.format, hidden));
        let overlaps = |other: &AttendItem| {
            item.first_row < other.first_row + other.q_rows
                && other.first_row < item.first_row + item.q_rows
        };
        assert!(
            !args.items[..i].iter().any(overlaps),
            "attention: two items share a row of out"
        );
    }
}

fn check_records(item: &AttendItem, record_bytes: usize) {
    let keys = item.past + item.q_rows;
    let records = item.kv.bytes.len() / record_bytes.max(1);
    let inside = match item.kv.slots {
        super::Slots::Contiguous { first } => first + keys <= records,
        super::Slots::Table(table) => table[..keys]
            .iter()
            .all(|&record| (record as usize) < records),
    };
    assert!(inside, "attention: a record lies outside the cache");
}

/// How items are cut into parts.
struct Cut {
    /// Of those that decode: heads that one part streams, as long runs of memory as leave every thread the same to
    /// do; how many such groups there are; and whether halves of the keys are parts, too.
    heads: usize,
    groups: usize,
    halved: bool,
    /// Of those that do not: each head is a part.
    all_heads: usize,
}

impl Cut {
    /// `kept_floats` have room for halves.
    fn new(args: &AttendArgs, threads: usize, kept_floats: usize) -> Cut {
        let decoding = || args.items.iter().filter(|item| item.decode);
        let count = decoding().count();
        let items = count.max(1);
        // Of few sequences, the fewest parts that make whole rounds of all threads.
        let whole = |parts: &usize| (items * parts).is_multiple_of(threads);
        let parts = match items < 4 * threads {
            true => (1..=threads).find(whole).unwrap_or(1),
            false => 1,
        };
        // Whole rows rather than some heads of each: what lies between is fetched all the same.
        let fit = States::room(count, (args.heads, args.head_size)) <= kept_floats;
        let halved = count > 0 && fit && parts.is_multiple_of(2) && decoding().all(is_halved);
        let together = args.heads.div_ceil(if halved { parts / 2 } else { parts });
        let heads = together.clamp(1, decode::heads_that_fit(args.head_size));
        Cut {
            heads,
            groups: args.heads.div_ceil(heads),
            halved,
            all_heads: args.heads,
        }
    }

    fn parts_of(&self, item: &AttendItem) -> usize {
        match item.decode {
            true => self.groups * if self.halved { 2 } else { 1 },
            false => self.all_heads * item.q_rows.div_ceil(prefill::TILE_QUERIES),
        }
    }
}

/// What all parts share.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub qkv: &'a [f32],
    pub ld: usize,
    pub heads: usize,
    pub head_size: usize,
    pub format: Dtype,
    pub out: &'a Shared<'a, f32>,
    pub ldo: usize,
}

/// One part: some heads of one item, and of its query rows a tile.
pub(super) struct Part<'a> {
    pub problem: Problem<'a>,
    pub item: AttendItem<'a>,
    pub heads: Range<usize>,
    pub queries: Range<usize>,
    /// Where the keys of one half only are read: which, and what is kept of each head.
    pub half: Option<(usize, &'a mut [f32])>,
    pub scratch: &'a mut [f32],
}

impl<'a> Problem<'a> {
    fn part(
        &self,
        item: &AttendItem<'a>,
        (index, cut): (usize, &Cut),
        scratch: &'a mut [f32],
    ) -> Part<'a> {
        let (heads, queries) = match item.decode {
            true => {
                let first = index % cut.groups * cut.heads;
                (first..(first + cut.heads).min(self.heads), 0..1)
            }
            false => {
                // The last queries see the most keys: start with them, so that the end is even.
                let tiles = item.q_rows.div_ceil(prefill::TILE_QUERIES);
                let (head, tile) = (index / tiles, tiles - 1 - index % tiles);
                let query = tile * prefill::TILE_QUERIES;
                let end = (query + prefill::TILE_QUERIES).min(item.q_rows);
                (head..head + 1, query..end)
            }
        };
        Part {
            problem: *self,
            item: *item,
            heads,
            queries,
            half: None,
            scratch,
        }
    }
}

impl Part<'_> {
    /// The query row's element where the part's heads begin.
    #[inline(always)]
    pub(super) fn query(&self, row: usize) -> &[f32] {
        let from = (self.item.first_row + row) * self.problem.ld
            + self.heads.start * self.problem.head_size;
        &self.problem.qkv[from..from + self.elements().len()]
    }

    /// Elements of a K or V row that the part's heads cover.
    #[inline(always)]
    pub(super) fn elements(&self) -> Range<usize> {
        let size = self.problem.head_size;
        self.heads.start * size..self.heads.end * size
    }

    /// Where the K row (side 0) or V row (side 1) of a token begins.
    #[inline(always)]
    pub(super) fn row(&self, token: usize, side: usize) -> *const u8 {
        let record = self.item.kv.slots.record(token);
        self.item
            .kv
            .bytes
            .as_ptr()
            .wrapping_add((2 * record + side) * self.row_bytes())
    }

    /// Bytes of a K row, and of a V row, of all heads.
    #[inline(always)]
    pub(super) fn row_bytes(&self) -> usize {
        let hidden = self.problem.heads * self.problem.head_size;
        self.problem.format.row_bytes(hidden) as usize
    }

    /// The result of a query row, as wide as the part's heads.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the rows and heads of parts are disjoint
    pub(super) fn out(&self, row: usize) -> &mut [f32] {
        let from = (self.item.first_row + row) * self.problem.ldo + self.elements().start;
        // SAFETY: items do not share rows, parts of an item differ in heads or rows.
        unsafe { self.problem.out.piece(from, self.elements().len()) }
    }
}

impl Body for Part<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        match (self.item.decode, self.problem.format) {
            (true, Dtype::F32) => decode::run::<V, KvF32>(self),
            (true, Dtype::Q4) => decode::run::<V, KvQ4>(self),
            (true, _) => decode::run::<V, KvF16>(self),
            (false, Dtype::F32) => prefill::run::<V, KvF32>(self),
            (false, Dtype::Q4) => prefill::run::<V, KvQ4>(self),
            (false, _) => prefill::run::<V, KvF16>(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Slots;
    use super::*;

    /// Of `sequences` of 32 heads with so many keys: parts of each, groups of heads and whether by halves.
    fn cut(sequences: usize, keys: usize, (threads, kept_floats): (usize, usize)) -> Cut {
        let kv = KvView {
            bytes: &[],
            slots: Slots::Contiguous { first: 0 },
        };
        let item = AttendItem {
            first_row: 0,
            q_rows: 1,
            past: keys - 1,
            decode: true,
            kv,
        };
        let args = AttendArgs {
            qkv: &[],
            ld: 0,
            heads: 32,
            head_size: 64,
            format: Dtype::F16,
            items: &vec![item; sequences],
            out: &mut [],
            ldo: 0,
        };
        Cut::new(&args, threads, kept_floats)
    }

    #[test]
    fn few_sequences_keep_all_threads_busy() {
        for threads in [1, 2, 4, 16] {
            for sequences in 1..=5 * threads {
                for keys in [100, 600] {
                    let cut = cut(sequences, keys, (threads, usize::MAX));
                    let each = cut.groups * if cut.halved { 2 } else { 1 };
                    let rounds = (sequences * each).div_ceil(threads);
                    let idle = 1.0 - (sequences * each) as f64 / (rounds * threads) as f64;
                    // From four sequences a thread on whole sequences are the parts.
                    let most = if sequences < 4 * threads { 0.0 } else { 0.2 };
                    assert!(idle <= most, "{sequences} on {threads}: {idle} idle");
                }
            }
        }
    }

    #[test]
    fn halves_are_shared_where_there_is_room_for_them() {
        let room = States::room(3, (32, 64));
        assert!(cut(3, 600, (2, room)).halved);
        assert!(!cut(3, 600, (2, room - 1)).halved);
        assert!(!cut(3, 100, (2, room)).halved);
        assert!(!cut(8, 600, (2, usize::MAX)).halved);
    }
}
