//! What can be asked of a machine: reads, writes, copies and the arithmetic of one OPT layer, as plain
//! data over offsets into the tiers' arenas. Says what is to be done; never does it.

use crate::dtype::{Arithmetic, Dtype, panels};
use crate::model::Activation;
use crate::tier::{Lane, Tier};
use std::sync::Arc;

/// Which open file an operation means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId(pub usize);

/// The files of a run: packed weights, cached tokens, hidden rows, weight rows of its own.
impl FileId {
    pub const STORE: FileId = FileId(0);
    pub const CACHE: FileId = FileId(1);
    pub const HIDDEN: FileId = FileId(2);
    pub const ROWS: FileId = FileId(3);
}

/// A stretch of a file and of the Cpu arena; all three figures are multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FileSpan {
    pub file: FileId,
    pub offset: u64,
    pub memory: u64,
    pub bytes: u64,
}

/// A stretch of a file that need not be aligned, on its way to any tier's arena through a bounce buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadSpan {
    pub file: FileId,
    pub offset: u64,
    pub bytes: u64,
    pub to: Tier,
    pub memory: u64,
    /// Set where whole panels come in a GPU's layout and the CPU will multiply them: format and inputs.
    pub repack: Option<(Dtype, usize)>,
}

/// What the copy engines of GPUs take from row to row, with room to spare.
const MOST_STRIDE: u64 = 1 << 30;

/// `rows` pieces of `row_bytes` from one arena to the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Copy2d {
    pub from: u64,
    pub from_stride: u64,
    pub to: u64,
    pub to_stride: u64,
    pub row_bytes: u64,
    pub rows: u64,
}

impl Copy2d {
    pub fn flat(from: u64, to: u64, bytes: u64) -> Self {
        Copy2d {
            from,
            from_stride: bytes,
            to,
            to_stride: bytes,
            row_bytes: bytes,
            rows: 1,
        }
    }

    /// One run of bytes on both sides.
    pub fn is_flat(&self) -> bool {
        let whole = |stride| stride == self.row_bytes;
        self.rows == 1 || (whole(self.from_stride) && whole(self.to_stride))
    }

    /// Both as one, where the next lies behind this one on both sides, or as a further row of it.
    pub fn with(&self, next: &Copy2d) -> Option<Copy2d> {
        let bytes = self.rows * self.row_bytes;
        let behind = self.from + bytes == next.from && self.to + bytes == next.to;
        if self.is_flat() && next.is_flat() && behind {
            let bytes = bytes + next.rows * next.row_bytes;
            return Some(Copy2d::flat(self.from, self.to, bytes));
        }
        let (from_stride, to_stride) = match self.rows {
            1 => (
                next.from.checked_sub(self.from)?,
                next.to.checked_sub(self.to)?,
            ),
            _ => (self.from_stride, self.to_stride),
        };
        let is_row = |stride: u64| (self.row_bytes..=MOST_STRIDE).contains(&stride);
        let further = next.rows == 1
            && next.row_bytes == self.row_bytes
            && self.from + self.rows * from_stride == next.from
            && self.to + self.rows * to_stride == next.to;
        (further && is_row(from_stride) && is_row(to_stride)).then_some(Copy2d {
            from_stride,
            to_stride,
            rows: self.rows + 1,
            ..*self
        })
    }
}

/// Part of a shared table of u32: one entry a row.
#[derive(Clone, Debug)]
pub struct Table {
    pub entries: Arc<[u32]>,
    pub first: usize,
    pub len: usize,
}

impl Table {
    pub fn whole(entries: Arc<[u32]>) -> Self {
        Table {
            len: entries.len(),
            entries,
            first: 0,
        }
    }

    pub fn part(&self, first: usize, len: usize) -> Self {
        Table {
            entries: self.entries.clone(),
            first: self.first + first,
            len,
        }
    }

    pub fn as_slice(&self) -> &[u32] {
        &self.entries[self.first..self.first + self.len]
    }
}

/// Rows of hidden values: entry r of `rows` is a row's index from `base`.
#[derive(Clone, Debug)]
pub struct HiddenRows {
    pub base: u64,
    pub rows: Table,
    pub width: usize,
}

/// A learned scale and shift; absent for norms without them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    pub weight: Option<u64>,
    pub bias: Option<u64>,
}

/// out[i, n] = act(Σ x[i, k] · w[n, k] + bias[n]) for n in 0..rows.
#[derive(Clone, Debug)]
pub struct Gemm {
    pub x: u64,
    pub x_stride: usize,
    pub m: usize,
    pub inputs: usize,
    /// First panel of packed weights.
    pub weights: u64,
    pub format: Dtype,
    pub arithmetic: Arithmetic,
    /// A GPU, too, keeps the activations in fp32.
    pub wide: bool,
    pub rows: usize,
    pub bias: Option<u64>,
    pub activation: Option<Activation>,
    pub out: u64,
    pub out_stride: usize,
}

/// Where a sequence's KV records are: consecutive from the base, or one index a token.
#[derive(Clone, Debug)]
pub enum KvSlots {
    Contiguous,
    Table(Arc<[u32]>),
}

/// One sequence's cache in an arena. `capacity` records of `record_bytes` can be reached from `base`.
#[derive(Clone, Debug)]
pub struct KvPlace {
    pub base: u64,
    pub capacity: u64,
    pub slots: KvSlots,
}

/// Rows of one sequence inside a chunk.
#[derive(Clone, Debug)]
pub struct KvItem {
    pub first_row: usize,
    pub rows: usize,
    /// Tokens cached before the first of these rows.
    pub past: usize,
    pub decode: bool,
    pub kv: KvPlace,
}

/// Appending and attending share their operands: q, k, v rows, and the sequences' caches.
#[derive(Clone, Debug)]
pub struct Attention {
    pub qkv: u64,
    pub heads: usize,
    pub hidden: usize,
    pub format: Dtype,
    pub items: Arc<[KvItem]>,
    /// Attended rows, `hidden` wide, at the same row indices as the queries.
    pub out: u64,
    /// A GPU, too, keeps queries and weights of the values in fp32.
    pub wide: bool,
}

/// Arithmetic on one device.
#[derive(Clone, Debug)]
pub enum Compute {
    Gemm(Gemm),
    /// Token table rows (relative to the panel at `table`) into f32 rows.
    Embed {
        table: u64,
        panels: usize,
        format: Dtype,
        ids: Table,
        to: HiddenRows,
    },
    /// x[row] += positions[index]
    AddPositions {
        table: u64,
        table_rows: usize,
        format: Dtype,
        indices: Table,
        to: HiddenRows,
    },
    /// out (contiguous) = norm(x[row])
    Norm {
        from: HiddenRows,
        affine: Affine,
        out: u64,
    },
    /// x[row] = norm(x[row])
    NormInPlace {
        rows: HiddenRows,
        affine: Affine,
    },
    /// out (contiguous) = x[row]
    Gather {
        from: HiddenRows,
        out: u64,
    },
    /// x[row] = y (contiguous)
    Scatter {
        to: HiddenRows,
        y: u64,
    },
    /// x[row] += y (contiguous)
    AddRows {
        to: HiddenRows,
        y: u64,
    },
    /// Keys and values of the rows into the items' caches.
    Append(Attention),
    /// Softmax(q·k) · v over the items' caches.
    Attend(Attention),
    /// 4-bit weights to fp16 in a GPU's scratch memory: what it does before a product of many rows, by itself.
    Widen(Widen),
}

/// First panel of packed 4-bit weights, and their shape.
#[derive(Clone, Copy, Debug)]
pub struct Widen {
    pub weights: u64,
    pub inputs: usize,
    pub rows: usize,
}

impl Widen {
    /// Bytes that are read.
    pub fn bytes(&self) -> u64 {
        panels(self.rows) as u64 * Dtype::Q4.panel_bytes(self.inputs)
    }
}

/// One task for one lane.
#[derive(Clone, Debug)]
pub enum Op {
    Read(Vec<FileSpan>),
    Write(Vec<FileSpan>),
    Load(LoadSpan),
    Copy { pinned: bool, pieces: Vec<Copy2d> },
    Compute(Compute),
}

impl Op {
    /// Bytes that the operation moves over its lane; 0 for arithmetic.
    pub fn bytes(&self) -> u64 {
        match self {
            Op::Read(spans) | Op::Write(spans) => spans.iter().map(|s| s.bytes).sum(),
            Op::Load(span) => span.bytes,
            Op::Copy { pieces, .. } => pieces.iter().map(|p| p.rows * p.row_bytes).sum(),
            Op::Compute(_) => 0,
        }
    }
}

/// The tier whose arena a compute lane works in.
pub fn tier_of(lane: Lane) -> Tier {
    if lane == Lane::GpuCompute {
        Tier::Gpu
    } else {
        Tier::Cpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[(u64, u64)], bytes: u64) -> Option<Copy2d> {
        let flat = |&(from, to): &(u64, u64)| Copy2d::flat(from, to, bytes);
        let (first, rest) = pieces.split_first().expect("a piece");
        rest.iter()
            .try_fold(flat(first), |run, piece| run.with(&flat(piece)))
    }

    #[test]
    fn neighbours_become_one_copy() {
        assert_eq!(
            all(&[(0, 50), (8, 58), (16, 66)], 8),
            Some(Copy2d::flat(0, 50, 24))
        );
        let rows = Copy2d {
            from_stride: 8,
            to_stride: 100,
            rows: 3,
            ..Copy2d::flat(0, 50, 8)
        };
        assert_eq!(all(&[(0, 50), (8, 150), (16, 250)], 8), Some(rows));
    }

    #[test]
    fn what_is_no_further_row_stays_apart() {
        for pieces in [
            [(0, 50), (8, 150), (16, 240)],
            [(0, 50), (8, 150), (24, 250)],
            [(0, 50), (4, 150), (8, 250)],
            [(0, 350), (8, 250), (16, 150)],
            [(0, 0), (MOST_STRIDE + 1, 8), (2 * MOST_STRIDE + 2, 16)],
        ] {
            assert_eq!(all(&pieces, 8), None, "{pieces:?}");
        }
        let row = Copy2d::flat(0, 50, 8);
        assert_eq!(row.with(&Copy2d::flat(8, 150, 4)), None);
    }
}
