//! Bringing weights home without a store: piece by piece from their source, laid out as they are multiplied,
//! straight into the arenas, and onto disk only what is at home there. The same bytes as load.rs brings.

use super::core::RunFacts;
use super::layout::Layout;
use super::loading::Counted;
use super::run::EngineError;
use super::weights::list_chunks;
use crate::checkpoint::{CheckpointError, WeightSource};
use crate::cost::SOURCE_PIECE_BYTES;
use crate::cost::footprint::Buffer;
use crate::dtype::{PANEL_ROWS, WeightLayout};
use crate::machine::arena::{AlignedBuffer, MemoryError};
use crate::machine::cpu::kernels::{Isa, PackSource, pack_panels, pack_rows};
use crate::machine::cpu::pool::Pool;
use crate::machine::disk::{DiskError, DiskFile};
use crate::machine::threaded::ThreadedMachine;
use crate::machine::{Machine, MachineError};
use crate::placement::WeightHome;
use crate::tier::Tier;
use crate::units::{PAGE_BYTES, round_up};
use std::ops::Range;

/// Everything that the run needs of the source.
pub fn bring(
    source: &dyn WeightSource,
    machine: &mut ThreadedMachine,
    (facts, layout, rows): (&RunFacts, &Layout, &DiskFile),
    counted: &mut Counted,
) -> Result<(), EngineError> {
    bring_smalls(source, machine, (facts, layout))?;
    let mut maker = Maker::new(source, facts, counted)?;
    maker.resident(machine, layout)?;
    maker.streamed(rows)?;
    maker.table(rows)
}

fn bring_smalls(
    source: &dyn WeightSource,
    machine: &mut ThreadedMachine,
    (facts, layout): (&RunFacts, &Layout),
) -> Result<(), EngineError> {
    for small in facts.model.smalls() {
        let mut bytes = vec![0; small.bytes() as usize];
        source.read_small(&small, &mut bytes)?;
        for tier in [Tier::Gpu, Tier::Cpu] {
            let place = layout.buffer(tier, Buffer::Smalls);
            if place.bytes > 0 {
                machine.put(tier, place.offset + layout.small_offset(&small), &bytes)?;
            }
        }
    }
    Ok(())
}

/// Panels of one matrix, in the layout in which they are needed.
#[derive(Clone)]
struct Part {
    index: usize,
    panels: Range<usize>,
    layout: WeightLayout,
}

/// Lays out one piece after another.
struct Maker<'a, 'c> {
    source: &'a dyn WeightSource,
    facts: &'a RunFacts,
    counted: &'a mut Counted<'c>,
    pool: Pool,
    /// A piece in the source's layout and in ours.
    native: Vec<u8>,
    packed: AlignedBuffer,
}

impl<'a, 'c> Maker<'a, 'c> {
    fn new(
        source: &'a dyn WeightSource,
        facts: &'a RunFacts,
        counted: &'a mut Counted<'c>,
    ) -> Result<Self, EngineError> {
        let panels = facts.placement.panel_bytes.iter().enumerate();
        let pieces = panels.map(|(index, bytes)| piece_panels(facts, index) as u64 * bytes);
        let largest = pieces.max().unwrap_or(0) + PAGE_BYTES;
        let no_memory = |e: MemoryError| MachineError::Memory(e.to_string());
        Ok(Maker {
            source,
            facts,
            counted,
            pool: Pool::new(facts.policy.threads),
            native: Vec::new(),
            packed: AlignedBuffer::new(largest).map_err(no_memory)?,
        })
    }

    fn part(&self, index: usize, home: WeightHome) -> Part {
        let split = &self.facts.placement.splits[index];
        let first = split.first(home);
        Part {
            index,
            panels: first..first + split.count(home),
            layout: self.facts.layout_at(home),
        }
    }

    /// Panels at home in memory.
    fn resident(
        &mut self,
        machine: &mut ThreadedMachine,
        layout: &Layout,
    ) -> Result<(), EngineError> {
        for index in 0..self.facts.placement.matrices.len() {
            for home in WeightHome::RESIDENT {
                let Some(memory) = layout.home(index, home) else {
                    continue;
                };
                let part = self.part(index, home);
                self.each_piece(&part, |offset, bytes, piece| {
                    let panels = &piece[..bytes as usize];
                    Ok(machine.put(home.tier(), memory + offset, panels)?)
                })?;
            }
        }
        Ok(())
    }

    /// Rows that will be streamed from disk, chunk by chunk.
    fn streamed(&mut self, file: &DiskFile) -> Result<(), EngineError> {
        let placement = &self.facts.placement;
        for chunk in list_chunks(placement, self.facts.device).0 {
            let (index, first) = (chunk.matrix, chunk.first_panel);
            let place = (index, chunk.home);
            let Some(at) = self.facts.own.chunk(placement, place, first) else {
                continue;
            };
            let part = Part {
                panels: first..first + chunk.panels,
                ..self.part(index, chunk.home)
            };
            self.write(&part, (file, at))?;
        }
        Ok(())
    }

    /// Panels of the token table that tokens are looked up in on disk.
    fn table(&mut self, file: &DiskFile) -> Result<(), EngineError> {
        let Some(table) = self.facts.own.table else {
            return Ok(());
        };
        let part = Part {
            index: table.index,
            panels: table.first..self.facts.placement.matrices[table.index].panels(),
            layout: self.facts.device.weight_layout(),
        };
        self.write(&part, (file, table.offset))
    }

    fn write(&mut self, part: &Part, (file, at): (&DiskFile, u64)) -> Result<(), EngineError> {
        // Every piece but the last ends with a page.
        let no_disk = |e: DiskError| MachineError::Disk(e.to_string());
        self.each_piece(part, |offset, bytes, piece| {
            let pages = &piece[..round_up(bytes, PAGE_BYTES) as usize];
            Ok(file.write_at(pages, at + offset).map_err(no_disk)?)
        })
    }

    /// Calls `put` for each piece of a part: its offset there, its bytes, and the buffer that begins with them.
    fn each_piece(
        &mut self,
        part: &Part,
        mut put: impl FnMut(u64, u64, &[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let panel_bytes = self.facts.placement.panel_bytes[part.index];
        let at_once = piece_panels(self.facts, part.index);
        for start in part.panels.clone().step_by(at_once) {
            let panels = start..part.panels.end.min(start + at_once);
            let bytes = panels.len() as u64 * panel_bytes;
            self.lay_out(&Part {
                panels,
                ..part.clone()
            })?;
            let offset = (start - part.panels.start) as u64 * panel_bytes;
            put(offset, bytes, &self.packed)?;
            self.counted.add(bytes)?;
        }
        Ok(())
    }

    /// The piece at the front of `packed`.
    fn lay_out(&mut self, piece: &Part) -> Result<(), CheckpointError> {
        let matrix = self.facts.placement.matrices[piece.index];
        let (format, inputs) = self.facts.form(piece.index);
        let dtype = self.facts.model.dtype;
        let first = piece.panels.start * PANEL_ROWS;
        let rows = matrix.rows.min(piece.panels.end * PANEL_ROWS) - first;
        let row_bytes = dtype.row_bytes(inputs) as usize;
        self.native.resize(rows * row_bytes, 0);
        let (source, threads) = (self.source, self.facts.policy.threads);
        let share = rows.div_ceil(threads);
        std::thread::scope(|scope| {
            let parts = self.native.chunks_mut(share * row_bytes).enumerate();
            let readers: Vec<_> = parts
                .map(|(i, out)| {
                    let (first, rows) = (first + i * share, out.len() / row_bytes);
                    scope.spawn(move || source.read_rows(&matrix, first, rows, out))
                })
                .collect();
            let joined = readers.into_iter().map(|reader| reader.join());
            let read = joined.map(|r| r.unwrap_or_else(|p| std::panic::resume_unwind(p)));
            read.collect::<Result<(), CheckpointError>>()
        })?;
        let from = PackSource {
            bytes: &self.native,
            dtype,
            rows,
            inputs,
        };
        let pack = match piece.layout {
            WeightLayout::CpuPanel64 => pack_panels,
            WeightLayout::GpuRowMajor => pack_rows,
        };
        pack(&self.pool, Isa::detect(), from, format, &mut self.packed);
        Ok(())
    }
}

/// Panels at once, so many that they end with a page.
fn piece_panels(facts: &RunFacts, index: usize) -> usize {
    let panel_bytes = facts.placement.panel_bytes[index];
    let whole = PAGE_BYTES
        >> panel_bytes
            .trailing_zeros()
            .min(PAGE_BYTES.trailing_zeros());
    let native = facts
        .model
        .dtype
        .panel_bytes(facts.placement.matrices[index].inputs);
    let most = SOURCE_PIECE_BYTES / native.max(panel_bytes);
    (most / whole * whole).max(whole) as usize
}
