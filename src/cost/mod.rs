//! What a policy costs: bytes per tier (footprint) and seconds per lane (rates, terms, estimate).

pub mod affine;
pub mod block;
pub mod contention;
pub mod cuda_buffers;
pub mod curves;
pub mod cycles;
pub mod estimate;
pub mod figures;
pub mod footprint;
mod launches;
pub mod layer;
pub mod load;
pub mod locks;
pub mod near;
mod queue;
pub mod rates;
pub mod requests;
pub mod ring;
mod rows;
mod serial;
pub mod spill;
pub mod steps;
pub mod terms;
mod traffic;
mod waits;

use crate::model::ModelSpec;
use crate::units::{MIB, PAGE_BYTES};

/// What the kernel holds for arenas of so many bytes. Page tables take 8 bytes for each 4 KiB page, a 512th;
/// a memory cgroup charges more as arenas grow (pages in flight to and from disks, pages in the processors'
/// own lists). With a 512th alone opt-13b was killed in a cgroup of its 8 GiB.
pub fn kernel_bytes(arena_bytes: u64) -> u64 {
    arena_bytes / 128
}

/// Ids, positions and places of one row of a pass, in tables that its operations share.
pub const ROW_TABLE_BYTES: u64 = 24;

/// Bytes that are brought from a source at once, in its layout and in ours.
pub const SOURCE_PIECE_BYTES: u64 = 8 * MIB;

/// What it takes to bring weights from their source: a piece in both layouts, a whole small tensor, and the
/// stacks of the threads that lay the pieces out.
pub fn source_bytes(model: &ModelSpec, threads: usize) -> u64 {
    let small = model.smalls().iter().map(|s| s.bytes()).max().unwrap_or(0);
    2 * (SOURCE_PIECE_BYTES + PAGE_BYTES) + small + threads as u64 * MIB / 4
}
