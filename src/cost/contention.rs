//! What lanes keep of their rates while others run, from a profile's [contention]: between the kinds that were
//! measured (products bound by arithmetic or by memory, large requests or small) linear. What reads and writes
//! of the disk wait for each other is queue.rs's business.

use crate::cost::load::{Load, mixed};
use crate::cost::queue::{Measured, Queue};
use crate::cost::rates::RatesError;
use crate::cost::requests::DiskRequests;
use crate::profile::{HardwareProfile, MEMORY_SUFFIX, SMALL_SUFFIX};
use crate::tier::Lane;

type Table = [[f64; 6]; 6];

/// All pairs of lanes.
#[derive(Clone, Debug)]
pub struct Keeps {
    /// [memory][small][a][b]: what lane a keeps of its rate while lane b runs.
    tables: [[Table; 2]; 2],
    queue: Queue,
}

impl Keeps {
    /// `disk`: its reads, and its writes to what is there already.
    pub fn new(profile: &HardwareProfile, disk: [&DiskRequests; 2]) -> Result<Keeps, RatesError> {
        let tables = tables(profile)?;
        let queue = Queue::new(disk_keeps(profile), disk);
        Ok(Keeps { tables, queue })
    }

    /// What a lane keeps beside one other.
    pub fn kept(&self, lane: (Lane, Load), other: (Lane, Load)) -> f64 {
        match (lane.0, other.0) {
            (Lane::DiskToCpu, Lane::CpuToDisk) => self.queue.kept(lane.1, other.1)[0],
            (Lane::CpuToDisk, Lane::DiskToCpu) => self.queue.kept(other.1, lane.1)[1],
            _ => self.beside(lane, other),
        }
    }

    fn beside(&self, lane: (Lane, Load), other: (Lane, Load)) -> f64 {
        let hard = |computes: bool| {
            let of = [lane, other].map(|l| match (l.0 == Lane::CpuCompute) == computes {
                true => l.1.hard,
                false => 0.0,
            });
            of[0].max(of[1])
        };
        let at = |keeps: &Table| keeps[lane.0 as usize][other.0 as usize];
        let (memory, small) = (hard(true), hard(false));
        let of = |[large, few]: &[Table; 2]| mixed(at(large), at(few), small);
        let [arithmetic, bound] = &self.tables;
        mixed(of(arithmetic), of(bound), memory)
    }
}

fn tables(profile: &HardwareProfile) -> Result<[[Table; 2]; 2], RatesError> {
    let mut keeps = [[1.0; 6]; 6];
    if let (Some(up), Some(down)) = (&profile.links.cpu_to_gpu, &profile.links.gpu_to_cpu) {
        let (u, d) = (Lane::CpuToGpu as usize, Lane::GpuToCpu as usize);
        keeps[u][d] = (up.both_directions_pct / 100.0).clamp(0.05, 1.0);
        keeps[d][u] = (down.both_directions_pct / 100.0).clamp(0.05, 1.0);
    }
    let entered = |mut keeps: Table, memory: bool, small: bool| {
        enter_pairs(&mut keeps, profile, (memory, small)).map(|()| keeps)
    };
    // What was not measured is as where it is easier.
    let large = entered(keeps, false, false)?;
    let small = entered(large, false, true)?;
    let bound = entered(large, true, false)?;
    let both = entered(entered(bound, false, true)?, true, true)?;
    Ok([[large, small], [bound, both]])
}

/// What reads and writes kept of their rates, as [reads are small][writes are small]. One device: where nobody
/// measured more, they share its time.
fn disk_keeps(profile: &HardwareProfile) -> Measured {
    let mut found = [[None; 2]; 2];
    for (pair, keeps) in &profile.contention {
        let [first, second] = keeps.map(|part| part.min(1.0));
        match sides(pair) {
            Some([a, b]) if (a.lane, b.lane) == (Lane::DiskToCpu, Lane::CpuToDisk) => {
                found[usize::from(a.small)][usize::from(b.small)] = Some([first, second]);
            }
            Some([a, b]) if (a.lane, b.lane) == (Lane::CpuToDisk, Lane::DiskToCpu) => {
                found[usize::from(b.small)][usize::from(a.small)] = Some([second, first]);
            }
            _ => {}
        }
    }
    found[0][0] = found[0][0].or(Some([0.5; 2]));
    found
}

/// One side of a pair's name.
struct Side {
    lane: Lane,
    /// Memory binds it; its requests are small.
    memory: bool,
    small: bool,
}

/// Both sides of a pair; None where the name is none. Only reads and writes are told apart on both sides.
fn sides(pair: &str) -> Option<[Side; 2]> {
    let side = |name: &str| {
        let plain = name.trim_end_matches(MEMORY_SUFFIX);
        let plain = plain.trim_end_matches(SMALL_SUFFIX);
        Some(Side {
            lane: Lane::ALL.into_iter().find(|l| l.name() == plain)?,
            memory: name.ends_with(MEMORY_SUFFIX),
            small: name.ends_with(SMALL_SUFFIX),
        })
    };
    let (a, b) = pair.split_once('+')?;
    let (a, b) = (side(a)?, side(b)?);
    let known = !b.memory && (!a.small || of_disk(&a, &b));
    known.then_some([a, b])
}

fn of_disk(a: &Side, b: &Side) -> bool {
    [a, b]
        .iter()
        .all(|side| matches!(side.lane, Lane::DiskToCpu | Lane::CpuToDisk))
}

/// Enters what was measured of pairs of lanes, of one kind of products and of requests.
fn enter_pairs(
    keeps: &mut Table,
    profile: &HardwareProfile,
    kind: (bool, bool),
) -> Result<(), RatesError> {
    for (pair, &[first, second]) in &profile.contention {
        let Some([a, b]) = sides(pair) else {
            return Err(RatesError::Contention {
                profile: profile.machine.name.clone(),
                pair: pair.clone(),
            });
        };
        if (a.memory, b.small) == kind && !of_disk(&a, &b) {
            let (a, b) = (a.lane as usize, b.lane as usize);
            keeps[a][b] = first.min(1.0);
            keeps[b][a] = second.min(1.0);
        }
    }
    Ok(())
}
