//! Short bursts of one lane's work: what the machine gives at this moment, beside what its profile
//! says. They bracket measured runs, so that a neighbour's noise can be told from a wrong prediction.

use super::ProbeError;
use super::bench::Bench;
use super::products::met_again_s;
use super::samples::Series;
use super::scale::{DiskStep, Extent};
use crate::cost::rates::Rates;
use crate::cost::requests::READ_THREADS;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::cpu::kernels::Isa;
use crate::machine::disk::{DiskFile, IoPool, IoRequest};
use crate::tier::Tier;
use crate::units::{MIB, PAGE_BYTES};
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
/// Bytes that a burst reads, as far as its calls are neither fewer nor more than these.
const READ_BYTES: u64 = 384 * MIB;
const READ_CALLS: [u64; 2] = [24, 240];
/// The most that one call reads.
pub const CALL_BYTES: u64 = 32 * MIB;
/// A file of this size is written to be read as a job's own spill files are.
const SPILL_BYTES: u64 = 64 * MIB;
/// Bytes of one write of a burst, and how many there are.
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
    /// A read of 16 MiB: what saved rows of earlier versions have.
    Read,
    /// Calls of so many requests, from the store, or from what was spilled just before.
    Reads {
        spilled: bool,
        request_bytes: u64,
        requests: u64,
    },
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
        Burst::Read => read((false, 16 * MIB, 1), (bench, place))?,
        Burst::Reads {
            spilled,
            request_bytes,
            requests,
        } => read((spilled, request_bytes, requests), (bench, place))?,
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

/// (seconds taken, seconds priced) of a call of so many requests.
fn read(
    (spilled, request_bytes, requests): (bool, u64, u64),
    (bench, place): (&mut Bench, &BurstPlace),
) -> Result<(f64, f64), ProbeError> {
    let file = match spilled {
        true => spilled_file(bench, place)?,
        false => DiskFile::open_read(place.store)?,
    };
    let pool = IoPool::new(READ_THREADS)?;
    let length = file.len_bytes()? / PAGE_BYTES * PAGE_BYTES;
    let each = request_bytes.min(length).max(PAGE_BYTES);
    let call_bytes = each * requests;
    let last = length.saturating_sub(each) / PAGE_BYTES;
    // Far apart, so that nothing that looks ahead gets it right.
    let offset = |number: u64| number * 7919 % (last + 1) * PAGE_BYTES;
    let mut took_s = Series::default();
    let count = (READ_BYTES / call_bytes).clamp(READ_CALLS[0], READ_CALLS[1]);
    for call in 0..count {
        let at = bench.rotate_pages(call_bytes as usize);
        let targets = bench.arena[at..at + call_bytes as usize].chunks_exact_mut(each as usize);
        let numbered = (call * requests..).zip(targets);
        let mut asked: Vec<IoRequest> = numbered
            .map(|(number, target)| IoRequest::read(&file, offset(number), target))
            .collect();
        let begin = Instant::now();
        pool.run(&mut asked)?;
        took_s.push(begin.elapsed().as_secs_f64());
    }
    let priced_s = place.rates.disk_read_s(call_bytes as f64, each as f64);
    Ok((took_s.mean().unwrap_or(priced_s), priced_s))
}

/// A file without a name, every byte of it written.
fn spilled_file(bench: &Bench, place: &BurstPlace) -> Result<DiskFile, ProbeError> {
    let file = DiskFile::create_unlinked(place.spill, SPILL_BYTES)?;
    let pool = IoPool::new(READ_THREADS)?;
    for offset in (0..SPILL_BYTES).step_by(WRITE_BYTES as usize) {
        let source = &bench.arena[..WRITE_BYTES as usize];
        pool.run(&mut [IoRequest::write(&file, offset, source)])?;
    }
    Ok(file)
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
