//! Writes random weights as a checkpoint in the real file format: config.json, safetensors shards
//! with their index, a byte-level tokenizer. Memory is bounded by a few buffers.

use super::{CheckpointError, SynthSource, WeightSource, get, put};
use crate::dtype::Dtype;
use crate::model::families::{TensorChoice, config_json, matrix_tensors, small_tensors};
use crate::model::{Matrix, ModelSpec, Small};
use crate::store::stream::{Sink, StreamJob, write_stream};
use crate::tokenizer::byte_level_files;
use crate::units::PAGE_BYTES;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of weights in one shard, unless asked otherwise: what Hugging Face writes.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
/// Buffers between making and writing; more bring nothing once both sides are busy.
const BUFFER_BYTES: u64 = 16 << 20;
const BUFFERS: usize = 3;
/// Weights made at once.
const PIECE_BYTES: u64 = 4 << 20;

/// A checkpoint to be made up.
pub struct SynthJob<'a> {
    /// Its `dtype` is the format of the file.
    pub spec: ModelSpec,
    pub seed: u64,
    pub dir: &'a Path,
    pub shard_bytes: u64,
    /// Told bytes done and bytes in all.
    pub progress: &'a mut dyn FnMut(u64, u64),
    pub stop: &'a AtomicBool,
}

/// One tensor of the file: a part of a matrix, or of a small tensor.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    origin: Origin,
}

enum Origin {
    Rows { matrix: Matrix, first_row: usize },
    Small { small: Small, first: usize },
}

impl Tensor {
    fn bytes(&self, dtype: Dtype) -> u64 {
        dtype.row_bytes(self.shape.iter().product())
    }
}

/// Writes the checkpoint beside `dir` and renames it into place when it is whole.
pub fn write_synth(job: SynthJob) -> Result<(), CheckpointError> {
    let io = |path: &Path, cause| CheckpointError::io(path, cause);
    // An empty directory is as good as none; anything else is somebody's data.
    let taken = |mut entries: std::fs::ReadDir| entries.next().is_some();
    if job.dir.is_file() || std::fs::read_dir(job.dir).is_ok_and(taken) {
        return Err(CheckpointError::Exists(job.dir.to_owned()));
    }
    let dir = std::path::absolute(job.dir).map_err(|e| io(job.dir, e))?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let partial = dir.with_file_name(format!(".{name}.partial.{}", std::process::id()));
    std::fs::create_dir_all(&partial).map_err(|e| io(&partial, e))?;
    let written = write_files(job, &partial)
        .and_then(|()| std::fs::rename(&partial, &dir).map_err(|e| io(&dir, e)));
    if written.is_err() {
        // The first error is the one worth telling.
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

fn write_files(job: SynthJob, dir: &Path) -> Result<(), CheckpointError> {
    let dtype = job.spec.dtype;
    let source = SynthSource::new(job.spec, job.seed);
    let shards = split(tensors_of(source.spec()), dtype, job.shard_bytes);
    let tensors = shards.iter().flatten();
    let mut writer = Writer {
        source: &source,
        done_bytes: 0,
        total_bytes: tensors.map(|t| t.bytes(dtype)).sum(),
        progress: job.progress,
        stop: job.stop,
        row: Vec::new(),
    };
    let names = shard_names(shards.len());
    for (name, shard) in names.iter().zip(&shards) {
        writer.shard(&dir.join(name), shard)?;
    }
    let text = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|e| CheckpointError::io(&path, e))
    };
    if shards.len() > 1 {
        text(
            "model.safetensors.index.json",
            index(&names, &shards, writer.total_bytes),
        )?;
    }
    let (vocab, merges) = byte_level_files(source.spec().vocab);
    text("vocab.json", vocab)?;
    text("merges.txt", merges)?;
    text("config.json", config_json(source.spec()))
}

/// All tensors in the order of a pass, under the names of OPTForCausalLM.
fn tensors_of(spec: &ModelSpec) -> Vec<Tensor> {
    let tensor = |choice: &TensorChoice, origin| Tensor {
        name: choice.names[0].clone(),
        shape: choice.shape.clone(),
        origin,
    };
    let mut list = Vec::new();
    for matrix in spec.matrices() {
        let mut first_row = 0;
        for choice in matrix_tensors(spec, &matrix) {
            list.push(tensor(&choice, Origin::Rows { matrix, first_row }));
            first_row += choice.shape[0];
        }
    }
    for small in spec.smalls() {
        let mut first = 0;
        for choice in small_tensors(spec, &small) {
            list.push(tensor(&choice, Origin::Small { small, first }));
            first += choice.shape.iter().product::<usize>();
        }
    }
    list
}

/// Fills shards one after the other; a tensor is never cut.
fn split(tensors: Vec<Tensor>, dtype: Dtype, shard_bytes: u64) -> Vec<Vec<Tensor>> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut left_bytes = 0;
    for tensor in tensors {
        let bytes = tensor.bytes(dtype);
        match shards.last_mut() {
            Some(shard) if bytes <= left_bytes => {
                left_bytes -= bytes;
                shard.push(tensor);
            }
            _ => {
                left_bytes = shard_bytes.saturating_sub(bytes);
                shards.push(vec![tensor]);
            }
        }
    }
    shards
}

fn shard_names(count: usize) -> Vec<PathBuf> {
    let name = |i| format!("model-{i:05}-of-{count:05}.safetensors").into();
    match count {
        1 => vec!["model.safetensors".into()],
        _ => (1..=count).map(name).collect(),
    }
}

fn index(names: &[PathBuf], shards: &[Vec<Tensor>], total_bytes: u64) -> String {
    let mut map = serde_json::Map::new();
    for (name, shard) in names.iter().zip(shards) {
        for tensor in shard {
            map.insert(tensor.name.clone(), name.to_string_lossy().into());
        }
    }
    let json = serde_json::json!({"metadata": {"total_size": total_bytes}, "weight_map": map});
    format!("{json:#}\n")
}

/// The header, padded with spaces so that the data begins on a page.
fn header(tensors: &[Tensor], dtype: Dtype) -> Vec<u8> {
    let kind = match dtype {
        Dtype::F32 | Dtype::Q4 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    };
    let mut map = serde_json::Map::new();
    map.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes(dtype);
        let (shape, offsets) = (&tensor.shape, [offset, end]);
        let entry = serde_json::json!({"dtype": kind, "shape": shape, "data_offsets": offsets});
        map.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let json = serde_json::Value::Object(map).to_string();
    let bytes = (8 + json.len()).next_multiple_of(PAGE_BYTES as usize);
    let mut out = ((bytes - 8) as u64).to_le_bytes().to_vec();
    out.extend(json.as_bytes());
    out.resize(bytes, b' ');
    out
}

/// What is written so far, over all shards.
struct Writer<'a> {
    source: &'a SynthSource,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    stop: &'a AtomicBool,
    /// A small tensor in f32.
    row: Vec<u8>,
}

impl Writer<'_> {
    fn shard(&mut self, path: &Path, tensors: &[Tensor]) -> Result<(), CheckpointError> {
        let dtype = self.source.spec().dtype;
        let header = header(tensors, dtype);
        let data_bytes: u64 = tensors.iter().map(|t| t.bytes(dtype)).sum();
        let job = StreamJob {
            path,
            total_bytes: header.len() as u64 + data_bytes,
            buffer_bytes: BUFFER_BYTES,
            buffers: BUFFERS,
        };
        write_stream(&job, |sink| {
            for piece in header.chunks(PIECE_BYTES as usize) {
                sink.room(piece.len()).copy_from_slice(piece);
            }
            tensors
                .iter()
                .try_for_each(|tensor| self.tensor(sink, tensor))
        })
    }

    fn tensor(&mut self, sink: &mut Sink, tensor: &Tensor) -> Result<(), CheckpointError> {
        match &tensor.origin {
            Origin::Rows { matrix, first_row } => {
                let row_bytes = self.source.spec().dtype.row_bytes(matrix.inputs);
                let at_once = (PIECE_BYTES / row_bytes).max(1) as usize;
                let end = first_row + tensor.shape[0];
                for first in (*first_row..end).step_by(at_once) {
                    let rows = at_once.min(end - first);
                    let room = sink.room(rows * row_bytes as usize);
                    self.source.read_rows(matrix, first, rows, room)?;
                    self.advance(sink, rows as u64 * row_bytes)?;
                }
                Ok(())
            }
            Origin::Small { small, first } => self.small(sink, small, *first, tensor),
        }
    }

    /// Small tensors are written in the model's own format, as published checkpoints have them.
    fn small(
        &mut self,
        sink: &mut Sink,
        small: &Small,
        first: usize,
        tensor: &Tensor,
    ) -> Result<(), CheckpointError> {
        let dtype = self.source.spec().dtype;
        self.row.resize(small.bytes() as usize, 0);
        self.source.read_small(small, &mut self.row)?;
        let count: usize = tensor.shape.iter().product();
        let at_once = (PIECE_BYTES / 4) as usize;
        for start in (0..count).step_by(at_once) {
            let piece = at_once.min(count - start);
            let room = sink.room(dtype.row_bytes(piece) as usize);
            for i in 0..piece {
                put(
                    dtype,
                    room,
                    i,
                    get(small.format, &self.row, first + start + i),
                );
            }
            self.advance(sink, dtype.row_bytes(piece))?;
        }
        Ok(())
    }

    fn advance(&mut self, sink: &Sink, bytes: u64) -> Result<(), CheckpointError> {
        self.done_bytes += bytes;
        (self.progress)(self.done_bytes, self.total_bytes);
        if self.stop.load(Ordering::Relaxed) || sink.has_failed() {
            return Err(CheckpointError::Interrupted);
        }
        Ok(())
    }
}
