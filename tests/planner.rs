//! The planner as its users see it: what it recommends fits, nothing that the same estimator prices
//! beats it, more of anything never hurts, and what does not fit is refused with a budget that does.

#[path = "planner/beside.rs"]
mod beside;
mod common;
#[path = "planner/figures.rs"]
mod figures;
#[path = "running/policy.rs"]
mod policy;

use common::planning::*;
use common::*;
use loadmaster::cost::affine::{GROUPS, share_vector, shares_from};
use loadmaster::cost::estimate::{EstimateInput, estimate};
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::{Arithmetic, Compute, Dtype};
use loadmaster::plan::{MOST_SEQUENCES, Plan, PlanBudget};
use loadmaster::planner::changes::twice_as_fast;
use loadmaster::planner::realise::{Built, Realiser};
use loadmaster::planner::{Candidate, CompressMode, PlanRequest, plan};
use loadmaster::policy::DeviceKind;
use loadmaster::profile::HardwareProfile;
use loadmaster::tier::{PerTier, Tier};
use loadmaster::units::{GIB, MIB};
use loadmaster::workload::Workload;

#[test]
fn a_plan_fits_its_budget_and_reads_back_unchanged() {
    for setting in settings() {
        let made = plan(&setting.request()).unwrap();
        assert!(made.feasible && made.lossless, "{}", made.to_toml());
        let estimate = made.estimate.as_ref().unwrap();
        for tier in Tier::ALL {
            assert!(estimate.tiers[tier].peak_bytes <= estimate.tiers[tier].total_bytes);
        }
        assert_eq!(Plan::from_toml(&made.to_toml()).unwrap(), made);
        assert_eq!(Plan::from_json(&made.to_json()).unwrap(), made);
        assert!(!made.is_edited());
        let again = plan(&setting.request()).unwrap();
        assert_eq!(again, made, "plans are deterministic");
    }
}

#[test]
fn bf16_products_that_are_no_faster_than_exact_ones_are_told() {
    let mut setting = cpu(opt_1_3b(), 8 * GIB, Workload::uniform(8, 128, 16));
    let told = |setting: &Setting, compute| {
        let mut request = setting.request();
        request.fixed.compute = compute;
        plan(&request).unwrap().explain.exact
    };
    // Not measured: taken to be as fast as fp32.
    let same = told(&setting, Compute::Bf16);
    assert!(same.unwrap().contains("without --compute bf16"));
    assert_eq!(told(&setting, Compute::Exact), None);
    for (factor, words) in [(4.0, Some("times as fast")), (0.5, None)] {
        let mut narrow = setting.profile.cpu.gemm["f16"].clone();
        narrow.points.iter_mut().for_each(|point| point.3 *= factor);
        let table = Arithmetic::Bf16.table_name(Dtype::F16);
        setting.profile.cpu.gemm.insert(table, narrow);
        let told = told(&setting, Compute::Bf16);
        let right = match words {
            Some(words) => told.is_some_and(|told| told.contains(words)),
            None => told.is_none(),
        };
        assert!(right, "{factor}");
    }
}

#[test]
fn rows_on_disk_that_the_cpu_multiplies_beside_a_gpu_are_asked_for_and_take_disk_again() {
    let mut setting = on_t4(opt_6_7b(), 8 * GIB, Workload::uniform(8, 128, 16));
    let mut with = |cpu_compute_share: Option<f64>, disk_bytes: u64| {
        setting.budget.disk_bytes = disk_bytes;
        let mut request = setting.request();
        request.compress = CompressMode::Never;
        request.fixed.percent = Some([0.0, 10.0, 100.0, 0.0, 100.0, 0.0]);
        request.fixed.cpu_compute_share = cpu_compute_share;
        plan(&request).unwrap()
    };
    let multiplied = |plan: &Plan| {
        let placement = plan.placement.as_ref().unwrap();
        placement.weight_bytes.disk_compute
    };
    let store = with(Some(0.0), 100 * GIB);
    assert_eq!((multiplied(&store), store.setup.spill_bytes), (0, 0));
    assert_eq!(multiplied(&with(None, 100 * GIB)), 0);
    let half = with(Some(0.5), 100 * GIB);
    let rows = multiplied(&half);
    let disk_bytes = store.setup.store_bytes;
    // DRAM's tenth comes first.
    assert!(rows > disk_bytes * 39 / 100 && rows < disk_bytes * 41 / 100);
    let spill = half.setup.spill_bytes;
    assert!(spill >= rows && spill - rows < MIB, "{spill} {rows}");
    // Its bytes to the byte, and none less.
    assert!(with(Some(0.5), disk_bytes + spill).feasible);
    let short = with(Some(0.5), disk_bytes + spill - MIB);
    assert!(!short.feasible && short.missing_bytes.disk.is_some_and(|b| b > 0));
    assert!(with(Some(0.0), disk_bytes).feasible);
}

fn cpu_compute_bytes(plan: &Plan) -> u64 {
    plan.placement.as_ref().unwrap().weight_bytes.cpu_compute
}

#[test]
fn a_few_sequences_are_multiplied_in_dram_and_many_are_not() {
    let with = |sequences: usize, share: Option<f64>| {
        let mut setting = on_t4(opt_6_7b(), 64 * GIB, Workload::uniform(sequences, 64, 32));
        setting.budget.gpu_bytes = Some(6 * GIB);
        let mut request = setting.request();
        request.compress = CompressMode::Never;
        request.fixed.cpu_compute_share = share;
        plan(&request).unwrap()
    };
    let (mixed, shipped) = (with(1, None), with(1, Some(0.0)));
    assert!(cpu_compute_bytes(&mixed) > 0);
    let gain = throughput(&mixed) / throughput(&shipped);
    assert!(gain > 1.5, "DRAM is five times as fast as the link: {gain}");
    assert_eq!(cpu_compute_bytes(&with(512, None)), 0);
}

#[test]
fn the_numbers_of_a_plan_with_a_gpu_give_it_back() {
    let setting = on_t4(opt_30b(), 40 * GIB, Workload::uniform(4, 64, 16));
    let mut request = setting.request();
    request.compress = CompressMode::Never;
    let made = plan(&request).unwrap();
    let weights = made.placement.as_ref().unwrap().weight_bytes;
    assert!(weights.cpu_compute > 0 && weights.disk_ship > 0);
    let policy = made.policy.as_ref().unwrap();
    let (share, size) = (policy.cpu_compute_share_percent, policy.gpu_batch_size);
    request.fixed.percent = Some(policy.percent);
    request.fixed.cpu_compute_share = Some(share / 100.0);
    request.fixed.gpu_batch_size = Some(size);
    request.fixed.num_gpu_batches = Some(policy.num_gpu_batches);
    let again = plan(&request).unwrap();
    assert_eq!(again.placement.unwrap().weight_bytes, weights);
}

#[test]
fn the_saved_policy_realises_the_planned_bytes() {
    for setting in settings() {
        let made = plan(&setting.request()).unwrap();
        let policy = Plan::from_toml(&made.to_toml())
            .unwrap()
            .to_policy()
            .unwrap();
        let rates = Rates::new(&setting.profile, setting.device, policy.threads).unwrap();
        let figures = estimate(&EstimateInput {
            model: &setting.model,
            workload: &setting.workload,
            rates: &rates,
            policy: &policy,
            host: HOST,
            budget: PerTier {
                gpu: setting.budget.gpu_bytes.unwrap_or(0),
                cpu: setting.budget.cpu_bytes,
                disk: setting.budget.disk_bytes,
            },
        });
        assert_eq!(Some(&figures), made.estimate.as_ref());
    }
}

#[test]
fn the_programs_optimum_is_the_estimate_at_that_point() {
    for setting in settings() {
        let request = setting.request();
        let space = request.space().unwrap();
        let equalities = space.equalities();
        for candidate in space.candidates().into_iter().step_by(7) {
            let priced = space.price(&candidate);
            let realiser = Realiser {
                space: &space,
                candidate: &candidate,
                priced: &priced,
                equalities: &equalities,
            };
            let Some(optimum) = realiser.relaxed() else {
                continue;
            };
            let input = (equalities.as_slice(), priced.overhead_bytes);
            let bound_s = space.program(&candidate, &priced, input).bound_s().unwrap();
            assert!(bound_s <= optimum.seconds * (1.0 + 1e-6));
            let shares = share_vector(&shares_from(&optimum.shares));
            let table = loadmaster::cost::estimate::figures(
                &priced.terms,
                &priced.moments,
                &space.rates,
                &shares,
            );
            let error = (table.total_s - optimum.seconds).abs() / optimum.seconds;
            assert!(error < 1e-9, "{error}");
        }
    }
}

/// Settings with the formats that a search is free in, or held to.
fn searches() -> Vec<(Setting, CompressMode)> {
    let lossless = settings().into_iter().map(|s| (s, CompressMode::Never));
    let more = [
        (
            cpu(opt_1_3b(), GIB, Workload::uniform(32, 64, 64)),
            CompressMode::Never,
        ),
        (
            cpu(opt_1_3b(), GIB, Workload::uniform(8, 128, 16)),
            CompressMode::Both,
        ),
        (
            cpu(opt_6_7b(), 3 * GIB, Workload::uniform(40, 200, 20)),
            CompressMode::Fastest,
        ),
        (
            on_t4(opt_6_7b(), 30 * GIB, Workload::uniform(48, 256, 32)),
            CompressMode::Never,
        ),
        (
            on_t4(opt_30b(), 20 * GIB, Workload::uniform(64, 256, 16)),
            CompressMode::Weights,
        ),
        (
            on_t4(opt_175b(), 190 * GIB, Workload::uniform(96, 512, 32)),
            CompressMode::Never,
        ),
    ];
    lossless.chain(more).collect()
}

#[test]
fn no_random_feasible_policy_beats_the_plan() {
    for (seed, (setting, compress)) in searches().into_iter().enumerate() {
        let request = PlanRequest {
            compress,
            explain: false,
            ..setting.request()
        };
        let made = throughput(&plan(&request).unwrap());
        let best = best_of_random((&setting, compress), seed as u64 + 1);
        assert!(
            best <= made * (1.0 + 1e-9),
            "{} {compress:?}: random {best}, plan {made}",
            setting.model.name
        );
    }
}

fn fits_mode(c: &Candidate, compress: CompressMode) -> bool {
    match compress {
        CompressMode::Never => c.lossless(),
        CompressMode::Weights => c.compress_weight && !c.compress_cache,
        CompressMode::Both => c.compress_weight && c.compress_cache,
        _ => true,
    }
}

/// The fastest of 1,000 random policies that fit, by the estimator's closed form.
fn best_of_random((setting, compress): (&Setting, CompressMode), seed: u64) -> f64 {
    let request = setting.request();
    let space = request.space().unwrap();
    let mut candidates = space.candidates();
    candidates.retain(|c| fits_mode(c, compress));
    let mut next = random(seed);
    let (mut feasible, mut tried, mut best) = (0, 0, 0.0f64);
    while feasible < 1000 && tried < 40_000 {
        tried += 1;
        let candidate = candidates[(next() * candidates.len() as f64) as usize];
        let priced = space.price(&candidate);
        let vector = random_shares(&space.allowed(&candidate), &mut next);
        let built = Built::new(&space, &priced, &vector);
        if !built.fits(&space) {
            continue;
        }
        feasible += 1;
        let figures = estimate(&EstimateInput {
            model: &setting.model,
            workload: &setting.workload,
            rates: &space.rates,
            policy: &built.policy,
            host: HOST,
            budget: space.budget,
        });
        best = best.max(figures.throughput_tok_s);
    }
    assert!(
        feasible >= 1000,
        "{} {feasible} of {tried}",
        setting.model.name
    );
    best
}

fn random_shares(allowed: &[bool; 11], next: &mut impl FnMut() -> f64) -> [f64; 11] {
    let mut vector = [0.0; 11];
    for group in GROUPS {
        // Powers make corners likely, where the good policies are.
        let mut one = |i: usize| {
            if allowed[i] {
                next().powi(6) + 1e-12
            } else {
                0.0
            }
        };
        let raw: Vec<f64> = group.clone().map(&mut one).collect();
        let sum: f64 = raw.iter().sum();
        group
            .zip(raw)
            .for_each(|(i, value)| vector[i] = value / sum);
    }
    vector
}

/// Machines of which each is at least as good as the one before.
fn better_machines(setting: &Setting) -> Vec<Vec<(String, HardwareProfile, PlanBudget)>> {
    let same = |budget: PlanBudget, what: String| (what, setting.profile.clone(), budget);
    let steps = 0..8u64;
    let dram = steps.clone().map(|step| {
        let mut budget = setting.budget;
        budget.cpu_bytes += step * setting.budget.cpu_bytes / 5;
        same(budget, format!("DRAM step {step}"))
    });
    let gpu = steps.map(|step| {
        let mut budget = setting.budget;
        budget.gpu_bytes = budget.gpu_bytes.map(|b| b + step * b / 5);
        same(budget, format!("GPU step {step}"))
    });
    let parts = twice_as_fast(&setting.profile, setting.device == DeviceKind::Cuda);
    let mut chains = vec![dram.collect::<Vec<_>>(), gpu.collect()];
    for (what, _) in parts {
        let mut profile = setting.profile.clone();
        let mut chain = vec![(what.to_owned(), profile.clone(), setting.budget)];
        for _ in 0..2 {
            let again = twice_as_fast(&profile, setting.device == DeviceKind::Cuda);
            let change = again.into_iter().find(|(name, _)| *name == what).unwrap().1;
            profile = change.apply(&profile).unwrap();
            chain.push((what.to_owned(), profile.clone(), setting.budget));
        }
        chains.push(chain);
    }
    chains
}

fn growing_settings() -> Vec<Setting> {
    vec![
        cpu(opt_1_3b(), GIB, Workload::uniform(8, 128, 16)),
        cpu(opt_6_7b(), 4 * GIB, Workload::uniform(12, 256, 16)),
        on_t4(opt_30b(), 20 * GIB, Workload::uniform(64, 256, 16)),
    ]
}

#[test]
fn more_memory_or_bandwidth_never_worsens_the_plan() {
    for setting in growing_settings() {
        for chain in better_machines(&setting) {
            let mut last = 0.0f64;
            for (what, profile, budget) in chain {
                let request = PlanRequest {
                    profile: &profile,
                    budget,
                    explain: false,
                    ..setting.request()
                };
                let now = throughput(&plan(&request).unwrap());
                let name = &setting.model.name;
                assert!(now >= last * 0.99, "{name}, {what}: {now} after {last}");
                last = last.max(now);
            }
        }
    }
}

#[test]
fn more_memory_or_bandwidth_never_worsens_the_programs_optimum() {
    for setting in growing_settings() {
        for chain in better_machines(&setting) {
            let spaces: Vec<_> = chain
                .iter()
                .map(|(what, profile, budget)| {
                    let request = PlanRequest {
                        profile,
                        budget: *budget,
                        ..setting.request()
                    };
                    (what, request.space().unwrap())
                })
                .collect();
            for candidate in spaces[0].1.candidates().into_iter().step_by(23) {
                let mut last_s = f64::INFINITY;
                for (what, space) in &spaces {
                    let priced = space.price(&candidate);
                    let realiser = Realiser {
                        space,
                        candidate: &candidate,
                        priced: &priced,
                        equalities: &[],
                    };
                    let Some(optimum) = realiser.relaxed() else {
                        assert!(last_s.is_infinite(), "what fitted fits with more: {what}");
                        continue;
                    };
                    // A solver's own rounding is all that may differ.
                    let s = optimum.seconds;
                    assert!(s <= last_s * (1.0 + 1e-7), "{what}: {s} after {last_s}");
                    last_s = s;
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_budget_that_does() {
    for setting in [
        cpu(opt_1_3b(), 150 * MIB, Workload::uniform(4, 128, 16)),
        cpu(opt_125m(), 90 * MIB, Workload::uniform(1, 512, 16)),
        on_t4(opt_175b(), 100 * MIB, Workload::uniform(8, 512, 32)),
    ] {
        let refused = plan(&setting.request()).unwrap();
        assert!(!refused.feasible, "{}", refused.to_toml());
        assert!(refused.policy.is_none() && refused.estimate.is_none());
        assert!(refused.missing_bytes.cpu.unwrap() > 0);
        assert_eq!(Plan::from_toml(&refused.to_toml()).unwrap(), refused);
        let enough = refused.enough_bytes.unwrap();
        let mut request = setting.request();
        request.budget = enough;
        assert!(
            plan(&request).unwrap().feasible,
            "{enough:?} is named as enough"
        );
        request.budget.cpu_bytes = enough.cpu_bytes * 9 / 10;
        assert!(!plan(&request).unwrap().feasible, "{enough:?} is tight");
    }
}

#[test]
fn a_refusal_with_a_part_for_the_cpu_names_little_more_where_little_is_missing() {
    let mut setting = on_t4(opt_6_7b(), 100 * MIB, Workload::uniform(1, 64, 8));
    setting.budget.gpu_bytes = Some(2 * GIB);
    let mut request = setting.request();
    request.fixed.cpu_compute_share = Some(0.5);
    request.compress = CompressMode::Never;
    let refused = plan(&request).unwrap();
    assert!(!refused.feasible);
    // Not twelve gibibytes for all weights.
    let missing = refused.missing_bytes;
    assert!(missing.gpu.unwrap() < GIB && missing.cpu.unwrap() < GIB);
    request.budget = refused.enough_bytes.unwrap();
    let made = plan(&request).unwrap();
    let share = made.policy.unwrap().cpu_compute_share_percent;
    assert!((share - 50.0).abs() < 1.0, "{share}");
}

#[test]
fn no_block_is_larger_than_a_plan_may_hold() {
    let setting = on_t4(opt_125m(), 100 * GIB, Workload::uniform(3 << 20, 1, 1));
    let request = setting.request();
    let candidates = request.space().unwrap().candidates();
    let most = candidates.iter().map(Candidate::slots).max();
    assert!(most.is_some_and(|slots| slots <= MOST_SEQUENCES));
}

#[test]
fn opt_175b_on_one_t4_is_planned_with_its_ladder() {
    let workload = Workload::uniform(256, 512, 32);
    let setting = on_t4(opt_175b(), 190 * GIB, workload);
    let made = plan(&setting.request()).unwrap();
    assert!(made.feasible && made.lossless);
    let estimate = made.estimate.as_ref().unwrap();
    assert!(estimate.throughput_tok_s > 0.05 && estimate.throughput_tok_s < 5.0);
    assert_eq!(made.ladder.len(), 9);
    for rung in &made.ladder {
        assert_eq!(rung.fits, rung.throughput_tok_s.is_some(), "{}", rung.name);
        if rung.lossless && rung.fits {
            assert!(rung.throughput_tok_s.unwrap() <= estimate.throughput_tok_s * 1.001);
        }
    }
    let faster = made
        .ladder
        .iter()
        .find(|r| r.name == "4-bit weights")
        .unwrap();
    assert!(faster.throughput_tok_s.unwrap() > estimate.throughput_tok_s);
    assert!(made.explain.four_bit.unwrap().contains("--compress"));
    assert!(!made.runners_up.is_empty());
}
