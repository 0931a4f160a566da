//! From shares to what can be built: weights split at 64-row panels, cache and activations by
//! sequence. Deterministic, so that planner and engine see the same bytes.

use crate::model::{Matrix, MatrixKind, ModelSpec};
use crate::policy::{Policy, Shares, WeightShares};
use crate::tier::{PerTier, Tier};

/// Where a row of a weight matrix lives and who multiplies it, in the order rows are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightHome {
    Gpu,
    CpuShip,
    CpuCompute,
    DiskShip,
    DiskCompute,
}

impl WeightHome {
    pub const ALL: [WeightHome; 5] = [
        WeightHome::Gpu,
        WeightHome::CpuShip,
        WeightHome::CpuCompute,
        WeightHome::DiskShip,
        WeightHome::DiskCompute,
    ];

    /// Those in memory, of a GPU or the CPU.
    pub const RESIDENT: [WeightHome; 3] =
        [WeightHome::Gpu, WeightHome::CpuShip, WeightHome::CpuCompute];

    pub fn tier(self) -> Tier {
        [Tier::Gpu, Tier::Cpu, Tier::Cpu, Tier::Disk, Tier::Disk][self as usize]
    }
}

/// Panels of one matrix per home; consecutive row ranges in `WeightHome::ALL` order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MatrixSplit {
    pub panels: [usize; 5],
}

impl MatrixSplit {
    /// First panel of a home's range.
    pub fn first(&self, home: WeightHome) -> usize {
        self.panels[..home as usize].iter().sum()
    }

    pub fn count(&self, home: WeightHome) -> usize {
        self.panels[home as usize]
    }
}

/// The realised placement of one model under one policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    pub matrices: Vec<Matrix>,
    pub splits: Vec<MatrixSplit>,
    /// Bytes of one panel of each matrix in the store.
    pub panel_bytes: Vec<u64>,
    /// Home tier of each slot's cache and hidden state: slot = batch · gpu_batch_size + place.
    pub cache_tiers: Vec<Tier>,
    pub hidden_tiers: Vec<Tier>,
    /// Bytes of the small tensors (on the compute device, whatever the shares).
    pub smalls_bytes: u64,
}

impl Placement {
    /// Realises the policy's shares for this model.
    pub fn new(model: &ModelSpec, policy: &Policy) -> Self {
        let matrices = model.matrices();
        let format = |m: &Matrix| m.format(model.dtype, policy.compress_weight);
        let panel_bytes: Vec<u64> = matrices
            .iter()
            .map(|m| format(m).panel_bytes(m.inputs))
            .collect();
        let splits = split_weights(&matrices, &panel_bytes, &policy.shares.weights);
        let sizes = (policy.gpu_batch_size, policy.num_gpu_batches);
        Placement {
            splits,
            panel_bytes,
            cache_tiers: split_slots(&policy.shares.cache, sizes),
            hidden_tiers: split_slots(&policy.shares.activations, sizes),
            smalls_bytes: model.smalls().iter().map(|s| s.bytes()).sum(),
            matrices,
        }
    }

    /// The matrix that tokens are looked up in: the embedding, or the head where they are one.
    pub fn table(&self) -> usize {
        let own = self
            .matrices
            .iter()
            .position(|m| m.kind == MatrixKind::Embedding);
        own.unwrap_or(self.matrices.len() - 1)
    }

    /// Bytes of all weights at one home (small tensors not counted).
    pub fn weight_bytes(&self, home: WeightHome) -> u64 {
        (0..self.matrices.len())
            .map(|i| self.part_bytes(i, home))
            .sum()
    }

    /// Bytes of one matrix at one home.
    pub fn part_bytes(&self, index: usize, home: WeightHome) -> u64 {
        self.splits[index].count(home) as u64 * self.panel_bytes[index]
    }

    /// Bytes of one stage's weights at one home.
    pub fn stage_bytes(&self, stage: usize, home: WeightHome) -> u64 {
        (0..self.matrices.len())
            .filter(|&i| self.matrices[i].stage == stage)
            .map(|i| self.part_bytes(i, home))
            .sum()
    }

    /// The shares as realised: weights by bytes, cache and activations by sequences.
    pub fn realised(&self) -> Shares {
        let bytes = WeightHome::ALL.map(|home| self.weight_bytes(home) as f64);
        let total: f64 = bytes.iter().sum::<f64>().max(1.0);
        let of = |tiers: &[Tier], tier| {
            tiers.iter().filter(|&&t| t == tier).count() as f64 / tiers.len().max(1) as f64
        };
        let slots = |tiers: &[Tier]| PerTier {
            gpu: of(tiers, Tier::Gpu),
            cpu: of(tiers, Tier::Cpu),
            disk: of(tiers, Tier::Disk),
        };
        Shares {
            weights: WeightShares::from_array(bytes.map(|b| b / total)),
            cache: slots(&self.cache_tiers),
            activations: slots(&self.hidden_tiers),
        }
    }
}

/// Error diffusion over panels: within a stage the matrices with the largest panels go first, so that
/// the smaller ones even the remainder out and every layer's share is within one small panel.
fn split_weights(
    matrices: &[Matrix],
    panel_bytes: &[u64],
    shares: &WeightShares,
) -> Vec<MatrixSplit> {
    let mut order: Vec<usize> = (0..matrices.len()).collect();
    order.sort_by_key(|&i| (matrices[i].stage, std::cmp::Reverse(panel_bytes[i]), i));
    let mut splits = vec![MatrixSplit::default(); matrices.len()];
    let mut owed = [0.0f64; 5];
    for i in order {
        let panels = matrices[i].panels();
        let share = shares.as_array();
        for (debt, part) in owed.iter_mut().zip(share) {
            *debt += part * panels as f64 * panel_bytes[i] as f64;
        }
        splits[i] = MatrixSplit {
            panels: nearest_counts(owed, share, panel_bytes[i] as f64, panels),
        };
        for (debt, count) in owed.iter_mut().zip(splits[i].panels) {
            *debt -= count as f64 * panel_bytes[i] as f64;
        }
    }
    splits
}

/// Whole panels per home, summing to `panels`, nearest to the bytes owed. A home with share 0 gets none.
fn nearest_counts(
    owed_bytes: [f64; 5],
    share: [f64; 5],
    panel_bytes: f64,
    panels: usize,
) -> [usize; 5] {
    let want = owed_bytes.map(|bytes| (bytes / panel_bytes).max(0.0));
    let mut counts = [0usize; 5];
    for home in 0..5 {
        counts[home] = if share[home] > 0.0 {
            want[home].floor() as usize
        } else {
            0
        };
    }
    let lag = |counts: &[usize; 5], home: usize| want[home] - counts[home] as f64;
    let with_share: Vec<usize> = (0..5).filter(|&h| share[h] > 0.0).collect();
    while counts.iter().sum::<usize>() < panels {
        let behind = |a: &&usize, b: &&usize| lag(&counts, **a).total_cmp(&lag(&counts, **b));
        let most = *with_share.iter().max_by(behind).unwrap_or(&4);
        counts[most] += 1;
    }
    while counts.iter().sum::<usize>() > panels {
        let ahead = |a: &usize, b: &usize| lag(&counts, *a).total_cmp(&lag(&counts, *b));
        let most = (0..5)
            .filter(|&h| counts[h] > 0)
            .min_by(ahead)
            .expect("a positive sum has a positive part");
        counts[most] -= 1;
    }
    counts
}

/// Home tiers of all slots, the share kept within each batch as nearly as whole sequences allow.
fn split_slots(share: &PerTier<f64>, (per_batch, batches): (usize, usize)) -> Vec<Tier> {
    let mut used = Tier::ALL.into_iter().filter(|&tier| share[tier] > 0.0);
    if let (Some(only), None) = (used.next(), used.next()) {
        return vec![only; per_batch * batches];
    }
    let mut placed = PerTier::<usize>::default();
    let mut tiers = Vec::with_capacity(per_batch * batches);
    for slot in 0..per_batch * batches {
        let owed = |tier: Tier| share[tier] * (slot + 1) as f64 - placed[tier] as f64;
        let candidates = Tier::ALL.into_iter().filter(|&t| share[t] > 0.0);
        let tier = candidates
            .max_by(|&a, &b| owed(a).total_cmp(&owed(b)).then(b.cmp(&a)))
            .unwrap_or(Tier::Cpu);
        placed[tier] += 1;
        tiers.push(tier);
    }
    tiers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::named_size;

    #[test]
    fn every_layer_is_within_one_point_of_its_share() {
        for size in [
            "opt-125m", "opt-350m", "opt-1.3b", "opt-6.7b", "opt-13b", "opt-175b",
        ] {
            let model = named_size(size).expect("a known size");
            let matrices = model.matrices();
            for compress in [false, true] {
                let bytes: Vec<u64> = matrices
                    .iter()
                    .map(|m| m.format(model.dtype, compress).panel_bytes(m.inputs))
                    .collect();
                for share in [
                    [0.1, 0.2, 0.3, 0.15, 0.25],
                    [0.0, 0.0, 0.37, 0.0, 0.63],
                    [0.005, 0.2, 0.0, 0.795, 0.0],
                ] {
                    let splits = split_weights(&matrices, &bytes, &WeightShares::from_array(share));
                    check_stages(&model, &matrices, &splits, (&bytes, share));
                }
            }
        }
    }

    fn check_stages(
        model: &ModelSpec,
        matrices: &[Matrix],
        splits: &[MatrixSplit],
        (bytes, share): (&[u64], [f64; 5]),
    ) {
        for stage in 1..=model.head_stage() {
            let mine: Vec<usize> = (0..matrices.len())
                .filter(|&i| matrices[i].stage == stage)
                .collect();
            let total: u64 = mine
                .iter()
                .map(|&i| matrices[i].panels() as u64 * bytes[i])
                .sum();
            for (home, &share) in share.iter().enumerate() {
                let part: u64 = mine
                    .iter()
                    .map(|&i| splits[i].panels[home] as u64 * bytes[i])
                    .sum();
                let error = part as f64 / total as f64 - share;
                assert!(
                    error.abs() < 0.01,
                    "{} stage {stage} home {home}: {error}",
                    model.hidden
                );
                assert!(share > 0.0 || part == 0);
            }
        }
        for (split, matrix) in splits.iter().zip(matrices) {
            assert_eq!(split.panels.iter().sum::<usize>(), matrix.panels());
        }
    }

    #[test]
    fn slots_follow_the_share_in_every_batch() {
        let share = PerTier {
            gpu: 0.25,
            cpu: 0.5,
            disk: 0.25,
        };
        let tiers = split_slots(&share, (8, 3));
        for batch in tiers.chunks(8) {
            assert_eq!(batch.iter().filter(|&&t| t == Tier::Gpu).count(), 2);
            assert_eq!(batch.iter().filter(|&&t| t == Tier::Disk).count(), 2);
        }
    }
}
