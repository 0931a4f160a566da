//! One queue for a disk's reads and writes: a write waits for what reads have in flight before it, and takes its
//! own part of the disk's time from them. What others lose beside a disk is contention.rs's business.

use crate::cost::load::{Load, mixed};
use crate::cost::requests::DiskRequests;
use crate::profile::{LARGE_REQUEST_BYTES, SMALL_REQUEST_BYTES, SMALL_REQUESTS};
use crate::tier::Lane;

/// What reads and writes were measured to keep of their rates beside each other, [reads are small][writes are
/// small]; None where nobody measured it.
pub type Measured = [[Option<[f64; 2]>; 2]; 2];

/// The probe's calls: their bytes, and those of their requests.
const PROBED: [(f64, f64); 2] = [
    (LARGE_REQUEST_BYTES, LARGE_REQUEST_BYTES),
    (
        SMALL_REQUESTS as f64 * SMALL_REQUEST_BYTES,
        SMALL_REQUEST_BYTES,
    ),
];

/// A kind of reads beside a kind of writes.
#[derive(Clone, Copy, Debug)]
struct Wait {
    /// What a write waits for: a part of what the disk takes for the reads in flight.
    for_reads: f64,
    /// What it takes from reads: a part of the time that it is written in.
    of_reads: f64,
}

/// Between large and small requests linear in their smallness.
#[derive(Clone, Debug)]
pub struct Queue {
    /// [reads are small][writes are small]
    waits: [[Wait; 2]; 2],
}

impl Queue {
    /// From what reads and writes, made as the probe makes them, kept of their rates beside each other. What was
    /// not measured of small requests is as of large ones.
    pub fn new(measured: Measured, [reads, writes]: [&DiskRequests; 2]) -> Queue {
        let load = |lane: Lane, of: &DiskRequests, small: usize| {
            let (bytes, each) = PROBED[small];
            Load::of_disk(lane, of.seconds(bytes, each), (bytes, each))
        };
        let wait = |read: usize, write: usize| {
            let kept = measured[read][write]?;
            let read_s = load(Lane::DiskToCpu, reads, read).flight_s;
            let write_s = load(Lane::CpuToDisk, writes, write).flight_s;
            let kept = kept.map(|part| part.max(0.01));
            Some(Wait {
                for_reads: (1.0 / kept[1] - 1.0) * write_s / read_s.max(1e-9),
                of_reads: (1.0 - kept[0]) / kept[1],
            })
        };
        let large = wait(0, 0).unwrap_or(Wait {
            for_reads: 1.0,
            of_reads: 1.0,
        });
        let waits = [0, 1].map(|read| [0, 1].map(|write| wait(read, write).unwrap_or(large)));
        Queue { waits }
    }

    /// What reads and what writes keep of their rates beside each other.
    pub fn kept(&self, read: Load, write: Load) -> [f64; 2] {
        let [large, small] = &self.waits;
        let of = |figure: fn(&Wait) -> f64| {
            let row = |[a, b]: &[Wait; 2]| mixed(figure(a), figure(b), write.hard);
            mixed(row(large), row(small), read.hard)
        };
        let waits_s = of(|wait| wait.for_reads) * read.flight_s;
        let written = match write.flight_s + waits_s {
            none if none <= 0.0 => 1.0,
            all_s => (write.flight_s / all_s).max(0.01),
        };
        let read = 1.0 - of(|wait| wait.of_reads) * written;
        [read.max(0.01), written]
    }
}
