//! One worker thread a lane, FIFO, with fences as counters of finished operations. Knows order and
//! time only; what an operation does is its executor's. A lane of a device has a second thread: one
//! hands its operations over, as far ahead as their order allows, the other sees them finish.

use super::ops::Op;
use super::spare::Cores;
use super::{Fence, Fences, MachineError, os};
use crate::cost::figures::LaneFigures;
use crate::tier::{Lane, PerLane, Phase};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, Thread};
use std::time::Instant;

/// Carries out one lane's operations, one at a time.
pub trait Executor: Send {
    fn run(&mut self, op: Op) -> Result<(), MachineError>;

    /// Said once, on the thread that will run its operations.
    fn begin(&mut self) {}

    /// Cores that an operation keeps busy from beginning to end; 0 where it waits for something else.
    fn cores(&self) -> usize {
        0
    }
}

/// Queues one lane's operations on a device, which carries them out in order by itself.
pub trait Issuer: Send {
    /// Hands operation `number` over. It comes after the operations of `after` on the same device's lanes,
    /// which have been handed over already; everything else that it needs is done.
    fn issue(&mut self, number: u64, op: Op, after: &Fences) -> Result<(), MachineError>;
}

/// Sees a lane's operations finish, in order.
pub trait Completer: Send {
    /// Sleeps until operation `number` is done; its seconds on the device.
    fn complete(&mut self, number: u64) -> Result<f64, MachineError>;
    /// Operation `number` was given up: a failure came first.
    fn skip(&mut self, number: u64);
}

/// Who works on a lane.
pub enum Worker {
    Here(Box<dyn Executor>),
    OnDevice(Box<dyn Issuer>, Box<dyn Completer>),
}

struct Task {
    op: Op,
    after: Fences,
    phase: Phase,
    work_s: f64,
}

#[derive(Default)]
struct Queue {
    tasks: Mutex<(VecDeque<Task>, bool)>,
    filled: Condvar,
    length: AtomicU64,
    /// The worker sleeps: set and cleared under the lock.
    idle: AtomicBool,
}

/// Finished counts of all lanes, and the first failure.
struct Board {
    cores: Cores,
    finished: PerLane<AtomicU64>,
    /// Operations that a device's lane has handed over.
    issued: PerLane<AtomicU64>,
    /// Who sleeps, and what for. Only those are woken that have got it: with few cores, a thread that wakes in
    /// vain takes time from the one that computes.
    sleepers: Mutex<Vec<(Need, Thread)>>,
    sleeping: AtomicUsize,
    failed: AtomicBool,
    failure: Mutex<Option<MachineError>>,
    log: Mutex<PerLane<LaneFigures>>,
}

/// What a waiter waits for.
#[derive(Clone, Copy, Default, PartialEq)]
struct Need {
    finished: Fences,
    issued: Fences,
}

impl Need {
    fn finished(fences: &Fences) -> Need {
        Need {
            finished: *fences,
            issued: Fences::none(),
        }
    }

    /// For a lane of a device: the device's lanes need only have handed over what comes before.
    fn on_device(fences: &Fences, lanes: &[Lane]) -> Need {
        let mut need = Need::default();
        for lane in Lane::ALL {
            let fence = Fence {
                lane,
                number: fences.mark(lane),
            };
            match lanes.contains(&lane) {
                true => need.issued.add(fence),
                false => need.finished.add(fence),
            }
        }
        need
    }
}

impl Board {
    fn new(cores: Cores) -> Board {
        Board {
            cores,
            finished: PerLane::default(),
            issued: PerLane::default(),
            sleepers: Mutex::default(),
            sleeping: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
            log: Mutex::default(),
        }
    }

    fn reached(&self, need: &Need) -> bool {
        let at_least = |counts: &PerLane<AtomicU64>, fences: &Fences| {
            let done = |&lane: &Lane| counts[lane].load(Ordering::SeqCst) >= fences.mark(lane);
            Lane::ALL.iter().all(done)
        };
        at_least(&self.finished, &need.finished) && at_least(&self.issued, &need.issued)
    }

    /// Looks a little, then sleeps until what is needed is there.
    fn wait(&self, fences: &Need) {
        if self.cores.look_for(|| self.reached(fences)) {
            return;
        }
        let me = std::thread::current();
        lock(&self.sleepers).push((*fences, me.clone()));
        // Said before looking once more, so that a lane which finishes now sees a sleeper.
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while !self.reached(fences) {
            std::thread::park();
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
        lock(&self.sleepers).retain(|(_, other)| other.id() != me.id());
    }

    fn finish(&self, lane: Lane, number: u64) {
        self.advance(&self.finished[lane], number);
    }

    fn advance(&self, count: &AtomicU64, number: u64) {
        count.store(number, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            let sleepers = lock(&self.sleepers);
            let ready = sleepers.iter().filter(|(need, _)| self.reached(need));
            ready.for_each(|(_, thread)| thread.unpark());
        }
    }

    fn fail(&self, error: MachineError) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }
}

/// A panic elsewhere must not hide the first error, so a poisoned lock is used as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The lanes of one machine.
pub struct Lanes {
    board: Arc<Board>,
    queues: PerLane<Option<Arc<Queue>>>,
    submitted: PerLane<u64>,
    workers: Vec<JoinHandle<()>>,
    phase: Phase,
    opened: Instant,
}

impl Lanes {
    /// Starts the threads of each lane that has somebody to work on it.
    pub fn start(lanes: Vec<(Lane, Worker)>) -> std::io::Result<Self> {
        let board = Arc::new(Board::new(Cores::here()));
        let mut queues = PerLane::<Option<Arc<Queue>>>::default();
        let mut workers = Vec::new();
        let on_device = |(lane, worker): &(Lane, Worker)| {
            matches!(worker, Worker::OnDevice(..)).then_some(*lane)
        };
        let device: Arc<[Lane]> = lanes.iter().filter_map(on_device).collect();
        for (lane, worker) in lanes {
            let queue = Arc::new(Queue::default());
            queues[lane] = Some(queue.clone());
            let (board, device) = (board.clone(), device.clone());
            let start = |name: &str| std::thread::Builder::new().name(name.into());
            match worker {
                Worker::Here(executor) => workers
                    .push(start(lane.name()).spawn(move || work(lane, executor, &queue, &board))?),
                Worker::OnDevice(issuer, completer) => {
                    let (given, finishing) = channel();
                    let there = board.clone();
                    workers.push(start(lane.name()).spawn(move || {
                        hand_over(lane, (issuer, &device), &queue, (&board, given));
                    })?);
                    let name = format!("{} ends", lane.name());
                    workers.push(
                        start(&name).spawn(move || see_end(lane, completer, finishing, &there))?,
                    );
                }
            }
        }
        let (phase, opened) = (Phase::Prefill, Instant::now());
        Ok(Lanes {
            board,
            queues,
            submitted: PerLane::default(),
            workers,
            phase,
            opened,
        })
    }

    pub fn submit(&mut self, lane: Lane, op: Op, after: &Fences, work_s: f64) -> Fence {
        self.submitted[lane] += 1;
        let fence = Fence {
            lane,
            number: self.submitted[lane],
        };
        let Some(queue) = &self.queues[lane] else {
            self.board
                .fail(MachineError::Unsupported(format!("lane {}", lane.name())));
            self.board.finish(lane, fence.number);
            return fence;
        };
        let task = Task {
            op,
            after: *after,
            phase: self.phase,
            work_s,
        };
        let idle = {
            let mut tasks = lock(&queue.tasks);
            tasks.0.push_back(task);
            queue.idle.load(Ordering::Relaxed)
        };
        queue.length.fetch_add(1, Ordering::Release);
        if idle {
            queue.filled.notify_one();
        }
        fence
    }

    pub fn wait(&self, fences: &Fences) -> Result<(), MachineError> {
        self.board.wait(&Need::finished(fences));
        match &*lock(&self.board.failure) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    pub fn submitted(&self) -> Fences {
        let all = Lane::ALL.map(|lane| Fence {
            lane,
            number: self.submitted[lane],
        });
        all.into_iter().fold(Fences::none(), Fences::with)
    }

    pub fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    pub fn figures(&self) -> PerLane<LaneFigures> {
        *lock(&self.board.log)
    }

    pub fn forget_log(&mut self) {
        *lock(&self.board.log) = PerLane::default();
    }

    pub fn now_s(&self) -> f64 {
        self.opened.elapsed().as_secs_f64()
    }
}

impl Drop for Lanes {
    /// Lets the queues run dry (a failed machine skips what is left), then joins the workers.
    fn drop(&mut self) {
        for queue in Lane::ALL
            .iter()
            .filter_map(|&lane| self.queues[lane].as_ref())
        {
            lock(&queue.tasks).1 = true;
            queue.filled.notify_one();
        }
        self.workers
            .drain(..)
            .for_each(|worker| drop(worker.join()));
    }
}

fn work(lane: Lane, mut executor: Box<dyn Executor>, queue: &Queue, board: &Board) {
    // A lane that computes has its core for itself; the others are to be there as soon as they can go on.
    if !matches!(lane, Lane::CpuCompute | Lane::GpuCompute) {
        os::take_short_turns();
    }
    executor.begin();
    let mut number = 0;
    while let Some(task) = next(queue, board) {
        board.wait(&Need::finished(&task.after));
        if !board.failed.load(Ordering::Acquire) {
            run_one(lane, executor.as_mut(), task, board);
        }
        number += 1;
        board.finish(lane, number);
    }
}

/// The next task; None when the machine is being closed and the queue is empty.
fn next(queue: &Queue, board: &Board) -> Option<Task> {
    let filled = || queue.length.load(Ordering::Acquire) > 0;
    board.cores.look_for(filled);
    let mut tasks = lock(&queue.tasks);
    loop {
        if let Some(task) = tasks.0.pop_front() {
            queue.length.fetch_sub(1, Ordering::Release);
            return Some(task);
        }
        if tasks.1 {
            return None;
        }
        queue.idle.store(true, Ordering::Relaxed);
        tasks = queue
            .filled
            .wait(tasks)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        queue.idle.store(false, Ordering::Relaxed);
    }
}

/// What has been handed to a device.
struct InFlight {
    number: u64,
    phase: Phase,
    work_s: f64,
    bytes: u64,
    /// False when it was given up.
    queued: bool,
}

fn hand_over(
    lane: Lane,
    (mut issuer, device): (Box<dyn Issuer>, &[Lane]),
    queue: &Queue,
    (board, given): (&Board, Sender<InFlight>),
) {
    let mut number = 0;
    while let Some(task) = next(queue, board) {
        number += 1;
        let need = Need::on_device(&task.after, device);
        board.wait(&need);
        let (phase, work_s, bytes) = (task.phase, task.work_s, task.op.bytes());
        let issue = || issuer.issue(number, task.op, &need.issued);
        let queued = !board.failed.load(Ordering::Acquire) && guarded(lane, board, issue).is_some();
        board.advance(&board.issued[lane], number);
        let in_flight = InFlight {
            number,
            phase,
            work_s,
            bytes,
            queued,
        };
        // The other thread ends after this one.
        let _ = given.send(in_flight);
    }
}

fn see_end(
    lane: Lane,
    mut completer: Box<dyn Completer>,
    finishing: Receiver<InFlight>,
    board: &Board,
) {
    while let Ok(op) = finishing.recv() {
        let complete = || completer.complete(op.number);
        let busy_s = op.queued.then(|| guarded(lane, board, complete)).flatten();
        match busy_s {
            Some(busy_s) => note(
                &mut lock(&board.log)[lane],
                op.phase,
                (busy_s, op.work_s, op.bytes),
            ),
            None => completer.skip(op.number),
        }
        board.finish(lane, op.number);
    }
}

/// What `work` gives; None when it failed or panicked, which the board then knows.
fn guarded<T>(
    lane: Lane,
    board: &Board,
    work: impl FnOnce() -> Result<T, MachineError>,
) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => return Some(value),
        Ok(Err(error)) => board.fail(error),
        Err(panic) => board.fail(MachineError::Panic {
            lane: lane.name(),
            cause: message(&*panic),
        }),
    }
    None
}

fn run_one(lane: Lane, executor: &mut dyn Executor, task: Task, board: &Board) {
    let bytes = task.op.bytes();
    let _cores = board.cores.computing(executor.cores());
    let start = Instant::now();
    let done = guarded(lane, board, || executor.run(task.op));
    let busy_s = start.elapsed().as_secs_f64();
    if done.is_some() {
        note(
            &mut lock(&board.log)[lane],
            task.phase,
            (busy_s, task.work_s, bytes),
        );
    }
}

/// Adds one finished operation to its lane's figures.
pub fn note(figures: &mut LaneFigures, phase: Phase, (busy_s, work_s, bytes): (f64, f64, u64)) {
    match phase {
        Phase::Prefill => figures.prefill_s += busy_s,
        Phase::Decode => figures.decode_s += busy_s,
    }
    figures.work_s += work_s;
    figures.bytes += bytes;
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic".into())
}
