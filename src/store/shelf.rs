//! The directory that stores stand in: their names, locks, listing and removal.
//! What is inside a store is not looked at beyond its manifest.

use super::{Manifest, Packing, Store, StoreError};
use crate::checkpoint::WeightSource;
use crate::dtype::WeightLayout;
use crate::model::ModelSpec;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Where the stores of an offload directory are.
pub fn store_dir(offload_dir: &Path) -> PathBuf {
    offload_dir.join("store")
}

/// A store's name: readable, and different for different weights.
pub fn store_name(spec: &ModelSpec, fingerprint: &str, packing: impl Into<Packing>) -> String {
    let packing = packing.into();
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || ".-_".contains(c) {
            c
        } else {
            '-'
        }
    };
    let model: String = spec.name.chars().take(80).map(plain).collect();
    let model = model.trim_start_matches('.');
    let format = if packing.compress {
        "q4"
    } else {
        spec.dtype.name()
    };
    let hash = Sha256::digest(fingerprint);
    let hash: String = hash.iter().take(4).map(|b| format!("{b:02x}")).collect();
    let device = match packing.layout {
        WeightLayout::CpuPanel64 => "",
        WeightLayout::GpuRowMajor => "-gpu",
    };
    format!("{model}-{format}{device}-{hash}")
}

/// The store of these weights in this format, where it is there and whole.
pub fn find(
    offload_dir: &Path,
    spec: &ModelSpec,
    fingerprint: &str,
    packing: impl Into<Packing>,
) -> Option<Store> {
    let packing = packing.into();
    let dir = store_dir(offload_dir).join(store_name(spec, fingerprint, packing));
    let store = dir.is_dir().then(|| Store::open(&dir))?.ok()?;
    is_of(store.manifest(), spec, fingerprint, packing).then_some(store)
}

/// Sizes, format and switches are part of the fingerprint; comparing the model is a second belt.
pub(super) fn is_of(
    manifest: &Manifest,
    spec: &ModelSpec,
    fingerprint: &str,
    packing: Packing,
) -> bool {
    let same = manifest.fingerprint == fingerprint
        && manifest.compress == packing.compress
        && manifest.layout == packing.layout.name();
    same && manifest.model
        == ModelSpec {
            name: manifest.model.name.clone(),
            eos_ids: manifest.model.eos_ids.clone(),
            ..spec.clone()
        }
}

/// What `list` tells of a store.
#[derive(Clone, Debug)]
pub struct StoreInfo {
    pub name: String,
    pub bytes: u64,
    /// None where the store cannot be used; `why` says why.
    pub manifest: Option<Manifest>,
    pub why: Option<String>,
}

/// All stores, by name; half-written ones are left out.
pub fn list(offload_dir: &Path) -> Result<Vec<StoreInfo>, StoreError> {
    let mut infos: Vec<StoreInfo> = entries(offload_dir)?
        .into_iter()
        .filter(|dir| !is_hidden(dir))
        .map(|dir| {
            let manifest = Manifest::read(&dir);
            StoreInfo {
                name: name_of(&dir),
                bytes: bytes_in(&dir),
                why: manifest.as_ref().err().map(StoreError::to_string),
                manifest: manifest.ok(),
            }
        })
        .collect();
    infos.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(infos)
}

/// What was removed and how much room that made.
#[derive(Clone, Debug, PartialEq)]
pub struct Removed {
    pub name: String,
    pub bytes: u64,
}

/// Removes one store unless somebody uses it.
pub fn remove(offload_dir: &Path, name: &str) -> Result<Removed, StoreError> {
    let root = store_dir(offload_dir);
    let known = entries(offload_dir)?
        .into_iter()
        .find(|dir| name_of(dir) == name);
    match known {
        Some(dir) if !is_hidden(&dir) => remove_dir(&dir, name),
        _ => Err(StoreError::Unknown {
            name: name.to_owned(),
            root,
        }),
    }
}

/// Removes what is of no use to this version: damaged stores, other layouts, half-written leftovers.
pub fn prune(offload_dir: &Path) -> Result<Vec<Removed>, StoreError> {
    let mut removed = Vec::new();
    for dir in entries(offload_dir)? {
        let name = name_of(&dir);
        let partial = name
            .strip_prefix('.')
            .and_then(|n| n.strip_suffix(".partial"));
        let owner = match partial {
            Some(owner) => owner,
            None if is_hidden(&dir) || Manifest::read(&dir).is_ok() => continue,
            None => name.as_str(),
        };
        match remove_dir(&dir, owner) {
            Ok(one) => removed.push(one),
            // Being packed right now: not a leftover.
            Err(StoreError::InUse(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

/// Takes away what a killed process has left of a store, which `list` does not show and which takes its whole room;
/// nothing where another process packs or reads it.
pub fn clear_leftover(
    offload_dir: &Path,
    source: &dyn WeightSource,
    packing: Packing,
) -> Result<(), StoreError> {
    let name = store_name(source.spec(), &source.fingerprint(), packing);
    let leftover = partial(&store_dir(offload_dir).join(&name));
    if !leftover.exists() {
        return Ok(());
    }
    match remove_dir(&leftover, &name) {
        Ok(_) | Err(StoreError::InUse(_)) => Ok(()),
        // Its owner has just ended.
        Err(_) if !leftover.exists() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Where a store is until it is whole.
pub(super) fn partial(dir: &Path) -> PathBuf {
    dir.with_file_name(format!(".{}.partial", name_of(dir)))
}

/// Removes a directory under the lock of the store called `owner`.
fn remove_dir(dir: &Path, owner: &str) -> Result<Removed, StoreError> {
    let lock_path = lock_path(&dir.with_file_name(owner));
    let lock = open_lock(&lock_path).map_err(|e| StoreError::io(&lock_path, e))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(owner.to_owned())),
        Err(TryLockError::Error(e)) => return Err(StoreError::io(&lock_path, e)),
    }
    let (name, bytes) = (name_of(dir), bytes_in(dir));
    std::fs::remove_dir_all(dir).map_err(|e| StoreError::io(dir, e))?;
    Ok(Removed { name, bytes })
}

fn entries(offload_dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let root = store_dir(offload_dir);
    match std::fs::read_dir(&root) {
        Ok(entries) => Ok(entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.is_dir())
            .collect()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(StoreError::io(&root, e)),
    }
}

fn name_of(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn is_hidden(dir: &Path) -> bool {
    name_of(dir).starts_with('.')
}

fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|f| f.metadata().ok())
        .map(|meta| meta.len())
        .sum()
}

/// The lock stands beside the store, so that it can be held while the store is replaced. It is
/// never removed: who waits for it and who comes later must mean the same file.
pub(super) fn lock_path(dir: &Path) -> PathBuf {
    dir.with_file_name(format!(".{}.lock", name_of(dir)))
}

pub(super) fn open_lock(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path)
}

/// Holds a store for reading. On a read-only disk nobody can remove it: there it needs no lock.
pub(super) fn lock_shared(dir: &Path) -> Result<Option<File>, StoreError> {
    let path = lock_path(dir);
    let lock = match open_lock(&path) {
        Ok(lock) => lock,
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(StoreError::io(&path, e)),
    };
    match lock.try_lock_shared() {
        Ok(()) => Ok(Some(lock)),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(name_of(dir))),
        Err(TryLockError::Error(e)) => Err(StoreError::io(&path, e)),
    }
}
