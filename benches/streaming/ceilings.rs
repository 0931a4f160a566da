//! What the machine itself gives: the peaks of each arithmetic, DRAM reads, direct reads and writes of a file. Measured
//! between the rows of a table, so that ceilings and figures share the same hour.

use loadmaster::cost::requests::READ_THREADS;
use loadmaster::dtype::Arithmetic;
use loadmaster::machine::arena::AlignedBuffer;
use loadmaster::machine::cpu::kernels::{Isa, memory_read_sum, multiply_peak};
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::machine::disk::{DiskFile, IoPool, IoRequest};
use std::path::Path;
use std::time::Instant;

/// One request, of the size in which weights are streamed.
const BLOCK_BYTES: u64 = 16 << 20;
const DISK_BYTES: u64 = 512 << 20;
/// Many times a usual last cache, which would else give a part of it.
const MEMORY_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy)]
pub struct Ceilings {
    pub flop_per_s: f64,
    /// Of pairs of bf16, and of bytes.
    pub bf16_flop_per_s: f64,
    pub int8_op_per_s: f64,
    pub dram_bytes_per_s: f64,
    pub read_bytes_per_s: f64,
    pub write_bytes_per_s: f64,
}

impl Ceilings {
    /// Medians of several measurements.
    pub fn median(all: &[Ceilings]) -> Ceilings {
        let of = |get: fn(&Ceilings) -> f64| super::median(all.iter().map(get).collect());
        Ceilings {
            flop_per_s: of(|c| c.flop_per_s),
            bf16_flop_per_s: of(|c| c.bf16_flop_per_s),
            int8_op_per_s: of(|c| c.int8_op_per_s),
            dram_bytes_per_s: of(|c| c.dram_bytes_per_s),
            read_bytes_per_s: of(|c| c.read_bytes_per_s),
            write_bytes_per_s: of(|c| c.write_bytes_per_s),
        }
    }

    pub fn show(&self) -> String {
        format!(
            "FMA {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, int8 {:.0} Gop/s, DRAM read {:.1} GB/s, disk read {:.2} GB/s, overwrite {:.2} GB/s",
            self.flop_per_s / 1e9,
            self.bf16_flop_per_s / 1e9,
            self.int8_op_per_s / 1e9,
            self.dram_bytes_per_s / 1e9,
            self.read_bytes_per_s / 1e9,
            self.write_bytes_per_s / 1e9
        )
    }
}

/// Measures on demand over one scratch file. Its memory stays, since a host that takes freed memory back stops the
/// guest for it, seconds later.
pub struct Meter {
    pool: Pool,
    file: DiskFile,
    io: IoPool,
    block: AlignedBuffer,
    memory: AlignedBuffer,
}

impl Meter {
    pub fn new(dir: &Path, threads: usize) -> Meter {
        let file = DiskFile::create_unlinked(dir, DISK_BYTES).expect("a scratch file");
        let mut meter = Meter {
            pool: Pool::new(threads),
            file,
            io: IoPool::new(READ_THREADS).expect("threads"),
            block: AlignedBuffer::new(BLOCK_BYTES).expect("memory"),
            memory: AlignedBuffer::new(MEMORY_BYTES).expect("memory"),
        };
        meter.block.fill(1);
        meter.memory.fill(1);
        meter.disk(true);
        meter
    }

    pub fn measure(&mut self) -> Ceilings {
        let isa = Isa::detect();
        let (mut peaks, mut dram) = ([0.0f64; 3], 0.0f64);
        for _ in 0..4 {
            let arithmetics = [Arithmetic::Fp32, Arithmetic::Bf16, Arithmetic::Int8];
            for (peak, arithmetic) in peaks.iter_mut().zip(arithmetics) {
                let start = Instant::now();
                let done = multiply_peak(&self.pool, isa, arithmetic, 1_000_000);
                *peak = peak.max(done / start.elapsed().as_secs_f64());
            }
            let start = Instant::now();
            std::hint::black_box(memory_read_sum(&self.pool, isa, &self.memory));
            dram = dram.max(MEMORY_BYTES as f64 / start.elapsed().as_secs_f64());
        }
        Ceilings {
            flop_per_s: peaks[0],
            bf16_flop_per_s: peaks[1],
            int8_op_per_s: peaks[2],
            dram_bytes_per_s: dram,
            read_bytes_per_s: self.disk(false),
            write_bytes_per_s: self.disk(true),
        }
    }

    /// Bytes per second over the whole scratch file.
    fn disk(&mut self, write: bool) -> f64 {
        let start = Instant::now();
        for offset in (0..DISK_BYTES).step_by(BLOCK_BYTES as usize) {
            let request = match write {
                true => IoRequest::write(&self.file, offset, &self.block),
                false => IoRequest::read(&self.file, offset, &mut self.block),
            };
            self.io.run(&mut [request]).expect("the disk works");
        }
        DISK_BYTES as f64 / start.elapsed().as_secs_f64()
    }
}
