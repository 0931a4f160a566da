//! Every way in which a checkpoint can be unusable, each with its cause and the way out.
//! Only messages live here; who finds the fault is in the module that looks.

use crate::dtype::Dtype;
use crate::model::families::ModelError;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why weights could not be found, opened, read or written.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("{path}: {cause}: check that the file is there and readable", path = path.display())]
    Io {
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error("{path}: {cause}", path = path.display())]
    Config { path: PathBuf, cause: ModelError },
    #[error("{}: no config.json here: name a directory in Hugging Face layout", .0.display())]
    NoConfig(PathBuf),
    #[error("{}: no weights here: expected model.safetensors or pytorch_model.bin, or their .index.json with all shards (`hf download` gets them)", .0.display())]
    NoWeights(PathBuf),
    #[error("{index}: shard {shard} is missing: download it again into the same directory", index = index.display())]
    MissingShard { index: PathBuf, shard: String },
    #[error("{path} is damaged or not a checkpoint ({why}): download it again", path = path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("{path} is a Git LFS pointer, not the file it stands for: run `git lfs pull` there, or get the model with `hf download`", path = path.display())]
    Pointer { path: PathBuf },
    #[error("{path} is refused ({why}): a checkpoint holds plain tensors only; convert it to safetensors where you trust it", path = path.display())]
    Refused { path: PathBuf, why: String },
    #[error("{path} was written by torch.save before version 1.6: convert it once with python -c \"import os, sys, torch; f = sys.argv[1]; torch.save(torch.load(f, map_location='cpu', weights_only=True), f + '.new'); os.replace(f + '.new', f)\" '{path}'", path = path.display())]
    Legacy { path: PathBuf },
    #[error("{dir}: tensor {tensor} is missing: the checkpoint is incomplete or its config.json belongs to another model", dir = dir.display())]
    MissingTensor { dir: PathBuf, tensor: String },
    #[error("{path}: tensor {tensor} has shape {found:?} where config.json says {expected:?}: checkpoint and config.json belong to different models", path = path.display())]
    Shape {
        path: PathBuf,
        tensor: String,
        found: Vec<u64>,
        expected: Vec<usize>,
    },
    #[error("{path}: tensor {tensor} is {found} where {expected} was expected: convert the checkpoint to one of float16, bfloat16 or float32 throughout", path = path.display())]
    ElementType {
        path: PathBuf,
        tensor: String,
        found: String,
        expected: &'static str,
    },
    #[error(
        "asked for {what} with {given_bytes} bytes where {needed_bytes} are needed: the request does not fit this model"
    )]
    Request {
        what: String,
        given_bytes: u64,
        needed_bytes: u64,
    },
    #[error(
        "model \"{name}\" is neither a directory nor in the local hub cache ({looked}): get it with\n  hf download {name}\nor use random weights: --model synth:{size}"
    )]
    NotFound {
        name: String,
        looked: String,
        size: String,
    },
    #[error("{} is a file: name the directory that it is in", .0.display())]
    NotADirectory(PathBuf),
    #[error("{}: no such directory: name a directory in Hugging Face layout, an id like facebook/opt-1.3b, or synth:opt-1.3b", .0.display())]
    NoDirectory(PathBuf),
    #[error("\"synth:{name}\" names no known size: use synth: with one of {known}")]
    UnknownSize { name: String, known: String },
    #[error("{} exists already: remove it or choose another directory", .0.display())]
    Exists(PathBuf),
    #[error(transparent)]
    Write(#[from] crate::store::stream::StreamError),
    #[error("interrupted: what was half written has been removed")]
    Interrupted,
}

impl CheckpointError {
    pub(super) fn io(path: &Path, cause: std::io::Error) -> Self {
        let path = path.to_owned();
        CheckpointError::Io { path, cause }
    }

    pub(super) fn damaged(path: &Path, why: impl Into<String>) -> Self {
        let (path, why) = (path.to_owned(), why.into());
        CheckpointError::Damaged { path, why }
    }

    pub(super) fn refused(path: &Path, why: impl Into<String>) -> Self {
        let (path, why) = (path.to_owned(), why.into());
        CheckpointError::Refused { path, why }
    }
}

/// The three formats that weights may have, as messages name them.
pub(super) fn dtype_word(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
        Dtype::Q4 => "4-bit",
    }
}
