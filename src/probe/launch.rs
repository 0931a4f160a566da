//! Seconds to start one operation as a run starts it: submitted by the host thread, taken from its lane's
//! queue, run on all threads; and what is lost when a lane must wait for another. Smaller than any
//! operation's work, but there are thousands a pass.

use super::ProbeError;
use super::samples::{Series, tidy};
use crate::cost::load::Load;
use crate::cost::rates::Rates;
use crate::dtype::{Arithmetic, Dtype};
use crate::machine::arena::AlignedBuffer;
use crate::machine::disk::DiskFile;
use crate::machine::ops::{Compute, FileId, FileSpan, Gemm, HiddenRows, Op, Table};
use crate::machine::price::Pricer;
use crate::machine::threaded::{OpenRequest, ThreadedMachine};
use crate::machine::{Fences, Machine};
use crate::policy::DeviceKind;
use crate::profile::{CpuFacts, HardwareProfile};
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
/// The same while the CPU computes, and the products that it has to do meanwhile.
const BUSY_HANDOVERS: usize = 60;
const PRODUCTS: usize = 600;
const PRODUCT_ROWS: usize = 96;
const PRODUCT_OUTPUTS: usize = 256;
const ROUNDS: usize = 7;

/// The lanes whose threads take a core from those that compute.
const DISK_LANES: [Lane; 2] = [Lane::CpuToDisk, Lane::DiskToCpu];

/// A machine of its own, a mebibyte large, with a small file.
pub struct LaunchBench {
    machine: ThreadedMachine,
    pricer: Pricer,
    rows: [Arc<[u32]>; 2],
}

impl LaunchBench {
    pub fn new(
        profile: &HardwareProfile,
        threads: usize,
        dir: &Path,
    ) -> Result<LaunchBench, ProbeError> {
        let pricer = Pricer::new(Rates::new(profile, DeviceKind::Cpu, threads)?);
        let file = DiskFile::create_unlinked(dir, PAGE_BYTES)?;
        let page = AlignedBuffer::new(PAGE_BYTES)?;
        file.write_at(&page, 0)?;
        let request = OpenRequest {
            device: DeviceKind::Cpu,
            gpu_bytes: 0,
            cpu_bytes: MIB,
            threads,
            files: vec![Arc::new(file)],
            pricer: pricer.clone(),
            gpu: None,
        };
        Ok(LaunchBench {
            machine: ThreadedMachine::open(request)?,
            pricer,
            rows: ROWS.map(|rows| (0..rows).collect()),
        })
    }

    /// Enters the seconds to start an operation and to hand over to an idle lane.
    pub fn measure(&mut self, cpu: &mut CpuFacts) -> Result<(), ProbeError> {
        let (mut launch, mut handover) = (Series::default(), Series::default());
        let (mut busy, mut taken) = (Series::default(), Series::default());
        let [few_rows, more_rows] = [0, 1].map(|size| self.gather(size));
        for _ in 0..ROUNDS {
            let few_s = self.in_turn(OPERATIONS, &few_rows, &[Lane::CpuCompute])?;
            let more_s = self.in_turn(OPERATIONS, &more_rows, &[Lane::CpuCompute])?;
            let [few, more] = ROWS.map(f64::from);
            let none_s = few_s - (more_s - few_s) * few / (more - few);
            launch.push(none_s / OPERATIONS as f64);
            handover.push(self.handover_s()?);
            let (busy_s, taken_s) = self.busy_handover_s()?;
            busy.push(busy_s);
            taken.push(taken_s);
        }
        let middle = |series: &Series| tidy(series.median().unwrap_or(0.0).max(0.0));
        cpu.launch_s = middle(&launch).max(1e-7);
        cpu.handover_s = middle(&handover);
        cpu.handover_busy_s = Some(middle(&busy).max(cpu.handover_s));
        cpu.wake_takes_s = middle(&taken);
        Ok(())
    }

    /// Seconds that a lane takes to begin what it has waited for: what passes in turns through three lanes, of
    /// which one computes for so long, on all threads, that the others fall asleep.
    fn handover_s(&mut self) -> Result<f64, ProbeError> {
        let lanes = [Lane::CpuToDisk, Lane::DiskToCpu, Lane::CpuCompute];
        self.between_s(HANDOVERS, &lanes)
    }

    /// The same of the disk's lanes while all threads compute, and the seconds that these lose each time.
    fn busy_handover_s(&mut self) -> Result<(f64, f64), ProbeError> {
        self.machine.forget_log();
        self.submit_products();
        let alone_s = self.computed_s()?;
        self.submit_products();
        let seconds = self.between_s(BUSY_HANDOVERS, &DISK_LANES)?;
        let lost_s = self.computed_s()? - alone_s;
        let figures = self.machine.lane_figures();
        let known_s: f64 = DISK_LANES
            .iter()
            .map(|&lane| (1.0 - self.kept_beside(lane)) * figures[lane].busy_s())
            .sum();
        let wakes = (DISK_LANES.len() * BUSY_HANDOVERS) as f64;
        Ok((seconds, (lost_s - known_s) / wakes))
    }

    /// Waits for everything; seconds that the CPU has computed.
    fn computed_s(&mut self) -> Result<f64, ProbeError> {
        let all = self.machine.submitted();
        self.machine.wait(&all)?;
        Ok(self.machine.lane_figures()[Lane::CpuCompute].busy_s())
    }

    fn submit_products(&mut self) {
        let product = product();
        for _ in 0..PRODUCTS {
            let none = Fences::none();
            self.machine
                .submit(Lane::CpuCompute, product.clone(), &none);
        }
    }

    /// What computing that memory does not bind keeps of its rate beside a lane's single pages.
    fn kept_beside(&self, lane: Lane) -> f64 {
        let page = PAGE_BYTES as f64;
        let load = Load::of_disk(lane, 0.0, (page, page));
        let computing = (Lane::CpuCompute, Load::default());
        self.pricer.keep(computing, &[(lane, load)])
    }

    fn between_s(&mut self, count: usize, lanes: &[Lane]) -> Result<f64, ProbeError> {
        self.machine.forget_log();
        let turns_s = self.in_turn(count, &product(), lanes)?;
        let figures = self.machine.lane_figures();
        let busy_s: f64 = lanes.iter().map(|&lane| figures[lane].busy_s()).sum();
        Ok((turns_s - busy_s) / (lanes.len() * count) as f64)
    }

    /// Seconds of `count` operations on each of the lanes, each waiting for the one before it; the CPU's is given.
    fn in_turn(&mut self, count: usize, computed: &Op, lanes: &[Lane]) -> Result<f64, ProbeError> {
        let start = Instant::now();
        let mut before = Fences::none();
        for _ in 0..count {
            for &lane in lanes {
                let op = match lane {
                    Lane::DiskToCpu => Op::Read(page()),
                    Lane::CpuToDisk => Op::Write(page()),
                    _ => computed.clone(),
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

/// Of memory that holds zeros only.
fn product() -> Op {
    Op::Compute(Compute::Gemm(Gemm {
        x: 0,
        x_stride: WIDTH,
        m: PRODUCT_ROWS,
        inputs: WIDTH,
        weights: MIB / 4,
        format: Dtype::F16,
        arithmetic: Arithmetic::Fp32,
        wide: false,
        rows: PRODUCT_OUTPUTS,
        bias: None,
        activation: None,
        out: MIB / 4 * 3,
        out_stride: PRODUCT_OUTPUTS,
    }))
}

fn page() -> Vec<FileSpan> {
    vec![FileSpan {
        file: FileId(0),
        offset: 0,
        memory: MIB - PAGE_BYTES,
        bytes: PAGE_BYTES,
    }]
}
