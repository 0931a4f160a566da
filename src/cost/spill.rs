//! What a run writes to disk beside the store: cache and hidden states at home there, and streamed rows that
//! lie there in another layout than the store's. Sizes and offsets only.

use crate::cost::footprint::{FootprintInput, HIDDEN_VALUE_BYTES, chunk_panels};
use crate::dtype::WeightLayout;
use crate::model::MatrixKind;
use crate::placement::{Placement, WeightHome};
use crate::policy::DeviceKind;
use crate::tier::Tier;
use crate::units::{PAGE_BYTES, round_up};

/// Bytes of a run's own files.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SpillBytes {
    pub cache: u64,
    pub hidden: u64,
    pub rows: u64,
}

impl SpillBytes {
    /// `record_bytes` = keys and values of one token in one layer.
    pub fn new(input: &FootprintInput, record_bytes: u64) -> Self {
        let (model, block, placement) = (input.model, input.block, input.placement);
        let per_layer = block.kv_tokens.disk * record_bytes + block.cache_slots.disk * PAGE_BYTES;
        let hidden = block.hidden_rows.disk * model.hidden as u64 * HIDDEN_VALUE_BYTES;
        let on_disk = placement.hidden_tiers.iter().filter(|&&t| t == Tier::Disk);
        SpillBytes {
            cache: model.layers as u64 * round_up(per_layer, PAGE_BYTES),
            hidden: round_up(hidden, PAGE_BYTES) + on_disk.count() as u64 * PAGE_BYTES,
            rows: OwnRows::new(placement, input.device).bytes,
        }
    }

    pub fn total(&self) -> u64 {
        self.cache + self.hidden + self.rows
    }
}

/// Rows on disk that the CPU multiplies beside a GPU. The store has them in the GPU's layout: they are turned
/// once, when the weights are loaded, into a file of the run's own, in chunks as they are streamed, each from a
/// new page on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnRows {
    /// Offset of each matrix's first chunk; None where it has no such rows.
    firsts: Vec<Option<u64>>,
    /// The whole file, whole pages.
    pub bytes: u64,
}

impl OwnRows {
    pub fn new(placement: &Placement, device: DeviceKind) -> Self {
        let mut own = OwnRows::default();
        if device.weight_layout() == WeightLayout::CpuPanel64 {
            return own;
        }
        for (index, matrix) in placement.matrices.iter().enumerate() {
            let panels = placement.splits[index].count(WeightHome::DiskCompute);
            // A token table of its own is looked up, never multiplied.
            let multiplied = panels > 0 && matrix.kind != MatrixKind::Embedding;
            own.firsts.push(multiplied.then_some(own.bytes));
            if multiplied {
                own.bytes += file_bytes(panels, placement.panel_bytes[index]);
            }
        }
        own
    }

    /// Where in the file a chunk begins that begins with panel `panel` of the matrix; None where the store has it.
    pub fn chunk(
        &self,
        placement: &Placement,
        (index, home): (usize, WeightHome),
        panel: usize,
    ) -> Option<u64> {
        let first = (*self.firsts.get(index)?).filter(|_| home == WeightHome::DiskCompute)?;
        let before = panel - placement.splits[index].first(home);
        Some(first + file_bytes(before, placement.panel_bytes[index]))
    }
}

/// Bytes of so many panels of a matrix in the file.
fn file_bytes(panels: usize, panel_bytes: u64) -> u64 {
    let most = chunk_panels(panel_bytes);
    let chunk = |panels: usize| round_up(panels as u64 * panel_bytes, PAGE_BYTES);
    (panels / most) as u64 * chunk(most) + chunk(panels % most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::MatrixSplit;

    /// One matrix after another, each with panels to ship and panels to multiply on disk.
    fn placement(panel_bytes: &[u64]) -> Placement {
        let mut model = crate::model::families::named_size("opt-125m").expect("known");
        model.layers = 1;
        let mut matrices = model.matrices();
        matrices.truncate(panel_bytes.len());
        let splits = vec![
            MatrixSplit {
                panels: [1, 2, 3, 4, 5]
            };
            panel_bytes.len()
        ];
        Placement {
            matrices,
            splits,
            panel_bytes: panel_bytes.to_vec(),
            cache_tiers: Vec::new(),
            hidden_tiers: Vec::new(),
            smalls_bytes: 0,
        }
    }

    #[test]
    fn chunks_follow_each_other_from_pages_on() {
        // Chunks of five, of two and of one panel.
        let placement = placement(&[5000, 7 << 20, 17 << 20]);
        let own = OwnRows::new(&placement, DeviceKind::Cuda);
        let mut end = 0;
        for (index, &panel_bytes) in placement.panel_bytes.iter().enumerate() {
            let (first, most) = (10, chunk_panels(panel_bytes));
            for start in (0..5).step_by(most) {
                let home = (index, WeightHome::DiskCompute);
                let at = own.chunk(&placement, home, first + start);
                assert_eq!(at, Some(end), "{index} {start}");
                let bytes = most.min(5 - start) as u64 * panel_bytes;
                end = round_up(end + bytes, PAGE_BYTES);
            }
            let shipped = own.chunk(&placement, (index, WeightHome::DiskShip), 6);
            assert_eq!(shipped, None);
        }
        assert_eq!(own.bytes, end);
        let in_place = OwnRows::new(&placement, DeviceKind::Host);
        assert_eq!(in_place, OwnRows::default());
    }
}
