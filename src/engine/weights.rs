//! Streamed weights: the cyclic list of panel chunks that visit the compute devices in each pass, and
//! when each is read and shipped. Resident weights need nothing from here.

use super::core::RunFacts;
use super::layout::Layout;
use super::ring::{Grant, Ring};
use crate::cost::footprint::{Buffer, chunk_panels, chunk_slot_bytes};
use crate::machine::ops::{Copy2d, FileId, FileSpan, Op};
use crate::machine::{Fence, Fences, Machine};
use crate::model::MatrixKind;
use crate::placement::{Placement, WeightHome};
use crate::policy::DeviceKind;
use crate::tier::{Lane, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::collections::VecDeque;

/// A run of panels of one matrix that travels as one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chunk {
    pub matrix: usize,
    pub home: WeightHome,
    pub first_panel: usize,
    pub panels: usize,
}

/// A chunk where it will be multiplied, and when it is there.
#[derive(Clone, Copy, Debug)]
pub struct Visitor {
    pub tier: Tier,
    pub offset: u64,
    pub ready: Fence,
    ticket: u64,
}

/// Where a chunk is at home.
#[derive(Clone, Copy)]
enum Home {
    Dram { offset: u64 },
    Disk { file: FileId, offset: u64 },
}

/// The chunks of all passes, numbered on and on; issued in order, as far ahead as the rings allow.
pub struct WeightStream {
    chunks: Vec<Chunk>,
    /// First chunk of each stage, and one past the last.
    stage_first: Vec<usize>,
    panel_bytes: Vec<u64>,
    /// Of each chunk.
    homes: Vec<Home>,
    device: DeviceKind,
    /// Weights at home in DRAM, and the ring through which those on disk come.
    pinned: bool,
    ring_pinned: bool,
    cpu_ring: Ring,
    gpu_ring: Ring,
    issued: u64,
    /// Visitors not yet released, by number; the front is number `oldest`.
    visitors: VecDeque<Option<Visitor>>,
    oldest: u64,
}

impl WeightStream {
    pub fn new(facts: &RunFacts, layout: &Layout) -> Self {
        let (chunks, stage_first) = list_chunks(&facts.placement, facts.device);
        let homes = chunks.iter().map(|c| home_of(facts, layout, c)).collect();
        WeightStream {
            homes,
            chunks,
            stage_first,
            panel_bytes: facts.placement.panel_bytes.clone(),
            device: facts.device,
            pinned: facts.is_locked(Buffer::Weights),
            ring_pinned: facts.is_locked(Buffer::Ring),
            cpu_ring: Ring::new(layout.buffer(Tier::Cpu, Buffer::Ring)),
            gpu_ring: Ring::new(layout.buffer(Tier::Gpu, Buffer::Ring)),
            issued: 0,
            visitors: VecDeque::new(),
            oldest: 0,
        }
    }

    /// Numbers of one stage's chunks in one pass.
    pub fn stage(&self, pass: u64, stage: usize) -> std::ops::Range<u64> {
        let start = pass * self.chunks.len() as u64;
        start + self.stage_first[stage] as u64..start + self.stage_first[stage + 1] as u64
    }

    /// Numbers of the chunks of one matrix at one home: they follow each other.
    pub fn of_home(
        &self,
        pass: u64,
        stage: usize,
        (matrix, home): (usize, WeightHome),
    ) -> std::ops::Range<u64> {
        let all = self.stage(pass, stage);
        let of = |number: &u64| {
            let chunk = self.chunk(*number);
            chunk.matrix == matrix && chunk.home == home
        };
        let first = all.clone().find(of).unwrap_or(all.end);
        let count = (first..all.end).take_while(of).count();
        first..first + count as u64
    }

    pub fn chunk(&self, number: u64) -> Chunk {
        self.chunks[(number % self.chunks.len() as u64) as usize]
    }

    /// Starts part `part` of `parts` of a stage's chunks, as far as there is room.
    pub fn prefetch(
        &mut self,
        machine: &mut dyn Machine,
        (pass, stage): (u64, usize),
        (part, parts): (usize, usize),
    ) {
        let range = self.stage(pass, stage);
        let count = range.end - range.start;
        let until = range.start + (count * (part as u64 + 1)).div_ceil(parts as u64);
        while self.issued < until && self.issue(machine) {}
    }

    /// The visitor of this number, started now at the latest.
    pub fn visitor(&mut self, machine: &mut dyn Machine, number: u64) -> Visitor {
        while self.issued <= number {
            let started = self.issue(machine);
            assert!(
                started,
                "the ring holds what one layer needs at once: footprint and stream disagree"
            );
        }
        self.visitors[(number - self.oldest) as usize]
            .expect("a visitor is released after its last use")
    }

    /// Gives a visitor's room back once `last` is done.
    pub fn release(&mut self, number: u64, last: Fence) {
        let slot = &mut self.visitors[(number - self.oldest) as usize];
        if let Some(visitor) = slot.take() {
            match visitor.tier {
                Tier::Gpu => self.gpu_ring.release(visitor.ticket, last),
                _ => self.cpu_ring.release(visitor.ticket, last),
            }
        }
        while matches!(self.visitors.front(), Some(None)) {
            self.visitors.pop_front();
            self.oldest += 1;
        }
    }

    /// Starts the next chunk. False when a ring has no room yet. A grant is only taken when all are there.
    fn issue(&mut self, machine: &mut dyn Machine) -> bool {
        let index = (self.issued % self.chunks.len() as u64) as usize;
        let chunk = self.chunks[index];
        let bytes = chunk.panels as u64 * self.panel_bytes[chunk.matrix];
        let slot = chunk_slot_bytes(chunk.panels, self.panel_bytes[chunk.matrix]);
        let started = match self.homes[index] {
            Home::Dram { offset } => self.ship_from_dram(machine, (offset, bytes), slot),
            Home::Disk { file, offset } => self.read(machine, &chunk, ((file, offset), slot)),
        };
        let Some(visitor) = started else { return false };
        self.visitors.push_back(Some(visitor));
        self.issued += 1;
        true
    }

    fn ship_from_dram(
        &mut self,
        machine: &mut dyn Machine,
        (from, bytes): (u64, u64),
        slot: u64,
    ) -> Option<Visitor> {
        let grant = self.gpu_ring.grant(slot)?;
        let after = Fences::none();
        Some(self.ship(machine, (from, bytes, self.pinned), (&grant, after)))
    }

    fn ship(
        &self,
        machine: &mut dyn Machine,
        (from, bytes, pinned): (u64, u64, bool),
        (to, after): (&Grant, Fences),
    ) -> Visitor {
        let op = Op::Copy {
            pinned,
            pieces: vec![Copy2d::flat(from, to.offset, bytes)],
        };
        let ready = machine.submit(Lane::CpuToGpu, op, &after.join(&to.after));
        Visitor {
            tier: Tier::Gpu,
            offset: to.offset,
            ready,
            ticket: to.ticket,
        }
    }

    /// Reads a chunk from disk, rounded out to pages; ships it on where the GPU multiplies it.
    fn read(
        &mut self,
        machine: &mut dyn Machine,
        chunk: &Chunk,
        ((file, wanted), slot): ((FileId, u64), u64),
    ) -> Option<Visitor> {
        let ships = chunk.home == WeightHome::DiskShip && self.device.has_gpu();
        let panel = self.panel_bytes[chunk.matrix];
        let bytes = chunk.panels as u64 * panel;
        let start = wanted / PAGE_BYTES * PAGE_BYTES;
        let gpu = if ships {
            Some(self.gpu_ring.grant(slot)?)
        } else {
            None
        };
        let Some(cpu) = self.cpu_ring.grant(slot) else {
            gpu.iter().for_each(|g| self.gpu_ring.undo(g));
            return None;
        };
        let span = FileSpan {
            file,
            offset: start,
            memory: cpu.offset,
            bytes: round_up(wanted + bytes - start, PAGE_BYTES),
        };
        let read = machine.submit(Lane::DiskToCpu, Op::Read(vec![span]), &cpu.after);
        let offset = cpu.offset + (wanted - start);
        let Some(gpu) = gpu else {
            return Some(Visitor {
                tier: Tier::Cpu,
                offset,
                ready: read,
                ticket: cpu.ticket,
            });
        };
        let visitor = self.ship(
            machine,
            (offset, bytes, self.ring_pinned),
            (&gpu, read.into()),
        );
        self.cpu_ring.release(cpu.ticket, visitor.ready);
        Some(visitor)
    }

    /// True when nothing is streamed.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

fn home_of(facts: &RunFacts, layout: &Layout, chunk: &Chunk) -> Home {
    let (placement, place) = (&facts.placement, (chunk.matrix, chunk.home));
    if let Some(home) = layout.home(chunk.matrix, chunk.home) {
        let before = chunk.first_panel - placement.splits[chunk.matrix].first(chunk.home);
        let offset = home + before as u64 * placement.panel_bytes[chunk.matrix];
        return Home::Dram { offset };
    }
    match facts.own.chunk(placement, place, chunk.first_panel) {
        Some(offset) => Home::Disk {
            file: FileId::ROWS,
            offset,
        },
        None => Home::Disk {
            file: FileId::STORE,
            offset: facts.in_store(chunk.matrix, chunk.first_panel),
        },
    }
}

/// Chunks in the order of use. An untied token table is looked up, not streamed.
pub fn list_chunks(placement: &Placement, device: DeviceKind) -> (Vec<Chunk>, Vec<usize>) {
    let stages = placement.matrices.last().map_or(0, |m| m.stage) + 1;
    let homes: &[WeightHome] = match device.has_gpu() {
        true => &[
            WeightHome::CpuShip,
            WeightHome::DiskShip,
            WeightHome::DiskCompute,
        ],
        false => &[WeightHome::DiskShip, WeightHome::DiskCompute],
    };
    let (mut chunks, mut firsts) = (Vec::new(), Vec::new());
    for stage in 0..stages {
        firsts.push(chunks.len());
        for (matrix, of) in placement.matrices.iter().enumerate() {
            if of.stage == stage && of.kind != MatrixKind::Embedding {
                homes
                    .iter()
                    .for_each(|&home| push_chunks(&mut chunks, placement, (matrix, home)));
            }
        }
    }
    firsts.push(chunks.len());
    (chunks, firsts)
}

fn push_chunks(
    chunks: &mut Vec<Chunk>,
    placement: &Placement,
    (matrix, home): (usize, WeightHome),
) {
    let split = &placement.splits[matrix];
    let (first, count) = (split.first(home), split.count(home));
    let most = chunk_panels(placement.panel_bytes[matrix]);
    for start in (0..count).step_by(most) {
        chunks.push(Chunk {
            matrix,
            home,
            first_panel: first + start,
            panels: most.min(count - start),
        });
    }
}
