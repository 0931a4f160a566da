//! The plan as a document: what was asked for is kept, both files read back unchanged, edits count,
//! and a person sees what matters.

mod common;

use common::planning::*;
use common::*;
use loadmaster::cost::estimate::{EstimateInput, estimate};
use loadmaster::plan::Plan;
use loadmaster::planner::{CompressMode, Fixed, Job, PlanRequest, plan};
use loadmaster::units::{GIB, MIB};
use loadmaster::workload::Workload;

#[test]
fn an_edited_percentage_wins_over_the_placement() {
    let setting = cpu(opt_1_3b(), 3 * GIB, Workload::uniform(8, 128, 16));
    let mut made = plan(&setting.request()).unwrap();
    made.policy.as_mut().unwrap().percent[1] = 12.5;
    let read = Plan::from_toml(&made.to_toml()).unwrap();
    assert!(read.is_edited());
    let policy = read.to_policy().unwrap();
    assert!((policy.shares.weights.cpu_compute - 0.125).abs() < 1e-12);
    made.policy.as_mut().unwrap().percent[1] = 120.0;
    let error = Plan::from_toml(&made.to_toml()).unwrap_err().to_string();
    assert!(error.contains("--percent"), "{error}");
    let unknown = made.to_toml().replace("[setup]", "[setup]\nsurprise = 1");
    let error = Plan::from_toml(&unknown).unwrap_err().to_string();
    assert!(error.contains("surprise"), "{error}");
}

#[test]
fn a_person_sees_flags_tiers_ladder_and_what_binds() {
    use loadmaster::cli::show_plan::show_plan;
    let setting = cpu(opt_1_3b(), 2 * GIB, Workload::uniform(8, 128, 16));
    let made = plan(&setting.request()).unwrap();
    let text = show_plan(&made, true);
    for word in [
        made.flags.as_str(),
        "DRAM",
        "disk",
        "all weights on disk",
        "tok/s",
        "binds",
        "--compress",
        "lossless",
        made.next_command.as_str(),
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert!(!text.contains("GPU memory"));
    let setting = cpu(opt_1_3b(), 150 * MIB, Workload::uniform(8, 128, 16));
    let refused = plan(&setting.request()).unwrap();
    let text = show_plan(&refused, true);
    assert!(
        text.contains("missing") && text.contains("--cpu-mem"),
        "{text}"
    );
}

#[test]
fn lossy_formats_are_chosen_as_asked() {
    let setting = cpu(opt_1_3b(), 2 * GIB, Workload::uniform(8, 128, 16));
    let with = |compress| {
        let request = PlanRequest {
            compress,
            ..setting.request()
        };
        plan(&request).unwrap()
    };
    let formats = |plan: &Plan| {
        let policy = plan.policy.as_ref().unwrap();
        (policy.compress_weight, policy.compress_cache)
    };
    assert_eq!(formats(&with(CompressMode::Auto)), (false, false));
    assert_eq!(formats(&with(CompressMode::Never)), (false, false));
    assert_eq!(formats(&with(CompressMode::Weights)), (true, false));
    assert_eq!(formats(&with(CompressMode::Cache)), (false, true));
    assert_eq!(formats(&with(CompressMode::Both)), (true, true));
    let fastest = with(CompressMode::Fastest);
    assert!(throughput(&fastest) >= throughput(&with(CompressMode::Never)));
    let mut request = setting.request();
    request.compress = CompressMode::Both;
    request.fixed.compress_weight = Some(true);
    assert!(plan(&request).is_err());
}

#[test]
fn where_no_disk_is_left_for_a_native_store_auto_says_that_it_went_lossy() {
    let mut setting = cpu(opt_1_3b(), 4 * GIB, Workload::uniform(4, 128, 16));
    setting.budget.disk_bytes = 2 * GIB;
    let made = plan(&setting.request()).unwrap();
    assert!(made.feasible && !made.lossless);
    assert!(made.explain.warning.unwrap().contains("changes results"));
    let request = PlanRequest {
        compress: CompressMode::Never,
        ..setting.request()
    };
    let refused = plan(&request).unwrap();
    assert!(!refused.feasible && refused.missing_bytes.disk.unwrap() > 0);
}

#[test]
fn four_bits_that_no_flag_asked_for_are_said() {
    let mut setting = cpu(opt_1_3b(), 4 * GIB, Workload::uniform(4, 128, 16));
    setting.budget.disk_bytes = 2 * GIB;
    let with = |compress_weight, compress_cache| {
        let mut request = setting.request();
        request.fixed.compress_weight = compress_weight;
        request.fixed.compress_cache = compress_cache;
        let made = plan(&request).unwrap();
        assert!(made.feasible && !made.lossless);
        made.explain.warning
    };
    for cache in [false, true] {
        let warning = with(None, Some(cache)).unwrap();
        assert!(warning.contains("keeps weights in 4 bits"), "{warning}");
        assert!(warning.contains("--compress-weight 0"), "{warning}");
    }
    let warning = with(None, None).unwrap();
    assert!(warning.contains("--compress never"), "{warning}");
    assert_eq!(with(Some(true), None), None);
    assert_eq!(with(Some(true), Some(true)), None);
}

#[test]
fn fixed_choices_are_kept() {
    let setting = cpu(opt_1_3b(), 3 * GIB, Workload::uniform(8, 128, 16));
    let mut request = setting.request();
    request.fixed = Fixed {
        percent: Some([0.0, 25.0, 0.0, 100.0, 0.0, 100.0]),
        gpu_batch_size: Some(4),
        num_gpu_batches: Some(2),
        overlap: Some(false),
        ..Fixed::default()
    };
    let made = plan(&request).unwrap();
    let policy = made.policy.unwrap();
    assert!((policy.percent[1] - 25.0).abs() < 1.0);
    assert_eq!((policy.gpu_batch_size, policy.num_gpu_batches), (4, 2));
    assert!(!policy.overlap);
    request.fixed.percent = Some([10.0, 20.0, 0.0, 100.0, 0.0, 100.0]);
    let error = plan(&request).unwrap_err().to_string();
    assert!(error.contains("--percent 0 30 0 100 0 100"), "{error}");
}

#[test]
fn uneven_lines_are_planned_and_fit() {
    use loadmaster::workload::LineLength;
    let mut next = random(9);
    let lines = (0..40)
        .map(|_| LineLength {
            prompt_tokens: 1 + (next() * 300.0) as u32,
            gen_tokens: (next() * 40.0) as u32,
        })
        .collect();
    for setting in [
        cpu(opt_1_3b(), 2 * GIB, Workload { lines }),
        cpu(opt_125m(), GIB, Workload::uniform(5, 100, 0)),
    ] {
        let made = plan(&setting.request()).unwrap();
        assert!(made.feasible);
        let estimate = made.estimate.unwrap();
        assert!(estimate.prefill_s > 0.0 && estimate.total_s.is_finite());
        assert_eq!(estimate.generated_tokens, setting.workload.gen_tokens());
    }
}

#[test]
fn a_free_block_is_as_large_as_pays() {
    let setting = cpu(opt_1_3b(), 4 * GIB, Workload::uniform(1, 128, 16));
    let request = PlanRequest {
        job: Job::BestBlock {
            prompt_tokens: 128,
            gen_tokens: 16,
        },
        ..setting.request()
    };
    let made = plan(&request).unwrap();
    let one = plan(&setting.request()).unwrap();
    assert!(made.workload.prompts > 1);
    assert!(throughput(&made) > throughput(&one));
}

#[test]
fn a_free_block_ends_where_the_positions_do() {
    let setting = cpu(opt_125m(), 4 * GIB, Workload::uniform(1, 1, 1));
    let with = |prompt_tokens, gen_tokens| {
        let request = PlanRequest {
            job: Job::BestBlock {
                prompt_tokens,
                gen_tokens,
            },
            ..setting.request()
        };
        let w = plan(&request).unwrap().workload;
        (w.gen_tokens_max, w.kv_tokens_max)
    };
    assert_eq!(with(2047, 32), (2, 2048));
    assert_eq!(with(2048, u32::MAX), (1, 2048));
    assert_eq!(with(2016, 33), (33, 2048));
    let most = Workload::uniform(1, 2048, u32::MAX);
    assert_eq!(most.kv_tokens_max(), 2046 + (1 << 32));
}

#[test]
fn a_repricer_decides_and_its_figures_are_the_estimate() {
    use loadmaster::cost::figures::Figures;
    use loadmaster::planner::{Replay, Repricer};
    struct Slow;
    impl Repricer for Slow {
        fn replay(&self, replay: &Replay) -> Option<Figures> {
            let mut figures = estimate(&EstimateInput {
                model: replay.model,
                workload: replay.workload,
                rates: replay.rates,
                policy: replay.policy,
                host: replay.host,
                budget: replay.budget,
            });
            figures.prefill_s *= 2.0;
            figures.decode_s *= 2.0;
            figures.finish(replay.workload.prompts() as u64);
            Some(figures)
        }
    }
    let setting = cpu(opt_1_3b(), 2 * GIB, Workload::uniform(8, 128, 16));
    let closed = throughput(&plan(&setting.request()).unwrap());
    let request = PlanRequest {
        repricer: Some(&Slow),
        ..setting.request()
    };
    let replayed = throughput(&plan(&request).unwrap());
    assert!((2.0 * replayed - closed).abs() < 1e-6 * closed);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(64))]

    /// Any numbers that a plan can hold survive both files.
    #[test]
    fn plans_round_trip(
        percent in proptest::array::uniform6(0.0f64..50.0),
        (batch, batches) in (1usize..5000, 1usize..64),
        bytes in 0u64..1 << 50,
        seconds in 0.0f64..1e7,
        word in "[ -~]{0,20}",
    ) {
        let mut made = template();
        let policy = made.policy.as_mut().unwrap();
        policy.percent = percent;
        policy.percent[0] = 0.0;
        policy.percent[2] = 0.0;
        policy.percent[4] = 0.0;
        policy.gpu_batch_size = batch;
        policy.num_gpu_batches = batches;
        made.budget.cpu_bytes = bytes;
        made.estimate.as_mut().unwrap().total_s = seconds;
        made.model.name = word;
        proptest::prop_assert_eq!(&Plan::from_toml(&made.to_toml()).unwrap(), &made);
        proptest::prop_assert_eq!(&Plan::from_json(&made.to_json()).unwrap(), &made);
    }
}

/// One plan, made once.
fn template() -> Plan {
    static PLAN: std::sync::OnceLock<Plan> = std::sync::OnceLock::new();
    let make = || {
        let setting = cpu(opt_125m(), GIB, Workload::uniform(3, 64, 8));
        plan(&setting.request()).unwrap()
    };
    PLAN.get_or_init(make).clone()
}
