//! The state that all six tasks share: the machine, where things lie, and what has to be waited for.
//! The tasks themselves are in forward.rs (compute), visits.rs (cache and hidden state) and weights.rs.

use super::cache::CachePool;
use super::layout::{HiddenSpace, Layout};
use super::schedule::{Schedule, Task, TaskKind, hidden_parts};
use super::step::{Step, StepRules};
use super::turns::Turns;
use super::visits::Visits;
use super::weights::WeightStream;
use crate::cost::footprint::{BlockShape, Buffer, Footprint, HIDDEN_VALUE_BYTES, compute_tier};
use crate::cost::locks::Unlocked;
use crate::cost::spill::OwnRows;
use crate::dtype::{Dtype, WeightLayout};
use crate::machine::ops::{Compute, Copy2d, FileId, HiddenRows, Op, Table};
use crate::machine::{Fence, Fences, Machine};
use crate::model::{MatrixKind, ModelSpec, POSITION_OFFSET, SmallKind};
use crate::placement::{Placement, WeightHome};
use crate::policy::{DeviceKind, Policy};
use crate::tier::{Lane, Tier};
use std::sync::Arc;

/// A run's fixed facts.
#[derive(Clone)]
pub struct RunFacts {
    pub model: ModelSpec,
    pub policy: Policy,
    pub placement: Placement,
    pub block: BlockShape,
    pub footprint: Footprint,
    pub device: DeviceKind,
    /// Offset of each matrix in the store file.
    pub matrix_offsets: Vec<u64>,
    /// Rows on disk that are not taken from there.
    pub own: OwnRows,
    /// False where rows of the token table are priced by themselves (replay.rs): none are fetched then.
    pub fetches_tokens: bool,
    /// What of the DRAM could not be page-locked.
    pub unlocked: Unlocked,
}

impl RunFacts {
    /// Bytes of the cache's file; none where all of the cache is in memory.
    pub fn cache_file_bytes(&self) -> u64 {
        self.footprint.spill.cache * u64::from(self.block.kv_tokens.disk > 0)
    }

    /// Whether copies take a buffer of DRAM straight.
    pub fn is_locked(&self, buffer: Buffer) -> bool {
        let wanted = buffer != Buffer::Weights || self.policy.pin_weight;
        wanted && !self.unlocked.has(buffer)
    }

    /// File and offset of a panel of the token table.
    pub fn looked_up(&self, panel: usize) -> (FileId, u64) {
        match self.own.looked_up(&self.placement, panel) {
            Some(offset) => (FileId::ROWS, offset),
            None => (FileId::STORE, self.in_store(self.placement.table(), panel)),
        }
    }

    /// The layout in which panels at a home are multiplied.
    pub fn layout_at(&self, home: WeightHome) -> WeightLayout {
        match home {
            WeightHome::CpuCompute | WeightHome::DiskCompute => WeightLayout::CpuPanel64,
            _ => self.device.weight_layout(),
        }
    }

    /// Format and inputs of a matrix.
    pub fn form(&self, index: usize) -> (Dtype, usize) {
        let matrix = self.placement.matrices[index];
        let format = matrix.format(self.model.dtype, self.policy.compress_weight);
        (format, matrix.inputs)
    }

    /// Offset of a panel in the store file.
    pub fn in_store(&self, index: usize, panel: usize) -> u64 {
        self.matrix_offsets[index] + panel as u64 * self.placement.panel_bytes[index]
    }
}

/// The engine between two passes.
pub struct Core<'m> {
    pub machine: Turns<'m>,
    pub facts: RunFacts,
    pub layout: Layout,
    pub hidden: HiddenSpace,
    pub stream: WeightStream,
    pub pool: CachePool,
    pub visits: Visits,
    pub compute: Tier,
    pub lane: Lane,
    /// What the next operation on the compute lane has to come after.
    pub join: Fences,
    /// Newest operation on the compute lane.
    pub last: Fence,
    /// Rows that the CPU attends to for a batch under way: how they come up, and after what.
    pub attended: [Option<(Vec<Copy2d>, Fence)>; 2],
    /// When the token table's half in DRAM, and on the device, may be overwritten.
    pub embedding_sent: [Fences; 2],
    pub embedding_done: [Fences; 2],
    pub embedding_half: usize,
    pub pass: u64,
    /// 0, 1, 2, ...: rows of contiguous buffers.
    pub identity: Arc<[u32]>,
}

impl<'m> Core<'m> {
    pub fn new(machine: &'m mut dyn Machine, facts: RunFacts) -> Self {
        let layout = Layout::new(&facts.model, &facts.placement, &facts.footprint);
        let row_bytes = facts.model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let compute = compute_tier(facts.device);
        let lane = if compute == Tier::Gpu {
            Lane::GpuCompute
        } else {
            Lane::CpuCompute
        };
        let stream = WeightStream::new(&facts, &layout);
        let record = facts.model.kv_record_bytes(facts.policy.kv_format());
        Core {
            machine: Turns::new(machine),
            hidden: HiddenSpace::new(&layout, facts.device, row_bytes),
            stream,
            pool: CachePool::new(&facts.block, record),
            visits: Visits::new(facts.model.stages(), facts.policy.num_gpu_batches),
            compute,
            lane,
            join: Fences::none(),
            last: Fence { lane, number: 0 },
            attended: [None, None],
            embedding_sent: [Fences::none(); 2],
            embedding_done: [Fences::none(); 2],
            embedding_half: 0,
            pass: 0,
            identity: (0..facts.block.chunk_rows as u32).collect(),
            layout,
            facts,
        }
    }

    pub fn step_rules(&self) -> StepRules {
        let staggers = self
            .facts
            .block
            .staggers(&self.facts.policy, self.facts.device);
        StepRules {
            gpu_batch_size: self.facts.policy.gpu_batch_size,
            batches: self.facts.policy.num_gpu_batches,
            chunk_rows: self.facts.block.chunk_rows as usize,
            compute: self.compute,
            hidden_tiers: self.facts.placement.hidden_tiers.clone(),
            hidden_row_bytes: self.hidden.row_bytes,
            stage_rows: self.hidden.parts(hidden_parts(false)),
            staggered_rows: staggers.then(|| self.hidden.parts(hidden_parts(true))),
            step_rows: self.hidden.step_rows,
            position_offset: POSITION_OFFSET,
            reads_rows: self.facts.fetches_tokens,
        }
    }

    /// One pass over all stages: submits every task of the schedule; with overlap off, each after the one before.
    /// Returns what has to be waited for before the logits can be read.
    /// `more` says whether another pass will follow, so that its first weights can be on their way.
    pub fn run_pass(&mut self, step: &Step, more: bool) -> Fences {
        self.machine.set_phase(step.phase);
        let schedule = Schedule {
            stages: self.facts.model.stages(),
            batches: self.facts.policy.num_gpu_batches,
            staggered: step.staggered,
        };
        self.visits.begin_pass(hidden_parts(step.staggered));
        for task in schedule.pass().filter(|task| more || !task.next_pass) {
            self.run_task(step, task);
            if !self.facts.policy.overlap {
                self.machine.next();
            }
        }
        self.pass += 1;
        self.made()
    }

    fn run_task(&mut self, step: &Step, task: Task) {
        let batch = &step.batches[task.batch];
        match task.kind {
            TaskKind::LoadWeight => self.load_weight(task),
            _ if batch.rows == 0 && !self.is_last_compute(task) => {}
            TaskKind::LoadCache => self.load_cache(batch, task),
            TaskKind::LoadHidden => self.load_hidden(batch, task),
            TaskKind::Compute => self.compute_task(step, task),
            TaskKind::Begin => self.begin_task(step, task),
            TaskKind::End => self.end_task(step, task),
            TaskKind::StoreCache => self.store_cache(batch, task),
            TaskKind::StoreHidden => self.store_hidden(batch, task),
        }
    }

    /// The head's products come with the last batch, even when that one is empty.
    fn is_last_compute(&self, task: Task) -> bool {
        let last = task.batch + 1 == self.facts.policy.num_gpu_batches;
        task.kind == TaskKind::Compute && last
    }

    fn load_weight(&mut self, task: Task) {
        if self.stream.is_empty() {
            return;
        }
        let pass = self.pass + task.next_pass as u64;
        let part = (task.batch, self.facts.policy.num_gpu_batches);
        self.stream
            .prefetch(&mut self.machine, (pass, task.stage), part);
        if task.next_pass {
            self.stream.prefetch(&mut self.machine, (pass, 1), part);
        }
    }

    /// Submits to the compute lane, after everything that was joined.
    pub fn submit(&mut self, compute: Compute) -> Fence {
        let after = std::mem::take(&mut self.join);
        self.last = self.machine.submit(self.lane, Op::Compute(compute), &after);
        self.last
    }

    /// Queues a copy between DRAM and the GPU.
    pub fn copy(&mut self, lane: Lane, pieces: Vec<Copy2d>, after: &Fences) -> Fence {
        let up = lane == Lane::CpuToGpu;
        let dram = |piece: &Copy2d| if up { piece.from } else { piece.to };
        let refused = |buffer: &Buffer, piece: &Copy2d| {
            let place = self.layout.buffer(Tier::Cpu, *buffer);
            (place.offset..place.offset + place.bytes).contains(&dram(piece))
        };
        let unlocked = &self.facts.unlocked.0;
        let pinned = !pieces
            .iter()
            .any(|p| unlocked.iter().any(|b| refused(b, p)));
        self.machine
            .submit(lane, Op::Copy { pinned, pieces }, after)
    }

    /// What must be done before another lane may read what the compute lane made so far.
    pub fn made(&self) -> Fences {
        self.join.join(&self.last.into())
    }

    pub fn buffer(&self, buffer: Buffer) -> u64 {
        self.layout.buffer(self.compute, buffer).offset
    }

    pub fn small(&self, kind: SmallKind, stage: usize) -> Option<u64> {
        self.layout.small(self.compute, kind, stage)
    }

    pub fn matrix(&self, kind: MatrixKind, stage: usize) -> Option<usize> {
        // Matrices come stage by stage.
        let matrices = &self.facts.placement.matrices;
        let first = matrices.partition_point(|m| m.stage < stage);
        let of_stage = matrices[first..].iter().take_while(|m| m.stage == stage);
        let at = of_stage.take_while(|m| m.kind != kind).count();
        let found = matrices.get(first + at)?;
        (found.kind == kind && found.stage == stage).then_some(first + at)
    }

    /// Hidden rows of part of a batch.
    pub fn hidden_rows(&self, rows: Table) -> HiddenRows {
        HiddenRows {
            base: self.hidden.base,
            rows,
            width: self.facts.model.hidden,
        }
    }

    /// Rows 0..count of a contiguous buffer.
    pub fn plain_rows(&self, base: u64, count: usize, width: usize) -> HiddenRows {
        HiddenRows {
            base,
            rows: Table {
                entries: self.identity.clone(),
                first: 0,
                len: count,
            },
            width,
        }
    }
}
