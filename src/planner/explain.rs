//! Why the plan is as it is: what more memory or faster parts would bring (solved again, not guessed),
//! what 4-bit would bring, and which other plans lost by how much.

use crate::plan::{Explain, PlanPolicy, RunnerUp, WhatIf};
use crate::planner::search::search;
use crate::planner::space::{Candidate, Space};
use crate::planner::{CompressMode, Found, PlanRequest, closed_form, speed};
use crate::profile::{DiskPoint, GemmCurve, HardwareProfile};
use crate::tier::Tier;
use crate::units::GIB;
use std::collections::BTreeMap;

/// Gains under this are not worth a line.
const WORTH_SAYING: f64 = 1.02;
const RUNNERS_UP: usize = 3;

/// The lines below the plan.
pub fn explain(request: &PlanRequest, space: &Space, found: &Found) -> Explain {
    Explain {
        four_bit: four_bit(request, space, found),
        warning: found.forced_lossy.then(|| warning(found)),
        what_if: what_if(request, space, found),
    }
}

fn warning(found: &Found) -> String {
    format!(
        "nothing lossless fits into this budget: the plan keeps {} in 4 bits, which changes results; --compress never refuses instead",
        lossy_parts(&found.chosen.realised.candidate)
    )
}

fn lossy_parts(candidate: &Candidate) -> &'static str {
    match (candidate.compress_weight, candidate.compress_cache) {
        (true, true) => "weights and cache",
        (true, false) => "weights",
        _ => "the cache",
    }
}

/// How much faster 4-bit would be, and by which flag, where the plan is lossless by the planner's choice.
fn four_bit(request: &PlanRequest, space: &Space, found: &Found) -> Option<String> {
    let candidate = &found.chosen.realised.candidate;
    if request.compress != CompressMode::Auto || !candidate.lossless() {
        return None;
    }
    let best = search(space, &|c| !c.lossless(), 0.0).into_iter().next()?;
    let now = speed(&closed_form(space, &found.chosen.realised));
    let then = speed(&closed_form(space, &best));
    if then < now * WORTH_SAYING {
        return None;
    }
    let flag = match (
        best.candidate.compress_weight,
        best.candidate.compress_cache,
    ) {
        (true, true) => "both",
        (true, false) => "weights",
        _ => "cache",
    };
    Some(format!(
        "4-bit {} would be {:.1} times as fast ({:.2} tok/s) and is not lossless: --compress {flag}",
        lossy_parts(&best.candidate),
        then / now,
        then
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
    for (change, faster) in faster_machines(request.profile, space) {
        if let Ok(mut machine) = request.space_for(&faster) {
            machine.fixed = space.fixed;
            list.push((change.to_owned(), machine));
        }
    }
    let solved = list.into_iter().filter_map(|(change, space)| {
        let best = search(&space, &like(&found.chosen.realised.candidate), 0.0);
        let then = speed(&closed_form(&space, best.first()?));
        Some(WhatIf {
            change,
            throughput_tok_s: then.max(now),
            gain_percent: (100.0 * (then / now - 1.0)).max(0.0),
        })
    });
    solved.collect()
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

fn faster_machines(
    profile: &HardwareProfile,
    space: &Space,
) -> Vec<(&'static str, HardwareProfile)> {
    let mut disk = profile.clone();
    faster_disk(&mut disk.links.disk_to_cpu.direct);
    faster_disk(&mut disk.links.cpu_to_disk.fresh);
    faster_disk(&mut disk.links.cpu_to_disk.overwrite);
    let mut cpu = profile.clone();
    faster_gemm(&mut cpu.cpu.gemm);
    cpu.cpu.dram_read_bytes_per_s *= 2.0;
    for rates in cpu.cpu.attention.values_mut() {
        rates.decode_bytes_per_s *= 2.0;
        rates.prefill_flop_per_s *= 2.0;
    }
    let mut list = vec![
        ("a disk twice as fast", disk),
        ("a CPU and DRAM twice as fast", cpu),
    ];
    if space.device().has_gpu() && profile.links.cpu_to_gpu.is_some() {
        let mut link = profile.clone();
        let links = &mut link.links;
        for facts in [&mut links.cpu_to_gpu, &mut links.gpu_to_cpu]
            .into_iter()
            .flatten()
        {
            let points = facts.pinned.iter_mut().chain(&mut facts.unpinned);
            points.for_each(|p| p.1 *= 2.0);
        }
        list.push(("a GPU link twice as fast", link));
    }
    list
}

fn faster_disk(points: &mut [DiskPoint]) {
    points.iter_mut().for_each(|p| p.2 *= 2.0);
}

fn faster_gemm(tables: &mut BTreeMap<String, GemmCurve>) {
    let points = tables.values_mut().flat_map(|t| &mut t.points);
    points.for_each(|p| p.3 /= 2.0);
}

/// The best plans with another block size or another place of attention, and why they lost.
pub fn runners_up(space: &Space, found: &Found) -> Vec<RunnerUp> {
    let chosen = &found.chosen.realised;
    let now = speed(&closed_form(space, chosen));
    let mut shapes = vec![(chosen.candidate.slots(), chosen.candidate.cpu_cache_compute)];
    let mut list = Vec::new();
    for _ in 0..RUNNERS_UP {
        let formats = chosen.candidate;
        let open = |c: &Candidate| {
            let same = c.compress_weight == formats.compress_weight
                && c.compress_cache == formats.compress_cache;
            let near = 4 * c.slots() >= formats.slots() && c.slots() <= 4 * formats.slots();
            same && near && !shapes.contains(&(c.slots(), c.cpu_cache_compute))
        };
        if !space.candidates().iter().any(open) {
            break;
        }
        let Some(other) = search(space, &open, 0.0).into_iter().next() else {
            break;
        };
        shapes.push((other.candidate.slots(), other.candidate.cpu_cache_compute));
        let figures = closed_form(space, &other);
        let then = speed(&figures);
        let slower = 100.0 * (1.0 - then / now);
        list.push(RunnerUp {
            throughput_tok_s: then,
            why: format!(
                "{}: {slower:.1} % slower, {} binds while decoding",
                difference(&chosen.candidate, &other.candidate),
                figures.binding.decode
            ),
            policy: PlanPolicy::new(&other.policy, &other.placement.realised()),
        });
    }
    list
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
