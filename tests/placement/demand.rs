//! What each lane has to move, counted by hand from where everything is at home: weights once a pass, a
//! sequence's cache once a step and layer, hidden rows once a stage, looked-up panels of the token table.
//! Nothing here calls the code that submits, prices or places; only the realised placement is read.

use loadmaster::dtype::Dtype;
use loadmaster::engine::Request;
use loadmaster::model::{Matrix, MatrixKind, ModelSpec};
use loadmaster::placement::{Placement, WeightHome};
use loadmaster::policy::Policy;
use loadmaster::tier::{Lane, PerLane, Tier};

const PAGE: u64 = 4096;
const ROWS_OF_A_PANEL: usize = 64;
/// Prompts pass in nearly equal chunks of at most this many rows.
const CHUNK: usize = 512;
/// Bytes of one hidden value.
const VALUE: u64 = 4;

/// One run, with lines of equal lengths: a full set of slots enters, ends and leaves together.
pub struct Count<'a> {
    pub model: &'a ModelSpec,
    pub policy: &'a Policy,
    pub placement: &'a Placement,
    /// Of each matrix in the packed file.
    pub offsets: &'a [u64],
    pub gpu: bool,
    bytes: PerLane<u64>,
}

/// One sequence in one pass.
struct Item<'a> {
    slot: usize,
    past: u64,
    ids: &'a [u32],
}

fn pages(from: u64, to: u64) -> u64 {
    to.div_ceil(PAGE) * PAGE - from / PAGE * PAGE
}

impl<'a> Count<'a> {
    pub fn new(
        (model, policy, placement): (&'a ModelSpec, &'a Policy, &'a Placement),
        offsets: &'a [u64],
        gpu: bool,
    ) -> Self {
        let bytes = PerLane::default();
        Count {
            model,
            policy,
            placement,
            offsets,
            gpu,
            bytes,
        }
    }

    /// All passes over all lines. `generated` are each line's tokens, of equal number.
    pub fn run(mut self, lines: &[Request], generated: &[Vec<u32>]) -> PerLane<u64> {
        let slots = self.policy.gpu_batch_size * self.policy.num_gpu_batches;
        let whole = |line: &Request| -> Vec<u32> {
            let drawn = &generated[line.line];
            line.prompt.iter().chain(drawn).copied().collect()
        };
        let tokens: Vec<Vec<u32>> = lines.iter().map(whole).collect();
        for wave in tokens.chunks(slots) {
            let prompt = lines[0].prompt.len();
            for step in 0..lines[0].max_tokens {
                let from = if step == 0 { 0 } else { prompt + step - 1 };
                let item = |(slot, ids): (usize, &'_ Vec<u32>)| {
                    (slot, from, ids[from..prompt + step].to_vec())
                };
                let rows: Vec<(usize, usize, Vec<u32>)> =
                    wave.iter().enumerate().map(item).collect();
                let items: Vec<Item> = rows
                    .iter()
                    .map(|(slot, past, ids)| Item {
                        slot: *slot,
                        past: *past as u64,
                        ids,
                    })
                    .collect();
                self.pass(&items);
            }
        }
        self.bytes
    }

    fn add(&mut self, lane: Lane, bytes: u64) {
        self.bytes[lane] += bytes;
    }

    fn pass(&mut self, items: &[Item]) {
        self.weights();
        let size = self.policy.gpu_batch_size;
        for batch in items.chunk_by(|a, b| a.slot / size == b.slot / size) {
            let rows: usize = batch.iter().map(|i| i.ids.len()).sum();
            let each = rows.div_ceil(rows.div_ceil(CHUNK));
            let ids: Vec<u32> = batch.iter().flat_map(|i| i.ids).copied().collect();
            for chunk in ids.chunks(each) {
                self.lookups(chunk);
                self.products_beside(chunk.len(), |kind| kind != MatrixKind::Head);
            }
            for item in batch {
                self.cache(item);
                self.hidden(item);
            }
        }
        self.products_beside(items.len(), |kind| kind == MatrixKind::Head);
        if self.gpu {
            let logits = items.len() * self.model.vocab;
            self.add(Lane::GpuToCpu, logits as u64 * VALUE);
        }
    }

    fn panel_bytes(&self, matrix: &Matrix) -> u64 {
        let (rows, k) = (ROWS_OF_A_PANEL as u64, matrix.inputs as u64);
        let table = matches!(matrix.kind, MatrixKind::Head | MatrixKind::Embedding);
        match self.model.dtype {
            _ if self.policy.compress_weight && !table => rows * k.div_ceil(64) * 36,
            Dtype::F32 => rows * k * 4,
            _ => rows * k * 2,
        }
    }

    /// Panels [from, to) of a matrix at one home.
    fn range(&self, index: usize, home: WeightHome) -> std::ops::Range<usize> {
        let counts = self.placement.splits[index].panels;
        let from: usize = counts[..home as usize].iter().sum();
        from..from + counts[home as usize]
    }

    /// Every panel that is not where it is multiplied comes once a pass.
    fn weights(&mut self) {
        for index in 0..self.placement.matrices.len() {
            let matrix = self.placement.matrices[index];
            let panel = self.panel_bytes(&matrix);
            for home in [WeightHome::DiskShip, WeightHome::DiskCompute] {
                let r = self.range(index, home);
                let at = |panels: usize| self.offsets[index] + panels as u64 * panel;
                if !r.is_empty() {
                    self.add(Lane::DiskToCpu, pages(at(r.start), at(r.end)));
                }
            }
            for home in [WeightHome::CpuShip, WeightHome::DiskShip] {
                let shipped = self.range(index, home).len() as u64 * panel;
                if self.gpu {
                    self.add(Lane::CpuToGpu, shipped);
                }
            }
        }
    }

    /// Panels of the (tied) token table that are away from the computing device, in runs of neighbours
    /// with one home.
    fn lookups(&mut self, ids: &[u32]) {
        let index = self.placement.matrices.len() - 1;
        let panel = self.panel_bytes(&self.placement.matrices[index]);
        let home_of = |p: usize| {
            WeightHome::ALL
                .into_iter()
                .find(|&h| self.range(index, h).contains(&p))
        };
        let mut wanted: Vec<usize> = ids
            .iter()
            .map(|&id| id as usize / ROWS_OF_A_PANEL)
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let here = |home| match self.gpu {
            true => home == WeightHome::Gpu,
            false => home == WeightHome::CpuCompute,
        };
        let away: Vec<(usize, WeightHome)> = wanted
            .into_iter()
            .map(|p| (p, home_of(p).expect("every panel is somewhere")))
            .filter(|&(_, home)| !here(home))
            .collect();
        for run in away.chunk_by(|a, b| a.0 + 1 == b.0 && a.1 == b.1) {
            let bytes = run.len() as u64 * panel;
            let start = self.offsets[index] + run[0].0 as u64 * panel;
            if run[0].1.tier() == Tier::Disk {
                self.add(Lane::DiskToCpu, pages(start, start + bytes));
            }
            if self.gpu {
                self.add(Lane::CpuToGpu, bytes);
            }
        }
    }

    /// Rows that the CPU multiplies for a GPU: inputs down once a product, its columns up.
    fn products_beside(&mut self, m: usize, which: impl Fn(MatrixKind) -> bool) {
        if !self.gpu {
            return;
        }
        for index in 0..self.placement.matrices.len() {
            let matrix = self.placement.matrices[index];
            let on_cpu = [WeightHome::CpuCompute, WeightHome::DiskCompute];
            let columns = |home| {
                let r = self.range(index, home);
                let rows = |panels: usize| matrix.rows.min(panels * ROWS_OF_A_PANEL);
                rows(r.end) - rows(r.start)
            };
            let columns: usize = on_cpu.into_iter().map(columns).sum();
            if columns > 0 && which(matrix.kind) {
                self.add(Lane::GpuToCpu, (m * matrix.inputs) as u64 * VALUE);
                self.add(Lane::CpuToGpu, (m * columns) as u64 * VALUE);
            }
        }
    }

    fn record(&self) -> u64 {
        let width = self.model.hidden as u64;
        2 * match self.policy.kv {
            _ if self.policy.compress_cache => width.div_ceil(64) * 36,
            Dtype::F32 => width * 4,
            _ => width * 2,
        }
    }

    /// A sequence's cache: old records to where it is attended, new ones home, in every layer.
    fn cache(&mut self, item: &Item) {
        let home = self.placement.cache_tiers[item.slot];
        let (layers, record, new) = (
            self.model.layers as u64,
            self.record(),
            item.ids.len() as u64,
        );
        let (old_end, new_end) = (item.past * record, (item.past + new) * record);
        if home == Tier::Disk {
            self.add(Lane::DiskToCpu, layers * pages(0, old_end));
            self.add(Lane::CpuToDisk, layers * pages(old_end, new_end));
        }
        let beside = self.gpu && home != Tier::Gpu;
        let width = self.model.hidden as u64 * VALUE;
        if beside && self.policy.cpu_cache_compute {
            self.add(Lane::GpuToCpu, layers * new * 3 * width);
            self.add(Lane::CpuToGpu, layers * new * width);
        } else if beside {
            self.add(Lane::CpuToGpu, layers * old_end);
            self.add(Lane::GpuToCpu, layers * new * record);
        }
    }

    /// Hidden rows leave every stage but the head and come to every stage but the embedding.
    fn hidden(&mut self, item: &Item) {
        let home = self.placement.hidden_tiers[item.slot];
        let bytes = item.ids.len() as u64 * self.model.hidden as u64 * VALUE;
        let stages = self.model.layers as u64 + 1;
        if home == Tier::Disk {
            self.add(Lane::DiskToCpu, stages * pages(0, bytes));
            self.add(Lane::CpuToDisk, stages * pages(0, bytes));
        }
        if self.gpu && home != Tier::Gpu {
            self.add(Lane::CpuToGpu, stages * bytes);
            self.add(Lane::GpuToCpu, stages * bytes);
        }
    }
}
