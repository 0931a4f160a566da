//! Where nothing fits: which tier lacks how many bytes, and a budget that is enough, so tight that
//! little less is not. The nearest policy comes from search.rs.

use crate::planner::realise::Realiser;
use crate::planner::search::{Nearest, corners, nearest};
use crate::planner::space::{Candidate, Space};
use crate::tier::{PerTier, Tier};

/// The named budget is at most this part above what is refused.
const TIGHT: f64 = 0.01;
const HALVINGS: usize = 12;

/// What is missing.
pub struct Shortfall {
    pub nearest: Nearest,
    pub missing_bytes: PerTier<u64>,
    /// With this budget planning succeeds.
    pub enough_bytes: PerTier<u64>,
}

/// None where the choices leave no candidate at all.
pub fn shortfall(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> Option<Shortfall> {
    let nearest = nearest(space, keep)?;
    let mut enough = space.budget;
    for tier in Tier::ALL {
        enough[tier] += nearest.missing_bytes[tier];
    }
    for tier in Tier::ALL {
        if nearest.missing_bytes[tier] > 0 {
            enough[tier] = tighten(space, keep, (enough, tier));
        }
    }
    let mut missing_bytes = PerTier::default();
    for tier in Tier::ALL {
        missing_bytes[tier] = enough[tier] - space.budget[tier];
    }
    Some(Shortfall {
        nearest,
        missing_bytes,
        enough_bytes: enough,
    })
}

/// The least bytes of one tier, the others being enough, with which something can be realised.
fn tighten(
    space: &Space,
    keep: &dyn Fn(&Candidate) -> bool,
    (enough, tier): (PerTier<u64>, Tier),
) -> u64 {
    let (mut refused, mut fits) = (space.budget[tier], enough[tier]);
    for _ in 0..HALVINGS {
        if fits - refused <= (fits as f64 * TIGHT) as u64 {
            break;
        }
        let middle = refused + (fits - refused) / 2;
        let mut budget = enough;
        budget[tier] = middle;
        let tried = Space {
            budget,
            ..space.clone()
        };
        if anything_fits(&tried, keep) {
            fits = middle;
        } else {
            refused = middle;
        }
    }
    fits
}

/// True where one of the smallest blocks can be realised. Larger blocks never take less.
pub fn anything_fits(space: &Space, keep: &dyn Fn(&Candidate) -> bool) -> bool {
    let candidates: Vec<Candidate> = space.candidates().into_iter().filter(keep).collect();
    let least = candidates.iter().map(Candidate::slots).min().unwrap_or(0);
    let equalities = space.equalities();
    let smallest = candidates.iter().filter(|c| c.slots() == least);
    let by_program = smallest.clone().any(|candidate| {
        let priced = space.price(candidate);
        let realiser = Realiser {
            space,
            candidate,
            priced: &priced,
            equalities: &equalities,
        };
        let relaxed = realiser.relaxed();
        relaxed.is_some_and(|r| realiser.realise(&r, f64::INFINITY).is_some())
    });
    by_program
        || corners(space, keep)
            .iter()
            .any(|(_, built)| built.fits(space))
}
