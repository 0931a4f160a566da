//! The tasks that bring cache and hidden state to where they are computed with and back home:
//! load_cache, store_cache, load_hidden, store_hidden. Two batches can visit at a time, in two halves
//! of each stage buffer; half = parity of the step (stage · batches + batch). In a staggered pass hidden
//! states have as many parts as schedule.rs says.

use super::cache::CacheHome;
use super::core::Core;
use super::layout::Place;
use super::schedule::Task;
use super::step::{BatchStep, StepItem};
use crate::cost::footprint::Buffer;
use crate::machine::ops::{Copy2d, FileId, FileSpan, KvPlace, KvSlots, Op};
use crate::machine::{Fence, Fences, Machine};
use crate::tier::{Lane, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::collections::HashMap;

/// Where the visiting items of one (stage, batch) have their cache while they are computed with.
#[derive(Clone, Debug, Default)]
struct CacheVisit {
    /// Per item: its place on the attention's tier; None for items that are at home there.
    places: Vec<Option<KvPlace>>,
    /// Per item at home on disk: its bytes in the Cpu stage.
    staged: Vec<Option<u64>>,
    ready: Fences,
    used: Fences,
}

/// What is visiting, and when its room is free again.
pub struct Visits {
    batches: usize,
    cache: HashMap<(usize, usize), CacheVisit>,
    cache_free: [Fences; 2],
    /// Per (stage, batch): when the last pass's new records are home.
    cache_stored: Vec<Fences>,
    hidden_parts: usize,
    hidden_free: Vec<Fences>,
    hidden_stored: Vec<Fences>,
    hidden_ready: Vec<Fences>,
    /// Per batch: when its newest rows are there.
    hidden_made: Vec<Fences>,
    part_of_batch: Vec<usize>,
}

impl Visits {
    pub fn new(stages: usize, batches: usize) -> Self {
        Visits {
            batches,
            cache: HashMap::new(),
            cache_free: [Fences::none(); 2],
            cache_stored: vec![Fences::none(); stages * batches],
            hidden_parts: 2,
            hidden_free: vec![Fences::none(); 2],
            hidden_stored: vec![Fences::none(); batches],
            hidden_ready: vec![Fences::none(); batches],
            hidden_made: vec![Fences::none(); batches],
            part_of_batch: vec![0; batches],
        }
    }

    /// Everything has left when a pass begins: its logits have been waited for.
    pub fn begin_pass(&mut self, hidden_parts: usize) {
        self.hidden_parts = hidden_parts;
        self.hidden_free.resize(hidden_parts, Fences::none());
    }

    fn step(&self, stage: usize, batch: usize) -> usize {
        stage * self.batches + batch
    }

    /// Of what is staged for, or comes from, attention.
    pub fn half(&self, stage: usize, batch: usize) -> usize {
        self.step(stage, batch) % 2
    }

    fn hidden_part(&self, stage: usize, batch: usize) -> usize {
        self.step(stage, batch) % self.hidden_parts
    }

    pub fn cache_ready(&self, stage: usize, batch: usize) -> Fences {
        self.cache
            .get(&(stage, batch))
            .map_or(Fences::none(), |visit| visit.ready)
    }

    /// Whether an item's cache is not at home where it is attended.
    pub fn visiting(&self, stage: usize, (batch, index): (usize, usize)) -> bool {
        let visit = self.cache.get(&(stage, batch));
        visit.is_some_and(|visit| visit.places[index].is_some())
    }

    /// Notes an operation that reads or writes the visiting cache.
    pub fn cache_used(&mut self, stage: usize, batch: usize, by: Fence) {
        if let Some(visit) = self.cache.get_mut(&(stage, batch)) {
            visit.used.add(by);
        }
    }

    /// The part in which a batch's hidden state visits now.
    pub fn part_of(&self, batch: usize) -> usize {
        self.part_of_batch[batch]
    }

    pub fn take_hidden_ready(&mut self, batch: usize) -> Fences {
        std::mem::take(&mut self.hidden_ready[batch])
    }

    /// Says after what a batch's rows may go home.
    pub fn hidden_made(&mut self, batch: usize, by: Fences) {
        self.hidden_made[batch] = by;
    }

    /// The head leaves nothing to store: its visiting rows are free once read.
    pub fn end_hidden_visit(&mut self, batch: usize, last: Fence) {
        let part = self.part_of_batch[batch];
        self.hidden_free[part].add(last);
    }
}

/// Hands out one part of a stage buffer.
struct StagePart {
    next: u64,
    align: u64,
}

impl StagePart {
    fn new(place: Place, (part, parts): (usize, usize), align: u64) -> Self {
        StagePart {
            next: place.part(part, parts),
            align,
        }
    }

    fn take(&mut self, bytes: u64) -> u64 {
        let at = round_up(self.next, self.align);
        self.next = at + bytes;
        at
    }
}

impl Core<'_> {
    /// The tier on which an item's attention runs.
    fn attention_tier(&self, home: Tier) -> Tier {
        let beside = self.compute == Tier::Gpu && self.facts.policy.cpu_cache_compute;
        if home != self.compute && beside {
            Tier::Cpu
        } else {
            self.compute
        }
    }

    fn record_bytes(&self) -> u64 {
        self.facts
            .model
            .kv_record_bytes(self.facts.policy.kv_format())
    }

    /// Where attention finds an item's cache: at home, or visiting.
    pub fn cache_place(
        &self,
        item: &StepItem,
        stage: usize,
        (batch, index): (usize, usize),
    ) -> (Tier, KvPlace) {
        let tier = self.attention_tier(item.cache.tier());
        let visit = self
            .visits
            .cache
            .get(&(stage, batch))
            .and_then(|v| v.places[index].clone());
        let place = visit.unwrap_or_else(|| self.home_place(item, stage));
        (tier, place)
    }

    fn home_place(&self, item: &StepItem, stage: usize) -> KvPlace {
        let CacheHome::Memory { tier, slots } = &item.cache else {
            unreachable!("a sequence at home on disk visits for its attention");
        };
        let layer = self.pool.layer_bytes[*tier];
        let base = self.layout.buffer(*tier, Buffer::Cache).offset + (stage as u64 - 1) * layer;
        KvPlace {
            base,
            capacity: layer / self.record_bytes(),
            slots: KvSlots::Table(slots.clone()),
        }
    }

    /// load_cache(i, j, k): records of visiting items so far, from disk or across the link.
    pub fn load_cache(&mut self, batch: &BatchStep, task: Task) {
        let visiting = |i: &StepItem| self.attention_tier(i.cache.tier()) != i.cache.tier();
        if !batch.items.iter().any(visiting) {
            return;
        }
        let half = self.visits.half(task.stage, task.batch);
        let free = self.visits.cache_free[half]
            .join(&self.visits.cache_stored[self.visits.step(task.stage, task.batch)]);
        let stage = |tier| self.layout.buffer(tier, Buffer::CacheStage);
        let mut cpu = StagePart::new(stage(Tier::Cpu), (half, 2), PAGE_BYTES);
        let mut gpu = StagePart::new(stage(Tier::Gpu), (half, 2), 64);
        let mut visit = CacheVisit {
            ready: free,
            ..CacheVisit::default()
        };
        let (mut reads, mut ups) = (Vec::new(), Vec::new());
        for item in &batch.items {
            let bytes = (item.past + item.rows) as u64 * self.record_bytes();
            let past_bytes = item.past as u64 * self.record_bytes();
            let tier = self.attention_tier(item.cache.tier());
            let staged =
                (item.cache.tier() == Tier::Disk).then(|| cpu.take(round_up(bytes, PAGE_BYTES)));
            reads.extend(
                staged.and_then(|at| self.spill_span(item, task.stage, (0, past_bytes, at))),
            );
            let place = (tier != item.cache.tier()).then(|| match tier {
                Tier::Gpu => gpu.take(bytes),
                _ => staged.unwrap_or_default(),
            });
            if let (Some(to), Tier::Gpu) = (place, tier) {
                ups.extend(self.records_up(item, task.stage, (staged, to)));
            }
            visit.staged.push(staged);
            let capacity = (item.past + item.rows) as u64;
            visit.places.push(place.map(|base| KvPlace {
                base,
                capacity,
                slots: KvSlots::Contiguous,
            }));
        }
        self.submit_loads((reads, ups), &mut visit.ready);
        self.visits.cache.insert((task.stage, task.batch), visit);
    }

    /// Each comes after the one before, so the last one stands for all.
    fn submit_loads(&mut self, (reads, ups): (Vec<FileSpan>, Vec<Copy2d>), ready: &mut Fences) {
        if !reads.is_empty() {
            *ready = self
                .machine
                .submit(Lane::DiskToCpu, Op::Read(reads), ready)
                .into();
        }
        if !ups.is_empty() {
            *ready = self.copy(Lane::CpuToGpu, ups, ready).into();
        }
    }

    /// Part [from, to) of an item's records in the spill file, rounded out to pages.
    fn spill_span(
        &self,
        item: &StepItem,
        stage: usize,
        (from, to, staged): (u64, u64, u64),
    ) -> Option<FileSpan> {
        let CacheHome::Disk { offset } = item.cache else {
            return None;
        };
        let start = from / PAGE_BYTES * PAGE_BYTES;
        let bytes = round_up(to - start, PAGE_BYTES);
        let layer = (stage as u64 - 1) * self.pool.layer_bytes.disk;
        let span = FileSpan {
            file: FileId::CACHE,
            offset: layer + offset + start,
            memory: staged + start,
            bytes,
        };
        (to > from).then_some(span)
    }

    /// Records so far, from DRAM (at home, or just read from disk) to their visit on the GPU.
    fn records_up(
        &self,
        item: &StepItem,
        stage: usize,
        (staged, to): (Option<u64>, u64),
    ) -> Vec<Copy2d> {
        let record = self.record_bytes();
        if item.past == 0 {
            return Vec::new();
        }
        match staged {
            Some(from) => vec![Copy2d::flat(from, to, item.past as u64 * record)],
            None => self
                .home_runs(item, stage, 0..item.past)
                .map(|(home, first, bytes)| Copy2d::flat(home, to + first as u64 * record, bytes))
                .collect(),
        }
    }

    /// Runs of neighbouring token slots: (offset at home, first token, bytes).
    fn home_runs(
        &self,
        item: &StepItem,
        stage: usize,
        tokens: std::ops::Range<usize>,
    ) -> impl Iterator<Item = (u64, usize, u64)> {
        let record = self.record_bytes();
        let place = self.home_place(item, stage);
        let KvSlots::Table(slots) = place.slots else {
            unreachable!("home slots are a table")
        };
        let mut runs: Vec<(u64, usize, u64)> = Vec::new();
        for token in tokens {
            let at = place.base + slots[token] as u64 * record;
            match runs.last_mut() {
                Some((home, _, bytes)) if *home + *bytes == at => *bytes += record,
                _ => runs.push((at, token, record)),
            }
        }
        runs.into_iter()
    }

    /// store_cache(i, j, k): new records of visiting items home.
    pub fn store_cache(&mut self, batch: &BatchStep, task: Task) {
        let Some(visit) = self.visits.cache.remove(&(task.stage, task.batch)) else {
            return;
        };
        let record = self.record_bytes();
        let (mut downs, mut writes) = (Vec::new(), Vec::new());
        for (index, item) in batch.items.iter().enumerate() {
            let Some(place) = &visit.places[index] else {
                continue;
            };
            let (from, to) = (
                item.past as u64 * record,
                (item.past + item.rows) as u64 * record,
            );
            let on_gpu = self.attention_tier(item.cache.tier()) == Tier::Gpu;
            if let Some(at) = visit.staged[index] {
                if on_gpu {
                    downs.push(Copy2d::flat(place.base + from, at + from, to - from));
                }
                writes.extend(self.spill_span(item, task.stage, (from, to, at)));
            } else if on_gpu {
                let runs = self.home_runs(item, task.stage, item.past..item.past + item.rows);
                downs.extend(runs.map(|(home, first, bytes)| {
                    Copy2d::flat(place.base + first as u64 * record, home, bytes)
                }));
            }
        }
        let done = self.submit_stores((downs, writes), visit.used);
        let half = self.visits.half(task.stage, task.batch);
        let step = self.visits.step(task.stage, task.batch);
        self.visits.cache_free[half] = done;
        self.visits.cache_stored[step] = done;
    }

    /// As `submit_loads`.
    fn submit_stores(
        &mut self,
        (downs, writes): (Vec<Copy2d>, Vec<FileSpan>),
        mut done: Fences,
    ) -> Fences {
        if !downs.is_empty() {
            done = self.copy(Lane::GpuToCpu, downs, &done).into();
        }
        if !writes.is_empty() {
            let write = Op::Write(writes);
            done = self.machine.submit(Lane::CpuToDisk, write, &done).into();
        }
        done
    }

    /// Stage 0 makes hidden rows: visiting ones are written into their part as soon as it is free.
    pub fn begin_hidden_visit(&mut self, batch: &BatchStep, task: Task) {
        let part = self.visits.hidden_part(task.stage, task.batch);
        self.visits.part_of_batch[task.batch] = part;
        if self.hidden_visitors(batch).next().is_some() {
            self.visits.hidden_ready[task.batch] = self.visits.hidden_free[part];
        }
    }

    fn hidden_visitors<'b>(
        &self,
        batch: &'b BatchStep,
    ) -> impl Iterator<Item = &'b StepItem> + use<'b> {
        let compute = self.compute;
        batch
            .items
            .iter()
            .filter(move |item| item.hidden.tier != compute)
    }

    /// load_hidden(i, j, k): rows that rest on another tier, into the part of this step.
    pub fn load_hidden(&mut self, batch: &BatchStep, task: Task) {
        let part = self.visits.hidden_part(task.stage, task.batch);
        self.visits.part_of_batch[task.batch] = part;
        let pieces = self.hidden_pieces(batch, part);
        if pieces.is_empty() {
            return;
        }
        let mut ready = self.visits.hidden_free[part].join(&self.visits.hidden_stored[task.batch]);
        let reads = pieces.iter().filter_map(|p| p.file).collect();
        let ups = pieces.iter().filter_map(|p| p.copy).collect();
        self.submit_loads((reads, ups), &mut ready);
        self.visits.hidden_ready[task.batch] = ready;
    }

    /// store_hidden(i, j, k): the same rows back home.
    pub fn store_hidden(&mut self, batch: &BatchStep, task: Task) {
        let part = self.visits.hidden_part(task.stage, task.batch);
        let pieces = self.hidden_pieces(batch, part);
        if pieces.is_empty() {
            return;
        }
        let writes = pieces.iter().filter_map(|p| p.file).collect();
        let back = |c: Copy2d| Copy2d {
            from: c.to,
            to: c.from,
            ..c
        };
        let downs = pieces.iter().filter_map(|p| p.copy.map(back)).collect();
        let made = self.visits.hidden_made[task.batch];
        let done = self.submit_stores((downs, writes), made);
        self.visits.hidden_free[part] = done;
        self.visits.hidden_stored[task.batch] = done;
    }

    /// Each visiting item's way: file to DRAM, and DRAM to the GPU where there is one.
    fn hidden_pieces(&self, batch: &BatchStep, part: usize) -> Vec<HiddenPiece> {
        let row_bytes = self.hidden.row_bytes;
        let stage = self.layout.buffer(Tier::Cpu, Buffer::HiddenStage);
        let parts = (part, self.visits.hidden_parts);
        let mut stage = StagePart::new(stage, parts, PAGE_BYTES);
        let home = self.layout.buffer(Tier::Cpu, Buffer::Hidden).offset;
        let rows = batch.tables.hidden[part].as_slice();
        let piece = |item: &StepItem| {
            let visiting = self.hidden.offset(rows[item.first_row]);
            let bytes = item.rows as u64 * row_bytes;
            let whole = round_up(bytes, PAGE_BYTES);
            let span = |memory| FileSpan {
                file: FileId::HIDDEN,
                offset: item.hidden.at,
                memory,
                bytes: whole,
            };
            match (item.hidden.tier, self.compute) {
                (Tier::Disk, Tier::Gpu) => {
                    let memory = stage.take(whole);
                    HiddenPiece {
                        file: Some(span(memory)),
                        copy: Some(Copy2d::flat(memory, visiting, bytes)),
                    }
                }
                (Tier::Disk, _) => HiddenPiece {
                    file: Some(span(visiting)),
                    copy: None,
                },
                _ => {
                    let from = home + item.hidden.at * row_bytes;
                    HiddenPiece {
                        file: None,
                        copy: Some(Copy2d::flat(from, visiting, bytes)),
                    }
                }
            }
        };
        self.hidden_visitors(batch).map(piece).collect()
    }
}

struct HiddenPiece {
    file: Option<FileSpan>,
    copy: Option<Copy2d>,
}
