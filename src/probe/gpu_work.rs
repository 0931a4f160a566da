//! The operations that a GPU is measured with, over one arena on each side. What is done with their
//! seconds is gpu.rs.

use super::scale::GpuExtent;
use crate::dtype::{Arithmetic, Dtype, panels};
use crate::machine::arena::Region;
use crate::machine::cuda::GpuPlaces;
use crate::machine::ops::{
    Attention, Compute, Copy2d, Gemm, HiddenRows, KvItem, KvPlace, KvSlots, Op, Table, Widen,
};
use crate::tier::{Lane, Tier};
use crate::units::{GIB, MIB, round_up};

/// Device memory that a probe takes at most.
const MOST_DEVICE_BYTES: u64 = 2 * GIB;
const SCRATCH_BYTES: u64 = 96 * MIB;
const BLAS_BYTES: u64 = 16 * MIB;
const TABLES_BYTES: u64 = 2 * MIB;
const RELAY_BYTES: u64 = 8 * MIB;
/// Activations of products: 512 rows of 7168 inputs and of 28672 outputs.
const VALUES_BYTES: u64 = 96 * MIB;
/// Attention is measured at this width.
const HIDDEN: usize = 4096;
const HEADS: usize = 32;

/// One operation on one lane.
pub struct Task {
    pub lane: Lane,
    op: Op,
    /// Of its weights.
    copies: Copies,
}

/// Bytes from one copy to the next, and how many there are.
#[derive(Clone, Copy)]
struct Copies {
    stride: u64,
    count: u64,
}

const ONE: Copies = Copies {
    stride: 0,
    count: 1,
};

impl Task {
    /// The operation for the so manieth time: its weights are another copy's each time.
    pub fn turn(&self, number: u64) -> Op {
        let mut op = self.op.clone();
        if let Op::Compute(
            Compute::Gemm(Gemm { weights, .. }) | Compute::Widen(Widen { weights, .. }),
        ) = &mut op
        {
            *weights += number % self.copies.count * self.copies.stride;
        }
        op
    }
}

fn compute(compute: Compute) -> Task {
    Task {
        lane: Lane::GpuCompute,
        op: Op::Compute(compute),
        copies: ONE,
    }
}

/// Different numbers that are finite in every format: between a half and one in fp16, as which scales and minima of
/// 4-bit groups are read too, and small ones in bf16 and fp32.
pub fn numbers(bytes: u64) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (0x3800 | (state >> 22) as u16).to_le_bytes()
    };
    (0..bytes / 2).flat_map(next).collect()
}

/// Sizes and places of the two arenas.
pub struct Room {
    /// Weights, KV and large rows, from the arena's start.
    work_bytes: u64,
    values_bytes: u64,
    scratch_bytes: u64,
    /// The largest copy, page-locked and not, each in a region of its own.
    pub link_bytes: u64,
    /// After so many bytes of other weights none of these are in a cache.
    passed_bytes: u64,
    pub extent: &'static GpuExtent,
}

impl Room {
    /// A third of what is free at most.
    pub fn within((free_bytes, l2_bytes): (u64, u64), extent: &'static GpuExtent) -> Room {
        let most = (free_bytes / 3).min(MOST_DEVICE_BYTES);
        let large = most > 1024 * MIB;
        let (values_bytes, scratch_bytes) = match large {
            true => (VALUES_BYTES, SCRATCH_BYTES),
            false => (VALUES_BYTES / 4, SCRATCH_BYTES / 4),
        };
        let others = values_bytes + scratch_bytes + BLAS_BYTES + TABLES_BYTES;
        Room {
            work_bytes: most.saturating_sub(others).max(64 * MIB) / MIB * MIB,
            values_bytes,
            scratch_bytes,
            link_bytes: if large { 64 * MIB } else { 16 * MIB },
            passed_bytes: 2 * l2_bytes,
            extent,
        }
    }

    fn values(&self) -> u64 {
        self.work_bytes
    }

    /// Results of a product, at the end of the values: what comes out of one is never another's input, which would
    /// grow beyond all formats.
    fn results(&self, bytes: u64) -> u64 {
        self.values() + (self.values_bytes - bytes) / 256 * 256
    }

    /// Weights in so many copies that none is in a cache when its turn comes, as in a run, where those of all other
    /// layers have passed; fewer where the room is too small.
    fn copies(&self, bytes: u64) -> Copies {
        let stride = round_up(bytes.max(1), 256);
        let count = self.passed_bytes.div_ceil(stride);
        Copies {
            stride,
            count: count.clamp(1, (self.work_bytes / stride).max(1)),
        }
    }

    /// What operations read: all but what the machine has for itself.
    pub fn measured(&self) -> [(Tier, Region); 2] {
        let on_gpu = self.work_bytes + self.values_bytes;
        let in_dram = Region {
            offset: self.pinned(),
            bytes: self.cpu_bytes() - self.pinned(),
        };
        let on_gpu = Region {
            offset: 0,
            bytes: on_gpu,
        };
        [(Tier::Gpu, on_gpu), (Tier::Cpu, in_dram)]
    }

    pub fn places(&self) -> GpuPlaces {
        let mut next = self.work_bytes + self.values_bytes;
        let mut region = |bytes: u64| {
            let offset = next;
            next += bytes;
            Region { offset, bytes }
        };
        let (scratch, blas) = (region(self.scratch_bytes), region(BLAS_BYTES));
        let tables = region(TABLES_BYTES);
        let host = |offset: u64, bytes: u64| Region { offset, bytes };
        GpuPlaces {
            arena_bytes: next,
            scratch,
            blas,
            tables,
            host_tables: host(0, TABLES_BYTES),
            relay: host(TABLES_BYTES, RELAY_BYTES),
            pinned: vec![host(0, self.unpinned())],
        }
    }

    /// Rows of a prompt.
    fn prompt(&self) -> usize {
        let most = self.values_bytes / (4 * 4 * HIDDEN as u64);
        self.extent.prompt.min(most as usize)
    }

    fn pinned(&self) -> u64 {
        TABLES_BYTES + RELAY_BYTES
    }

    fn unpinned(&self) -> u64 {
        self.pinned() + self.link_bytes
    }

    pub fn cpu_bytes(&self) -> u64 {
        self.unpinned() + self.link_bytes
    }
}

/// A copy of `bytes` up or down, from or to page-locked DRAM or other.
pub fn copy(room: &Room, lane: Lane, (bytes, pinned): (u64, bool)) -> Task {
    let host = if pinned {
        room.pinned()
    } else {
        room.unpinned()
    };
    // Up and down have halves of the device's region: both may run at once.
    let device = if lane == Lane::CpuToGpu {
        0
    } else {
        room.work_bytes / 2
    };
    let piece = match lane {
        Lane::CpuToGpu => Copy2d::flat(host, device, bytes),
        _ => Copy2d::flat(device, host, bytes),
    };
    Task {
        lane,
        op: Op::Copy {
            pinned,
            pieces: vec![piece],
        },
        copies: ONE,
    }
}

fn rows(base: u64, count: usize, width: usize) -> HiddenRows {
    HiddenRows {
        base,
        rows: Table::whole((0..count as u32).collect()),
        width,
    }
}

/// Rows copied from one half of the region to the other, and their bytes.
pub fn gather(room: &Room) -> (Task, u64) {
    let half = room.work_bytes / 2 / MIB * MIB;
    let count = (half / (4 * HIDDEN as u64)).min(room.extent.copied_rows as u64) as usize;
    let from = rows(0, count, HIDDEN);
    let bytes = (4 * count * HIDDEN) as u64;
    (compute(Compute::Gather { from, out: half }), bytes)
}

/// As little as an operation can do.
pub fn nothing(room: &Room) -> Task {
    compute(Compute::Gather {
        from: rows(0, 1, 64),
        out: room.values(),
    })
}

/// A product (rows of activations, inputs, outputs); None where the room is too small.
pub fn product(
    room: &Room,
    format: Dtype,
    (m, inputs, outputs): (usize, usize, usize),
) -> Option<Task> {
    let weights = panels(outputs) as u64 * format.panel_bytes(inputs);
    let activations = 4 * (m * inputs) as u64;
    let results = 4 * (m * outputs) as u64;
    let scratch = 2 * (m * inputs) as u64 + Dtype::F16.panel_bytes(inputs);
    let fits = weights <= room.work_bytes
        && activations + results <= room.values_bytes
        && scratch <= room.scratch_bytes;
    let gemm = || Gemm {
        x: room.values(),
        x_stride: inputs,
        m,
        inputs,
        weights: 0,
        format,
        arithmetic: Arithmetic::Fp32,
        wide: false,
        rows: outputs,
        bias: None,
        activation: None,
        out: room.results(results),
        out_stride: outputs,
    };
    fits.then(|| Task {
        copies: room.copies(weights),
        ..compute(Compute::Gemm(gemm()))
    })
}

/// 4-bit weights (inputs, outputs) to fp16, and their bytes; None where the room is too small.
pub fn widen(room: &Room, (inputs, outputs): (usize, usize)) -> Option<(Task, u64)> {
    let widen = Widen {
        weights: 0,
        inputs,
        rows: outputs,
    };
    let bytes = widen.bytes();
    let fits = bytes <= room.work_bytes && Dtype::F16.panel_bytes(inputs) <= room.scratch_bytes;
    let task = || Task {
        copies: room.copies(bytes),
        ..compute(Compute::Widen(widen))
    };
    fits.then(|| (task(), bytes))
}

/// A product on the CPU over the DRAM arena, as one beside the GPU runs: eight rows.
pub fn cpu_product(room: &Room) -> Task {
    let (m, inputs, outputs) = (8, 512, 2048);
    let gemm = Gemm {
        x: room.unpinned() + 8 * MIB,
        x_stride: inputs,
        m,
        inputs,
        weights: room.unpinned(),
        format: Dtype::F16,
        arithmetic: Arithmetic::Fp32,
        wide: false,
        rows: outputs,
        bias: None,
        activation: None,
        out: room.unpinned() + 9 * MIB,
        out_stride: outputs,
    };
    Task {
        lane: Lane::CpuCompute,
        ..compute(Compute::Gemm(gemm))
    }
}

fn attention(room: &Room, format: Dtype, items: Vec<KvItem>) -> Attention {
    let last = items.iter().map(|i| i.first_row + i.rows).max();
    Attention {
        qkv: room.values(),
        heads: HEADS,
        hidden: HIDDEN,
        format,
        items: items.into(),
        out: room.values() + (4 * 3 * HIDDEN * last.unwrap_or(0)) as u64,
        wide: false,
    }
}

fn item((place, rows, past): (usize, usize, usize), record_bytes: u64) -> KvItem {
    let capacity = (past + rows) as u64;
    KvItem {
        first_row: place * rows,
        rows,
        past,
        decode: past > 0,
        kv: KvPlace {
            base: place as u64 * capacity * record_bytes,
            capacity,
            slots: KvSlots::Contiguous,
        },
    }
}

/// One new token for as many sequences as there is room for, and the bytes of keys and values read.
pub fn decode(room: &Room, format: Dtype) -> (Task, u64) {
    let record = 2 * format.row_bytes(HIDDEN);
    let past = room.extent.past;
    let sequence = (past + 1) as u64 * record;
    let most = room.extent.sequences as u64;
    let count = (room.work_bytes / sequence).clamp(1, most) as usize;
    let items = (0..count)
        .map(|place| item((place, 1, past), record))
        .collect();
    let bytes = count as u64 * sequence;
    (
        compute(Compute::Attend(attention(room, format, items))),
        bytes,
    )
}

/// One prompt, and the FLOP of its causal half.
pub fn prefill(room: &Room, format: Dtype) -> (Task, f64) {
    let rows = room.prompt();
    let items = vec![item((0, rows, 0), 2 * format.row_bytes(HIDDEN))];
    let flop = 4.0 * (rows * (rows + 1) / 2 * HIDDEN) as f64;
    (
        compute(Compute::Attend(attention(room, format, items))),
        flop,
    )
}

/// Keys and values of a prompt into 4 bits, and their bytes in fp32.
pub fn append(room: &Room) -> (Task, u64) {
    let rows = room.prompt();
    let items = vec![item((0, rows, 0), 2 * Dtype::Q4.row_bytes(HIDDEN))];
    let bytes = (4 * 2 * rows * HIDDEN) as u64;
    (
        compute(Compute::Append(attention(room, Dtype::Q4, items))),
        bytes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::ProbeScale;
    use half::{bf16, f16};
    use std::collections::BTreeSet;

    fn weights(op: Op) -> u64 {
        match op {
            Op::Compute(Compute::Gemm(g)) => g.weights,
            Op::Compute(Compute::Widen(w)) => w.weights,
            other => panic!("{other:?}"),
        }
    }

    /// Where a task's weights begin, turn by turn.
    fn places(task: &Task) -> BTreeSet<u64> {
        (0..1000).map(|turn| weights(task.turn(turn))).collect()
    }

    #[test]
    fn weights_are_met_again_when_no_cache_has_them() {
        let l2_bytes = 50 * MIB;
        for free_bytes in [80 * GIB, 512 * MIB] {
            let room = Room::within((free_bytes, l2_bytes), ProbeScale::Full.gpu());
            for (inputs, outputs) in [(1024, 4096), (4096, 4096)] {
                let bytes = panels(outputs) as u64 * Dtype::F16.panel_bytes(inputs);
                let task = product(&room, Dtype::F16, (1, inputs, outputs)).expect("room");
                let (widened, of_widened) = widen(&room, (inputs, outputs)).expect("room");
                for (task, bytes) in [(task, bytes), (widened, of_widened)] {
                    let places = places(&task);
                    let passed = places.len() as u64 * bytes;
                    let last = places.last().expect("a place");
                    // Side by side, and in the smaller room no more than it has.
                    assert_eq!(passed, last + bytes);
                    assert!(passed <= room.work_bytes);
                    let is_full = passed + bytes > room.work_bytes;
                    assert!(passed >= 2 * l2_bytes || is_full, "{free_bytes} {inputs}");
                    assert!(!is_full || free_bytes < GIB);
                }
            }
        }
    }

    #[test]
    fn results_are_no_inputs() {
        for free_bytes in [80 * GIB, 512 * MIB] {
            let room = Room::within((free_bytes, 0), ProbeScale::Full.gpu());
            let extent = room.extent;
            let shapes = extent.gemm_shapes.iter();
            let all = shapes.flat_map(|&(i, o)| extent.gemm_rows.iter().map(move |&m| (m, i, o)));
            let tasks = all.filter_map(|shape| product(&room, Dtype::F16, shape));
            let (mut read_to, mut written_from) = (0, u64::MAX);
            for task in tasks {
                let Op::Compute(Compute::Gemm(g)) = task.turn(0) else {
                    panic!("a product")
                };
                read_to = read_to.max(g.x + 4 * (g.m * g.inputs) as u64);
                written_from = written_from.min(g.out);
                let written_to = g.out + 4 * (g.m * g.rows) as u64;
                assert!(written_to <= room.values() + room.values_bytes);
            }
            assert!(read_to <= written_from, "{free_bytes}");
        }
    }

    #[test]
    fn numbers_are_finite_in_every_format() {
        let numbers = numbers(4096);
        assert_eq!(numbers.len(), 4096);
        let halves = numbers
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]));
        let different: BTreeSet<u16> = halves.clone().collect();
        assert!(different.len() > 500);
        assert!(halves.clone().all(|h| f16::from_bits(h).is_normal()));
        assert!(halves.clone().all(|h| bf16::from_bits(h).is_normal()));
        let words = numbers
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        assert!(words.into_iter().all(|w| w.is_normal() && w < 0.01));
    }
}
