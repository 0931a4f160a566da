//! A few writes beside a stream of reads on one disk: what they take alone, beside the reads, and how much of the
//! difference is what the reads have in flight. Both go through the pools that the lanes use.

use super::{Options, median};
use loadmaster::cost::requests::{READ_THREADS, in_flight_part};
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::disk::{DiskFile, IoPool, IoRequest};
use loadmaster::machine::threaded::WRITE_THREADS;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const FILE_BYTES: u64 = 1 << 30;
const WINDOW: Duration = Duration::from_millis(300);

/// A call: so many requests of so many bytes.
type Call = (u64, u64);

const READS: [Call; 7] = [
    (4, 4096),
    (1, 65536),
    (4, 65536),
    (1, 1 << 20),
    (4, 1 << 20),
    (1, 16 << 20),
    (1, 64 << 20),
];
const WRITES: [Call; 5] = [(1, 4096), (4, 4096), (16, 4096), (4, 65536), (1, 1 << 20)];

pub fn run(options: &Options) {
    let file = filled(&options.home());
    let pools = [READ_THREADS, WRITE_THREADS].map(|n| IoPool::new(n).expect("threads start"));
    println!(
        "{:>14} {:>14} {:>10} {:>10} {:>10} {:>6} {:>10}",
        "reads", "writes", "alone", "beside", "in flight", "part", "reads keep"
    );
    for read in READS {
        for write in WRITES {
            let mut rounds: [Vec<f64>; 4] = Default::default();
            for _ in 0..options.rounds() {
                let (read_s, _) = window(&file, &pools, [Some(read), None]);
                let (_, alone_s) = window(&file, &pools, [None, Some(write)]);
                let (slow_s, beside_s) = window(&file, &pools, [Some(read), Some(write)]);
                let figures = [read_s, alone_s, beside_s, read_s / slow_s];
                rounds
                    .iter_mut()
                    .zip(figures)
                    .for_each(|(all, f)| all.push(f));
            }
            let [read_s, alone_s, beside_s, keep] = rounds.map(median);
            show((read, write), [read_s, alone_s, beside_s, keep]);
        }
    }
}

fn show((read, write): (Call, Call), [read_s, alone_s, beside_s, keep]: [f64; 4]) {
    let name = |(count, bytes): Call| format!("{count} x {} KiB", bytes >> 10);
    let bytes = ((read.0 * read.1) as f64, read.1 as f64);
    let flight_s = read_s * in_flight_part(bytes);
    println!(
        "{:>14} {:>14} {:>7.0} us {:>7.0} us {:>7.0} us {:>6.2} {:>10.2}",
        name(read),
        name(write),
        alone_s * 1e6,
        beside_s * 1e6,
        flight_s * 1e6,
        (beside_s - alone_s) / flight_s,
        keep
    );
}

/// A file of 1 GiB, every byte of it written.
pub fn filled(dir: &std::path::Path) -> DiskFile {
    let file = DiskFile::create_unlinked(dir, FILE_BYTES).expect("room for 1 GiB");
    let mut block = AlignedBuffer::new(16 << 20).expect("memory");
    block.fill(7);
    for offset in (0..FILE_BYTES).step_by(block.len()) {
        file.write_at(&block, offset).expect("the disk works");
    }
    file.sync().expect("it is written");
    file
}

/// Seconds of a call of reads and of a call of writes, each again and again for as long as the window.
fn window(file: &DiskFile, pools: &[IoPool; 2], [read, write]: [Option<Call>; 2]) -> (f64, f64) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let calls = |pool, call: Option<Call>, write| {
            let over = &over;
            scope.spawn(move || call.map_or(0.0, |call| seconds(file, pool, (call, write), over)))
        };
        let (reads, writes) = (calls(&pools[0], read, false), calls(&pools[1], write, true));
        std::thread::sleep(WINDOW);
        over.store(true, Ordering::Relaxed);
        let joined = [reads, writes].map(|t| t.join().expect("no call fails"));
        (joined[0], joined[1])
    })
}

/// The mean of all calls until it is over; reads go through the file's first half, writes through its second.
fn seconds(file: &DiskFile, pool: &IoPool, (call, write): (Call, bool), over: &AtomicBool) -> f64 {
    static PLACE: AtomicU64 = AtomicU64::new(0);
    let (count, each) = call;
    let half = FILE_BYTES / 2;
    let mut memory = AlignedBuffer::new(count * each).expect("memory");
    let (begin, mut done) = (Instant::now(), 0);
    while done == 0 || !over.load(Ordering::Relaxed) {
        let place = PLACE.fetch_add(count * each, Ordering::Relaxed) % (half - count * each);
        let begin = u64::from(write) * half + place / 4096 * 4096;
        let parts = memory.chunks_mut(each as usize).enumerate();
        let request = |(n, part): (usize, _)| match write {
            false => IoRequest::read(file, begin + n as u64 * each, part),
            true => IoRequest::write(file, begin + n as u64 * each, part),
        };
        let mut requests = parts.map(request).collect::<Vec<_>>();
        pool.run(&mut requests).expect("the disk works");
        done += 1;
    }
    begin.elapsed().as_secs_f64() / f64::from(done)
}
