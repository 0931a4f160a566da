//! One visit to a planned job: its weights loaded once, bursts, the job run once or a few times with
//! nothing else timed than what `exec` times, bursts again.

use super::record::{Bracket, RunRecord};
use crate::cost::figures::Figures;
use crate::engine::open::{RunJob, open};
use crate::engine::{Engine, EngineError, Finished, Request, RunOptions, Sink};
use crate::machine::arena::{AlignedBuffer, MemoryError};
use crate::machine::{Machine, os};
use crate::measured::{Measured, measured_figures};
use crate::plan::PlanBudget;
use crate::probe::{Burst, BurstPlace, Bursts, ProbeError, median};
use crate::tier::{Lane, Tier};
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Jobs shorter than this are run again within a visit, at most so often.
const VISIT_S: f64 = 0.8;
const MOST_REPEATS: usize = 9;

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

    #[test]
    fn medians_go_field_by_field_and_peaks_are_the_largest() {
        let mut runs = [(); 3].map(|()| Figures::default());
        let seen = [(1.0, 5.0, 10), (2.0, 4.0, 30), (9.0, 3.0, 20)];
        for (run, (read_s, compute_s, peak_bytes)) in runs.iter_mut().zip(seen) {
            run.lanes[Lane::DiskToCpu].prefill_s = read_s;
            run.lanes[Lane::CpuCompute].prefill_s = compute_s;
            run.tiers[Tier::Cpu].peak_bytes = peak_bytes;
        }
        let middle = median_figures(&runs);
        assert_eq!(middle.lanes[Lane::DiskToCpu].prefill_s, 2.0);
        assert_eq!(middle.lanes[Lane::CpuCompute].prefill_s, 4.0);
        assert_eq!(middle.tiers[Tier::Cpu].peak_bytes, 30);
    }
}
