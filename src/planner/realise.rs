//! From the program's fractions to a policy that fits to the byte: cache and hidden states rounded to
//! whole sequences, weights to whole panels, the exact footprint taken, and the program solved again
//! with what was found missing. Which candidate is tried is search.rs.

use crate::cost::affine::{CACHE, HIDDEN, ShareVector, share_vector, shares_from};
use crate::cost::estimate::total_s;
use crate::cost::footprint::{BlockShape, Footprint};
use crate::placement::Placement;
use crate::planner::lp::{Equality, Optimum};
use crate::planner::space::{Candidate, Priced, Space, overhead};
use crate::policy::Policy;
use crate::tier::{PerTier, Tier};

/// Re-solves of one program until its realised bytes fit.
const REPAIRS: usize = 8;
/// Blocks of up to this many sequences try every way to round cache and hidden states.
const ROUNDED_ONE_BY_ONE: usize = 64;
/// A rounding this near (relative) to the program's optimum needs no other.
const ROUNDED_WELL: f64 = 0.002;
/// Whole panels make two equal optima differ by this much (relative).
const EQUALLY_FAST: f64 = 1e-5;
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
    /// The table's seconds at the realised shares, per token where the block is free.
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
        let policy = Policy {
            shares: shares_from(shares),
            ..priced.policy.clone()
        };
        let placement = Placement::new(space.model, &policy);
        let block = BlockShape::new(&priced.workload, &policy, &placement);
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
        let shares = share_vector(&self.placement.realised());
        Realised {
            cost_s: total_s(&priced.terms, &shares) / priced.per(space.job),
            candidate: *candidate,
            policy: self.policy,
            placement: self.placement,
            footprint: self.footprint,
        }
    }
}

/// One candidate being realised.
pub struct Realiser<'s, 'a> {
    pub space: &'s Space<'a>,
    pub candidate: &'s Candidate,
    pub priced: &'s Priced<'a>,
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
    /// (in units of `cost_s`).
    pub fn realise(&self, relaxed: &Optimum, limit_s: f64) -> Option<Realised> {
        let (start, overhead_bytes) = self.settle(relaxed);
        let start_s = start.seconds / self.priced.per(self.space.job);
        if start_s > limit_s {
            return None;
        }
        let mut best: Option<Realised> = None;
        for rounding in self.roundings(&start.shares) {
            let Some(found) = self.fit(&rounding, overhead_bytes) else {
                continue;
            };
            let better = |b: &Realised| found.cost_s < b.cost_s * (1.0 - 1e-12);
            let near = found.cost_s < start_s * (1.0 + ROUNDED_WELL);
            if best.as_ref().is_none_or(better) {
                best = Some(found);
            }
            if near {
                break;
            }
        }
        best
    }

    /// The optimum once more, with the buffers that the first one brings with it.
    fn settle(&self, relaxed: &Optimum) -> (Optimum, PerTier<f64>) {
        let built = Built::new(self.space, self.priced, &relaxed.shares);
        let mut overhead_bytes = PerTier::default();
        for tier in Tier::ALL {
            overhead_bytes[tier] = self.overhead_of(&built, tier);
        }
        let input = (self.equalities, overhead_bytes);
        let again = self.space.program(self.candidate, self.priced, input);
        match again.least_time_and_disk() {
            Some(optimum) => (optimum, overhead_bytes),
            None => (*relaxed, self.priced.overhead_bytes),
        }
    }

    fn overhead_of(&self, built: &Built, tier: Tier) -> f64 {
        if tier == Tier::Disk {
            // Spilled cache and hidden states are the homes; their page rounding is overhead.
            let homes = self
                .priced
                .terms
                .homes
                .disk
                .at(&share_vector(&built.placement.realised()));
            return (built.footprint.total(tier) as f64 - homes).max(0.0);
        }
        overhead(&built.footprint, tier)
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
    fn fit(&self, rounding: &[Equality], start: PerTier<f64>) -> Option<Realised> {
        let mut overhead_bytes = start;
        let mut best: Option<Realised> = None;
        let mut equalities = self.weight_equalities();
        equalities.extend_from_slice(rounding);
        for _ in 0..REPAIRS {
            let input = (equalities.as_slice(), overhead_bytes);
            let program = self.space.program(self.candidate, self.priced, input);
            let Some(optimum) = program.least_time() else {
                break;
            };
            let built = Built::new(self.space, self.priced, &optimum.shares);
            let missing = built.missing_bytes(self.space);
            let mut changed = false;
            for tier in Tier::ALL {
                if missing[tier] > 0 {
                    overhead_bytes[tier] += missing[tier] as f64 + REPAIR_BYTES;
                    changed = true;
                }
            }
            if !changed {
                let unused = self.unused(&built, &mut overhead_bytes);
                let found = built.realised(self.space, self.candidate, self.priced);
                let better = best.as_ref().is_none_or(|b| found.cost_s < b.cost_s);
                if better {
                    best = Some(found);
                }
                if !better || !unused {
                    break;
                }
            }
        }
        best.map(|best| self.with_least_disk(best, (&equalities, overhead_bytes)))
    }

    /// Among equally fast weights the ones with least disk, where they fit as well.
    fn with_least_disk(&self, best: Realised, input: (&[Equality], PerTier<f64>)) -> Realised {
        let program = self.space.program(self.candidate, self.priced, input);
        let Some(optimum) = program.least_time_and_disk() else {
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
