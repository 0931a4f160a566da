//! Checkpoints end to end: written and read back, in every format, whole and damaged.

use loadmaster::checkpoint::{Checkpoint, SynthJob, SynthSource, WeightSource, write_synth};
use loadmaster::dtype::Dtype;
use loadmaster::model::ModelSpec;
use loadmaster::model::families::{TensorChoice, matrix_tensors, named_size, small_tensors};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn small_spec(dtype: Dtype) -> ModelSpec {
    ModelSpec {
        name: "small".to_owned(),
        layers: 2,
        hidden: 48,
        heads: 3,
        ffn: 100,
        vocab: 300,
        positions: 30,
        embed_width: 20,
        tied_head: false,
        dtype,
        ..named_size("opt-350m").expect("a known size")
    }
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary directory")
}

fn write(spec: &ModelSpec, dir: &Path, shard_bytes: u64) {
    let job = SynthJob {
        spec: spec.clone(),
        seed: 11,
        dir,
        shard_bytes,
        progress: &mut |done, total| assert!(done <= total),
        stop: &AtomicBool::new(false),
    };
    write_synth(job).expect("written");
}

fn assert_alike(left: &dyn WeightSource, right: &dyn WeightSource) {
    let spec = left.spec();
    assert_eq!(spec.matrices(), right.spec().matrices());
    for matrix in spec.matrices() {
        let bytes = matrix.rows as u64 * spec.dtype.row_bytes(matrix.inputs);
        let mut read = [left, right].map(|source| {
            let mut out = vec![0; bytes as usize];
            let read = source.read_rows(&matrix, 0, matrix.rows, &mut out);
            read.expect("inside");
            out
        });
        assert!(read[0] == read[1], "{matrix:?}");
        // A range that begins and ends inside a part.
        let (first, rows) = (matrix.rows / 3 - 1, matrix.rows / 3 + 3);
        let row = spec.dtype.row_bytes(matrix.inputs) as usize;
        read[1].truncate(rows * row);
        let again = right.read_rows(&matrix, first, rows, &mut read[1]);
        again.expect("inside");
        assert!(
            read[1] == read[0][first * row..][..rows * row],
            "{matrix:?}"
        );
    }
    for small in spec.smalls() {
        let read = [left, right].map(|source| {
            let mut out = vec![0; small.bytes() as usize];
            source.read_small(&small, &mut out).expect("fits");
            out
        });
        assert!(read[0] == read[1], "{small:?}");
    }
}

#[test]
fn written_synth_checkpoints_read_back_alike() {
    for (dtype, shard_bytes) in [
        (Dtype::F16, u64::MAX),
        (Dtype::Bf16, 40_000),
        (Dtype::F32, 1),
    ] {
        let home = temporary();
        let dir = home.path().join("small");
        let spec = small_spec(dtype);
        write(&spec, &dir, shard_bytes);
        let checkpoint = Checkpoint::open(&dir).expect("readable");
        assert_eq!(checkpoint.spec(), &spec);
        assert_alike(&SynthSource::new(spec, 11), &checkpoint);
        let sharded = dir.join("model.safetensors.index.json").is_file();
        assert_eq!(sharded, shard_bytes != u64::MAX);
        assert_eq!(std::fs::read_dir(home.path()).expect("there").count(), 1);
    }
}

#[test]
fn an_interrupted_synth_leaves_nothing() {
    let home = temporary();
    let dir = home.path().join("small");
    let try_write = |stop: bool| {
        write_synth(SynthJob {
            spec: small_spec(Dtype::F16),
            seed: 1,
            dir: &dir,
            shard_bytes: u64::MAX,
            progress: &mut |_, _| {},
            stop: &AtomicBool::new(stop),
        })
    };
    let error = try_write(true).expect_err("stopped");
    assert!(error.to_string().contains("interrupted"));
    assert_eq!(std::fs::read_dir(home.path()).expect("there").count(), 0);
    std::fs::create_dir(&dir).expect("made");
    std::fs::write(dir.join("notes.txt"), "mine").expect("written");
    let error = try_write(false).expect_err("somebody's data");
    assert!(error.to_string().contains("exists"), "{error}");
}

fn goldens() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models")
}

/// Little-endian values of a float format as little-endian f32.
fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<u8> {
    let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => pairs
            .flat_map(|b| half::f16::from_le_bytes(b).to_f32().to_le_bytes())
            .collect(),
        Dtype::Bf16 => pairs
            .flat_map(|b| half::bf16::from_le_bytes(b).to_f32().to_le_bytes())
            .collect(),
        Dtype::F32 | Dtype::Q4 => bytes.to_vec(),
    }
}

/// Compares one matrix or small tensor, as read, with the hashes of the tensors it is made of.
fn assert_hashes(choices: &[TensorChoice], values: &[u8], golden: &serde_json::Value) {
    let mut rest = values;
    for choice in choices {
        let bytes = 4 * choice.shape.iter().product::<usize>();
        let (piece, tail) = rest.split_at(bytes);
        let hash = Sha256::digest(piece);
        let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        let expected = &golden["tensors_sha256_as_f32"][&choice.names[0]];
        assert_eq!(expected, hash.as_str(), "{choice:?}");
        rest = tail;
    }
    assert!(rest.is_empty());
}

#[test]
fn golden_checkpoints_give_the_values_that_torch_saved() {
    let mut models = 0;
    for entry in std::fs::read_dir(goldens()).expect("goldens") {
        let dir = entry.expect("an entry").path();
        let checkpoint = Checkpoint::open(&dir).expect("readable");
        let golden = std::fs::read(dir.join("golden.json")).expect("there");
        let golden: serde_json::Value = serde_json::from_slice(&golden).expect("valid");
        let spec = checkpoint.spec();
        assert_eq!(golden["eos_id"], spec.eos_ids[0]);
        for matrix in spec.matrices() {
            let row = spec.dtype.row_bytes(matrix.inputs) as usize;
            let mut out = vec![0; matrix.rows * row];
            // In pieces, so that views are also read from their middle.
            for (i, piece) in out.chunks_mut(17 * row).enumerate() {
                let rows = piece.len() / row;
                checkpoint
                    .read_rows(&matrix, 17 * i, rows, piece)
                    .expect("inside");
            }
            assert_hashes(
                &matrix_tensors(spec, &matrix),
                &widened(spec.dtype, &out),
                &golden,
            );
        }
        for small in spec.smalls() {
            let mut out = vec![0; small.bytes() as usize];
            checkpoint.read_small(&small, &mut out).expect("fits");
            assert_hashes(
                &small_tensors(spec, &small),
                &widened(small.format, &out),
                &golden,
            );
        }
        models += 1;
    }
    assert!(models >= 14, "{models}");
}

/// A copy of a golden model that a test may damage.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = temporary();
    for entry in std::fs::read_dir(goldens().join(name)).expect("golden") {
        let path = entry.expect("an entry").path();
        let to = dir.path().join(path.file_name().expect("a name"));
        std::fs::copy(&path, to).expect("copied");
    }
    dir
}

fn message(dir: &Path) -> String {
    match Checkpoint::open(dir) {
        Ok(_) => panic!("a damaged checkpoint was opened"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_missing_is_named() {
    let dir = copy_of("gelu");
    let shard = "pytorch_model-00002-of-00002.bin";
    std::fs::remove_file(dir.path().join(shard)).expect("removed");
    assert!(message(dir.path()).contains(shard));
    let dir = copy_of("untied");
    let index = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).expect("there");
    std::fs::write(&index, text.replace("model-0", "../model-0")).expect("written");
    assert!(message(dir.path()).contains("outside"));
    std::fs::remove_file(&index).expect("removed");
    assert!(message(dir.path()).contains("no weights"));
    std::fs::remove_file(dir.path().join("config.json")).expect("removed");
    assert!(message(dir.path()).contains("config.json"));
}

#[test]
fn what_git_has_not_fetched_is_called_so() {
    for (name, file) in [
        ("opt-like", "model.safetensors"),
        ("head-20", "pytorch_model.bin"),
    ] {
        let dir = copy_of(name);
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n";
        std::fs::write(dir.path().join(file), pointer).expect("written");
        let message = message(dir.path());
        assert!(message.contains("git lfs pull"), "{message}");
    }
}

#[test]
fn files_of_another_model_are_refused() {
    let edit = |name: &str, from: &str, to: &str| {
        let dir = copy_of(name);
        let path = dir.path().join("config.json");
        let text = std::fs::read_to_string(&path).expect("there");
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replace(from, to)).expect("written");
        message(dir.path())
    };
    let shape = edit("opt-like", "\"ffn_dim\": 256", "\"ffn_dim\": 128");
    assert!(shape.contains("fc1.weight") && shape.contains("256") && shape.contains("128"));
    let layers = edit(
        "opt-like",
        "\"num_hidden_layers\": 2",
        "\"num_hidden_layers\": 3",
    );
    assert!(layers.contains("layers.2.") && layers.contains("missing"));
    let head = edit(
        "opt-like",
        "\"vocab_size\"",
        "\"tie_word_embeddings\": false, \"vocab_size\"",
    );
    assert!(head.contains("lm_head.weight"));
    let family = edit(
        "opt-like",
        "\"model_type\": \"opt\"",
        "\"model_type\": \"gptj\"",
    );
    assert!(family.contains("gptj"));
    let bias = edit("no-bias", "\"enable_bias\": false", "\"enable_bias\": true");
    assert!(bias.contains("bias is missing"));
}

#[test]
fn tensors_of_the_wrong_type_are_named() {
    let dir = copy_of("no-bias");
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("there");
    let entry = b"layers.1.fc1.weight\":{\"dtype\":\"F32\"";
    let place = bytes.windows(entry.len()).position(|w| w == entry);
    bytes[place.expect("there") + entry.len() - 4] = b'I';
    std::fs::write(&path, bytes).expect("written");
    let integers = message(dir.path());
    assert!(
        integers.contains("layers.1.fc1.weight is 32-bit integers"),
        "{integers}"
    );
    // Two formats in one model: one shard of the other's.
    let home = temporary();
    let dirs = [Dtype::F16, Dtype::Bf16].map(|dtype| {
        let dir = home.path().join(dtype.name());
        write(&small_spec(dtype), &dir, 1);
        dir
    });
    let spec = small_spec(Dtype::F16);
    let shards = spec.matrices().len() + spec.smalls().len() + 2 * 2 * spec.layers;
    let shard = format!("model-00004-of-{shards:05}.safetensors");
    std::fs::copy(dirs[1].join(&shard), dirs[0].join(&shard)).expect("copied");
    let mixed = message(&dirs[0]);
    assert!(
        mixed.contains("is bfloat16 where float16 was expected"),
        "{mixed}"
    );
}

#[test]
fn truncated_files_are_told_apart_from_io_errors() {
    for (name, file) in [
        ("opt-like", "model.safetensors"),
        ("head-20", "pytorch_model.bin"),
    ] {
        let dir = copy_of(name);
        let path = dir.path().join(file);
        let whole = std::fs::read(&path).expect("there");
        for length in [0, 1, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).expect("written");
            assert!(message(dir.path()).contains("damaged"), "{name} {length}");
        }
    }
}

#[test]
fn old_compressed_and_executable_files_are_refused() {
    let dir = copy_of("head-20");
    let path = dir.path().join("pytorch_model.bin");
    let legacy = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.";
    let whole = std::fs::read(&path).expect("there");
    std::fs::write(&path, legacy).expect("written");
    assert!(message(dir.path()).contains("torch.save(torch.load("));
    let find = |what: &[u8]| {
        whole
            .windows(what.len())
            .rposition(|w| w == what)
            .expect("there")
    };
    let mut compressed = whole.clone();
    compressed[find(b"PK\x01\x02") + 10] = 8;
    std::fs::write(&path, &compressed).expect("written");
    assert!(message(dir.path()).contains("compressed"));
    let mut hostile = whole.clone();
    let call = find(b"ctorch._utils\n_rebuild_tensor_v2\n");
    hostile[call..call + 33].copy_from_slice(b"cposix\nsystem_and_a_longer_name_\n");
    std::fs::write(&path, &hostile).expect("written");
    assert!(message(dir.path()).contains("posix.system"));
}

/// Opens whatever `bytes` are and reads all of it: an error is fine, a panic is not.
fn survive(dir: &Path, file: &str, bytes: &[u8]) {
    std::fs::write(dir.join(file), bytes).expect("written");
    let Ok(checkpoint) = Checkpoint::open(dir) else {
        return;
    };
    let spec = checkpoint.spec();
    for matrix in spec.matrices() {
        let bytes = matrix.rows as u64 * spec.dtype.row_bytes(matrix.inputs);
        let mut out = vec![0; bytes as usize];
        let _ = checkpoint.read_rows(&matrix, 0, matrix.rows, &mut out);
    }
    for small in spec.smalls() {
        let _ = checkpoint.read_small(&small, &mut vec![0; small.bytes() as usize]);
    }
}

/// Where the bytes are that describe the tensors, not the tensors themselves.
fn description(bytes: &[u8]) -> std::ops::Range<usize> {
    let pickle = bytes.windows(10).position(|w| w == b"collection");
    match pickle {
        Some(start) => start.saturating_sub(100)..start + 6000,
        None => 0..2000,
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(400))]

    #[test]
    fn mutated_files_never_panic(
        torch in proptest::bool::ANY,
        at_end in proptest::bool::ANY,
        changes in proptest::collection::vec((0usize..6000, proptest::num::u8::ANY), 1..6),
    ) {
        let (name, file) = match torch {
            true => ("shared-and-strided", "pytorch_model.bin"),
            false => ("no-bias", "model.safetensors"),
        };
        let mut bytes = std::fs::read(goldens().join(name).join(file)).expect("golden");
        let range = description(&bytes);
        for (place, value) in changes {
            let place = match at_end {
                true => bytes.len() - 1 - place,
                false => (range.start + place).min(bytes.len() - 1),
            };
            bytes[place] = value;
        }
        let dir = temporary();
        let config = goldens().join(name).join("config.json");
        std::fs::copy(config, dir.path().join("config.json")).expect("copied");
        survive(dir.path(), file, &bytes);
    }
}
