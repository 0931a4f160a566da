//! Less memory than was planned with: `exec` solves again for what is free, without anything that could
//! change the text unless the plan permits it. What fits is the planner's judgement.

use super::execute::planned_lengths;
use super::failure::Failure;
use super::prompt_lines::Line;
use super::prompts;
use super::settle::{Input, Model};
use super::solve::{ScheduleRepricer, fixed_as, stored_bytes};
use crate::cost::rates::Rates;
use crate::engine::open::{Packed, RunJob, footprint};
use crate::machine::os;
use crate::machine::price::Pricer;
use crate::plan::{Plan, PlanBudget};
use crate::planner::changes::Changes;
use crate::planner::{self, CompressMode, Fixed, Job, PlanRequest};
use crate::policy::{DeviceKind, Policy, show_percent};
use crate::profile::HardwareProfile;
use crate::store::Packing;
use crate::tier::Tier;
use crate::units::show_bytes;
use std::path::Path;

/// Of what is free, the part that is planned with: others may take a little more meanwhile.
const SURE_PART: f64 = 0.97;

/// What is to be carried out in less memory.
pub struct Shrunk<'a> {
    pub plan: &'a Plan,
    pub model: &'a Model,
    pub profile: &'a HardwareProfile,
    pub lines: &'a [Line],
    pub offload_dir: &'a Path,
}

impl Shrunk<'_> {
    /// What the plan counts on, and what came.
    fn inputs(&self) -> (Input, Input) {
        let came = Input::of(&prompts::workload(self.lines));
        (Input::planned(self.plan), came)
    }

    /// Bytes of DRAM that play the GPU of the host machine.
    fn played_bytes(&self) -> u64 {
        match self.plan.device_kind() {
            Ok(DeviceKind::Host) => self.plan.budget.gpu_bytes.unwrap_or(0),
            _ => 0,
        }
    }
}

/// Bytes of memory that this process may hold at this moment, what it holds already included.
pub fn free_bytes() -> Result<u64, Failure> {
    os::release_free_heap();
    let own = os::process_memory().map_or(0, |m| m.resident_bytes);
    Ok(os::memory_now().map_err(Failure::failed)?.free_bytes + own)
}

/// Bytes of memory that the plan needs with so much input.
fn needed_bytes(shrunk: &Shrunk, policy: &Policy, input: Input) -> Result<u64, Failure> {
    let device = shrunk.plan.device_kind().map_err(Failure::failed)?;
    let rates = Rates::new(shrunk.profile, device, policy.threads).map_err(Failure::failed)?;
    let needed = footprint(&RunJob {
        model: &shrunk.model.spec,
        policy,
        device,
        lengths: planned_lengths(shrunk.plan),
        host: shrunk
            .model
            .host_bytes(input, policy.threads)
            .with_gpu(device, shrunk.profile.gpu.as_ref()),
        packed: &Packed::default(),
        source: None,
        spill: Path::new(""),
        pricer: Pricer::new(rates),
        gpu: Default::default(),
    });
    Ok(match device {
        DeviceKind::Cuda => needed.total(Tier::Cpu),
        // DRAM plays the GPU of the host machine.
        _ => needed.total(Tier::Cpu) + needed.arena_bytes(Tier::Gpu),
    })
}

/// Why the plan cannot be carried out as it is: there is more input than it was made for, whose lines take more
/// memory than may be used.
fn outgrown(shrunk: &Shrunk, policy: &Policy) -> Result<Option<String>, Failure> {
    let (planned, came) = shrunk.inputs();
    let needed = needed_bytes(shrunk, policy, planned.at_least(came))?;
    let budget = shrunk.plan.budget.cpu_bytes + shrunk.played_bytes();
    if needed <= budget || needed == needed_bytes(shrunk, policy, planned)? {
        return Ok(None);
    }
    Ok(Some(format!(
        "there is more input than was planned for ({} lines with {} tokens, planned were {} with {}): {} are needed and {} may be used",
        came.lines,
        came.prompt_tokens,
        planned.lines,
        planned.prompt_tokens,
        show_bytes(needed),
        show_bytes(budget)
    )))
}

/// Or less memory is free than it needs.
fn shortage(shrunk: &Shrunk, policy: &Policy, free: u64) -> Result<Option<String>, Failure> {
    if let Some(why) = outgrown(shrunk, policy)? {
        return Ok(Some(why));
    }
    let (planned, came) = shrunk.inputs();
    let needed = needed_bytes(shrunk, policy, planned.at_least(came))?;
    Ok((needed > free).then(|| {
        format!(
            "memory has shrunk since planning: the plan needs {} and {} are free",
            show_bytes(needed),
            show_bytes(free)
        )
    }))
}

/// The plan to run instead, where memory has shrunk: lossless as the plan, or as lossy as it permits.
pub fn step_down(shrunk: &Shrunk, free: u64) -> Result<Option<Plan>, Failure> {
    let plan = shrunk.plan;
    let policy = plan.to_policy().map_err(Failure::failed)?;
    let Some(short) = shortage(shrunk, &policy, free)? else {
        return Ok(None);
    };
    let mut tries = vec![(policy.compress_weight, policy.compress_cache)];
    if plan.may_become_lossy {
        tries.extend([(true, policy.compress_cache), (true, true)]);
    }
    for (weight, cache) in tries {
        let fixed = Fixed {
            compress_weight: Some(weight),
            compress_cache: Some(cache),
            ..formats_of(&policy)
        };
        let mut found = solve_again(shrunk, &policy, (free, fixed))?;
        if !found.feasible {
            continue;
        }
        found.explain.stepped_down = Some(told(plan, &found, &short));
        found.may_become_lossy = plan.may_become_lossy;
        found.id = found.content_id();
        return Ok(Some(found));
    }
    let hint = if plan.may_become_lossy {
        "end other programs, or give the machine more memory"
    } else {
        "end other programs, or set may_become_lossy = true in the plan to permit 4-bit weights and cache"
    };
    Err(Failure::failed(format!(
        "{short}, and nothing{} fits into that",
        if plan.may_become_lossy {
            ""
        } else {
            " with the same text"
        }
    ))
    .with_hint(hint))
}

/// What `--strict` does where there is more input than was planned for.
pub fn refuse_outgrown(shrunk: &Shrunk) -> Result<(), Failure> {
    let policy = shrunk.plan.to_policy().map_err(Failure::failed)?;
    match outgrown(shrunk, &policy)? {
        None => Ok(()),
        Some(why) => {
            Err(Failure::failed(why).with_hint("plan again with this input, or leave out --strict"))
        }
    }
}

/// The plan to run instead, where the weights in DRAM cannot be page-locked: the same policy but for that, and where
/// their relay does not fit beside it another one, which is told.
pub fn without_pins(shrunk: &Shrunk) -> Result<Plan, Failure> {
    let policy = shrunk.plan.to_policy().map_err(Failure::failed)?;
    let free = free_bytes()?;
    let planned = shrunk.plan.policy.as_ref();
    let planned = planned.expect("a plan that tells its policy has one");
    let same = Fixed {
        cpu_compute_share: Some(planned.cpu_compute_share_percent / 100.0),
        cpu_cache_compute: Some(planned.cpu_cache_compute),
        compute: planned.compute,
        ..fixed_as(planned)
    };
    let unpinned = |fixed: Fixed| Fixed {
        pin_weight: Some(false),
        ..fixed
    };
    let mut found = solve_again(shrunk, &policy, (free, unpinned(same)))?;
    if !found.feasible {
        found = solve_again(shrunk, &policy, (free, unpinned(formats_of(&policy))))?;
        found.explain.stepped_down = Some(told(
            shrunk.plan,
            &found,
            "the weights cannot be page-locked",
        ));
    }
    found.may_become_lossy = shrunk.plan.may_become_lossy;
    found.id = found.content_id();
    Ok(found)
}

/// What makes the text, as it was.
fn formats_of(policy: &Policy) -> Fixed {
    Fixed {
        compress_weight: Some(policy.compress_weight),
        compress_cache: Some(policy.compress_cache),
        overlap: Some(policy.overlap),
        compute: policy.compute,
        ..Fixed::default()
    }
}

fn solve_again(
    shrunk: &Shrunk,
    policy: &Policy,
    (free, fixed): (u64, Fixed),
) -> Result<Plan, Failure> {
    let (plan, spec) = (shrunk.plan, &shrunk.model.spec);
    let workload = prompts::workload(shrunk.lines);
    let device = plan.device_kind().map_err(Failure::failed)?;
    let played = shrunk.played_bytes();
    let sure = (free as f64 * SURE_PART) as u64;
    let budget = PlanBudget {
        cpu_bytes: sure.saturating_sub(played).min(plan.budget.cpu_bytes),
        ..plan.budget
    };
    let fingerprint = plan.model.fingerprint.as_deref();
    let stored = |compress| {
        let layout = device.weight_layout();
        let packing = Packing { compress, layout };
        stored_bytes(shrunk.offload_dir, shrunk.model, fingerprint, packing)
    };
    let request = PlanRequest {
        model: spec,
        fingerprint,
        job: Job::Given(&workload),
        device,
        device_name: &plan.device,
        profile: shrunk.profile,
        calibrated: true,
        explain: false,
        changes: &Changes::default(),
        budget,
        fixed,
        compress: CompressMode::Auto,
        kv: policy.kv,
        threads: policy.threads,
        host: shrunk
            .model
            .host_bytes(Input::of(&workload), policy.threads)
            .with_gpu(device, shrunk.profile.gpu.as_ref()),
        stored_bytes: [stored(false), stored(true)],
        repricer: Some(&ScheduleRepricer),
    };
    let mut found = planner::plan(&request).map_err(Failure::failed)?;
    found.model.name.clone_from(&plan.model.name);
    found.next_command.clone_from(&plan.next_command);
    Ok(found)
}

/// The line that is shown, and kept in the report.
fn told(before: &Plan, after: &Plan, short: &str) -> String {
    let rung = |plan: &Plan| {
        let policy = plan.policy.as_ref();
        let speed = plan.estimate.as_ref().map_or(0.0, |e| e.throughput_tok_s);
        let block = policy.map_or(0, |p| p.gpu_batch_size * p.num_gpu_batches);
        let percent = policy.map_or_else(String::new, |p| show_percent(p.percent));
        format!("{percent} in blocks of {block} at {speed:.2} tok/s")
    };
    let formats = |plan: &Plan| {
        plan.policy
            .as_ref()
            .map(|p| (p.compress_weight, p.compress_cache))
    };
    let text = match (formats(after), formats(before) == formats(after)) {
        // A GPU rounds the activations of many rows to 16 bits, those of few it does not.
        (_, true) if matches!(after.device_kind(), Ok(DeviceKind::Cuda)) => "the same formats",
        (_, true) => "the same text",
        (Some((true, true)), _) => {
            "4-bit weights and cache, which the plan permits: the text changes"
        }
        _ => "4-bit weights, which the plan permits: the text changes",
    };
    format!(
        "{short}; stepping down from {} to {} ({text}); --strict refuses instead",
        rung(before),
        rung(after)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Request;
    use crate::engine::sampling::Sampling;
    use crate::profile::compiled_in;
    use crate::units::MIB;

    fn lines() -> Vec<Line> {
        let request = |line| Request {
            line,
            prompt: vec![7; 64],
            max_tokens: 8,
            sampling: Sampling::GREEDY,
        };
        let line = |index| Line {
            index,
            result: Ok(request(index)),
        };
        (0..6).map(line).collect()
    }

    fn planned(model: &Model, profile: &HardwareProfile, cpu_bytes: u64) -> Plan {
        let workload = prompts::workload(&lines());
        planner::plan(&PlanRequest {
            model: &model.spec,
            fingerprint: None,
            job: Job::Given(&workload),
            device: crate::policy::DeviceKind::Cpu,
            device_name: "cpu",
            profile,
            calibrated: true,
            explain: false,
            changes: &Changes::default(),
            budget: PlanBudget {
                gpu_bytes: None,
                cpu_bytes,
                disk_bytes: 1 << 40,
            },
            fixed: Fixed::default(),
            compress: CompressMode::Auto,
            kv: crate::dtype::Dtype::F16,
            threads: 2,
            host: model.host_bytes(Input::of(&workload), 2),
            stored_bytes: [0, 0],
            repricer: Some(&ScheduleRepricer),
        })
        .unwrap()
    }

    #[test]
    fn less_memory_is_met_without_a_change_of_text_and_4_bit_only_by_permission() {
        let model = Model::find("synth:opt-1.3b", 0, false).ok().unwrap();
        let profile = HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap();
        let mut plan = planned(&model, &profile, 4096 * MIB);
        let lines = lines();
        let down = |plan: &Plan, free| {
            let shrunk = Shrunk {
                plan,
                model: &model,
                profile: &profile,
                lines: &lines,
                offload_dir: Path::new("/nowhere"),
            };
            step_down(&shrunk, free)
        };
        assert!(down(&plan, 4096 * MIB).ok().unwrap().is_none());
        let less = down(&plan, 1200 * MIB).ok().unwrap().unwrap();
        assert!(less.feasible && less.lossless);
        let peak = less.estimate.as_ref().unwrap().tiers.cpu.peak_bytes;
        assert!(peak <= 1200 * MIB, "{peak}");
        let told = less.explain.stepped_down.as_ref().unwrap();
        assert!(
            told.contains("the same text") && told.contains("--strict"),
            "{told}"
        );
        assert!(!less.is_edited());
        // Somewhere between, only 4-bit weights fit.
        let tight = (100..400)
            .step_by(4)
            .find(|mib| down(&plan, mib * MIB).is_ok());
        let below = (tight.unwrap() - 8) * MIB;
        assert!(down(&plan, below).is_err());
        plan.may_become_lossy = true;
        if let Ok(lossy) = down(&plan, below) {
            let lossy = lossy.unwrap();
            assert!(!lossy.lossless);
            let told = lossy.explain.stepped_down.unwrap();
            assert!(told.contains("the text changes"), "{told}");
        }
    }
}
