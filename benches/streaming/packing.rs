//! Packing against copying: the same bytes in by direct reads, and as many bytes out to a fresh file by
//! direct writes, both sides at once, through the program's own I/O pools. Interleaved, medians.

use crate::{Options, median};
use loadmaster::checkpoint::{
    Checkpoint, DEFAULT_SHARD_BYTES, SynthJob, WeightSource, write_synth,
};
use loadmaster::cost::requests::READ_THREADS;
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::machine::disk::{DiskFile, IoPool, IoRequest};
use loadmaster::machine::os;
use loadmaster::model::families::named_size;
use loadmaster::store::{self, PackJob, Store};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// Packing's own bound on its buffers, as `run` sets it.
const MEMORY_BYTES: u64 = 192 << 20;
const BLOCK_BYTES: u64 = 16 << 20;

pub fn run(options: &Options) {
    let home = options.home();
    let checkpoint = checkpoint(&home, options.model());
    let source = Checkpoint::open(&checkpoint).expect("just written");
    let files = weight_files(&checkpoint);
    let bytes_in: u64 = files
        .iter()
        .map(|f| f.metadata().map_or(0, |m| m.len()))
        .sum();
    println!(
        "packing {}: {:.2} GB in; median of {} interleaved rounds, seconds",
        options.model(),
        bytes_in as f64 / 1e9,
        options.rounds()
    );
    println!(
        "{:8} {:>8} {:>8} {:>8} {:>7} {:>9} {:>10}",
        "format", "GB out", "pack", "copy", "ratio", "GB/s in", "peak MiB"
    );
    for compress in [false, true] {
        let (mut packs, mut copies, mut peak, mut bytes_out) = (vec![], vec![], 0, 0);
        for _ in 0..options.rounds() {
            let (seconds, store, pack_peak) = pack(&home, &source, compress);
            bytes_out = store.file_bytes();
            drop(store);
            packs.push(seconds);
            peak = peak.max(pack_peak);
            store::list(&home).expect("listed").iter().for_each(|s| {
                store::remove(&home, &s.name).expect("removed");
            });
            copies.push(copy(&home, &files, bytes_out));
        }
        let (pack, copy) = (median(packs), median(copies));
        println!(
            "{:8} {:8.2} {pack:8.2} {copy:8.2} {:7.2} {:9.2} {:10.0}",
            if compress { "4-bit" } else { "as it is" },
            bytes_out as f64 / 1e9,
            pack / copy,
            bytes_in as f64 / pack / 1e9,
            peak as f64 / (1 << 20) as f64
        );
    }
}

/// A checkpoint with random weights in the real format, made once.
pub fn checkpoint(home: &Path, model: &str) -> PathBuf {
    let dir = home.join("checkpoints").join(model);
    if !dir.exists() {
        println!("writing a checkpoint of {model}");
        std::fs::create_dir_all(home.join("checkpoints")).expect("made");
        write_synth(SynthJob {
            spec: named_size(model).expect("a known size"),
            seed: 0,
            dir: &dir,
            shard_bytes: DEFAULT_SHARD_BYTES,
            progress: &mut |_, _| {},
            stop: &AtomicBool::new(false),
        })
        .expect("written");
    }
    dir
}

fn weight_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("there").flatten();
    let paths = entries.map(|e| e.path());
    paths
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect()
}

/// Seconds, the store, and the process's peak while packing.
fn pack(home: &Path, source: &dyn WeightSource, compress: bool) -> (f64, Store, u64) {
    os::reset_peak();
    let start = Instant::now();
    let store = store::pack(PackJob {
        source,
        offload_dir: home,
        packing: compress.into(),
        pool: &Pool::new(os::default_threads()),
        memory_bytes: MEMORY_BYTES,
        progress: &mut |_, _| {},
        stop: &AtomicBool::new(false),
    });
    let store = store.expect("packed");
    let seconds = start.elapsed().as_secs_f64();
    (
        seconds,
        store,
        os::process_memory().map_or(0, |m| m.peak_bytes),
    )
}

/// All files in, and `bytes_out` to a fresh file, reading and writing at the same time.
fn copy(home: &Path, files: &[PathBuf], bytes_out: u64) -> f64 {
    let path = home.join("copy.bin");
    let start = Instant::now();
    let out = DiskFile::create(&path).expect("made");
    let whole = bytes_out / 4096 * 4096;
    out.reserve(whole).expect("room");
    let buffer = || AlignedBuffer::new(BLOCK_BYTES).expect("memory");
    std::thread::scope(|scope| {
        let (full_in, full_out) = sync_channel::<AlignedBuffer>(4);
        let (empty_in, empty_out) = sync_channel(4);
        (0..4).for_each(|_| empty_in.send(buffer()).expect("room for all"));
        scope.spawn(move || read_all(files, &empty_out, &full_in));
        let pool = IoPool::new(READ_THREADS).expect("threads");
        let mut at = 0;
        for block in full_out {
            let bytes = (whole - at).min(block.len() as u64);
            let mut request = [IoRequest::write(&out, at, &block[..bytes as usize])];
            pool.run(&mut request).expect("written");
            at += bytes;
            // Near the end nobody waits for buffers any more.
            let _ = empty_in.send(block);
        }
    });
    out.sync().expect("synced");
    drop(out);
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_file(&path).expect("removed");
    seconds
}

fn read_all(
    files: &[PathBuf],
    empty: &std::sync::mpsc::Receiver<AlignedBuffer>,
    full: &std::sync::mpsc::SyncSender<AlignedBuffer>,
) {
    let pool = IoPool::new(READ_THREADS).expect("threads");
    for path in files {
        let file = DiskFile::open_read(path).expect("there");
        let bytes = file.len_bytes().expect("a length");
        for offset in (0..bytes).step_by(BLOCK_BYTES as usize) {
            let Ok(mut block) = empty.recv() else { return };
            let wanted = (bytes - offset).min(BLOCK_BYTES).next_multiple_of(4096) as usize;
            let mut request = [IoRequest::read(&file, offset, &mut block[..wanted])];
            pool.run(&mut request).expect("read");
            if full.send(block).is_err() {
                return;
            }
        }
    }
}
