//! The plan document written from what was chosen, or from what is missing. No choice is made here.

use crate::cost::estimate::tier_figures;
use crate::cost::footprint::Footprint;
use crate::dtype::Dtype;
use crate::placement::{Placement, WeightHome};
use crate::plan::{
    Explain, PLAN_SCHEMA, Plan, PlanBudget, PlanModel, PlanPlacement, PlanPolicy, PlanProfile,
    PlanSetup, PlanWorkload, WeightBytes,
};
use crate::planner::explain::{explain, runners_up};
use crate::planner::ladder::{ladder, per_tier};
use crate::planner::shortfall::shortfall;
use crate::planner::{CompressMode, Found, PlanRequest, Space};
use crate::policy::{Compute, Policy};
use crate::tier::PerTier;
use crate::units::MIB;
use crate::workload::Workload;

/// Where a plan goes by default. Who knows better what was typed says so in its place.
const PLAN_FILE: &str = "plan.toml";
/// What packing and loading read and write at a time.
const SETUP_BLOCK_BYTES: f64 = 4.0 * MIB as f64;

/// A plan that fits.
pub fn feasible(request: &PlanRequest, space: &Space, found: &Found) -> Plan {
    let chosen = &found.chosen.realised;
    let workload = space.workload(chosen.candidate.slots());
    let realised = chosen.placement.realised();
    let policy = PlanPolicy::new(&chosen.policy, &realised);
    let mut estimate = found.chosen.figures.clone();
    estimate.tiers = tier_figures(&chosen.footprint, &space.budget);
    let flags = flags(&policy, space);
    let frame = frame(request, space, Some(found));
    let explain = explain(request, space, (found, &frame.ladder));
    let mut plan = Plan {
        feasible: true,
        lossless: chosen.candidate.lossless() && exact(space),
        flags,
        model: model(request, chosen.candidate.compress_weight),
        workload: lengths(&workload),
        placement: Some(placement(&chosen.policy, &chosen.placement, &policy)),
        policy: Some(policy),
        estimate: Some(estimate),
        setup: setup(space, &chosen.footprint, chosen.candidate.compress_weight),
        missing_bytes: per_tier(space, |_| 0),
        runners_up: runners_up(space, found),
        explain,
        ..frame
    };
    plan.id = plan.content_id();
    plan
}

/// What is missing, and the ladder all the same.
pub fn infeasible(request: &PlanRequest, space: &Space) -> Plan {
    let lack = shortfall(space, &|_| true);
    let mut plan = frame(request, space, None);
    if let Some(lack) = lack {
        let candidate = &lack.nearest.candidate;
        plan.lossless = candidate.lossless() && exact(space);
        plan.model = model(request, candidate.compress_weight);
        plan.workload = lengths(&space.workload(candidate.slots()));
        plan.setup = setup(
            space,
            &lack.nearest.built.footprint,
            candidate.compress_weight,
        );
        plan.missing_bytes = per_tier(space, |tier| lack.missing_bytes[tier]);
        let enough = lack.enough_bytes;
        plan.enough_bytes = Some(PlanBudget {
            gpu_bytes: request.budget.gpu_bytes.map(|_| enough.gpu),
            cpu_bytes: enough.cpu,
            disk_bytes: enough.disk,
        });
    }
    plan.id = plan.content_id();
    plan
}

/// Native weights are multiplied as they are stored.
fn exact(space: &Space) -> bool {
    space.fixed.compute != Compute::Bf16
}

/// What both kinds of plan say.
fn frame(request: &PlanRequest, space: &Space, found: Option<&Found>) -> Plan {
    Plan {
        schema: PLAN_SCHEMA.to_owned(),
        id: String::new(),
        feasible: false,
        lossless: true,
        may_become_lossy: request.compress == CompressMode::Fastest,
        device: request.device_name.to_owned(),
        flags: String::new(),
        next_command: format!(
            "loadmaster exec {PLAN_FILE} --output out.jsonl --report report.json"
        ),
        check_command: "loadmaster compare report.json".to_owned(),
        model: model(request, false),
        workload: lengths(&space.workload(1)),
        profile: PlanProfile {
            name: request.profile.machine.name.clone(),
            measured_at: request.profile.machine.date.clone(),
            changes: request.changes.describe(),
        },
        budget: request.budget,
        policy: None,
        placement: None,
        estimate: None,
        setup: PlanSetup::default(),
        missing_bytes: PerTier::default(),
        enough_bytes: None,
        ladder: ladder(request, space, found),
        runners_up: Vec::new(),
        explain: Explain::default(),
    }
}

fn model(request: &PlanRequest, compress: bool) -> PlanModel {
    PlanModel {
        name: request.model.name.clone(),
        fingerprint: request.fingerprint.map(str::to_owned),
        parameters: request.model.parameters(),
        weights_bytes: request.model.weights_bytes(compress),
    }
}

fn lengths(workload: &Workload) -> PlanWorkload {
    PlanWorkload {
        prompts: workload.prompts() as u64,
        prompt_tokens: workload.prompt_tokens(),
        prompt_tokens_max: workload.prompt_tokens_max() as u64,
        gen_tokens: workload.gen_tokens(),
        gen_tokens_max: workload.gen_tokens_max() as u64,
        kv_tokens: workload.lines.iter().map(|l| l.kv_tokens()).sum(),
        kv_tokens_max: workload.kv_tokens_max(),
    }
}

fn placement(policy: &Policy, placement: &Placement, realised: &PlanPolicy) -> PlanPlacement {
    PlanPlacement {
        percent: realised.percent,
        cpu_compute_share_percent: realised.cpu_compute_share_percent,
        weights: policy.shares.weights,
        cache: policy.shares.cache,
        activations: policy.shares.activations,
        weight_bytes: WeightBytes {
            gpu: placement.weight_bytes(WeightHome::Gpu),
            cpu_ship: placement.weight_bytes(WeightHome::CpuShip),
            cpu_compute: placement.weight_bytes(WeightHome::CpuCompute),
            disk_ship: placement.weight_bytes(WeightHome::DiskShip),
            disk_compute: placement.weight_bytes(WeightHome::DiskCompute),
        },
    }
}

/// Reading the checkpoint, packing and writing the store overlap; a store that is there costs nothing.
fn setup(space: &Space, footprint: &Footprint, compress: bool) -> PlanSetup {
    let store = footprint.store_bytes as f64;
    let source = space.model.weights_bytes(false) as f64;
    let steps = [
        space.rates.disk_read_s(source, SETUP_BLOCK_BYTES),
        space.rates.disk_write_s(store, SETUP_BLOCK_BYTES, true),
        source / space.rates.pack_bytes_per_s(compress),
    ];
    let there = space.host.unpacked || space.stored_bytes[usize::from(compress)] > 0;
    PlanSetup {
        pack_s: if there {
            0.0
        } else {
            steps.into_iter().fold(0.0, f64::max)
        },
        load_s: load_s(space, footprint, compress),
        store_bytes: footprint.store_bytes,
        spill_bytes: footprint.spill.total(),
    }
}

/// What is at home in memory is read once, from the store or, packed as it comes, from its source; files of the
/// run's own are written out before the first pass.
fn load_s(space: &Space, footprint: &Footprint, compress: bool) -> f64 {
    let source = space.model.weights_bytes(false) as f64;
    let all_bytes = space.model.weights_bytes(compress);
    let resident = all_bytes.saturating_sub(footprint.disk_weights_bytes) as f64;
    let weights_s = match space.host.unpacked {
        true => (space.rates.disk_read_s(source, SETUP_BLOCK_BYTES))
            .max(source / space.rates.pack_bytes_per_s(compress)),
        false => space.rates.disk_read_s(resident, SETUP_BLOCK_BYTES),
    };
    let spill = footprint.spill.total() as f64;
    weights_s + space.rates.disk_write_s(spill, SETUP_BLOCK_BYTES, true)
}

/// The policy as flags of `run` and `plan`.
fn flags(policy: &PlanPolicy, space: &Space) -> String {
    let mut words = vec![
        format!("--percent {}", percent_words(&policy.percent)),
        format!("--gpu-batch-size {}", policy.gpu_batch_size),
        format!("--num-gpu-batches {}", policy.num_gpu_batches),
    ];
    if space.device().has_gpu() {
        words.push(format!(
            "--cpu-compute-share {}",
            decimals(policy.cpu_compute_share_percent)
        ));
        words.push(format!("--pin-weight {}", u8::from(policy.pin_weight)));
        if policy.cpu_cache_compute {
            words.push("--cpu-cache-compute".to_owned());
        }
    }
    if policy.compress_weight {
        words.push("--compress-weight".to_owned());
    }
    if policy.compress_cache {
        words.push("--compress-cache".to_owned());
    }
    if !policy.overlap {
        words.push("--overlap 0".to_owned());
    }
    if policy.compute != Compute::default() {
        words.push(format!("--compute {}", policy.compute.name()));
    }
    if policy.kv == Dtype::F32 {
        words.push("--kv f32".to_owned());
    }
    words.join(" ")
}

/// Four decimals where there are some: a pair that leaves nothing for the disk still sums to 100.
fn percent_words(percent: &[f64; 6]) -> String {
    let pairs = percent.chunks(2).map(|pair| {
        let round = |p: f64| (p * 1e4).round() / 1e4;
        let gpu = round(pair[0]);
        let none_left = pair[0] + pair[1] > 100.0 - 1e-6;
        let cpu = if none_left {
            round(100.0 - gpu)
        } else {
            round(pair[1])
        };
        format!("{} {}", decimals(gpu), decimals(cpu))
    });
    pairs.collect::<Vec<_>>().join(" ")
}

fn decimals(percent: f64) -> String {
    format!("{}", (percent * 1e4).round() / 1e4)
}
