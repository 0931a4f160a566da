//! One query over many keys in two halves, which are joined: how the keys are cut, what is kept of a half, and the
//! joining. What is done with the keys is decode.rs's business.
//!
//! Only the number of keys decides whether there are halves, so that results do not depend on who takes them.

use super::attend::{AttendItem, Problem};
use super::decode::BLOCK;
use super::math::exp;
use super::shared::Shared;
use super::simd::{Body, LANES, Simd, store_first};
use std::ops::Range;

/// From so many keys on there are halves.
const HALVED_KEYS: usize = 512;

pub(super) fn is_halved(item: &AttendItem) -> bool {
    item.decode && item.past + 1 >= HALVED_KEYS
}

/// The first and the second half of the keys, in whole blocks; all and none of few.
pub(super) fn halves(item: &AttendItem) -> [Range<usize>; 2] {
    let keys = item.past + 1;
    let middle = match is_halved(item) {
        true => (keys / 2).next_multiple_of(BLOCK),
        false => keys,
    };
    [0..middle, middle..keys]
}

/// What is kept of a head's half: its weighted values, padded to whole vectors, their total and the maximum.
pub(super) fn state_floats(head_size: usize) -> usize {
    head_size.next_multiple_of(LANES) + LANES
}

/// What is kept of all halves of a call: [item that decodes][half][head].
pub(super) struct States<'a> {
    floats: Shared<'a, f32>,
    heads: usize,
    each: usize,
}

impl<'a> States<'a> {
    /// Floats that so many items need.
    pub(super) fn room(items: usize, (heads, head_size): (usize, usize)) -> usize {
        2 * items * heads * state_floats(head_size)
    }

    pub(super) fn new(floats: &'a mut [f32], (heads, head_size): (usize, usize)) -> States<'a> {
        States {
            floats: Shared::new(floats),
            heads,
            each: state_floats(head_size),
        }
    }

    /// Some heads of an item's half.
    /// # Safety
    /// Nobody else has any of these heads meanwhile.
    #[allow(clippy::mut_from_ref)] // as for `piece`
    pub(super) unsafe fn of(
        &self,
        (item, half): (usize, usize),
        heads: Range<usize>,
    ) -> &'a mut [f32] {
        let first = (2 * item + half) * self.heads + heads.start;
        // SAFETY: the caller's.
        unsafe {
            self.floats
                .piece(first * self.each, heads.len() * self.each)
        }
    }
}

/// The last thing to do for an item whose halves are both there.
pub(super) struct Joining<'a> {
    pub problem: Problem<'a>,
    pub item: AttendItem<'a>,
    pub halves: [&'a [f32]; 2],
}

impl Body for Joining<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        let Problem {
            heads,
            head_size,
            out,
            ldo,
            ..
        } = self.problem;
        // SAFETY: items do not share rows.
        let row = unsafe { out.piece(self.item.first_row * ldo, heads * head_size) };
        join::<V>(self.halves, (row, head_size));
    }
}

/// The results of heads from what was kept of their halves.
#[inline(always)]
pub(super) fn join<V: Simd>([first, second]: [&[f32]; 2], (out, head_size): (&mut [f32], usize)) {
    let each = state_floats(head_size);
    for (head, out) in out.chunks_exact_mut(head_size).enumerate() {
        let at = head * each..(head + 1) * each;
        join_head::<V>([&first[at.clone()], &second[at]], out);
    }
}

/// (Closures over vectors would be calls.)
#[inline(always)]
fn join_head<V: Simd>([first, second]: [&[f32]; 2], out: &mut [f32]) {
    let size = out.len();
    let width = size.next_multiple_of(LANES);
    let maximum = f32::max(first[width + 1], second[width + 1]);
    let of_first = exp::<V>(V::splat(first[width + 1] - maximum));
    let of_second = exp::<V>(V::splat(second[width + 1] - maximum));
    let total = V::mul(V::splat(first[width]), of_first);
    let total = V::fma(V::splat(second[width]), of_second, total);
    for d in (0..size).step_by(LANES) {
        // SAFETY: sums are padded to whole vectors, out is written up to its end.
        unsafe {
            let sum = V::mul(V::load(first.as_ptr().add(d)), of_first);
            let sum = V::fma(V::load(second.as_ptr().add(d)), of_second, sum);
            store_first::<V>(out.as_mut_ptr().add(d), V::div(sum, total), size - d);
        }
    }
}
