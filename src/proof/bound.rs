//! Which lane binds a planned job's phases, which burst tells how fast it is at the moment, and how much of the phase
//! goes by that. Nothing runs here.

use crate::cost::block::even_chunks;
use crate::cost::figures::{Figures, LaneFigures};
use crate::cost::footprint::{HIDDEN_VALUE_BYTES, STREAM_CHUNK_BYTES};
use crate::cost::rates::Rates;
use crate::dtype::Dtype;
use crate::model::{Matrix, MatrixKind, ModelSpec};
use crate::plan::{Plan, PlanPlacement};
use crate::policy::Policy;
use crate::probe::{Burst, CALL_BYTES, CallSize, Products, Reads, WRITE_CALL_BYTES};
use crate::tier::{Lane, PerLane, Phase, Tier};
use crate::units::{MIB, PAGE_BYTES, round_up};

/// The part of a phase's busy time from which a lane's speed counts.
const COUNTS: f64 = 0.1;

/// Lanes that are both busy for this part of a phase are measured beside each other.
const COMPANY: f64 = 0.5;
/// From this part on it counts that batches find weights in a cache.
const KEPT: f64 = 0.25;
/// A burst meets its weights no more often than this.
const MOST_TIMES: usize = 4;

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

/// Calls like those that move most of what is spilled: a request for each sequence.
fn most_of(spilled: [Spilled; 2], call_bytes: u64) -> CallSize {
    let [cache, hidden] = spilled;
    let most = match cache.bytes() > hidden.bytes() {
        true => cache,
        false => hidden,
    };
    let request_bytes = most.each_bytes.clamp(PAGE_BYTES, call_bytes);
    CallSize {
        request_bytes,
        requests: most.sequences.clamp(1, call_bytes / request_bytes),
    }
}

/// Reads like those that have most bytes of a layer: chunks of so many bytes of the weights, or what is spilled.
fn most_read((weights_bytes, chunk_bytes): (u64, u64), spilled: [Spilled; 2]) -> Reads {
    let most_bytes = spilled.iter().map(Spilled::bytes).max();
    match most_bytes.is_none_or(|bytes| weights_bytes >= bytes) {
        true => Reads {
            spilled: false,
            size: CallSize {
                request_bytes: round_up(chunk_bytes, PAGE_BYTES).clamp(MIB, STREAM_CHUNK_BYTES),
                requests: 1,
            },
        },
        false => Reads {
            spilled: true,
            size: most_of(spilled, CALL_BYTES),
        },
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
    /// How often a burst of decoding meets its weights, and what passes in between: batches meet a layer's one
    /// after the other while a good part of them is in a cache.
    fn met(&self) -> (usize, u64) {
        let passed_bytes = self.passed_bytes();
        match self.rates.kept(Tier::Cpu, passed_bytes) > KEPT {
            true if self.policy.num_gpu_batches > 1 => {
                let times = self.policy.num_gpu_batches.min(MOST_TIMES);
                (times, passed_bytes as u64)
            }
            _ => (1, 0),
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

    /// What a batch has on disk in a layer: `cached` tokens of each sequence, and so many rows.
    fn spilled(&self, placement: &PlanPlacement, cached: u64, rows: u64) -> [Spilled; 2] {
        let spilled = |share: f64, bytes: u64| Spilled {
            sequences: (self.slots() as f64 * share).round() as u64,
            each_bytes: round_up(bytes, PAGE_BYTES),
        };
        let record = self.model.kv_record_bytes(self.policy.kv_format());
        let row_bytes = self.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        [
            spilled(placement.cache.disk, cached * record),
            spilled(placement.activations.disk, rows * row_bytes),
        ]
    }

    /// Tokens of a sequence in the prompt, and in its cache on average while it decodes.
    fn tokens(&self) -> (u64, u64) {
        let w = &self.plan.workload;
        let each = |tokens: u64| tokens / w.prompts.max(1);
        (
            each(w.prompt_tokens),
            each(w.prompt_tokens + w.gen_tokens / 2),
        )
    }

    /// Reads like those of a phase.
    fn reads(&self, phase: Phase) -> Option<Reads> {
        let placement = self.plan.placement.as_ref()?;
        let (prompt, decoding) = self.tokens();
        let (cached, rows) = match phase {
            Phase::Prefill => (0, prompt),
            Phase::Decode => (decoding, 1),
        };
        let shares = &placement.weights;
        let streamed = shares.disk_ship + shares.disk_compute;
        let layer_bytes = self.model.layer_bytes(self.policy.compress_weight);
        // A batch's part of what is read once for all of them.
        let weights = streamed * layer_bytes as f64 / self.policy.num_gpu_batches as f64;
        let chunk_bytes = (streamed * layer_bytes as f64) as u64 / MATRICES_OF_LAYER;
        let spilled = self.spilled(placement, cached, rows);
        Some(most_read((weights as u64, chunk_bytes), spilled))
    }

    /// Writes like those of a phase: what is new of each sequence.
    fn writes(&self, phase: Phase) -> Burst {
        let Some(placement) = &self.plan.placement else {
            return Burst::Write;
        };
        let new = match phase {
            Phase::Prefill => self.tokens().0,
            Phase::Decode => 1,
        };
        Burst::Writes(most_of(self.spilled(placement, new, new), WRITE_CALL_BYTES))
    }

    /// Products like those of a phase.
    fn products(&self, phase: Phase) -> Products {
        let (times, passed_bytes) = match phase {
            Phase::Prefill => (1, 0),
            Phase::Decode => self.met(),
        };
        let format = match self.policy.compress_weight {
            true => Dtype::Q4,
            false => self.model.dtype,
        };
        Products {
            format,
            arithmetic: self.policy.arithmetic(format),
            rows: nearest_power_of_two(self.rows(phase)),
            times,
            passed_bytes,
        }
    }

    /// Whether computing and reading go on beside each other for most of a phase. The plan as it was written says so:
    /// what was measured by it must be found by it.
    fn in_company(&self, phase: Phase) -> bool {
        let Some(planned) = &self.plan.estimate else {
            return false;
        };
        let most_s = COMPANY * phase_s(planned, phase);
        let lanes = [Lane::CpuCompute, Lane::DiskToCpu];
        let busy = |lane| lane_s(&planned.lanes[lane], phase) >= most_s;
        self.policy.overlap && lanes.into_iter().all(busy)
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
    let products = bound.products(phase);
    let reads = bound.reads(phase);
    match (lane, reads) {
        (Lane::CpuToDisk, _) => bound.writes(phase),
        (Lane::DiskToCpu, None) => Burst::Read,
        (Lane::DiskToCpu, Some(reads)) if bound.in_company(phase) => {
            Burst::ReadsBeside(reads, products)
        }
        (Lane::DiskToCpu, Some(reads)) => Burst::Reads(reads),
        (_, Some(reads)) if bound.in_company(phase) => Burst::ProductBeside(products, reads),
        _ => Burst::Product(products),
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

fn lane_s(lane: &LaneFigures, phase: Phase) -> f64 {
    match phase {
        Phase::Prefill => lane.prefill_s,
        Phase::Decode => lane.decode_s,
    }
}

/// The part of a phase in which each lane is busy: without overlap of all lanes, else of the one that binds
/// alone.
fn lane_weights(figures: &Figures, phase: Phase, overlap: bool) -> PerLane<f64> {
    let whole_s = phase_s(figures, phase);
    let busiest = Lane::with_most(|lane| lane_s(&figures.lanes[lane], phase));
    let mut weights = PerLane::default();
    for lane in Lane::ALL.into_iter().filter(|&l| !overlap || l == busiest) {
        weights[lane] = lane_s(&figures.lanes[lane], phase);
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

    const fn size(request_bytes: u64, requests: u64) -> CallSize {
        CallSize {
            request_bytes,
            requests,
        }
    }

    fn of(sequences: u64, each_bytes: u64) -> Spilled {
        Spilled {
            sequences,
            each_bytes,
        }
    }

    #[test]
    fn bursts_read_what_a_layer_has_most_of() {
        let reads = |spilled, request_bytes, requests| Reads {
            spilled,
            size: size(request_bytes, requests),
        };
        let (page, none) = (PAGE_BYTES, of(0, 0));
        let weights = most_read((40 * MIB, 10 * MIB + 1), [none, of(8, page)]);
        assert_eq!(weights, reads(false, 10 * MIB + page, 1));
        let large = most_read((400 * MIB, 100 * MIB), [of(0, 0), of(0, 0)]);
        assert_eq!(large, reads(false, 16 * MIB, 1));
        let cache = most_read((MIB, MIB), [of(15, 44 * page), of(16, page)]);
        assert_eq!(cache, reads(true, 44 * page, 15));
        let hidden = most_read((0, 0), [of(0, 0), of(3, page)]);
        assert_eq!(hidden, reads(true, page, 3));
        let many = most_read((0, 0), [of(64, 3 * MIB), of(0, 0)]);
        assert_eq!(many, reads(true, 3 * MIB, 10));
        let long = most_read((0, 0), [of(2, 50 * MIB), of(0, 0)]);
        assert_eq!(long, reads(true, 32 * MIB, 1));
    }

    #[test]
    fn bursts_write_what_is_new_of_each_sequence() {
        let page = PAGE_BYTES;
        assert_eq!(most_of([of(6, page), of(6, 0)], 4 * MIB), size(page, 6));
        assert_eq!(
            most_of([of(3, 0), of(5, 3 * page)], 4 * MIB),
            size(3 * page, 5)
        );
        assert_eq!(
            most_of([of(9, 3 * MIB), of(0, 0)], 4 * MIB),
            size(3 * MIB, 1)
        );
        assert_eq!(
            most_of([of(9, 9 * MIB), of(0, 0)], 4 * MIB),
            size(4 * MIB, 1)
        );
        assert_eq!(most_of([of(0, 0), of(0, 0)], 4 * MIB), size(page, 1));
    }

    #[test]
    fn rows_of_bursts_are_on_the_probe_s_grid() {
        let rows: Vec<usize> = [1, 2, 3, 6, 48, 500, 9000].map(nearest_power_of_two).into();
        assert_eq!(rows, [1, 2, 4, 8, 64, 512, 512]);
    }
}
