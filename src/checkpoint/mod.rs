//! Where weights come from: checkpoints on disk and random weights that need no file, behind one
//! trait. Extents are checked before a byte is read; nothing here packs, places or computes.

mod extent;
mod fault;
mod file;
mod find;
mod open;
mod pickle;
mod safetensors;
mod synth;
mod torch;
mod write;
mod zip;

pub use fault::CheckpointError;
pub use find::{ModelLocation, find_model};
pub use open::Checkpoint;
pub use synth::SynthSource;
pub use write::{DEFAULT_SHARD_BYTES, SynthJob, write_synth};

use crate::dtype::Dtype;
use crate::model::{Matrix, ModelSpec, Small};
use half::{bf16, f16};

/// Something that can say the value of every weight of one model. Any range of rows may be asked
/// for, in any order, from several threads.
pub trait WeightSource: Send + Sync {
    fn spec(&self) -> &ModelSpec;

    /// What the weights are, so that a packed store is reused only for the very same ones.
    fn fingerprint(&self) -> String;

    /// `rows` rows of a matrix from `first_row` on, row-major in the spec's dtype. `out` holds
    /// exactly those rows.
    fn read_rows(
        &self,
        matrix: &Matrix,
        first_row: usize,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), CheckpointError>;

    /// A whole small tensor in its own format: f32, positions in the spec's dtype.
    fn read_small(&self, small: &Small, out: &mut [u8]) -> Result<(), CheckpointError>;
}

/// Both ends of a request agree on the rows and on the bytes; a caller that errs hears so here.
fn check_request(
    dtype: Dtype,
    matrix: &Matrix,
    (first_row, rows): (usize, usize),
    out: &[u8],
) -> Result<(), CheckpointError> {
    let bytes = rows as u64 * dtype.row_bytes(matrix.inputs);
    let inside = first_row
        .checked_add(rows)
        .is_some_and(|end| end <= matrix.rows);
    if inside && out.len() as u64 == bytes {
        return Ok(());
    }
    Err(CheckpointError::Request {
        what: format!("rows {first_row}+{rows} of {matrix:?}"),
        given_bytes: out.len() as u64,
        needed_bytes: bytes,
    })
}

/// Writes `value` as element `index` of `out`, little-endian in `dtype` (not q4).
fn put(dtype: Dtype, out: &mut [u8], index: usize, value: f32) {
    match dtype {
        Dtype::F16 => {
            out[2 * index..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        }
        Dtype::Bf16 => {
            out[2 * index..][..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
        Dtype::F32 | Dtype::Q4 => out[4 * index..][..4].copy_from_slice(&value.to_le_bytes()),
    }
}

/// Element `index` of little-endian `bytes` in `dtype` (not q4).
fn get(dtype: Dtype, bytes: &[u8], index: usize) -> f32 {
    let pair = |at: usize| [bytes[at], bytes[at + 1]];
    match dtype {
        Dtype::F16 => f16::from_le_bytes(pair(2 * index)).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes(pair(2 * index)).to_f32(),
        Dtype::F32 | Dtype::Q4 => {
            let (low, high) = (pair(4 * index), pair(4 * index + 2));
            f32::from_le_bytes([low[0], low[1], high[0], high[1]])
        }
    }
}
