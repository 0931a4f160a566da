//! Bytes follow shares: for every named size, what a placement holds is share × tensor bytes, and what
//! it needs beside that stays small.

use loadmaster::cost::footprint::{BlockShape, Footprint, FootprintInput, HostBytes, compute_tier};
use loadmaster::dtype::Dtype;
use loadmaster::model::ModelSpec;
use loadmaster::model::families::named_size;
use loadmaster::placement::{Placement, WeightHome};
use loadmaster::policy::{Compute, DeviceKind, Policy, Shares};
use loadmaster::tier::Tier;
use loadmaster::units::MIB;
use loadmaster::workload::Workload;

const SIZES: [&str; 9] = [
    "opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b",
    "opt-175b",
];

struct Case {
    model: ModelSpec,
    policy: Policy,
    device: DeviceKind,
    workload: Workload,
}

impl Case {
    fn new(size: &str, (percent, device): ([f64; 6], DeviceKind), compress: bool) -> Case {
        let share = if device == DeviceKind::Cpu { 1.0 } else { 0.3 };
        let policy = Policy {
            shares: Shares::from_percent(percent, share).expect("percentages"),
            gpu_batch_size: 20,
            num_gpu_batches: 1,
            pin_weight: true,
            compress_weight: compress,
            compress_cache: compress,
            cpu_cache_compute: device == DeviceKind::Cpu,
            double_buffer: false,
            overlap: true,
            compute: Compute::Exact,
            kv: Dtype::F16,
            threads: 2,
        };
        let model = named_size(size).expect("a known size");
        Case {
            model,
            policy,
            device,
            workload: Workload::uniform(20, 512, 33),
        }
    }

    fn footprint(&self) -> (Placement, Footprint) {
        let placement = Placement::new(&self.model, &self.policy);
        let block = BlockShape::new(&self.workload, &self.policy, &placement);
        let footprint = Footprint::new(&FootprintInput {
            model: &self.model,
            policy: &self.policy,
            placement: &placement,
            block: &block,
            device: self.device,
            host: HostBytes::default(),
        });
        (placement, footprint)
    }

    /// Norms, biases and positions stay with the device that computes, whatever the shares.
    fn smalls(&self, tier: Tier) -> u64 {
        let beside = self.device == DeviceKind::Host && tier == Tier::Cpu;
        let here = compute_tier(self.device) == tier || beside;
        let bytes: u64 = self.model.smalls().iter().map(|s| s.bytes()).sum();
        if here { bytes } else { 0 }
    }

    /// Bytes of weights, cache and activations of the whole block, whatever the tier.
    fn tensors(&self) -> [f64; 3] {
        let m = &self.model;
        let kv = 20 * (512 + 32) * m.layers as u64 * m.kv_record_bytes(self.policy.kv_format());
        let hidden = 20 * 512 * 4 * m.hidden as u64;
        let smalls: u64 = m.smalls().iter().map(|s| s.bytes()).sum();
        let weights = m.weights_bytes(self.policy.compress_weight) - smalls;
        [weights as f64, kv as f64, hidden as f64]
    }
}

fn cases() -> Vec<Case> {
    let kinds = [
        ([0.0, 30.0, 0.0, 50.0, 0.0, 75.0], DeviceKind::Cpu),
        ([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], DeviceKind::Cpu),
        ([20.0, 45.0, 25.0, 50.0, 50.0, 25.0], DeviceKind::Host),
    ];
    let all = SIZES
        .iter()
        .flat_map(|size| kinds.map(|kind| (*size, kind)));
    all.flat_map(|(size, kind)| [false, true].map(|compress| Case::new(size, kind, compress)))
        .collect()
}

#[test]
fn each_tier_holds_its_share_of_each_tensor_within_one_percent() {
    for case in cases() {
        let (_, footprint) = case.footprint();
        let shares = &case.policy.shares;
        let [weights, cache, hidden] = case.tensors();
        for tier in Tier::ALL {
            let w = [
                shares.weights.gpu,
                shares.weights.cpu(),
                shares.weights.disk(),
            ][tier as usize];
            let near = |bytes: u64, share: f64, tensor: f64, what: &str| {
                let off = (bytes as f64 - share * tensor).abs() / tensor;
                assert!(
                    off <= 0.01,
                    "{} {} {what}: {off}",
                    case.model.name,
                    tier.name()
                );
            };
            near(
                footprint.weights_bytes(tier) - case.smalls(tier),
                w,
                weights,
                "weights",
            );
            near(
                footprint.cache_bytes(tier),
                shares.cache[tier],
                cache,
                "cache",
            );
            near(
                footprint.activations_bytes(tier),
                shares.activations[tier],
                hidden,
                "activations",
            );
        }
    }
}

#[test]
fn every_layer_realises_its_share_within_one_point() {
    for case in cases() {
        let (placement, _) = case.footprint();
        for stage in 1..=case.model.layers {
            let bytes = WeightHome::ALL.map(|home| placement.stage_bytes(stage, home) as f64);
            let total: f64 = bytes.iter().sum();
            for (share, part) in case.policy.shares.weights.as_array().iter().zip(bytes) {
                assert!(
                    (part / total - share).abs() < 0.01,
                    "{} layer {stage}",
                    case.model.name
                );
            }
        }
    }
}

#[test]
fn buffers_stay_within_three_layers_or_256_mib() {
    for case in cases().into_iter().filter(|c| c.device == DeviceKind::Cpu) {
        let (_, footprint) = case.footprint();
        let layer = case.model.weights_bytes(false) / case.model.layers as u64;
        let most = (256 * MIB).max(3 * layer);
        let buffers = footprint.buffers_bytes(Tier::Cpu);
        assert!(
            buffers <= most,
            "{}: {} of {} MiB",
            case.model.name,
            buffers / MIB,
            most / MIB
        );
    }
}
