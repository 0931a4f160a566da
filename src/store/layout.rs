//! Where every tensor lies in a store's weights.bin: arithmetic only, the same for the packer, the
//! reader and the planner's sums. No file is touched here.

use crate::dtype::Dtype;
use crate::model::{MatrixKind, ModelSpec, SmallKind};
use crate::units::{PAGE_BYTES, round_up};
use serde::{Deserialize, Serialize};

/// Changes whenever the bytes inside a panel change their order or meaning.
pub const LAYOUT_REVISION: u32 = 2;
/// A cache line: what vector loads of small tensors are aligned to.
const SMALL_ALIGN_BYTES: u64 = 64;

/// A matrix in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatrixPlace {
    pub kind: MatrixKind,
    pub stage: usize,
    pub format: Dtype,
    pub offset: u64,
    pub bytes: u64,
}

/// A small tensor in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmallPlace {
    pub kind: SmallKind,
    pub stage: usize,
    pub format: Dtype,
    pub offset: u64,
    pub bytes: u64,
}

/// Small tensors first, in the order of `ModelSpec::smalls`, then the matrices in the order of
/// `ModelSpec::matrices`, each from a new page on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreLayout {
    pub smalls: Vec<SmallPlace>,
    pub matrices: Vec<MatrixPlace>,
    /// The region of small tensors, whole pages.
    pub smalls_bytes: u64,
    /// The whole file, whole pages.
    pub total_bytes: u64,
}

impl StoreLayout {
    pub fn of(spec: &ModelSpec, compress: bool) -> StoreLayout {
        let mut end = 0;
        let mut place = |bytes: u64, align: u64| {
            let offset = round_up(end, align);
            end = offset + bytes;
            offset
        };
        let small = |s: &crate::model::Small| SmallPlace {
            kind: s.kind,
            stage: s.stage,
            format: s.format,
            bytes: s.bytes(),
            offset: place(s.bytes(), SMALL_ALIGN_BYTES),
        };
        let smalls: Vec<_> = spec.smalls().iter().map(small).collect();
        let smalls_bytes = round_up(end, PAGE_BYTES);
        let mut place = |bytes: u64| {
            let offset = round_up(end, PAGE_BYTES);
            end = offset + bytes;
            offset
        };
        let matrix = |m: &crate::model::Matrix| {
            let bytes = m.packed_bytes(spec.dtype, compress);
            MatrixPlace {
                kind: m.kind,
                stage: m.stage,
                format: m.format(spec.dtype, compress),
                bytes,
                offset: place(bytes),
            }
        };
        StoreLayout {
            smalls,
            matrices: spec.matrices().iter().map(matrix).collect(),
            smalls_bytes,
            total_bytes: round_up(end, PAGE_BYTES),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::named_size;

    #[test]
    fn nothing_overlaps_and_little_is_lost() {
        for (name, compress) in [("opt-125m", false), ("opt-350m", true), ("opt-175b", true)] {
            let spec = named_size(name).expect("known");
            let layout = StoreLayout::of(&spec, compress);
            let mut end = 0;
            for place in &layout.smalls {
                assert!(place.offset >= end && place.offset % 64 == 0);
                end = place.offset + place.bytes;
            }
            assert!(end <= layout.smalls_bytes);
            for place in &layout.matrices {
                assert!(place.offset >= end && place.offset % PAGE_BYTES == 0);
                end = place.offset + place.bytes;
            }
            let lost_bytes = layout.total_bytes - spec.weights_bytes(compress);
            assert!(
                lost_bytes < PAGE_BYTES * (layout.matrices.len() as u64 + 2),
                "{name}"
            );
        }
    }
}
