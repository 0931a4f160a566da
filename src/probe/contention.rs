//! What lanes cost each other: each lane alone, then two of them together, again and again.
//! A lane's step is its real work (a product on all threads, requests through the I/O pool).

use super::ProbeError;
use super::bench::Bench;
use super::disk::DiskArea;
use super::products::{Meeting, product_step};
use super::samples::Series;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::disk::{DiskError, IoRequest};
use crate::profile::{
    LARGE_REQUEST_BYTES, MEMORY_SUFFIX, SMALL_REQUEST_BYTES, SMALL_REQUESTS, SMALL_SUFFIX,
};
use crate::tier::Lane;
use crate::units::{MIB, PAGE_BYTES};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of one request of a disk lane while it shares the machine, where requests are large …
const REQUEST_BYTES: u64 = LARGE_REQUEST_BYTES as u64;
/// … and where they are small.
const SMALL_BYTES: u64 = SMALL_REQUEST_BYTES as u64;

/// A lane, and whether it is hard on others: its requests are small, its products are bound by memory.
type Kind = (Lane, bool);

const COMPUTE: Kind = (Lane::CpuCompute, false);
const MEMORY: Kind = (Lane::CpuCompute, true);
const READ: Kind = (Lane::DiskToCpu, false);
const WRITE: Kind = (Lane::CpuToDisk, false);
const SMALL_READ: Kind = (Lane::DiskToCpu, true);
const SMALL_WRITE: Kind = (Lane::CpuToDisk, true);
const PAIRS: [(Kind, Kind); 11] = [
    (COMPUTE, READ),
    (COMPUTE, WRITE),
    (READ, WRITE),
    (READ, SMALL_WRITE),
    (SMALL_READ, SMALL_WRITE),
    (COMPUTE, SMALL_READ),
    (COMPUTE, SMALL_WRITE),
    (MEMORY, READ),
    (MEMORY, WRITE),
    (MEMORY, SMALL_READ),
    (MEMORY, SMALL_WRITE),
];

/// What is done in one step; `None` when its quota is used up.
pub type Step<'a> = Box<dyn FnMut() -> Result<Option<()>, DiskError> + Send + 'a>;

/// What the lanes of each pair kept of the rates that they had alone in the same round: seconds ago, since memory
/// of shared machines is twice as fast in some minutes as in others.
#[derive(Default)]
pub struct ContentionArea {
    kept: [[Series; 2]; PAIRS.len()],
}

impl ContentionArea {
    /// Every lane alone once and every pair once; where no more is to be written, those that write nothing.
    pub fn round(
        &mut self,
        bench: &mut Bench,
        disk: &DiskArea,
        writes: bool,
    ) -> Result<(), ProbeError> {
        self.races(bench, disk, |pair| !is_writing(pair))?;
        match writes {
            true => self.races(bench, disk, is_writing),
            false => Ok(()),
        }
    }

    fn races(
        &mut self,
        bench: &mut Bench,
        disk: &DiskArea,
        chosen: fn(&(Kind, Kind)) -> bool,
    ) -> Result<(), ProbeError> {
        let pairs = || {
            PAIRS
                .into_iter()
                .enumerate()
                .filter(|(_, pair)| chosen(pair))
        };
        let lanes: BTreeSet<Kind> = pairs().flat_map(|(_, (a, b))| [a, b]).collect();
        let mut alone = BTreeMap::new();
        for lane in lanes {
            alone.insert(lane, run_alone(bench, disk, lane)?);
        }
        for (place, pair) in pairs() {
            let together = run_together(bench, disk, pair)?;
            self.enter(place, [alone[&pair.0], alone[&pair.1]], together.into());
        }
        Ok(())
    }

    /// One round's rates of a pair. A lane that did nothing alone says nothing.
    fn enter(&mut self, place: usize, alone: [f64; 2], together: [f64; 2]) {
        if alone.iter().all(|&rate| rate > 0.0) {
            for (lane, kept) in self.kept[place].iter_mut().enumerate() {
                kept.push(together[lane] / alone[lane]);
            }
        }
    }

    /// "cpu_compute+disk_to_cpu" = what each keeps of its rate, by kind (profile.rs). A lane gains nothing by company: what noise adds is cut off.
    pub fn shares(&self) -> BTreeMap<String, [f64; 2]> {
        let mut shares = BTreeMap::new();
        for ((first, second), kept) in PAIRS.iter().zip(&self.kept) {
            if let [Some(a), Some(b)] = kept.each_ref().map(part) {
                shares.insert(format!("{}+{}", name(*first), name(*second)), [a, b]);
            }
        }
        shares
    }
}

fn is_writing(pair: &(Kind, Kind)) -> bool {
    [pair.0, pair.1]
        .iter()
        .any(|kind| kind.0 == Lane::CpuToDisk)
}

fn part(kept: &Series) -> Option<f64> {
    let part = kept.median()?.clamp(0.01, 1.0);
    Some((part * 1000.0).round() / 1000.0)
}

fn name(lane: Kind) -> String {
    let suffix = match lane {
        (_, false) => "",
        (Lane::CpuCompute, true) => MEMORY_SUFFIX,
        (_, true) => SMALL_SUFFIX,
    };
    format!("{}{suffix}", lane.0.name())
}

fn run_alone(bench: &mut Bench, disk: &DiskArea, lane: Kind) -> Result<f64, ProbeError> {
    bench.check_stop()?;
    let window = Window::new(bench);
    let [step, _] = steps(bench, disk, [Some(lane), None]);
    match step {
        Some(step) => Ok(window.run(step)?),
        None => Ok(0.0),
    }
}

fn run_together(
    bench: &mut Bench,
    disk: &DiskArea,
    pair: (Kind, Kind),
) -> Result<(f64, f64), ProbeError> {
    bench.check_stop()?;
    let window = Window::new(bench);
    let [Some(first), Some(second)] = steps(bench, disk, [Some(pair.0), Some(pair.1)]) else {
        return Ok((0.0, 0.0));
    };
    Ok(window.run_both(first, second)?)
}

/// The steps of up to two lanes over disjoint halves of the arena.
fn steps<'a>(
    bench: &'a mut Bench,
    disk: &'a DiskArea,
    lanes: [Option<Kind>; 2],
) -> [Option<Step<'a>>; 2] {
    let half = bench.arena.len() / 2 / MIB as usize * MIB as usize;
    let (left, right) = bench.arena.split_at_mut(half);
    let mut outputs = Some(&mut bench.outputs);
    let mut halves = [Some(left), Some(right)];
    let mut place = 0;
    lanes.map(|lane| {
        let memory = halves[place].take();
        place += 1;
        match (lane?, memory?) {
            ((Lane::CpuCompute, memory_bound), memory) => {
                let task = (&bench.pool, bench.isa);
                let rows = bench.extent.race_rows[usize::from(!memory_bound)];
                let product = (
                    (Dtype::F16, Arithmetic::Fp32, rows),
                    bench.extent.race_shape,
                );
                let mut step = product_step(task, memory, outputs.take()?, product, Meeting::ONCE);
                let step: Step = Box::new(move || step().map(Some));
                Some(step)
            }
            ((Lane::DiskToCpu, small), memory) => Some(read_step(disk, memory, small)),
            ((_, small), memory) => {
                let quota_bytes = if small {
                    bench.extent.small_write_bytes
                } else {
                    bench.extent.window_write_bytes
                };
                Some(write_step(disk, memory, (small, quota_bytes)))
            }
        }
    })
}

/// Memory in turn: what a disk brings, or is given, lies in no cache. What always went to the same place would,
/// until products beside it take the cache.
#[derive(Default)]
pub struct Turn(usize);

impl Turn {
    /// The next so many bytes, from a page on, of a memory of so many.
    pub fn next(&mut self, bytes: usize, of_bytes: usize) -> Range<usize> {
        let begin = match self.0 + bytes <= of_bytes {
            true => self.0,
            false => 0,
        };
        self.0 = (begin + bytes).next_multiple_of(PAGE_BYTES as usize);
        begin..begin + bytes
    }
}

/// Bytes of one call, and of each of its requests.
fn call(disk: &DiskArea, memory: &[u8], small: bool) -> (u64, usize) {
    let room = disk.filled_bytes().min(memory.len() as u64);
    if small {
        (SMALL_BYTES * SMALL_REQUESTS as u64, SMALL_BYTES as usize)
    } else {
        (REQUEST_BYTES.min(room), REQUEST_BYTES as usize)
    }
}

fn read_step<'a>(disk: &'a DiskArea, memory: &'a mut [u8], small: bool) -> Step<'a> {
    let (bytes, each) = call(disk, memory, small);
    let (mut offset, mut turn) = (0, Turn::default());
    Box::new(move || {
        if offset + bytes > disk.filled_bytes() {
            offset = 0;
        }
        let place = turn.next(bytes as usize, memory.len());
        let parts = memory[place].chunks_mut(each).enumerate();
        let request = |(n, part)| IoRequest::read(&disk.file, offset + (n * each) as u64, part);
        disk.read_pool()
            .run(&mut parts.map(request).collect::<Vec<_>>())?;
        offset += bytes;
        Ok(Some(()))
    })
}

/// Overwrites, because that is what a spill file sees for most of its life.
fn write_step<'a>(
    disk: &'a DiskArea,
    memory: &'a [u8],
    (small, quota_bytes): (bool, u64),
) -> Step<'a> {
    let (bytes, each) = call(disk, memory, small);
    let bytes = bytes.min(quota_bytes);
    let (mut offset, mut written, mut turn) = (0, 0, Turn::default());
    Box::new(move || {
        if written + bytes > quota_bytes {
            return Ok(None);
        }
        if offset + bytes > disk.filled_bytes() {
            offset = 0;
        }
        let place = turn.next(bytes as usize, memory.len());
        let parts = memory[place].chunks(each).enumerate();
        let request = |(n, part)| IoRequest::write(&disk.file, offset + (n * each) as u64, part);
        disk.write_pool()
            .run(&mut parts.map(request).collect::<Vec<_>>())?;
        (offset, written) = (offset + bytes, written + bytes);
        Ok(Some(()))
    })
}

/// A stretch of time that lanes share, of steps that are alike: it ends for all when it is over, when one has used up its
/// quota, or when the probe is stopped.
pub struct Window<'a> {
    length: Duration,
    over: AtomicBool,
    stop: &'a AtomicBool,
}

impl<'a> Window<'a> {
    pub fn new(bench: &Bench<'a>) -> Window<'a> {
        Window {
            length: Duration::from_secs_f64(bench.extent.window_s),
            over: AtomicBool::new(false),
            stop: bench.stop,
        }
    }

    /// Steps per second of two lanes at once.
    pub fn run_both(&self, first: Step, second: Step) -> Result<(f64, f64), DiskError> {
        let (a, b) = std::thread::scope(|scope| {
            let beside = scope.spawn(|| self.run(second));
            (self.run(first), beside.join())
        });
        let b = b.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((a?, b?))
    }

    /// Steps per second of a lane within the window; at least one step is done.
    fn run(&self, mut step: Step) -> Result<f64, DiskError> {
        let (begin, mut work) = (Instant::now(), 0.0);
        let result = loop {
            match step() {
                Ok(Some(())) => work += 1.0,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
            if self.is_over(begin) {
                break Ok(());
            }
        };
        let seconds = begin.elapsed().as_secs_f64();
        self.over.store(true, Ordering::Relaxed);
        result.map(|()| work / seconds)
    }

    fn is_over(&self, begin: Instant) -> bool {
        let flags = [&self.over, self.stop];
        begin.elapsed() >= self.length || flags.iter().any(|flag| flag.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_keeps_a_part_and_never_more_than_all() {
        let mut area = ContentionArea::default();
        area.enter(0, [100.0, 10.0], [80.0, 12.0]);
        // Memory is half as fast in these rounds, and one of them is disturbed.
        area.enter(0, [50.0, 10.0], [40.0, 10.0]);
        area.enter(0, [50.0, 10.0], [20.0, 4.0]);
        area.enter(1, [0.0, 10.0], [0.0, 10.0]);
        let shares = area.shares();
        assert_eq!(shares["cpu_compute+disk_to_cpu"], [0.8, 1.0]);
        assert_eq!(shares.len(), 1, "a pair that was not measured is not told");
    }

    #[test]
    fn a_window_ends_by_time_by_quota_and_for_all() {
        let stop = AtomicBool::new(false);
        let window = |length| Window {
            length,
            over: AtomicBool::new(false),
            stop: &stop,
        };
        let short = window(Duration::from_millis(5));
        let rate = short.run(Box::new(|| Ok(Some(())))).unwrap();
        assert!(rate > 0.0 && short.over.load(Ordering::Relaxed));
        let mut left = 3;
        let quota = Box::new(|| {
            left -= 1;
            Ok((left >= 0).then_some(()))
        });
        let long = window(Duration::from_secs(3600));
        assert!(long.run(quota).unwrap() > 0.0);
        let mut steps = 0;
        let other = Box::new(|| {
            steps += 1;
            Ok(Some(()))
        });
        long.run(other).unwrap();
        assert_eq!(steps, 1, "one lane's end ends the others after their step");
    }
}
