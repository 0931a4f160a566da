//! Predicted against measured, field by field (schema.md: compare). Arithmetic only; the tables a
//! person sees are the door's.

use crate::cost::figures::Figures;
use crate::report::{LineCounts, RunOutcome, RunReport};
use crate::tier::{Lane, PerLane, PerTier, Tier};
use serde::Serialize;

pub const COMPARE_SCHEMA: &str = "loadmaster.compare/1";
/// Measured times under this part of the total say nothing about a prediction.
const WORTH_COMPARING: f64 = 0.01;

/// 100 · (predicted − measured) ÷ measured; None where the measured figure is too small to judge by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Errors {
    pub throughput: Option<f64>,
    pub prefill: Option<f64>,
    pub decode: Option<f64>,
    pub lanes: PerLane<Option<f64>>,
    pub bytes: PerTier<Option<f64>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ComparedRun {
    pub report: String,
    pub plan_id: String,
    pub outcome: RunOutcome,
    pub lines: LineCounts,
    pub predicted: Figures,
    pub measured: Figures,
    pub error_percent: Errors,
}

#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub schema: &'static str,
    pub runs: Vec<ComparedRun>,
    /// Over runs that were not interrupted: what those did not come to is not in their figures.
    pub mean_abs_error_percent: Errors,
    pub worst_abs_error_percent: Errors,
}

impl Comparison {
    /// Compares named reports, in the order given.
    pub fn new(reports: Vec<(String, RunReport)>) -> Self {
        let runs: Vec<ComparedRun> = reports
            .into_iter()
            .map(|(name, report)| compare_one(name, report))
            .collect();
        let errors: Vec<Errors> = runs
            .iter()
            .filter(|r| r.outcome != RunOutcome::Interrupted)
            .map(|r| r.error_percent)
            .collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let worst = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        Comparison {
            schema: COMPARE_SCHEMA,
            runs,
            mean_abs_error_percent: fold(&errors, mean),
            worst_abs_error_percent: fold(&errors, worst),
        }
    }
}

fn compare_one(report: String, run: RunReport) -> ComparedRun {
    let error_percent = errors(&run.repriced, &run.measured);
    ComparedRun {
        report,
        plan_id: run.plan.id,
        outcome: run.outcome,
        lines: run.lines,
        predicted: run.repriced,
        measured: run.measured,
        error_percent,
    }
}

/// Errors of one prediction.
pub fn errors(predicted: &Figures, measured: &Figures) -> Errors {
    let least_s = WORTH_COMPARING * measured.total_s;
    let time = |p: f64, m: f64| (m > 0.0 && m >= least_s).then(|| percent(p, m));
    let plain = |p: f64, m: f64| (m > 0.0).then(|| percent(p, m));
    let mut lanes = PerLane::default();
    for lane in Lane::ALL {
        lanes[lane] = time(
            predicted.lanes[lane].busy_s(),
            measured.lanes[lane].busy_s(),
        );
    }
    let mut bytes = PerTier::default();
    for tier in Tier::ALL {
        let (p, m) = (
            predicted.tiers[tier].peak_bytes as f64,
            measured.tiers[tier].peak_bytes as f64,
        );
        bytes[tier] = plain(p, m);
    }
    Errors {
        throughput: plain(predicted.throughput_tok_s, measured.throughput_tok_s),
        prefill: time(predicted.prefill_s, measured.prefill_s),
        decode: time(predicted.decode_s, measured.decode_s),
        lanes,
        bytes,
    }
}

/// The lane with the most work, and that work's seconds at the probed rates as a part of the time taken: 1 is
/// perfect overlap at full rate. The lane of the whole run: less than what each phase's own would give.
pub fn roofline(measured: &Figures) -> Option<(Lane, f64)> {
    let work_s = |lane: Lane| measured.lanes[lane].work_s;
    let lane = Lane::with_most(work_s);
    let known = work_s(lane) > 0.0 && measured.total_s > 0.0;
    known.then(|| (lane, work_s(lane) / measured.total_s))
}

pub fn percent(predicted: f64, measured: f64) -> f64 {
    100.0 * (predicted - measured) / measured
}

/// One figure per field over all runs that have it.
pub fn fold(errors: &[Errors], of: impl Fn(&[f64]) -> f64) -> Errors {
    let over = |field: &dyn Fn(&Errors) -> Option<f64>| {
        let values: Vec<f64> = errors.iter().filter_map(field).map(f64::abs).collect();
        (!values.is_empty()).then(|| of(&values))
    };
    let mut folded = Errors {
        throughput: over(&|e| e.throughput),
        prefill: over(&|e| e.prefill),
        decode: over(&|e| e.decode),
        ..Errors::default()
    };
    for lane in Lane::ALL {
        folded.lanes[lane] = over(&|e| e.lanes[lane]);
    }
    for tier in Tier::ALL {
        folded.bytes[tier] = over(&|e| e.bytes[tier]);
    }
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roofline_is_the_busiest_lanes_work() {
        let mut figures = Figures {
            total_s: 10.0,
            ..Figures::default()
        };
        assert_eq!(roofline(&figures), None);
        figures.lanes[Lane::CpuToGpu].work_s = 9.0;
        figures.lanes[Lane::GpuCompute].work_s = 4.0;
        assert_eq!(roofline(&figures), Some((Lane::CpuToGpu, 0.9)));
    }

    #[test]
    fn errors_are_relative_to_what_was_measured() {
        let figures = |total: f64, prefill: f64, tok: f64| Figures {
            total_s: total,
            prefill_s: prefill,
            decode_s: total - prefill,
            throughput_tok_s: tok,
            ..Figures::default()
        };
        let e = errors(&figures(9.0, 1.0, 11.0), &figures(10.0, 0.05, 10.0));
        assert_eq!(e.prefill, None, "under one percent of the total");
        assert!((e.throughput.expect("tok/s") - 10.0).abs() < 1e-9);
        let all = fold(
            &[
                e,
                Errors {
                    throughput: Some(-30.0),
                    ..e
                },
            ],
            |v| v.iter().sum::<f64>() / v.len() as f64,
        );
        assert!((all.throughput.expect("mean of magnitudes") - 20.0).abs() < 1e-9);
    }
}
