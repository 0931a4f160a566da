//! One product x·Wᵀ with its rows wherever they are: at home on the compute device, visiting it through
//! the ring, or multiplied on the CPU beside a GPU. Also the token table's lookup, cut the same way.

use super::core::Core;
use crate::cost::footprint::{Buffer, HIDDEN_VALUE_BYTES, embedding_piece_bytes};
use crate::dtype::PANEL_ROWS;
use crate::machine::ops::{Compute, Copy2d, FileSpan, Gemm, HiddenRows, Op, Table};
use crate::machine::{Fence, Fences, Machine};
use crate::model::{Activation, MatrixKind, SmallKind};
use crate::placement::WeightHome;
use crate::policy::DeviceKind;
use crate::tier::{Lane, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::ops::Range;

/// out (m × rows) = act(x (m × inputs) · Wᵀ + bias).
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub kind: MatrixKind,
    pub stage: usize,
    pub x: u64,
    pub out: u64,
    pub m: usize,
    pub bias: Option<SmallKind>,
    pub activation: Option<Activation>,
    pub last_use: bool,
}

impl Product {
    pub fn bias(self, kind: SmallKind) -> Self {
        Product {
            bias: Some(kind),
            ..self
        }
    }

    pub fn activation(self, activation: Option<Activation>) -> Self {
        Product { activation, ..self }
    }
}

/// Operands on the CPU beside a GPU.
#[derive(Clone, Copy)]
struct Beside {
    x: u64,
    out: u64,
    arrived: Fence,
}

impl Core<'_> {
    pub fn product(&mut self, p: &Product) {
        let Some(index) = self.matrix(p.kind, p.stage) else {
            return;
        };
        let before = self.made();
        let resident = if self.compute == Tier::Gpu {
            WeightHome::Gpu
        } else {
            WeightHome::CpuCompute
        };
        let mut beside = None;
        let mut returned = Fences::none();
        for home in WeightHome::ALL {
            let split = self.facts.placement.splits[index];
            let panels = split.first(home)..split.first(home) + split.count(home);
            if panels.is_empty() {
                continue;
            }
            let computed_beside = self.compute == Tier::Gpu
                && matches!(home, WeightHome::CpuCompute | WeightHome::DiskCompute);
            if computed_beside && beside.is_none() {
                beside = Some(self.send_rows(p, index, &before));
            }
            let there = if computed_beside { beside } else { None };
            match self.layout.home(index, home) {
                Some(weights) if home == resident || computed_beside => {
                    self.gemm(p, (index, panels.clone(), weights), (there, Fences::none()));
                }
                _ => self.visiting(p, (index, home), there),
            }
            if let Some(side) = there {
                returned.add(self.return_columns(p, (index, panels), side));
            }
        }
        self.join = self.join.join(&returned);
    }

    /// Rows that come through the ring, chunk by chunk as they arrive.
    fn visiting(
        &mut self,
        p: &Product,
        (index, home): (usize, WeightHome),
        beside: Option<Beside>,
    ) {
        for number in self.stream.of_home(self.pass, p.stage, (index, home)) {
            let chunk = self.stream.chunk(number);
            let visitor = self.stream.visitor(&mut self.machine, number);
            let panels = chunk.first_panel..chunk.first_panel + chunk.panels;
            let used = self.gemm(
                p,
                (index, panels, visitor.offset),
                (beside, visitor.ready.into()),
            );
            if p.last_use {
                self.stream.release(number, used);
            }
        }
    }

    fn gemm(
        &mut self,
        p: &Product,
        (index, panels, weights): (usize, Range<usize>, u64),
        (beside, ready): (Option<Beside>, Fences),
    ) -> Fence {
        let matrix = self.facts.placement.matrices[index];
        let first_row = panels.start * PANEL_ROWS;
        let rows = matrix.rows.min(panels.end * PANEL_ROWS) - first_row;
        let tier = if beside.is_some() {
            Tier::Cpu
        } else {
            self.compute
        };
        let bias = p
            .bias
            .and_then(|kind| self.layout.small(tier, kind, p.stage));
        let (x, out) = beside.map_or((p.x, p.out), |side| (side.x, side.out));
        let format = matrix.format(self.facts.model.dtype, self.facts.policy.compress_weight);
        let gemm = Compute::Gemm(Gemm {
            x,
            x_stride: matrix.inputs,
            m: p.m,
            inputs: matrix.inputs,
            weights,
            format,
            arithmetic: self.facts.policy.arithmetic(format),
            wide: self.facts.policy.is_wide(),
            rows,
            bias: bias.map(|at| at + first_row as u64 * HIDDEN_VALUE_BYTES),
            activation: p.activation,
            out: out + first_row as u64 * HIDDEN_VALUE_BYTES,
            out_stride: matrix.rows,
        });
        match beside {
            None => {
                self.join = self.join.join(&ready);
                self.submit(gemm)
            }
            Some(side) => self.machine.submit(
                Lane::CpuCompute,
                Op::Compute(gemm),
                &ready.with(side.arrived),
            ),
        }
    }

    /// The product's input down to the CPU, once.
    fn send_rows(&mut self, p: &Product, index: usize, made: &Fences) -> Beside {
        let bytes = (p.m * self.facts.placement.matrices[index].inputs) as u64 * HIDDEN_VALUE_BYTES;
        let x = self.layout.buffer(Tier::Cpu, Buffer::SideRows).offset;
        let out = self.layout.buffer(Tier::Cpu, Buffer::SideProducts).offset;
        let down = vec![Copy2d::flat(p.x, x, bytes)];
        // The compute lane waits for what the CPU made before, so its buffers are free when this is `made`.
        let arrived = self.copy(Lane::GpuToCpu, down, made);
        Beside { x, out, arrived }
    }

    /// The CPU's columns up into the product. Whatever read the output buffer before came before the rows' way down.
    fn return_columns(
        &mut self,
        p: &Product,
        (index, panels): (usize, Range<usize>),
        side: Beside,
    ) -> Fence {
        let matrix = self.facts.placement.matrices[index];
        let first = panels.start * PANEL_ROWS;
        let columns = matrix.rows.min(panels.end * PANEL_ROWS) - first;
        let stride = matrix.rows as u64 * HIDDEN_VALUE_BYTES;
        let at = first as u64 * HIDDEN_VALUE_BYTES;
        let piece = Copy2d {
            from: side.out + at,
            from_stride: stride,
            to: p.out + at,
            to_stride: stride,
            row_bytes: columns as u64 * HIDDEN_VALUE_BYTES,
            rows: p.m as u64,
        };
        let number = self.machine.submitted().mark(Lane::CpuCompute);
        let computed = Fences::from(Fence {
            lane: Lane::CpuCompute,
            number,
        });
        self.copy(Lane::CpuToGpu, vec![piece], &computed)
    }

    /// Token table rows into `to`: resident panels in place, others fetched in small pieces.
    pub fn lookup(&mut self, ids: &Table, to: &HiddenRows) {
        let head = self.facts.model.head_stage();
        let table = self
            .matrix(MatrixKind::Embedding, 0)
            .or_else(|| self.matrix(MatrixKind::Head, head));
        let Some(index) = table else { return };
        let home = if self.compute == Tier::Gpu {
            WeightHome::Gpu
        } else {
            WeightHome::CpuCompute
        };
        let split = self.facts.placement.splits[index];
        let resident = split.first(home)..split.first(home) + split.count(home);
        if !self.facts.fetches_tokens {
            let all = 0..self.facts.placement.matrices[index].panels();
            return self.submit_embed((index, all, 0), ids.clone(), to.clone());
        }
        if let Some(at) = self.layout.home(index, home) {
            self.embed_from((index, resident.clone(), at), ids, to);
        }
        for run in self.away_runs(index, ids, &resident) {
            self.fetch_and_embed((index, run), ids, to);
        }
    }

    /// Runs of neighbouring panels that hold ids outside `resident`, cut to what the stage holds and at
    /// the borders between homes.
    fn away_runs(&self, index: usize, ids: &Table, resident: &Range<usize>) -> Vec<Range<usize>> {
        let panel_of = |id: &u32| *id as usize / PANEL_ROWS;
        let mut panels: Vec<usize> = ids
            .as_slice()
            .iter()
            .map(panel_of)
            .filter(|p| !resident.contains(p))
            .collect();
        panels.sort_unstable();
        panels.dedup();
        let most = ((embedding_piece_bytes(self.facts.placement.panel_bytes[index]) - PAGE_BYTES)
            / self.facts.placement.panel_bytes[index])
            .max(1) as usize;
        let split = self.facts.placement.splits[index];
        let mut runs: Vec<Range<usize>> = Vec::new();
        for panel in panels {
            let border = WeightHome::ALL
                .iter()
                .any(|&home| split.first(home) == panel);
            match runs.last_mut() {
                Some(run) if run.end == panel && run.len() < most && !border => run.end += 1,
                _ => runs.push(panel..panel + 1),
            }
        }
        runs
    }

    /// Brings panels to the compute device through one half of the embedding stage.
    fn fetch_and_embed(
        &mut self,
        (index, run): (usize, Range<usize>),
        ids: &Table,
        to: &HiddenRows,
    ) {
        self.embedding_half = 1 - self.embedding_half;
        let half = self.embedding_half;
        let panel = self.facts.placement.panel_bytes[index];
        let half_offset = half as u64 * embedding_piece_bytes(panel);
        let bytes = run.len() as u64 * panel;
        let mut sent = None;
        let (mut at, mut ready, source) = match self.dram_panel(index, run.start) {
            Some(at) => (at, Fences::none(), Buffer::Weights),
            None => {
                let memory =
                    self.layout.buffer(Tier::Cpu, Buffer::EmbeddingStage).offset + half_offset;
                let free = self.embedding_sent[half];
                let (at, ready) = self.read_panels((run.start, bytes), memory, &free);
                (at, ready, Buffer::EmbeddingStage)
            }
        };
        if self.compute == Tier::Gpu {
            let to = self.layout.buffer(Tier::Gpu, Buffer::EmbeddingStage).offset + half_offset;
            let up = Op::Copy {
                pinned: self.facts.is_locked(source),
                pieces: vec![Copy2d::flat(at, to, bytes)],
            };
            let free = self.embedding_done[half];
            let up = self.machine.submit(Lane::CpuToGpu, up, &ready.join(&free));
            sent = Some(up);
            ready = up.into();
            at = to;
        }
        self.join = self.join.join(&ready);
        self.embed_from((index, run, at), ids, to);
        self.embedding_sent[half] = sent.unwrap_or(self.last).into();
        self.embedding_done[half] = self.last.into();
    }

    fn dram_panel(&self, index: usize, panel: usize) -> Option<u64> {
        let split = self.facts.placement.splits[index];
        // What the CPU multiplies beside a GPU has been turned into another layout: the file still has it.
        let homes: &[WeightHome] = match self.facts.device {
            DeviceKind::Cuda => &[WeightHome::CpuShip],
            _ => &[WeightHome::CpuShip, WeightHome::CpuCompute],
        };
        homes.iter().copied().find_map(|home| {
            let range = split.first(home)..split.first(home) + split.count(home);
            let at = self
                .layout
                .home(index, home)
                .filter(|_| range.contains(&panel))?;
            Some(at + (panel - range.start) as u64 * self.facts.placement.panel_bytes[index])
        })
    }

    fn read_panels(
        &mut self,
        (first, bytes): (usize, u64),
        memory: u64,
        after: &Fences,
    ) -> (u64, Fences) {
        let (file, wanted) = self.facts.looked_up(first);
        let offset = wanted / PAGE_BYTES * PAGE_BYTES;
        let bytes = round_up(wanted + bytes - offset, PAGE_BYTES);
        let span = FileSpan {
            file,
            offset,
            memory,
            bytes,
        };
        let read = self
            .machine
            .submit(Lane::DiskToCpu, Op::Read(vec![span]), after);
        (memory + wanted - offset, read.into())
    }

    /// Looks up the ids that lie in `panels`, whose first panel is at `table`.
    fn embed_from(
        &mut self,
        (index, panels, table): (usize, Range<usize>, u64),
        ids: &Table,
        to: &HiddenRows,
    ) {
        let rows = panels.start * PANEL_ROWS..panels.end * PANEL_ROWS;
        let pairs = ids.as_slice().iter().zip(to.rows.as_slice());
        let mine: Vec<(u32, u32)> = pairs
            .filter(|(id, _)| rows.contains(&(**id as usize)))
            .map(|(id, row)| (id - rows.start as u32, *row))
            .collect();
        if mine.is_empty() {
            return;
        }
        let ids = Table::whole(mine.iter().map(|(id, _)| *id).collect());
        let entries = Table::whole(mine.iter().map(|(_, row)| *row).collect());
        let to = HiddenRows {
            rows: entries,
            ..to.clone()
        };
        self.submit_embed((index, panels, table), ids, to);
    }

    fn submit_embed(
        &mut self,
        (index, panels, table): (usize, Range<usize>, u64),
        ids: Table,
        to: HiddenRows,
    ) {
        let matrix = self.facts.placement.matrices[index];
        let format = matrix.format(self.facts.model.dtype, self.facts.policy.compress_weight);
        self.submit(Compute::Embed {
            table,
            panels: panels.len(),
            format,
            ids,
            to,
        });
    }
}
