//! The cache and attention: the kernels' records and results against the CPU's, over ragged sequences,
//! contiguous and through slot tables, every head size class and format.

use super::case::{Case, Emulation, ORDERS, in_every_order, run};
use super::twins::{Random, Twins, close, floats, is_close};
use loadmaster::dtype::Dtype;
use loadmaster::machine::cpu::kernels as cpu;

const FORMATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Q4];

/// One sequence and its cache, records of `past + rows` tokens.
struct Sequence {
    first_row: usize,
    rows: usize,
    past: usize,
    slots: Option<Vec<u32>>,
    cache: Vec<u8>,
}

/// Sequences over one matrix of queries, keys and values.
struct Problem {
    heads: usize,
    head_size: usize,
    format: Dtype,
    qkv: Vec<f32>,
    sequences: Vec<Sequence>,
}

impl Problem {
    /// Sequences of (rows, past), every second one through a shuffled table; their past is random.
    fn new(
        seed: u64,
        (heads, head_size): (usize, usize),
        format: Dtype,
        lengths: &[(usize, usize)],
    ) -> Problem {
        let mut random = Random::new(seed);
        let hidden = heads * head_size;
        let rows = lengths.iter().map(|(rows, _)| rows + 1).sum::<usize>();
        let mut problem = Problem {
            heads,
            head_size,
            format,
            qkv: random.values(rows * 3 * hidden, 2.0),
            sequences: Vec::new(),
        };
        let mut first_row = 0;
        for (i, &(rows, past)) in lengths.iter().enumerate() {
            let tokens = past + rows;
            let records = tokens + 3;
            let slots = (i % 2 == 1).then(|| shuffled(&mut random, records, tokens));
            let mut sequence = Sequence {
                first_row,
                rows,
                past,
                slots,
                cache: vec![0; records * cpu::kv::record_bytes(format, hidden)],
            };
            let old = random.values(past * 3 * hidden, 2.0);
            problem.append(&old, (0, past), 0, &mut sequence);
            problem.sequences.push(sequence);
            first_row += rows + 1;
        }
        problem
    }

    /// The CPU's append of `count` rows from `first_row` of qkv at token `past`.
    fn append(
        &self,
        qkv: &[f32],
        (first_row, count): (usize, usize),
        past: usize,
        to: &mut Sequence,
    ) {
        let twins = Twins::new();
        let hidden = self.heads * self.head_size;
        let slots = match &to.slots {
            Some(table) => cpu::Slots::Table(&table[past..past + count]),
            None => cpu::Slots::Contiguous { first: past },
        };
        let args = cpu::AppendArgs {
            qkv,
            ld: 3 * hidden,
            first_row,
            count,
            hidden,
            format: self.format,
            bytes: &mut to.cache,
            slots,
        };
        cpu::append_kv(&twins.pool, twins.isa, args);
    }

    fn append_all(&mut self) {
        let mut sequences = std::mem::take(&mut self.sequences);
        for s in &mut sequences {
            self.append(&self.qkv, (s.first_row, s.rows), s.past, s);
        }
        self.sequences = sequences;
    }

    /// The CPU's attention, rows as far apart as the queries.
    fn attended(&self, decode: bool) -> Vec<f32> {
        let twins = Twins::new();
        let hidden = self.heads * self.head_size;
        let items: Vec<cpu::AttendItem> = self
            .sequences
            .iter()
            .map(|s| cpu::AttendItem {
                first_row: s.first_row,
                q_rows: s.rows,
                past: s.past,
                decode,
                kv: cpu::KvView {
                    bytes: &s.cache,
                    slots: match &s.slots {
                        Some(table) => cpu::Slots::Table(table),
                        None => cpu::Slots::Contiguous { first: 0 },
                    },
                },
            })
            .collect();
        let mut out = vec![0.0; self.qkv.len() / 3];
        cpu::attend(
            &twins.pool,
            twins.isa,
            cpu::AttendArgs {
                qkv: &self.qkv,
                ld: 3 * hidden,
                heads: self.heads,
                head_size: self.head_size,
                format: self.format,
                items: &items,
                out: &mut out,
                ldo: hidden,
            },
        );
        out
    }

    /// Writes the items, caches and tables into the case: (items' buffer, first cache's, all parts).
    fn items(
        &self,
        case: &mut Case,
        parts: impl Fn(&Sequence) -> usize,
    ) -> (usize, Vec<usize>, usize) {
        let mut bytes = Vec::new();
        let mut first_part = 0;
        for s in &self.sequences {
            bytes.extend([0u8; 16]);
            for word in [s.first_row, s.rows, s.past, first_part] {
                bytes.extend((word as u32).to_le_bytes());
            }
            first_part += parts(s);
        }
        let items = case.hold(&bytes);
        let mut caches = Vec::new();
        for (i, s) in self.sequences.iter().enumerate() {
            let cache = case.hold(&s.cache);
            case.point((items, 32 * i), cache);
            caches.push(cache);
            if let Some(table) = &s.slots {
                let table = case.hold(bytemuck::cast_slice(table));
                case.point((items, 32 * i + 8), table);
            }
        }
        (items, caches, first_part)
    }

    /// An attention case and the number of its result's buffer.
    fn case(&self, name: &str, parts: impl Fn(&Sequence) -> usize) -> (Case, usize) {
        let hidden = self.heads * self.head_size;
        let all: usize = self.sequences.iter().map(&parts).sum();
        let mut case = Case::new(name, (all, self.heads), 128)
            .buffer(&self.qkv)
            .word(3 * hidden);
        let (items, _, _) = self.items(&mut case, parts);
        let out = case.hold(bytemuck::cast_slice(&vec![0f32; self.qkv.len() / 3]));
        let case = case
            .held(items)
            .words([self.sequences.len(), self.heads, self.head_size])
            .held(out)
            .word(hidden);
        (case, out)
    }
}

/// As the hardware makes it.
const NOT_A_NUMBER: f32 = f32::from_bits(0x7fff_ffff);

/// `count` different numbers below `bound`.
fn shuffled(random: &mut Random, bound: usize, count: usize) -> Vec<u32> {
    let mut all: Vec<u32> = (0..bound as u32).collect();
    for i in 0..bound {
        all.swap(i, i + random.below(bound - i));
    }
    all.truncate(count);
    all
}

#[test]
fn appended_records_are_the_cpus_bytes() {
    for format in FORMATS {
        for (heads, head_size) in [(3, 20), (2, 64), (1, 80), (5, 128)] {
            let mut problem =
                Problem::new(11, (heads, head_size), format, &[(3, 2), (1, 0), (2, 5)]);
            problem.qkv[heads * head_size] = 1e6;
            problem.qkv[heads * head_size + 1] = NOT_A_NUMBER;
            let hidden = heads * head_size;
            let mut case = Case::new(&format!("append_{}", format.name()), (6, 2), 256)
                .buffer(&problem.qkv)
                .word(3 * hidden);
            let (items, caches, rows) = problem.items(&mut case, |s| s.rows);
            assert_eq!(rows, 6);
            let case = case.held(items).words([problem.sequences.len(), hidden]);
            problem.append_all();
            for found in in_every_order(&[case]) {
                for (s, cache) in problem.sequences.iter().zip(&caches) {
                    assert_eq!(
                        found[0][*cache], s.cache,
                        "{format:?} {heads} × {head_size}"
                    );
                }
            }
        }
    }
}

/// Attention of prompts by `name`, tiles of `tile` rows.
fn prompts(problem: &mut Problem, name: &str, tile: usize, tolerance: f32) {
    problem.append_all();
    let (case, out) = problem.case(name, |s| s.rows.div_ceil(tile));
    let wanted = problem.attended(false);
    for found in in_every_order(&[case]) {
        close(
            &floats(&found[0][out]),
            &wanted,
            tolerance,
            &format!("{name} {}", problem.head_size),
        );
    }
}

#[test]
fn attention_of_prompts_is_the_cpus() {
    for format in FORMATS {
        for (heads, head_size) in [(2, 20), (1, 64), (1, 80), (1, 128), (1, 256)] {
            let mut problem =
                Problem::new(12, (heads, head_size), format, &[(17, 0), (5, 40), (1, 3)]);
            let name = format!("attend_prefill_{}", format.name());
            prompts(&mut problem, &name, 16, 1e-5);
        }
    }
}

#[test]
fn attention_on_tensor_cores_is_the_cpus_to_fp16() {
    for format in [Dtype::F16, Dtype::Q4] {
        // The last as before sm_80, where the widest heads have fewer keys at once.
        for (size, head_size) in [
            ("32", 20),
            ("32", 32),
            ("64", 36),
            ("64", 64),
            ("80", 80),
            ("128", 96),
            ("128", 128),
            ("128_75", 96),
            ("128_75", 128),
        ] {
            let lengths: &[(usize, usize)] = if head_size == 64 {
                &[(70, 0), (33, 100), (1, 3)]
            } else {
                &[(20, 60), (3, 0)]
            };
            let mut problem = Problem::new(13, (2, head_size), format, lengths);
            let name = format!("attend_prefill_mma_{}_{size}", format.name());
            prompts(&mut problem, &name, 64, 4e-3);
        }
    }
}

/// Decode and then its combination, whose operands are the first launch's results.
fn decode(problem: &mut Problem, emulation: Emulation) -> Result<Vec<f32>, String> {
    problem.append_all();
    let chunks = |s: &Sequence| (s.past + 1).div_ceil(256);
    let parts: usize = problem.sequences.iter().map(chunks).sum();
    let partial = vec![f32::NAN; parts * problem.heads * (problem.head_size + 2)];
    let name = format!("attend_decode_{}", problem.format.name());
    let (mut case, out) = problem.case(&name, chunks);
    let partial_at = case.hold(bytemuck::cast_slice(&partial));
    let first = run(&[case.held(partial_at)], emulation)?.remove(0);
    let hidden = problem.heads * problem.head_size;
    let mut combine = Case::new(
        "attend_combine",
        (problem.sequences.len(), problem.heads),
        128,
    )
    .buffer(&floats(&first[partial_at]));
    let (items, _, _) = problem.items(&mut combine, chunks);
    let combined = combine.hold(&first[out]);
    let combine = combine
        .held(items)
        .words([problem.sequences.len(), problem.heads, problem.head_size])
        .held(combined)
        .word(hidden);
    Ok(floats(&run(&[combine], emulation)?[0][combined]))
}

#[test]
fn decoding_is_the_cpus() {
    for format in FORMATS {
        for (heads, head_size) in [(2, 20), (2, 64), (1, 80), (1, 128), (1, 200), (4, 16)] {
            let lengths = [(1, 0), (1, 255), (1, 256), (1, 600)];
            for order in ORDERS {
                let mut problem = Problem::new(14, (heads, head_size), format, &lengths);
                let emulation = Emulation {
                    order,
                    dropped_barrier: None,
                };
                let found = decode(&mut problem, emulation).unwrap_or_else(|said| panic!("{said}"));
                let wanted = problem.attended(true);
                close(
                    &found,
                    &wanted,
                    1e-5,
                    &format!("decode {format:?} {heads} × {head_size}"),
                );
            }
        }
    }
}

#[test]
fn a_barrier_left_out_of_decoding_is_noticed() {
    // In the maximum and in the sum; after the warps' values.
    for barrier in 0..3 {
        let told = ORDERS.into_iter().any(|order| {
            let mut problem = Problem::new(15, (1, 64), Dtype::F16, &[(1, 200)]);
            let emulation = Emulation {
                order,
                dropped_barrier: Some(barrier),
            };
            let found = decode(&mut problem, emulation);
            found.map_or(true, |found| {
                !is_close(&found, &problem.attended(true), 1e-5)
            })
        });
        assert!(told, "barrier {barrier} may be left out unnoticed");
    }
}

/// A key whose score is not a number makes its head's row so; no finite weight comes of it.
#[test]
fn what_is_not_a_number_stays_so() {
    for format in [Dtype::F32, Dtype::F16] {
        let (heads, head_size) = (2, 64);
        let mut problem = Problem::new(17, (heads, head_size), format, &[(1, 300)]);
        problem.qkv[heads * head_size + 5] = NOT_A_NUMBER;
        problem.append_all();
        let wanted = problem.attended(true);
        let told = |found: &[f32], what: &str| {
            let (first, second) = found[..heads * head_size].split_at(head_size);
            assert!(first.iter().all(|v| v.is_nan()), "{what}: {first:?}");
            close(second, &wanted[head_size..][..head_size], 1e-5, what);
        };
        let name = format!("attend_prefill_{}", format.name());
        let (case, out) = problem.case(&name, |s| s.rows.div_ceil(16));
        for found in in_every_order(&[case]) {
            told(&floats(&found[0][out]), &name);
        }
        let emulation = Emulation {
            order: ORDERS[0],
            dropped_barrier: None,
        };
        let found = decode(&mut problem, emulation).unwrap_or_else(|said| panic!("{said}"));
        told(&found, "decode");
    }
}

/// Prompts again, without each of some barriers in turn.
fn barriers_of_prompts(name: &str, tile: usize, barriers: (usize, usize), tolerance: f32) {
    let mut problem = Problem::new(16, (1, 64), Dtype::F16, &[(tile, tile)]);
    problem.append_all();
    let (case, out) = problem.case(name, |s| s.rows.div_ceil(tile));
    let wanted = problem.attended(false);
    let (first, barriers) = barriers;
    for barrier in first..barriers {
        let told = ORDERS.into_iter().any(|order| {
            let emulation = Emulation {
                order,
                dropped_barrier: Some(barrier),
            };
            run(std::slice::from_ref(&case), emulation).map_or(true, |found| {
                !is_close(&floats(&found[0][out]), &wanted, tolerance)
            })
        });
        assert!(told, "{name}: barrier {barrier} may be left out unnoticed");
    }
}

#[test]
fn a_barrier_left_out_of_prompts_is_noticed() {
    // The very first of the plain kernel protects nothing yet.
    barriers_of_prompts("attend_prefill_f16", 16, (1, 8), 1e-5);
    barriers_of_prompts("attend_prefill_mma_f16_64", 64, (0, 4), 4e-3);
}
