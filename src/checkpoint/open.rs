//! A checkpoint directory: finds its files, reads their headers, and checks that every tensor the
//! model needs is there in the right shape and type before the first weight is read.

use super::extent::{Element, Extent};
use super::fault::{CheckpointError, dtype_word};
use super::file::{WeightFile, hash_hex, read_text};
use super::{WeightSource, check_request, get, put, safetensors, torch};
use crate::dtype::Dtype;
use crate::model::families::{TensorChoice, matrix_tensors, small_tensors, spec_from_config};
use crate::model::token_ids::eos_ids_of_generation;
use crate::model::{Matrix, MatrixKind, ModelSpec, Small, SmallKind};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

const MOST_CONFIG_BYTES: u64 = 1 << 20;
const MOST_INDEX_BYTES: u64 = 32 << 20;
/// Files open at once at most; opt-175b is published in far fewer.
const MOST_SHARDS: usize = 512;

/// A model's checkpoint on disk, every extent checked.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    fingerprint: String,
    files: Vec<WeightFile>,
    matrices: HashMap<(MatrixKind, usize), Vec<Part>>,
    smalls: HashMap<(SmallKind, usize), Vec<Part>>,
}

/// One tensor of a file.
#[derive(Clone, Debug)]
struct Part {
    file: usize,
    extent: Extent,
}

/// All tensors of a directory by name.
struct Catalogue {
    dir: PathBuf,
    files: Vec<WeightFile>,
    tensors: HashMap<String, Part>,
    /// Hash of each file's header.
    hashes: Vec<String>,
}

impl Checkpoint {
    /// Opens a directory in Hugging Face layout; the model is called like the directory.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let named = dir.canonicalize().ok();
        let name = named.as_deref().unwrap_or(dir).file_name();
        let name = name.map_or("model".to_owned(), |n| n.to_string_lossy().into_owned());
        Checkpoint::open_as(dir, &name)
    }

    /// As `open`, with the model's name given: directories of the hub cache are called by hashes.
    pub fn open_as(dir: &Path, name: &str) -> Result<Checkpoint, CheckpointError> {
        let (mut spec, config) = read_config(dir, name)?;
        let catalogue = Catalogue::read(dir)?;
        // Nothing is narrowed or widened unasked: the tensors' own format counts.
        spec.dtype = catalogue.dtype(&spec)?;
        let mut matrices = HashMap::new();
        for matrix in spec.matrices() {
            let parts = catalogue.parts(matrix_tensors(&spec, &matrix), Some(spec.dtype))?;
            matrices.insert((matrix.kind, matrix.stage), parts);
        }
        let mut smalls = HashMap::new();
        for small in spec.smalls() {
            // f32 holds every format exactly; a table kept narrower takes only its own.
            let exact = (small.format != Dtype::F32).then_some(small.format);
            let parts = catalogue.parts(small_tensors(&spec, &small), exact)?;
            smalls.insert((small.kind, small.stage), parts);
        }
        Ok(Checkpoint {
            dir: dir.to_owned(),
            fingerprint: catalogue.fingerprint(&config),
            spec,
            files: catalogue.files,
            matrices,
            smalls,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of all files that hold weights.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl WeightSource for Checkpoint {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn read_rows(
        &self,
        matrix: &Matrix,
        first_row: usize,
        rows: usize,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        check_request(self.spec.dtype, matrix, (first_row, rows), out)?;
        let parts = self.matrices.get(&(matrix.kind, matrix.stage));
        let parts = parts.ok_or_else(|| unknown(matrix, out))?;
        let row_bytes = self.spec.dtype.row_bytes(matrix.inputs) as usize;
        let (mut part_first, mut rest) = (0, out);
        for part in parts {
            let part_rows = part.extent.shape[0] as usize;
            let first = first_row.clamp(part_first, part_first + part_rows);
            let last = (first_row + rows).clamp(part_first, part_first + part_rows);
            let (piece, tail) = rest.split_at_mut((last - first) * row_bytes);
            let range = ((first - part_first) as u64, (last - first) as u64);
            part.extent
                .read_rows(&self.files[part.file], range, piece)?;
            (part_first, rest) = (part_first + part_rows, tail);
        }
        Ok(())
    }

    fn read_small(&self, small: &Small, out: &mut [u8]) -> Result<(), CheckpointError> {
        let parts = self.smalls.get(&(small.kind, small.stage));
        let parts = parts.ok_or_else(|| unknown(small, out))?;
        let elements: u64 = parts.iter().filter_map(|p| p.extent.elements()).sum();
        if elements != small.elements as u64 || out.len() as u64 != small.bytes() {
            return Err(unknown(small, out));
        }
        let mut rest = out;
        for part in parts {
            let count = part.extent.elements().unwrap_or(0) as usize;
            let (piece, tail) = rest.split_at_mut(small.format.row_bytes(count) as usize);
            self.read_part(part, small.format, piece)?;
            rest = tail;
        }
        Ok(())
    }
}

impl Checkpoint {
    /// A whole tensor, widened where `format` is wider than what the file has.
    fn read_part(&self, part: &Part, format: Dtype, out: &mut [u8]) -> Result<(), CheckpointError> {
        let file = &self.files[part.file];
        let rows = if part.extent.shape.len() == 1 {
            1
        } else {
            part.extent.shape[0]
        };
        match part.extent.element {
            Element::Float(dtype) if dtype != format => {
                let count = part.extent.elements().unwrap_or(0) as usize;
                let mut native = vec![0; dtype.row_bytes(count) as usize];
                part.extent.read_rows(file, (0, rows), &mut native)?;
                for i in 0..count {
                    put(format, out, i, get(dtype, &native, i));
                }
                Ok(())
            }
            _ => part.extent.read_rows(file, (0, rows), out),
        }
    }
}

/// A matrix or small tensor that this model does not have in this shape.
fn unknown(what: &impl std::fmt::Debug, out: &[u8]) -> CheckpointError {
    CheckpointError::Request {
        what: format!("{what:?}"),
        given_bytes: out.len() as u64,
        needed_bytes: 0,
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Catalogue {
    fn read(dir: &Path) -> Result<Catalogue, CheckpointError> {
        for stem in ["model.safetensors", "pytorch_model.bin"] {
            let single = dir.join(stem);
            if single.is_file() {
                return Catalogue::open(dir, &[stem.to_owned()]);
            }
            let index = dir.join(format!("{stem}.index.json"));
            if index.is_file() {
                return Catalogue::open(dir, &shards_of(dir, &index)?);
            }
        }
        Err(CheckpointError::NoWeights(dir.to_owned()))
    }

    fn open(dir: &Path, names: &[String]) -> Result<Catalogue, CheckpointError> {
        let mut catalogue = Catalogue {
            dir: dir.to_owned(),
            files: Vec::new(),
            tensors: HashMap::new(),
            hashes: Vec::new(),
        };
        for name in names {
            let file = WeightFile::open(&dir.join(name))?;
            let (tensors, hash) = match name.ends_with(".safetensors") {
                true => safetensors::read_header(&file)?,
                false => torch::read_header(&file)?,
            };
            let index = catalogue.files.len();
            for (name, extent) in tensors {
                let part = Part {
                    file: index,
                    extent,
                };
                if catalogue.tensors.insert(name.clone(), part).is_some() {
                    let why = format!("tensor {name} is there twice");
                    return Err(CheckpointError::damaged(&file.path, why));
                }
            }
            catalogue.files.push(file);
            catalogue.hashes.push(hash);
        }
        Ok(catalogue)
    }

    /// The first of a tensor's names that is there.
    fn find(&self, choice: &TensorChoice) -> Result<(&str, &Part), CheckpointError> {
        let present = |name: &String| self.tensors.get_key_value(name);
        let found = choice.names.iter().find_map(present);
        let found = found.map(|(name, part)| (name.as_str(), part));
        found.ok_or_else(|| CheckpointError::MissingTensor {
            dir: self.dir.clone(),
            tensor: choice.names[0].clone(),
        })
    }

    /// The format of the first matrix; `parts` then holds all others to it.
    fn dtype(&self, spec: &ModelSpec) -> Result<Dtype, CheckpointError> {
        let matrices = spec.matrices();
        let choices = matrices.iter().flat_map(|m| matrix_tensors(spec, m));
        let mut last = spec.dtype;
        for choice in choices.take(1) {
            let (name, part) = self.find(&choice)?;
            last = self.float(name, part, "float16, bfloat16 or float32")?;
        }
        Ok(last)
    }

    fn float(
        &self,
        name: &str,
        part: &Part,
        expected: &'static str,
    ) -> Result<Dtype, CheckpointError> {
        match part.extent.element {
            Element::Float(dtype) => Ok(dtype),
            other => Err(CheckpointError::ElementType {
                path: self.files[part.file].path.clone(),
                tensor: name.to_owned(),
                found: other.name().to_owned(),
                expected,
            }),
        }
    }

    /// Finds tensors and checks shapes, and the format where it must be `exact` (or f32 is asked).
    fn parts(
        &self,
        choices: Vec<TensorChoice>,
        exact: Option<Dtype>,
    ) -> Result<Vec<Part>, CheckpointError> {
        let mut parts = Vec::with_capacity(choices.len());
        for choice in choices {
            let (name, part) = self.find(&choice)?;
            let path = || self.files[part.file].path.clone();
            let expected: Vec<u64> = choice.shape.iter().map(|&n| n as u64).collect();
            if part.extent.shape != expected {
                return Err(CheckpointError::Shape {
                    path: path(),
                    tensor: name.to_owned(),
                    found: part.extent.shape.clone(),
                    expected: choice.shape,
                });
            }
            let dtype = self.float(name, part, exact.map_or("a float type", dtype_word))?;
            if exact.is_some_and(|exact| exact != dtype) {
                return Err(CheckpointError::ElementType {
                    path: path(),
                    tensor: name.to_owned(),
                    found: dtype_word(dtype).to_owned(),
                    expected: exact.map_or("a float type", dtype_word),
                });
            }
            parts.push(part.clone());
        }
        Ok(parts)
    }

    /// Configuration, and every file's name, size, time of change and header.
    fn fingerprint(&self, config: &str) -> String {
        let mut pieces = vec![config.as_bytes().to_vec()];
        for (file, hash) in self.files.iter().zip(&self.hashes) {
            let name = file.path.file_name().unwrap_or_default().to_string_lossy();
            let (seconds, nanoseconds) = file.changed;
            let bytes = file.bytes;
            let line = format!("{name} {bytes} {seconds}.{nanoseconds:09} {hash}");
            pieces.push(line.into_bytes());
        }
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        format!("checkpoint:{}", hash_hex(&pieces))
    }
}

/// What config.json says, and its text.
pub(super) fn read_config(dir: &Path, name: &str) -> Result<(ModelSpec, String), CheckpointError> {
    let path = dir.join("config.json");
    if !path.is_file() {
        return Err(CheckpointError::NoConfig(dir.to_owned()));
    }
    let config = read_text(&path, MOST_CONFIG_BYTES)?;
    let spec = spec_from_config(&config, name);
    let mut spec = spec.map_err(|cause| CheckpointError::Config { path, cause })?;
    let path = dir.join("generation_config.json");
    if path.is_file() {
        let ends = eos_ids_of_generation(&read_text(&path, MOST_CONFIG_BYTES)?);
        let ends = ends.map_err(|cause| CheckpointError::Config { path, cause })?;
        spec.eos_ids = ends.unwrap_or(spec.eos_ids);
    }
    Ok((spec, config))
}

/// The files that an index names, all present and all inside the directory.
fn shards_of(dir: &Path, index: &Path) -> Result<Vec<String>, CheckpointError> {
    let text = read_text(index, MOST_INDEX_BYTES)?;
    let map: Index =
        serde_json::from_str(&text).map_err(|e| CheckpointError::damaged(index, e.to_string()))?;
    let names: BTreeSet<String> = map.weight_map.into_values().collect();
    if names.is_empty() || names.len() > MOST_SHARDS {
        let why = format!("it names {} shards", names.len());
        return Err(CheckpointError::damaged(index, why));
    }
    for name in &names {
        let mut parts = Path::new(name).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            let why = format!("it names {name:?}, outside its own directory");
            return Err(CheckpointError::refused(index, why));
        }
        if !dir.join(name).is_file() {
            return Err(CheckpointError::MissingShard {
                index: index.to_owned(),
                shard: name.clone(),
            });
        }
    }
    Ok(names.into_iter().collect())
}
