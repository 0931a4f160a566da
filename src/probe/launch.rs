//! Seconds to start one operation as a run starts it: submitted by the host thread, taken from its lane's
//! queue, run on all threads; and what is lost when a lane must wait for another. Smaller than any
//! operation's work, but there are thousands a pass.

use super::ProbeError;
use super::samples::Series;
use crate::cost::rates::Rates;
use crate::machine::arena::AlignedBuffer;
use crate::machine::disk::DiskFile;
use crate::machine::ops::{Compute, FileId, FileSpan, HiddenRows, Op, Table};
use crate::machine::price::Pricer;
use crate::machine::threaded::{OpenRequest, ThreadedMachine};
use crate::machine::{Fences, Machine};
use crate::policy::DeviceKind;
use crate::profile::HardwareProfile;
use crate::tier::Lane;
use crate::units::{MIB, PAGE_BYTES};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Rows of operations that are split over threads: what they take is extended to none.
const ROWS: [u32; 2] = [16, 48];
const WIDTH: usize = 512;
const OPERATIONS: usize = 1000;
/// Operations on each of the lanes that wait for each other in turn.
const HANDOVERS: usize = 150;
const ROUNDS: usize = 7;

/// A machine of its own, a mebibyte large, with a small file.
pub struct LaunchBench {
    machine: ThreadedMachine,
    rows: [Arc<[u32]>; 2],
}

impl LaunchBench {
    pub fn new(
        profile: &HardwareProfile,
        threads: usize,
        dir: &Path,
    ) -> Result<LaunchBench, ProbeError> {
        let rates = Rates::new(profile, DeviceKind::Cpu, threads)?;
        let file = DiskFile::create_unlinked(dir, PAGE_BYTES)?;
        let page = AlignedBuffer::new(PAGE_BYTES)?;
        file.write_at(&page, 0)?;
        let request = OpenRequest {
            device: DeviceKind::Cpu,
            gpu_bytes: 0,
            cpu_bytes: MIB,
            threads,
            files: vec![Arc::new(file)],
            pricer: Pricer::new(rates),
            gpu: None,
        };
        Ok(LaunchBench {
            machine: ThreadedMachine::open(request)?,
            rows: ROWS.map(|rows| (0..rows).collect()),
        })
    }

    /// Seconds to start an operation, and to hand over to an idle lane.
    pub fn measure(&mut self) -> Result<(f64, f64), ProbeError> {
        let (mut launch, mut handover) = (Series::default(), Series::default());
        for _ in 0..ROUNDS {
            let few_s = self.in_turn((OPERATIONS, 0), &[Lane::CpuCompute])?;
            let more_s = self.in_turn((OPERATIONS, 1), &[Lane::CpuCompute])?;
            let [few, more] = ROWS.map(f64::from);
            let none_s = few_s - (more_s - few_s) * few / (more - few);
            launch.push(none_s / OPERATIONS as f64);
            handover.push(self.handover_s()?);
        }
        let launch_s = launch.median().unwrap_or(0.0);
        let handover_s = handover.median().unwrap_or(0.0);
        Ok((launch_s.max(1e-7), handover_s.max(0.0)))
    }

    /// Seconds that a lane takes to begin what it has waited for, its threads asleep: what passes in turns
    /// through three lanes while none of them is busy.
    fn handover_s(&mut self) -> Result<f64, ProbeError> {
        let lanes = [Lane::CpuToDisk, Lane::DiskToCpu, Lane::CpuCompute];
        self.machine.forget_log();
        let turns_s = self.in_turn((HANDOVERS, 1), &lanes)?;
        let figures = self.machine.lane_figures();
        let busy_s: f64 = lanes.iter().map(|&lane| figures[lane].busy_s()).sum();
        Ok((turns_s - busy_s) / (lanes.len() * HANDOVERS) as f64)
    }

    /// Seconds of `count` operations on each of the lanes, each waiting for the one before it.
    fn in_turn(
        &mut self,
        (count, size): (usize, usize),
        lanes: &[Lane],
    ) -> Result<f64, ProbeError> {
        let start = Instant::now();
        let mut before = Fences::none();
        for _ in 0..count {
            for &lane in lanes {
                let op = match lane {
                    Lane::DiskToCpu => Op::Read(page()),
                    Lane::CpuToDisk => Op::Write(page()),
                    _ => self.gather(size),
                };
                before = self.machine.submit(lane, op, &before).into();
            }
        }
        self.machine.wait(&before)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn gather(&self, size: usize) -> Op {
        let from = HiddenRows {
            base: 0,
            rows: Table::whole(self.rows[size].clone()),
            width: WIDTH,
        };
        Op::Compute(Compute::Gather { from, out: MIB / 2 })
    }
}

fn page() -> Vec<FileSpan> {
    vec![FileSpan {
        file: FileId(0),
        offset: 0,
        memory: MIB - PAGE_BYTES,
        bytes: PAGE_BYTES,
    }]
}
