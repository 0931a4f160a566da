//! Packing: weights are read or made by two threads in turn, laid out in panels by all cores, and written
//! by others, each a few buffers ahead of the next. Memory is bounded, an unfinished store vanishes.

use super::shelf::{find, is_of, lock_path, open_lock, partial, store_dir, store_name};
use super::stream::{Sink, StreamJob, write_stream};
use super::{LAYOUT_REVISION, MANIFEST, Manifest, Packing, SCHEMA, Store, StoreError};
use super::{StoreLayout, WEIGHTS};
use crate::checkpoint::{CheckpointError, WeightSource};
use crate::dtype::{Dtype, PANEL_ROWS, WeightLayout};
use crate::machine::cpu::kernels::{Isa, PackSource, pack_panels, pack_rows};
use crate::machine::cpu::pool::Pool;
use crate::machine::disk::{check_disk_tier, write_atomically};
use crate::model::{Matrix, ModelSpec};
use crate::units::PAGE_BYTES;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Threads that read ahead: while one copies out of its bounce buffer, the other keeps the disk busy.
const READERS: usize = 2;
/// Buffers on each side of the packer: two a reader, so that none waits for the other.
const BUFFERS: usize = 2 * READERS;
/// Rows packed at once fill at most this; more brings nothing.
const MOST_PIECE_BYTES: u64 = 16 << 20;

/// A model to be packed.
pub struct PackJob<'a> {
    pub source: &'a dyn WeightSource,
    pub offload_dir: &'a Path,
    pub packing: Packing,
    pub pool: &'a Pool,
    /// Buffers stay within this, but a panel each must fit; small tensors come one at a time.
    pub memory_bytes: u64,
    /// Told bytes written and bytes in all.
    pub progress: &'a mut dyn FnMut(u64, u64),
    pub stop: &'a AtomicBool,
}

/// Finds the store of these weights or makes it.
pub fn pack(job: PackJob) -> Result<Store, StoreError> {
    let spec = job.source.spec();
    let fingerprint = job.source.fingerprint();
    if let Some(store) = find(job.offload_dir, spec, &fingerprint, job.packing) {
        return Ok(store);
    }
    let root = store_dir(job.offload_dir);
    std::fs::create_dir_all(&root).map_err(|e| StoreError::io(&root, e))?;
    check_disk_tier(&root)?;
    let dir = root.join(store_name(spec, &fingerprint, job.packing));
    let lock = match lock_exclusive(&dir, (&job, &fingerprint))? {
        Turn::Locked(lock) => lock,
        Turn::Packed(store) => return Ok(*store),
    };
    // Another process may have packed the same weights while this one waited for the lock.
    let there = Manifest::read(&dir).is_ok_and(|m| is_of(&m, spec, &fingerprint, job.packing));
    if !there {
        write_beside(job, &dir, fingerprint)?;
    }
    // Shared, not let go: others may read now, and whoever waits to pack does not come between.
    lock.lock_shared().map_err(|e| StoreError::io(&dir, e))?;
    Store::open(&dir)
}

/// How waiting for other processes ended.
enum Turn {
    /// No other packs or reads the store.
    Locked(File),
    /// Another has packed it, and reads it now.
    Packed(Box<Store>),
}

fn lock_exclusive(dir: &Path, (job, fingerprint): (&PackJob, &str)) -> Result<Turn, StoreError> {
    let path = lock_path(dir);
    let lock = open_lock(&path).map_err(|e| StoreError::io(&path, e))?;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Turn::Locked(lock)),
            Err(TryLockError::WouldBlock) if job.stop.load(Ordering::Relaxed) => {
                return Err(StoreError::Interrupted);
            }
            Err(TryLockError::WouldBlock) => {
                let spec = job.source.spec();
                if let Some(store) = find(job.offload_dir, spec, fingerprint, job.packing) {
                    return Ok(Turn::Packed(Box::new(store)));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(TryLockError::Error(e)) => return Err(StoreError::io(&path, e)),
        }
    }
}

/// Writes under another name and renames when whole.
fn write_beside(job: PackJob, dir: &Path, fingerprint: String) -> Result<(), StoreError> {
    let partial = partial(dir);
    // Under the lock, what a killed process left is nobody's.
    remove_if_there(&partial)?;
    std::fs::create_dir(&partial).map_err(|e| StoreError::io(&partial, e))?;
    let written = write_store(job, &partial, fingerprint).and_then(|()| {
        remove_if_there(dir)?;
        std::fs::rename(&partial, dir).map_err(|e| StoreError::io(dir, e))
    });
    if written.is_err() {
        // The first error is the one worth telling.
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

fn remove_if_there(dir: &Path) -> Result<(), StoreError> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(StoreError::io(dir, e)),
        _ => Ok(()),
    }
}

fn write_store(job: PackJob, dir: &Path, fingerprint: String) -> Result<(), StoreError> {
    let spec = job.source.spec().clone();
    let Packing { compress, layout } = job.packing;
    let places = StoreLayout::of(&spec, compress);
    let pieces = pieces(&spec, compress, job.memory_bytes);
    let most_bytes = pieces.iter().map(|p| p.packed_bytes(&spec)).max();
    let stream = StreamJob {
        path: &dir.join(WEIGHTS),
        total_bytes: places.total_bytes,
        buffer_bytes: most_bytes.unwrap_or(0).max(SMALL_PIECE_BYTES as u64) + PAGE_BYTES,
        buffers: BUFFERS,
    };
    let mut packer = Packer {
        source: job.source,
        places: &places,
        pool: job.pool,
        isa: Isa::detect(),
        layout,
        progress: job.progress,
        stop: job.stop,
    };
    write_stream(&stream, |sink| {
        packer.smalls(sink)?;
        packer.matrices(sink, &pieces)?;
        sink.align(PAGE_BYTES);
        Ok::<(), StoreError>(())
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let manifest = Manifest {
        schema: SCHEMA,
        layout: layout.name().to_owned(),
        layout_revision: LAYOUT_REVISION,
        fingerprint,
        compress,
        created_unix_s: now.map_or(0, |age| age.as_secs()),
        model: spec,
        places,
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| StoreError::unusable(dir, e.to_string()))?;
    Ok(write_atomically(&dir.join(MANIFEST), &text)?)
}

/// Small tensors are copied in pieces of this, since the largest outgrow a buffer.
const SMALL_PIECE_BYTES: usize = 1 << 20;

/// Whole panels of one matrix that are packed at once.
#[derive(Clone, Copy)]
struct Piece {
    /// In `ModelSpec::matrices`.
    index: usize,
    matrix: Matrix,
    format: Dtype,
    first_row: usize,
    rows: usize,
}

impl Piece {
    fn native_bytes(&self, spec: &ModelSpec) -> u64 {
        self.rows as u64 * spec.dtype.row_bytes(self.matrix.inputs)
    }

    /// The larger of what comes in and what goes out, so that one bound serves both.
    fn packed_bytes(&self, spec: &ModelSpec) -> u64 {
        let rows = self.rows.next_multiple_of(PANEL_ROWS) as u64;
        let packed = rows * self.format.row_bytes(self.matrix.inputs);
        packed.max(self.native_bytes(spec))
    }
}

/// All matrices in the file's order, cut so that every buffer together stay within the memory.
fn pieces(spec: &ModelSpec, compress: bool, memory_bytes: u64) -> Vec<Piece> {
    let bytes = (memory_bytes / (2 * BUFFERS as u64)).min(MOST_PIECE_BYTES);
    let mut list = Vec::new();
    for (index, matrix) in spec.matrices().into_iter().enumerate() {
        let panel_bytes = spec.dtype.panel_bytes(matrix.inputs);
        let at_once = PANEL_ROWS * (bytes / panel_bytes).max(1) as usize;
        let format = matrix.format(spec.dtype, compress);
        list.extend((0..matrix.rows).step_by(at_once).map(|first_row| Piece {
            index,
            matrix,
            format,
            first_row,
            rows: at_once.min(matrix.rows - first_row),
        }));
    }
    list
}

struct Packer<'a> {
    source: &'a dyn WeightSource,
    places: &'a StoreLayout,
    pool: &'a Pool,
    isa: Isa,
    layout: WeightLayout,
    progress: &'a mut dyn FnMut(u64, u64),
    stop: &'a AtomicBool,
}

impl Packer<'_> {
    fn smalls(&mut self, sink: &mut Sink) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        for (small, place) in self.source.spec().smalls().iter().zip(&self.places.smalls) {
            bytes.resize(small.bytes() as usize, 0);
            self.source.read_small(small, &mut bytes)?;
            sink.align_to(place.offset);
            for piece in bytes.chunks(SMALL_PIECE_BYTES) {
                sink.room(piece.len()).copy_from_slice(piece);
            }
            self.advance(sink)?;
        }
        Ok(())
    }

    /// Other threads read ahead, piece by piece in turn; each one's buffers go round.
    fn matrices(&mut self, sink: &mut Sink, pieces: &[Piece]) -> Result<(), StoreError> {
        let source = self.source;
        std::thread::scope(|scope| {
            let start = |first: usize| {
                let (full_in, full_out) = sync_channel(BUFFERS);
                let (empty_in, empty_out) = sync_channel::<Vec<u8>>(BUFFERS);
                for _ in 0..BUFFERS / READERS {
                    // There is room for all of them, and the receiver is at hand.
                    let _ = empty_in.send(Vec::new());
                }
                let mine = pieces.iter().skip(first).step_by(READERS);
                scope.spawn(move || read_ahead(source, mine, empty_out, full_in));
                (full_out, empty_in)
            };
            let readers: Vec<_> = (0..READERS).map(start).collect();
            for (piece, (full, empty)) in pieces.iter().zip(readers.iter().cycle()) {
                // A reader ends early only with an error, which it sends first.
                let Ok(read) = full.recv() else {
                    return Err(StoreError::Interrupted);
                };
                let rows = read?;
                self.pack(sink, piece, &rows);
                self.advance(sink)?;
                // Near the end nobody waits for buffers any more.
                let _ = empty.send(rows);
            }
            Ok(())
        })
    }

    fn pack(&self, sink: &mut Sink, piece: &Piece, rows: &[u8]) {
        let spec = self.source.spec();
        if piece.first_row == 0 {
            sink.align_to(self.places.matrices[piece.index].offset);
        }
        let panel_bytes = piece.format.panel_bytes(piece.matrix.inputs);
        let panels = crate::dtype::panels(piece.rows) as u64;
        let source = PackSource {
            bytes: rows,
            dtype: spec.dtype,
            rows: piece.rows,
            inputs: piece.matrix.inputs,
        };
        let room = sink.room((panels * panel_bytes) as usize);
        match self.layout {
            WeightLayout::CpuPanel64 => {
                pack_panels(self.pool, self.isa, source, piece.format, room)
            }
            WeightLayout::GpuRowMajor => pack_rows(self.pool, self.isa, source, piece.format, room),
        }
    }

    fn advance(&mut self, sink: &Sink) -> Result<(), StoreError> {
        (self.progress)(sink.position(), self.places.total_bytes);
        if self.stop.load(Ordering::Relaxed) || sink.has_failed() {
            return Err(StoreError::Interrupted);
        }
        Ok(())
    }
}

/// Fills buffers in the order of the pieces until there are no more, or nobody takes them.
fn read_ahead<'p>(
    source: &dyn WeightSource,
    pieces: impl Iterator<Item = &'p Piece>,
    empty: Receiver<Vec<u8>>,
    full: SyncSender<Result<Vec<u8>, CheckpointError>>,
) {
    for piece in pieces {
        let Ok(mut rows) = empty.recv() else {
            return;
        };
        rows.resize(piece.native_bytes(source.spec()) as usize, 0);
        let read = source.read_rows(&piece.matrix, piece.first_row, piece.rows, &mut rows);
        let failed = read.is_err();
        if full.send(read.map(|()| rows)).is_err() || failed {
            return;
        }
    }
}
