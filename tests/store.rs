//! Stores end to end: packed, found again, listed, locked, removed; and what happens to bad ones.

use loadmaster::checkpoint::{Checkpoint, SynthSource, WeightSource};
use loadmaster::dtype::Dtype;
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::cpu::kernels::{Isa, PackSource, pack_panels};
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::model::ModelSpec;
use loadmaster::model::families::named_size;
use loadmaster::store::{
    PackJob, Store, StoreError, clear_leftover, find, list, pack, prune, remove, store_dir,
};
use std::path::Path;
use std::sync::atomic::AtomicBool;

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary directory")
}

fn odd_spec(dtype: Dtype) -> ModelSpec {
    ModelSpec {
        name: "odd/name".to_owned(),
        layers: 2,
        hidden: 90,
        heads: 5,
        ffn: 333,
        vocab: 1001,
        positions: 77,
        embed_width: 65,
        dtype,
        ..named_size("opt-350m").expect("a known size")
    }
}

fn try_pack(
    source: &dyn WeightSource,
    dir: &Path,
    compress: bool,
    stop: bool,
) -> Result<Store, StoreError> {
    pack(PackJob {
        source,
        offload_dir: dir,
        packing: compress.into(),
        pool: &Pool::new(2),
        memory_bytes: 100_000,
        progress: &mut |done, total| assert!(done <= total),
        stop: &AtomicBool::new(stop),
    })
}

fn assert_packed(store: &Store, source: &dyn WeightSource) {
    let spec = source.spec();
    let file = std::fs::read(store.file_path()).expect("there");
    assert_eq!(file.len() as u64, store.file_bytes());
    let pool = Pool::new(1);
    for (index, matrix) in spec.matrices().iter().enumerate() {
        let mut rows = vec![0; matrix.rows * spec.dtype.row_bytes(matrix.inputs) as usize];
        source
            .read_rows(matrix, 0, matrix.rows, &mut rows)
            .expect("inside");
        let format = matrix.format(spec.dtype, store.is_compressed());
        assert_eq!(store.matrix_format(index), format);
        let mut panels = vec![0; matrix.panels() * format.panel_bytes(matrix.inputs) as usize];
        let packed = PackSource {
            bytes: &rows,
            dtype: spec.dtype,
            rows: matrix.rows,
            inputs: matrix.inputs,
        };
        pack_panels(&pool, Isa::SCALAR, packed, format, &mut panels);
        let offset = store.matrix_offset(index) as usize;
        assert_eq!(offset % 4096, 0);
        assert!(file[offset..offset + panels.len()] == panels, "{matrix:?}");
    }
    let mut region = AlignedBuffer::new(store.smalls_bytes()).expect("memory");
    store.read_smalls(&mut region).expect("read");
    for (index, small) in spec.smalls().iter().enumerate() {
        let mut values = vec![0; small.bytes() as usize];
        source.read_small(small, &mut values).expect("fits");
        assert!(region[store.small_range(index)] == values, "{small:?}");
    }
}

#[test]
fn stores_hold_the_packed_source_and_are_found_again() {
    let home = temporary();
    for (dtype, compress) in [
        (Dtype::F16, false),
        (Dtype::F16, true),
        (Dtype::F32, false),
        (Dtype::Bf16, true),
    ] {
        let source = SynthSource::new(odd_spec(dtype), 3);
        let print = source.fingerprint();
        assert!(find(home.path(), source.spec(), &print, compress).is_none());
        let store = try_pack(&source, home.path(), compress, false).expect("packed");
        assert_packed(&store, &source);
        let written = std::fs::metadata(store.file_path())
            .expect("there")
            .modified()
            .expect("a time");
        drop(store);
        // A stopped pack would fail, so this one finds.
        let again = try_pack(&source, home.path(), compress, true).expect("found");
        assert_eq!(
            std::fs::metadata(again.file_path())
                .expect("there")
                .modified()
                .expect("a time"),
            written
        );
        let other = SynthSource::new(odd_spec(dtype), 4);
        assert!(find(home.path(), other.spec(), &other.fingerprint(), compress).is_none());
    }
    assert_eq!(list(home.path()).expect("listed").len(), 4);
}

#[test]
fn checkpoints_are_packed_from_every_format() {
    let home = temporary();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models");
    for name in ["shared-and-strided", "wide-embedding", "wide-small-tensors"] {
        let source = Checkpoint::open(&goldens.join(name)).expect("golden");
        let store = try_pack(&source, home.path(), false, false).expect("packed");
        assert_packed(&store, &source);
    }
}

#[test]
fn an_interrupted_pack_leaves_nothing() {
    let home = temporary();
    let source = SynthSource::new(odd_spec(Dtype::F16), 3);
    let error = try_pack(&source, home.path(), false, true).expect_err("stopped");
    assert!(matches!(error, StoreError::Interrupted));
    assert!(list(home.path()).expect("listed").is_empty());
    let left = std::fs::read_dir(store_dir(home.path()))
        .expect("there")
        .flatten();
    assert_eq!(left.filter(|e| e.path().is_dir()).count(), 0);
}

/// The file by which processes lock the only store.
fn lock_file(home: &Path) -> std::fs::File {
    let entries = std::fs::read_dir(store_dir(home)).expect("there").flatten();
    let is_lock = |path: &std::path::PathBuf| path.extension().is_some_and(|e| e == "lock");
    let path = entries.map(|e| e.path()).find(is_lock).expect("one lock");
    std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("a lock")
}

#[test]
fn who_waits_while_another_packs_reads_with_it_afterwards() {
    let home = temporary();
    let source = SynthSource::new(odd_spec(Dtype::F16), 3);
    let dir = try_pack(&source, home.path(), false, false)
        .expect("packed")
        .dir()
        .to_owned();
    // As if it were being packed: locked, and not whole.
    let other = lock_file(home.path());
    other.lock().expect("free");
    let (whole, hidden) = (dir.join("manifest.json"), dir.join("hidden"));
    std::fs::rename(&whole, &hidden).expect("a manifest");
    let (told, found) = std::sync::mpsc::channel();
    let waits = |home: std::path::PathBuf| {
        let source = SynthSource::new(odd_spec(Dtype::F16), 3);
        let _ = told.send(try_pack(&source, &home, false, false).map(|store| store.name()));
    };
    std::thread::scope(|scope| {
        let home = home.path().to_owned();
        scope.spawn(move || waits(home));
        let early = found.recv_timeout(std::time::Duration::from_millis(300));
        assert!(early.is_err(), "it is not whole yet");
        std::fs::rename(&hidden, &whole).expect("hidden");
        // The other reads it now, for as long as its run takes.
        other.lock_shared().expect("its own");
        let late = found.recv_timeout(std::time::Duration::from_secs(20));
        other.unlock().expect("its own");
        assert!(
            late.is_ok_and(|found| found.is_ok()),
            "waited for the reader"
        );
    });
}

#[test]
fn what_a_killed_process_left_goes_unless_another_packs() {
    let home = temporary();
    let source = SynthSource::new(odd_spec(Dtype::F16), 3);
    let name = try_pack(&source, home.path(), false, false)
        .expect("packed")
        .name();
    let partial = store_dir(home.path()).join(format!(".{name}.partial"));
    std::fs::create_dir(&partial).expect("made");
    std::fs::write(partial.join("weights.bin"), "half").expect("written");
    let other = lock_file(home.path());
    other.lock().expect("free");
    clear_leftover(home.path(), &source, false.into()).expect("left alone");
    assert!(partial.exists());
    other.unlock().expect("its own");
    clear_leftover(home.path(), &source, false.into()).expect("cleared");
    assert!(!partial.exists());
}

#[test]
fn stores_in_use_stay_and_others_go() {
    let home = temporary();
    let source = SynthSource::new(odd_spec(Dtype::F16), 3);
    let store = try_pack(&source, home.path(), false, false).expect("packed");
    let (name, bytes) = (store.name(), store.file_bytes());
    assert!(matches!(
        remove(home.path(), &name),
        Err(StoreError::InUse(_))
    ));
    assert!(prune(home.path()).expect("nothing to do").is_empty());
    drop(store);
    let removed = remove(home.path(), &name).expect("free");
    assert!(removed.bytes > bytes);
    for name in [name.as_str(), "..", "../store", ".hidden"] {
        let error = remove(home.path(), name).expect_err("unknown").to_string();
        assert!(error.contains("store list"), "{error}");
    }
}

#[test]
fn damaged_stores_are_refused_listed_and_pruned() {
    let home = temporary();
    let source = SynthSource::new(odd_spec(Dtype::F16), 3);
    let store = try_pack(&source, home.path(), false, false).expect("packed");
    let (dir, weights, bytes) = (
        store.dir().to_owned(),
        store.file_path(),
        store.file_bytes(),
    );
    drop(store);
    let message = || Store::open(&dir).expect_err("damaged").to_string();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .expect("there");
    file.set_len(bytes - 1).expect("cut");
    assert!(message().contains("weights.bin has"));
    file.set_len(bytes).expect("as before");
    let manifest = dir.join("manifest.json");
    let whole = std::fs::read_to_string(&manifest).expect("there");
    for (from, to, says) in [
        ("\"layout_revision\": 2", "\"layout_revision\": 99", "99"),
        ("\"layers\": 2", "\"layers\": 1", "offsets"),
        (
            "\"layers\": 2",
            "\"layers\": 18446744073709551615",
            "num_hidden_layers",
        ),
        ("\"compress\"", "\"unknown\": 1, \"compress\"", "unknown"),
    ] {
        assert!(whole.contains(from), "{whole}");
        std::fs::write(&manifest, whole.replacen(from, to, 1)).expect("written");
        assert!(message().contains(says), "{}", message());
    }
    let info = list(home.path()).expect("listed").remove(0);
    assert!(info.manifest.is_none() && info.why.is_some());
    // What another process was killed over is pruned with it.
    std::fs::create_dir(dir.with_file_name(".gone-f16-0000.partial")).expect("made");
    assert_eq!(prune(home.path()).expect("pruned").len(), 2);
    let store = try_pack(&source, home.path(), false, false).expect("packed anew");
    assert_packed(&store, &source);
}
