//! The linear program over the eleven shares: least total seconds under the rows of each segment and
//! the bytes of each tier. One solve with given capacities; what the capacities are and what is done
//! with a fractional answer is search.rs and realise.rs.

use crate::cost::affine::{Affine, GROUPS, SHARES, ShareVector};
use crate::cost::estimate::total_s;
use crate::cost::terms::{Bound, Row, Terms};
use crate::tier::{PerTier, Tier};
use good_lp::{
    Constraint, Expression, ProblemVariables, Solution, SolverModel, Variable, constraint, microlp,
    variable,
};

/// Relative room above the least time within which less disk is preferred.
const TIE_ROOM: f64 = 1e-7;
/// Shares under this are numerical noise.
const NOISE: f64 = 1e-9;

/// The shares that need no solving.
type Known = [Option<f64>; SHARES];
/// The others' variables.
type Shares = [Option<Variable>; SHARES];

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
        let sums = self.sums();
        let known = self.known(&sums)?;
        if self.is_hopeless(&known) {
            return None;
        }
        if known.iter().all(Option::is_some) {
            return tidy(known.map(Option::unwrap_or_default));
        }
        let scale_s = self.scale_s(stages);
        let stages = stages.iter().map(|stage| stage.reduced(&known, scale_s));
        let (single, several): (Vec<_>, Vec<_>) = stages.partition(|rows| rows.len() == 1);
        let mut linear = Affine::default();
        single.iter().flatten().for_each(|row| linear.add(row));
        let mut vars = ProblemVariables::new();
        let shares: Shares = known.map(|share| match share {
            Some(_) => None,
            None => Some(vars.add(variable().min(0.0).max(1.0))),
        });
        let mut total = expression(&linear, &shares);
        let mut rows: Vec<Constraint> = Vec::new();
        for stage in &several {
            let time = vars.add(variable().min(0.0));
            total.add_mul(1.0, time);
            let row = |row| constraint!(expression(row, &shares) <= time);
            rows.extend(stage.iter().map(row));
        }
        let goal = match limit_s {
            None => total.clone(),
            Some(_) => expression(&self.disk_then_dram(), &shares),
        };
        rows.extend(limit_s.map(|limit_s| constraint!(total <= limit_s / scale_s)));
        rows.extend(self.sum_rows(&sums, &known, &shares));
        rows.extend(self.tier_rows(&known, &shares));
        let problem = vars.minimise(goal).using(microlp);
        let solution = problem.with_all(rows).solve().ok()?;
        let value = |i: usize| match (known[i], shares[i]) {
            (None, Some(variable)) => solution.value(variable),
            (share, _) => share.unwrap_or(0.0),
        };
        tidy(std::array::from_fn(value))
    }

    /// What follows from the equations alone: most shares of a policy whose cache and hidden states are
    /// whole sequences already. None where they contradict each other.
    fn known(&self, sums: &[Equality]) -> Option<Known> {
        let mut known = self.allowed.map(|ok| (!ok).then_some(0.0));
        loop {
            let mut learnt = false;
            for sum in sums {
                let mut open = sum.terms.iter().filter(|term| known[term.0].is_none());
                let left = sum.left(&known);
                match (open.next(), open.next()) {
                    (None, _) if left.abs() > NOISE => return None,
                    (Some(&(index, factor)), None) => {
                        let share = left / factor;
                        if !(-NOISE..=1.0 + NOISE).contains(&share) {
                            return None;
                        }
                        known[index] = Some(share.clamp(0.0, 1.0));
                        learnt = true;
                    }
                    _ => {}
                }
            }
            if !learnt {
                return Some(known);
            }
        }
    }

    /// True where even the homes that take least do not fit: most large blocks, seen without a solve.
    fn is_hopeless(&self, known: &Known) -> bool {
        Tier::ALL.into_iter().any(|tier| {
            let coef = &self.terms.homes[tier].coef;
            let least = |group: &std::ops::Range<usize>| {
                let share = |i: usize| known[i].unwrap_or(0.0);
                let taken: f64 = group.clone().map(|i| share(i) * coef[i]).sum();
                let left = 1.0 - group.clone().map(share).sum::<f64>();
                let open = group.clone().filter(|&i| known[i].is_none());
                let cheapest = open.map(|i| coef[i]).fold(f64::INFINITY, f64::min);
                if left > NOISE && cheapest.is_finite() {
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

    fn disk_then_dram(&self) -> Affine {
        let homes = &self.terms.homes;
        let sum = |tier: Tier| homes[tier].coef.iter().sum::<f64>();
        let scale = 1.0 / Tier::ALL.into_iter().map(sum).sum::<f64>().max(1.0);
        // Disk weights have no bytes of their own: the store lies there anyway. They are read all the same.
        let mut disk = homes.disk;
        disk.coef[3] = homes.cpu.coef[2];
        disk.coef[4] = homes.cpu.coef[2];
        disk.plus(&homes.cpu.scaled(1e-3)).scaled(scale)
    }

    /// The groups', and what the caller fixed.
    fn sums(&self) -> Vec<Equality> {
        let groups = GROUPS.iter().map(|group| Equality {
            terms: group.clone().map(|i| (i, 1.0)).collect(),
            value: 1.0,
        });
        groups.chain(self.equalities.iter().cloned()).collect()
    }

    fn sum_rows(&self, sums: &[Equality], known: &Known, shares: &Shares) -> Vec<Constraint> {
        let row = |sum: &Equality| {
            let open = sum.terms.iter().filter_map(|&(i, f)| Some((shares[i]?, f)));
            let open: Vec<(Variable, f64)> = open.collect();
            let left = sum.left(known);
            (!open.is_empty()).then(|| constraint!(weighted(open) == left))
        };
        sums.iter().filter_map(row).collect()
    }

    fn tier_rows(&self, known: &Known, shares: &Shares) -> Vec<Constraint> {
        let row = |tier: Tier| {
            let homes = reduced(&self.terms.homes[tier], known);
            let scale = homes.coef.iter().fold(1.0f64, |a, &b| a.max(b));
            let room = (self.capacity_bytes[tier] - homes.constant) / scale;
            let open: Vec<_> = terms(&homes.scaled(1.0 / scale), shares).collect();
            (!open.is_empty()).then(|| constraint!(weighted(open) <= room))
        };
        Tier::ALL.into_iter().filter_map(row).collect()
    }
}

impl Equality {
    /// What the shares that are not known sum to.
    fn left(&self, known: &Known) -> f64 {
        let there = self.terms.iter();
        self.value
            - there
                .map(|&(i, f)| f * known[i].unwrap_or(0.0))
                .sum::<f64>()
    }
}

impl Stage<'_> {
    /// The rows in the shares that are open, without those that can never be the largest.
    fn reduced(&self, known: &Known, scale_s: f64) -> Vec<Affine> {
        let row = |row: &&Row| reduced(&row.seconds, known).scaled(self.times / scale_s);
        let mut kept: Vec<Affine> = Vec::with_capacity(self.rows.len());
        for row in self.rows.iter().map(row) {
            if !kept.iter().any(|other| row.is_below(other)) {
                kept.retain(|other| !other.is_below(&row));
                kept.push(row);
            }
        }
        kept
    }
}

/// An affine function of the open shares.
fn reduced(affine: &Affine, known: &Known) -> Affine {
    let mut open = *affine;
    for (coef, share) in open.coef.iter_mut().zip(known) {
        if let Some(share) = share {
            open.constant += *coef * share;
            *coef = 0.0;
        }
    }
    open
}

fn expression(affine: &Affine, shares: &Shares) -> Expression {
    weighted(terms(affine, shares).collect()) + affine.constant
}

fn weighted(terms: Vec<(Variable, f64)>) -> Expression {
    let mut sum = Expression::with_capacity(terms.len());
    terms
        .into_iter()
        .for_each(|(variable, factor)| sum.add_mul(factor, variable));
    sum
}

fn terms<'a>(affine: &'a Affine, shares: &'a Shares) -> impl Iterator<Item = (Variable, f64)> + 'a {
    let pairs = affine.coef.iter().zip(shares);
    pairs.filter_map(|(&coef, &variable)| Some((variable?, coef)).filter(|_| coef != 0.0))
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
