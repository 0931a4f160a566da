//! From the program's fractions to a policy that fits to the byte: cache and hidden states rounded to
//! whole sequences, weights to whole panels, the exact footprint taken, and the program solved again
//! with what was found missing. Which candidate is tried is search.rs.

use crate::cost::affine::{CACHE, HIDDEN, SHARES, ShareVector, share_vector, shares_from};
use crate::cost::estimate::total_s;
use crate::cost::footprint::{BlockShape, Footprint};
use crate::cost::terms::{TermInput, Terms};
use crate::placement::Placement;
use crate::planner::lp::{Equality, Optimum, Program};
use crate::planner::space::{Candidate, Priced, Space};
use crate::policy::Policy;
use crate::tier::{PerTier, Tier};

/// Re-solves of one program until its realised bytes fit.
const REPAIRS: usize = 8;
/// Blocks of up to this many sequences try every way to round cache and hidden states.
const ROUNDED_ONE_BY_ONE: usize = 64;
/// A rounding this near (relative) to the program's optimum needs no other.
const ROUNDED_WELL: f64 = 0.002;
/// Whole panels make two equal optima differ by this much (relative).
const EQUALLY_FAST: f64 = 1e-9;
/// A set of things on disk whose optimum is no better than this (relative) is not rounded.
const SAME_START: f64 = 1e-4;
/// Bytes that a repair takes off beyond what was missing, so that it ends.
const REPAIR_BYTES: f64 = 65536.0;
/// Unused bytes, as part of the budget, that are worth another solve.
const WORTH_USING: f64 = 0.002;

/// A policy that fits, and what it takes.
#[derive(Clone, Debug)]
pub struct Realised {
    pub candidate: Candidate,
    pub policy: Policy,
    pub placement: Placement,
    pub footprint: Footprint,
    /// Seconds at the realised shares, as the estimate has them, per token where the block is free.
    pub cost_s: f64,
}

/// A policy's exact bytes, fitting or not.
pub struct Built {
    pub policy: Policy,
    pub placement: Placement,
    pub footprint: Footprint,
}

impl Built {
    pub fn new(space: &Space, priced: &Priced, shares: &ShareVector) -> Self {
        let mut policy = Policy {
            shares: shares_from(shares),
            ..priced.policy.clone()
        };
        let mut placement = Placement::new(space.model, &policy);
        if let Some(bare) = without_crumbs(shares, &placement) {
            policy.shares = shares_from(&bare);
            placement = Placement::new(space.model, &policy);
        }
        let block = BlockShape::from_lengths(&priced.lengths, &policy, &placement);
        let footprint = space.footprint((&policy, &placement, &block));
        Built {
            policy,
            placement,
            footprint,
        }
    }

    /// Bytes beyond each tier's room.
    pub fn missing_bytes(&self, space: &Space) -> PerTier<u64> {
        let mut missing = PerTier::default();
        for tier in Tier::ALL {
            let room = space.room_bytes(tier, self.policy.compress_weight) as u64;
            missing[tier] = self.footprint.total(tier).saturating_sub(room);
        }
        missing
    }

    pub fn fits(&self, space: &Space) -> bool {
        self.missing_bytes(space) == PerTier::default()
    }

    pub fn realised(self, space: &Space, candidate: &Candidate, priced: &Priced) -> Realised {
        let realised = self.placement.realised();
        let shares = share_vector(&realised);
        let terms = Terms::new(&TermInput {
            model: space.model,
            moments: &priced.moments,
            rates: &space.rates,
            policy: &self.policy,
            cpu_side: realised.weights.by_cpu() > 0.0,
            at: Some(shares),
        });
        Realised {
            cost_s: total_s(&terms, &shares) / priced.per(space.job),
            candidate: *candidate,
            policy: self.policy,
            placement: self.placement,
            footprint: self.footprint,
        }
    }
}

/// The shares without those that realise nothing: a share that is no panel would still bring buffers.
fn without_crumbs(shares: &ShareVector, placement: &Placement) -> Option<ShareVector> {
    let realised = share_vector(&placement.realised());
    let mut bare = *shares;
    for (share, real) in bare.iter_mut().zip(realised).take(CACHE) {
        *share = if real > 0.0 { *share } else { 0.0 };
    }
    let sum: f64 = bare[..CACHE].iter().sum();
    if bare == *shares || sum <= 0.0 {
        return None;
    }
    bare[..CACHE].iter_mut().for_each(|share| *share /= sum);
    Some(bare)
}

/// Where rounding begins: an optimum, the shares it may use and what it takes beside them.
#[derive(Clone, Copy)]
struct Start {
    optimum: Optimum,
    open: [bool; SHARES],
    overhead_bytes: PerTier<f64>,
}

/// One candidate being realised.
pub struct Realiser<'s, 'a> {
    pub space: &'s Space<'a>,
    pub candidate: &'s Candidate,
    pub priced: &'s Priced,
    pub equalities: &'s [Equality],
}

impl Realiser<'_, '_> {
    /// The full program's optimum in seconds: a lower bound for what can be realised.
    pub fn relaxed(&self) -> Option<Optimum> {
        let input = (self.equalities, self.priced.overhead_bytes);
        let program = self.space.program(self.candidate, self.priced, input);
        program.least_time()
    }

    /// The best policy that fits, near the program's optimum; none where it cannot get under `limit_s`
    /// (in units of `cost_s`). Buffers that come with a first streamed or spilled byte are steps that
    /// no linear program sees: where the optimum cannot be had nearly as it is, every set of things
    /// that may lie on disk is solved with its own buffers.
    pub fn realise(&self, relaxed: &Optimum, limit_s: f64) -> Option<Realised> {
        let per = self.priced.per(self.space.job);
        let used = on_disk(&relaxed.shares);
        let first = self.settle(relaxed, used);
        let mut best = first.and_then(|start| self.round(&start, limit_s));
        let near_s = relaxed.seconds / per * (1.0 + ROUNDED_WELL);
        if best.as_ref().is_some_and(|b| b.cost_s <= near_s) {
            return best;
        }
        for start in self.starts(relaxed, used) {
            let limit_s = best.as_ref().map_or(limit_s, |b| b.cost_s.min(limit_s));
            best = self.round(&start, limit_s * (1.0 - SAME_START)).or(best);
        }
        best
    }

    /// The best rounding of one start, if under the limit; the first that is near enough ends it.
    fn round(&self, start: &Start, limit_s: f64) -> Option<Realised> {
        let start_s = start.optimum.seconds / self.priced.per(self.space.job);
        if start_s > limit_s {
            return None;
        }
        let mut best: Option<Realised> = None;
        for rounding in self.roundings(&start.optimum.shares) {
            let Some(found) = self.fit(&rounding, start) else {
                continue;
            };
            let near = found.cost_s < start_s * (1.0 + ROUNDED_WELL);
            let better = |b: &Realised| found.cost_s < b.cost_s * (1.0 - 1e-12);
            if best.as_ref().is_none_or(better) {
                best = Some(found);
            }
            if near {
                break;
            }
        }
        best.filter(|b| b.cost_s <= limit_s)
    }

    /// The optimum of each other set of things that may lie on disk, fastest first.
    fn starts(&self, relaxed: &Optimum, but: u32) -> Vec<Start> {
        let sets = (0..8).filter(|&set| set != but);
        let mut starts: Vec<Start> = sets.filter_map(|set| self.settle(relaxed, set)).collect();
        starts.sort_by(|a, b| a.optimum.seconds.total_cmp(&b.optimum.seconds));
        starts
    }

    /// The best policy with one sequence's cache or hidden state somewhere else and the weights solved anew
    /// for what that leaves; none where that is no faster.
    pub fn shifted(&self, best: &Realised) -> Option<Realised> {
        let open = self.space.allowed(self.candidate);
        let shares = share_vector(&best.placement.realised());
        let start = Start {
            optimum: Optimum {
                shares,
                seconds: 0.0,
            },
            open,
            overhead_bytes: self.priced.overhead_bytes,
        };
        let mut found: Option<Realised> = None;
        for group in [CACHE..HIDDEN, HIDDEN..SHARES] {
            for (from, to) in group
                .clone()
                .flat_map(|a| group.clone().map(move |b| (a, b)))
            {
                if from == to || shares[from] <= 0.0 || !open[to] {
                    continue;
                }
                let counts = self.with_one_moved(&shares, (from, to));
                let limit_s = found.as_ref().unwrap_or(best).cost_s * (1.0 - EQUALLY_FAST);
                let next = self.fit(&counts, &start);
                found = next.filter(|n| n.cost_s < limit_s).or(found);
            }
        }
        found
    }

    /// Cache and hidden states as they are, but for one sequence.
    fn with_one_moved(&self, shares: &ShareVector, (from, to): (usize, usize)) -> Vec<Equality> {
        let slots = self.candidate.slots() as f64;
        let counts = (CACHE..SHARES).map(|index| {
            let moved = f64::from(index == to) - f64::from(index == from);
            ((shares[index] * slots).round() + moved, index)
        });
        let fixed = counts.map(|(count, index)| Equality {
            terms: vec![(index, 1.0)],
            value: count / slots,
        });
        fixed.collect()
    }

    /// A set's optimum, with the buffers that it brings with it.
    fn settle(&self, relaxed: &Optimum, set: u32) -> Option<Start> {
        let mut open = self.space.allowed(self.candidate);
        for (bit, shares) in DISK_SHARES.into_iter().enumerate() {
            let keep = set >> bit & 1 == 1;
            shares.for_each(|index| open[index] &= keep);
        }
        let inside = relaxed
            .shares
            .iter()
            .zip(open)
            .all(|(&share, ok)| ok || share == 0.0);
        let mut start = Start {
            optimum: *relaxed,
            open,
            overhead_bytes: self.priced.overhead_bytes,
        };
        if !inside {
            start.optimum = self.program(&start, self.equalities).least_time()?;
        }
        let built = Built::new(self.space, self.priced, &start.optimum.shares);
        for tier in Tier::ALL {
            start.overhead_bytes[tier] = self.overhead_of(&built, tier);
        }
        start.optimum = self
            .program(&start, self.equalities)
            .least_time_and_disk()?;
        Some(start)
    }

    fn program<'p>(&'p self, start: &Start, equalities: &'p [Equality]) -> Program<'p> {
        let input = (equalities, start.overhead_bytes);
        Program {
            allowed: start.open,
            ..self.space.program(self.candidate, self.priced, input)
        }
    }

    /// What a tier holds beside what grows with the shares.
    fn overhead_of(&self, built: &Built, tier: Tier) -> f64 {
        let shares = share_vector(&built.placement.realised());
        let grown = self.priced.terms.homes[tier].at(&shares);
        (built.footprint.total(tier) as f64 - grown).max(0.0)
    }

    /// Ways to cut cache and hidden states into whole sequences around the program's shares.
    fn roundings(&self, shares: &ShareVector) -> Vec<Vec<Equality>> {
        let slots = self.candidate.slots();
        let most = if slots <= ROUNDED_ONE_BY_ONE { 3 } else { 1 };
        let caches = group_roundings(&shares[CACHE..HIDDEN], slots, most);
        let hidden = group_roundings(&shares[HIDDEN..], slots, most);
        let mut all = Vec::new();
        for cache in &caches {
            for hidden in &hidden {
                let fixed = |(at, counts): (usize, &[usize; 3])| -> Vec<Equality> {
                    (0..3)
                        .map(|i| Equality {
                            terms: vec![(at + i, 1.0)],
                            value: counts[i] as f64 / slots as f64,
                        })
                        .collect()
                };
                let mut list = fixed((CACHE, cache));
                list.extend(fixed((HIDDEN, hidden)));
                all.push(list);
            }
        }
        all
    }

    /// Solves for the weights with cache and hidden states fixed, until the exact bytes fit.
    fn fit(&self, rounding: &[Equality], start: &Start) -> Option<Realised> {
        let mut start = *start;
        let mut best: Option<Realised> = None;
        let mut equalities = self.weight_equalities();
        equalities.extend_from_slice(rounding);
        for _ in 0..REPAIRS {
            let Some(optimum) = self.program(&start, &equalities).least_time() else {
                break;
            };
            let built = Built::new(self.space, self.priced, &optimum.shares);
            if !built.fits(self.space) {
                let missing = built.missing_bytes(self.space);
                for tier in Tier::ALL.into_iter().filter(|&t| missing[t] > 0) {
                    start.overhead_bytes[tier] += missing[tier] as f64 + REPAIR_BYTES;
                }
                continue;
            }
            let unused = self.unused(&built, &mut start.overhead_bytes);
            let found = built.realised(self.space, self.candidate, self.priced);
            let better = best.as_ref().is_none_or(|b| found.cost_s < b.cost_s);
            if better {
                best = Some(found);
            }
            if !better || !unused {
                break;
            }
        }
        best.map(|best| self.with_least_disk(best, (&start, &equalities)))
    }

    /// Among equally fast weights the ones with least disk, where they fit as well.
    fn with_least_disk(&self, best: Realised, input: (&Start, &[Equality])) -> Realised {
        let Some(optimum) = self.program(input.0, input.1).least_time_and_disk() else {
            return best;
        };
        let built = Built::new(self.space, self.priced, &optimum.shares);
        if !built.fits(self.space) {
            return best;
        }
        let found = built.realised(self.space, self.candidate, self.priced);
        if found.cost_s <= best.cost_s * (1.0 + EQUALLY_FAST) {
            found
        } else {
            best
        }
    }

    /// Where buffers turned out smaller than assumed, gives the bytes back. True if any are worth it.
    fn unused(&self, built: &Built, overhead_bytes: &mut PerTier<f64>) -> bool {
        let mut worth = false;
        for tier in [Tier::Gpu, Tier::Cpu] {
            let real = self.overhead_of(built, tier) + REPAIR_BYTES;
            let room = self.space.room_bytes(tier, false);
            if overhead_bytes[tier] - real > WORTH_USING * room {
                overhead_bytes[tier] = real;
                worth = true;
            }
        }
        worth
    }

    /// What was fixed for the weights; cache and hidden states are fixed by their rounding.
    fn weight_equalities(&self) -> Vec<Equality> {
        let of_weights = |e: &&Equality| e.terms.iter().all(|t| t.0 < CACHE);
        self.equalities.iter().filter(of_weights).cloned().collect()
    }
}

/// The disk's shares of weights, cache and hidden states.
const DISK_SHARES: [std::ops::Range<usize>; 3] = [3..CACHE, HIDDEN - 1..HIDDEN, SHARES - 1..SHARES];

/// Which of the three have a part on disk, as bits.
fn on_disk(shares: &ShareVector) -> u32 {
    let bits = DISK_SHARES.into_iter().enumerate();
    bits.map(|(bit, range)| u32::from(shares[range].iter().any(|&s| s > 0.0)) << bit)
        .sum()
}

/// Whole numbers around share · slots that sum to `slots`, the nearest first, at most `most` of them.
fn group_roundings(shares: &[f64], slots: usize, most: usize) -> Vec<[usize; 3]> {
    let want: Vec<f64> = shares.iter().map(|s| s * slots as f64).collect();
    let floor: Vec<usize> = want.iter().map(|w| (w + 1e-6).floor() as usize).collect();
    let base = [floor[0], floor[1], floor[2]];
    let left = slots.saturating_sub(base.iter().sum());
    let mut open: Vec<usize> = (0..3)
        .filter(|&i| want[i] - base[i] as f64 > 1e-6)
        .collect();
    open.sort_by(|&a, &b| (want[b] - base[b] as f64).total_cmp(&(want[a] - base[a] as f64)));
    if left == 0 || open.is_empty() {
        let mut whole = base;
        let fullest = (0..3).max_by(|&a, &b| want[a].total_cmp(&want[b]));
        whole[fullest.unwrap_or(1)] += left;
        return vec![whole];
    }
    // Leave out one of the open tiers (left = 2) or take one (left = 1), in every way.
    let with = |chosen: &[usize]| {
        let mut counts = base;
        chosen.iter().for_each(|&i| counts[i] += 1);
        let short = slots - counts.iter().sum::<usize>().min(slots);
        counts[chosen[0]] += short;
        counts
    };
    let mut all: Vec<[usize; 3]> = if left == 1 {
        open.iter().map(|&i| with(&[i])).collect()
    } else if open.len() < 3 {
        vec![with(&open)]
    } else {
        vec![
            with(&[open[0], open[1]]),
            with(&[open[0], open[2]]),
            with(&[open[1], open[2]]),
        ]
    };
    all.dedup();
    all.truncate(most);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roundings_are_whole_and_complete() {
        for shares in [
            [0.3, 0.3, 0.4],
            [0.0, 0.26, 0.74],
            [1.0, 0.0, 0.0],
            [0.25, 0.25, 0.5],
        ] {
            for slots in [1, 2, 3, 4, 7, 64] {
                let all = group_roundings(&shares, slots, 3);
                assert!(!all.is_empty());
                for counts in all {
                    assert_eq!(counts.iter().sum::<usize>(), slots, "{shares:?} {slots}");
                    for (count, share) in counts.iter().zip(shares) {
                        assert!((*count as f64 - share * slots as f64).abs() <= 1.0 + 1e-6);
                        assert!(share > 0.0 || *count == 0);
                    }
                }
            }
        }
    }
}
