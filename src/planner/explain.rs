//! Why the plan is as it is: what more memory or faster parts would bring (solved again, not guessed),
//! what 4-bit would bring, and which other plans lost by how much.

use crate::plan::{Explain, PlanPolicy, Rung, RunnerUp, WhatIf};
use crate::planner::changes::twice_as_fast;
use crate::planner::parallel::in_parallel;
use crate::planner::realise::Realised;
use crate::planner::search::{search, search_in};
use crate::planner::space::{Candidate, Space};
use crate::planner::{CompressMode, Found, PlanRequest, closed_form, figures_of, speed};
use crate::policy::{Compute, Policy};
use crate::tier::{Lane, Tier};
use crate::units::GIB;
use std::cmp::Ordering;

/// Gains under this are not worth a line.
const WORTH_SAYING: f64 = 1.05;
const RUNNERS_UP: usize = 3;
/// Closed form and replay may be so far apart without a reason being given.
const CLOSED_FORM_WITHIN_PERCENT: f64 = 3.0;

/// The lines below the plan.
pub fn explain(request: &PlanRequest, space: &Space, (found, rungs): (&Found, &[Rung])) -> Explain {
    Explain {
        four_bit: four_bit(request, rungs, found),
        exact: exact(space, found),
        warning: warning(request, found),
        closed_form: request.repricer.map(|_| beside_closed_form(space, found)),
        beside_ladder: beside_ladder(rungs, found),
        stepped_down: None,
        what_if: if request.explain {
            what_if(request, space, found)
        } else {
            Vec::new()
        },
    }
}

/// Loud where something is in 4 bits unasked. `--compress never` and a flag for one of the two exclude each other.
fn warning(request: &PlanRequest, found: &Found) -> Option<String> {
    let (weights, cache) = found.forced_lossy;
    let fixed = &request.fixed;
    let (nothing, refuse) = match (fixed.compress_weight, fixed.compress_cache) {
        (None, None) => ("nothing lossless", "--compress never"),
        (None, _) => ("nothing else", "--compress-weight 0"),
        _ => ("nothing else", "--compress-cache 0"),
    };
    (weights || cache).then(|| {
        format!(
            "{nothing} fits into this budget: the plan keeps {} in 4 bits, which changes results; {refuse} refuses instead",
            lossy_parts(weights, cache).1
        )
    })
}

/// The replayed figure beside the closed form's, and where they part the reason.
fn beside_closed_form(space: &Space, found: &Found) -> String {
    let (replayed, closed) = (
        &found.chosen.figures,
        closed_form(space, &found.chosen.realised),
    );
    let apart = 100.0 * (speed(&closed) / speed(replayed) - 1.0);
    let text = format!("replayed in order; the closed form says {apart:+.1} %");
    if apart.abs() <= CLOSED_FORM_WITHIN_PERCENT {
        return text;
    }
    let phase = |s: (f64, f64)| (s.0 - s.1).abs();
    let prefill = phase((closed.prefill_s, replayed.prefill_s));
    let decode = phase((closed.decode_s, replayed.decode_s));
    let (name, total_s) = if prefill > decode {
        ("prefill", replayed.prefill_s)
    } else {
        ("decode", replayed.decode_s)
    };
    let busy_s = |lane: Lane| match name {
        "prefill" => replayed.lanes[lane].prefill_s,
        _ => replayed.lanes[lane].decode_s,
    };
    let busiest = Lane::with_most(busy_s);
    format!(
        "{text}, most of it in {name}: {}, the busiest lane there, works {:.0} % of that time and waits for others the rest, because a lane's operations keep their order",
        busiest.name(),
        100.0 * busy_s(busiest) / total_s.max(f64::MIN_POSITIVE)
    )
}

/// The plan beside the fastest other strategy of the ladder that fits and keeps results, and what makes
/// the difference.
fn beside_ladder(rungs: &[Rung], found: &Found) -> Option<String> {
    let chosen = &found.chosen.realised;
    let mine = PlanPolicy::new(&chosen.policy, &chosen.placement.realised());
    let other = rungs
        .iter()
        .filter(|r| r.lossless == chosen.candidate.lossless())
        .filter(|r| r.policy.as_ref().is_some_and(|p| p.percent != mine.percent))
        .filter(|r| r.throughput_tok_s.is_some_and(|t| t > 0.0))
        .max_by(|a, b| {
            let by = |r: &Rung| r.throughput_tok_s.unwrap_or(0.0);
            by(a).total_cmp(&by(b))
        })?;
    let (policy, then) = (other.policy.as_ref()?, other.throughput_tok_s?);
    let on_disk = |p: &PlanPolicy| 100.0 - p.percent[0] - p.percent[1];
    Some(format!(
        "the plan is {:.1} times as fast as \"{}\": {:.0} % of the weights come from disk in a pass instead of {:.0} %, and a pass serves {} sequences instead of {}",
        speed(&found.chosen.figures) / then,
        other.name,
        on_disk(&mine).max(0.0),
        on_disk(policy).max(0.0),
        mine.gpu_batch_size * mine.num_gpu_batches,
        policy.gpu_batch_size * policy.num_gpu_batches,
    ))
}

/// The `--compress` word for 4-bit parts, and the parts themselves.
fn lossy_parts(weights: bool, cache: bool) -> (&'static str, &'static str) {
    match (weights, cache) {
        (true, true) => ("both", "weights and cache"),
        (true, false) => ("weights", "weights"),
        _ => ("cache", "cache"),
    }
}

/// How much faster 4-bit would be, and by which flag, where the plan is lossless by the planner's choice.
fn four_bit(request: &PlanRequest, rungs: &[Rung], found: &Found) -> Option<String> {
    let candidate = &found.chosen.realised.candidate;
    if request.compress != CompressMode::Auto || !candidate.lossless() {
        return None;
    }
    let lossy = rungs.iter().filter(|r| !r.lossless && r.fits);
    let best = lossy.max_by(|a, b| {
        a.throughput_tok_s
            .partial_cmp(&b.throughput_tok_s)
            .unwrap_or(Ordering::Equal)
    })?;
    let (now, then) = (speed(&found.chosen.figures), best.throughput_tok_s?);
    if then < now * WORTH_SAYING {
        return None;
    }
    let policy = best.policy.as_ref()?;
    let (flag, what) = lossy_parts(policy.compress_weight, policy.compress_cache);
    Some(format!(
        "4-bit {what} would be {:.1} times as fast ({then:.2} tok/s) and is not lossless: --compress {flag}",
        then / now,
    ))
}

/// Where bf16 products, which change results, are no faster here than exact ones: processors without them.
fn exact(space: &Space, found: &Found) -> Option<String> {
    let chosen = &found.chosen.realised;
    let mut policy = chosen.policy.clone();
    if std::mem::take(&mut policy.compute) != Compute::Bf16 {
        return None;
    }
    let speed_of = |policy: &Policy| speed(&figures_of(space, policy, chosen.candidate.slots()));
    let (now, then) = (speed_of(&chosen.policy), speed_of(&policy));
    let gain = match then / now {
        gain if gain >= WORTH_SAYING => format!("would be {gain:.1} times as fast"),
        gain if gain >= 1.0 => "is as fast".to_owned(),
        _ => return None,
    };
    Some(format!(
        "without --compute bf16, which changes results, this {gain} here"
    ))
}

/// More bytes of each tier, and parts twice as fast.
fn what_if(request: &PlanRequest, space: &Space, found: &Found) -> Vec<WhatIf> {
    let now = speed(&closed_form(space, &found.chosen.realised));
    let mut list = Vec::new();
    for tier in Tier::ALL {
        if tier == Tier::Gpu && !space.device().has_gpu() {
            continue;
        }
        let mut more = space.clone();
        more.budget[tier] += GIB;
        let name = ["GPU memory", "DRAM", "disk"][tier as usize];
        list.push((format!("1 GiB more {name}"), more));
    }
    for (change, faster) in twice_as_fast(request.profile, space.device().has_gpu()) {
        let machine = faster.apply(request.profile).ok();
        if let Some(Ok(mut machine)) = machine.map(|m| request.space_for(&m)) {
            machine.fixed = space.fixed;
            list.push((change.to_owned(), machine));
        }
    }
    in_parallel(&list, |(change, space)| {
        let best = search(space, &like(&found.chosen.realised.candidate));
        let then = speed(&closed_form(space, best.first()?));
        Some(WhatIf {
            change: change.clone(),
            throughput_tok_s: then.max(now),
            gain_percent: (100.0 * (then / now - 1.0)).max(0.0),
        })
    })
}

/// Candidates in the neighbourhood: same formats, blocks up to twice and down to half as large.
fn like(chosen: &Candidate) -> impl Fn(&Candidate) -> bool {
    let chosen = *chosen;
    move |c| {
        let same = c.compress_weight == chosen.compress_weight
            && c.compress_cache == chosen.compress_cache
            && c.cpu_cache_compute == chosen.cpu_cache_compute;
        let near = |a: usize, b: usize| a <= 2 * b && b <= 2 * a;
        let shape = near(c.gpu_batch_size, chosen.gpu_batch_size)
            && near(c.num_gpu_batches, chosen.num_gpu_batches);
        same && shape
    }
}

/// Other plans with the same formats, the best of each block size and place of attention, and why
/// they lost. Those that the search met come first; a few near ones are solved where it met too few.
pub fn runners_up(space: &Space, found: &Found) -> Vec<RunnerUp> {
    let chosen = &found.chosen.realised.candidate;
    let mut others = found.others.clone();
    let is_other = |c: &Candidate| shape(c) != shape(chosen) && formats(c) == formats(chosen);
    if distinct(&others, &is_other).len() < 2 {
        let near =
            |c: &Candidate| 2 * c.slots() >= chosen.slots() && c.slots() <= 2 * chosen.slots();
        others.extend(search_in(space, &found.bounds, &|c| is_other(c) && near(c)));
        others.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    }
    let now = speed(&closed_form(space, &found.chosen.realised));
    let mut list: Vec<RunnerUp> = distinct(&others, &is_other)
        .into_iter()
        .take(RUNNERS_UP)
        .map(|other| runner_up(space, chosen, (other, now)))
        .collect();
    list.sort_by(|a, b| b.throughput_tok_s.total_cmp(&a.throughput_tok_s));
    list
}

fn shape(c: &Candidate) -> (usize, bool) {
    (c.slots(), c.cpu_cache_compute)
}

fn formats(c: &Candidate) -> (bool, bool) {
    (c.compress_weight, c.compress_cache)
}

/// The first of each shape.
fn distinct<'r>(others: &'r [Realised], keep: &dyn Fn(&Candidate) -> bool) -> Vec<&'r Realised> {
    let mut first: Vec<&Realised> = Vec::new();
    for other in others.iter().filter(|o| keep(&o.candidate)) {
        if first
            .iter()
            .all(|f| shape(&f.candidate) != shape(&other.candidate))
        {
            first.push(other);
        }
    }
    first
}

fn runner_up(space: &Space, chosen: &Candidate, (other, now): (&Realised, f64)) -> RunnerUp {
    let figures = closed_form(space, other);
    let then = speed(&figures);
    RunnerUp {
        throughput_tok_s: then,
        why: format!(
            "{}: {:.1} % slower, {} binds while decoding",
            difference(chosen, &other.candidate),
            100.0 * (1.0 - then / now),
            figures.binding.decode
        ),
        policy: PlanPolicy::new(&other.policy, &other.placement.realised()),
    }
}

fn difference(chosen: &Candidate, other: &Candidate) -> String {
    let mut words = Vec::new();
    if other.slots() != chosen.slots() {
        let size = if other.slots() > chosen.slots() {
            "a larger block"
        } else {
            "a smaller block"
        };
        words.push(format!("{size} ({} sequences)", other.slots()));
    }
    if other.cpu_cache_compute != chosen.cpu_cache_compute {
        let place = if other.cpu_cache_compute {
            "CPU"
        } else {
            "GPU"
        };
        words.push(format!("attention on the {place}"));
    }
    words.join(", ")
}
