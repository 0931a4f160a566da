//! The operations that a GPU is measured with, over one arena on each side. What is done with their
//! seconds is gpu.rs.

use super::scale::GpuExtent;
use crate::dtype::{Arithmetic, Dtype, panels};
use crate::machine::arena::Region;
use crate::machine::cuda::GpuPlaces;
use crate::machine::ops::{
    Attention, Compute, Copy2d, Gemm, HiddenRows, KvItem, KvPlace, KvSlots, Op, Table, Widen,
};
use crate::tier::Lane;
use crate::units::{GIB, MIB};

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
    pub op: Op,
}

fn compute(compute: Compute) -> Task {
    Task {
        lane: Lane::GpuCompute,
        op: Op::Compute(compute),
    }
}

/// Sizes and places of the two arenas.
pub struct Room {
    /// Weights, KV and large rows, from the arena's start.
    work_bytes: u64,
    values_bytes: u64,
    scratch_bytes: u64,
    /// The largest copy, page-locked and not, each in a region of its own.
    pub link_bytes: u64,
    pub extent: &'static GpuExtent,
}

impl Room {
    /// A third of what is free at most.
    pub fn within(free_bytes: u64, extent: &'static GpuExtent) -> Room {
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
            extent,
        }
    }

    fn values(&self) -> u64 {
        self.work_bytes
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
    let gemm = |x: u64| Gemm {
        x,
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
        out: x + activations,
        out_stride: outputs,
    };
    fits.then(|| compute(Compute::Gemm(gemm(room.values()))))
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
    fits.then(|| (compute(Compute::Widen(widen)), bytes))
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
        op: Op::Compute(Compute::Gemm(gemm)),
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
