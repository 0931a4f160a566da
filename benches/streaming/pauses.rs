//! Calls to a disk that come one right after the other, and calls with pauses between them, as a job's lanes make
//! them: who carries them out has gone to sleep meanwhile, and so have the cores, or they compute.

use super::queue::filled;
use super::{Options, median};
use loadmaster::cost::requests::READ_THREADS;
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::disk::{DiskFile, IoPool, IoRequest};
use loadmaster::machine::threaded::WRITE_THREADS;
use std::time::{Duration, Instant};

const CALLS: [(u64, u64); 7] = [
    (1, 4096),
    (4, 4096),
    (8, 4096),
    (16, 4096),
    (1, 65536),
    (12, 118784),
    (1, 1 << 20),
];
const PAUSES_US: [u64; 4] = [0, 100, 500, 3000];
const REPEATS: u64 = 100;
/// Between the requests of a call, as between sequences.
const APART_BYTES: u64 = 1 << 20;

pub fn run(options: &Options) {
    let file = filled(&options.home());
    let pools = [READ_THREADS, WRITE_THREADS].map(|n| IoPool::new(n).expect("threads start"));
    println!(
        "{:>20} {:>14}  us a call after pauses of {PAUSES_US:?} us",
        "", "call"
    );
    for (way, pool) in ["reads", "overwrites"].into_iter().zip(&pools) {
        for call in CALLS {
            let times = PAUSES_US.map(|pause_us| {
                let pause = Duration::from_micros(pause_us);
                let one = |_| call_us((&file, pool), (call, way != "reads"), pause);
                median((0..options.rounds()).map(one).collect())
            });
            let name = format!("{} x {} KiB", call.0, call.1 >> 10);
            println!("{way:>20} {name:>14}  {times:7.0?}");
        }
    }
}

fn call_us(
    (file, pool): (&DiskFile, &IoPool),
    ((count, each), write): ((u64, u64), bool),
    pause: Duration,
) -> f64 {
    let mut memory = AlignedBuffer::new(count * each).expect("memory");
    let mut all = Vec::new();
    for repeat in 0..REPEATS {
        let begin = repeat * 127 % 512 * APART_BYTES;
        let parts = memory.chunks_mut(each as usize).enumerate();
        let request = |(n, part): (usize, _)| {
            let at = begin + n as u64 * APART_BYTES;
            match write {
                false => IoRequest::read(file, at, part),
                true => IoRequest::write(file, at, part),
            }
        };
        let mut requests = parts.map(request).collect::<Vec<_>>();
        std::thread::sleep(pause);
        let begin = Instant::now();
        pool.run(&mut requests).expect("the disk works");
        all.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    median(all)
}
