//! Fork-join over a fixed set of threads, without allocation per call, and each thread's scratch.
//! No kernel, no queue, no futures: one job at a time, cut into numbered parts. Every thread begins with
//! its own run of neighbouring parts, so that what one job wrote is mostly read by the same core in the
//! next, and then helps the others.

use crate::machine::os;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Scratch of each thread, in f32: large enough for a GEMM's blocks and an attention tile in L2.
pub const SCRATCH_FLOATS: usize = 160 * 1024;
/// What a call may keep between two runs, for each thread, in f32: halves of the keys of four sequences with 40 heads
/// of 128 (opt-13b).
const KEPT_FLOATS: usize = 48 * 1024;
/// Bytes that the pool holds for each thread.
pub const THREAD_BYTES: u64 = 4 * (SCRATCH_FLOATS + KEPT_FLOATS) as u64;
/// How long an idle worker looks for the next job before it sleeps. Kernels of one layer follow
/// each other within this time; a wake-up from sleep costs about as much.
const SPIN: Duration = Duration::from_micros(50);
/// Looks between two offers of the core to whoever wants it: 5 µs or so. A lane of the disk that has woken up on
/// the core of a worker with nothing to do would else wait until that falls asleep.
const LOOKS: u32 = 128;

const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const EPOCH_SHIFT: u32 = 32;

type Work = dyn Fn(usize, &mut [f32]) + Sync;

thread_local! {
    /// Set while this thread executes a part: a part that starts a run would wait for itself.
    static IN_PART: Cell<bool> = const { Cell::new(false) };
}

/// One cache line, so that scratch starts on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

#[derive(Clone, Copy)]
struct Job {
    work: *const Work,
}

/// Neighbouring parts that nobody has taken yet: first << 32 | end. Alone on its cache line.
#[derive(Default)]
#[repr(align(64))]
struct Untaken(AtomicU64);

impl Untaken {
    fn set(&self, from: usize, end: usize) {
        self.0
            .store((from as u64) << 32 | end as u64, Ordering::Relaxed);
    }

    /// Takes the first part, or the last: who owns the parts and who helps meet at the end only.
    fn take(&self, first: bool) -> Option<usize> {
        let rest = |range: u64| {
            let (from, end) = (range >> 32, range & u64::from(u32::MAX));
            (from < end).then(|| match first {
                true => (from + 1) << 32 | end,
                false => from << 32 | (end - 1),
            })
        };
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        taken.ok().map(|range| match first {
            true => (range >> 32) as usize,
            false => (range & u64::from(u32::MAX)) as usize - 1,
        })
    }
}

struct Shared {
    /// epoch << 32 | OPEN | number of workers inside the job.
    state: AtomicU64,
    /// Of each thread.
    untaken: Vec<Untaken>,
    job: UnsafeCell<Option<Job>>,
    scratch: Vec<UnsafeCell<Vec<Line>>>,
    sleeping: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `job` is written only while no worker is inside (closed, joined = 0) and read only after
// joining; `scratch[t]` is touched only by thread t while it is inside a job.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is followed only while the caller of `run` keeps it alive.
unsafe impl Send for Shared {}

impl Shared {
    fn new(threads: usize) -> Shared {
        let lines = vec![Line([0.0; 16]); SCRATCH_FLOATS / 16];
        Shared {
            state: AtomicU64::new(0),
            untaken: (0..threads).map(|_| Untaken::default()).collect(),
            job: UnsafeCell::new(None),
            scratch: (0..threads)
                .map(|_| UnsafeCell::new(lines.clone()))
                .collect(),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        }
    }

    /// Enters the open job, unless it is the one this worker has already seen the end of.
    fn join(&self, last_epoch: u64) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        let epoch = state >> EPOCH_SHIFT;
        if state & OPEN == 0 || epoch == last_epoch {
            return None;
        }
        let entered =
            self.state
                .compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed);
        entered.ok().map(|_| epoch)
    }

    /// Parts that follow each other for each thread.
    fn deal(&self, parts: usize) {
        assert!(
            u32::try_from(parts).is_ok(),
            "a pool's run has too many parts"
        );
        let threads = self.untaken.len();
        for (t, untaken) in self.untaken.iter().enumerate() {
            let begin = |t: usize| (parts * t).div_ceil(threads);
            untaken.set(begin(t), begin(t + 1));
        }
    }

    /// The thread's own next part, else the last of another's.
    fn take(&self, thread: usize) -> Option<usize> {
        let threads = self.untaken.len();
        let others = || (1..threads).find_map(|t| self.untaken[(thread + t) % threads].take(false));
        self.untaken[thread].take(true).or_else(others)
    }

    /// Takes parts until none is left; a panic ends the job and is kept for the caller.
    fn work(&self, thread: usize, job: Job) {
        let body = || {
            // SAFETY: scratch[thread] belongs to this thread while it is inside the job, and the
            // caller of `run` waits inside it until every thread has left, so `work` is alive.
            let (work, scratch) = unsafe { (&*job.work, floats(&mut *self.scratch[thread].get())) };
            while let Some(part) = self.take(thread) {
                work(part, scratch);
            }
        };
        IN_PART.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(body));
        IN_PART.set(false);
        if let Err(panic) = outcome {
            self.untaken.iter().for_each(|untaken| untaken.set(0, 0));
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(panic);
        }
    }

    /// A worker's life: look for a job, sleep when there is none for a while.
    fn serve(&self, thread: usize) {
        let mut last_epoch = 0;
        let mut idle_since = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(epoch) = self.join(last_epoch) {
                last_epoch = epoch;
                // SAFETY: joined, so the job is set and stays until we leave.
                if let Some(job) = unsafe { *self.job.get() } {
                    self.work(thread, job);
                }
                self.state.fetch_sub(1, Ordering::Release);
                idle_since = Instant::now();
            } else if idle_since.elapsed() < SPIN {
                (0..LOOKS).for_each(|_| std::hint::spin_loop());
                thread::yield_now();
            } else {
                self.sleep(thread - 1, last_epoch);
                idle_since = Instant::now();
            }
        }
    }

    /// Sleeps unless a job came between the last look and the flag.
    fn sleep(&self, worker: usize, last_epoch: u64) {
        self.sleeping[worker].store(true, Ordering::SeqCst);
        let state = self.state.load(Ordering::SeqCst);
        let idle = state & OPEN == 0 || state >> EPOCH_SHIFT == last_epoch;
        if idle && !self.stop.load(Ordering::SeqCst) {
            thread::park();
        }
        self.sleeping[worker].store(false, Ordering::SeqCst);
    }

    /// Lets nobody in any more and waits for those inside.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut looks = 0u32;
        while self.state.load(Ordering::Acquire) & JOINED != 0 {
            looks += 1;
            // A worker may have lost its core to another process: give ours up now and then.
            if looks.is_multiple_of(32 * LOOKS) {
                thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
    }
}

fn floats(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a Line is sixteen f32 without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) }
}

/// A fixed set of threads; the one that calls `run` takes part.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// The core of whoever calls; empty where threads are not bound.
    core: Vec<usize>,
    turn: Mutex<()>,
    kept: Mutex<Vec<Line>>,
}

/// What one caller keeps from a run for the next, as whoever had it before left it.
pub struct Kept<'a>(MutexGuard<'a, Vec<Line>>);

impl Kept<'_> {
    /// `KEPT_FLOATS` for each thread.
    pub fn floats(&mut self) -> &mut [f32] {
        floats(&mut self.0)
    }
}

impl Pool {
    /// `threads` counts the caller; 0 is taken as 1.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared::new(threads.max(1)));
        let mut cores = os::core_of_each(threads).into_iter();
        let core = cores.next().unwrap_or_default();
        let mut start = |thread: usize| {
            let (shared, core) = (Arc::clone(&shared), cores.next().unwrap_or_default());
            thread::Builder::new()
                .name(format!("compute-{thread}"))
                .stack_size(256 * 1024)
                .spawn(move || {
                    os::bind_current_thread(&core);
                    shared.serve(thread)
                })
        };
        // Fewer threads than asked for are slower, never wrong: results do not depend on them.
        let workers: Vec<_> = (1..threads.max(1)).map_while(|t| start(t).ok()).collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Pool {
            shared,
            workers,
            handles,
            core,
            turn: Mutex::new(()),
            kept: Mutex::new(vec![Line([0.0; 16]); threads.max(1) * KEPT_FLOATS / 16]),
        }
    }

    /// Keeps the calling thread on the core that no worker of this pool has: for a thread that does nothing but
    /// call it, since threads that it starts would stay there too.
    pub fn bind_caller(&self) {
        os::bind_current_thread(&self.core);
    }

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Nobody else's until it is dropped.
    pub fn keep(&self) -> Kept<'_> {
        Kept(self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `work(part)` once for every part in `0..parts`, in any order and on any thread.
    pub fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        self.run_with_scratch(parts, &|part, _| work(part));
    }

    /// As `run`, with the executing thread's scratch: `SCRATCH_FLOATS`, left as the last part had it.
    pub fn run_with_scratch(&self, parts: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        assert!(
            !IN_PART.get(),
            "a part of a pool's run started another run: run them in turn"
        );
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime changes; `close` below waits until nobody holds the pointer.
        let work = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize, &mut [f32]) + Sync + '_), *const Work>(work)
        };
        let job = Job { work };
        self.shared.deal(parts);
        let helpers = self.handles.len().min(parts.saturating_sub(1));
        if helpers > 0 {
            self.open(job, helpers);
        }
        self.shared.work(0, job);
        if helpers > 0 {
            self.shared.close();
        }
        let panic = self
            .shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            drop(_turn);
            resume_unwind(panic);
        }
    }

    fn open(&self, job: Job, helpers: usize) {
        // SAFETY: closed and nobody joined, so no worker reads the job now.
        unsafe { *self.shared.job.get() = Some(job) };
        let epoch = (self.shared.state.load(Ordering::Relaxed) >> EPOCH_SHIFT).wrapping_add(1);
        self.shared
            .state
            .store(epoch << EPOCH_SHIFT | OPEN, Ordering::SeqCst);
        for (sleeping, handle) in self.shared.sleeping.iter().zip(&self.handles).take(helpers) {
            if sleeping.swap(false, Ordering::SeqCst) {
                handle.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.handles.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a part, so it has none of its own to pass on.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_part_runs_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for parts in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                pool.run(parts, &|part| {
                    counts[part].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn runs_after_sleep_and_in_quick_succession() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            if round % 500 == 0 {
                thread::sleep(4 * SPIN);
            }
            pool.run(4, &|part| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 2000 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|part| assert_ne!(part, 5, "part five fails"));
        }));
        assert!(outcome.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(3, &|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 4 * 200 * 3);
    }
}
