//! Kernel rates beside the machine's own ceilings, measured in the same run, just before each section and
//! after it: products against the peak of their arithmetic, streams against DRAM reads. A section is void when a
//! ceiling has changed by more than a fifth from its beginning to its end, or is under 0.8 of what the machine is
//! known to give. `cargo bench --bench kernels [-- WORDS]`
//! runs the sections whose name contains one of the words; `threads=N` among them sets the threads,
//! `isa=avx512_bf16` the instruction set.

use loadmaster::dtype::{Arithmetic, Compute, Dtype, panels};
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::cpu::kernels::*;
use loadmaster::machine::cpu::pool::Pool;
use std::cell::Cell;
use std::time::Instant;

/// Larger than any cache here, so that weights and KV come from DRAM, and than the largest matrix of OPT in fp32 but
/// those of opt-175b.
const STREAM_BYTES: usize = 1 << 30;

type Section = fn(&Bench);

/// A section whose ceilings before and after differ by more says nothing of its kernels.
const STEADY: f64 = 0.2;

struct Bench {
    pool: Pool,
    isa: Isa,
    memory: AlignedBuffer,
    ceilings: Cell<Ceilings>,
}

/// What the machine can do at this moment.
#[derive(Clone, Copy)]
struct Ceilings {
    /// By `Arithmetic`.
    peaks: [f64; 3],
    read_bytes_per_s: f64,
}

impl Ceilings {
    fn of(self, arithmetic: Arithmetic) -> f64 {
        self.peaks[arithmetic as usize]
    }

    fn all(self) -> [f64; 4] {
        let [fma, bf16, int8] = self.peaks;
        [fma, bf16, int8, self.read_bytes_per_s]
    }

    /// The largest change of one of them.
    fn change(self, before: Ceilings) -> f64 {
        let pairs = self.all().into_iter().zip(before.all());
        pairs.fold(0.0, |most, (now, before)| {
            f64::max(most, (now - before).abs() / now.max(before))
        })
    }
}

/// The best of at least five runs and 0.3 s of them: what the kernel can do beside other work on the
/// machine. What the first run left in the caches is not what the second one reads. With threads=1 it is
/// the mean of the CPU seconds, which other processes disturb less.
fn seconds(mut work: impl FnMut(usize)) -> f64 {
    work(0);
    let (start, used, mut times) = (Instant::now(), cpu_s(), Vec::new());
    while times.len() < 5 || start.elapsed().as_secs_f64() < 0.3 {
        let one = Instant::now();
        work(times.len() + 1);
        times.push(one.elapsed().as_secs_f64());
    }
    if option("threads=") == Some(1) {
        return (cpu_s() - used) / times.len() as f64;
    }
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// Memory as the engine has it: on whole pages, large ones of huge pages.
fn buffer(bytes: usize) -> AlignedBuffer {
    AlignedBuffer::new(bytes as u64).expect("there is memory")
}

/// Bytes that are finite in every format: fp16 pairs of small values.
fn filler(bytes: usize) -> AlignedBuffer {
    let mut memory = buffer(bytes);
    for (i, pair) in memory.as_mut_slice_of::<[u8; 2]>().iter_mut().enumerate() {
        *pair = [(i * 37) as u8, 0x2c | (i % 2 * 0x80) as u8];
    }
    memory
}

/// `count` numbers, repeating after `period`.
fn numbers(count: usize, period: usize) -> AlignedBuffer {
    let mut memory = buffer(4 * count);
    for (i, number) in memory.as_mut_slice_of::<f32>().iter_mut().enumerate() {
        *number = (i % period) as f32 / period as f32;
    }
    memory
}

/// CPU seconds of this thread so far.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let on_cpu_ns: Option<f64> = text.split(' ').next().and_then(|ns| ns.parse().ok());
    on_cpu_ns.unwrap_or(f64::NAN) / 1e9
}

/// The number behind `name` among the arguments.
fn option(name: &str) -> Option<usize> {
    std::env::args().find_map(|word| word.strip_prefix(name)?.parse().ok())
}

/// `isa=avx2`: another than the fastest.
fn isa() -> Isa {
    let asked = std::env::args().find_map(|word| Some(word.strip_prefix("isa=")?.to_owned()));
    let Some(asked) = asked else {
        return Isa::detect();
    };
    let all = Isa::available();
    let names: Vec<&str> = all.iter().map(|isa| isa.name()).collect();
    let found = names.iter().position(|&name| name == asked);
    all[found.unwrap_or_else(|| panic!("isa={asked}: this machine has {}", names.join(", ")))]
}

/// `rows=96,349`: rows of x instead of the usual ones.
fn row_counts() -> Vec<usize> {
    let asked = std::env::args().find_map(|word| Some(word.strip_prefix("rows=")?.to_owned()));
    match asked {
        Some(list) => list.split(',').filter_map(|m| m.parse().ok()).collect(),
        None => vec![1, 4, 8, 16, 32, 64, 128, 512],
    }
}

/// `shapes=1024x4096,4096x1024`: inputs and outputs to be measured instead of the usual ones.
fn shapes() -> Vec<(usize, usize)> {
    let of = |pair: &str| {
        let (inputs, outputs) = pair.split_once('x')?;
        Some((inputs.parse().ok()?, outputs.parse().ok()?))
    };
    let asked = std::env::args().find_map(|word| Some(word.strip_prefix("shapes=")?.to_owned()));
    match asked {
        Some(list) => list.split(',').filter_map(of).collect(),
        None => vec![
            (2048, 2048),
            (2048, 8192),
            (8192, 2048),
            (7168, 7168),
            (7168, 28672),
            (28672, 7168),
        ],
    }
}

impl Bench {
    fn new() -> Bench {
        let all = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = option("threads=").unwrap_or(all);
        let ceilings = Ceilings {
            peaks: [0.0; 3],
            read_bytes_per_s: 0.0,
        };
        let bench = Bench {
            pool: Pool::new(threads),
            isa: isa(),
            memory: filler(STREAM_BYTES),
            ceilings: Cell::new(ceilings),
        };
        println!("{} on {threads} threads", bench.isa.name());
        bench
    }

    /// Measures the ceilings.
    fn measure_ceilings(&self) {
        let arithmetics = [Arithmetic::Fp32, Arithmetic::Bf16, Arithmetic::Int8];
        let peaks = arithmetics.map(|arithmetic| {
            let mut done = 0.0;
            let s = seconds(|_| done = multiply_peak(&self.pool, self.isa, arithmetic, 500_000));
            done / s
        });
        let read_s = seconds(|_| {
            std::hint::black_box(memory_read_sum(&self.pool, self.isa, &self.memory));
        });
        let read_bytes_per_s = STREAM_BYTES as f64 / read_s;
        println!(
            "ceilings: FMA {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} Gop/s, DRAM read {:.1} GB/s",
            peaks[0] / 1e9,
            peaks[1] / 1e9,
            peaks[2] / 1e9,
            read_bytes_per_s / 1e9,
        );
        self.ceilings.set(Ceilings {
            peaks,
            read_bytes_per_s,
        });
    }

    fn gemm(
        &self,
        (format, arithmetic): (Dtype, Arithmetic),
        (inputs, rows): (usize, usize),
        m: usize,
    ) {
        let bytes = panels(rows) * format.panel_bytes(inputs) as usize;
        let x = numbers(m * inputs, 13);
        let mut out = buffer(4 * m * rows);
        let copies = STREAM_BYTES / bytes;
        assert!(
            copies > 0,
            "{inputs}x{rows} takes more than 1 GiB: ask for a smaller shape"
        );
        let s = seconds(|run| {
            let weights = &self.memory[run % copies * bytes..][..bytes];
            let (bias, activation) = (None, Activation::None);
            gemm(
                &self.pool,
                self.isa,
                GemmArgs {
                    x: x.as_slice_of(),
                    ldx: inputs,
                    m,
                    inputs,
                    weights,
                    format,
                    arithmetic,
                    rows,
                    bias,
                    activation,
                    out: out.as_mut_slice_of(),
                    ldo: rows,
                },
            );
        });
        let (flops, streamed) = (2.0 * (m * inputs * rows) as f64 / s, bytes as f64 / s);
        println!(
            "gemm {:>4} {arithmetic:?} {inputs:>5}->{rows:<5} M={m:<4} {:>8.3} ms {:>6.0} GFLOP/s ({:>3.0} %) {:>5.1} GB/s ({:>3.0} %)",
            format.name(),
            s * 1e3,
            flops / 1e9,
            100.0 * flops / self.ceilings.get().of(arithmetic),
            streamed / 1e9,
            100.0 * streamed / self.ceilings.get().read_bytes_per_s,
        );
    }

    fn gemms(&self, format: Dtype, compute: Compute) {
        let arithmetic = compute.arithmetic(format);
        for shape in shapes() {
            for m in row_counts() {
                self.gemm((format, arithmetic), shape, m);
            }
        }
    }

    fn pack(&self, from: Dtype, format: Dtype) {
        let (rows, inputs) = (4096, 4096);
        let source = &self.memory[..rows * from.row_bytes(inputs) as usize];
        let mut out = vec![0; panels(rows) * format.panel_bytes(inputs) as usize];
        let s = seconds(|_| {
            let source = PackSource {
                bytes: source,
                dtype: from,
                rows,
                inputs,
            };
            pack_panels(&self.pool, self.isa, source, format, &mut out);
        });
        println!(
            "pack {:>4} -> {:<4} {:>6.2} GB/s of source",
            from.name(),
            format.name(),
            source.len() as f64 / s / 1e9
        );
    }

    fn packs(&self) {
        self.pack(Dtype::F16, Dtype::F16);
        self.pack(Dtype::F32, Dtype::F32);
        self.pack(Dtype::F16, Dtype::Q4);
    }

    /// Decoding `sequences` with `past` tokens each; reads [K | V] records once.
    fn decode(
        &self,
        format: Dtype,
        (heads, head_size): (usize, usize),
        (sequences, past): (usize, usize),
        memory: &[u8],
    ) {
        let hidden = heads * head_size;
        let qkv = numbers(sequences * 3 * hidden, 7);
        let mut out = buffer(4 * sequences * hidden);
        let used = sequences * (past + 1) * kv::record_bytes(format, hidden);
        let item = |s: usize, run: usize| {
            let from = run % (memory.len() / used) * used;
            let kv = KvView {
                bytes: &memory[from..],
                slots: Slots::Contiguous {
                    first: s * (past + 1),
                },
            };
            AttendItem {
                first_row: s,
                q_rows: 1,
                past,
                decode: true,
                kv,
            }
        };
        let s = seconds(|run| {
            let items: Vec<AttendItem> = (0..sequences).map(|s| item(s, run)).collect();
            attend(
                &self.pool,
                self.isa,
                AttendArgs {
                    qkv: qkv.as_slice_of(),
                    ld: 3 * hidden,
                    heads,
                    head_size,
                    format,
                    items: &items,
                    out: out.as_mut_slice_of(),
                    ldo: hidden,
                },
            );
        });
        let bytes = used as f64 / s;
        println!(
            "decode {:>4} heads {heads}x{head_size:<3} {sequences:>3} x {past:<5} {:>8.3} ms {:>5.1} GB/s ({:.0} %)",
            format.name(),
            s * 1e3,
            bytes / 1e9,
            100.0 * bytes / self.ceilings.get().read_bytes_per_s
        );
    }

    fn decodes(&self) {
        for format in [Dtype::F16, Dtype::Q4, Dtype::F32] {
            self.decode(format, (32, 128), (1, 2047), &self.memory);
            self.decode(format, (32, 64), (1, 2047), &self.memory);
            self.decode(format, (32, 64), (4, 511), &self.memory);
            self.decode(format, (32, 80), (4, 511), &self.memory);
            self.decode(format, (32, 128), (16, 511), &self.memory);
        }
    }

    /// The same of 4-bit KV from the second cache: what the arithmetic alone can do.
    fn decodes_cached(&self) {
        for shape in [(16, 64), (16, 80), (8, 128)] {
            self.decode(Dtype::Q4, shape, (1, 511), &self.memory[..1 << 20]);
        }
    }

    fn prefill(&self, format: Dtype, (heads, head_size): (usize, usize), tokens: usize) {
        let hidden = heads * head_size;
        let qkv = numbers(tokens * 3 * hidden, 7);
        let mut out = buffer(4 * tokens * hidden);
        let kv = KvView {
            bytes: &self.memory,
            slots: Slots::Contiguous { first: 0 },
        };
        let items = [AttendItem {
            first_row: 0,
            q_rows: tokens,
            past: 0,
            decode: false,
            kv,
        }];
        let s = seconds(|_| {
            attend(
                &self.pool,
                self.isa,
                AttendArgs {
                    qkv: qkv.as_slice_of(),
                    ld: 3 * hidden,
                    heads,
                    head_size,
                    format,
                    items: &items,
                    out: out.as_mut_slice_of(),
                    ldo: hidden,
                },
            );
        });
        // Two products over the keys that are visible.
        let flops = 4.0 * hidden as f64 * (tokens * (tokens + 1) / 2) as f64 / s;
        println!(
            "prefill {:>4} heads {heads}x{head_size:<3} {tokens:>4} tokens {:>8.3} ms {:>5.0} GFLOP/s ({:.0} %)",
            format.name(),
            s * 1e3,
            flops / 1e9,
            100.0 * flops / self.ceilings.get().of(Arithmetic::Fp32)
        );
    }

    fn prefills(&self) {
        for format in [Dtype::F16, Dtype::Q4] {
            for shape in [(32, 64), (32, 80), (32, 128)] {
                self.prefill(format, shape, 512);
                self.prefill(format, shape, 2048);
            }
        }
    }

    fn small(&self) {
        let (m, width) = (64, 4096);
        let x: Vec<f32> = (0..m * width).map(|i| (i % 101) as f32).collect();
        let mut out = vec![0.0; m * width];
        for m in [1, 64] {
            let s = seconds(|_| {
                let (rows, weight, bias, eps) = (None, Some(&x[..width]), Some(&x[..width]), 1e-5);
                layer_norm(
                    &self.pool,
                    self.isa,
                    NormArgs {
                        x: &x,
                        rows,
                        m,
                        width,
                        weight,
                        bias,
                        eps,
                        out: &mut out,
                    },
                );
            });
            println!("layer norm {m} x {width}: {:.1} us", s * 1e6);
        }
        let s = seconds(|_| {
            self.pool.run(self.pool.threads(), &|part| {
                std::hint::black_box(part);
            });
        });
        println!("fork and join: {:.2} us", s * 1e6);
        for format in [Dtype::F16, Dtype::Q4] {
            let mut bytes = vec![0; m * kv::record_bytes(format, width / 4)];
            let s = seconds(|_| {
                let (hidden, slots) = (width / 4, Slots::Contiguous { first: 0 });
                append_kv(
                    &self.pool,
                    self.isa,
                    AppendArgs {
                        qkv: &x,
                        ld: width,
                        first_row: 0,
                        count: m,
                        hidden,
                        format,
                        bytes: &mut bytes,
                        slots,
                    },
                );
            });
            println!(
                "append {}: {:.2} GB/s of f32",
                format.name(),
                (m * width * 2) as f64 / s / 1e9
            );
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-') && !word.contains('='))
        .collect();
    let bench = Bench::new();
    let sections: [(&str, Section); 10] = [
        ("gemm-f16", |b| b.gemms(Dtype::F16, Compute::Exact)),
        ("gemm-bf16", |b| b.gemms(Dtype::F16, Compute::Bf16)),
        ("gemm-int8", |b| b.gemms(Dtype::Q4, Compute::Exact)),
        ("gemm-q4-fp32", |b| b.gemms(Dtype::Q4, Compute::Fp32)),
        ("gemm-f32", |b| b.gemms(Dtype::F32, Compute::Exact)),
        ("pack", Bench::packs),
        ("decode", Bench::decodes),
        ("cached", Bench::decodes_cached),
        ("prefill", Bench::prefills),
        ("small", Bench::small),
    ];
    for (name, section) in sections {
        if words.is_empty() || words.iter().any(|word| name.contains(word.as_str())) {
            println!("-- {name}");
            bench.measure_ceilings();
            let before = bench.ceilings.get();
            section(&bench);
            bench.measure_ceilings();
            let change = bench.ceilings.get().change(before);
            if change > STEADY {
                println!("-- VOID: a ceiling changed by {:.0} %", 100.0 * change);
            }
        }
    }
}
