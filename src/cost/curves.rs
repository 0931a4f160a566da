//! Measured points turned into functions: GEMM seconds over M and size, rates over block size, and
//! which measured format stands in for a missing one. Which curve an operation uses is rates.rs.

use crate::dtype::{Arithmetic, Dtype, SMALL_ROWS};
use crate::profile::{AttentionRates, GemmCurve, GpuFacts, QuantiseRates};
use std::collections::BTreeMap;

/// Seconds per weight over M, for one measured shape.
#[derive(Clone, Debug)]
pub struct ShapeCurve {
    /// √(inputs ÷ outputs): at one number of weights it goes with inputs and with 1 ÷ outputs.
    aspect: f64,
    /// (M, seconds per weight), rising.
    pub points: Vec<(f64, f64)>,
}

/// The measured shapes of one number of weights, by aspect.
#[derive(Clone, Debug)]
pub struct SizeCurves {
    weights: f64,
    shapes: Vec<ShapeCurve>,
}

impl SizeCurves {
    /// Seconds per weight, linear in the aspect: weights are multiplied once for each row, x is made ready once for
    /// each input. Few outputs are dearer than any that was measured, many are not cheaper.
    fn per_weight_s(&self, m: f64, aspect: f64, floor_s: f64) -> f64 {
        let at = |shape: &ShapeCurve| (shape.aspect, per_weight_s(&shape.points, m, floor_s));
        let above = self.shapes.partition_point(|s| s.aspect < aspect);
        let last = self.shapes.len() - 1;
        let (a, b) = match above {
            0 => return at(&self.shapes[0]).1,
            _ if last == 0 => return at(&self.shapes[0]).1,
            _ => (
                at(&self.shapes[above.min(last) - 1]),
                at(&self.shapes[above.min(last)]),
            ),
        };
        let part = (aspect - a.0) / (b.0 - a.0);
        let seconds = a.1 + (b.1 - a.1) * part;
        if part > 1.0 {
            seconds.max(b.1)
        } else {
            seconds
        }
    }
}

/// Seconds per weight of a product of M rows with a matrix (inputs, outputs): between two measured sizes
/// linear in the size's logarithm, above the largest as there. Below the smallest, a product takes what is
/// left of two sizes when their weights are taken off: it has a beginning and an end however small it is.
pub fn gemm_s_per_weight(
    sizes: &[SizeCurves],
    m: f64,
    (inputs, outputs): (f64, f64),
    floor_s: f64,
) -> f64 {
    let (weights, aspect) = (inputs * outputs, (inputs / outputs).sqrt());
    let at = |size: &SizeCurves| size.per_weight_s(m, aspect, floor_s);
    let above = sizes.partition_point(|s| s.weights < weights);
    match (sizes.get(above.wrapping_sub(1)), sizes.get(above)) {
        (Some(small), Some(large)) => {
            let t = (weights / small.weights).ln() / (large.weights / small.weights).ln();
            at(small) * (1.0 - t) + at(large) * t
        }
        (None, Some(small)) => {
            let large = sizes.get(1).unwrap_or(small);
            let fixed_s = fixed_s((small.weights, at(small)), (large.weights, at(large)));
            at(small) + fixed_s * (1.0 / weights - 1.0 / small.weights)
        }
        (Some(only), None) => at(only),
        (None, None) => f64::INFINITY,
    }
}

/// What a product takes besides its weights, from two sizes of (weights, seconds per weight).
fn fixed_s((few, few_s): (f64, f64), (many, many_s): (f64, f64)) -> f64 {
    match many > few {
        true => ((few_s - many_s) * few * many / (many - few)).clamp(0.0, few_s * few),
        false => 0.0,
    }
}

/// Bytes of one element in long rows.
pub fn element_bytes(format: Dtype) -> f64 {
    format.row_bytes(64) as f64 / 64.0
}

/// Piecewise linear between measured M; above the last by FLOPs; below the first in proportion, but
/// not under the time that reading the weight takes.
fn per_weight_s(points: &[(f64, f64)], m: f64, floor_s: f64) -> f64 {
    let (first, last) = (points[0], points[points.len() - 1]);
    if m <= first.0 {
        return (first.1 * m / first.0).max(floor_s).min(first.1);
    }
    if m >= last.0 {
        return last.1 * m / last.0;
    }
    let above = points.partition_point(|p| p.0 < m).max(1);
    let (a, b) = (points[above - 1], points[above]);
    a.1 + (b.1 - a.1) * (m - a.0) / (b.0 - a.0)
}

/// Rate for blocks of `block` bytes: linear in the block's logarithm, latency-bound below the curve.
pub fn rate_at(curve: &[(f64, f64)], block: f64) -> f64 {
    let (first, last) = (curve[0], curve[curve.len() - 1]);
    if block <= first.0 {
        return first.1 * (block / first.0).max(1e-6);
    }
    if block >= last.0 {
        return last.1;
    }
    let above = curve.partition_point(|p| p.0 < block).max(1);
    let (a, b) = (curve[above - 1], curve[above]);
    a.1 + (b.1 - a.1) * (block / a.0).ln() / (b.0 / a.0).ln()
}

/// Formats that stand in for one that was not measured, nearest first.
fn stand_ins(format: Dtype) -> [Dtype; 4] {
    match format {
        Dtype::F32 => [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Q4],
        Dtype::F16 => [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::Q4],
        Dtype::Bf16 => [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Q4],
        Dtype::Q4 => [Dtype::Q4, Dtype::F16, Dtype::Bf16, Dtype::F32],
    }
}

/// Curves by arithmetic and format.
pub fn gemm_curves(
    tables: &BTreeMap<String, GemmCurve>,
    slow: f64,
) -> Option<[[Vec<SizeCurves>; 4]; 3]> {
    let mut all: [[Vec<SizeCurves>; 4]; 3] = Default::default();
    for arithmetic in [Arithmetic::Fp32, Arithmetic::Bf16, Arithmetic::Int8] {
        for format in Dtype::ALL {
            let (found, table) = measured(tables, arithmetic, format)?;
            let larger = (element_bytes(format) / element_bytes(found)).max(1.0);
            all[arithmetic as usize][format as usize] = size_curves(table, larger * slow);
        }
    }
    Some(all)
}

/// The table that is used for a format, and the format that it is of.
fn measured(
    tables: &BTreeMap<String, GemmCurve>,
    arithmetic: Arithmetic,
    format: Dtype,
) -> Option<(Dtype, &GemmCurve)> {
    let by = |arithmetic: Arithmetic| {
        let table = move |f: Dtype| Some((f, tables.get(&arithmetic.table_name(f))?));
        stand_ins(format).into_iter().find_map(table)
    };
    by(arithmetic).or_else(|| by(Arithmetic::Fp32))
}

fn size_curves(table: &GemmCurve, factor: f64) -> Vec<SizeCurves> {
    let mut sizes = BTreeMap::<u64, BTreeMap<usize, BTreeMap<usize, f64>>>::new();
    for &(m, inputs, outputs, seconds) in &table.points {
        let weights = (inputs * outputs).max(1) as u64;
        let of_size = sizes.entry(weights).or_default();
        let of_shape = of_size.entry(inputs.max(1)).or_default();
        of_shape.insert(m.max(1), factor * seconds / weights as f64);
    }
    let curve = |(weights, shapes): (u64, BTreeMap<usize, _>)| SizeCurves {
        weights: weights as f64,
        shapes: shapes
            .into_iter()
            .map(|(inputs, points)| ShapeCurve {
                aspect: inputs as f64 / (weights as f64).sqrt(),
                points: rising(points),
            })
            .collect(),
    };
    sizes.into_iter().map(curve).collect()
}

/// Points over a count, none lower than the one before.
pub fn rising(points: BTreeMap<usize, f64>) -> Vec<(f64, f64)> {
    let mut most = 0.0f64;
    let rise = |(m, s): (usize, f64)| {
        most = most.max(s);
        (m as f64, most)
    };
    points.into_iter().map(rise).collect()
}

/// 4-bit products of more rows than the small kernels take, on a GPU: weights to fp16, whatever the rows, then a
/// product of fp16.
#[derive(Clone, Debug)]
pub struct Widened {
    /// (4-bit bytes, bytes per second)
    rates: Vec<(f64, f64)>,
    products: Vec<SizeCurves>,
}

impl Widened {
    /// None where widening was not measured. The products are the measured 4-bit ones less their widening, or
    /// else fp16's.
    pub fn new(gpu: &GpuFacts) -> Option<Widened> {
        let sorted: BTreeMap<u64, f64> = gpu.widen_q4_bytes_per_s.iter().copied().collect();
        let rates = sorted.into_iter().map(|(b, r)| (b.max(1) as f64, r));
        let mut widened = Widened {
            rates: rates.collect(),
            products: Vec::new(),
        };
        if widened.rates.is_empty() {
            return None;
        }
        let (format, table) = measured(&gpu.gemm, Arithmetic::Fp32, Dtype::Q4)?;
        let mut table = table.clone();
        table.points.retain(|point| point.0 > SMALL_ROWS);
        if format != Dtype::Q4 || table.points.is_empty() {
            table = measured(&gpu.gemm, Arithmetic::Fp32, Dtype::F16)?.1.clone();
        } else {
            for (_, inputs, rows, seconds) in &mut table.points {
                *seconds = (*seconds - widened.widen_s((*inputs * *rows) as f64)).max(0.0);
            }
        }
        widened.products = size_curves(&table, 1.0);
        Some(widened)
    }

    /// Seconds of turning so many weights into fp16.
    pub fn widen_s(&self, weights: f64) -> f64 {
        let bytes = weights * element_bytes(Dtype::Q4);
        bytes / rate_at(&self.rates, bytes)
    }

    /// Seconds per weight, reading fp16 taking `floor_s`.
    pub fn per_weight_s(&self, m: f64, shape: (f64, f64), floor_s: f64) -> f64 {
        let weights = shape.0 * shape.1;
        let product = gemm_s_per_weight(&self.products, m, shape, floor_s);
        self.widen_s(weights) / weights + product
    }
}

/// What attention takes over the tokens that it looks at: (tokens, seconds per byte or FLOP), rising
/// tokens.
#[derive(Clone, Debug)]
pub struct AttentionCurves {
    decode: Vec<(f64, f64)>,
    prefill: Vec<(f64, f64)>,
    /// Of decoding over the width of the keys: (hidden, seconds per byte ÷ those at the width of `decode`).
    by_width: Vec<(f64, f64)>,
    /// Of a call, besides its bytes.
    pub decode_call_s: f64,
}

impl AttentionCurves {
    /// Of keys and values of `hidden` values each: what a row takes besides its bytes weighs more where rows
    /// are short.
    pub fn decode_s_per_byte(&self, tokens: f64, hidden: f64) -> f64 {
        let narrow = match self.by_width.is_empty() {
            true => 1.0,
            false => reciprocal(&self.by_width, hidden),
        };
        narrow * reciprocal(&self.decode, tokens)
    }

    pub fn prefill_s_per_flop(&self, tokens: f64) -> f64 {
        reciprocal(&self.prefill, tokens)
    }
}

/// What costs a + b · n takes seconds per n that are linear in 1 ÷ n (tokens of a sequence, values of a row);
/// constant above the last point, and below the first never less than there.
fn reciprocal(points: &[(f64, f64)], n: f64) -> f64 {
    let (first, last) = (points[0], points[points.len() - 1]);
    if points.len() == 1 || n >= last.0 {
        return last.1;
    }
    let above = points.partition_point(|p| p.0 < n).max(1);
    let (a, b) = (points[above - 1], points[above]);
    let part = (1.0 / n.max(1.0) - 1.0 / a.0) / (1.0 / b.0 - 1.0 / a.0);
    let seconds = a.1 + (b.1 - a.1) * part;
    if n < first.0 {
        seconds.max(first.1)
    } else {
        seconds
    }
}

/// Curves by format on a machine that is `slow` times slower than the measured one.
pub fn attention_curves(
    tables: &BTreeMap<String, AttentionRates>,
    slow: f64,
) -> Option<[AttentionCurves; 4]> {
    let mut all = Vec::with_capacity(4);
    for format in Dtype::ALL {
        let (found, rates) = stand_ins(format)
            .into_iter()
            .find_map(|f| tables.get(f.name()).map(|t| (f, t)))?;
        let smaller = (element_bytes(format) / element_bytes(found)).min(1.0);
        all.push(AttentionCurves {
            decode: token_curve(
                &rates.decode_by_tokens,
                rates.decode_bytes_per_s,
                slow / smaller,
            ),
            prefill: token_curve(&rates.prefill_by_tokens, rates.prefill_flop_per_s, slow),
            by_width: width_curve(&rates.decode_by_hidden),
            decode_call_s: rates.decode_call_s,
        });
    }
    all.try_into().ok()
}

fn token_curve(points: &[(usize, f64)], rate: f64, slow: f64) -> Vec<(f64, f64)> {
    if points.is_empty() {
        return vec![(1.0, slow / rate)];
    }
    let sorted: BTreeMap<usize, f64> = points.iter().map(|&(t, r)| (t.max(1), r)).collect();
    sorted
        .into_iter()
        .map(|(t, r)| (t as f64, slow / r))
        .collect()
}

/// Against the widest, which is the width of all other figures.
fn width_curve(points: &[(usize, f64)]) -> Vec<(f64, f64)> {
    let sorted: BTreeMap<usize, f64> = points.iter().map(|&(w, r)| (w.max(1), r)).collect();
    let widest = sorted.values().next_back().copied().unwrap_or(1.0);
    let factor = |(w, r): (usize, f64)| (w as f64, (widest / r).max(1.0));
    sorted.into_iter().map(factor).collect()
}

/// Where (de)quantising was not measured, it takes four times as long as a row-wise pass.
pub fn slow_quantise(rowwise_bytes_per_s: f64) -> QuantiseRates {
    QuantiseRates {
        pack_bytes_per_s: rowwise_bytes_per_s / 4.0,
        append_bytes_per_s: rowwise_bytes_per_s / 4.0,
    }
}
