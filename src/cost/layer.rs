//! The work of one decoder layer, of a pass's two ends and of the first fill, as affine terms: the
//! engine's computations and weights counted, each priced by rates.rs. Rows are rows.rs's, what else moves traffic.rs's;
//! which row then binds is terms.rs's.

use crate::cost::affine::{CACHE, ShareVector};
use crate::cost::footprint::{Buffer, HIDDEN_VALUE_BYTES, chunk_panels};
use crate::cost::load::Load;
use crate::cost::rates::{AttentionWork, Rates};
use crate::cost::steps::Step;
use crate::cost::terms::{TermInput, Work};
use crate::cost::traffic::{Copies, constant, spanned_bytes, whole};
use crate::dtype::Dtype;
use crate::model::{Matrix, MatrixKind, ModelSpec};
use crate::placement::WeightHome;
use crate::policy::{DeviceKind, Policy};
use crate::tier::{Lane, Phase, Tier};

/// (rows, how many) of chunks that meet a matrix, and the bytes that pass from one to the next.
type Met<'a> = (&'a [(f64, f64)], f64);

/// Appending and attending.
const ATTENTION_LAUNCHES: f64 = 2.0;

pub struct LayerBuilder<'a> {
    pub(super) model: &'a ModelSpec,
    pub(super) policy: &'a Policy,
    pub(super) rates: &'a Rates,
    pub(super) gpu: bool,
    cpu_side: bool,
    at: Option<ShareVector>,
    pub(super) layer: Vec<Matrix>,
    pub(super) ends: Vec<Matrix>,
}

/// The pieces in which a home's part of a matrix is read, shipped or multiplied.
#[derive(Clone, Copy, PartialEq)]
struct Pieces {
    count: f64,
    bytes: f64,
}

impl<'a> LayerBuilder<'a> {
    pub fn new(input: &TermInput<'a>) -> Self {
        let one_layer = ModelSpec {
            layers: 1,
            ..input.model.clone()
        };
        let (layer, ends) = one_layer.matrices().into_iter().partition(|m| m.stage == 1);
        LayerBuilder {
            model: input.model,
            policy: input.policy,
            rates: input.rates,
            gpu: input.rates.device.has_gpu(),
            cpu_side: input.cpu_side && input.rates.device.has_gpu(),
            at: input.at,
            layer,
            ends,
        }
    }

    /// The share that some homes have together where the table is read: what their pieces are cut from.
    /// All of it where that is not known, or nothing is there.
    pub(super) fn part(&self, homes: &[usize]) -> f64 {
        let shares = self.at.map(|at| homes.iter().map(|&i| at[i]).sum::<f64>());
        shares.filter(|&part| part > 0.0).unwrap_or(1.0)
    }

    /// Bytes of all weight panels.
    pub fn weights_bytes(&self) -> f64 {
        let ends: f64 = self.ends.iter().map(|m| self.matrix_bytes(m)).sum();
        self.model.layers as f64 * self.layer_bytes() + ends
    }

    /// Bytes of one layer's weight panels.
    pub fn layer_bytes(&self) -> f64 {
        self.layer.iter().map(|m| self.matrix_bytes(m)).sum()
    }

    /// Bytes of one layer that come to where they are multiplied, where shares are known; all, where not.
    pub fn streamed_bytes(&self) -> f64 {
        let streamed = WeightHome::ALL.into_iter().filter(|&h| self.is_streamed(h));
        let shares = self.at.map(|at| streamed.map(|h| at[h as usize]).sum());
        self.layer_bytes() * shares.unwrap_or(1.0)
    }

    /// The pieces in which they come.
    pub fn streamed_pieces(&self) -> f64 {
        let there = |home: WeightHome| self.at.is_none_or(|at| at[home as usize] > 0.0);
        let homes = WeightHome::ALL
            .into_iter()
            .filter(|&h| self.is_streamed(h) && there(h));
        let pieces = homes.map(|home| {
            let of = |matrix: &Matrix| self.pieces(matrix, home).count;
            self.layer.iter().map(of).sum::<f64>()
        });
        pieces.sum::<f64>().max(1.0)
    }

    pub fn hidden_row_bytes(&self) -> f64 {
        (self.model.hidden as u64 * HIDDEN_VALUE_BYTES) as f64
    }

    fn format(&self, matrix: &Matrix) -> Dtype {
        matrix.format(self.model.dtype, self.policy.compress_weight)
    }

    pub(super) fn matrix_bytes(&self, matrix: &Matrix) -> f64 {
        matrix.packed_bytes(self.model.dtype, self.policy.compress_weight) as f64
    }

    pub(super) fn computer(&self) -> (Tier, Lane) {
        if self.gpu {
            (Tier::Gpu, Lane::GpuCompute)
        } else {
            (Tier::Cpu, Lane::CpuCompute)
        }
    }

    /// One decoder layer, all batches.
    pub fn layer(&self, step: &Step) -> Work {
        let mut work = Work::default();
        let chunks = step.chunks();
        let between_bytes = self.between_bytes(step);
        for matrix in &self.layer {
            self.product(&mut work, matrix, (&chunks, between_bytes));
            self.stream(&mut work, matrix);
        }
        self.rowwise(&mut work, step);
        self.attention(&mut work, step);
        self.cache_traffic(&mut work, step);
        self.hidden_traffic(&mut work, step);
        work
    }

    /// Head and sampling of one pass, the whole block at once, and what is done to embedded rows.
    pub fn ends(&self, step: &Step) -> Work {
        let mut work = Work::default();
        let sequences = step.sequences();
        for matrix in &self.ends {
            match matrix.kind {
                MatrixKind::Embedding => {}
                MatrixKind::ProjectIn => {
                    self.product(&mut work, matrix, (&step.chunks(), f64::INFINITY));
                    self.stream(&mut work, matrix);
                }
                _ => {
                    self.product(&mut work, matrix, (&[(sequences, 1.0)], f64::INFINITY));
                    self.stream(&mut work, matrix);
                }
            }
        }
        self.end_rows(&mut work, step);
        let logits = sequences * (self.model.vocab as u64 * HIDDEN_VALUE_BYTES) as f64;
        if self.gpu {
            let copies = Copies::one(logits, Buffer::Logits);
            work.hidden.gpu_to_cpu = self.copy(&mut work, Lane::GpuToCpu, &copies);
        }
        // Whatever the device, the host draws when the logits are there.
        let sampling = constant(self.rates.sampling_s(logits));
        work.lanes.cpu_compute.add(&sampling);
        // It wakes up for that, and so does the lane that begins the next pass.
        let woken = constant(2.0 * self.rates.handover_s);
        work.hidden.cpu_compute.add(&sampling.plus(&woken));
        work.dram_bytes.constant += logits;
        work
    }

    /// Before the first product of a job: the first streamed pieces on their way.
    pub fn fill(&self) -> Work {
        let mut work = Work::default();
        let Some(first) = self.layer.first() else {
            return work;
        };
        let bytes = self.matrix_bytes(first);
        let piece =
            chunk_panels(bytes as u64 / first.panels() as u64) as f64 / first.panels() as f64;
        let part = piece.min(1.0);
        let mut whole = Work::default();
        self.stream(&mut whole, first);
        for lane in [Lane::DiskToCpu, Lane::CpuToGpu] {
            work.lanes[lane] = whole.lanes[lane].scaled(part);
        }
        work
    }

    /// True for panels that are at home elsewhere than where they are multiplied.
    fn is_streamed(&self, home: WeightHome) -> bool {
        match home {
            WeightHome::Gpu | WeightHome::CpuCompute => false,
            WeightHome::CpuShip => self.gpu,
            WeightHome::DiskShip | WeightHome::DiskCompute => true,
        }
    }

    fn pieces(&self, matrix: &Matrix, home: WeightHome) -> Pieces {
        let (bytes, panels) = (self.matrix_bytes(matrix), matrix.panels() as f64);
        let most = chunk_panels((bytes / panels) as u64) as f64 * bytes / panels;
        let bytes = self.part(&[home as usize]) * bytes;
        let mut count = 1.0f64;
        if self.is_streamed(home) {
            let pieces = bytes / most;
            count = if self.at.is_some() {
                pieces.ceil()
            } else {
                pieces
            }
            .max(1.0);
        }
        Pieces {
            count,
            bytes: bytes / count,
        }
    }

    /// One matrix times its rows, by home: every computer multiplies its own share of the outputs. So many bytes pass
    /// until the next chunk meets the same weights.
    fn product(&self, work: &mut Work, matrix: &Matrix, (chunks, between_bytes): Met) {
        let bytes = self.matrix_bytes(matrix);
        let passes: f64 = chunks.iter().map(|c| c.1).sum();
        let (tier, lane) = self.computer();
        let mut last = None;
        for home in WeightHome::ALL {
            let index = home as usize;
            let beside =
                self.gpu && matches!(home, WeightHome::CpuCompute | WeightHome::DiskCompute);
            if beside && !self.cpu_side {
                continue;
            }
            let (tier, lane) = if beside {
                (Tier::Cpu, Lane::CpuCompute)
            } else {
                (tier, lane)
            };
            let pieces = self.pieces(matrix, home);
            let all_s = match last {
                Some((before, all_s)) if before == (pieces, tier) => all_s,
                _ => self.products_s(matrix, (chunks, between_bytes), (tier, pieces)),
            };
            last = Some(((pieces, tier), all_s));
            // The program counts a product's first operation among the layer's.
            let counted = if self.at.is_none() { passes } else { 0.0 };
            let seconds = all_s - self.rates.apart_s(tier, counted);
            work.lanes[lane].coef[index] += seconds;
            let of = if beside {
                &mut work.side_products
            } else {
                &mut work.products
            };
            of.coef[index] += seconds;
            if beside || self.on_dram() {
                let kept = self.rates.kept(tier, between_bytes);
                let read = bytes * (passes - kept * (passes - 1.0).max(0.0));
                work.reads((lane, index), (read, seconds), self.rates);
            }
        }
        if self.at.is_none() {
            let launches_s = self.rates.apart_s(tier, passes);
            work.lanes[lane].constant += launches_s;
            work.products.constant += launches_s;
        }
        if self.cpu_side {
            self.side_rows(work, matrix, chunks);
        }
    }

    /// Seconds of all of a matrix, multiplied in pieces like these, which are as much of it as they are.
    fn products_s(
        &self,
        matrix: &Matrix,
        (chunks, between_bytes): Met,
        (tier, pieces): (Tier, Pieces),
    ) -> f64 {
        let one_of_all = pieces.bytes / self.matrix_bytes(matrix);
        let of_all = pieces.count * one_of_all;
        let format = self.format(matrix);
        let stored = (format, self.policy.arithmetic(format));
        let (inputs, outputs) = (matrix.inputs as f64, matrix.rows as f64);
        let piece = (inputs, outputs * one_of_all);
        let passes: f64 = chunks.iter().map(|c| c.1).sum();
        let one = |&(m, count): &(f64, f64)| {
            let wide = (format, self.policy.is_wide());
            let met = (m, between_bytes);
            let part = self.rates.met_part(tier, stored, met, passes);
            let products = part * count * self.rates.products(tier, wide, m);
            let weight_s = self.rates.weight_s(tier, stored, m, piece);
            let work_s = products * of_all * inputs * outputs * weight_s;
            self.rates.operations_s(tier, count * pieces.count, work_s) / of_all
        };
        chunks.iter().map(one).sum()
    }

    /// True where the compute device works in DRAM.
    fn on_dram(&self) -> bool {
        self.rates.device != DeviceKind::Cuda
    }

    /// Inputs of products that the CPU makes for a GPU go down, its share of the results comes up.
    fn side_rows(&self, work: &mut Work, matrix: &Matrix, chunks: &[(f64, f64)]) {
        let value = HIDDEN_VALUE_BYTES as f64;
        for &(m, count) in chunks {
            let down = Copies {
                count,
                ..Copies::one(m * matrix.inputs as f64 * value, Buffer::SideRows)
            };
            let sent = self.copy(work, Lane::GpuToCpu, &down);
            work.side.gpu_to_cpu.add(&sent);
            for home in [WeightHome::CpuCompute, WeightHome::DiskCompute] {
                let index = home as usize;
                let up = Copies {
                    home: Some(index),
                    part: self.part(&[index]),
                    count,
                    bytes: m * matrix.rows as f64 * value,
                    dram: Buffer::SideProducts,
                };
                let returned = self.copy(work, Lane::CpuToGpu, &up);
                work.side.cpu_to_gpu.add(&returned);
            }
        }
    }

    /// Panels that are not at home where they are multiplied arrive once per pass.
    fn stream(&self, work: &mut Work, matrix: &Matrix) {
        let bytes = self.matrix_bytes(matrix);
        let panel = (bytes / matrix.panels() as f64) as u64;
        for home in [WeightHome::DiskShip, WeightHome::DiskCompute] {
            let index = home as usize;
            let part = self.part(&[index]);
            let pieces = self.pieces(matrix, home);
            let span = if self.at.is_some() {
                spanned_bytes(pieces.bytes, panel)
            } else {
                pieces.bytes
            };
            let one_s = self.rates.disk_read_s(span, span);
            let load = Load::of_disk(Lane::DiskToCpu, one_s, (span, span));
            let read_s = pieces.count * one_s / part;
            work.moves((Lane::DiskToCpu, index), read_s, load);
            work.streams.disk_to_cpu.coef[index] += read_s;
            work.bytes.disk_to_cpu.coef[index] += pieces.count * span / part;
            work.dram_bytes.coef[index] += bytes;
        }
        if !self.gpu {
            return;
        }
        for (home, dram) in [
            (WeightHome::CpuShip, Buffer::Weights),
            (WeightHome::DiskShip, Buffer::Ring),
        ] {
            let pinned = self.is_locked(dram);
            let index = home as usize;
            let pieces = self.pieces(matrix, home);
            let up_s = pieces.count * self.rates.link_s(Lane::CpuToGpu, pieces.bytes, pinned);
            let seconds = up_s / self.part(&[index]);
            work.lanes.cpu_to_gpu.coef[index] += seconds;
            work.streams.cpu_to_gpu.coef[index] += seconds;
            work.bytes.cpu_to_gpu.coef[index] += bytes;
            work.dram_bytes.coef[index] += bytes;
        }
    }

    /// Attention by where the cache is at home.
    fn attention(&self, work: &mut Work, step: &Step) {
        let chunks = step.chunks();
        let calls: f64 = chunks.iter().map(|c| c.1).sum();
        let begin_s = |tier| {
            let calls_s: f64 = self.attention_calls_s(step.phase, tier).iter().sum();
            calls * calls_s + self.rates.apart_s(tier, calls * ATTENTION_LAUNCHES)
        };
        let (on, lane) = self.computer();
        if self.at.is_none() {
            let seconds = begin_s(on);
            work.lanes[lane].constant += seconds;
            work.attention.constant += seconds;
        }
        for home in Tier::ALL {
            let index = CACHE + home as usize;
            let away = self.attends_beside(home);
            let (tier, lane) = if away {
                (Tier::Cpu, Lane::CpuCompute)
            } else {
                (on, lane)
            };
            let same: Vec<usize> = Tier::ALL
                .into_iter()
                .filter(|&h| self.attends_beside(h) == away)
                .map(|h| CACHE + h as usize)
                .collect();
            let part = whole(
                self.part(&same),
                step.sequences() / step.batch_count().max(1.0),
            );
            let seconds = match self.at.is_some() {
                true => self.attend_s(step, tier, (calls, part)) / part,
                false => self.attend_s(step, tier, (calls, 1.0)) - begin_s(tier),
            };
            work.lanes[lane].coef[index] += seconds;
            if away || self.on_dram() {
                work.reads((lane, index), (self.kv_bytes(step), seconds), self.rates);
            }
            if away {
                work.beside.cpu_compute.coef[index] += seconds;
                self.attended_rows(work, (index, part), &chunks);
            } else {
                work.attention.coef[index] += seconds;
            }
        }
    }

    /// What appending and attending a chunk take however little they look at, besides their launches.
    fn attention_calls_s(&self, phase: Phase, tier: Tier) -> [f64; 2] {
        let attend_s = match phase {
            Phase::Prefill => 0.0,
            Phase::Decode => self.rates.decode_call_s(tier, self.policy.kv_format()),
        };
        [self.rates.append_call_s(tier), attend_s]
    }

    pub(super) fn attends_beside(&self, home: Tier) -> bool {
        self.gpu && home != Tier::Gpu && self.policy.cpu_cache_compute
    }

    /// Appending the new rows and attending: so many calls of each, for a part of all sequences on one tier.
    fn attend_s(&self, step: &Step, tier: Tier, (calls, part): (f64, f64)) -> f64 {
        let format = self.policy.kv_format();
        let hidden = self.model.hidden as f64;
        let (work, format_s) = match step.phase {
            Phase::Decode => (
                AttentionWork::Decode {
                    kv_bytes: self.kv_bytes(step),
                    tokens: step.context,
                    hidden,
                },
                format,
            ),
            Phase::Prefill => (
                AttentionWork::Prefill {
                    flop: 4.0 * hidden * step.sequences() * step.keys,
                    tokens: step.context,
                },
                self.rates
                    .prompt_format(tier, (format, self.policy.is_wide())),
            ),
        };
        let values = 2.0 * step.sequences() * step.rows * self.hidden_row_bytes();
        let append_s = self.rates.append_s(tier, format, values);
        let attend_s = self.rates.attention_s(tier, format_s, work);
        let calls_s = self.attention_calls_s(step.phase, tier);
        let both = [append_s, attend_s].into_iter().zip(calls_s);
        let seconds = both.map(|(all_s, call_s)| calls * call_s + part * all_s);
        seconds
            .map(|s| self.rates.operations_s(tier, calls, s))
            .sum()
    }

    /// Queries, keys and values go down to the CPU and attended rows come up.
    fn attended_rows(&self, work: &mut Work, (index, part): (usize, f64), chunks: &[(f64, f64)]) {
        for &(m, count) in chunks {
            let rows = |values: f64, dram: Buffer| Copies {
                home: Some(index),
                part,
                count,
                bytes: values * m * self.hidden_row_bytes(),
                dram,
            };
            let down = self.copy(work, Lane::GpuToCpu, &rows(3.0, Buffer::Qkv));
            let up = self.copy(work, Lane::CpuToGpu, &rows(1.0, Buffer::Attended));
            work.beside.gpu_to_cpu.add(&down);
            work.beside.cpu_to_gpu.add(&up);
        }
    }
}
