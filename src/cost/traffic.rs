//! What moves besides weights: copies over the links, cached tokens, hidden states and rows of the token
//! table on their way to where they are computed with and back home, as affine terms.

use crate::cost::affine::{Affine, CACHE, HIDDEN};
use crate::cost::footprint::{Buffer, HIDDEN_VALUE_BYTES, embedding_piece_bytes};
use crate::cost::layer::LayerBuilder;
use crate::cost::load::Load;
use crate::cost::steps::Step;
use crate::cost::terms::Work;
use crate::model::{Matrix, MatrixKind};
use crate::placement::WeightHome;
use crate::tier::{Lane, Phase, Tier};
use crate::units::PAGE_BYTES;

/// Equal copies over a link: `count` of them, each of the home's share of `bytes`.
#[derive(Clone, Copy)]
pub(super) struct Copies {
    /// Whose share; None where the whole moves whatever the shares.
    pub home: Option<usize>,
    /// The share that really travels in one copy, together with other homes': it sets the rate.
    pub part: f64,
    pub count: f64,
    pub bytes: f64,
    /// Where they come from or go to in DRAM.
    pub dram: Buffer,
}

impl Copies {
    pub fn one(bytes: f64, dram: Buffer) -> Self {
        Copies {
            home: None,
            part: 1.0,
            count: 1.0,
            bytes,
            dram,
        }
    }
}

impl LayerBuilder<'_> {
    /// Bytes that computing passes from one chunk's product with a matrix to the next chunk's.
    pub(super) fn between_bytes(&self, step: &Step) -> f64 {
        let chunks = step.chunks();
        let passes: f64 = chunks.iter().map(|c| c.1).sum();
        let rows: f64 = chunks.iter().map(|c| c.0 * c.1).sum();
        let width = |m: &Matrix| (m.inputs + m.rows) as u64 * HIDDEN_VALUE_BYTES;
        let row_bytes = self.layer.iter().map(width).sum::<u64>() as f64;
        let kv_bytes = match step.phase {
            Phase::Decode => self.kv_bytes(step),
            Phase::Prefill => 0.0,
        };
        self.layer_bytes() + (rows * row_bytes + kv_bytes) / passes.max(1.0)
    }

    /// Cached keys and values that a step's attention reads in a layer.
    pub(super) fn kv_bytes(&self, step: &Step) -> f64 {
        let record = self.model.kv_record_bytes(self.policy.kv_format()) as f64;
        step.sequences() * step.context * record
    }

    /// Whether copies take a buffer of DRAM straight.
    pub(super) fn is_locked(&self, buffer: Buffer) -> bool {
        let wanted = buffer != Buffer::Weights || self.policy.pin_weight;
        wanted && self.rates.takes(buffer)
    }

    /// Adds copies to a lane; returns their seconds.
    pub(super) fn copy(&self, work: &mut Work, lane: Lane, copies: &Copies) -> Affine {
        let of = |value: f64| {
            copies
                .home
                .map_or(constant(value), |home| share(home, value))
        };
        let pinned = self.is_locked(copies.dram);
        let one_s = self.rates.link_s(lane, copies.part * copies.bytes, pinned);
        let seconds = of(copies.count * one_s / copies.part);
        let bytes = of(copies.count * copies.bytes);
        work.lanes[lane].add(&seconds);
        work.bytes[lane].add(&bytes);
        work.dram_bytes.add(&bytes);
        seconds
    }

    /// Cached tokens on their way to attention and back home.
    pub(super) fn cache_traffic(&self, work: &mut Work, step: &Step) {
        let record = self.model.kv_record_bytes(self.policy.kv_format());
        let fresh = step.rows * record as f64;
        // A fresh sequence's prefill finds nothing in the cache.
        let past = match step.phase {
            Phase::Decode => (step.context - step.rows).max(0.0),
            Phase::Prefill => 0.0,
        };
        let old = past * record as f64;
        let (read, write) = (pages_of(past, record), self.written(step, record));
        let disk = CACHE + Tier::Disk as usize;
        for &(n, count) in &step.batches {
            self.disk_pieces(work, (Lane::DiskToCpu, disk), (n, count, read));
            self.disk_pieces(work, (Lane::CpuToDisk, disk), (n, count, write));
        }
        work.cache.disk_to_cpu = share(disk, work.lanes.disk_to_cpu.coef[disk]);
        work.cache.cpu_to_disk = share(disk, work.lanes.cpu_to_disk.coef[disk]);
        if !self.gpu || self.policy.cpu_cache_compute {
            return;
        }
        let homes = [Tier::Cpu, Tier::Disk].map(|home| CACHE + home as usize);
        for (home, dram) in homes.into_iter().zip([Buffer::Cache, Buffer::CacheStage]) {
            for &(n, count) in &step.batches {
                let copies = |bytes: f64| Copies {
                    home: Some(home),
                    part: whole(self.part(&homes), n),
                    count,
                    bytes: n * bytes,
                    dram,
                };
                let up = self.copy(work, Lane::CpuToGpu, &copies(old));
                let down = self.copy(work, Lane::GpuToCpu, &copies(fresh));
                work.cache.cpu_to_gpu.add(&up);
                work.cache.gpu_to_cpu.add(&down);
            }
        }
    }

    /// Bytes that a sequence's new records take in whole pages of the spill file.
    fn written(&self, step: &Step, record: u64) -> f64 {
        let fresh = step.rows * record as f64;
        match step.phase {
            // The first records begin at a page.
            Phase::Prefill => whole_pages(fresh),
            Phase::Decode => spanned_bytes(fresh, record),
        }
    }

    /// Items of one home on disk: `n` a batch at equal shares, `count` batches, so many bytes each.
    fn disk_pieces(
        &self,
        work: &mut Work,
        (lane, home): (Lane, usize),
        (n, count, bytes): (f64, f64, f64),
    ) {
        let part = whole(self.part(&[home]), n);
        let batch = part * n * bytes;
        let one_s = match lane {
            Lane::DiskToCpu => self.rates.disk_read_s(batch, bytes),
            _ => self.rates.disk_write_s(batch, bytes, false),
        };
        let seconds = count * one_s / part;
        let load = Load::of_disk(lane, one_s, (batch, bytes));
        work.moves((lane, home), seconds, load);
        work.bytes[lane].coef[home] += count * n * bytes;
        work.dram_bytes.coef[home] += count * n * bytes;
    }

    /// Hidden states that are at home elsewhere come before a layer and go back after it; the first
    /// layer's come from the embedding and the last layer's go to the head.
    pub(super) fn hidden_traffic(&self, work: &mut Work, step: &Step) {
        // Loads before every layer and the head, stores after every layer and the embedding.
        let visits = 1.0 + 1.0 / self.model.layers as f64;
        let sequence = step.rows * self.hidden_row_bytes();
        let block = whole_pages(sequence);
        let disk = HIDDEN + Tier::Disk as usize;
        let before = (work.lanes.disk_to_cpu, work.lanes.cpu_to_disk);
        for &(n, count) in &step.batches {
            for lane in [Lane::DiskToCpu, Lane::CpuToDisk] {
                self.disk_pieces(work, (lane, disk), (n, visits * count, block));
            }
        }
        work.hidden.disk_to_cpu = work.lanes.disk_to_cpu.minus(&before.0);
        work.hidden.cpu_to_disk = work.lanes.cpu_to_disk.minus(&before.1);
        if !self.gpu {
            return;
        }
        let homes = [Tier::Cpu, Tier::Disk].map(|home| HIDDEN + home as usize);
        for (home, dram) in homes.into_iter().zip([Buffer::Hidden, Buffer::HiddenStage]) {
            for &(n, count) in &step.batches {
                let copies = Copies {
                    home: Some(home),
                    part: whole(self.part(&homes), n),
                    count: visits * count,
                    bytes: n * sequence,
                    dram,
                };
                for lane in [Lane::CpuToGpu, Lane::GpuToCpu] {
                    let seconds = self.copy(work, lane, &copies);
                    work.hidden[lane].add(&seconds);
                }
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
        let load = Load::of_disk(Lane::DiskToCpu, read_s, (bytes, run));
        for home in [WeightHome::DiskShip, WeightHome::DiskCompute] {
            work.moves((Lane::DiskToCpu, home as usize), read_s, load);
            work.bytes.disk_to_cpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
        let per_byte = |home: WeightHome| {
            let dram = match home.tier() {
                Tier::Disk => Buffer::EmbeddingStage,
                _ => Buffer::Weights,
            };
            self.rates.link_s(Lane::CpuToGpu, run, self.is_locked(dram)) / run
        };
        let away = WeightHome::ALL
            .into_iter()
            .filter(|h| h.tier() != Tier::Gpu);
        for home in away.filter(|_| self.gpu) {
            work.lanes.cpu_to_gpu.coef[home as usize] += bytes * per_byte(home);
            work.bytes.cpu_to_gpu.coef[home as usize] += bytes;
            work.dram_bytes.coef[home as usize] += bytes;
        }
    }
}

/// A part of a batch of `sequences` is no less than one of them: with less, some batches have none.
pub(super) fn whole(part: f64, sequences: f64) -> f64 {
    part.max(1.0 / sequences.max(1.0))
}

/// Bytes in whole pages.
fn whole_pages(bytes: f64) -> f64 {
    (bytes / PAGE_BYTES as f64).ceil() * PAGE_BYTES as f64
}

/// Mean bytes of the pages that `count` records span which begin at a page: `count` being a stretch's mean.
fn pages_of(count: f64, record: u64) -> f64 {
    let more = if count > 0.0 {
        (PAGE_BYTES - common_divisor(record)) as f64 / 2.0
    } else {
        0.0
    };
    count * record as f64 + more
}

/// Mean bytes of the pages that `bytes` span which begin anywhere at multiples of `unit`.
pub(super) fn spanned_bytes(bytes: f64, unit: u64) -> f64 {
    bytes + (PAGE_BYTES - common_divisor(unit)) as f64
}

/// Of a size and a page.
fn common_divisor(bytes: u64) -> u64 {
    1 << bytes.trailing_zeros().min(PAGE_BYTES.trailing_zeros())
}

pub(super) fn constant(value: f64) -> Affine {
    Affine {
        constant: value,
        ..Affine::default()
    }
}

pub(super) fn share(index: usize, value: f64) -> Affine {
    let mut affine = Affine::default();
    affine.coef[index] = value;
    affine
}
