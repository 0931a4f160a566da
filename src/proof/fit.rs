//! Multipliers of the cost terms from measured lanes: least squares over the affine table, each lane's
//! seconds being a sum of terms. What cannot be told from the samples stays at one.

use crate::compare::percent;
use crate::cost::affine::share_vector;
use crate::cost::estimate::figures;
use crate::cost::figures::Figures;
use crate::cost::rates::{Rates, RatesError};
use crate::cost::steps::Moments;
use crate::cost::terms::{TermInput, Terms};
use crate::model::ModelSpec;
use crate::placement::Placement;
use crate::policy::{DeviceKind, Policy};
use crate::profile::HardwareProfile;
use crate::tier::Lane;
use crate::workload::Workload;
use std::collections::BTreeMap;

/// The terms that may be multiplied, as rates.rs names them.
pub const TERMS: [&str; 14] = [
    "append.cpu",
    "append.gpu",
    "attention.cpu",
    "attention.gpu",
    "disk_read",
    "disk_write",
    "gemm.cpu",
    "gemm.gpu",
    "launch.cpu",
    "launch.gpu",
    "link.cpu_to_gpu",
    "link.gpu_to_cpu",
    "rowwise.cpu",
    "rowwise.gpu",
];
/// A multiplier's deviation from one counts like so many relative errors: what the samples hardly show
/// is hardly moved.
const PRIOR: f64 = 0.05;
/// Multipliers stay within this, either way.
const MOST: f64 = 4.0;
/// Lanes that are busy for less of the total say nothing.
const WORTH: f64 = 0.01;

/// A measured job.
pub struct Sample<'a> {
    pub name: String,
    pub model: &'a ModelSpec,
    pub policy: &'a Policy,
    pub device: DeviceKind,
    pub workload: Workload,
    pub measured: &'a Figures,
}

/// One lane in one phase: measured seconds, predicted with all multipliers at one, and what each
/// term adds to the prediction.
struct Equation {
    measured_s: f64,
    predicted_s: f64,
    terms_s: [f64; TERMS.len()],
}

/// What a fit found.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Terms that the samples have something to say about.
    pub multipliers: BTreeMap<String, f64>,
    pub equations: usize,
    /// Mean magnitude of the lanes' errors in percent, without multipliers and with these.
    pub before_pct: f64,
    pub after_pct: f64,
}

/// Fits all samples to one profile; its own calibration is left out of account.
pub fn fit(profile: &HardwareProfile, samples: &[Sample]) -> Result<Fit, RatesError> {
    let mut equations = Vec::new();
    for sample in samples {
        equations.extend(equations_of(profile, sample)?);
    }
    let x = solve(&equations);
    let told = |t: &usize| {
        equations
            .iter()
            .any(|e| e.terms_s[*t] > WORTH * e.measured_s)
    };
    let named = |t: usize| (TERMS[t].to_owned(), (x[t] * 1000.0).round() / 1000.0);
    Ok(Fit {
        multipliers: (0..TERMS.len()).filter(told).map(named).collect(),
        equations: equations.len(),
        before_pct: mean_error(&equations, &[1.0; TERMS.len()]),
        after_pct: mean_error(&equations, &x),
    })
}

fn equations_of(profile: &HardwareProfile, sample: &Sample) -> Result<Vec<Equation>, RatesError> {
    let rates = Rates::new(profile, sample.device, sample.policy.threads)?.uncalibrated();
    let plain = lanes_of(&rates, sample);
    let mut with = Vec::with_capacity(TERMS.len());
    for term in TERMS {
        let twice = BTreeMap::from([(term.to_owned(), 2.0)]);
        with.push(lanes_of(&rates.clone().with_multipliers(twice), sample));
    }
    let least_s = WORTH * sample.measured.total_s;
    let mut equations = Vec::new();
    for (at, &measured_s) in seconds_of(sample.measured).iter().enumerate() {
        if measured_s < least_s || measured_s <= 0.0 {
            continue;
        }
        let mut terms_s = [0.0; TERMS.len()];
        for (term_s, doubled) in terms_s.iter_mut().zip(&with) {
            *term_s = doubled[at] - plain[at];
        }
        equations.push(Equation {
            measured_s,
            predicted_s: plain[at],
            terms_s,
        });
    }
    Ok(equations)
}

/// Busy seconds of every lane, prefill and decode, by the closed form.
fn lanes_of(rates: &Rates, sample: &Sample) -> Vec<f64> {
    let realised = Placement::new(sample.model, sample.policy).realised();
    let moments = Moments::new(&sample.workload);
    let shares = share_vector(&realised);
    let terms = Terms::new(&TermInput {
        model: sample.model,
        moments: &moments,
        rates,
        policy: sample.policy,
        cpu_side: realised.weights.by_cpu() > 0.0,
        at: Some(shares),
    });
    seconds_of(&figures(&terms, &moments, rates, &shares))
}

fn seconds_of(figures: &Figures) -> Vec<f64> {
    let both = |lane: Lane| [figures.lanes[lane].prefill_s, figures.lanes[lane].decode_s];
    Lane::ALL.into_iter().flat_map(both).collect()
}

/// Normal equations of the relative errors with the prior, by elimination.
fn solve(equations: &[Equation]) -> [f64; TERMS.len()] {
    const N: usize = TERMS.len();
    let mut a = [[0.0; N]; N];
    let mut b = [0.0; N];
    for (t, row) in a.iter_mut().enumerate() {
        row[t] = PRIOR * PRIOR;
    }
    for equation in equations {
        let parts = equation.terms_s.map(|s| s / equation.measured_s);
        let left = 1.0 - equation.predicted_s / equation.measured_s;
        for (i, row) in a.iter_mut().enumerate() {
            b[i] += parts[i] * left;
            for (x, part) in row.iter_mut().zip(parts) {
                *x += parts[i] * part;
            }
        }
    }
    let deviation = eliminate(a, b);
    deviation.map(|d| (1.0 + d).clamp(1.0 / MOST, MOST))
}

/// Gauss without pivoting: the matrix is positive definite by its prior.
fn eliminate<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N]) -> [f64; N] {
    for k in 0..N {
        let (pivot, pivot_b) = (a[k], b[k]);
        for i in k + 1..N {
            let factor = a[i][k] / pivot[k];
            for (x, p) in a[i].iter_mut().zip(pivot).skip(k) {
                *x -= factor * p;
            }
            b[i] -= factor * pivot_b;
        }
    }
    for k in (0..N).rev() {
        let known: f64 = (k + 1..N).map(|j| a[k][j] * b[j]).sum();
        b[k] = (b[k] - known) / a[k][k];
    }
    b
}

fn mean_error(equations: &[Equation], x: &[f64; TERMS.len()]) -> f64 {
    let error = |e: &Equation| {
        let more = e.terms_s.iter().zip(x).map(|(s, x)| s * (x - 1.0));
        percent(e.predicted_s + more.sum::<f64>(), e.measured_s).abs()
    };
    equations.iter().map(error).sum::<f64>() / equations.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equation(measured_s: f64, parts: &[(usize, f64)]) -> Equation {
        let mut terms_s = [0.0; TERMS.len()];
        parts.iter().for_each(|&(t, s)| terms_s[t] = s);
        Equation {
            measured_s,
            predicted_s: terms_s.iter().sum(),
            terms_s,
        }
    }

    #[test]
    fn multipliers_that_made_the_figures_are_found_again() {
        // disk_read 1.3, gemm.cpu 0.9, rowwise.cpu unheard of.
        let made: Vec<Equation> = (1..8)
            .map(|n| {
                let (read, gemm) = (f64::from(n), f64::from(9 - n));
                equation(1.3 * read + 0.9 * gemm, &[(4, read), (6, gemm)])
            })
            .collect();
        let x = solve(&made);
        assert!((x[4] - 1.3).abs() < 0.02, "{x:?}");
        assert!((x[6] - 0.9).abs() < 0.02, "{x:?}");
        assert_eq!(x[12], 1.0);
        assert!(mean_error(&made, &x) < 1.0 && mean_error(&made, &[1.0; 14]) > 5.0);
    }

    #[test]
    fn no_multiplier_runs_away() {
        let x = solve(&[equation(1000.0, &[(0, 1.0)]), equation(1000.0, &[(0, 1.0)])]);
        assert!(x[0] <= MOST);
    }
}
