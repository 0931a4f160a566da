//! Where a tensor's elements lie in a file: offset, element type, shape, strides, all checked
//! against the file's length before use; and the gathering of views that are not contiguous.

use super::CheckpointError;
use super::file::WeightFile;
use crate::dtype::Dtype;

/// Element type of a stored tensor. Other types may be there (index buffers) but not be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    Float(Dtype),
    Other { name: &'static str, bytes: u64 },
}

impl Element {
    pub fn bytes(self) -> u64 {
        match self {
            Element::Float(dtype) => dtype.row_bytes(1),
            Element::Other { bytes, .. } => bytes,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Element::Float(dtype) => super::fault::dtype_word(dtype),
            Element::Other { name, .. } => name,
        }
    }
}

/// A tensor in a file: element (i, j, …) starts at `offset` + (i·strides[0] + j·strides[1] + …)
/// times the element's size.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Extent {
    pub offset: u64,
    pub element: Element,
    pub shape: Vec<u64>,
    /// In elements, never negative.
    pub strides: Vec<u64>,
}

/// Bytes that a gather of scattered elements reads at once.
const GATHER_BYTES: u64 = 1 << 20;

impl Extent {
    /// A row-major tensor.
    pub fn contiguous(offset: u64, element: Element, shape: Vec<u64>) -> Option<Extent> {
        let mut strides = vec![1u64; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i].checked_mul(shape[i])?;
        }
        Some(Extent {
            offset,
            element,
            shape,
            strides,
        })
    }

    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |n, &s| n.checked_mul(s))
    }

    /// Bytes from `offset` to the end of the last element; None on overflow.
    pub fn span_bytes(&self) -> Option<u64> {
        if self.shape.len() != self.strides.len() {
            return None;
        }
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = 0u64;
        for (size, stride) in self.shape.iter().zip(&self.strides) {
            last = last.checked_add((size - 1).checked_mul(*stride)?)?;
        }
        last.checked_add(1)?.checked_mul(self.element.bytes())
    }

    /// True when the tensor lies whole within `start..end` of its file.
    pub fn lies_within(&self, start: u64, end: u64) -> bool {
        let last = self
            .span_bytes()
            .and_then(|span| self.offset.checked_add(span));
        self.offset >= start && last.is_some_and(|last| last <= end) && self.elements().is_some()
    }

    /// Rows `first..first + rows` of the tensor seen as a matrix with `columns` columns (a vector
    /// is one row), row-major into `out`.
    pub fn read_rows(
        &self,
        file: &WeightFile,
        (first, rows): (u64, u64),
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let (row_stride, column_stride, columns) = match (&self.shape[..], &self.strides[..]) {
            ([columns], [stride]) => (0, *stride, *columns),
            ([_, columns], [row, column]) => (*row, *column, *columns),
            _ => return Err(self.odd(file)),
        };
        if columns == 0 || rows == 0 {
            return Ok(());
        }
        let size = self.element.bytes();
        let start = self.offset + first * row_stride * size;
        let packed = column_stride == 1 || columns == 1;
        if packed && (row_stride == columns || rows <= 1) {
            return file.read(start, out);
        }
        if packed {
            let row_bytes = (columns * size) as usize;
            for (i, row) in out.chunks_exact_mut(row_bytes).enumerate() {
                file.read(start + i as u64 * row_stride * size, row)?;
            }
            return Ok(());
        }
        // The side with the smaller stride is walked inside, so that one read serves many elements.
        let mut buffer = Vec::new();
        if row_stride < column_stride {
            for column in 0..columns {
                let walk = Walk {
                    start: start + column * column_stride * size,
                    count: rows,
                    stride: row_stride,
                    size,
                    out_first: column,
                    out_stride: columns,
                };
                walk.gather(file, &mut buffer, out)?;
            }
            return Ok(());
        }
        for row in 0..rows {
            let walk = Walk {
                start: start + row * row_stride * size,
                count: columns,
                stride: column_stride,
                size,
                out_first: row * columns,
                out_stride: 1,
            };
            walk.gather(file, &mut buffer, out)?;
        }
        Ok(())
    }

    fn odd(&self, file: &WeightFile) -> CheckpointError {
        let why = format!(
            "a tensor has {} dimensions where 1 or 2 are expected",
            self.shape.len()
        );
        CheckpointError::damaged(&file.path, why)
    }
}

/// Elements at equal distances in the file, to equal distances in memory.
struct Walk {
    start: u64,
    count: u64,
    stride: u64,
    size: u64,
    out_first: u64,
    out_stride: u64,
}

impl Walk {
    /// Reads as many elements at once as fit in `GATHER_BYTES` with the gaps between them.
    fn gather(
        &self,
        file: &WeightFile,
        buffer: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let step = self.stride.saturating_mul(self.size);
        let at_once = (GATHER_BYTES / step.max(1)).max(1);
        let size = self.size as usize;
        let mut done = 0;
        while done < self.count {
            let count = at_once.min(self.count - done);
            buffer.resize(((count - 1) * step + self.size) as usize, 0);
            file.read(self.start + done * step, buffer)?;
            for i in 0..count {
                let to = ((self.out_first + (done + i) * self.out_stride) * self.size) as usize;
                let from = (i * step) as usize;
                out[to..to + size].copy_from_slice(&buffer[from..from + size]);
            }
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, shape: &[u64], strides: &[u64]) -> Extent {
        Extent {
            offset,
            element: Element::Float(Dtype::F16),
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        }
    }

    #[test]
    fn spans_are_checked_without_overflow() {
        assert!(extent(10, &[3, 4], &[4, 1]).lies_within(10, 34));
        assert!(!extent(10, &[3, 4], &[4, 1]).lies_within(10, 33));
        assert!(!extent(10, &[3, 4], &[4, 1]).lies_within(11, 99));
        assert!(!extent(0, &[u64::MAX, 2], &[2, 1]).lies_within(0, u64::MAX));
        assert!(!extent(0, &[u64::MAX, 2], &[0, 0]).lies_within(0, u64::MAX));
        assert!(!extent(u64::MAX, &[1], &[1]).lies_within(0, u64::MAX));
        assert!(!extent(0, &[1, 1], &[1]).lies_within(0, 99));
        assert!(Extent::contiguous(0, Element::Float(Dtype::F16), vec![2, u64::MAX, 3]).is_none());
    }

    #[test]
    fn every_view_is_gathered() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("numbers");
        let bytes: Vec<u8> = (0..600u16).flat_map(u16::to_le_bytes).collect();
        std::fs::write(&path, bytes).expect("written");
        let file = WeightFile::open(&path).expect("open");
        let views = [
            [7u64, 1],
            [9, 1],
            [1, 11],
            [20, 3],
            [3, 20],
            [0, 1],
            [1, 0],
            [0, 0],
        ];
        for strides in views {
            let view = extent(4, &[11, 7], &strides);
            for (first, rows) in [(0u64, 11u64), (3, 4), (10, 1), (4, 0)] {
                let mut out = vec![0; (rows * 14) as usize];
                view.read_rows(&file, (first, rows), &mut out)
                    .expect("inside");
                let expected = (first..first + rows).flat_map(|i| {
                    (0..7u64).map(move |j| (2 + i * strides[0] + j * strides[1]) as u16)
                });
                let expected: Vec<u8> = expected.flat_map(u16::to_le_bytes).collect();
                assert_eq!(out, expected, "{strides:?} {first}+{rows}");
            }
        }
    }
}
