//! Where each buffer of the footprint and each resident tensor lies in its tier's arena. Offsets only.

use crate::cost::footprint::{Buffer, Footprint, compute_tier, page_step_bytes};
use crate::model::{ModelSpec, Small, SmallKind};
use crate::placement::{Placement, WeightHome};
use crate::policy::DeviceKind;
use crate::tier::{PerTier, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::collections::{BTreeMap, HashMap};

/// Small tensors start at this alignment.
const SMALL_ALIGN: u64 = 64;

/// A buffer's place in its arena.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Place {
    pub offset: u64,
    pub bytes: u64,
}

impl Place {
    /// Where one of so many equal parts begins, each at a page.
    pub fn part(self, part: usize, parts: usize) -> u64 {
        let bytes = self.bytes / parts as u64 / PAGE_BYTES * PAGE_BYTES;
        self.offset + part as u64 * bytes
    }
}

/// All places of one run.
#[derive(Clone, Debug)]
pub struct Layout {
    buffers: PerTier<BTreeMap<Buffer, Place>>,
    /// Per matrix and home: offset of its resident panels in the home's arena.
    homes: Vec<[Option<u64>; 5]>,
    /// Offset of each small tensor from the start of the Smalls buffer.
    smalls: HashMap<(SmallKind, usize), u64>,
}

impl Layout {
    pub fn new(model: &ModelSpec, placement: &Placement, footprint: &Footprint) -> Self {
        let buffers = PerTier {
            gpu: place(footprint, Tier::Gpu),
            cpu: place(footprint, Tier::Cpu),
            disk: BTreeMap::new(),
        };
        let mut layout = Layout {
            buffers,
            homes: vec![[None; 5]; placement.matrices.len()],
            smalls: HashMap::new(),
        };
        layout.place_weights(placement);
        layout.place_smalls(model);
        layout
    }

    fn place_weights(&mut self, placement: &Placement) {
        let mut next = PerTier {
            gpu: self.buffer(Tier::Gpu, Buffer::Weights).offset,
            cpu: self.buffer(Tier::Cpu, Buffer::Weights).offset,
            disk: 0,
        };
        for index in 0..placement.matrices.len() {
            for home in WeightHome::RESIDENT {
                let bytes = placement.part_bytes(index, home);
                if bytes > 0 {
                    self.homes[index][home as usize] = Some(next[home.tier()]);
                    next[home.tier()] += bytes;
                }
            }
        }
    }

    fn place_smalls(&mut self, model: &ModelSpec) {
        let mut offset = 0;
        for small in model.smalls() {
            self.smalls.insert((small.kind, small.stage), offset);
            offset = round_up(offset + small.bytes(), SMALL_ALIGN);
        }
    }

    /// A buffer's place; empty where this run has none.
    pub fn buffer(&self, tier: Tier, buffer: Buffer) -> Place {
        self.buffers[tier].get(&buffer).copied().unwrap_or_default()
    }

    /// All that this run has.
    pub fn buffers(&self, tier: Tier) -> Vec<Buffer> {
        self.buffers[tier].keys().copied().collect()
    }

    /// Arena offset of a matrix's resident panels at a home.
    pub fn home(&self, matrix: usize, home: WeightHome) -> Option<u64> {
        self.homes[matrix][home as usize]
    }

    /// Arena offset of a small tensor on a tier that keeps them; None where the model has no such tensor.
    pub fn small(&self, tier: Tier, kind: SmallKind, stage: usize) -> Option<u64> {
        let base = self.buffer(tier, Buffer::Smalls).offset;
        self.smalls.get(&(kind, stage)).map(|offset| base + offset)
    }

    /// Offset of a small tensor inside the Smalls buffer.
    pub fn small_offset(&self, small: &Small) -> u64 {
        self.smalls[&(small.kind, small.stage)]
    }
}

fn place(footprint: &Footprint, tier: Tier) -> BTreeMap<Buffer, Place> {
    let mut offset = 0;
    let mut places = BTreeMap::new();
    for (buffer, bytes) in footprint.arena(tier) {
        places.insert(buffer, Place { offset, bytes });
        offset += bytes;
    }
    places
}

/// Hidden rows on the compute device are counted from one base, so that rows at home and rows visiting
/// share one row table.
#[derive(Clone, Copy, Debug)]
pub struct HiddenSpace {
    pub base: u64,
    pub row_bytes: u64,
    /// First visiting row, and rows that can visit.
    stage_first: u64,
    stage_rows: u64,
    /// Visiting items start at multiples of this many rows: without a GPU they are read from disk in place.
    pub step_rows: u32,
}

impl HiddenSpace {
    pub fn new(layout: &Layout, device: DeviceKind, row_bytes: u64) -> Self {
        let tier = compute_tier(device);
        let home = layout.buffer(tier, Buffer::Hidden);
        let stage = layout.buffer(tier, Buffer::HiddenStage);
        let base = if home.bytes > 0 {
            home.offset
        } else {
            stage.offset
        };
        let step = if device.has_gpu() {
            1
        } else {
            page_step_bytes(row_bytes) / row_bytes
        };
        let first = round_up(stage.offset.saturating_sub(base).div_ceil(row_bytes), step);
        HiddenSpace {
            base,
            row_bytes,
            stage_first: first,
            stage_rows: (stage.bytes / row_bytes).saturating_sub(2 * step),
            step_rows: step as u32,
        }
    }

    /// First visiting row of each of so many parts.
    pub fn parts(&self, parts: usize) -> Vec<u32> {
        let step = u64::from(self.step_rows);
        let rows = self.stage_rows / parts as u64 / step * step;
        (0..parts as u64)
            .map(|part| (self.stage_first + part * rows) as u32)
            .collect()
    }

    pub fn offset(&self, row: u32) -> u64 {
        self.base + row as u64 * self.row_bytes
    }
}
