//! Short bursts of one lane's work, alone or beside another's: what the machine gives at this moment, beside what its
//! profile says. They bracket measured runs, so that a neighbour's noise can be told from a wrong prediction.

use super::ProbeError;
use super::bench::Bench;
use super::calls::{CallSize, Calls, Reads, WRITE_CALL_BYTES};
use super::contention::{Turn, Window};
use super::products::{Meeting, matrix_bytes, meeting_s, product_step};
use super::samples::Series;
use super::scale::Extent;
use crate::cost::load::Load;
use crate::cost::rates::Rates;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::cpu::kernels::Isa;
use crate::tier::{Lane, Tier};
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
/// Bytes that a burst reads or writes, as far as its calls are neither fewer nor more than these.
const READ_BYTES: u64 = 384 * MIB;
const WRITE_BYTES: u64 = 96 * MIB;
const CALLS: [u64; 2] = [24, 240];

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
    writes: &[],
    race_shape: SHAPES[1],
    race_rows: [1, 1],
    window_s: 0.25,
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
    Product(Products),
    /// A read of 16 MiB: what saved rows of earlier versions have.
    Read,
    Reads(Reads),
    /// Overwriting 4 MiB: what saved rows of earlier versions have.
    Write,
    Writes(CallSize),
    /// Products while the disk reads, and reads while the CPU multiplies.
    ProductBeside(Products, Reads),
    ReadsBeside(Reads, Products),
}

/// Products of `rows` rows with weights in DRAM, and as many more with the same as make it `times`; from one
/// time to the next so many bytes pass (0: one product's alone).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Products {
    pub format: Dtype,
    pub arithmetic: Arithmetic,
    pub rows: usize,
    #[serde(default = "once")]
    pub times: usize,
    #[serde(default)]
    pub passed_bytes: u64,
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

fn one(request_bytes: u64) -> CallSize {
    CallSize {
        request_bytes,
        requests: 1,
    }
}

fn slowdown(burst: Burst, bench: &mut Bench, place: &BurstPlace) -> Result<f64, ProbeError> {
    let old_read = Reads {
        spilled: false,
        size: one(16 * MIB),
    };
    let (took_s, priced_s) = match burst {
        Burst::Product(products) => multiplied(products, (bench, place))?,
        Burst::Read => read(old_read, (bench, place))?,
        Burst::Reads(reads) => read(reads, (bench, place))?,
        Burst::Write => written(one(WRITE_CALL_BYTES), (bench, place))?,
        Burst::Writes(size) => written(size, (bench, place))?,
        Burst::ProductBeside(products, reads) => both((products, reads), (bench, place))?[0],
        Burst::ReadsBeside(reads, products) => both((products, reads), (bench, place))?[1],
    };
    Ok(took_s / priced_s.max(1e-12))
}

impl Products {
    fn product(&self) -> (Dtype, Arithmetic, usize) {
        (self.format, self.arithmetic, self.rows)
    }

    fn shape(&self) -> (usize, usize) {
        // What is met again must fit in a cache.
        SHAPES[usize::from(self.rows >= MANY_ROWS || self.times > 1)]
    }

    /// As many matrices as make the bytes that pass, at most a part of `room_bytes`.
    fn meeting(&self, room_bytes: usize) -> Meeting {
        let each_bytes = matrix_bytes(self.format, self.shape());
        let most = (room_bytes / 2 / each_bytes).max(1);
        Meeting {
            matrices: (self.passed_bytes as usize / each_bytes).clamp(1, most),
            times: self.times,
        }
    }

    /// (bytes that are read from DRAM, seconds) of a meeting.
    fn priced(&self, meeting: Meeting, rates: &Rates) -> (f64, f64) {
        let (stored, shape) = ((self.format, self.arithmetic), self.shape());
        let bytes = (meeting.matrices * matrix_bytes(self.format, shape)) as f64;
        let one_s = rates.gemm_s(Tier::Cpu, stored, self.rows, shape.0, shape.1);
        let met = (self.rows as f64, bytes);
        let part = rates.met_part(Tier::Cpu, stored, met, meeting.times as f64);
        (
            bytes,
            (meeting.matrices * meeting.times) as f64 * part * one_s,
        )
    }
}

/// (seconds taken, seconds priced) of products as the probe measures them.
fn multiplied(
    products: Products,
    (bench, place): (&mut Bench, &BurstPlace),
) -> Result<(f64, f64), ProbeError> {
    let meeting = products.meeting(bench.arena.len());
    let mut took_s = Series::default();
    for _ in 0..SAMPLES {
        let product = (products.product(), products.shape());
        took_s.push(meeting_s(bench, product, meeting, None)?);
    }
    let (_, priced_s) = products.priced(meeting, place.rates);
    Ok((took_s.mean().unwrap_or(priced_s), priced_s))
}

/// (seconds taken, seconds priced) of a call that reads.
fn read(reads: Reads, (bench, place): (&mut Bench, &BurstPlace)) -> Result<(f64, f64), ProbeError> {
    let calls = Calls::reading(reads, bench, (place.store, place.spill))?;
    let priced_s = read_s(calls.size, place.rates);
    Ok((calls_s(bench, calls, READ_BYTES)?, priced_s))
}

fn read_s(size: CallSize, rates: &Rates) -> f64 {
    rates.disk_read_s(size.bytes() as f64, size.request_bytes as f64)
}

/// (seconds taken, seconds priced) of a call that writes to what is there already.
fn written(
    size: CallSize,
    (bench, place): (&mut Bench, &BurstPlace),
) -> Result<(f64, f64), ProbeError> {
    let calls = Calls::writing(size, bench, place.spill)?;
    let (bytes, each) = (calls.size.bytes() as f64, calls.size.request_bytes as f64);
    let priced_s = place.rates.disk_write_s(bytes, each, false);
    Ok((calls_s(bench, calls, WRITE_BYTES)?, priced_s))
}

/// Mean seconds of a call.
fn calls_s(bench: &mut Bench, mut calls: Calls, all_bytes: u64) -> Result<f64, ProbeError> {
    let call_bytes = calls.size.bytes();
    let mut took_s = Series::default();
    for _ in 0..(all_bytes / call_bytes).clamp(CALLS[0], CALLS[1]) {
        bench.check_stop()?;
        let at = bench.rotate_pages(call_bytes as usize);
        let begin = Instant::now();
        calls.call(&mut bench.arena[at..at + call_bytes as usize])?;
        took_s.push(begin.elapsed().as_secs_f64());
    }
    Ok(took_s.mean().unwrap_or(0.0))
}

/// (seconds taken, seconds priced) of products and of a call that reads, while both go on.
fn both(
    (products, reads): (Products, Reads),
    (bench, place): (&mut Bench, &BurstPlace),
) -> Result<[(f64, f64); 2], ProbeError> {
    bench.check_stop()?;
    let mut calls = Calls::reading(reads, bench, (place.store, place.spill))?;
    let half = bench.arena.len() / 2 / MIB as usize * MIB as usize;
    let meeting = products.meeting(half);
    let priced_s = both_priced_s((products, meeting), &calls, place.rates);
    let (window, mut turn) = (Window::new(bench), Turn::default());
    let (weights, targets) = bench.arena.split_at_mut(half);
    let (task, product) = (
        (&bench.pool, bench.isa),
        (products.product(), products.shape()),
    );
    let mut multiply = product_step(task, weights, &mut bench.outputs, product, meeting);
    let per_s = window.run_both(
        Box::new(move || multiply().map(Some)),
        Box::new(move || {
            let place = turn.next(calls.size.bytes() as usize, targets.len());
            calls.call(&mut targets[place]).map(Some)
        }),
    )?;
    Ok([(1.0 / per_s.0, priced_s[0]), (1.0 / per_s.1, priced_s[1])])
}

/// Seconds of a meeting and of a call, each beside the other.
fn both_priced_s(
    (products, meeting): (Products, Meeting),
    calls: &Calls,
    rates: &Rates,
) -> [f64; 2] {
    let (_, product_s) = products.priced(meeting, rates);
    let [products_keep, reads_keep] = kept((products, meeting), calls.size, rates);
    [
        product_s / products_keep,
        read_s(calls.size, rates) / reads_keep,
    ]
}

/// What products with weights in DRAM and reads are said to keep of their rates beside each other.
pub fn said_to_keep(products: Products, reads: CallSize, rates: &Rates) -> [f64; 2] {
    kept((products, Meeting::ONCE), reads, rates)
}

fn kept((products, meeting): (Products, Meeting), reads: CallSize, rates: &Rates) -> [f64; 2] {
    let (bytes, product_s) = products.priced(meeting, rates);
    let size = (reads.bytes() as f64, reads.request_bytes as f64);
    let computing = Load::computing(rates.memory_part(bytes, product_s));
    let reading = Load::of_disk(Lane::DiskToCpu, read_s(reads, rates), size);
    let lanes = [(Lane::CpuCompute, computing), (Lane::DiskToCpu, reading)];
    lanes.map(|lane| rates.keep(lane, &lanes))
}
