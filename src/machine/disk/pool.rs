//! A small pool of threads that carries out reads and writes in pieces, several at a time.
//! It knows files and slices; lanes, fences and records are the engine's.

use super::{DiskError, DiskFile};
use crate::cost::requests::{LARGEST_PIECE_BYTES, SMALLEST_PIECE_BYTES, piece_bytes};
use crate::machine::os;
use crate::units::{PAGE_BYTES, round_up};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What moves: into memory or out of it. Whole 4096-byte pages.
pub enum IoData<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// One transfer between a file and memory.
pub struct IoRequest<'a> {
    pub file: &'a DiskFile,
    pub offset: u64,
    pub data: IoData<'a>,
}

impl<'a> IoRequest<'a> {
    pub fn read(file: &'a DiskFile, offset: u64, target: &'a mut [u8]) -> Self {
        IoRequest {
            file,
            offset,
            data: IoData::Read(target),
        }
    }

    pub fn write(file: &'a DiskFile, offset: u64, source: &'a [u8]) -> Self {
        IoRequest {
            file,
            offset,
            data: IoData::Write(source),
        }
    }

    fn bytes(&self) -> u64 {
        match &self.data {
            IoData::Read(target) => target.len() as u64,
            IoData::Write(source) => source.len() as u64,
        }
    }

    fn address(&self) -> *const u8 {
        match &self.data {
            IoData::Read(target) => target.as_ptr(),
            IoData::Write(source) => source.as_ptr(),
        }
    }
}

/// Who calls `run` works on his own transfers, and these threads help: a small one costs no wake-up, and of
/// a large one as many pieces are in flight as the pool has threads, the caller's among them. Several callers
/// may `run` at the same time: their pieces take turns.
pub struct IoPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    piece_bytes: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    next_id: u64,
    closed: bool,
}

/// One call of `run`: its requests, how far they were handed out, how many pieces are under way.
struct Job {
    id: u64,
    requests: *mut IoRequest<'static>,
    count: usize,
    request: usize,
    position: u64,
    piece_bytes: u64,
    under_way: usize,
    error: Option<DiskError>,
}

// SAFETY: `requests` points to the requests that `run` borrows until its job is finished; they are
// read under the state's lock only, and their slices may be sent between threads.
unsafe impl Send for Job {}

/// A part of one request.
struct Piece {
    job: u64,
    file: *const DiskFile,
    offset: u64,
    address: *mut u8,
    bytes: usize,
    write: bool,
}

impl IoPool {
    pub fn new(threads: usize) -> Result<IoPool, DiskError> {
        Self::with_piece_bytes(threads, LARGEST_PIECE_BYTES)
    }

    /// `piece_bytes` is the largest single transfer; at least 1 MiB.
    pub fn with_piece_bytes(threads: usize, piece_bytes: u64) -> Result<IoPool, DiskError> {
        let mut pool = IoPool {
            shared: Arc::new(Shared::default()),
            workers: Vec::new(),
            piece_bytes: round_up(piece_bytes.max(SMALLEST_PIECE_BYTES), PAGE_BYTES),
        };
        // Room for more callers than there are lanes: running takes no memory later.
        pool.shared.lock().jobs.reserve(16);
        // The caller is the first one.
        for _ in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new()
                .name("disk".to_owned())
                .stack_size(256 << 10)
                .spawn(move || work(&shared));
            pool.workers
                .push(worker.map_err(|source| DiskError::Threads { threads, source })?);
        }
        Ok(pool)
    }

    /// Pieces of one call that are in flight together.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Carries out all requests and waits for them. The first error is returned after everything
    /// that was under way has ended; what had not begun by then is left undone.
    pub fn run(&self, requests: &mut [IoRequest<'_>]) -> Result<(), DiskError> {
        for r in requests.iter() {
            r.file
                .check_pages(r.address(), r.bytes() as usize, r.offset)?;
        }
        let total_bytes = requests.iter().map(IoRequest::bytes).sum();
        if total_bytes == 0 {
            return Ok(());
        }
        let piece_bytes = piece_bytes(total_bytes, self.threads(), self.piece_bytes);
        let id = self.submit(requests, piece_bytes);
        while let Some(piece) = self.shared.next_piece_of(id) {
            let result = transfer(&piece);
            self.shared.finish(piece.job, result);
        }
        self.wait(id)
    }

    fn submit(&self, requests: &mut [IoRequest<'_>], piece_bytes: u64) -> u64 {
        let pieces = requests.iter().map(|r| r.bytes().div_ceil(piece_bytes));
        let helpers = pieces
            .sum::<u64>()
            .saturating_sub(1)
            .min(self.workers.len() as u64);
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.jobs.push_back(Job {
            id,
            requests: requests.as_mut_ptr().cast(),
            count: requests.len(),
            request: 0,
            position: 0,
            piece_bytes,
            under_way: 0,
            error: None,
        });
        drop(state);
        (0..helpers).for_each(|_| self.shared.work.notify_one());
        id
    }

    /// Waits for a job's last piece; nothing refers to the caller's requests afterwards.
    fn wait(&self, id: u64) -> Result<(), DiskError> {
        let mut state = self.shared.lock();
        loop {
            let place = state
                .jobs
                .iter()
                .position(|job| job.id == id && job.finished());
            if let Some(job) = place.and_then(|place| state.jobs.remove(place)) {
                return job.error.map_or(Ok(()), Err);
            }
            state = self
                .shared
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for IoPool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // Nobody waits for a job any more, so that a panic of a worker has nobody to reach.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until there is a piece; `None` when the pool closes.
    fn next_piece(&self) -> Option<Piece> {
        let mut state = self.lock();
        loop {
            if let Some(piece) = state.take_piece() {
                return Some(piece);
            }
            if state.closed {
                return None;
            }
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A piece of this job, if there is one left.
    fn next_piece_of(&self, id: u64) -> Option<Piece> {
        let mut state = self.lock();
        let job = state.jobs.iter_mut().find(|job| job.id == id)?;
        (!job.handed_out()).then(|| job.take_piece())
    }

    fn finish(&self, id: u64, result: Result<(), DiskError>) {
        let mut state = self.lock();
        let Some(job) = state.jobs.iter_mut().find(|job| job.id == id) else {
            return;
        };
        job.under_way -= 1;
        if let Err(error) = result {
            job.error.get_or_insert(error);
        }
        if job.finished() {
            self.done.notify_all();
        }
    }
}

impl State {
    /// The next piece of the first job that has one; that job then stands at the end of the queue.
    fn take_piece(&mut self) -> Option<Piece> {
        let place = self.jobs.iter().position(|job| !job.handed_out())?;
        let mut job = self.jobs.remove(place)?;
        let piece = job.take_piece();
        self.jobs.push_back(job);
        Some(piece)
    }
}

impl Job {
    fn handed_out(&self) -> bool {
        self.request == self.count || self.error.is_some()
    }

    fn finished(&self) -> bool {
        self.handed_out() && self.under_way == 0
    }

    fn current(&mut self) -> &mut IoRequest<'static> {
        // SAFETY: `request` < `count`, the requests outlive the job (`run` waits for it), and the
        // state's lock is held, so that no other reference to them exists.
        unsafe { &mut *self.requests.add(self.request) }
    }

    /// Cuts the next piece off; requests are cut evenly, so that no crumb is left at their end.
    fn take_piece(&mut self) -> Piece {
        let (position, job, limit_bytes) = (self.position, self.id, self.piece_bytes);
        let request = self.current();
        let total = request.bytes();
        let even = round_up(
            total.div_ceil(total.div_ceil(limit_bytes).max(1)),
            PAGE_BYTES,
        );
        let bytes = even.min(total - position);
        let (address, write) = match &mut request.data {
            IoData::Read(target) => (target.as_mut_ptr(), false),
            IoData::Write(source) => (source.as_ptr().cast_mut(), true),
        };
        let piece = Piece {
            job,
            file: request.file,
            offset: request.offset + position,
            // SAFETY: position <= total, the length of the slice.
            address: unsafe { address.add(position as usize) },
            bytes: bytes as usize,
            write,
        };
        self.position += bytes;
        self.under_way += 1;
        if self.position == total {
            self.request += 1;
            self.position = 0;
        }
        piece
    }
}

fn work(shared: &Shared) {
    os::take_short_turns();
    while let Some(piece) = shared.next_piece() {
        let result = transfer(&piece);
        shared.finish(piece.job, result);
    }
}

fn transfer(piece: &Piece) -> Result<(), DiskError> {
    if piece.bytes == 0 {
        return Ok(());
    }
    // SAFETY: the request borrows the file until its job has finished, and this piece is part of it.
    let file = unsafe { &*piece.file };
    if piece.write {
        // SAFETY: within the request's slice, which nobody writes while it is borrowed.
        let source = unsafe { std::slice::from_raw_parts(piece.address, piece.bytes) };
        return file.write_at(source, piece.offset);
    }
    // SAFETY: within the request's exclusive slice; pieces of one request do not overlap.
    let target = unsafe { std::slice::from_raw_parts_mut(piece.address, piece.bytes) };
    file.read_at(target, piece.offset)
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
