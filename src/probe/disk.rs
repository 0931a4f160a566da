//! The disk as the engine uses it: whole requests through the I/O pool, direct where possible.
//! Reads, first writes and overwrites, by size and depth, on a file that has no name.

use super::ProbeError;
use super::bench::Bench;
use super::samples::{Series, tidy};
use super::scale::DiskStep;
use crate::cost::requests::READ_THREADS;
use crate::machine::disk::{DiskFile, IoPool, IoRequest};
use crate::machine::threaded::WRITE_THREADS;
use crate::profile::{DiskLink, DiskPoint, DiskWriteLink};
use crate::units::PAGE_BYTES;
use std::path::Path;
use std::time::Instant;

/// A slow disk is read less often for one figure than this would take.
const LONG_S: f64 = 0.5;

/// One way to use the disk, and its rates so far.
struct Point {
    step: DiskStep,
    bytes_per_s: Series,
}

/// Which way bytes go.
#[derive(Clone, Copy)]
pub enum Way {
    Read,
    Write,
}

/// The disk's measurements.
pub struct DiskArea {
    pub file: DiskFile,
    readers: IoPool,
    /// The lane of writes has threads of its own beside those of reads.
    writers: IoPool,
    reserved_bytes: u64,
    /// Bytes from the start of the file that have been written; reads stay within.
    filled_bytes: u64,
    read_at: u64,
    reads: Vec<Point>,
    fresh: Vec<Point>,
    overwrite: Vec<Point>,
    read_latency_s: Series,
    write_latency_s: Series,
}

impl DiskArea {
    pub fn new(dir: &Path, bench: &Bench) -> Result<DiskArea, ProbeError> {
        let extent = bench.extent;
        let points = |steps: &[DiskStep]| {
            let point = |step: &DiskStep| Point {
                step: *step,
                bytes_per_s: Series::default(),
            };
            steps.iter().map(point).collect::<Vec<_>>()
        };
        let bytes = extent.round_write_bytes() * extent.write_rounds as u64;
        Ok(DiskArea {
            file: DiskFile::create_unlinked(dir, bytes)?,
            readers: IoPool::new(READ_THREADS)?,
            writers: IoPool::new(WRITE_THREADS)?,
            reserved_bytes: bytes,
            filled_bytes: 0,
            read_at: 0,
            reads: points(extent.reads),
            fresh: points(extent.writes),
            overwrite: points(extent.writes),
            read_latency_s: Series::default(),
            write_latency_s: Series::default(),
        })
    }

    /// One sample of every point. The file grows by the first writes of each round; reads come
    /// between them and the overwrites, so that a drive's cache has moved on. A full file ends writing.
    pub fn round(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        let begin = self.filled_bytes;
        let writes = begin < self.reserved_bytes;
        if writes {
            self.filled_bytes = self.write_points(bench, Pass::Fresh, begin)?;
        }
        for place in 0..self.reads.len() {
            self.read_point(bench, place)?;
        }
        if writes {
            self.write_points(bench, Pass::Overwrite, begin)?;
            self.latencies(bench)?;
        }
        Ok(())
    }

    /// All writing steps one after another from `offset`; returns where they end.
    fn write_points(
        &mut self,
        bench: &mut Bench,
        pass: Pass,
        offset: u64,
    ) -> Result<u64, ProbeError> {
        (0..self.fresh.len()).try_fold(offset, |at, place| self.write_point(bench, pass, place, at))
    }

    fn write_point(
        &mut self,
        bench: &mut Bench,
        pass: Pass,
        place: usize,
        offset: u64,
    ) -> Result<u64, ProbeError> {
        let step = self.fresh[place].step;
        let seconds = self.transfer(bench, Way::Write, step, offset)?;
        let bytes = step.bytes();
        let points = match pass {
            Pass::Fresh => &mut self.fresh,
            Pass::Overwrite => &mut self.overwrite,
        };
        points[place].bytes_per_s.push(bytes as f64 / seconds);
        Ok(offset + bytes)
    }

    fn read_point(&mut self, bench: &mut Bench, place: usize) -> Result<(), ProbeError> {
        let step = self.reads[place].step;
        let once = DiskStep { repeats: 1, ..step };
        let (mut seconds, mut bytes) = (0.0, 0);
        while bytes < step.bytes() && seconds < LONG_S {
            let offset = self.next_read(once.bytes());
            seconds += self.transfer(bench, Way::Read, once, offset)?;
            bytes += once.bytes();
        }
        self.reads[place].bytes_per_s.push(bytes as f64 / seconds);
        Ok(())
    }

    /// Reads walk through all that was written, so that a drive's cache is met as seldom as can be.
    pub fn next_read(&mut self, bytes: u64) -> u64 {
        if self.read_at + bytes > self.filled_bytes {
            self.read_at = 0;
        }
        let offset = self.read_at;
        self.read_at += bytes;
        offset
    }

    /// Seconds of a step's calls.
    fn transfer(
        &self,
        bench: &mut Bench,
        way: Way,
        step: DiskStep,
        offset: u64,
    ) -> Result<f64, ProbeError> {
        bench.check_stop()?;
        let pool = match way {
            Way::Read => &self.readers,
            Way::Write => &self.writers,
        };
        let (call, each) = (step.call_bytes(), step.block_bytes as usize);
        let place = bench.rotate_pages(call as usize);
        let memory = &mut bench.arena[place..place + call as usize];
        let begin = Instant::now();
        for repeat in 0..step.repeats {
            let parts = memory.chunks_mut(each).enumerate();
            let request = |(n, part)| {
                // Each goes on where it was, as sequences do in a spill file.
                let at = offset + (n as u64 * step.repeats + repeat) * step.block_bytes;
                match way {
                    Way::Read => IoRequest::read(&self.file, at, part),
                    Way::Write => IoRequest::write(&self.file, at, part),
                }
            };
            pool.run(&mut parts.map(request).collect::<Vec<_>>())?;
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    pub fn read_pool(&self) -> &IoPool {
        &self.readers
    }

    pub fn write_pool(&self) -> &IoPool {
        &self.writers
    }

    /// One page at a time: what a request costs however small it is.
    fn latencies(&mut self, bench: &mut Bench) -> Result<(), ProbeError> {
        let step = DiskStep {
            block_bytes: PAGE_BYTES,
            depth: 1,
            repeats: 16,
        };
        let each = |seconds: f64| seconds / step.repeats as f64;
        let read = self.transfer(bench, Way::Read, step, 0)?;
        self.read_latency_s.push(each(read));
        let write = self.transfer(bench, Way::Write, step, 0)?;
        self.write_latency_s.push(each(write));
        Ok(())
    }

    pub fn filled_bytes(&self) -> u64 {
        self.filled_bytes
    }

    pub fn read_link(&self) -> DiskLink {
        DiskLink {
            latency_s: self.read_latency_s.median().map_or(0.0, tidy),
            buffered: !self.file.is_direct(),
            direct: disk_points(&self.reads),
        }
    }

    pub fn write_link(&self) -> DiskWriteLink {
        DiskWriteLink {
            latency_s: self.write_latency_s.median().map_or(0.0, tidy),
            buffered: !self.file.is_direct(),
            fresh: disk_points(&self.fresh),
            overwrite: disk_points(&self.overwrite),
        }
    }
}

#[derive(Clone, Copy)]
enum Pass {
    Fresh,
    Overwrite,
}

fn disk_points(points: &[Point]) -> Vec<DiskPoint> {
    let measured = points
        .iter()
        .filter_map(|p| Some((p, p.bytes_per_s.median()?)));
    let point = |(p, rate): (&Point, f64)| {
        let spread_pct = p.bytes_per_s.spread_pct();
        (
            p.step.block_bytes,
            p.step.depth,
            tidy(rate),
            spread_pct.round(),
        )
    };
    measured.map(point).collect()
}
