//! The rows of a segment without overlap: every task comes after the one before, so that tasks add up.

use crate::cost::affine::Affine;
use crate::cost::cycles::{Place, Way, sum};
use crate::cost::footprint::{CHUNK_ROWS_MAX, RUN_AHEAD_BYTES, STREAM_CHUNK_BYTES};
use crate::cost::terms::{Bound, Row, TermInput, Work};
use crate::cost::traffic::constant;
use crate::tier::Lane;

/// Lanes that wake where the CPU does something beside a GPU: the way down, the CPU, the way up, the GPU.
const WAKES_BESIDE: f64 = 4.0;
/// Products of a layer.
const PRODUCTS: f64 = 4.0;

/// Without overlap tasks follow each other, and only what one task sets going runs together. Weights come to the
/// compute device in a pipeline; a computation has the CPU's part and the GPU's at once.
pub fn serial_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    let moved = sum(&work.cache).plus(&sum(&work.hidden));
    let woken = constant(input.rates.handover_s * handovers(input, place, work));
    let mut rows = Vec::new();
    for way in Way::all(input, work) {
        for (number, stream) in streams(input, place, work).into_iter().enumerate() {
            let other = moved.plus(&way.whole()).plus(&woken);
            let bound = |more: u8| Bound::Serial(way.number + 4 * (2 * number as u8 + more));
            rows.push(Row {
                bound: bound(0),
                seconds: other.plus(&stream.ahead),
            });
            if !stream.beside_products.is_zero() {
                rows.push(Row {
                    bound: bound(1),
                    seconds: other
                        .minus(&way.products.scaled(1.0 - stream.last))
                        .plus(&stream.ahead)
                        .plus(&stream.beside_products),
                });
            }
        }
    }
    rows
}

/// How often a layer hands over without overlap, where it is known what is there: to each lane of each task.
fn handovers(input: &TermInput, place: &Place, work: &Work) -> f64 {
    let Some(at) = input.at.as_ref() else {
        return 0.0;
    };
    let task = |lanes: &[&Affine]| lanes.iter().filter(|l| l.at(at) > 0.0).count() as f64;
    let (cache, hidden) = (&work.cache, &work.hidden);
    let mut of_batch = task(&[&cache.disk_to_cpu, &cache.cpu_to_gpu])
        + task(&[&cache.cpu_to_disk, &cache.gpu_to_cpu])
        + task(&[&hidden.disk_to_cpu, &hidden.cpu_to_gpu])
        + task(&[&hidden.cpu_to_disk, &hidden.gpu_to_cpu])
        + task(&[&work.products, &work.side_products]);
    if work.beside.cpu_compute.at(at) > 0.0 {
        of_batch += WAKES_BESIDE;
    }
    if work.side_products.at(at) > 0.0 {
        of_batch += PRODUCTS * WAKES_BESIDE;
    }
    let weights = task(&[&work.streams.disk_to_cpu, &work.streams.cpu_to_gpu]);
    place.batches() * of_batch + tasks(input, place) * weights
}

/// One lane of the weights' way without overlap.
struct Stream {
    /// What is waited for by itself.
    ahead: Affine,
    /// What is set going by the products that need it.
    beside_products: Affine,
    /// The part of the products that the last piece has.
    last: f64,
}

fn streams(input: &TermInput, place: &Place, work: &Work) -> Vec<Stream> {
    let lanes = [Lane::DiskToCpu, Lane::CpuToGpu];
    let whole = |lane: Lane| work.streams[lane];
    let ahead = part_ahead(input, place);
    // The first piece of what comes at once has gone one lane before it is on the next.
    let first = (tasks(input, place) / place.streamed_pieces).min(1.0);
    let last = (1.0 / place.streamed_pieces).min(1.0);
    let one = |(lane, other): (Lane, Lane)| {
        let seconds = whole(lane).plus(&whole(other).scaled(first));
        Stream {
            ahead: seconds.scaled(ahead),
            beside_products: seconds.scaled(1.0 - ahead),
            last,
        }
    };
    vec![one((lanes[0], lanes[1])), one((lanes[1], lanes[0]))]
}

/// The part of a layer's streamed weights that the ring takes before their products are asked for. Where
/// several products meet them, all of it is waited for: nothing is let go until the last one.
fn part_ahead(input: &TermInput, place: &Place) -> f64 {
    let bytes = place.streamed_bytes;
    let rows = input.policy.gpu_batch_size as f64 * input.moments.prompt;
    if input.policy.num_gpu_batches > 1 || rows > CHUNK_ROWS_MAX as f64 || bytes <= 0.0 {
        return 1.0;
    }
    // Pieces do not divide the ring evenly: on average half of one stays free.
    let ring = bytes.min(RUN_AHEAD_BYTES as f64) + 1.5 * bytes.min(STREAM_CHUNK_BYTES as f64);
    (ring / bytes).min(1.0)
}

/// The tasks in which one layer's streamed weights come. Once the ring is full, the rest waits for the layer's last
/// product and comes at once; a double buffer has room for all.
fn tasks(input: &TermInput, place: &Place) -> f64 {
    let ahead = (RUN_AHEAD_BYTES + STREAM_CHUNK_BYTES) as f64;
    let part = match input.policy.double_buffer {
        true => 1.0,
        false => (ahead / place.streamed_bytes.max(1.0)).min(1.0),
    };
    (place.batches() * part).max(1.0).min(place.streamed_pieces)
}
