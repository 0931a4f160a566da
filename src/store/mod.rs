//! Packed weights on disk: made once from a checkpoint, laid out as the kernels read them, found
//! again by fingerprint, locked while in use. What is placed where is the plan's business.

mod layout;
mod pack;
mod shelf;
pub mod stream;

pub use layout::{LAYOUT_REVISION, StoreLayout};
pub use pack::{PackJob, pack};
pub use shelf::{
    Removed, StoreInfo, clear_leftover, find, list, prune, remove, store_dir, store_name,
};

use crate::checkpoint::CheckpointError;
use crate::dtype::{Dtype, WeightLayout};
use crate::machine::disk::{DiskError, DiskFile};
use crate::model::ModelSpec;
use crate::model::families::check_spec;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use stream::StreamError;
use thiserror::Error;

/// Why a store could not be made, opened or removed.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{path}: {cause}: check that --offload-dir is there and writable", path = path.display())]
    Io {
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error("{path} is no usable store ({why}): remove it with \"loadmaster store prune\"; it is packed again when needed", path = path.display())]
    Unusable { path: PathBuf, why: String },
    #[error("no store is called \"{name}\" in {root}: \"loadmaster store list\" shows all", root = root.display())]
    Unknown { name: String, root: PathBuf },
    #[error("store \"{0}\" is in use by another process: try again when that one has ended")]
    InUse(String),
    #[error("packing was interrupted: what was half written has been removed")]
    Interrupted,
    #[error(transparent)]
    Source(#[from] CheckpointError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Write(#[from] StreamError),
}

impl StoreError {
    fn io(path: &Path, cause: std::io::Error) -> StoreError {
        let path = path.to_owned();
        StoreError::Io { path, cause }
    }

    fn unusable(path: &Path, why: impl Into<String>) -> StoreError {
        let (path, why) = (path.to_owned(), why.into());
        StoreError::Unusable { path, why }
    }
}

/// manifest.json: whose weights these are and how they lie in weights.bin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub schema: u32,
    pub layout: String,
    pub layout_revision: u32,
    pub fingerprint: String,
    pub compress: bool,
    pub created_unix_s: u64,
    pub model: ModelSpec,
    pub places: StoreLayout,
}

/// How weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// 4-bit where a matrix may be.
    pub compress: bool,
    pub layout: WeightLayout,
}

impl From<bool> for Packing {
    /// As the CPU reads them.
    fn from(compress: bool) -> Packing {
        Packing {
            compress,
            layout: WeightLayout::CpuPanel64,
        }
    }
}

const SCHEMA: u32 = 1;
const MANIFEST: &str = "manifest.json";
const WEIGHTS: &str = "weights.bin";
/// opt-175b's manifest has about 100 KiB.
const MOST_MANIFEST_BYTES: u64 = 16 << 20;

impl Manifest {
    fn read(dir: &Path) -> Result<Manifest, StoreError> {
        let path = dir.join(MANIFEST);
        let bytes =
            std::fs::metadata(&path).map_err(|e| StoreError::unusable(dir, e.to_string()))?;
        if bytes.len() > MOST_MANIFEST_BYTES {
            return Err(StoreError::unusable(dir, "its manifest is too large"));
        }
        let text = std::fs::read(&path).map_err(|e| StoreError::io(&path, e))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| StoreError::unusable(dir, format!("its manifest: {e}")))?;
        manifest.check(dir)?;
        Ok(manifest)
    }

    fn check(&self, dir: &Path) -> Result<(), StoreError> {
        let layouts = [WeightLayout::CpuPanel64, WeightLayout::GpuRowMajor].map(WeightLayout::name);
        let ours = (SCHEMA, LAYOUT_REVISION);
        let theirs = (self.schema, self.layout_revision);
        if theirs != ours || !layouts.contains(&self.layout.as_str()) {
            let (ours, theirs) = ((ours, layouts), (theirs, &self.layout));
            let why = format!("layout {theirs:?} where this version has {ours:?}");
            return Err(StoreError::unusable(dir, why));
        }
        check_spec(&self.model).map_err(|e| StoreError::unusable(dir, e.to_string()))?;
        // The places follow from the model: what differs was changed by somebody else.
        if self.places != StoreLayout::of(&self.model, self.compress) {
            return Err(StoreError::unusable(
                dir,
                "its offsets do not belong to its model",
            ));
        }
        let weights = dir.join(WEIGHTS);
        let length = std::fs::metadata(&weights).map_or(0, |meta| meta.len());
        if length != self.places.total_bytes {
            let expected = self.places.total_bytes;
            let why = format!("weights.bin has {length} bytes instead of {expected}");
            return Err(StoreError::unusable(dir, why));
        }
        Ok(())
    }
}

/// A packed model, locked against removal for as long as this lives.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    manifest: Manifest,
    _lock: Option<File>,
}

impl Store {
    /// Opens a store's directory; checks its manifest and the length of its weights.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let lock = shelf::lock_shared(dir)?;
        Store::locked(dir, lock)
    }

    fn locked(dir: &Path, lock: Option<File>) -> Result<Store, StoreError> {
        Ok(Store {
            manifest: Manifest::read(dir)?,
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    pub fn name(&self) -> String {
        self.dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.manifest.model
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn is_compressed(&self) -> bool {
        self.manifest.compress
    }

    /// weights.bin: 4096-aligned matrices, readable by direct I/O.
    pub fn file_path(&self) -> PathBuf {
        self.dir.join(WEIGHTS)
    }

    /// Bytes of weights.bin.
    pub fn file_bytes(&self) -> u64 {
        self.manifest.places.total_bytes
    }

    /// Where matrix `index` of `spec().matrices()` begins; its panels follow each other.
    pub fn matrix_offset(&self, index: usize) -> u64 {
        self.manifest.places.matrices[index].offset
    }

    /// Format of matrix `index`: the model's own or q4.
    pub fn matrix_format(&self, index: usize) -> Dtype {
        self.manifest.places.matrices[index].format
    }

    /// Bytes of the region of small tensors at the file's start, whole pages.
    pub fn smalls_bytes(&self) -> u64 {
        self.manifest.places.smalls_bytes
    }

    /// Where small tensor `index` of `spec().smalls()` lies in that region, 64-byte aligned.
    pub fn small_range(&self, index: usize) -> Range<usize> {
        let place = &self.manifest.places.smalls[index];
        place.offset as usize..(place.offset + place.bytes) as usize
    }

    /// Reads all small tensors at once into `target`: `smalls_bytes()` bytes, 4096-aligned.
    pub fn read_smalls(&self, target: &mut [u8]) -> Result<(), StoreError> {
        let file = DiskFile::open_read(&self.file_path())?;
        Ok(file.read_at(target, 0)?)
    }
}
