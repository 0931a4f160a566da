//! What a run writes to disk beside the store: cache and hidden states at home there, and rows that are not taken
//! from the store. Sizes and offsets only.

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
            rows: OwnRows::new(placement, input.device, input.host.unpacked).bytes,
        }
    }

    pub fn total(&self) -> u64 {
        self.cache + self.hidden + self.rows
    }
}

/// Rows on disk that are not taken from the store, in a file of the run's own that is written when the weights are
/// loaded. With a store these are the rows that the CPU multiplies beside a GPU: the store has them in the GPU's
/// layout. Without one they are all, and the panels of the token table that only this file has for lookups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OwnRows {
    /// Of each matrix: offsets of its first shipped and first multiplied chunk. Chunks are those of the stream,
    /// each from a new page on.
    firsts: Vec<[Option<u64>; 2]>,
    /// The token table's panels from one on to the last, in the computing device's layout.
    pub table: Option<TablePart>,
    /// The whole file, whole pages.
    pub bytes: u64,
}

/// Panels from `first` on, side by side from a page on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TablePart {
    pub index: usize,
    pub first: usize,
    pub offset: u64,
}

const ON_DISK: [WeightHome; 2] = [WeightHome::DiskShip, WeightHome::DiskCompute];

impl OwnRows {
    pub fn new(placement: &Placement, device: DeviceKind, unpacked: bool) -> Self {
        let mut own = OwnRows::default();
        let turned = device.weight_layout() == WeightLayout::GpuRowMajor;
        if !turned && !unpacked {
            return own;
        }
        for (index, matrix) in placement.matrices.iter().enumerate() {
            let mut firsts = [None; 2];
            // A token table of its own is looked up, never multiplied.
            let streamed = ON_DISK
                .iter()
                .filter(|_| matrix.kind != MatrixKind::Embedding);
            for &home in streamed.filter(|&&home| unpacked || home == WeightHome::DiskCompute) {
                let panels = placement.splits[index].count(home);
                firsts[home as usize - ON_DISK[0] as usize] = (panels > 0).then_some(own.bytes);
                own.bytes += file_bytes(panels, placement.panel_bytes[index]);
            }
            own.firsts.push(firsts);
        }
        if unpacked {
            own.add_table(placement, turned);
        }
        own
    }

    /// What is multiplied on the CPU beside a GPU is in its layout in DRAM, too.
    fn add_table(&mut self, placement: &Placement, turned: bool) {
        let index = placement.table();
        let away = match turned {
            true => WeightHome::CpuCompute,
            false => WeightHome::DiskShip,
        };
        let first = placement.splits[index].first(away);
        let panels = placement.matrices[index].panels() - first;
        self.table = (panels > 0).then_some(TablePart {
            index,
            first,
            offset: self.bytes,
        });
        self.bytes += round_up(panels as u64 * placement.panel_bytes[index], PAGE_BYTES);
    }

    /// Where in the file a chunk begins that begins with panel `panel` of the matrix; None where the store has it.
    pub fn chunk(
        &self,
        placement: &Placement,
        (index, home): (usize, WeightHome),
        panel: usize,
    ) -> Option<u64> {
        let which = (home as usize).checked_sub(ON_DISK[0] as usize)?;
        let first = self.firsts.get(index)?[which]?;
        let before = panel - placement.splits[index].first(home);
        Some(first + file_bytes(before, placement.panel_bytes[index]))
    }

    /// Where in the file a panel of the token table is for lookups; None where the store has it.
    pub fn looked_up(&self, placement: &Placement, panel: usize) -> Option<u64> {
        let table = self.table?;
        let before = (panel - table.first) as u64;
        Some(table.offset + before * placement.panel_bytes[table.index])
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
        let own = OwnRows::new(&placement, DeviceKind::Cuda, false);
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
        let in_place = OwnRows::new(&placement, DeviceKind::Host, false);
        assert_eq!(in_place, OwnRows::default());
    }
    #[test]
    fn without_a_store_the_file_has_all_rows_on_disk_and_the_table() {
        let mut placement = placement(&[5000, 7 << 20, 17 << 20]);
        placement.splits[2].panels = [1, 2, 3, 0, 0];
        let head = placement.matrices[2].panels();
        for device in [DeviceKind::Cpu, DeviceKind::Cuda] {
            let own = OwnRows::new(&placement, device, true);
            let mut end = 0;
            for (home, first) in [(WeightHome::DiskShip, 6), (WeightHome::DiskCompute, 10)] {
                assert_eq!(own.chunk(&placement, (0, home), first), Some(end));
                let panels = placement.splits[0].count(home) as u64;
                end += round_up(panels * 5000, PAGE_BYTES);
                assert_eq!(own.chunk(&placement, (2, home), 6), None);
            }
            let table = own.table.expect("rows that only the file has");
            let first = if device == DeviceKind::Cpu { 6 } else { 3 };
            assert_eq!((table.index, table.first), (2, first));
            let panel_bytes = placement.panel_bytes[2];
            let at = own.looked_up(&placement, first + 1);
            assert_eq!(at, Some(table.offset + panel_bytes));
            assert_eq!(
                own.bytes,
                table.offset + (head - first) as u64 * panel_bytes
            );
        }
    }
}
