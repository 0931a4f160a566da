//! Random weights from a seed: every element is a function of (seed, tensor, index), so any range
//! of rows comes out alike in any order, on any number of threads, without a file.

use super::file::hash_hex;
use super::{CheckpointError, WeightSource, check_request, get, put};
use crate::dtype::Dtype;
use crate::model::{Matrix, MatrixKind, ModelSpec, Small, SmallKind};

/// Changes whenever the same seed would give other weights.
const SYNTH_REVISION: u32 = 1;
/// Distinct values of a tensor: quantiles of a normal distribution, small enough for the L1 cache.
const TABLE_ENTRIES: usize = 4096;
/// Odd constant of the golden ratio: spreads consecutive counters over all 64 bits.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A model's weights made up from a seed.
pub struct SynthSource {
    spec: ModelSpec,
    seed: u64,
    /// The standard normal's quantiles; a tensor scales and rounds them into its own table.
    quantiles: Vec<f32>,
    /// One table for each `MatrixKind`; empty where the model has no such matrix.
    matrix_tables: [Table; 8],
}

/// The values that a tensor's elements are drawn from, little-endian in its format.
enum Table {
    Two(Vec<[u8; 2]>),
    Four(Vec<[u8; 4]>),
}

impl SynthSource {
    pub fn new(spec: ModelSpec, seed: u64) -> SynthSource {
        let middle = |i: usize| (i as f64 + 0.5) / TABLE_ENTRIES as f64;
        let quantiles = (0..TABLE_ENTRIES).map(|i| normal_quantile(middle(i)) as f32);
        let quantiles: Vec<f32> = quantiles.collect();
        let mut matrix_tables = std::array::from_fn(|_| Table::Two(Vec::new()));
        for matrix in spec.matrices() {
            // Matrices of a kind have the same inputs, so the same deviation.
            let deviation = deviation(&matrix);
            let values = quantiles.iter().map(|q| deviation * q);
            matrix_tables[matrix.kind as usize] = Table::of(spec.dtype, values);
        }
        SynthSource {
            spec,
            seed,
            quantiles,
            matrix_tables,
        }
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// `tag` tells matrices from small tensors, which number their kinds from zero both.
    fn key(&self, tag: u64, kind: u64, stage: usize) -> u64 {
        let place = (stage as u64) << 16 | tag << 8 | kind;
        mix(mix(self.seed ^ GOLDEN).wrapping_add(mix(place)))
    }
}

/// Standard deviation of a matrix. The embedding is small beside what the layers add, else a tied
/// head would find the last token again and again.
fn deviation(matrix: &Matrix) -> f32 {
    let inputs = matrix.inputs as f32;
    match matrix.kind {
        MatrixKind::Embedding | MatrixKind::Head => 0.02,
        MatrixKind::Qkv | MatrixKind::Fc1 => 1.0 / inputs.sqrt(),
        // Little attention: it is much alike for consecutive tokens, and would make the text so.
        MatrixKind::AttentionOut => 0.1 / inputs.sqrt(),
        MatrixKind::Fc2 => 1.0 / inputs.sqrt(),
        MatrixKind::ProjectIn | MatrixKind::ProjectOut => 1.0 / inputs.sqrt(),
    }
}

/// Mean and standard deviation of a small tensor, near what training leaves.
fn small_moments(kind: SmallKind) -> (f32, f32) {
    match kind {
        SmallKind::Positions => (0.0, 0.02),
        // Most neurons are off, as in trained models: else all share one direction, and every
        // hidden state ends up there.
        SmallKind::Fc1Bias => (-1.0, 0.02),
        SmallKind::AttentionNormWeight | SmallKind::FfnNormWeight => (1.0, 0.1),
        SmallKind::FinalNormWeight => (1.0, 0.1),
        _ => (0.0, 0.02),
    }
}

impl WeightSource for SynthSource {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        // The name does not change a weight, every other part of the spec may.
        let spec = ModelSpec {
            name: String::new(),
            ..self.spec.clone()
        };
        let sizes = hash_hex(&[format!("{spec:?}").as_bytes()]);
        let (name, seed) = (&self.spec.name, self.seed);
        format!(
            "synth:{name}:seed{seed}:revision{SYNTH_REVISION}:{}",
            &sizes[..16]
        )
    }

    fn read_rows(
        &self,
        matrix: &Matrix,
        first_row: usize,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        check_request(self.spec.dtype, matrix, (first_row, rows), out)?;
        let key = self.key(0, matrix.kind as u64, matrix.stage);
        let first = first_row as u64 * matrix.inputs as u64;
        self.matrix_tables[matrix.kind as usize].fill(key, first, out);
        Ok(())
    }

    fn read_small(&self, small: &Small, out: &mut [u8]) -> Result<(), CheckpointError> {
        if out.len() as u64 != small.bytes() {
            return Err(CheckpointError::Request {
                what: format!("{small:?}"),
                given_bytes: out.len() as u64,
                needed_bytes: small.bytes(),
            });
        }
        let key = self.key(1, small.kind as u64, small.stage);
        let (mean, deviation) = small_moments(small.kind);
        // Rounded to the model's own format first, so that a written checkpoint reads back alike.
        let values = self.quantiles.iter().map(|q| {
            let mut one = [0; 4];
            put(self.spec.dtype, &mut one, 0, mean + deviation * q);
            get(self.spec.dtype, &one, 0)
        });
        Table::of(small.format, values).fill(key, 0, out);
        Ok(())
    }
}

impl Table {
    fn of(dtype: Dtype, values: impl Iterator<Item = f32>) -> Table {
        if dtype == Dtype::F32 {
            return Table::Four(values.map(f32::to_le_bytes).collect());
        }
        let two = |v: f32| {
            let mut bytes = [0; 2];
            put(dtype, &mut bytes, 0, v);
            bytes
        };
        Table::Two(values.map(two).collect())
    }

    /// Elements `first..` of the tensor `key`, as many as `out` holds.
    fn fill(&self, key: u64, first: u64, out: &mut [u8]) {
        match self {
            Table::Two(values) => fill_from(values, key, first, out),
            Table::Four(values) => fill_from(values, key, first, out),
        }
    }
}

/// Four elements a hash; the ends of a range may lie inside a group of four.
fn fill_from<const BYTES: usize>(table: &[[u8; BYTES]], key: u64, first: u64, out: &mut [u8]) {
    // A length known to the compiler spares a bounds check for every element. The one table that
    // is not full belongs to a kind of matrix that this model lacks: nobody asks for its rows.
    let Ok(table) = <&[[u8; BYTES]; TABLE_ENTRIES]>::try_from(table) else {
        return;
    };
    let four = |group: u64| -> [[u8; BYTES]; 4] {
        let hash = mix(key.wrapping_add(group.wrapping_mul(GOLDEN)));
        std::array::from_fn(|lane| table[(hash >> (16 * lane + 4)) as usize % TABLE_ENTRIES])
    };
    let skip = (first % 4) as usize;
    let mut group = first / 4;
    let mut rest = out;
    if skip != 0 {
        let head = four(group);
        let (start, tail) = rest.split_at_mut(rest.len().min((4 - skip) * BYTES));
        start.copy_from_slice(&head.as_flattened()[skip * BYTES..][..start.len()]);
        (group, rest) = (group + 1, tail);
    }
    let mut chunks = rest.chunks_exact_mut(4 * BYTES);
    for chunk in &mut chunks {
        chunk.copy_from_slice(four(group).as_flattened());
        group += 1;
    }
    let end = chunks.into_remainder();
    let len = end.len();
    end.copy_from_slice(&four(group).as_flattened()[..len]);
}

/// Murmur's 64-bit finaliser: every input bit reaches every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Inverse of the normal distribution (Acklam's rational approximation, relative error 1e-9).
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239e0,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838e0,
        -2.549732539343734e0,
        4.374664141464968e0,
        2.938163982698783e0,
    ];
    const D: [f64; 5] = [
        7.784695709041462e-3,
        3.224671290700398e-1,
        2.445134137142996e0,
        3.754408661907416e0,
        1.0,
    ];
    const TAIL: f64 = 0.02425;
    let horner = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 1.0 - TAIL {
        return -normal_quantile(1.0 - p);
    }
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        return horner(&C, q) / horner(&D, q);
    }
    let q = p - 0.5;
    q * horner(&A, q * q) / horner(&B, q * q)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::named_size;

    fn source(dtype: Dtype) -> SynthSource {
        let mut spec = named_size("opt-350m").expect("known");
        (spec.layers, spec.dtype, spec.vocab) = (2, dtype, 999);
        (spec.hidden, spec.heads, spec.ffn, spec.embed_width) = (45, 3, 70, 31);
        SynthSource::new(spec, 7)
    }

    fn read(source: &SynthSource, matrix: &Matrix, first: usize, rows: usize) -> Vec<u8> {
        let bytes = rows as u64 * source.spec().dtype.row_bytes(matrix.inputs);
        let mut out = vec![0; bytes as usize];
        source
            .read_rows(matrix, first, rows, &mut out)
            .expect("inside");
        out
    }

    #[test]
    fn any_range_of_rows_equals_the_whole() {
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            let source = source(dtype);
            for matrix in source.spec().matrices() {
                let whole = read(&source, &matrix, 0, matrix.rows);
                let row = dtype.row_bytes(matrix.inputs) as usize;
                for (first, rows) in [(0, 1), (1, 3), (matrix.rows - 2, 2), (5, 0)] {
                    let part = read(&source, &matrix, first, rows);
                    assert_eq!(part, whole[first * row..][..rows * row]);
                }
            }
        }
    }

    #[test]
    fn values_are_like_trained_ones() {
        let source = source(Dtype::F32);
        let mut seen = std::collections::HashSet::new();
        for matrix in source.spec().matrices() {
            let bytes = read(&source, &matrix, 0, matrix.rows);
            let values = (0..bytes.len() / 4).map(|i| get(Dtype::F32, &bytes, i));
            let values: Vec<f32> = values.collect();
            let n = values.len() as f32;
            let mean = values.iter().sum::<f32>() / n;
            let found = (values.iter().map(|v| v * v).sum::<f32>() / n).sqrt();
            let expected = deviation(&matrix);
            assert!((found / expected - 1.0).abs() < 0.1, "{matrix:?} {found}");
            assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{matrix:?} {mean}");
            assert!(seen.insert(bytes), "two matrices alike");
        }
        for small in source.spec().smalls() {
            let mut bytes = vec![0; small.bytes() as usize];
            source.read_small(&small, &mut bytes).expect("fits");
            assert!(seen.insert(bytes), "two small tensors alike");
        }
    }

    #[test]
    fn seeds_and_sizes_change_the_fingerprint() {
        let a = source(Dtype::F16);
        let b = SynthSource::new(a.spec().clone(), 8);
        let c = source(Dtype::Bf16);
        assert_ne!(a.fingerprint(), b.fingerprint());
        assert_ne!(a.fingerprint(), c.fingerprint());
        let matrix = a.spec().matrices()[0];
        assert_ne!(read(&a, &matrix, 0, 1), read(&b, &matrix, 0, 1));
    }

    #[test]
    fn requests_outside_are_errors() {
        let source = source(Dtype::F16);
        let matrix = source.spec().matrices()[0];
        let mut out = vec![0; 2 * matrix.inputs];
        assert!(source.read_rows(&matrix, matrix.rows, 1, &mut out).is_err());
        assert!(source.read_rows(&matrix, 0, 2, &mut out).is_err());
        assert!(source.read_rows(&matrix, usize::MAX, 1, &mut out).is_err());
    }

    #[test]
    fn quantiles_match_the_normal_distribution() {
        for (p, x) in [
            (0.5, 0.0),
            (0.975, 1.959964),
            (0.001, -3.090232),
            (0.1, -1.281552),
        ] {
            assert!((normal_quantile(p) - x).abs() < 1e-5, "{p}");
        }
    }
}
