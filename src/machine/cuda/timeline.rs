//! The order of one stream's operations in events: each operation ends with one, so that other streams
//! can wait for it on the device and the host can tell when it is done and how long it took.

use super::api::{Context, CudaError, Event, Stream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Operations in flight on one stream at most. Events are used round and round.
const EVENTS: u64 = 1024;

struct Mark {
    start: Event,
    end: Event,
    /// The operation began when its own start event says so; otherwise right after the one before.
    own_start: AtomicBool,
}

/// Events of one stream, by the operation's number (from 1).
pub struct Timeline {
    stream: Stream,
    marks: Vec<Mark>,
    done: Mutex<u64>,
    advanced: Condvar,
}

impl Timeline {
    pub fn new(context: &Arc<Context>) -> Result<Timeline, CudaError> {
        let mark = |_| {
            Ok(Mark {
                start: Event::new(context)?,
                end: Event::new(context)?,
                own_start: AtomicBool::new(true),
            })
        };
        Ok(Timeline {
            stream: Stream::new(context)?,
            marks: (0..EVENTS).map(mark).collect::<Result<_, CudaError>>()?,
            done: Mutex::new(0),
            advanced: Condvar::new(),
        })
    }

    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    fn mark(&self, number: u64) -> &Mark {
        &self.marks[(number % EVENTS) as usize]
    }

    fn done(&self) -> MutexGuard<'_, u64> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until operation `number` is known to be done.
    pub fn wait_done(&self, number: u64) {
        let mut done = self.done();
        while *done < number {
            done = self
                .advanced
                .wait(done)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What is queued on `stream` from now on comes after operation `number`, which has been queued here.
    /// False where that one is done, so that nothing has to be waited for.
    pub fn hold(&self, stream: &Stream, number: u64) -> Result<bool, CudaError> {
        // Under the lock, so that the event is not taken for a later operation meanwhile.
        let done = self.done();
        if *done >= number {
            return Ok(false);
        }
        stream.wait(&self.mark(number).end)?;
        Ok(true)
    }

    /// Before an operation's first call: its event must be free. `waits`: it was held for another stream.
    pub fn begin(&self, number: u64, waits: bool) -> Result<(), CudaError> {
        // One spare: the operation before the oldest one in flight marks where that one began.
        self.wait_done((number + 1).saturating_sub(EVENTS));
        let idle = *self.done() + 1 >= number;
        let mark = self.mark(number);
        mark.own_start.store(waits || idle, Ordering::Release);
        if waits || idle {
            mark.start.record(&self.stream)?;
        }
        Ok(())
    }

    /// After an operation's last call.
    pub fn end(&self, number: u64) -> Result<(), CudaError> {
        self.mark(number).end.record(&self.stream)
    }

    /// Sleeps until operation `number` is done; its seconds on the device. Called in order.
    pub fn complete(&self, number: u64) -> Result<f64, CudaError> {
        let mark = self.mark(number);
        mark.end.synchronise()?;
        let seconds = match mark.own_start.load(Ordering::Acquire) {
            true => mark.end.seconds_since(&mark.start)?,
            false => mark.end.seconds_since(&self.mark(number - 1).end)?,
        };
        self.pass(number);
        Ok(seconds)
    }

    /// Operation `number` is over, whether done or given up.
    pub fn pass(&self, number: u64) {
        *self.done() = number;
        self.advanced.notify_all();
    }
}
