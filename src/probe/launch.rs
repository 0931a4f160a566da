//! Seconds to start one operation as a run starts it: submitted by the host thread, taken from its lane's
//! queue, run on all threads. Smaller than any operation's work, but there are thousands a pass.

use super::ProbeError;
use super::samples::Series;
use crate::cost::rates::Rates;
use crate::machine::ops::{Compute, HiddenRows, Op, Table};
use crate::machine::price::Pricer;
use crate::machine::threaded::{OpenRequest, ThreadedMachine};
use crate::machine::{Fences, Machine};
use crate::policy::DeviceKind;
use crate::profile::HardwareProfile;
use crate::tier::Lane;
use crate::units::MIB;
use std::sync::Arc;
use std::time::Instant;

/// Rows of the smallest operation that is still split over threads.
const ROWS: u32 = 8;
const WIDTH: usize = 64;
const OPERATIONS: usize = 1000;
const ROUNDS: usize = 7;

/// Measures on a machine of its own, a mebibyte large: operations that copy a few short rows within the
/// first cache, so that starting them is nearly all of their time.
pub fn launch_s(profile: &HardwareProfile, threads: usize) -> Result<f64, ProbeError> {
    let rates = Rates::new(profile, DeviceKind::Cpu, threads)?;
    let request = OpenRequest {
        device: DeviceKind::Cpu,
        gpu_bytes: 0,
        cpu_bytes: MIB,
        threads,
        files: Vec::new(),
        pricer: Pricer::new(rates),
    };
    let mut machine = ThreadedMachine::open(request)?;
    let rows: Arc<[u32]> = (0..ROWS).collect();
    let mut seconds = Series::default();
    for _ in 0..ROUNDS {
        seconds.push(one_round(&mut machine, &rows)? / OPERATIONS as f64);
    }
    let per_operation_s = seconds.median().unwrap_or(0.0);
    Ok(per_operation_s.max(1e-7))
}

fn one_round(machine: &mut ThreadedMachine, rows: &Arc<[u32]>) -> Result<f64, ProbeError> {
    let start = Instant::now();
    for _ in 0..OPERATIONS {
        let rows = Table::whole(rows.clone());
        let from = HiddenRows {
            base: 0,
            rows,
            width: WIDTH,
        };
        let gather = Compute::Gather { from, out: MIB / 2 };
        machine.submit(Lane::CpuCompute, Op::Compute(gather), &Fences::none());
    }
    let all = machine.submitted();
    machine.wait(&all)?;
    Ok(start.elapsed().as_secs_f64())
}
