//! Placement must not change results: whatever the shares, batch shape, overlap and machine, logits are
//! the same bits.

mod running;

use loadmaster::checkpoint::SynthSource;
use loadmaster::dtype::Dtype;
use loadmaster::engine::Request;
use loadmaster::model::ModelSpec;
use loadmaster::placement::{Placement, WeightHome};
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::tier::Lane;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use running::{PackedFile, Ran, pack, policy, requests, run, small_model};

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
    let switches = (1usize..=3, any::<bool>(), any::<bool>(), any::<bool>());
    (percentages(), 0u32..=2, shape, switches).prop_map(
        |(percent, share, shape, (threads, overlap, attends, pin))| Policy {
            threads,
            overlap,
            cpu_cache_compute: attends,
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
    lines: Vec<Request>,
    plain: Ran,
}

impl Reference {
    fn new(
        dtype: Dtype,
        (compress, kv): ((bool, bool), Dtype),
        lengths: &[(usize, usize)],
    ) -> Self {
        let model = small_model(dtype);
        let pack = pack(&SynthSource::new(model.clone(), 5), compress.0);
        let lines = requests(&model, lengths);
        let all_in_dram = Policy {
            compress_weight: compress.0,
            compress_cache: compress.1,
            kv,
            threads: 1,
            ..policy([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 1.0, (lines.len(), 1))
        };
        let plain = run(&model, &pack, &all_in_dram, DeviceKind::Cpu, lines.clone());
        Reference {
            model,
            pack,
            compress,
            kv,
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
    let references = [
        Reference::new(Dtype::F16, ((false, false), Dtype::F16), &LENGTHS),
        Reference::new(Dtype::F16, ((false, false), Dtype::F32), &long),
        Reference::new(Dtype::Bf16, ((false, false), Dtype::F16), &LENGTHS),
        Reference::new(Dtype::F32, ((false, false), Dtype::F32), &LENGTHS),
        Reference::new(Dtype::F16, ((true, false), Dtype::F16), &LENGTHS),
        Reference::new(Dtype::F16, ((true, true), Dtype::F16), &long),
    ];
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[17; 32]);
    let mut runner = TestRunner::new_with_rng(
        Config {
            failure_persistence: None,
            ..Config::default()
        },
        rng,
    );
    for round in 0..210 {
        let tree = policies().new_tree(&mut runner).expect("a policy");
        references[round % references.len()].check(tree.current());
    }
}

#[test]
fn lanes_move_what_the_shares_demand() {
    let model = small_model(Dtype::F16);
    let pack = pack(&SynthSource::new(model.clone(), 3), false);
    let lines = requests(&model, &[(6, 4); 4]);
    // The token table is all in DRAM or all on the GPU in these policies only when its share says so:
    // its lookups are counted apart, by comparing runs that differ in nothing else.
    let p = policy([0.0, 50.0, 0.0, 100.0, 0.0, 100.0], 1.0, (4, 1));
    let ran = run(&model, &pack, &p, DeviceKind::Cpu, lines.clone());
    let placement = Placement::new(&model, &p);
    let passes = 4;
    let streamed = passes * placement.weight_bytes(WeightHome::DiskCompute);
    let read = ran.lanes[Lane::DiskToCpu].bytes;
    let rounding = passes * 2 * 4096 * placement.matrices.len() as u64;
    let lookups = 4 * (6 + 3) * (placement.panel_bytes[placement.matrices.len() - 1] + 8192);
    assert!(
        read >= streamed && read <= streamed + rounding + lookups,
        "{streamed} <= {read}"
    );
    assert_eq!(ran.lanes[Lane::CpuToDisk].bytes, 0);

    // The cache alone on disk: each new record is written once, each old one read once a step.
    let p = policy([0.0, 100.0, 0.0, 0.0, 0.0, 100.0], 1.0, (4, 1));
    let ran = run(&model, &pack, &p, DeviceKind::Cpu, lines);
    let record = model.kv_record_bytes(Dtype::F32);
    let (mut reads, mut writes) = (0, 0);
    for step in 1..4u64 {
        reads += (record * (6 + step - 1)).next_multiple_of(4096);
    }
    for (from, to) in [(0, 6), (6, 7), (7, 8), (8, 9)] {
        let start = record * from / 4096 * 4096;
        writes += (record * to - start).next_multiple_of(4096);
    }
    let sequences_and_layers = 4 * model.layers as u64;
    assert_eq!(
        ran.lanes[Lane::DiskToCpu].bytes,
        reads * sequences_and_layers
    );
    assert_eq!(
        ran.lanes[Lane::CpuToDisk].bytes,
        writes * sequences_and_layers
    );
}
