//! The closed-form prediction: the table of terms read at given shares, and the exact footprint, as
//! the same figures that a run reports. No search (planner/), no schedule (engine/).

use crate::cost::affine::{ShareVector, share_vector};
use crate::cost::figures::{Figures, TierFigures};
use crate::cost::footprint::{BlockShape, Footprint, FootprintInput, HostBytes};
use crate::cost::rates::Rates;
use crate::cost::steps::Moments;
use crate::cost::terms::{Bound, Part, Segment, TermInput, Terms};
use crate::model::ModelSpec;
use crate::placement::Placement;
use crate::policy::{Policy, Shares};
use crate::tier::{Lane, PerLane, PerTier, Phase, Resource, Tier};
use crate::workload::Workload;
use std::collections::BTreeMap;

/// What an estimate is made from.
#[derive(Clone, Copy)]
pub struct EstimateInput<'a> {
    pub model: &'a ModelSpec,
    pub workload: &'a Workload,
    pub rates: &'a Rates,
    pub policy: &'a Policy,
    pub host: HostBytes,
    /// Bytes that the run may take of each tier; 0 where there is no such tier.
    pub budget: PerTier<u64>,
}

/// A policy's figures at its realised shares.
pub fn estimate(input: &EstimateInput) -> Figures {
    let placement = Placement::new(input.model, input.policy);
    let block = BlockShape::new(input.workload, input.policy, &placement);
    let footprint = Footprint::new(&FootprintInput {
        model: input.model,
        policy: input.policy,
        placement: &placement,
        block: &block,
        device: input.rates.device,
        host: input.host,
    });
    let mut figures = estimate_parts(input, (&placement.realised(), |_| true));
    figures.tiers = tier_figures(&footprint, &input.budget);
    figures
}

/// Of a policy's figures those of some parts of its passes; tiers are left empty.
pub fn estimate_parts(
    input: &EstimateInput,
    (realised, keep): (&Shares, fn(Part) -> bool),
) -> Figures {
    let moments = Moments::new(input.workload);
    let shares = share_vector(realised);
    let mut terms = Terms::new(&TermInput {
        model: input.model,
        moments: &moments,
        rates: input.rates,
        policy: input.policy,
        cpu_side: realised.weights.by_cpu() > 0.0,
        at: Some(shares),
    });
    terms.segments.retain(|segment| keep(segment.part));
    figures(&terms, &moments, input.rates, &shares)
}

/// Seconds, lanes and binding of a table at given shares; tiers are left empty.
pub fn figures(terms: &Terms, moments: &Moments, rates: &Rates, shares: &ShareVector) -> Figures {
    let mut figures = Figures {
        prompt_tokens: moments.prompt_tokens,
        generated_tokens: moments.generated_tokens,
        ..Figures::default()
    };
    let mut bound = [BTreeMap::new(), BTreeMap::new()];
    let mut bytes = PerLane::<f64>::default();
    for segment in &terms.segments {
        let (seconds, by) = segment_time(segment, shares);
        let total = segment.times * seconds;
        let prefill = segment.phase == Phase::Prefill;
        *bound[usize::from(!prefill)].entry(by).or_insert(0.0) += total;
        let phase = if prefill {
            &mut figures.prefill_s
        } else {
            &mut figures.decode_s
        };
        *phase += total;
        let own = segment.lanes_at(shares);
        let busy = busy_lanes(segment, &own, rates, (terms.overlap, seconds));
        for lane in Lane::ALL {
            let entry = &mut figures.lanes[lane];
            let phase = if prefill {
                &mut entry.prefill_s
            } else {
                &mut entry.decode_s
            };
            *phase += segment.times * busy[lane];
            entry.work_s += segment.times * own[lane];
            bytes[lane] += segment.times * segment.bytes[lane].at(shares);
        }
    }
    for lane in Lane::ALL {
        figures.lanes[lane].bytes = bytes[lane].round() as u64;
    }
    let most = |by: &BTreeMap<&'static str, f64>| {
        let most = by.iter().max_by(|a, b| a.1.total_cmp(b.1));
        most.map_or(String::new(), |(name, _)| (*name).to_owned())
    };
    figures.binding.prefill = most(&bound[0]);
    figures.binding.decode = most(&bound[1]);
    figures.finish(moments.first_tokens);
    figures
}

/// A table's seconds at given shares: what the linear program minimises.
pub fn total_s(terms: &Terms, shares: &ShareVector) -> f64 {
    let segments = terms.segments.iter();
    segments.map(|s| s.times * segment_time(s, shares).0).sum()
}

/// The largest row, and the lane or resource to name for it: of equal rows the first, which is a lane's
/// own before those of pairs and chains.
fn segment_time(segment: &Segment, shares: &ShareVector) -> (f64, &'static str) {
    let timed = segment.rows.iter().map(|r| (r.seconds.at(shares), r.bound));
    let larger = |best: (f64, Bound), row: (f64, Bound)| {
        if row.0 > best.0 * (1.0 + 1e-9) {
            row
        } else {
            best
        }
    };
    let (seconds, bound) = timed.reduce(larger).unwrap_or((0.0, Bound::Sum));
    let name = match bound {
        Bound::Pair(Lane::DiskToCpu, Lane::CpuToDisk)
        | Bound::Pair(Lane::CpuToDisk, Lane::DiskToCpu) => Resource::DiskDevice.name(),
        Bound::Lane(lane) | Bound::Pair(_, lane) => lane.name(),
        Bound::Cycle(_, _, lane) => lane.name(),
        Bound::Stall(lane) | Bound::Queued(lane) => lane.name(),
        Bound::Attending | Bound::Multiplying | Bound::AttendingAndMultiplying => {
            Lane::CpuCompute.name()
        }
        Bound::Resource(resource) => resource.name(),
        Bound::Sum | Bound::Serial(_) => {
            let own_s = segment.lanes_at(shares);
            Lane::with_most(|lane| own_s[lane]).name()
        }
    };
    (seconds.max(0.0), name)
}

impl Segment {
    /// Seconds of each lane's own work.
    pub fn lanes_at(&self, shares: &ShareVector) -> PerLane<f64> {
        let mut own = PerLane::default();
        for lane in Lane::ALL {
            own[lane] = self.lanes[lane].at(shares);
        }
        own
    }
}

/// In-flight seconds: a lane's own work, longer by what it loses while others run beside it.
fn busy_lanes(
    segment: &Segment,
    own: &PerLane<f64>,
    rates: &Rates,
    (overlap, most_s): (bool, f64),
) -> PerLane<f64> {
    let mut busy = *own;
    if !overlap {
        return busy;
    }
    let load = |lane: Lane| (lane, segment.load[lane]);
    for lane in Lane::ALL {
        for other in Lane::ALL.into_iter().filter(|&o| o != lane) {
            let keep = rates.keep(load(lane), &[load(other)]);
            let others = rates.keep(load(other), &[load(lane)]);
            let together_s = (own[lane] / keep).min(own[other] / others);
            busy[lane] += together_s * (1.0 - keep);
        }
        busy[lane] = busy[lane].min(most_s.max(own[lane]));
    }
    busy
}

/// A footprint in the figures' shape.
pub fn tier_figures(footprint: &Footprint, budget: &PerTier<u64>) -> PerTier<TierFigures> {
    let mut tiers = PerTier::default();
    for tier in Tier::ALL {
        let weights = if tier == Tier::Disk {
            footprint.store_bytes + footprint.spill.rows
        } else {
            footprint.weights_bytes(tier)
        };
        let peak = footprint.total(tier);
        tiers[tier] = TierFigures {
            total_bytes: budget[tier],
            others_bytes: 0,
            free_bytes: budget[tier].saturating_sub(peak),
            weights_bytes: weights,
            cache_bytes: footprint.cache_bytes(tier),
            activations_bytes: footprint.activations_bytes(tier),
            buffers_bytes: footprint.buffers_bytes(tier),
            process_bytes: footprint.process[tier],
            unaccounted_bytes: 0,
            peak_bytes: peak,
        };
    }
    tiers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::model::Activation;
    use crate::policy::{Compute, DeviceKind};
    use crate::profile::{HardwareProfile, compiled_in};

    fn small_model() -> ModelSpec {
        ModelSpec {
            name: "small".into(),
            layers: 6,
            hidden: 1024,
            heads: 16,
            ffn: 4096,
            vocab: 4096,
            positions: 2048,
            embed_width: 512,
            pre_norm: true,
            final_norm: true,
            bias: true,
            norm_affine: true,
            activation: Activation::Relu,
            tied_head: true,
            dtype: Dtype::F16,
            pad_id: 1,
            bos_id: 2,
            eos_ids: vec![2],
        }
    }

    fn priced(overlap: bool, percent: [f64; 6], gen_tokens: u32) -> Figures {
        let text = compiled_in("t4-gcp").unwrap();
        let profile = HardwareProfile::from_toml(text).unwrap();
        let policy = Policy {
            shares: Shares::from_percent(percent, 0.25).unwrap(),
            gpu_batch_size: 4,
            num_gpu_batches: 2,
            pin_weight: true,
            compress_weight: false,
            compress_cache: false,
            cpu_cache_compute: true,
            double_buffer: false,
            overlap,
            compute: Compute::default(),
            kv: Dtype::F16,
            threads: 16,
        };
        estimate(&EstimateInput {
            model: &small_model(),
            workload: &Workload::uniform(20, 100, gen_tokens),
            rates: &Rates::new(&profile, DeviceKind::Cuda, 16).unwrap(),
            policy: &policy,
            host: HostBytes::default(),
            budget: PerTier::default(),
        })
    }

    #[test]
    fn without_overlap_tasks_add_up_and_with_it_the_longest_lane_rules() {
        let percent = [20.0, 40.0, 50.0, 25.0, 25.0, 50.0];
        let (together, apart) = (priced(true, percent, 9), priced(false, percent, 9));
        let sum: f64 = Lane::ALL.iter().map(|&l| apart.lanes[l].busy_s()).sum();
        // What one task sets going runs together: the CPU's products beside the GPU's, weights on both ways.
        assert!(apart.total_s < sum && apart.total_s > 0.7 * sum);
        assert!(together.total_s < apart.total_s);
        for lane in Lane::ALL {
            assert!(together.lanes[lane].work_s <= together.total_s * (1.0 + 1e-9));
            assert!(together.lanes[lane].busy_s() >= together.lanes[lane].work_s * (1.0 - 1e-9));
            assert!(apart.lanes[lane].work_s > 0.0, "{} has work", lane.name());
        }
        assert_eq!(together.prompt_tokens, 2000);
        assert_eq!(together.generated_tokens, 180);
        assert!(!together.binding.prefill.is_empty() && !together.binding.decode.is_empty());
    }

    #[test]
    fn weights_cross_each_lane_once_per_pass() {
        let all_on_disk = priced(true, [0.0, 0.0, 100.0, 0.0, 100.0, 0.0], 5);
        let model = small_model();
        let matrices =
            model.weights_bytes(false) - model.smalls().iter().map(|s| s.bytes()).sum::<u64>();
        // Three blocks of five passes; the token table's panels come on top.
        let passes = 3 * 5 * matrices;
        let read = all_on_disk.lanes.disk_to_cpu.bytes;
        assert!(
            read >= passes && read <= passes + passes / 10,
            "{read} {passes}"
        );
        let nothing = priced(true, [100.0, 0.0, 100.0, 0.0, 100.0, 0.0], 5);
        assert_eq!(nothing.lanes.disk_to_cpu.bytes, 0);
        assert_eq!(nothing.lanes.cpu_to_gpu.bytes, 0);
    }

    #[test]
    fn reading_only_has_no_decode() {
        let reading = priced(true, [100.0, 0.0, 100.0, 0.0, 100.0, 0.0], 0);
        assert_eq!(reading.decode_s, 0.0);
        assert!(reading.prefill_s > 0.0 && reading.throughput_tok_s == 0.0);
    }
}
