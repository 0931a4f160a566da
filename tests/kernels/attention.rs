//! The KV cache and attention.

use crate::*;
use loadmaster::machine::cpu::kernels::kv::record_bytes;
use loadmaster::machine::cpu::kernels::*;

/// Sequences that share a cache, with their queries in one matrix.
struct Bench {
    heads: usize,
    head_size: usize,
    format: Dtype,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    qkv: Vec<f32>,
    ld: usize,
    cache: Vec<u8>,
    /// Records of each sequence's tokens.
    records: Vec<Vec<u32>>,
}

impl Bench {
    fn new(
        random: &mut Random,
        format: Dtype,
        (heads, head_size): (usize, usize),
        lengths: &[usize],
    ) -> Bench {
        let total: usize = lengths.iter().sum();
        let hidden = heads * head_size;
        let ld = 3 * hidden + 3;
        let qkv: Vec<f32> = random.values(total * ld).iter().map(|v| v * 2.0).collect();
        // Records are dealt out back to front in steps, so that tables are no plain counting.
        let order: Vec<u32> = (0..total as u32).rev().collect();
        let mut rest = &order[..];
        let mut records = Vec::new();
        for &length in lengths {
            records.push(rest[..length].to_vec());
            rest = &rest[length..];
        }
        let mut bench = Bench {
            heads,
            head_size,
            format,
            lengths: lengths.to_vec(),
            qkv,
            ld,
            cache: Vec::new(),
            records,
        };
        bench.cache = same_everywhere(|pool, isa| bench.append(pool, isa));
        bench
    }

    fn hidden(&self) -> usize {
        self.heads * self.head_size
    }

    fn append(&self, pool: &Pool, isa: Isa) -> Vec<u8> {
        let total: usize = self.lengths.iter().sum();
        let mut bytes = vec![0; total * record_bytes(self.format, self.hidden())];
        let mut first_row = 0;
        for (records, &count) in self.records.iter().zip(&self.lengths) {
            let (hidden, format, slots) = (self.hidden(), self.format, Slots::Table(records));
            append_kv(
                pool,
                isa,
                AppendArgs {
                    qkv: &self.qkv,
                    ld: self.ld,
                    first_row,
                    count,
                    hidden,
                    format,
                    bytes: &mut bytes,
                    slots,
                },
            );
            first_row += count;
        }
        bytes
    }

    /// Attention of the given (sequence, first query, count, decode) items; result rows as in qkv.
    fn attend(&self, pool: &Pool, isa: Isa, items: &[(usize, usize, usize, bool)]) -> Vec<u32> {
        let start = |s: usize| self.lengths[..s].iter().sum::<usize>();
        let items: Vec<AttendItem> = items
            .iter()
            .map(|&(s, past, q_rows, decode)| {
                let kv = KvView {
                    bytes: &self.cache,
                    slots: Slots::Table(&self.records[s]),
                };
                AttendItem {
                    first_row: start(s) + past,
                    q_rows,
                    past,
                    decode,
                    kv,
                }
            })
            .collect();
        let ldo = self.hidden() + 1;
        let mut out = vec![7.0; self.lengths.iter().sum::<usize>() * ldo];
        let (heads, head_size, format) = (self.heads, self.head_size, self.format);
        attend(
            pool,
            isa,
            AttendArgs {
                qkv: &self.qkv,
                ld: self.ld,
                heads,
                head_size,
                format,
                items: &items,
                out: &mut out,
                ldo,
            },
        );
        bits(&out)
    }

    /// K (side 0) or V (side 1) of a token as stored, decoded by the documented format.
    fn stored(&self, record: u32, side: usize) -> Vec<f32> {
        let row_bytes = self.format.row_bytes(self.hidden()) as usize;
        let row = &self.cache[(2 * record as usize + side) * row_bytes..][..row_bytes];
        let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
        match self.format {
            Dtype::F32 => row
                .chunks(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            Dtype::F16 => row.chunks(2).map(half).collect(),
            _ => (0..self.hidden())
                .map(|e| {
                    let group = &row[e / 64 * 36..][..36];
                    let (word, nibble) = (e % 64 % 16, e % 64 / 16);
                    let code = group[2 * word + nibble / 2] >> (nibble % 2 * 4) & 15;
                    (code as f32).mul_add(half(&group[32..]), half(&group[34..]))
                })
                .collect(),
        }
    }

    fn exact(&self, s: usize, position: usize) -> Vec<f64> {
        let row = self.lengths[..s].iter().sum::<usize>() + position;
        let mut out = vec![0.0; self.hidden()];
        let rows = |side| {
            (0..=position)
                .map(|t| self.stored(self.records[s][t], side))
                .collect::<Vec<_>>()
        };
        let (keys, values) = (rows(0), rows(1));
        for head in 0..self.heads {
            let span = head * self.head_size..(head + 1) * self.head_size;
            let query = &self.qkv[row * self.ld..][span.clone()];
            let dot = |key: &Vec<f32>| {
                let products = query
                    .iter()
                    .zip(&key[span.clone()])
                    .map(|(a, b)| *a as f64 * *b as f64);
                (products.sum::<f64>() / (self.head_size as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = keys.iter().map(dot).collect();
            let total: f64 = weights.iter().sum();
            for d in span {
                out[d] = weights
                    .iter()
                    .zip(&values)
                    .map(|(w, v)| w * v[d] as f64)
                    .sum::<f64>()
                    / total;
            }
        }
        out
    }

    /// What decoding may be off by: fp32's rounding; over 4 bits, integers of 16 bits are multiplied besides
    /// (2e-5 seen; the 4 bits themselves are off by 1e-1).
    fn decoding(&self) -> f64 {
        match self.format {
            Dtype::Q4 => 1e-4,
            _ => ROUNDING,
        }
    }

    fn check(&self, found: &[u32], (s, tolerance): (usize, f64), positions: &[usize]) {
        let start = self.lengths[..s].iter().sum::<usize>();
        for &position in positions {
            let line = &found[(start + position) * (self.hidden() + 1)..][..self.hidden()];
            for (value, exact) in floats(line).iter().zip(self.exact(s, position)) {
                assert!(
                    (*value as f64 - exact).abs() < tolerance,
                    "position {position}: {value}, not {exact}"
                );
            }
        }
    }
}

/// What fp32 sums are off by.
const ROUNDING: f64 = 3e-6;

const SIZES: [(usize, usize); 5] = [(3, 16), (5, 20), (2, 64), (4, 80), (2, 128)];

#[test]
fn appending_keeps_values_and_formats() {
    let mut random = Random(21);
    for format in [Dtype::F32, Dtype::F16, Dtype::Q4] {
        for shape in SIZES {
            let bench = Bench::new(&mut random, format, shape, &[3, 2]);
            let hidden = bench.hidden();
            for (token, &record) in bench.records.concat().iter().enumerate() {
                for side in 0..2 {
                    let from = &bench.qkv[token * bench.ld + (1 + side) * hidden..][..hidden];
                    let found = bench.stored(record, side);
                    if format == Dtype::Q4 {
                        let close = from
                            .iter()
                            .zip(&found)
                            .all(|(a, b)| (a - b).abs() < 4.0 / 30.0 + 0.01);
                        assert!(close, "{shape:?}");
                    } else {
                        assert_eq!(bits(&found), bits(&rounded(from, format)));
                    }
                }
            }
        }
    }
}

#[test]
fn fp16_saturates_instead_of_becoming_infinite() {
    let qkv = [0.0, 1e6, -1e6];
    let mut bytes = [0; 4];
    let slots = Slots::Contiguous { first: 0 };
    let args = AppendArgs {
        qkv: &qkv,
        ld: 3,
        first_row: 0,
        count: 1,
        hidden: 1,
        format: Dtype::F16,
        bytes: &mut bytes,
        slots,
    };
    append_kv(&Pool::new(1), Isa::detect(), args);
    assert_eq!(bytes, [0xff, 0x7b, 0xff, 0xfb]);
}

#[test]
fn decode_and_prefill_are_right_and_the_same_everywhere() {
    let mut random = Random(22);
    for format in [Dtype::F32, Dtype::F16, Dtype::Q4] {
        for shape in SIZES {
            let bench = Bench::new(&mut random, format, shape, &[70, 1, 33]);
            let items = [
                (0, 0, 70, false),
                (1, 0, 1, true),
                (2, 30, 1, true),
                (2, 31, 2, false),
            ];
            let found = same_everywhere(|pool, isa| bench.attend(pool, isa, &items));
            bench.check(&found, (0, ROUNDING), &[0, 1, 15, 16, 63, 64, 69]);
            bench.check(&found, (1, bench.decoding()), &[0]);
            bench.check(&found, (2, bench.decoding()), &[30]);
            bench.check(&found, (2, ROUNDING), &[31, 32]);
            let untouched = (70 + 1 + 29) * (bench.hidden() + 1);
            assert!(
                found[untouched..][..bench.hidden()]
                    .iter()
                    .all(|&v| v == 7f32.to_bits())
            );
        }
    }
}

#[test]
fn long_sequences_cross_chunks() {
    let mut random = Random(23);
    for format in [Dtype::F32, Dtype::F16, Dtype::Q4] {
        for shape in [(2, 20), (2, 64), (3, 48)] {
            let bench = Bench::new(&mut random, format, shape, &[530]);
            let items = [(0, 440, 80, false), (0, 529, 1, true)];
            let found = same_everywhere(|pool, isa| bench.attend(pool, isa, &items));
            bench.check(&found, (0, ROUNDING), &[440, 511, 512, 519]);
            bench.check(&found, (0, bench.decoding()), &[529]);
        }
    }
}

#[test]
fn no_cut_of_a_prompt_changes_a_bit() {
    let mut random = Random(24);
    for format in [Dtype::F32, Dtype::F16, Dtype::Q4] {
        let bench = Bench::new(&mut random, format, (2, 80), &[300, 20]);
        let pool = Pool::new(2);
        for isa in [Isa::SCALAR, Isa::detect()] {
            let whole = bench.attend(&pool, isa, &[(0, 0, 300, false)]);
            for cut in [1, 7, 64, 65, 255, 256, 257, 299] {
                let items = [
                    (0, 0, cut, false),
                    (1, 3, 9, false),
                    (0, cut, 300 - cut, false),
                ];
                let parts = bench.attend(&pool, isa, &items);
                let rows = 300 * (bench.hidden() + 1);
                assert_eq!(parts[..rows], whole[..rows], "{} cut at {cut}", isa.name());
            }
        }
    }
}

/// Nor on how many threads there are, of which two share a long sequence that is alone.
#[test]
fn decoding_does_not_depend_on_the_other_sequences() {
    let mut random = Random(25);
    for format in [Dtype::F32, Dtype::F16, Dtype::Q4] {
        let lengths = [40, 600, 7, 511, 512];
        let bench = Bench::new(&mut random, format, (4, 64), &lengths);
        let last = |s: usize| (s, lengths[s] - 1, 1, true);
        let all: Vec<_> = (0..lengths.len()).map(last).collect();
        let together = bench.attend(&Pool::new(3), Isa::detect(), &all);
        for threads in 1..=4 {
            for group in [&[1][..], &[3], &[4], &[1, 4], &[0, 1], &[1, 3, 4]] {
                let items: Vec<_> = group.iter().map(|&s| last(s)).collect();
                let found = bench.attend(&Pool::new(threads), Isa::detect(), &items);
                for &s in group {
                    let row = lengths[..=s].iter().sum::<usize>() - 1;
                    let at = row * (bench.hidden() + 1);
                    let values = at..at + bench.hidden();
                    assert_eq!(
                        found[values.clone()],
                        together[values],
                        "{group:?}, {threads}"
                    );
                }
            }
        }
    }
}
