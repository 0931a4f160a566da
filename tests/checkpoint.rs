//! Checkpoints end to end: written and read back, in every format, whole and damaged.

use loadmaster::checkpoint::{Checkpoint, SynthJob, SynthSource, WeightSource, write_synth};
use loadmaster::dtype::Dtype;
use loadmaster::model::ModelSpec;
use loadmaster::model::families::named_size;
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
