//! The work of one decoder layer, of a pass's two ends and of the first fill, as affine terms: the
//! engine's tasks counted, each priced by rates.rs. Which row then binds is terms.rs.

use crate::cost::affine::{Affine, CACHE, HIDDEN};
use crate::cost::footprint::{HIDDEN_VALUE_BYTES, STREAM_CHUNK_BYTES, embedding_piece_bytes};
use crate::cost::rates::{AttentionWork, Rates, smallness};
use crate::cost::steps::Step;
use crate::cost::terms::{TermInput, Work};
use crate::dtype::Dtype;
use crate::model::{Matrix, MatrixKind, ModelSpec};
use crate::placement::WeightHome;
use crate::policy::{DeviceKind, Policy};
use crate::tier::{Lane, PerLane, Phase, Tier};
use crate::units::{PAGE_BYTES, round_up};

/// Operations started for one chunk of a layer: two norms, four products, append, attention, two adds.
const LAUNCHES_PER_CHUNK: f64 = 10.0;
/// A norm reads and writes its rows once; a residual add reads two and writes one: two of each.
const ROWWISE_PASSES: f64 = 10.0;

pub struct LayerBuilder<'a> {
    model: &'a ModelSpec,
    policy: &'a Policy,
    rates: &'a Rates,
    gpu: bool,
    cpu_side: bool,
    layer: Vec<Matrix>,
    ends: Vec<Matrix>,
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
            layer,
            ends,
        }
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

    pub fn hidden_row_bytes(&self) -> f64 {
        (self.model.hidden as u64 * HIDDEN_VALUE_BYTES) as f64
    }

    fn format(&self, matrix: &Matrix) -> Dtype {
        matrix.format(self.model.dtype, self.policy.compress_weight)
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> f64 {
        (matrix.panels() as u64 * self.format(matrix).panel_bytes(matrix.inputs)) as f64
    }

    fn computer(&self) -> (Tier, Lane) {
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
        for matrix in &self.layer {
            self.product(&mut work, matrix, &chunks);
            self.stream(&mut work, matrix);
        }
        self.rowwise(&mut work, step);
        self.attention(&mut work, step, &chunks);
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
                    self.product(&mut work, matrix, &step.chunks());
                    self.stream(&mut work, matrix);
                }
                _ => {
                    self.product(&mut work, matrix, &[(sequences, 1.0)]);
                    self.stream(&mut work, matrix);
                }
            }
        }
        let (tier, lane) = self.computer();
        let rows = step.sequences() * step.rows + sequences;
        let seconds = self
            .rates
            .rowwise_s(tier, 2.0 * rows * self.hidden_row_bytes());
        work.lanes[lane].constant += seconds + 4.0 * self.rates.launch_s(tier);
        let logits = sequences * (self.model.vocab as u64 * HIDDEN_VALUE_BYTES) as f64;
        if self.gpu {
            self.link(&mut work, Lane::GpuToCpu, &constant(logits), logits);
        }
        let sampling = self.rates.sampling_s(logits);
        work.lanes[Lane::CpuCompute].constant += sampling;
        work.dram_bytes.constant += logits;
        // The head comes once, for the whole block: no batch waits for another.
        Work {
            lanes: work.lanes,
            small: work.small,
            bytes: work.bytes,
            dram_bytes: work.dram_bytes,
            ..Work::default()
        }
    }

    /// Before the first product of a job: the first streamed pieces on their way.
    pub fn fill(&self) -> Work {
        let mut work = Work::default();
        let Some(first) = self.layer.first() else {
            return work;
        };
        let part = (STREAM_CHUNK_BYTES as f64 / self.matrix_bytes(first)).min(1.0);
        let mut whole = Work::default();
        self.stream(&mut whole, first);
        for lane in [Lane::DiskToCpu, Lane::CpuToGpu] {
            work.lanes[lane] = whole.lanes[lane].scaled(part);
        }
        work
    }

    /// One matrix times its rows, by home: every computer multiplies its own share of the outputs.
    fn product(&self, work: &mut Work, matrix: &Matrix, chunks: &[(f64, f64)]) {
        let format = self.format(matrix);
        let stored = (format, self.policy.arithmetic(format));
        let weights = matrix.rows as f64 * matrix.inputs as f64;
        let seconds_on = |tier| -> f64 {
            let one = |&(m, count): &(f64, f64)| {
                let wide = (format, self.policy.is_wide());
                let products = count * self.rates.products(tier, wide, m);
                products * weights * self.rates.weight_s(tier, stored, m, weights)
            };
            chunks.iter().map(one).sum()
        };
        let passes: f64 = chunks.iter().map(|c| c.1).sum();
        let traffic = passes * self.matrix_bytes(matrix);
        let (tier, lane) = self.computer();
        let seconds = seconds_on(tier);
        let side = if self.cpu_side {
            seconds_on(Tier::Cpu)
        } else {
            0.0
        };
        for home in WeightHome::ALL {
            let index = home as usize;
            let by_cpu = matches!(home, WeightHome::CpuCompute | WeightHome::DiskCompute);
            if self.gpu && by_cpu {
                work.lanes[Lane::CpuCompute].coef[index] += side;
                work.side_products.coef[index] += side;
                work.dram_bytes.coef[index] += traffic;
            } else {
                work.lanes[lane].coef[index] += seconds;
                work.products.coef[index] += seconds;
                work.dram_bytes.coef[index] += if self.on_dram() { traffic } else { 0.0 };
            }
        }
        if self.cpu_side {
            self.side_rows(work, matrix, chunks);
        }
    }

    /// True where the compute device works in DRAM.
    fn on_dram(&self) -> bool {
        self.rates.device != DeviceKind::Cuda
    }

    /// Inputs of products that the CPU makes for a GPU go down, its share of the results comes up.
    fn side_rows(&self, work: &mut Work, matrix: &Matrix, chunks: &[(f64, f64)]) {
        let value = HIDDEN_VALUE_BYTES as f64;
        for &(m, count) in chunks {
            let down = m * matrix.inputs as f64 * value;
            let before = work.serial;
            self.link(work, Lane::GpuToCpu, &constant(count * down), down);
            let up = m * matrix.rows as f64 * value;
            let mut results = Affine::default();
            for home in [WeightHome::CpuCompute, WeightHome::DiskCompute] {
                results.coef[home as usize] = count * up;
            }
            self.link(work, Lane::CpuToGpu, &results, up);
            work.side_links.add(&grown(&before, &work.serial));
        }
    }

    /// Panels that are not at home where they are multiplied arrive once per pass.
    fn stream(&self, work: &mut Work, matrix: &Matrix) {
        let bytes = self.matrix_bytes(matrix);
        let chunk = bytes.min(STREAM_CHUNK_BYTES as f64);
        let read_s = self.rates.disk_read_s(bytes, chunk);
        for home in [WeightHome::DiskShip, WeightHome::DiskCompute] {
            work.lanes.disk_to_cpu.coef[home as usize] += read_s;
            work.small.disk_to_cpu.coef[home as usize] += read_s * smallness(chunk);
            work.streams.disk_to_cpu.coef[home as usize] += read_s;
            work.bytes.disk_to_cpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
        if !self.gpu {
            return;
        }
        let chunks = bytes / chunk;
        for (home, pinned) in [
            (WeightHome::CpuShip, self.policy.pin_weight),
            (WeightHome::DiskShip, true),
        ] {
            let seconds = chunks * self.rates.link_s(Lane::CpuToGpu, chunk, pinned);
            work.lanes.cpu_to_gpu.coef[home as usize] += seconds;
            work.streams.cpu_to_gpu.coef[home as usize] += seconds;
            work.bytes.cpu_to_gpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
    }

    /// Copies over a link outside the weights: `bytes` in pieces of `piece`, through pinned staging,
    /// each waited for by its batch.
    fn link(&self, work: &mut Work, lane: Lane, bytes: &Affine, piece: f64) {
        if piece <= 0.0 {
            return;
        }
        let per_byte = self.rates.link_s(lane, piece, true) / piece;
        work.lanes[lane].add_scaled(bytes, per_byte);
        work.serial[lane].add_scaled(bytes, per_byte);
        work.bytes[lane].add(bytes);
        work.dram_bytes.add(bytes);
    }

    fn rowwise(&self, work: &mut Work, step: &Step) {
        let (tier, lane) = self.computer();
        let rows = step.sequences() * step.rows;
        let bytes = ROWWISE_PASSES * rows * self.hidden_row_bytes();
        let launches: f64 = step.chunks().iter().map(|c| c.1).sum::<f64>() * LAUNCHES_PER_CHUNK;
        let append = self.rates.append_s(
            tier,
            self.policy.kv_format(),
            2.0 * rows * self.hidden_row_bytes(),
        );
        let seconds =
            self.rates.rowwise_s(tier, bytes) + launches * self.rates.launch_s(tier) + append;
        work.lanes[lane].constant += seconds;
        work.serial[lane].constant += seconds;
    }

    /// Attention by where the cache is at home.
    fn attention(&self, work: &mut Work, step: &Step, chunks: &[(f64, f64)]) {
        let format = self.policy.kv_format();
        let record = self.model.kv_record_bytes(format) as f64;
        let kv_bytes = step.sequences() * step.context * record;
        let flop = 4.0 * self.model.hidden as f64 * step.sequences() * step.keys;
        let attended = match step.phase {
            Phase::Decode => AttentionWork::Decode {
                kv_bytes,
                tokens: step.context,
            },
            Phase::Prefill => AttentionWork::Prefill {
                flop,
                tokens: step.context,
            },
        };
        let (tier, lane) = self.computer();
        for home in Tier::ALL {
            let index = CACHE + home as usize;
            let away = self.gpu && home != Tier::Gpu && self.policy.cpu_cache_compute;
            let (tier, lane) = if away {
                (Tier::Cpu, Lane::CpuCompute)
            } else {
                (tier, lane)
            };
            let priced = match step.phase {
                Phase::Decode => format,
                Phase::Prefill => {
                    let wide = (format, self.policy.is_wide());
                    self.rates.prompt_format(tier, wide)
                }
            };
            let seconds = self.rates.attention_s(tier, priced, attended);
            work.lanes[lane].coef[index] += seconds;
            work.serial[lane].coef[index] += seconds;
            if away || self.on_dram() {
                work.dram_bytes.coef[index] += kv_bytes;
            }
            if away {
                let before = work.serial;
                self.attended_rows(work, index, chunks);
                work.beside.add(&grown(&before, &work.serial));
                work.beside.coef[index] += seconds;
            } else {
                work.attention.coef[index] += seconds;
            }
        }
    }

    /// Queries, keys and values go down to the CPU and attended rows come up.
    fn attended_rows(&self, work: &mut Work, index: usize, chunks: &[(f64, f64)]) {
        for &(m, count) in chunks {
            let row = self.hidden_row_bytes();
            let (down, up) = (3.0 * m * row, m * row);
            self.link(work, Lane::GpuToCpu, &share(index, count * down), down);
            self.link(work, Lane::CpuToGpu, &share(index, count * up), up);
        }
    }

    /// Cached tokens on their way to attention and back home.
    fn cache_traffic(&self, work: &mut Work, step: &Step) {
        let record = self.model.kv_record_bytes(self.policy.kv_format()) as f64;
        let sequences = step.sequences();
        let fresh = step.rows * record;
        // A fresh sequence's prefill finds nothing in the cache.
        let old = if step.phase == Phase::Decode {
            (step.context - step.rows).max(0.0) * record
        } else {
            0.0
        };
        let disk = CACHE + Tier::Disk as usize;
        let write = round_up(fresh.ceil() as u64, PAGE_BYTES) as f64;
        let read_s = self.rates.disk_read_s(sequences * old, old);
        work.lanes.disk_to_cpu.coef[disk] += read_s;
        work.small.disk_to_cpu.coef[disk] += read_s * smallness(old);
        if self.gpu && !self.policy.cpu_cache_compute {
            work.cache_reads.coef[disk] += read_s;
        }
        work.bytes.disk_to_cpu.coef[disk] += sequences * old;
        let write_s = self.rates.disk_write_s(sequences * write, write, true);
        work.lanes.cpu_to_disk.coef[disk] += write_s;
        work.small.cpu_to_disk.coef[disk] += write_s * smallness(write);
        work.bytes.cpu_to_disk.coef[disk] += sequences * write;
        work.dram_bytes.coef[disk] += sequences * (old + write);
        if !self.gpu || self.policy.cpu_cache_compute {
            return;
        }
        for home in [Tier::Cpu, Tier::Disk] {
            let index = CACHE + home as usize;
            for &(n, count) in &step.batches {
                let (up, down) = (n * old, n * fresh);
                self.prefetch(work, (Lane::CpuToGpu, index), count, up);
                self.prefetch(work, (Lane::GpuToCpu, index), count, down);
            }
        }
    }

    /// A copy for one share that no batch waits for: it is made while another batch computes.
    fn prefetch(&self, work: &mut Work, (lane, index): (Lane, usize), count: f64, bytes: f64) {
        let seconds = count * self.rates.link_s(lane, bytes, true);
        work.lanes[lane].coef[index] += seconds;
        work.bytes[lane].coef[index] += count * bytes;
        work.dram_bytes.coef[index] += count * bytes;
    }

    /// Hidden states that are at home elsewhere come before a layer and go back after it; the first
    /// layer's come from the embedding and the last layer's go to the head.
    fn hidden_traffic(&self, work: &mut Work, step: &Step) {
        let inner = 1.0 - 1.0 / self.model.layers as f64;
        let sequence = step.rows * self.hidden_row_bytes();
        let block = round_up(sequence.ceil() as u64, PAGE_BYTES) as f64;
        let bytes = step.sequences() * block * inner;
        let disk = HIDDEN + Tier::Disk as usize;
        let read_s = self.rates.disk_read_s(bytes, block);
        let write_s = self.rates.disk_write_s(bytes, block, false);
        for (lane, seconds) in [(Lane::DiskToCpu, read_s), (Lane::CpuToDisk, write_s)] {
            work.lanes[lane].coef[disk] += seconds;
            work.small[lane].coef[disk] += seconds * smallness(block);
            work.serial[lane].coef[disk] += seconds;
            work.bytes[lane].coef[disk] += bytes;
            work.dram_bytes.coef[disk] += bytes;
        }
        if !self.gpu {
            return;
        }
        for home in [Tier::Cpu, Tier::Disk] {
            let index = HIDDEN + home as usize;
            for &(n, count) in &step.batches {
                let piece = n * sequence;
                let all = share(index, count * piece * inner);
                self.link(work, Lane::CpuToGpu, &all, piece);
                self.link(work, Lane::GpuToCpu, &all, piece);
            }
        }
    }

    /// Looking tokens up, chunk by chunk: panels of the table that are not at home on the compute device
    /// come whole, in runs of neighbours, for every chunk again.
    pub fn tokens(&self, step: &Step) -> Work {
        let mut work = Work::default();
        let is_table = |m: &&Matrix| m.kind == MatrixKind::Embedding;
        let table = self.ends.iter().find(is_table).or(self.ends.last());
        let Some(table) = table else {
            return work;
        };
        let panels = table.panels() as f64;
        let panel = self.matrix_bytes(table) / panels;
        let most = (embedding_piece_bytes(panel as u64) as f64 / panel)
            .floor()
            .max(1.0);
        for (rows, count) in step.chunks() {
            // Panels that at least one of the rows falls into, and how many of them lie side by side.
            let part = 1.0 - (1.0 - 1.0 / panels).powf(rows);
            let run = (1.0 / (1.0 - part).max(1.0 / panels)).clamp(1.0, most) * panel;
            self.table_panels(&mut work, count * part * panels * panel, run);
        }
        work
    }

    fn table_panels(&self, work: &mut Work, bytes: f64, run: f64) {
        let read_s = self.rates.disk_read_s(bytes, run);
        for home in [WeightHome::DiskShip, WeightHome::DiskCompute] {
            work.lanes.disk_to_cpu.coef[home as usize] += read_s;
            work.small.disk_to_cpu.coef[home as usize] += read_s * smallness(run);
            work.bytes.disk_to_cpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
        let per_byte = self.rates.link_s(Lane::CpuToGpu, run, false) / run;
        let away = WeightHome::ALL
            .into_iter()
            .filter(|h| h.tier() != Tier::Gpu);
        for home in away.filter(|_| self.gpu) {
            work.lanes.cpu_to_gpu.coef[home as usize] += bytes * per_byte;
            work.bytes.cpu_to_gpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
    }
}

/// What all lanes together have more than before.
fn grown(before: &PerLane<Affine>, after: &PerLane<Affine>) -> Affine {
    let mut more = Affine::default();
    for lane in Lane::ALL {
        more.add(&after[lane].minus(&before[lane]));
    }
    more
}

fn constant(value: f64) -> Affine {
    Affine {
        constant: value,
        ..Affine::default()
    }
}

fn share(index: usize, value: f64) -> Affine {
    let mut affine = Affine::default();
    affine.coef[index] = value;
    affine
}
