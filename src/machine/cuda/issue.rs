//! A lane of the GPU: one thread queues operations on the lane's stream behind those of the other
//! streams that they need, another sees them end. What an operation does is the lane's `Work`.

use super::api::Context;
use super::gpu_error;
use super::timeline::Timeline;
use crate::machine::lanes::{Completer, Issuer, Worker};
use crate::machine::ops::Op;
use crate::machine::{Fences, MachineError};
use crate::tier::{Lane, PerLane};
use std::sync::Arc;

/// Queues one operation's calls on the lane's stream.
pub trait Work: Send {
    /// What the next operation comes after, on the device's lanes, which its stream waits for: of use to who touches
    /// memory on the host's thread.
    fn comes_after(&mut self, _: &Fences) {}

    fn queue(&mut self, number: u64, op: Op) -> Result<(), MachineError>;
}

/// The streams of one GPU.
pub type Timelines = PerLane<Option<Arc<Timeline>>>;

/// The lanes that are streams.
pub const GPU_LANES: [Lane; 3] = [Lane::CpuToGpu, Lane::GpuToCpu, Lane::GpuCompute];

struct StreamIssuer<W> {
    context: Arc<Context>,
    lane: Lane,
    timelines: Timelines,
    work: W,
    is_current: bool,
}

struct StreamCompleter {
    context: Arc<Context>,
    timeline: Arc<Timeline>,
    is_current: bool,
}

/// Both halves of a lane.
pub fn worker<W: Work + 'static>(
    context: &Arc<Context>,
    lane: Lane,
    timelines: &Timelines,
    work: W,
) -> Worker {
    let timeline = of(timelines, lane).clone();
    let issuer = StreamIssuer {
        context: context.clone(),
        lane,
        timelines: timelines.clone(),
        work,
        is_current: false,
    };
    let completer = StreamCompleter {
        context: context.clone(),
        timeline,
        is_current: false,
    };
    Worker::OnDevice(Box::new(issuer), Box::new(completer))
}

fn of(timelines: &Timelines, lane: Lane) -> &Arc<Timeline> {
    let timeline = timelines[lane].as_ref();
    timeline.expect("every lane of the GPU has a stream")
}

impl<W: Work> Issuer for StreamIssuer<W> {
    fn issue(&mut self, number: u64, op: Op, after: &Fences) -> Result<(), MachineError> {
        if !self.is_current {
            self.context.use_here().map_err(gpu_error)?;
            self.is_current = true;
        }
        let own = of(&self.timelines, self.lane);
        let mut waits = false;
        for lane in GPU_LANES {
            let mark = after.mark(lane);
            if lane != self.lane && mark > 0 {
                let other = of(&self.timelines, lane);
                waits |= other.hold(own.stream(), mark).map_err(gpu_error)?;
            }
        }
        own.begin(number, waits).map_err(gpu_error)?;
        let own = own.clone();
        self.work.comes_after(after);
        self.work.queue(number, op)?;
        own.end(number).map_err(gpu_error)
    }
}

impl Completer for StreamCompleter {
    fn complete(&mut self, number: u64) -> Result<f64, MachineError> {
        if !self.is_current {
            self.context.use_here().map_err(gpu_error)?;
            self.is_current = true;
        }
        self.timeline.complete(number).map_err(gpu_error)
    }

    fn skip(&mut self, number: u64) {
        self.timeline.pass(number);
    }
}
