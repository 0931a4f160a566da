//! Layer normalisation of rows, into a new matrix or in place. Mean and variance in f32 over sixty-four
//! strided partial sums combined in a fixed tree, so that every machine rounds alike.

use super::isa::Isa;
use super::rows::each_row;
use super::shared::Shared;
use super::simd::{Body, LANES, Simd, load_first, store_first};
use crate::machine::cpu::pool::Pool;

/// Rows of x named by `rows` (without it 0..m), normalised into `out`, m × width.
pub struct NormArgs<'a> {
    pub x: &'a [f32],
    pub rows: Option<&'a [u32]>,
    pub m: usize,
    pub width: usize,
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    pub eps: f32,
    pub out: &'a mut [f32],
}

/// The rows of x that `rows` names (each once; without it 0..m), normalised where they are.
pub struct NormInPlace<'a> {
    pub x: &'a mut [f32],
    pub rows: Option<&'a [u32]>,
    pub m: usize,
    pub width: usize,
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    pub eps: f32,
}

/// Partial sums of sixteen lanes each.
const SUMS: usize = 4;

/// # Panics
/// When a slice is shorter than the shape says.
pub fn layer_norm(pool: &Pool, isa: Isa, args: NormArgs) {
    let NormArgs {
        x,
        rows,
        m,
        width,
        weight,
        bias,
        eps,
        out,
    } = args;
    let affine = Affine::new(weight, bias, width, eps);
    let out = Shared::new(out);
    each_row(pool, (m, width), &|i| {
        let from = super::rows::row_of(rows, i) * width;
        // SAFETY: every row of out belongs to one part.
        let out = unsafe { out.piece(i * width, width) };
        isa.call(Row {
            from: x[from..from + width].as_ptr(),
            out,
            affine,
        });
    });
}

/// # Panics
/// When a slice is shorter than the shape says, or a row is named twice.
pub fn layer_norm_in_place(pool: &Pool, isa: Isa, args: NormInPlace) {
    let NormInPlace {
        x,
        rows,
        m,
        width,
        weight,
        bias,
        eps,
    } = args;
    let affine = Affine::new(weight, bias, width, eps);
    super::rows::assert_distinct(rows.map(|rows| &rows[..m]).unwrap_or(&[]));
    let x = Shared::new(x);
    each_row(pool, (m, width), &|i| {
        // SAFETY: rows are distinct, so each belongs to one part.
        let out = unsafe { x.piece(super::rows::row_of(rows, i) * width, width) };
        isa.call(Row {
            from: out.as_ptr(),
            out,
            affine,
        });
    });
}

#[derive(Clone, Copy)]
struct Affine<'a> {
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    eps: f32,
}

impl<'a> Affine<'a> {
    fn new(
        weight: Option<&'a [f32]>,
        bias: Option<&'a [f32]>,
        width: usize,
        eps: f32,
    ) -> Affine<'a> {
        let long_enough = |v: Option<&[f32]>| v.is_none_or(|v| v.len() >= width);
        assert!(
            long_enough(weight) && long_enough(bias),
            "layer norm: weight or bias is too short"
        );
        Affine { weight, bias, eps }
    }
}

/// One row; `from` is as long as `out` and may be the same memory.
struct Row<'a> {
    from: *const f32,
    out: &'a mut [f32],
    affine: Affine<'a>,
}

impl Body for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        let (width, from) = (self.out.len(), self.from);
        let load = |at: usize| {
            // SAFETY: `from` has `width` elements.
            unsafe { load_first::<V>(from.add(at), width - at) }
        };
        let to = self.out.as_mut_ptr();
        let mean = strided_sum::<V>(width, |at| {
            V::prefetch_to_write(to.wrapping_add(at));
            load(at)
        });
        let mean = mean / width as f32;
        let centre = V::splat(mean);
        let squares = strided_sum::<V>(width, |at| {
            let d = V::sub(load(at), centre);
            let d = if width - at < LANES {
                clear_from::<V>(d, width - at)
            } else {
                d
            };
            V::mul(d, d)
        });
        let scale = V::splat(1.0 / (squares / width as f32 + self.affine.eps).sqrt());
        for at in (0..width).step_by(LANES) {
            let value = V::mul(V::sub(load(at), centre), scale);
            let value = self.affine.apply::<V>(value, at, width - at);
            // SAFETY: out has `width` elements.
            unsafe { store_first::<V>(to.add(at), value, width - at) };
        }
    }
}

impl Affine<'_> {
    #[inline(always)]
    fn apply<V: Simd>(&self, value: V::F, at: usize, count: usize) -> V::F {
        let load = |v: &[f32]| {
            // SAFETY: `new` compared the lengths with the width.
            unsafe { load_first::<V>(v.as_ptr().add(at), count) }
        };
        match (self.weight, self.bias) {
            (Some(w), Some(b)) => V::fma(value, load(w), load(b)),
            (Some(w), None) => V::mul(value, load(w)),
            (None, Some(b)) => V::add(value, load(b)),
            (None, None) => value,
        }
    }
}

/// The sum of vectors at 0, 16, 32, ...: four sums in turn, then pairs, then the lanes' tree.
#[inline(always)]
fn strided_sum<V: Simd>(width: usize, vector: impl Fn(usize) -> V::F) -> f32 {
    let mut sums = [V::splat(0.0); SUMS];
    let mut at = 0;
    while at < width {
        for sum in &mut sums {
            if at < width {
                *sum = V::add(*sum, vector(at));
            }
            at += LANES;
        }
    }
    V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])))
}

/// Zeros in the lanes from `n` on.
#[inline(always)]
fn clear_from<V: Simd>(a: V::F, n: usize) -> V::F {
    let lanes = super::simd::lanes::<V>(a);
    // SAFETY: n < 16 elements of an array of sixteen.
    unsafe { load_first::<V>(lanes.as_ptr(), n) }
}
