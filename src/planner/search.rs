//! The outer search over discrete choices: quick bounds first, full programs only where a bound could
//! still win, exact policies only where a program could. What a choice costs is cost/.

use crate::cost::affine::{CACHE, HIDDEN, SHARES, ShareVector};
use crate::placement::WeightHome;
use crate::planner::lp::Equality;
use crate::planner::parallel::in_parallel;
use crate::planner::polish::polish;
use crate::planner::realise::{Built, Realised, Realiser};
use crate::planner::space::{Bounds, Candidate, Space};
use crate::tier::{PerTier, Tier};

/// A candidate that cannot be better by more than this (relative) is not looked at further.
const WORTH_A_LOOK: f64 = 1e-9;
/// Whole panels and sequences may have cost others of this nearness (relative) their place.
const ROUNDING: f64 = 0.003;
/// So many of them are polished.
const POLISHED: usize = 4;

/// Candidates that are looked at together, on as many cores as there are: a fixed number, so that the
/// same ones are looked at everywhere.
const WAVE: usize = 4;

/// Realised policies, best first: the best one is the best of the whole space within rounding.
pub fn search(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> Vec<Realised> {
    search_in(space, &space.bounds(keep), &|_| true)
}

/// The same over candidates whose bounds are known.
pub fn search_in(
    space: &Space,
    bounds: &Bounds,
    keep: &dyn Fn(&Candidate) -> bool,
) -> Vec<Realised> {
    let equalities = space.equalities();
    let mut found: Vec<Realised> = Vec::new();
    let mut limit_s = f64::INFINITY;
    let kept: Vec<&(f64, Candidate)> = bounds.iter().filter(|(_, c)| keep(c)).collect();
    for wave in kept.chunks(WAVE) {
        let open: Vec<&Candidate> = wave
            .iter()
            .filter(|(bound_s, _)| *bound_s <= limit_s)
            .map(|(_, candidate)| candidate)
            .collect();
        if open.is_empty() {
            break;
        }
        let realised = in_parallel(&open, |candidate| {
            try_candidate(space, candidate, (&equalities, limit_s))
        });
        for realised in realised {
            limit_s = limit_s.min(realised.cost_s * (1.0 - WORTH_A_LOOK));
            found.push(realised);
        }
    }
    if found.is_empty() {
        found.extend(smallest_fitting(space, &|c| kept.iter().any(|k| k.1 == *c)));
    }
    sort(&mut found);
    let near_s = found
        .first()
        .map_or(0.0, |best| best.cost_s * (1.0 + ROUNDING));
    let near = found.iter().take_while(|r| r.cost_s <= near_s).count();
    let rest = found.split_off(near.min(POLISHED));
    found = in_parallel(&found, |near| Some(polish(space, near.clone())));
    found.extend(rest);
    sort(&mut found);
    found
}

fn sort(found: &mut [Realised]) {
    found.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s).then(order(a).cmp(&order(b))));
}

fn try_candidate(
    space: &Space,
    candidate: &Candidate,
    (equalities, limit_s): (&[Equality], f64),
) -> Option<Realised> {
    let priced = space.price(candidate);
    let realiser = Realiser {
        space,
        candidate,
        priced: &priced,
        equalities,
    };
    let relaxed = realiser.relaxed()?;
    if relaxed.seconds / priced.per(space.job) > limit_s {
        return None;
    }
    realiser.realise(&relaxed, limit_s)
}

/// Among equals: smaller blocks, then less disk, then less DRAM.
fn order(r: &Realised) -> (usize, u64, u64) {
    let disk = r.placement.weight_bytes(WeightHome::DiskCompute)
        + r.placement.weight_bytes(WeightHome::DiskShip)
        + r.footprint.total(Tier::Disk);
    (r.candidate.slots(), disk, r.footprint.total(Tier::Cpu))
}

/// The nearest thing where nothing fits: the policy that lacks least.
pub struct Nearest {
    pub candidate: Candidate,
    pub built: Built,
    pub missing_bytes: PerTier<u64>,
}

/// Corner placements (each group at one home) of the smallest blocks: what no program can undercut by
/// more than parts of buffers. They are tried where no program's point could be realised, and they
/// say how much is missing where nothing fits.
pub fn corners(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> Vec<(Candidate, Built)> {
    let mut all = Vec::new();
    let candidates: Vec<Candidate> = space.candidates().into_iter().filter(keep).collect();
    let least = candidates.iter().map(Candidate::slots).min().unwrap_or(0);
    for candidate in candidates.iter().filter(|c| c.slots() == least) {
        let priced = space.price(candidate);
        for shares in corner_shares(space, candidate) {
            all.push((*candidate, Built::new(space, &priced, &shares)));
        }
    }
    all
}

/// The least lacking corner; None where the choices leave no candidate at all.
pub fn nearest(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> Option<Nearest> {
    let weigh = |m: &PerTier<u64>| m.gpu as f64 * 2.0 + m.cpu as f64 + m.disk as f64 / 8.0;
    let lacking = corners(space, keep).into_iter().map(|(candidate, built)| {
        let missing_bytes = built.missing_bytes(space);
        Nearest {
            candidate,
            built,
            missing_bytes,
        }
    });
    lacking.min_by(|a, b| weigh(&a.missing_bytes).total_cmp(&weigh(&b.missing_bytes)))
}

fn smallest_fitting(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> Option<Realised> {
    let fitting = corners(space, keep)
        .into_iter()
        .filter(|(_, b)| b.fits(space));
    let realised = fitting.map(|(candidate, built)| {
        let priced = space.price(&candidate);
        built.realised(space, &candidate, &priced)
    });
    realised.min_by(|a, b| a.cost_s.total_cmp(&b.cost_s))
}

/// All corners that the device allows, or the percentages that were asked for with everything outside
/// the GPU shipped or multiplied in place.
fn corner_shares(space: &Space, candidate: &Candidate) -> Vec<ShareVector> {
    let allowed = space.allowed(candidate);
    let homes = |range: std::ops::Range<usize>| range.filter(|&i| allowed[i]).collect::<Vec<_>>();
    if let Some(percent) = space.fixed.percent {
        return fixed_corners(space, candidate, percent);
    }
    let mut all = Vec::new();
    for weights in weight_corners(space, &allowed) {
        for cache in homes(CACHE..HIDDEN) {
            for hidden in homes(HIDDEN..SHARES) {
                let mut vector = weights;
                [cache, hidden].into_iter().for_each(|i| vector[i] = 1.0);
                all.push(vector);
            }
        }
    }
    all
}

/// All weights at one home. Where a `--cpu-compute-share` is fixed, those outside the GPU have two: one for the part
/// that the CPU multiplies and one for what is shipped.
fn weight_corners(space: &Space, allowed: &[bool; SHARES]) -> Vec<ShareVector> {
    let whole = |home| [(home, 1.0), (home, 0.0)];
    let part = space.fixed.cpu_compute_share;
    let corners: Vec<[(usize, f64); 2]> = match part.filter(|_| space.device().has_gpu()) {
        None => (0..CACHE).map(whole).collect(),
        Some(part) => {
            let cut = |(shipped, computed)| [(shipped, 1.0 - part), (computed, part)];
            let mut cuts = vec![whole(0)];
            cuts.extend([(1, 2), (1, 4), (3, 2), (3, 4)].map(cut));
            cuts
        }
    };
    let mut all: Vec<ShareVector> = Vec::new();
    for corner in corners {
        let mut vector = [0.0; SHARES];
        corner.iter().for_each(|&(i, share)| vector[i] += share);
        let possible = vector.iter().zip(allowed).all(|(&s, &ok)| ok || s <= 0.0);
        if possible && !all.contains(&vector) {
            all.push(vector);
        }
    }
    all
}

fn fixed_corners(space: &Space, candidate: &Candidate, percent: [f64; 6]) -> Vec<ShareVector> {
    use crate::cost::affine::share_vector;
    use crate::policy::Shares;
    let parts = match (space.device().has_gpu(), space.fixed.cpu_compute_share) {
        (false, _) => vec![1.0],
        (true, Some(part)) => vec![part],
        (true, None) if candidate.cpu_side => vec![1.0],
        (true, None) => vec![0.0],
    };
    let shares = parts
        .into_iter()
        .filter_map(|part| Shares::from_percent(percent, part).ok());
    let allowed = space.allowed(candidate);
    let vectors = shares.map(|s| share_vector(&s));
    let possible = |v: &ShareVector| v.iter().zip(allowed).all(|(&share, ok)| ok || share <= 0.0);
    vectors.filter(possible).collect()
}
