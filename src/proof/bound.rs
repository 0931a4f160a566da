//! Which lane binds a planned job's phases, which burst tells how fast it is at the moment, and how much of the phase
//! goes by that. Nothing runs here.

use crate::cost::block::even_chunks;
use crate::cost::figures::{Figures, LaneFigures};
use crate::cost::footprint::{HIDDEN_VALUE_BYTES, STREAM_CHUNK_BYTES};
use crate::cost::rates::Rates;
use crate::dtype::Dtype;
use crate::model::{Matrix, MatrixKind, ModelSpec};
use crate::plan::Plan;
use crate::policy::Policy;
use crate::probe::{Burst, CALL_BYTES};
use crate::tier::{Lane, PerLane, Phase, Tier};
use crate::units::{MIB, PAGE_BYTES, round_up};

/// The part of a phase's busy time from which a lane's speed counts.
const COUNTS: f64 = 0.1;

/// Each of a layer's matrices is read in chunks of its own.
const MATRICES_OF_LAYER: u64 = 4;

/// What a batch's sequences have on disk in a layer.
struct Spilled {
    sequences: u64,
    each_bytes: u64,
}

impl Spilled {
    fn bytes(&self) -> u64 {
        self.sequences * self.each_bytes
    }
}

/// Reads like those that have most bytes of a layer: chunks of so many bytes of the weights, or a request for each
/// sequence.
fn most_of((weights_bytes, chunk_bytes): (u64, u64), spilled: [Spilled; 2]) -> Burst {
    let [cache, hidden] = spilled;
    let most = match cache.bytes() > hidden.bytes() {
        true => cache,
        false => hidden,
    };
    if weights_bytes >= most.bytes() {
        return Burst::Reads {
            spilled: false,
            request_bytes: round_up(chunk_bytes, PAGE_BYTES).clamp(MIB, STREAM_CHUNK_BYTES),
            requests: 1,
        };
    }
    let request_bytes = most.each_bytes.min(CALL_BYTES);
    Burst::Reads {
        spilled: true,
        request_bytes,
        requests: most.sequences.clamp(1, CALL_BYTES / request_bytes),
    }
}

/// What bursts are chosen by.
#[derive(Clone, Copy)]
pub struct Bound<'a> {
    pub model: &'a ModelSpec,
    pub plan: &'a Plan,
    pub policy: &'a Policy,
    pub rates: &'a Rates,
}

impl Bound<'_> {
    /// Batches that meet a layer's weights one after the other while most of them are in a cache.
    fn batches_near(&self) -> usize {
        match self.rates.kept(Tier::Cpu, self.passed_bytes()) > 0.5 {
            true => self.policy.num_gpu_batches,
            false => 1,
        }
    }

    /// What passes through the cache from one batch's decode to the next one's: a layer's weights, and the keys
    /// and values of a batch.
    fn passed_bytes(&self) -> f64 {
        let w = &self.plan.workload;
        let tokens = (w.prompt_tokens + w.gen_tokens) / w.prompts.max(1);
        let record = self.model.kv_record_bytes(self.policy.kv_format());
        let kv_bytes = self.policy.gpu_batch_size as u64 * tokens * record;
        (self.model.layer_bytes(self.policy.compress_weight) + kv_bytes) as f64
    }

    /// Sequences of a full batch.
    fn slots(&self) -> u64 {
        let prompts = self.plan.workload.prompts.max(1);
        (self.policy.gpu_batch_size as u64).min(prompts)
    }

    /// Rows of a phase's products in one pass over the weights.
    fn rows(&self, phase: Phase) -> u64 {
        let w = &self.plan.workload;
        let prompt = (w.prompt_tokens / w.prompts.max(1)).max(1);
        match phase {
            Phase::Prefill => even_chunks(self.slots() * prompt),
            Phase::Decode => self.slots(),
        }
    }

    /// Reads like those of a phase.
    fn reads(&self, phase: Phase) -> Burst {
        let Some(placement) = &self.plan.placement else {
            return Burst::Read;
        };
        let w = &self.plan.workload;
        let each = |tokens: u64| tokens / w.prompts.max(1);
        let (cached, rows) = match phase {
            Phase::Prefill => (0, each(w.prompt_tokens)),
            Phase::Decode => (each(w.prompt_tokens + w.gen_tokens / 2), 1),
        };
        let spilled = |share: f64, bytes: u64| Spilled {
            sequences: (self.slots() as f64 * share).round() as u64,
            each_bytes: round_up(bytes, PAGE_BYTES),
        };
        let record = self.model.kv_record_bytes(self.policy.kv_format());
        let row_bytes = self.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let shares = &placement.weights;
        let streamed = shares.disk_ship + shares.disk_compute;
        let layer_bytes = self.model.layer_bytes(self.policy.compress_weight);
        // A batch's part of what is read once for all of them.
        let weights = streamed * layer_bytes as f64 / self.policy.num_gpu_batches as f64;
        let chunk_bytes = (streamed * layer_bytes as f64) as u64 / MATRICES_OF_LAYER;
        let cache = spilled(placement.cache.disk, cached * record);
        let hidden = spilled(placement.activations.disk, rows * row_bytes);
        most_of((weights as u64, chunk_bytes), [cache, hidden])
    }

    /// About what a phase's products take: decoding full batches, prompts without the head.
    fn products_s(&self, phase: Phase) -> f64 {
        let w = &self.plan.workload;
        let (prompts, rows) = (w.prompts.max(1), self.rows(phase));
        let (passes, batches) = match phase {
            Phase::Prefill => (w.prompt_tokens as f64 / rows as f64, 1),
            Phase::Decode => {
                let steps = (w.gen_tokens as f64 / prompts as f64 - 1.0).max(0.0);
                let passes = prompts.div_ceil(rows) as f64 * steps;
                (passes, self.policy.num_gpu_batches)
            }
        };
        let one_s = |matrix: &Matrix| {
            let format = matrix.format(self.model.dtype, self.policy.compress_weight);
            let stored = (format, self.policy.arithmetic(format));
            let met = (rows as f64, self.passed_bytes());
            let part = self.rates.met_part(Tier::Cpu, stored, met, batches as f64);
            let (inputs, outputs) = (matrix.inputs, matrix.rows);
            part * self
                .rates
                .gemm_s(Tier::Cpu, stored, rows as usize, inputs, outputs)
        };
        let matrices = self.model.matrices();
        let of_phase = matrices.iter().filter(|m| match phase {
            Phase::Prefill => (1..=self.model.layers).contains(&m.stage),
            Phase::Decode => m.kind != MatrixKind::Embedding,
        });
        passes * of_phase.map(one_s).sum::<f64>()
    }
}

/// Which burst tells how fast a lane is in a phase.
pub fn burst_of(lane: Lane, phase: Phase, bound: Bound) -> Burst {
    let Bound { model, policy, .. } = bound;
    match lane {
        Lane::DiskToCpu => bound.reads(phase),
        Lane::CpuToDisk => Burst::Write,
        _ => {
            let times = match phase {
                Phase::Prefill => 1,
                Phase::Decode => bound.batches_near(),
            };
            let format = if policy.compress_weight {
                Dtype::Q4
            } else {
                model.dtype
            };
            Burst::Product {
                format,
                arithmetic: policy.arithmetic(format),
                rows: nearest_power_of_two(bound.rows(phase)),
                times,
            }
        }
    }
}

/// A row count of the probe's grid: 1, 2, 4 … 512.
fn nearest_power_of_two(rows: u64) -> usize {
    let exponent = (rows.clamp(1, 512) as f64).log2().round();
    1 << exponent as u32
}

/// The part of a phase that takes as much longer as a lane's burst does: of computing what products take, for that
/// is what its burst does. In what is left something else is done or waited for.
pub fn burst_weights(figures: &Figures, phase: Phase, bound: Bound) -> PerLane<f64> {
    let mut weights = lane_weights(figures, phase, bound.policy.overlap);
    let products = bound.products_s(phase) / phase_s(figures, phase).max(1e-12);
    weights.cpu_compute = weights.cpu_compute.min(products);
    weights
}

fn phase_s(figures: &Figures, phase: Phase) -> f64 {
    match phase {
        Phase::Prefill => figures.prefill_s,
        Phase::Decode => figures.decode_s,
    }
}

/// The part of a phase in which each lane is busy: without overlap of all lanes, else of the one that binds
/// alone.
fn lane_weights(figures: &Figures, phase: Phase, overlap: bool) -> PerLane<f64> {
    let seconds = |l: &LaneFigures| match phase {
        Phase::Prefill => l.prefill_s,
        Phase::Decode => l.decode_s,
    };
    let whole_s = phase_s(figures, phase);
    let busiest = Lane::with_most(|lane| seconds(&figures.lanes[lane]));
    let mut weights = PerLane::default();
    for lane in Lane::ALL.into_iter().filter(|&l| !overlap || l == busiest) {
        weights[lane] = seconds(&figures.lanes[lane]);
    }
    let busy_s: f64 = Lane::ALL.iter().map(|&lane| weights[lane]).sum();
    for lane in Lane::ALL {
        weights[lane] /= busy_s.max(whole_s).max(1e-12);
    }
    weights
}

/// The bursts that a row's phases need.
pub fn bursts_of(bound: Bound, predicted: &Figures) -> Vec<Burst> {
    let mut bursts = Vec::new();
    for phase in [Phase::Prefill, Phase::Decode] {
        if phase_s(predicted, phase) <= 0.0 {
            continue;
        }
        let weights = burst_weights(predicted, phase, bound);
        for lane in Lane::ALL.into_iter().filter(|&l| weights[l] >= COUNTS) {
            let burst = burst_of(lane, phase, bound);
            if !bursts.contains(&burst) {
                bursts.push(burst);
            }
        }
    }
    bursts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(read_s: f64, compute_s: f64) -> Figures {
        let mut figures = Figures::default();
        figures.lanes[Lane::DiskToCpu].prefill_s = read_s;
        figures.lanes[Lane::CpuCompute].prefill_s = compute_s;
        figures
    }

    #[test]
    fn the_busiest_lane_stands_for_a_phase_or_all_in_turn() {
        let both = lanes(1.0, 3.0);
        let with = lane_weights(&both, Phase::Prefill, true);
        assert_eq!((with.cpu_compute, with.disk_to_cpu), (1.0, 0.0));
        let without = lane_weights(&both, Phase::Prefill, false);
        assert_eq!((without.cpu_compute, without.disk_to_cpu), (0.75, 0.25));
        assert_eq!(lane_weights(&both, Phase::Decode, true), PerLane::default());
        let waits = Figures {
            prefill_s: 6.0,
            ..both
        };
        let with = lane_weights(&waits, Phase::Prefill, true);
        assert_eq!((with.cpu_compute, with.disk_to_cpu), (0.5, 0.0));
        let without = lane_weights(&waits, Phase::Prefill, false);
        assert_eq!((without.cpu_compute, without.disk_to_cpu), (0.5, 1.0 / 6.0));
    }

    #[test]
    fn bursts_read_what_a_layer_has_most_of() {
        let reads = |spilled, request_bytes, requests| Burst::Reads {
            spilled,
            request_bytes,
            requests,
        };
        let of = |sequences, each_bytes| Spilled {
            sequences,
            each_bytes,
        };
        let (page, none) = (PAGE_BYTES, of(0, 0));
        let weights = most_of((40 * MIB, 10 * MIB + 1), [none, of(8, page)]);
        assert_eq!(weights, reads(false, 10 * MIB + page, 1));
        let large = most_of((400 * MIB, 100 * MIB), [of(0, 0), of(0, 0)]);
        assert_eq!(large, reads(false, 16 * MIB, 1));
        let cache = most_of((MIB, MIB), [of(15, 44 * page), of(16, page)]);
        assert_eq!(cache, reads(true, 44 * page, 15));
        let hidden = most_of((0, 0), [of(0, 0), of(3, page)]);
        assert_eq!(hidden, reads(true, page, 3));
        let many = most_of((0, 0), [of(64, 3 * MIB), of(0, 0)]);
        assert_eq!(many, reads(true, 3 * MIB, 10));
        let long = most_of((0, 0), [of(2, 50 * MIB), of(0, 0)]);
        assert_eq!(long, reads(true, 32 * MIB, 1));
    }

    #[test]
    fn rows_of_bursts_are_on_the_probe_s_grid() {
        let rows: Vec<usize> = [1, 2, 3, 6, 48, 500, 9000].map(nearest_power_of_two).into();
        assert_eq!(rows, [1, 2, 4, 8, 64, 512, 512]);
    }
}
