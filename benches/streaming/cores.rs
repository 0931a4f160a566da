//! How long two cores take to hand each other a cache line, and what DRAM gives both and both can multiply at that
//! time: a shared machine's host moves its guests' cores, and those of one chiplet share its link to memory.

use crate::Options;
use loadmaster::dtype::Arithmetic;
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::cpu::kernels::{Isa, memory_read_sum, multiply_peak};
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::machine::os::{bind_current_thread, core_of_each};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const MEMORY_BYTES: u64 = 768 << 20;
const TURNS: usize = 20_000;
const PAUSE: Duration = Duration::from_secs(1);

/// One moment.
struct Sample {
    hand_over_ns: f64,
    dram_gb_per_s: f64,
    gflop_per_s: f64,
}

pub fn run(options: &Options) {
    let cores = core_of_each(2);
    assert!(cores.len() > 1, "two cores are needed");
    let pool = Pool::new(2);
    let mut memory = AlignedBuffer::new(MEMORY_BYTES).expect("memory");
    memory.fill(1);
    println!("hand-over ns, DRAM read GB/s, FMA GFLOP/s");
    for _ in 0..options.rounds() {
        let s = sample(&pool, &memory, [&cores[0], &cores[1]]);
        println!(
            "{:4.0} {:6.1} {:6.0}",
            s.hand_over_ns, s.dram_gb_per_s, s.gflop_per_s
        );
        std::thread::sleep(PAUSE);
    }
}

fn sample(pool: &Pool, memory: &AlignedBuffer, cores: [&[usize]; 2]) -> Sample {
    let isa = Isa::detect();
    // Hosts let cores that have slept begin late.
    std::hint::black_box(memory_read_sum(pool, isa, memory));
    let hand_over_ns = hand_over_ns(cores);
    let begin = Instant::now();
    std::hint::black_box(memory_read_sum(pool, isa, memory));
    let dram_gb_per_s = memory.len() as f64 / begin.elapsed().as_secs_f64() / 1e9;
    let begin = Instant::now();
    let flop = multiply_peak(pool, isa, Arithmetic::Fp32, 1_000_000);
    Sample {
        hand_over_ns,
        dram_gb_per_s,
        gflop_per_s: flop / begin.elapsed().as_secs_f64() / 1e9,
    }
}

/// A word goes to and fro between two threads, each bound to its core.
fn hand_over_ns([first, second]: [&[usize]; 2]) -> f64 {
    let turn = AtomicUsize::new(0);
    let play = |core: &[usize], mine: usize| {
        bind_current_thread(core);
        let begin = Instant::now();
        for _ in 0..TURNS {
            while turn.load(Ordering::Acquire) != mine {
                std::hint::spin_loop();
            }
            turn.store(1 - mine, Ordering::Release);
        }
        begin.elapsed().as_secs_f64()
    };
    std::thread::scope(|scope| {
        let there = scope.spawn(|| play(second, 1));
        let here_s = scope.spawn(|| play(first, 0)).join().expect("a player");
        there.join().expect("a player");
        1e9 * here_s / (2 * TURNS) as f64
    })
}
