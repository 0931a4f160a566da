//! A lane at work, as those beside it feel it. What they lose by it is contention.rs's and queue.rs's business.

use crate::cost::requests::in_flight_part;
use crate::profile::{LARGE_REQUEST_BYTES, SMALL_REQUEST_BYTES};
use crate::tier::Lane;

/// A lane at work, as others beside it feel it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// 0 to 1: of a disk lane the smallness of its requests, of the CPU's computing the part of its time that
    /// memory is at work.
    pub hard: f64,
    /// Of a disk lane: what the disk takes for the requests that one call has in flight together.
    pub flight_s: f64,
}

impl Load {
    /// Of the CPU's computing.
    pub fn computing(memory_part: f64) -> Load {
        Load {
            hard: memory_part,
            flight_s: 0.0,
        }
    }

    /// Of a disk's lane in a call of so many seconds that moves `bytes` in requests of so many. Reads are in
    /// flight as far as there are threads; writes have more threads: all of a call.
    pub fn of_disk(lane: Lane, call_s: f64, (bytes, request_bytes): (f64, f64)) -> Load {
        let part = match lane {
            Lane::DiskToCpu => in_flight_part((bytes, request_bytes)),
            _ => 1.0,
        };
        Load {
            hard: smallness(request_bytes),
            flight_s: call_s * part,
        }
    }
}

/// How small requests of so many bytes are: 0 as large as [contention]'s large ones or larger, 1 as its small
/// ones or smaller.
fn smallness(request_bytes: f64) -> f64 {
    let span = (LARGE_REQUEST_BYTES / SMALL_REQUEST_BYTES).ln();
    ((LARGE_REQUEST_BYTES / request_bytes.max(1.0)).ln() / span).clamp(0.0, 1.0)
}

/// Linear between two kinds.
pub(super) fn mixed(a: f64, b: f64, part: f64) -> f64 {
    a * (1.0 - part) + b * part
}
