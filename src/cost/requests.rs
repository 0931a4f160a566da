//! Seconds of disk requests by their size and by how many are handed over in one call, from a profile's
//! measured calls. What shares the disk meanwhile is rates.rs's business.

use crate::cost::curves::rising;
use crate::profile::DiskPoint;
use crate::units::{MIB, PAGE_BYTES, round_up};
use std::collections::BTreeMap;

/// Threads that keep the disk busy with reads. One nearly does; four also cover many small extents.
pub const READ_THREADS: usize = 4;
/// Pieces of a call are no larger …
pub const LARGEST_PIECE_BYTES: u64 = 4 * MIB;
/// … and no smaller where a request has as much: below this, a disk's rate falls with the size of a request.
pub const SMALLEST_PIECE_BYTES: u64 = MIB;
/// Pieces that a thread has of one call, where the call is large enough.
const PIECES_A_THREAD: u64 = 4;

/// Bytes of the pieces that `threads` cut a call into. Every thread gets several even of a small one, so that all
/// end at about the same time.
pub fn piece_bytes(call_bytes: u64, threads: usize, largest_bytes: u64) -> u64 {
    let share = call_bytes.div_ceil(PIECES_A_THREAD * threads as u64);
    round_up(share, PAGE_BYTES).clamp(SMALLEST_PIECE_BYTES, largest_bytes)
}

/// The part of a call's bytes that its reads have in flight together, where it asks for them in requests of so many.
pub fn in_flight_part((bytes, request_bytes): (f64, f64)) -> f64 {
    let piece = piece_bytes(bytes as u64, READ_THREADS, LARGEST_PIECE_BYTES) as f64;
    let together = READ_THREADS as f64 * piece.min(request_bytes);
    (together / bytes.max(1.0)).min(1.0)
}

/// Calls with requests of one size.
#[derive(Clone, Debug)]
struct OneSize {
    request_bytes: f64,
    /// (requests in a call, seconds of the call), rising in both.
    calls: Vec<(f64, f64)>,
}

impl OneSize {
    /// Seconds of a call with `count` requests: linear between measured counts, in proportion outside of them.
    fn seconds(&self, count: f64) -> f64 {
        let (first, last) = (self.calls[0], self.calls[self.calls.len() - 1]);
        if count <= first.0 {
            return first.1 * count / first.0;
        }
        if count >= last.0 {
            return last.1 * count / last.0;
        }
        let above = self.calls.partition_point(|call| call.0 < count);
        between(self.calls[above - 1], self.calls[above], count)
    }
}

/// One direction of a disk.
#[derive(Clone, Debug)]
pub struct DiskRequests {
    latency_s: f64,
    /// Rising sizes.
    sizes: Vec<OneSize>,
}

impl DiskRequests {
    /// `latency_s` is the least that any call takes.
    pub fn new(latency_s: f64, points: &[DiskPoint]) -> Self {
        let mut sizes = BTreeMap::<u64, BTreeMap<usize, f64>>::new();
        for &(block, depth, rate, _) in points {
            let (block, depth) = (block.max(1), depth.max(1));
            let seconds = f64::from(depth) * block as f64 / rate;
            sizes
                .entry(block)
                .or_default()
                .insert(depth as usize, seconds);
        }
        // More requests take no less.
        let size = |(block, calls): (u64, BTreeMap<usize, f64>)| OneSize {
            request_bytes: block as f64,
            calls: rising(calls),
        };
        DiskRequests {
            latency_s,
            sizes: sizes.into_iter().map(size).collect(),
        }
    }

    /// Seconds of one call that moves `bytes` in requests of `request_bytes`: between two measured sizes a
    /// request takes what it has to begin and what its bytes have; below the smallest it takes as long as
    /// that, above the largest the rate is the same. What was not measured costs nothing.
    pub fn seconds(&self, bytes: f64, request_bytes: f64) -> f64 {
        let (Some(first), Some(last)) = (self.sizes.first(), self.sizes.last()) else {
            return 0.0;
        };
        if bytes <= 0.0 {
            return 0.0;
        }
        let each = request_bytes.clamp(1.0, bytes);
        let count = bytes / each;
        let seconds = if each <= first.request_bytes {
            first.seconds(count)
        } else if each >= last.request_bytes {
            last.seconds(count) * each / last.request_bytes
        } else {
            let above = self.sizes.partition_point(|s| s.request_bytes < each);
            let at = |size: &OneSize| (size.request_bytes, size.seconds(count));
            between(at(&self.sizes[above - 1]), at(&self.sizes[above]), each)
        };
        seconds.max(self.latency_s)
    }
}

fn between(a: (f64, f64), b: (f64, f64), x: f64) -> f64 {
    a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page takes 50 µs, four at once 80, sixteen 200; a mebibyte 300 µs.
    fn requests() -> DiskRequests {
        let rate = |block: f64, count: f64, us: f64| count * block / (us * 1e-6);
        let point = |block: u64, count: u32, us: f64| {
            (block, count, rate(block as f64, count.into(), us), 0.0)
        };
        let points = [
            point(4096, 1, 50.0),
            point(4096, 4, 80.0),
            point(4096, 16, 200.0),
            point(1 << 20, 1, 300.0),
        ];
        DiskRequests::new(40e-6, &points)
    }

    fn us(count: f64, each: f64) -> f64 {
        requests().seconds(count * each, each) * 1e6
    }

    #[test]
    fn requests_of_one_call_run_beside_each_other() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
        close(us(1.0, 4096.0), 50.0);
        close(us(4.0, 4096.0), 80.0);
        close(us(2.5, 4096.0), 65.0);
        close(us(160.0, 4096.0), 2000.0);
        close(us(3.0, (1 << 20) as f64), 900.0);
        close(us(1.0, (1 << 22) as f64), 1200.0);
    }

    #[test]
    fn between_sizes_a_request_has_a_beginning_and_bytes() {
        let middle = (4096.0 + (1 << 20) as f64) / 2.0;
        assert!((us(1.0, middle) - 175.0).abs() < 1e-6);
    }

    #[test]
    fn a_small_request_takes_as_long_as_a_page_and_no_call_less_than_the_latency() {
        assert!((us(1.0, 100.0) - 50.0).abs() < 1e-6);
        let fast = DiskRequests::new(40e-6, &[(4096, 1, 4e9, 0.0)]);
        assert_eq!(fast.seconds(4096.0, 4096.0), 40e-6);
        assert_eq!(fast.seconds(0.0, 4096.0), 0.0);
    }
}
