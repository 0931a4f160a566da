//! Predicted against measured over saved rows: raw errors, errors normalised by the bursts around each
//! run, each row's own spread, and which rows that spread excuses. Arithmetic only.

use super::bound::{Bound, burst_of, burst_weights};
use super::record::{Bracket, RowRecord, Rows, RunRecord};
use super::visit::median_figures;
use crate::compare::{Errors, errors, fold, percent};
use crate::cost::figures::Figures;
use crate::probe::{Burst, median};
use crate::tier::{Lane, PerLane, Phase};
use serde::Serialize;

pub const ACCURACY_SCHEMA: &str = "loadmaster.accuracy/1";
/// Runs of a row that make a median to be trusted.
pub const LEAST_RUNS: usize = 5;
/// At most this part of the rows may be excused by their own spread …
const EXCUSED_PART: f64 = 0.1;
/// … and only those that scatter by more than this.
const EXCUSED_SPREAD_PCT: f64 = 12.0;

/// Errors of a row in percent, in both lights.
#[derive(Clone, Debug, Serialize)]
pub struct RowVerdict {
    pub name: String,
    pub plan_id: String,
    pub runs: usize,
    pub predicted: Figures,
    /// Medians over the runs, as measured and as they would have been at the profile's speed.
    pub measured: Figures,
    pub normalised: Figures,
    pub raw_error: Errors,
    pub error: Errors,
    /// Of each lane's work: bytes and FLOPs at the profiled rates, so that no noise is in it.
    pub work_error: PerLane<Option<f64>>,
    /// Largest less smallest throughput of the runs, in percent of the median.
    pub raw_spread_pct: f64,
    pub spread_pct: f64,
    /// Seconds of the bursts ÷ their profiled seconds, mean over the runs.
    pub slowdown: f64,
    pub excused: bool,
}

/// Mean, median and largest magnitude of errors over rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub mean: Errors,
    pub median: Errors,
    pub worst: Errors,
    pub mean_work: PerLane<Option<f64>>,
    pub worst_work: PerLane<Option<f64>>,
}

/// The judgement over all rows.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub schema: &'static str,
    pub seed: u64,
    pub profile: String,
    pub profile_sha256: String,
    /// False where some row has fewer than `LEAST_RUNS` runs.
    pub complete: bool,
    pub rows: Vec<RowVerdict>,
    pub excused: usize,
    /// Normalised, without the excused rows; normalised, all rows; raw, all rows.
    pub judged: Summary,
    pub all: Summary,
    pub raw: Summary,
}

/// A row with what it is judged by.
pub struct Judged<'a> {
    pub record: &'a RowRecord,
    pub bound: Bound<'a>,
    pub predicted: &'a Figures,
}

/// Judges all rows that ran.
pub fn judge(rows: &Rows, judged: &[Judged]) -> Verdict {
    let ran = judged.iter().filter(|j| !j.record.runs.is_empty());
    let mut verdicts: Vec<RowVerdict> = ran.map(judge_row).collect();
    excuse(&mut verdicts);
    let kept: Vec<&RowVerdict> = verdicts.iter().filter(|v| !v.excused).collect();
    let all: Vec<&RowVerdict> = verdicts.iter().collect();
    Verdict {
        schema: ACCURACY_SCHEMA,
        seed: rows.seed,
        profile: rows.profile.machine.name.clone(),
        profile_sha256: rows.profile_sha256.clone(),
        complete: judged.iter().all(|j| j.record.runs.len() >= LEAST_RUNS),
        excused: all.len() - kept.len(),
        judged: summary(&kept, |v| v.error),
        all: summary(&all, |v| v.error),
        raw: summary(&all, |v| v.raw_error),
        rows: verdicts,
    }
}

fn judge_row(row: &Judged) -> RowVerdict {
    let runs = &row.record.runs;
    let raw: Vec<Figures> = runs.iter().map(|r| r.measured.clone()).collect();
    let normal: Vec<Figures> = runs.iter().map(|r| normalised(row, r)).collect();
    let (measured, normalised) = (median_figures(&raw), median_figures(&normal));
    let predicted = row.predicted;
    let mut work_error = PerLane::default();
    for lane in Lane::ALL {
        let (p, m) = (predicted.lanes[lane].work_s, measured.lanes[lane].work_s);
        work_error[lane] = (m > 0.01 * measured.total_s).then(|| percent(p, m));
    }
    let slow = raw
        .iter()
        .zip(&normal)
        .map(|(r, n)| r.total_s / n.total_s.max(1e-12));
    RowVerdict {
        name: row.record.name.clone(),
        plan_id: row.record.plan.id.clone(),
        runs: runs.len(),
        raw_error: errors(predicted, &measured),
        error: errors(predicted, &normalised),
        work_error,
        raw_spread_pct: spread_pct(&raw),
        spread_pct: spread_pct(&normal),
        slowdown: slow.sum::<f64>() / runs.len().max(1) as f64,
        predicted: predicted.clone(),
        measured,
        normalised,
        excused: false,
    }
}

/// A run's seconds as they would be at the profile's speed.
fn normalised(row: &Judged, run: &RunRecord) -> Figures {
    let mut figures = run.measured.clone();
    let slow = |lane, phase| {
        let burst = burst_of(lane, phase, row.bound);
        slowdown(&run.brackets, burst)
    };
    for lane in Lane::ALL {
        figures.lanes[lane].prefill_s /= slow(lane, Phase::Prefill).unwrap_or(1.0);
        figures.lanes[lane].decode_s /= slow(lane, Phase::Decode).unwrap_or(1.0);
    }
    let phase_slow = |phase| {
        let weights = burst_weights(row.predicted, phase, row.bound);
        let known = Lane::ALL
            .into_iter()
            .filter_map(|l| Some((weights[l], slow(l, phase)?)));
        let (weight, sum) = known.fold((0.0, 0.0), |(w, s), (weight, f)| {
            (w + weight, s + weight * f)
        });
        // Lanes without a burst do next to nothing: they count as profiled, and so do waits.
        sum + (1.0 - weight).max(0.0)
    };
    let first = first_tokens(&figures);
    figures.prefill_s /= phase_slow(Phase::Prefill);
    figures.decode_s /= phase_slow(Phase::Decode);
    figures.finish(first);
    figures
}

/// Tokens that prefill returned, from what the decode rate left out.
fn first_tokens(figures: &Figures) -> u64 {
    let decoded = (figures.decode_tok_s * figures.decode_s).round() as u64;
    figures.generated_tokens.saturating_sub(decoded)
}

fn slowdown(brackets: &[Bracket], burst: Burst) -> Option<f64> {
    let same = brackets.iter().find(|b| b.burst == burst);
    let older = |b: &&Bracket| stands_for(b.burst, burst);
    let found = same.or_else(|| brackets.iter().find(older))?;
    Some((found.before + found.after) / 2.0)
}

/// Rows of earlier versions have each lane alone, one kind of reads and of writes, and no bytes that pass.
fn stands_for(older: Burst, burst: Burst) -> bool {
    match (older, burst) {
        (Burst::Product(old), Burst::Product(new) | Burst::ProductBeside(new, _)) => {
            (old.format, old.arithmetic, old.rows) == (new.format, new.arithmetic, new.rows)
        }
        (Burst::Reads(old), Burst::ReadsBeside(new, _)) => old == new,
        (Burst::Read, Burst::Reads(_) | Burst::ReadsBeside(..)) => true,
        (Burst::Write, Burst::Writes(_)) => true,
        _ => false,
    }
}

fn spread_pct(runs: &[Figures]) -> f64 {
    let values: Vec<f64> = runs.iter().map(|f| f.throughput_tok_s).collect();
    let largest = values.iter().copied().fold(f64::MIN, f64::max);
    let smallest = values.iter().copied().fold(f64::MAX, f64::min);
    match median(&values) {
        Some(middle) if middle > 0.0 => 100.0 * (largest - smallest) / middle,
        _ => 0.0,
    }
}

/// Excuses the rows with the largest errors among those whose own runs lie further apart than that.
fn excuse(rows: &mut [RowVerdict]) {
    let most = (rows.len() as f64 * EXCUSED_PART).floor() as usize;
    let error = |r: &RowVerdict| r.error.throughput.unwrap_or(0.0).abs();
    let scatters =
        |r: &RowVerdict| r.spread_pct > EXCUSED_SPREAD_PCT && r.spread_pct / 2.0 > error(r);
    let mut scattered: Vec<usize> = (0..rows.len()).filter(|&i| scatters(&rows[i])).collect();
    scattered.sort_by(|&a, &b| error(&rows[b]).total_cmp(&error(&rows[a])));
    for index in scattered.into_iter().take(most) {
        rows[index].excused = true;
    }
}

fn summary(rows: &[&RowVerdict], of: impl Fn(&RowVerdict) -> Errors) -> Summary {
    let all: Vec<Errors> = rows.iter().map(|r| of(r)).collect();
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let worst = |v: &[f64]| v.iter().copied().fold(0.0, f64::max);
    let work = |of: &dyn Fn(&[f64]) -> f64| {
        let mut folded = PerLane::default();
        for lane in Lane::ALL {
            let values = rows.iter().filter_map(|r| r.work_error[lane]).map(f64::abs);
            let values: Vec<f64> = values.collect();
            folded[lane] = (!values.is_empty()).then(|| of(&values));
        }
        folded
    };
    Summary {
        mean: fold(&all, mean),
        median: fold(&all, |v| median(v).unwrap_or(0.0)),
        worst: fold(&all, worst),
        mean_work: work(&mean),
        worst_work: work(&worst),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(error: f64, spread_pct: f64) -> RowVerdict {
        RowVerdict {
            name: String::new(),
            plan_id: String::new(),
            runs: 5,
            predicted: Figures::default(),
            measured: Figures::default(),
            normalised: Figures::default(),
            raw_error: Errors::default(),
            error: Errors {
                throughput: Some(error),
                ..Errors::default()
            },
            work_error: PerLane::default(),
            raw_spread_pct: spread_pct,
            spread_pct,
            slowdown: 1.0,
            excused: false,
        }
    }

    #[test]
    fn one_row_in_ten_is_excused_and_only_by_its_own_spread() {
        let mut rows: Vec<RowVerdict> = (0..10).map(|_| verdict(2.0, 3.0)).collect();
        rows[3] = verdict(20.0, 50.0);
        rows[4] = verdict(18.0, 60.0);
        rows[5] = verdict(-30.0, 20.0);
        excuse(&mut rows);
        let excused: Vec<usize> = (0..10).filter(|&i| rows[i].excused).collect();
        assert_eq!(excused, [3], "the larger error of those that scatter");
        let kept: Vec<&RowVerdict> = rows.iter().filter(|r| !r.excused).collect();
        assert_eq!(summary(&kept, |r| r.error).worst.throughput, Some(30.0));
    }

    #[test]
    fn few_rows_excuse_nothing() {
        let mut rows = vec![verdict(40.0, 100.0), verdict(1.0, 1.0)];
        excuse(&mut rows);
        assert!(rows.iter().all(|r| !r.excused));
    }
}
