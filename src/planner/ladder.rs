//! The out-of-memory strategies that people know, from least to most aggressive, each solved on this
//! machine: what it takes, whether it fits and what it would bring. Search is search.rs.

use crate::plan::{PlanPolicy, Rung};
use crate::planner::parallel::in_parallel;
use crate::planner::search::{nearest, search};
use crate::planner::space::{Candidate, Fixed, Space};
use crate::planner::{Chosen, Found, PlanRequest, price, speed};
use crate::tier::{PerTier, Tier};

/// One strategy: what it fixes on top of what the caller fixed.
struct Strategy {
    name: &'static str,
    note: &'static str,
    unpin: bool,
    compress: (bool, bool),
    weights_on_disk: bool,
}

const fn strategy(name: &'static str, note: &'static str) -> Strategy {
    Strategy {
        name,
        note,
        unpin: false,
        compress: (false, false),
        weights_on_disk: false,
    }
}

const STRATEGIES: [Strategy; 9] = [
    strategy("lossless", ""),
    Strategy {
        unpin: true,
        ..strategy(
            "unpinned weights",
            "frees page-locked memory, not bytes: pinned memory is exact here",
        )
    },
    Strategy {
        compress: (true, false),
        ..strategy("4-bit weights", "")
    },
    Strategy {
        unpin: true,
        compress: (true, false),
        ..strategy("unpinned 4-bit weights", "")
    },
    Strategy {
        compress: (false, true),
        ..strategy("4-bit cache", "")
    },
    Strategy {
        compress: (true, true),
        ..strategy("4-bit weights and cache", "")
    },
    Strategy {
        weights_on_disk: true,
        ..strategy("all weights on disk", "")
    },
    Strategy {
        weights_on_disk: true,
        compress: (true, false),
        ..strategy("4-bit weights, all on disk", "")
    },
    Strategy {
        weights_on_disk: true,
        compress: (true, true),
        ..strategy("4-bit weights and cache, weights on disk", "")
    },
];

/// All rungs. `space` carries what the caller fixed by flags; a strategy overrides it. Where the plan
/// itself is the lossless rung, it is not solved again, and unpinned weights keep its batches.
pub fn ladder(request: &PlanRequest, space: &Space, found: Option<&Found>) -> Vec<Rung> {
    let plan = found
        .map(|f| &f.chosen)
        .filter(|c| c.realised.candidate.lossless());
    let one = |strategy: &Strategy| {
        let mut space = with(space, strategy);
        let lossless = strategy.compress == (false, false) && !strategy.weights_on_disk;
        match plan {
            Some(plan) if lossless && !strategy.unpin => fitting(&space, strategy, plan),
            Some(plan) if lossless => {
                space.fixed.gpu_batch_size = Some(plan.realised.candidate.gpu_batch_size);
                space.fixed.num_gpu_batches = Some(plan.realised.candidate.num_gpu_batches);
                rung(request, &space, strategy)
            }
            _ => rung(request, &space, strategy),
        }
    };
    in_parallel(&STRATEGIES, |strategy| Some(one(strategy)))
}

fn with<'a>(space: &Space<'a>, strategy: &Strategy) -> Space<'a> {
    let mut fixed = Fixed {
        compress_weight: Some(strategy.compress.0),
        compress_cache: Some(strategy.compress.1),
        ..space.fixed
    };
    if strategy.unpin {
        fixed.pin_weight = Some(false);
    }
    if strategy.weights_on_disk {
        let gpu = space.device().has_gpu();
        fixed.percent = Some(if gpu {
            [0.0, 0.0, 100.0, 0.0, 100.0, 0.0]
        } else {
            [0.0, 0.0, 0.0, 100.0, 0.0, 100.0]
        });
    }
    Space {
        fixed,
        coarse: true,
        ..space.clone()
    }
}

fn rung(request: &PlanRequest, space: &Space, strategy: &Strategy) -> Rung {
    let any = |_: &Candidate| true;
    if let Some(realised) = search(space, &any).into_iter().next() {
        let figures = price(request, space, &realised);
        return fitting(space, strategy, &Chosen { realised, figures });
    }
    let base = empty(strategy);
    let Some(nearest) = nearest(space, &any) else {
        return base;
    };
    let built = &nearest.built;
    Rung {
        missing_bytes: per_tier(space, |tier| nearest.missing_bytes[tier]),
        tier_bytes: per_tier(space, |tier| built.footprint.total(tier)),
        policy: Some(PlanPolicy::new(&built.policy, &built.placement.realised())),
        ..base
    }
}

fn fitting(space: &Space, strategy: &Strategy, chosen: &Chosen) -> Rung {
    let realised = &chosen.realised;
    let shares = realised.placement.realised();
    Rung {
        fits: true,
        throughput_tok_s: Some(speed(&chosen.figures)),
        missing_bytes: per_tier(space, |_| 0),
        tier_bytes: per_tier(space, |tier| realised.footprint.total(tier)),
        policy: Some(PlanPolicy::new(&realised.policy, &shares)),
        ..empty(strategy)
    }
}

fn empty(strategy: &Strategy) -> Rung {
    Rung {
        name: strategy.name.to_owned(),
        lossless: strategy.compress == (false, false),
        fits: false,
        throughput_tok_s: None,
        missing_bytes: PerTier::default(),
        tier_bytes: PerTier::default(),
        note: strategy.note.to_owned(),
        policy: None,
    }
}

/// A figure for each tier that there is.
pub fn per_tier(space: &Space, of: impl Fn(Tier) -> u64) -> PerTier<Option<u64>> {
    PerTier {
        gpu: space.device().has_gpu().then(|| of(Tier::Gpu)),
        cpu: Some(of(Tier::Cpu)),
        disk: Some(of(Tier::Disk)),
    }
}
