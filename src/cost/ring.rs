//! Bytes of the rings through which streamed weight panels come, and the pieces in which they do.

use crate::cost::footprint::{RUN_AHEAD_BYTES, STREAM_CHUNK_BYTES};
use crate::model::MatrixKind;
use crate::placement::{Placement, WeightHome};
use crate::units::{PAGE_BYTES, round_up};

/// What a ring is for.
#[derive(Clone, Copy)]
pub(super) struct RingUse {
    /// A layer's panels meet several products.
    pub reused: bool,
    /// A layer's first product for one batch comes before the layer before is done with another.
    pub staggered: bool,
    /// A whole layer more than is needed at once.
    pub doubled: bool,
}

/// Panels of one streamed chunk of a matrix.
pub fn chunk_panels(panel_bytes: u64) -> usize {
    (STREAM_CHUNK_BYTES / panel_bytes).max(1) as usize
}

/// Bytes that one chunk takes in the ring: rounded out to whole pages for direct I/O.
pub fn chunk_slot_bytes(panels: usize, panel_bytes: u64) -> u64 {
    round_up(panels as u64 * panel_bytes + PAGE_BYTES, PAGE_BYTES)
}

/// Ring of streamed panels. Where a layer's panels meet several products, all of the layer's must be
/// there at once, or, where batches are staggered, all but its first matrix and the next layer's first; otherwise two
/// chunks are enough. Either way reading may run ahead, a whole layer in a double buffer.
pub(super) fn ring_bytes(placement: &Placement, homes: &[WeightHome], of: RingUse) -> u64 {
    let head = placement.matrices.last().map_or(0, |m| m.stage);
    let (mut layer, mut largest_chunk) = (0, 0);
    let mut rest_of_last = 0;
    // Its number, bytes, and those of its first matrix.
    let mut stage = (0, 0, 0);
    // Matrices come stage by stage.
    for (i, matrix) in placement.matrices.iter().enumerate() {
        if matrix.kind == MatrixKind::Embedding {
            continue;
        }
        if matrix.stage != stage.0 {
            rest_of_last = stage.1 - stage.2;
            stage = (matrix.stage, 0, 0);
        }
        for &home in homes {
            let panels = placement.splits[i].count(home);
            let (all, largest) = chunk_slots(panels, placement.panel_bytes[i]);
            largest_chunk = largest_chunk.max(largest);
            stage.1 += all;
        }
        if of.staggered && matrix.kind == MatrixKind::Qkv {
            stage.2 = stage.1;
            layer = layer.max(rest_of_last + stage.2);
        }
        if matrix.stage != head {
            layer = layer.max(stage.1);
        }
    }
    let at_once = if of.reused {
        layer.max(largest_chunk)
    } else {
        largest_chunk
    };
    let most = if of.doubled { layer } else { RUN_AHEAD_BYTES };
    let ahead = layer.min(most).max(largest_chunk);
    at_once + ahead + largest_chunk
}

/// Bytes in a ring of all chunks of so many panels, and of the largest one.
fn chunk_slots(panels: usize, panel_bytes: u64) -> (u64, u64) {
    let most = chunk_panels(panel_bytes);
    let slot = |panels: usize| match panels {
        0 => 0,
        _ => chunk_slot_bytes(panels, panel_bytes),
    };
    let all = (panels / most) as u64 * slot(most) + slot(panels % most);
    (all, slot(most.min(panels)))
}
