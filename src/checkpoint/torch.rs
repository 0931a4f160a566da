//! torch.save's `.bin`: a zip of stored entries, one of them the pickle that says which tensor is
//! which view of which entry. Joins zip.rs and pickle.rs into checked extents.

use super::CheckpointError;
use super::extent::Extent;
use super::file::{WeightFile, hash_hex};
use super::pickle::{Fault, View, state_dict};
use super::zip::Directory;
use std::collections::HashMap;

/// Longest pickle that is read; opt-175b's shards stay below 1 MiB.
const MOST_PICKLE_BYTES: u64 = 16 << 20;
/// What torch.save wrote before it wrote zips: a pickled magic number.
const LEGACY_MAGIC: [u8; 14] = *b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// The tensors of a file and the hash that stands for its pickle in the fingerprint.
pub(super) fn read_header(
    file: &WeightFile,
) -> Result<(Vec<(String, Extent)>, String), CheckpointError> {
    refuse_legacy(file)?;
    let directory = Directory::read(file)?;
    let prefix = archive_prefix(file, &directory)?;
    refuse_big_endian(file, &directory, &prefix)?;
    let pickle = directory.entries[&format!("{prefix}data.pkl")];
    if pickle.bytes > MOST_PICKLE_BYTES {
        let why = format!("its pickle has {} bytes", pickle.bytes);
        return Err(CheckpointError::refused(&file.path, why));
    }
    let pickle = file.read_vec(pickle.data_offset(file)?, pickle.bytes as usize)?;
    let views = state_dict(&pickle).map_err(|fault| match fault {
        Fault::Damaged(why) => CheckpointError::damaged(&file.path, why),
        Fault::Refused(why) => CheckpointError::refused(&file.path, why),
    })?;
    let mut storages = Storages {
        file,
        directory: &directory,
        prefix: &prefix,
        known: HashMap::new(),
    };
    let mut list = Vec::with_capacity(views.len());
    for (name, view) in views {
        let extent = storages.extent(&name, view)?;
        list.push((name, extent));
    }
    Ok((list, hash_hex(&[&pickle])))
}

fn refuse_legacy(file: &WeightFile) -> Result<(), CheckpointError> {
    let mut magic = [0; LEGACY_MAGIC.len()];
    file.read(0, &mut magic)?;
    if magic == LEGACY_MAGIC {
        let path = file.path.clone();
        return Err(CheckpointError::Legacy { path });
    }
    Ok(())
}

/// The folder that all entries lie in: "archive/", "pytorch_model/" or none.
fn archive_prefix(file: &WeightFile, directory: &Directory) -> Result<String, CheckpointError> {
    let mut found = directory.entries.keys().filter_map(|name| {
        let prefix = name.strip_suffix("data.pkl")?;
        (prefix.is_empty() || prefix.ends_with('/')).then_some(prefix)
    });
    match (found.next(), found.next()) {
        (Some(prefix), None) => Ok(prefix.to_owned()),
        (None, _) => Err(CheckpointError::damaged(
            &file.path,
            "the zip holds no data.pkl",
        )),
        _ => Err(CheckpointError::damaged(
            &file.path,
            "the zip holds several data.pkl",
        )),
    }
}

fn refuse_big_endian(
    file: &WeightFile,
    directory: &Directory,
    prefix: &str,
) -> Result<(), CheckpointError> {
    let Some(entry) = directory.entries.get(&format!("{prefix}byteorder")) else {
        return Ok(());
    };
    let bytes = entry.bytes.min(16) as usize;
    match file.read_vec(entry.data_offset(file)?, bytes)?.as_slice() {
        b"little" => Ok(()),
        _ => Err(CheckpointError::refused(
            &file.path,
            "its byte order is not little-endian",
        )),
    }
}

/// Storages already located: several tensors may be views of one.
struct Storages<'a> {
    file: &'a WeightFile,
    directory: &'a Directory,
    prefix: &'a str,
    /// Key → first and last byte in the file.
    known: HashMap<String, (u64, u64)>,
}

impl Storages<'_> {
    fn extent(&mut self, name: &str, view: View) -> Result<Extent, CheckpointError> {
        let (start, end) = self.place(&view)?;
        let place = view.offset.checked_mul(view.element.bytes());
        let extent = place
            .and_then(|p| p.checked_add(start))
            .map(|offset| Extent {
                offset,
                element: view.element,
                shape: view.shape,
                strides: view.strides,
            });
        match extent {
            Some(extent) if extent.lies_within(start, end) => Ok(extent),
            _ => {
                let why = format!("tensor {name} reaches beyond its storage");
                Err(CheckpointError::damaged(&self.file.path, why))
            }
        }
    }

    fn place(&mut self, view: &View) -> Result<(u64, u64), CheckpointError> {
        if let Some(place) = self.known.get(&view.key) {
            return Ok(*place);
        }
        let name = format!("{}data/{}", self.prefix, view.key);
        let fault = |why: String| CheckpointError::damaged(&self.file.path, why);
        let entry = self.directory.entries.get(&name);
        let entry = entry.ok_or_else(|| fault(format!("the zip holds no {name}")))?;
        if entry.bytes < view.storage_bytes {
            return Err(fault(format!("{name} is shorter than its tensors")));
        }
        let start = entry.data_offset(self.file)?;
        let place = (start, start + entry.bytes);
        self.known.insert(view.key.clone(), place);
        Ok(place)
    }
}
