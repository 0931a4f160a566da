//! One visit to a planned job: its weights loaded once, bursts, the job run once or a few times with
//! nothing else timed than what `exec` times, bursts again.

use super::record::{Bracket, RunRecord};
use crate::cost::block::even_chunks;
use crate::cost::figures::{Figures, LaneFigures};
use crate::cost::rates::Rates;
use crate::dtype::Dtype;
use crate::engine::open::{RunJob, open};
use crate::engine::{Engine, EngineError, Finished, Request, RunOptions, Sink};
use crate::machine::arena::{AlignedBuffer, MemoryError};
use crate::machine::{Machine, os};
use crate::measured::{Measured, measured_figures};
use crate::model::ModelSpec;
use crate::plan::{Plan, PlanBudget};
use crate::policy::Policy;
use crate::probe::{Burst, BurstPlace, Bursts, ProbeError, median};
use crate::tier::{Lane, PerLane, Phase, Tier};
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Jobs shorter than this are run again within a visit, at most so often.
const VISIT_S: f64 = 0.8;
const MOST_REPEATS: usize = 9;
/// The part of a phase's busy time from which a lane's speed counts.
const COUNTS: f64 = 0.1;

/// Why a visit gave no figures.
#[derive(Debug, Error)]
pub enum VisitError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("interrupted")]
    Stopped,
    #[error("line {line} does not fit the plan: {why}")]
    Refused { line: usize, why: String },
}

/// A planned job, ready to be run.
pub struct VisitJob<'a> {
    pub run: &'a RunJob<'a>,
    pub budget: PlanBudget,
    pub predicted: &'a Figures,
    pub requests: &'a [Request],
    pub bursts: &'a [Burst],
    pub place: &'a BurstPlace<'a>,
    /// Memory that jobs of one series hold, each by itself and what it needs less: none gives back what the host
    /// would then take while the next one runs (`Bursts`).
    pub series_bytes: u64,
}

/// What bursts are chosen by.
#[derive(Clone, Copy)]
pub struct Bound<'a> {
    pub model: &'a ModelSpec,
    pub plan: &'a Plan,
    pub policy: &'a Policy,
    pub rates: &'a Rates,
}

impl Bound<'_> {
    /// Batches that meet a layer's weights one after the other while most of them are in a cache.
    fn batches_near(&self) -> usize {
        let w = &self.plan.workload;
        let tokens = (w.prompt_tokens + w.gen_tokens) / w.prompts.max(1);
        let record = self.model.kv_record_bytes(self.policy.kv_format());
        let kv_bytes = self.policy.gpu_batch_size as u64 * tokens * record;
        let passed_bytes = self.model.layer_bytes(self.policy.compress_weight) + kv_bytes;
        match self.rates.kept(Tier::Cpu, passed_bytes as f64) > 0.5 {
            true => self.policy.num_gpu_batches,
            false => 1,
        }
    }
}

/// Which burst tells how fast a lane is in a phase.
pub fn burst_of(lane: Lane, phase: Phase, bound: Bound) -> Burst {
    let Bound {
        model,
        plan,
        policy,
        ..
    } = bound;
    match lane {
        Lane::DiskToCpu => Burst::Read,
        Lane::CpuToDisk => Burst::Write,
        _ => {
            let prompt = plan.workload.prompt_tokens / plan.workload.prompts.max(1);
            let (rows, times) = match phase {
                Phase::Prefill => {
                    let rows = policy.gpu_batch_size as u64 * prompt.max(1);
                    (even_chunks(rows), 1)
                }
                Phase::Decode => (policy.gpu_batch_size as u64, bound.batches_near()),
            };
            let format = if policy.compress_weight {
                Dtype::Q4
            } else {
                model.dtype
            };
            Burst::Product {
                format,
                arithmetic: policy.arithmetic(format),
                rows: nearest_power_of_two(rows),
                times,
            }
        }
    }
}

/// A row count of the probe's grid: 1, 2, 4 … 512.
fn nearest_power_of_two(rows: u64) -> usize {
    let exponent = (rows.clamp(1, 512) as f64).log2().round();
    1 << exponent as u32
}

/// The part of a phase in which each lane is busy: without overlap of all lanes, else of the one that binds
/// alone. In what is left something is waited for, which takes as long however fast the lanes are.
pub fn lane_weights(figures: &Figures, phase: Phase, overlap: bool) -> PerLane<f64> {
    let seconds = |l: &LaneFigures| match phase {
        Phase::Prefill => l.prefill_s,
        Phase::Decode => l.decode_s,
    };
    let whole_s = match phase {
        Phase::Prefill => figures.prefill_s,
        Phase::Decode => figures.decode_s,
    };
    let busiest = Lane::with_most(|lane| seconds(&figures.lanes[lane]));
    let mut weights = PerLane::default();
    for lane in Lane::ALL.into_iter().filter(|&l| !overlap || l == busiest) {
        weights[lane] = seconds(&figures.lanes[lane]);
    }
    let busy_s: f64 = Lane::ALL.iter().map(|&lane| weights[lane]).sum();
    for lane in Lane::ALL {
        weights[lane] /= busy_s.max(whole_s).max(1e-12);
    }
    weights
}

/// The bursts that a row's phases need.
pub fn bursts_of(bound: Bound, predicted: &Figures) -> Vec<Burst> {
    let mut bursts = Vec::new();
    for (phase, seconds) in [
        (Phase::Prefill, predicted.prefill_s),
        (Phase::Decode, predicted.decode_s),
    ] {
        if seconds <= 0.0 {
            continue;
        }
        let weights = lane_weights(predicted, phase, bound.policy.overlap);
        for lane in Lane::ALL.into_iter().filter(|&l| weights[l] >= COUNTS) {
            let burst = burst_of(lane, phase, bound);
            if !bursts.contains(&burst) {
                bursts.push(burst);
            }
        }
    }
    bursts
}

/// Loads, brackets, runs. Peaks of memory are those of loading and running, what bursts hold left out.
pub fn visit(job: &VisitJob, stop: &AtomicBool) -> Result<RunRecord, VisitError> {
    os::release_free_heap();
    let resident_bytes = || os::process_memory().map_or(0, |m| m.resident_bytes);
    let without_bytes = resident_bytes();
    let mut bursts = (!job.bursts.is_empty())
        .then(|| Bursts::new(job.place))
        .transpose()?;
    let needs_bytes = job.predicted.tiers[Tier::Cpu].peak_bytes;
    let _filler = AlignedBuffer::new(job.series_bytes.saturating_sub(needs_bytes))?;
    let held_bytes = resident_bytes().saturating_sub(without_bytes);
    os::reset_peak();
    let mut facts_of_memory = Measured::new(job.budget, Vec::new());
    facts_of_memory.others();
    let (mut machine, facts) = open(job.run)?;
    let load_peak = peak_bytes();
    let mut slowdowns = || match &mut bursts {
        Some(bursts) => bursts.slowdowns(job.bursts),
        None => Ok(Vec::new()),
    };
    let before = slowdowns()?;
    os::reset_peak();
    let repeats = (VISIT_S / job.predicted.total_s.max(1e-3)).ceil() as usize;
    let repeats = repeats.clamp(1, MOST_REPEATS);
    let mut runs = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        machine.forget_log();
        let mut sink = Quiet::default();
        let options = RunOptions { ignore_eos: true };
        let engine = Engine::new(&mut machine, facts.clone(), options);
        let outcome = engine.run(job.requests.to_vec(), &mut sink, stop)?;
        let all = machine.submitted();
        machine.wait(&all).map_err(EngineError::from)?;
        if let Some((line, why)) = sink.refused {
            return Err(VisitError::Refused { line, why });
        }
        if outcome.interrupted || stop.load(Ordering::Relaxed) {
            return Err(VisitError::Stopped);
        }
        facts_of_memory.lanes = machine.lane_figures();
        facts_of_memory.outcome = outcome;
        facts_of_memory.peak_bytes = load_peak.max(peak_bytes()).saturating_sub(held_bytes);
        runs.push(measured_figures(job.run, &facts_of_memory));
    }
    let after = slowdowns()?;
    let sides = before.into_iter().zip(after);
    let bracket = |(&burst, (before, after)): (&Burst, (f64, f64))| Bracket {
        burst,
        before,
        after,
    };
    Ok(RunRecord {
        repeats,
        measured: median_figures(&runs),
        brackets: job.bursts.iter().zip(sides).map(bracket).collect(),
    })
}

fn peak_bytes() -> u64 {
    os::process_memory().map_or(0, |m| m.peak_bytes)
}

/// Field by field the median of several measurements of one job; of bytes the largest peak.
pub fn median_figures(runs: &[Figures]) -> Figures {
    let Some(first) = runs.first() else {
        return Figures::default();
    };
    let of = |field: &dyn Fn(&Figures) -> f64| {
        let values: Vec<f64> = runs.iter().map(field).collect();
        median(&values).unwrap_or(0.0)
    };
    let mut middle = first.clone();
    middle.prefill_s = of(&|f| f.prefill_s);
    middle.decode_s = of(&|f| f.decode_s);
    middle.total_s = of(&|f| f.total_s);
    middle.throughput_tok_s = of(&|f| f.throughput_tok_s);
    middle.decode_tok_s = of(&|f| f.decode_tok_s);
    for lane in Lane::ALL {
        middle.lanes[lane].prefill_s = of(&|f| f.lanes[lane].prefill_s);
        middle.lanes[lane].decode_s = of(&|f| f.lanes[lane].decode_s);
        middle.lanes[lane].work_s = of(&|f| f.lanes[lane].work_s);
    }
    for tier in Tier::ALL {
        let peaks = runs.iter().map(|f| f.tiers[tier].peak_bytes);
        middle.tiers[tier].peak_bytes = peaks.max().unwrap_or(0);
    }
    middle
}

/// Takes results and keeps none.
#[derive(Default)]
struct Quiet {
    refused: Option<(usize, String)>,
}

impl Sink for Quiet {
    fn finished(&mut self, _: Finished) -> Result<(), EngineError> {
        Ok(())
    }
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        self.refused.get_or_insert((line, why));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(read_s: f64, compute_s: f64) -> Figures {
        let mut figures = Figures::default();
        figures.lanes[Lane::DiskToCpu].prefill_s = read_s;
        figures.lanes[Lane::CpuCompute].prefill_s = compute_s;
        figures
    }

    #[test]
    fn the_busiest_lane_stands_for_a_phase_or_all_in_turn() {
        let both = lanes(1.0, 3.0);
        let with = lane_weights(&both, Phase::Prefill, true);
        assert_eq!((with.cpu_compute, with.disk_to_cpu), (1.0, 0.0));
        let without = lane_weights(&both, Phase::Prefill, false);
        assert_eq!((without.cpu_compute, without.disk_to_cpu), (0.75, 0.25));
        assert_eq!(lane_weights(&both, Phase::Decode, true), PerLane::default());
        let waits = Figures {
            prefill_s: 6.0,
            ..both
        };
        let with = lane_weights(&waits, Phase::Prefill, true);
        assert_eq!((with.cpu_compute, with.disk_to_cpu), (0.5, 0.0));
        let without = lane_weights(&waits, Phase::Prefill, false);
        assert_eq!((without.cpu_compute, without.disk_to_cpu), (0.5, 1.0 / 6.0));
    }

    #[test]
    fn rows_of_bursts_are_on_the_probe_s_grid() {
        let rows: Vec<usize> = [1, 2, 3, 6, 48, 500, 9000].map(nearest_power_of_two).into();
        assert_eq!(rows, [1, 2, 4, 8, 64, 512, 512]);
    }

    #[test]
    fn medians_go_field_by_field_and_peaks_are_the_largest() {
        let mut runs = [lanes(1.0, 5.0), lanes(2.0, 4.0), lanes(9.0, 3.0)];
        for (run, peak) in runs.iter_mut().zip([10, 30, 20]) {
            run.tiers[Tier::Cpu].peak_bytes = peak;
        }
        let middle = median_figures(&runs);
        assert_eq!(middle.lanes[Lane::DiskToCpu].prefill_s, 2.0);
        assert_eq!(middle.lanes[Lane::CpuCompute].prefill_s, 4.0);
        assert_eq!(middle.tiers[Tier::Cpu].peak_bytes, 30);
    }
}
