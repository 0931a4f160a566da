//! The last step to an optimum among what can be built: single panels and single sequences moved from
//! one home to another as long as that is faster and fits. Where to begin is search.rs.

use crate::cost::affine::{CACHE, GROUPS, SHARES, ShareVector, share_vector};
use crate::cost::estimate::total_s;
use crate::placement::WeightHome;
use crate::planner::realise::{Built, Realised, Realiser};
use crate::planner::space::{Priced, Space};

/// Moves begin this many panels or sequences wide and end with single ones.
const WIDEST: f64 = 64.0;
/// Relative gain that is more than rounding of floats.
const GAIN: f64 = 1e-12;
/// Moves that are built, at most: each takes about as long as a solve.
const TRIES: usize = 96;

/// Sequences that are moved together with weights, at most.
const SHIFTS: usize = 8;

/// The best neighbour's neighbour … of a policy, or the policy itself. What the caller fixed stays.
pub fn polish(space: &Space, start: Realised) -> Realised {
    if !space.equalities().is_empty() {
        return start;
    }
    let priced = space.price(&start.candidate);
    let allowed = space.allowed(&start.candidate);
    let mut tries = TRIES;
    let realiser = Realiser {
        space,
        candidate: &start.candidate.clone(),
        priced: &priced,
        equalities: &[],
    };
    let mut best = start;
    let mut shifts = SHIFTS;
    let mut width = WIDEST;
    while width >= 1.0 && tries > 0 {
        let moved = moves(&allowed)
            .find_map(|(from, to)| better(space, &priced, (&best, from, to, width), &mut tries));
        match moved {
            Some(found) => best = found,
            None => width /= 4.0,
        }
        if width < 1.0 && shifts > 0 {
            // A sequence elsewhere may only gain by the weights that take its place.
            shifts -= 1;
            if let Some(found) = realiser.shifted(&best) {
                best = found;
                width = 1.0;
            }
        }
    }
    best
}

/// Every way from one home to another within weights, cache and hidden states.
fn moves(allowed: &[bool; SHARES]) -> impl Iterator<Item = (usize, usize)> + use<'_> {
    GROUPS.into_iter().flat_map(move |group| {
        let pairs = group
            .clone()
            .flat_map(move |from| group.clone().map(move |to| (from, to)));
        pairs.filter(move |&(from, to)| from != to && allowed[from] && allowed[to])
    })
}

/// The policy after one move, where that is faster by the same table and fits to the byte.
fn better(
    space: &Space,
    priced: &Priced,
    (best, from, to, width): (&Realised, usize, usize, f64),
    tries: &mut usize,
) -> Option<Realised> {
    let mut shares = share_vector(&best.placement.realised());
    let step = (width * unit(best, from)).min(shares[from]);
    if step <= 0.0 || *tries == 0 {
        return None;
    }
    shares[from] -= step;
    shares[to] += step;
    let limit_s = best.cost_s * (1.0 - GAIN);
    // A move that gains nothing in fractions gains nothing in panels but by chance.
    if total_s(&priced.terms, &shares) / priced.per(space.job) >= limit_s {
        return None;
    }
    *tries -= 1;
    let built = Built::new(space, priced, &without_dust(shares));
    if !built.fits(space) {
        return None;
    }
    let found = built.realised(space, &best.candidate, priced);
    (found.cost_s < limit_s).then_some(found)
}

/// One panel's share of the weights, or one sequence's of the block.
fn unit(realised: &Realised, index: usize) -> f64 {
    let placement = &realised.placement;
    if index >= CACHE {
        return 1.0 / realised.candidate.slots().max(1) as f64;
    }
    let all: u64 = WeightHome::ALL
        .iter()
        .map(|&home| placement.weight_bytes(home))
        .sum();
    let panel = placement.panel_bytes.iter().min().copied().unwrap_or(0);
    panel as f64 / all.max(1) as f64
}

/// What a subtraction left of a share that is gone.
fn without_dust(mut shares: ShareVector) -> ShareVector {
    shares
        .iter_mut()
        .filter(|share| **share < 1e-12)
        .for_each(|share| *share = 0.0);
    shares
}
