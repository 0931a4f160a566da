//! The linear program over the eleven shares: least total seconds under the rows of each segment and
//! the bytes of each tier. One solve with given capacities; what the capacities are and what is done
//! with a fractional answer is search.rs and realise.rs.

use crate::cost::affine::{Affine, GROUPS, SHARES, ShareVector};
use crate::cost::estimate::total_s;
use crate::cost::terms::{Bound, Row, Terms};
use crate::tier::{PerTier, Tier};
use good_lp::{
    Expression, ProblemVariables, Solution, SolverModel, Variable, constraint, microlp, variable,
};

/// Relative room above the least time within which less disk is preferred.
const TIE_ROOM: f64 = 1e-7;
/// Shares under this are numerical noise.
const NOISE: f64 = 1e-9;

/// Σ coefficient · share = value.
#[derive(Clone, Debug)]
pub struct Equality {
    pub terms: Vec<(usize, f64)>,
    pub value: f64,
}

/// One program.
pub struct Program<'a> {
    pub terms: &'a Terms,
    /// Shares that this device and these choices allow.
    pub allowed: [bool; SHARES],
    pub equalities: &'a [Equality],
    /// Bytes for weights, cache and activations at home.
    pub capacity_bytes: PerTier<f64>,
}

/// An optimal point: shares, and the program's seconds there.
#[derive(Clone, Copy, Debug)]
pub struct Optimum {
    pub shares: ShareVector,
    pub seconds: f64,
}

/// One epigraph: time ≥ each row.
struct Stage<'a> {
    times: f64,
    rows: Vec<&'a Row>,
}

impl Program<'_> {
    fn stages(&self) -> Vec<Stage<'_>> {
        let segments = self.terms.segments.iter();
        segments
            .map(|s| Stage {
                times: s.times,
                rows: s.rows.iter().collect(),
            })
            .collect()
    }

    /// Least seconds; None where the capacities leave no point.
    pub fn least_time(&self) -> Option<Optimum> {
        let stages = self.stages();
        let shares = self.solve(&stages, None)?;
        Some(Optimum {
            shares,
            seconds: total_s(self.terms, &shares),
        })
    }

    /// Least seconds, and among equals least disk, then least DRAM: one answer on every platform.
    pub fn least_time_and_disk(&self) -> Option<Optimum> {
        let fastest = self.least_time()?;
        let stages = self.stages();
        let limit_s = fastest.seconds * (1.0 + TIE_ROOM);
        let Some(shares) = self.solve(&stages, Some(limit_s)) else {
            return Some(fastest);
        };
        let seconds = total_s(self.terms, &shares);
        // A solver that strayed beyond the room must not cost time.
        if seconds > fastest.seconds * (1.0 + 10.0 * TIE_ROOM) {
            return Some(fastest);
        }
        Some(Optimum { shares, seconds })
    }

    /// A lower bound from a far smaller program: the maximum of sums is at most the sum of maxima.
    pub fn bound_s(&self) -> Option<f64> {
        let rows = merged_rows(self.terms);
        let stage = Stage {
            times: 1.0,
            rows: rows.iter().collect(),
        };
        let shares = self.solve(&[stage], None)?;
        let seconds = rows.iter().map(|r| r.seconds.at(&shares));
        Some(seconds.fold(0.0, f64::max))
    }

    fn solve(&self, stages: &[Stage], limit_s: Option<f64>) -> Option<ShareVector> {
        if self.is_hopeless() {
            return None;
        }
        let scale_s = self.scale_s(stages);
        let mut vars = ProblemVariables::new();
        let shares: Vec<Option<Variable>> = self
            .allowed
            .iter()
            .map(|&ok| ok.then(|| vars.add(variable().min(0.0).max(1.0))))
            .collect();
        let mut total = Expression::with_capacity(stages.len() + SHARES);
        let mut rows: Vec<(Variable, Expression)> = Vec::new();
        for stage in stages {
            let factor = stage.times / scale_s;
            if let [only] = stage.rows.as_slice() {
                total += expression(&only.seconds, &shares, factor);
                continue;
            }
            let time = vars.add(variable().min(0.0));
            total.add_mul(1.0, time);
            for row in &stage.rows {
                rows.push((time, expression(&row.seconds, &shares, factor)));
            }
        }
        let goal = match limit_s {
            None => total.clone(),
            Some(_) => self.disk_then_dram(&shares),
        };
        let mut problem = vars.minimise(goal).using(microlp);
        for (time, row) in rows {
            problem.add_constraint(constraint!(row <= time));
        }
        if let Some(limit_s) = limit_s {
            problem.add_constraint(constraint!(total <= limit_s / scale_s));
        }
        for (expression, value) in self.sums(&shares) {
            problem.add_constraint(constraint!(expression == value));
        }
        for (bytes, capacity) in self.tiers(&shares) {
            problem.add_constraint(constraint!(bytes <= capacity));
        }
        let solution = problem.solve().ok()?;
        let value = |v: &Option<Variable>| v.map_or(0.0, |v| solution.value(v));
        let mut found = [0.0; SHARES];
        for (share, variable) in found.iter_mut().zip(&shares) {
            *share = value(variable);
        }
        tidy(found)
    }

    /// True where even the homes that take least do not fit: most large blocks, seen without a solve.
    fn is_hopeless(&self) -> bool {
        let fixed = |index: usize| {
            let single =
                |e: &&Equality| matches!(e.terms.as_slice(), [(i, f)] if *i == index && *f == 1.0);
            self.equalities.iter().find(single).map(|e| e.value)
        };
        Tier::ALL.into_iter().any(|tier| {
            let coef = &self.terms.homes[tier].coef;
            let least = |group: &std::ops::Range<usize>| {
                let known: Vec<(usize, f64)> = group
                    .clone()
                    .filter_map(|i| fixed(i).map(|share| (i, share)))
                    .collect();
                let taken: f64 = known.iter().map(|(i, share)| share * coef[*i]).sum();
                let left = 1.0 - known.iter().map(|k| k.1).sum::<f64>();
                let open = group
                    .clone()
                    .filter(|&i| self.allowed[i] && fixed(i).is_none());
                let cheapest = open.map(|i| coef[i]).fold(f64::INFINITY, f64::min);
                if left > 1e-9 && cheapest.is_finite() {
                    taken + left * cheapest
                } else {
                    taken
                }
            };
            let bytes: f64 = GROUPS.iter().map(least).sum();
            bytes > self.capacity_bytes[tier] + 1.0
        })
    }

    /// Seconds of the order of the answer, so that the program's numbers are near one.
    fn scale_s(&self, stages: &[Stage]) -> f64 {
        let most = |rows: &[&Row]| {
            let at_zero = rows.iter().map(|r| {
                let largest = r.seconds.coef.iter().fold(0.0f64, |a, &b| a.max(b));
                r.seconds.constant + largest
            });
            at_zero.fold(0.0, f64::max)
        };
        let sum: f64 = stages.iter().map(|s| s.times * most(&s.rows)).sum();
        sum.max(1e-9)
    }

    fn disk_then_dram(&self, shares: &[Option<Variable>]) -> Expression {
        let homes = &self.terms.homes;
        let sum = |tier: Tier| homes[tier].coef.iter().sum::<f64>();
        let scale = 1.0 / Tier::ALL.into_iter().map(sum).sum::<f64>().max(1.0);
        // Disk weights have no bytes of their own: the store lies there anyway. They are read all the same.
        let mut disk = homes.disk;
        disk.coef[3] = homes.cpu.coef[2];
        disk.coef[4] = homes.cpu.coef[2];
        expression(&disk, shares, scale) + expression(&homes.cpu, shares, 1e-3 * scale)
    }

    fn sums(&self, shares: &[Option<Variable>]) -> Vec<(Expression, f64)> {
        let groups = GROUPS.iter().map(|group| Equality {
            terms: group.clone().map(|i| (i, 1.0)).collect(),
            value: 1.0,
        });
        groups
            .chain(self.equalities.iter().cloned())
            .map(|equality| {
                let mut sum = Expression::with_capacity(equality.terms.len());
                for (index, factor) in &equality.terms {
                    if let Some(variable) = shares[*index] {
                        sum.add_mul(*factor, variable);
                    }
                }
                (sum, equality.value)
            })
            .collect()
    }

    fn tiers(&self, shares: &[Option<Variable>]) -> Vec<(Expression, f64)> {
        let row = |tier: Tier| {
            let homes = &self.terms.homes[tier];
            let scale = homes.coef.iter().fold(1.0f64, |a, &b| a.max(b));
            let capacity = self.capacity_bytes[tier] / scale;
            (expression(homes, shares, 1.0 / scale), capacity)
        };
        let used = |tier: &Tier| !self.terms.homes[*tier].is_zero();
        Tier::ALL.into_iter().filter(used).map(row).collect()
    }
}

fn expression(affine: &Affine, shares: &[Option<Variable>], factor: f64) -> Expression {
    let mut sum = Expression::with_capacity(SHARES);
    for (coef, variable) in affine.coef.iter().zip(shares) {
        if let Some(variable) = variable
            && *coef != 0.0
        {
            sum.add_mul(coef * factor, *variable);
        }
    }
    sum + affine.constant * factor
}

/// The rows of all segments added up by what they mean. A segment that lost a row to a larger one has
/// none to add: the bound only gets lower.
fn merged_rows(terms: &Terms) -> Vec<Row> {
    let mut merged: Vec<Row> = Vec::new();
    let mut serial = Affine::default();
    for segment in &terms.segments {
        if let [only] = segment.rows.as_slice() {
            serial.add_scaled(&only.seconds, segment.times);
            continue;
        }
        for row in &segment.rows {
            let same = merged.iter_mut().find(|m| m.bound == row.bound);
            match same {
                Some(found) => found.seconds.add_scaled(&row.seconds, segment.times),
                None => merged.push(Row {
                    bound: row.bound,
                    seconds: row.seconds.scaled(segment.times),
                }),
            }
        }
    }
    if merged.is_empty() {
        merged.push(Row {
            bound: Bound::Sum,
            seconds: Affine::default(),
        });
    }
    merged.iter_mut().for_each(|row| row.seconds.add(&serial));
    merged
}

/// Noise removed and every group summing to one exactly enough.
fn tidy(mut shares: ShareVector) -> Option<ShareVector> {
    for group in GROUPS {
        let part = &mut shares[group];
        for share in part.iter_mut() {
            *share = if *share < NOISE { 0.0 } else { share.min(1.0) };
        }
        let sum: f64 = part.iter().sum();
        if !(0.5..=1.5).contains(&sum) {
            return None;
        }
        part.iter_mut().for_each(|share| *share /= sum);
    }
    Some(shares)
}
