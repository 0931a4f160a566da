//! Placement must not change results: whatever the shares, batch shape, overlap and machine, logits are
//! the same bits.

#[path = "placement/demand.rs"]
mod demand;
mod running;

use demand::Count;
use loadmaster::checkpoint::SynthSource;
use loadmaster::dtype::Dtype;
use loadmaster::engine::Request;
use loadmaster::model::ModelSpec;
use loadmaster::placement::Placement;
use loadmaster::policy::{Compute, DeviceKind, Policy, Shares};
use loadmaster::tier::Lane;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use running::policy::policy;
use running::{PackedFile, Ran, pack, requests, run, small_model};

const LENGTHS: [(usize, usize); 5] = [(5, 4), (17, 3), (1, 6), (9, 2), (12, 5)];

fn assert_same(a: &Ran, b: &Ran, what: &str) {
    assert_eq!(a.collected.logits.len(), b.collected.logits.len(), "{what}");
    for (key, logits) in &a.collected.logits {
        let other = &b.collected.logits[key];
        let first = logits
            .iter()
            .zip(other)
            .position(|(x, y)| x.to_bits() != y.to_bits());
        assert_eq!(first, None, "{what}: line and step {key:?}");
    }
    for (line, done) in &a.collected.lines {
        assert_eq!(done.token_ids, b.collected.lines[line].token_ids, "{what}");
    }
}

#[test]
fn tiers_and_batches_give_the_same_bits() {
    let model = small_model(Dtype::F16);
    let pack = pack(&SynthSource::new(model.clone(), 11), false);
    let lines = || requests(&model, &LENGTHS);
    let plain = run(
        &model,
        &pack,
        &policy([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 1.0, (5, 1)),
        DeviceKind::Cpu,
        lines(),
    );
    assert_eq!(plain.collected.lines.len(), LENGTHS.len());
    let disk = run(
        &model,
        &pack,
        &policy([0.0, 30.0, 0.0, 50.0, 0.0, 50.0], 1.0, (2, 2)),
        DeviceKind::Cpu,
        lines(),
    );
    assert_same(&plain, &disk, "over DRAM and disk");
    for share in [0.0, 0.5, 1.0] {
        let p = policy([30.0, 30.0, 40.0, 30.0, 50.0, 25.0], share, (3, 2));
        let host = run(&model, &pack, &p, DeviceKind::Host, lines());
        assert_same(
            &plain,
            &host,
            &format!("over three tiers, computed in place {share}"),
        );
    }
}

/// Six percentages whose pairs sum to at most 100.
fn percentages() -> impl Strategy<Value = [f64; 6]> {
    let pair =
        || (0u32..=4, 0u32..=4).prop_map(|(a, b)| (25.0 * a as f64, 25.0 * b.min(4 - a) as f64));
    (pair(), pair(), pair()).prop_map(|(w, c, h)| [w.0, w.1, c.0, c.1, h.0, h.1])
}

/// A random way to run: shares, batch shape, threads, overlap, who attends.
fn policies() -> impl Strategy<Value = Policy> {
    let shape = (1usize..=5, 1usize..=3);
    let flag = any::<bool>;
    let switches = (1usize..=3, flag(), flag(), flag(), flag());
    (percentages(), 0u32..=2, shape, switches).prop_map(
        |(percent, share, shape, (threads, overlap, attends, pin, double_buffer))| Policy {
            threads,
            overlap,
            cpu_cache_compute: attends,
            double_buffer,
            pin_weight: pin,
            ..policy(percent, share as f64 / 2.0, shape)
        },
    )
}

/// What must be the same bits under every policy: one format of weights and one of the cache.
struct Reference {
    model: ModelSpec,
    pack: PackedFile,
    compress: (bool, bool),
    kv: Dtype,
    compute: Compute,
    lines: Vec<Request>,
    plain: Ran,
}

impl Reference {
    fn new(
        dtype: Dtype,
        (compress, kv, compute): ((bool, bool), Dtype, Compute),
        lengths: &[(usize, usize)],
    ) -> Self {
        let model = small_model(dtype);
        let pack = pack(&SynthSource::new(model.clone(), 5), compress.0);
        let lines = requests(&model, lengths);
        let all_in_dram = Policy {
            compress_weight: compress.0,
            compress_cache: compress.1,
            kv,
            compute,
            threads: 1,
            ..policy([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 1.0, (lines.len(), 1))
        };
        let plain = run(&model, &pack, &all_in_dram, DeviceKind::Cpu, lines.clone());
        Reference {
            model,
            pack,
            compress,
            kv,
            compute,
            lines,
            plain,
        }
    }

    fn check(&self, policy: Policy) {
        let (compress_weight, compress_cache) = self.compress;
        let policy = Policy {
            compress_weight,
            compress_cache,
            kv: self.kv,
            compute: self.compute,
            ..policy
        };
        let host = run(
            &self.model,
            &self.pack,
            &policy,
            DeviceKind::Host,
            self.lines.clone(),
        );
        assert_same(&self.plain, &host, &format!("{policy:?}"));
    }
}

#[test]
fn two_hundred_random_policies_give_the_same_bits() {
    let long = [(5, 4), (33, 3), (1, 6), (70, 2), (12, 5), (40, 4)];
    let exact = Compute::Exact;
    let references = [
        Reference::new(Dtype::F16, ((false, false), Dtype::F16, exact), &LENGTHS),
        Reference::new(Dtype::F16, ((false, false), Dtype::F32, exact), &long),
        Reference::new(Dtype::Bf16, ((false, false), Dtype::F16, exact), &LENGTHS),
        Reference::new(Dtype::F32, ((false, false), Dtype::F32, exact), &LENGTHS),
        Reference::new(Dtype::F16, ((true, false), Dtype::F16, exact), &LENGTHS),
        Reference::new(Dtype::F16, ((true, true), Dtype::F16, exact), &long),
        Reference::new(
            Dtype::F16,
            ((true, false), Dtype::F16, Compute::Fp32),
            &LENGTHS,
        ),
        Reference::new(
            Dtype::F16,
            ((false, true), Dtype::F16, Compute::Bf16),
            &long,
        ),
        Reference::new(
            Dtype::Bf16,
            ((false, false), Dtype::F16, Compute::Bf16),
            &LENGTHS,
        ),
    ];
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[17; 32]);
    let mut runner = TestRunner::new_with_rng(
        Config {
            failure_persistence: None,
            ..Config::default()
        },
        rng,
    );
    for round in 0..270 {
        let tree = policies().new_tree(&mut runner).expect("a policy");
        references[round % references.len()].check(tree.current());
    }
}

/// Every lane's bytes against the count by hand, exactly.
fn check_bytes(reference: &Reference, policy: Policy, device: DeviceKind) {
    let (model, pack) = (&reference.model, &reference.pack);
    let (compress_weight, compress_cache) = reference.compress;
    let policy = Policy {
        compress_weight,
        compress_cache,
        kv: reference.kv,
        ..policy
    };
    let ran = run(model, pack, &policy, device, reference.lines.clone());
    let placement = Placement::new(model, &policy);
    let lines = ran.collected.lines.values();
    let generated: Vec<Vec<u32>> = lines.map(|line| line.token_ids.clone()).collect();
    let gpu = device == DeviceKind::Host;
    let parts = (model, &policy, &placement);
    let demanded = Count::new(parts, &pack.matrix_offsets, gpu).run(&reference.lines, &generated);
    for lane in Lane::ALL {
        let moved = ran.lanes[lane].bytes;
        assert_eq!(moved, demanded[lane], "{}: {policy:?}", lane.name());
    }
}

#[test]
fn lanes_move_exactly_what_random_placements_demand() {
    let f16 = Dtype::F16;
    let references = [
        Reference::new(f16, ((false, false), f16, Compute::Exact), &[(9, 4); 5]),
        Reference::new(
            f16,
            ((false, false), Dtype::F32, Compute::Exact),
            &[(33, 3); 7],
        ),
        Reference::new(
            Dtype::Bf16,
            ((false, false), f16, Compute::Exact),
            &[(6, 5); 4],
        ),
        Reference::new(
            Dtype::F32,
            ((false, false), Dtype::F32, Compute::Exact),
            &[(17, 2); 6],
        ),
        Reference::new(f16, ((true, true), f16, Compute::Exact), &[(40, 3); 5]),
        // More rows than pass at once: looked up and multiplied in two chunks.
        Reference::new(f16, ((true, false), f16, Compute::Exact), &[(120, 2); 6]),
    ];
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[29; 32]);
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, rng);
    for round in 0..210 {
        let tree = policies().new_tree(&mut runner).expect("a policy");
        let reference = &references[round % references.len()];
        let policy = tree.current();
        check_bytes(reference, policy.clone(), DeviceKind::Host);
        // The same without a GPU, where its share of everything falls to the CPU.
        if round % 4 == 0 {
            let [wg, wc, cg, cc, hg, hc] = policy.shares.percent();
            let shares = Shares::from_percent([0.0, wg + wc, 0.0, cg + cc, 0.0, hg + hc], 1.0);
            let shares = shares.expect("percentages");
            check_bytes(reference, Policy { shares, ..policy }, DeviceKind::Cpu);
        }
    }
}
