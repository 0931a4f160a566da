//! Random policies over both machines, and what kind of policy each is.

use crate::common::planning::random;
use crate::common::{t4, two_cores};
use loadmaster::dtype::Dtype;
use loadmaster::model::families::named_size;
use loadmaster::placement::Placement;
use loadmaster::policy::{Compute, DeviceKind, Policy, Shares, WeightShares};
use loadmaster::profile::HardwareProfile;
use loadmaster::tier::{PerTier, Tier};
use loadmaster::workload::Workload;
use std::fmt;

pub struct Drawn {
    pub size: &'static str,
    pub device: DeviceKind,
    pub profile: HardwareProfile,
    pub policy: Policy,
    pub workload: Workload,
    lengths: (u32, u32),
}

/// What decides how exact the closed form can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Class {
    /// The CPU multiplies some rows beside a GPU, in step with it.
    RowsBeside,
    /// Batches of a block differ in size or in what they have on which tier.
    UnlikeBatches,
    /// Hidden states travel while weights do, overlapped.
    HiddenBesideWeights,
    Plain,
}

impl fmt::Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (p, lines) = (&self.policy, self.workload.prompts());
        let (prompt, generated) = self.lengths;
        write!(
            f,
            "{} {:?} {}x{} double {}, {lines} lines {prompt} + {generated}, overlap {}, 4-bit {} {}, by CPU {}, {:?}",
            self.size,
            self.device,
            p.gpu_batch_size,
            p.num_gpu_batches,
            p.double_buffer,
            p.overlap,
            p.compress_weight,
            p.compress_cache,
            p.cpu_cache_compute,
            p.shares
        )
    }
}

impl Drawn {
    pub fn class(&self) -> Class {
        let shares = &self.policy.shares;
        let compute = if self.device.has_gpu() {
            Tier::Gpu
        } else {
            Tier::Cpu
        };
        let w = shares.weights.as_array();
        let streamed = if self.device.has_gpu() {
            w[1] + w[3]
        } else {
            w[3] + w[4]
        };
        if self.device.has_gpu() && shares.weights.by_cpu() > 0.0 {
            return Class::RowsBeside;
        }
        if !self.batches_are_alike() {
            return Class::UnlikeBatches;
        }
        let hidden_travels = shares.activations[compute] < 1.0;
        match self.policy.overlap && hidden_travels && streamed > 0.0 {
            true => Class::HiddenBesideWeights,
            false => Class::Plain,
        }
    }

    fn batches_are_alike(&self) -> bool {
        let model = named_size(self.size).expect("a known size");
        let placement = Placement::new(&model, &self.policy);
        let size = self.policy.gpu_batch_size;
        let count = |batch: &[Tier]| Tier::ALL.map(|t| batch.iter().filter(|&&b| b == t).count());
        let alike = |tiers: &[Tier]| {
            tiers
                .chunks(size)
                .all(|b| count(b) == count(&tiers[..size]))
        };
        let full = self.workload.prompts().is_multiple_of(self.policy.slots());
        let slots = alike(&placement.cache_tiers) && alike(&placement.hidden_tiers);
        self.policy.num_gpu_batches == 1 || (full && slots)
    }
}

pub fn drawn(seed: u64, count: usize) -> Vec<Drawn> {
    let mut next = random(seed);
    (0..count).map(|_| one(&mut next)).collect()
}

pub fn pick<T: Copy>(next: &mut impl FnMut() -> f64, of: &[T]) -> T {
    of[(next() * of.len() as f64) as usize]
}

/// Up to three homes, in tenths or, `of` being a batch, in whole sequences of each batch.
fn shares(next: &mut impl FnMut() -> f64, allowed: &[bool], of: usize) -> Vec<f64> {
    let homes: Vec<usize> = (0..allowed.len()).filter(|&i| allowed[i]).collect();
    let mut parts = vec![0usize; allowed.len()];
    let kinds = 1 + (next() * 3.0) as usize;
    let chosen: Vec<usize> = (0..kinds).map(|_| pick(next, &homes)).collect();
    for _ in 0..of {
        parts[pick(next, &chosen)] += 1;
    }
    parts.iter().map(|&p| p as f64 / of as f64).collect()
}

fn tiers(shares: &[f64]) -> PerTier<f64> {
    PerTier {
        gpu: shares[0],
        cpu: shares[1],
        disk: shares[2],
    }
}

fn one(next: &mut impl FnMut() -> f64) -> Drawn {
    let gpu = next() < 0.5;
    let gpu_batch_size = pick(next, &[1, 2, 4, 8, 16, 32, 64]);
    let counts: &[usize] = if gpu {
        &[1, 2, 3, 4, 8]
    } else {
        &[1, 1, 1, 2, 4]
    };
    let num_gpu_batches = pick(next, counts);
    let mut policy = drawn_policy(next, gpu, (gpu_batch_size, num_gpu_batches));
    let lengths = (
        pick(next, &[16, 32, 64, 100, 128, 256, 512, 777, 1024]),
        pick(next, &[1, 2, 4, 8, 16, 32, 64]),
    );
    // About half of those that may have one.
    policy.double_buffer = gpu && num_gpu_batches > 1 && [1, 4, 16].contains(&lengths.1);
    let blocks = pick(next, &[0.7, 1.0, 1.0, 1.0, 2.0, 2.5, 3.0]);
    let lines = (policy.slots() as f64 * blocks).ceil() as usize;
    let mut profile = if gpu { t4() } else { two_cores() };
    profile.cpu.handover_s = pick(next, &[0.0, 2e-5]);
    Drawn {
        size: pick(
            next,
            &[
                "opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b",
            ],
        ),
        device: if gpu {
            DeviceKind::Cuda
        } else {
            DeviceKind::Cpu
        },
        profile,
        policy,
        workload: Workload::uniform(lines, lengths.0, lengths.1),
        lengths,
    }
}

/// Everything about a policy but its batches; fp16 caches, no double buffer.
pub fn drawn_policy(
    next: &mut impl FnMut() -> f64,
    gpu: bool,
    (gpu_batch_size, num_gpu_batches): (usize, usize),
) -> Policy {
    Policy {
        shares: drawn_shares(next, gpu, gpu_batch_size),
        gpu_batch_size,
        num_gpu_batches,
        pin_weight: next() < 0.7,
        compress_weight: next() < 0.3,
        compress_cache: next() < 0.2,
        cpu_cache_compute: gpu && next() < 0.5,
        double_buffer: false,
        overlap: next() < 0.7,
        compute: Compute::Exact,
        kv: Dtype::F16,
        threads: if gpu { 16 } else { 2 },
    }
}

fn drawn_shares(next: &mut impl FnMut() -> f64, gpu: bool, batch: usize) -> Shares {
    let beside = gpu && next() < 0.2;
    let weights = match gpu {
        true => shares(next, &[true, true, beside, true, false], 10),
        false => shares(next, &[false, false, true, false, true], 10),
    };
    // Mostly the same in every batch.
    let of = if next() < 0.7 { batch } else { 10 };
    Shares {
        weights: WeightShares {
            gpu: weights[0],
            cpu_ship: weights[1],
            cpu_compute: weights[2],
            disk_ship: weights[3],
            disk_compute: weights[4],
        },
        cache: tiers(&shares(next, &[gpu, true, true], of)),
        activations: tiers(&shares(next, &[gpu, true, true], of)),
    }
}
