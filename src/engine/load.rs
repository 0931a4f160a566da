//! Bringing weights home: small tensors and panels into the arenas, and rows that the CPU multiplies beside a GPU
//! into its layout. Runs before the first task; its time and bytes are left out of what is measured.

use super::core::RunFacts;
use super::layout::Layout;
use super::loading::Counted;
use super::open::Packed;
use super::run::EngineError;
use super::weights::list_chunks;
use crate::cost::footprint::Buffer;
use crate::dtype::Dtype;
use crate::machine::ops::{FileId, FileSpan, LoadSpan, Op};
use crate::machine::threaded::ThreadedMachine;
use crate::machine::{Fences, Machine};
use crate::placement::WeightHome;
use crate::tier::{Lane, Tier};
use crate::units::{PAGE_BYTES, round_up};

/// All of them from the store, and waits until they are there.
pub fn load(
    machine: &mut ThreadedMachine,
    packed: &Packed,
    (facts, layout): (&RunFacts, &Layout),
    counted: &mut Counted,
) -> Result<(), EngineError> {
    load_smalls(machine, packed, (facts, layout));
    load_panels(machine, (facts, layout), counted)?;
    turn_rows(machine, (facts, layout), counted)?;
    let all = machine.submitted();
    Ok(machine.wait(&all)?)
}

/// By the reading lane, like the weights: nothing of them stays in the heap.
fn load_smalls(
    machine: &mut ThreadedMachine,
    packed: &Packed,
    (facts, layout): (&RunFacts, &Layout),
) {
    let smalls = facts.model.smalls();
    for (small, &offset) in smalls.iter().zip(&packed.small_offsets) {
        for tier in [Tier::Gpu, Tier::Cpu] {
            let place = layout.buffer(tier, Buffer::Smalls);
            if place.bytes == 0 {
                continue;
            }
            let span = LoadSpan {
                file: FileId::STORE,
                offset,
                bytes: small.bytes(),
                to: tier,
                memory: place.offset + layout.small_offset(small),
                repack: None,
            };
            machine.submit(Lane::DiskToCpu, Op::Load(span), &Fences::none());
        }
    }
}

/// One part is being read and the next one waits, so that little is left to do when it is ended.
fn load_panels(
    machine: &mut ThreadedMachine,
    (facts, layout): (&RunFacts, &Layout),
    counted: &mut Counted,
) -> Result<(), EngineError> {
    let mut before = (Fences::none(), 0);
    for index in 0..facts.placement.matrices.len() {
        for home in WeightHome::RESIDENT {
            let Some(memory) = layout.home(index, home) else {
                continue;
            };
            let first = facts.placement.splits[index].first(home);
            let span = LoadSpan {
                file: FileId::STORE,
                offset: facts.in_store(index, first),
                bytes: facts.placement.part_bytes(index, home),
                to: home.tier(),
                memory,
                repack: repack(facts, index, home),
            };
            let bytes = span.bytes;
            let there = machine.submit(Lane::DiskToCpu, Op::Load(span), &Fences::none());
            machine.wait(&before.0)?;
            counted.add(before.1)?;
            before = (there.into(), bytes);
        }
    }
    machine.wait(&before.0)?;
    counted.add(before.1)
}

/// Panels of a GPU's store that the CPU multiplies are turned into its layout once, at load.
fn repack(facts: &RunFacts, index: usize, home: WeightHome) -> Option<(Dtype, usize)> {
    let turned = facts.layout_at(home) != facts.device.weight_layout();
    turned.then(|| facts.form(index))
}

/// Rows on disk that the CPU multiplies beside a GPU, into the run's own file: through two halves of the ring
/// that they will be streamed through, one being read and turned while the other is written.
fn turn_rows(
    machine: &mut ThreadedMachine,
    (facts, layout): (&RunFacts, &Layout),
    counted: &mut Counted,
) -> Result<(), EngineError> {
    let ring = layout.buffer(Tier::Cpu, Buffer::Ring);
    let half_bytes = ring.bytes / 2 / PAGE_BYTES * PAGE_BYTES;
    let mut written = [Fences::none(); 2];
    let mut half = 0;
    for chunk in list_chunks(&facts.placement, facts.device).0 {
        let (index, first) = (chunk.matrix, chunk.first_panel);
        let Some(offset) = (facts.own).chunk(&facts.placement, (index, chunk.home), first) else {
            continue;
        };
        let bytes = chunk.panels as u64 * facts.placement.panel_bytes[index];
        let memory = ring.offset + half as u64 * half_bytes;
        let turned = LoadSpan {
            file: FileId::STORE,
            offset: facts.in_store(index, first),
            bytes,
            to: Tier::Cpu,
            memory,
            repack: repack(facts, index, chunk.home),
        };
        let there = machine.submit(Lane::DiskToCpu, Op::Load(turned), &written[half]);
        let write = FileSpan {
            file: FileId::ROWS,
            offset,
            memory,
            bytes: round_up(bytes, PAGE_BYTES),
        };
        let write = Op::Write(vec![write]);
        written[half] = machine.submit(Lane::CpuToDisk, write, &there.into()).into();
        half = 1 - half;
        machine.wait(&written[half])?;
        counted.add(round_up(bytes, PAGE_BYTES))?;
    }
    Ok(())
}
