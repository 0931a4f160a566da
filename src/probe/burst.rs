//! Short bursts of one lane's work: what the machine gives at this moment, beside what its profile
//! says. They bracket measured runs, so that a neighbour's noise can be told from a wrong prediction.

use super::ProbeError;
use super::bench::Bench;
use super::products::met_again_s;
use super::samples::Series;
use super::scale::{DiskStep, Extent};
use crate::cost::rates::Rates;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::cpu::kernels::Isa;
use crate::machine::disk::{DiskFile, IoPool, IoRequest};
use crate::tier::Tier;
use crate::units::MIB;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Inputs and outputs of a burst's product, for few rows and for many: shapes of the probe's own grid. A
/// call must be short, so that a burst is many samples, each as long as the probe's. Their mean counts: a run pays for
/// what interrupts it, too.
const SHAPES: [(usize, usize); 2] = [(8192, 2048), (1024, 4096)];
const MANY_ROWS: usize = 64;
const SAMPLES: usize = 30;
/// Bytes of one read or write of a burst, and how many there are.
const READ_BYTES: u64 = 16 * MIB;
const READS: u64 = 24;
const WRITE_BYTES: u64 = 4 * MIB;
const WRITES: u64 = 8;

static EXTENT: Extent = Extent {
    rounds: 1,
    write_rounds: 0,
    limit_s: 1.0,
    arena_bytes: 192 * MIB,
    cache_multiple: 24,
    gemm_rows: &[512],
    gemm_shapes: &SHAPES,
    near_rows: &[],
    near_shape: SHAPES[0],
    sample_s: 0.008,
    reads: &[],
    writes: &[DiskStep {
        block_bytes: WRITE_BYTES,
        depth: 1,
        repeats: WRITES,
    }],
    race_shape: SHAPES[1],
    race_rows: [1, 1],
    window_s: 0.0,
    window_write_bytes: 0,
    small_write_bytes: 0,
    decode_tokens: &[],
    decode_hidden: &[],
    prompt_tokens: &[],
};

/// One lane's work in small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Burst {
    /// A product of `rows` rows with weights in DRAM, and as many more with the same as make it `times`.
    Product {
        format: Dtype,
        arithmetic: Arithmetic,
        rows: usize,
        #[serde(default = "once")]
        times: usize,
    },
    Read,
    /// Overwriting, as a spill file sees it.
    Write,
}

fn once() -> usize {
    1
}

/// Where bursts work.
pub struct BurstPlace<'a> {
    pub threads: usize,
    /// Read from, with whole mebibytes; never written.
    pub store: &'a Path,
    /// Written to, in a file without a name.
    pub spill: &'a Path,
    pub rates: &'a Rates,
    pub stop: &'a AtomicBool,
}

/// Bytes that bursts hold while they last.
pub fn burst_bytes() -> u64 {
    Bench::most_bytes(&EXTENT)
}

/// Bursts whose memory, `burst_bytes()`, stays where it is for as long as this lives. Where a host takes back what
/// a guest has freed, it does so seconds later and stops the guest meanwhile: who frees memory before a run
/// measures that too.
pub struct Bursts<'a> {
    bench: Bench<'a>,
    place: &'a BurstPlace<'a>,
}

impl<'a> Bursts<'a> {
    pub fn new(place: &'a BurstPlace<'a>) -> Result<Bursts<'a>, ProbeError> {
        let pools = (place.threads, Isa::detect());
        let bench = Bench::new(&EXTENT, burst_bytes(), pools, place.stop)?;
        Ok(Bursts { bench, place })
    }

    /// Seconds of each burst ÷ the seconds that the rates price it at: 1 = as profiled, 2 = half as fast.
    pub fn slowdowns(&mut self, bursts: &[Burst]) -> Result<Vec<f64>, ProbeError> {
        let one = |&burst: &Burst| slowdown(burst, &mut self.bench, self.place);
        bursts.iter().map(one).collect()
    }
}

fn slowdown(burst: Burst, bench: &mut Bench, place: &BurstPlace) -> Result<f64, ProbeError> {
    let (took_s, priced_s) = match burst {
        Burst::Product {
            format,
            arithmetic,
            rows,
            times,
        } => product((format, arithmetic, rows), times, (bench, place))?,
        Burst::Read => read(bench, place)?,
        Burst::Write => write(bench, place)?,
    };
    Ok(took_s / priced_s.max(1e-12))
}

/// (seconds taken, seconds priced) of a product as the probe measures it.
fn product(
    product: (Dtype, Arithmetic, usize),
    times: usize,
    (bench, place): (&mut Bench, &BurstPlace),
) -> Result<(f64, f64), ProbeError> {
    let (format, arithmetic, rows) = product;
    // What is met again must fit in a cache.
    let (inputs, outputs) = SHAPES[usize::from(rows >= MANY_ROWS || times > 1)];
    let mut took_s = Series::default();
    for _ in 0..SAMPLES {
        took_s.push(met_again_s(bench, product, (inputs, outputs), times)?);
    }
    let stored = (format, arithmetic);
    let one_s = place.rates.gemm_s(Tier::Cpu, stored, rows, inputs, outputs);
    let again = place.rates.near_part(Tier::Cpu, stored, (rows as f64, 0.0));
    let priced_s = one_s * (1.0 + (times - 1) as f64 * again);
    Ok((took_s.mean().unwrap_or(priced_s), priced_s))
}

/// (seconds taken, seconds priced) of reads through the store.
fn read(bench: &mut Bench, place: &BurstPlace) -> Result<(f64, f64), ProbeError> {
    let file = DiskFile::open_read(place.store)?;
    let pool = IoPool::new(4)?;
    let block = READ_BYTES.min(file.len_bytes()? / MIB * MIB).max(MIB);
    let last = file.len_bytes()?.saturating_sub(block) / MIB;
    let mut took_s = Series::default();
    for number in 0..READS {
        // Far apart, so that nothing that looks ahead gets it right.
        let offset = (number * 7919 * 16) % (last + 1) * MIB;
        let place = bench.rotate_pages(block as usize);
        let target = &mut bench.arena[place..place + block as usize];
        let begin = Instant::now();
        pool.run(&mut [IoRequest::read(&file, offset, target)])?;
        took_s.push(begin.elapsed().as_secs_f64());
    }
    let priced_s = place.rates.disk_read_s(block as f64, block as f64);
    Ok((took_s.mean().unwrap_or(priced_s), priced_s))
}

fn write(bench: &mut Bench, place: &BurstPlace) -> Result<(f64, f64), ProbeError> {
    let file = DiskFile::create_unlinked(place.spill, WRITES * WRITE_BYTES)?;
    let pool = IoPool::new(4)?;
    let mut took_s = Series::default();
    // The first pass makes the file's blocks.
    for number in 0..4 * WRITES {
        let source = &bench.arena[..WRITE_BYTES as usize];
        let offset = number % WRITES * WRITE_BYTES;
        let begin = Instant::now();
        pool.run(&mut [IoRequest::write(&file, offset, source)])?;
        if number >= WRITES {
            took_s.push(begin.elapsed().as_secs_f64());
        }
    }
    let each = WRITE_BYTES as f64;
    let priced_s = place.rates.disk_write_s(each, each, false);
    Ok((took_s.mean().unwrap_or(priced_s), priced_s))
}
