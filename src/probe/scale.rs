//! How much is measured: grids, repetitions and sizes of a full probe and of a quick one.
//! A quick probe measures the same things by the same code, less often and on smaller data.

use crate::units::{GIB, MIB, PAGE_BYTES};

/// How thorough a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeScale {
    Full,
    /// For tests: a second or two. Its figures are rough.
    Quick,
}

/// No probe writes more than this, in all.
pub const MAX_WRITTEN_BYTES: u64 = 2 * GIB;

/// So many requests handed to the I/O pool in one call, and how often that is repeated for one sample.
#[derive(Clone, Copy, Debug)]
pub struct DiskStep {
    pub block_bytes: u64,
    pub depth: u32,
    pub repeats: u64,
}

impl DiskStep {
    pub fn call_bytes(&self) -> u64 {
        self.block_bytes * u64::from(self.depth)
    }

    pub fn bytes(&self) -> u64 {
        self.call_bytes() * self.repeats
    }
}

/// The extent of one probe.
pub struct Extent {
    pub rounds: usize,
    /// The first so many rounds write, too: what is written is bounded.
    pub write_rounds: usize,
    /// No further round begins that would end after this, but where fewer than three had DRAM at one speed: then
    /// twice the time.
    pub limit_s: f64,
    /// Memory that weights, KV and I/O buffers rotate through: far larger than any cache.
    pub arena_bytes: u64,
    /// More, where the largest cache times this is more and the budget has room.
    pub cache_multiple: u64,
    pub gemm_rows: &'static [usize],
    /// (inputs, outputs): several sizes, and of a size several ratios of the two.
    pub gemm_shapes: &'static [(usize, usize)],
    /// Rows and shape of products whose weights are still in the last cache.
    pub near_rows: &'static [usize],
    pub near_shape: (usize, usize),
    /// A sample repeats its operation until this much time has passed.
    pub sample_s: f64,
    pub reads: &'static [DiskStep],
    pub writes: &'static [DiskStep],
    /// Products that race with the disk: (inputs, outputs), and rows so few that memory binds and so many
    /// that arithmetic does.
    pub race_shape: (usize, usize),
    pub race_rows: [usize; 2],
    /// How long two lanes run together, and the most that is written meanwhile.
    pub window_s: f64,
    pub window_write_bytes: u64,
    /// The same where requests are small.
    pub small_write_bytes: u64,
    /// Tokens that a decoding sequence looks at, and those of a prompt, for attention; the longest prompt
    /// is as many rows as row-wise work is measured with.
    pub decode_tokens: &'static [usize],
    /// Values of a key of a decoding sequence.
    pub decode_hidden: &'static [usize],
    pub prompt_tokens: &'static [usize],
}

/// The extent of a GPU's part, which comes after everything else.
#[derive(Clone, Copy, Debug)]
pub struct GpuExtent {
    /// Rounds of each figure; medians are kept.
    pub rounds: usize,
    /// Repetitions fill this time, and are no more than this.
    pub sample_s: f64,
    pub most_repeats: usize,
    pub launches: usize,
    pub link_bytes: &'static [u64],
    pub gemm_rows: &'static [usize],
    /// (inputs, outputs): smaller matrices run at a smaller part of the peak.
    pub gemm_shapes: &'static [(usize, usize)],
    /// The product that copies race with.
    pub race_shape: (usize, usize),
    /// Rows that are copied within device memory, at most.
    pub copied_rows: usize,
    /// Decoding sequences at most, the tokens that each looks back on, and those of a prompt at most.
    pub sequences: usize,
    pub past: usize,
    pub prompt: usize,
}

const fn step(block_bytes: u64, depth: u32, repeats: u64) -> DiskStep {
    DiskStep {
        block_bytes,
        depth,
        repeats,
    }
}

const KIB_256: u64 = MIB / 4;
const KIB_64: u64 = MIB / 16;

static FULL: Extent = Extent {
    rounds: 6,
    write_rounds: 4,
    limit_s: 50.0,
    arena_bytes: 192 * MIB,
    cache_multiple: 24,
    gemm_rows: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    gemm_shapes: &[
        (512, 2048),
        (2048, 512),
        (1024, 4096),
        (4096, 1024),
        (2048, 8192),
        (8192, 2048),
    ],
    near_rows: &[1, 2, 4, 8, 16, 32],
    near_shape: (1024, 4096),
    sample_s: 0.008,
    // One large request is cut into pieces that run beside each other; small ones do when several come together.
    reads: &[
        step(64 * MIB, 1, 4),
        step(16 * MIB, 1, 12),
        step(4 * MIB, 1, 32),
        step(MIB, 1, 64),
        step(MIB, 4, 16),
        step(KIB_256, 1, 96),
        step(KIB_256, 4, 24),
        step(KIB_64, 1, 64),
        step(KIB_64, 4, 24),
        step(KIB_64, 16, 8),
        step(PAGE_BYTES, 1, 64),
        step(PAGE_BYTES, 4, 32),
        step(PAGE_BYTES, 16, 16),
    ],
    writes: &[
        step(64 * MIB, 1, 1),
        step(16 * MIB, 1, 1),
        step(4 * MIB, 1, 4),
        step(MIB, 1, 8),
        step(MIB, 4, 2),
        step(KIB_256, 1, 16),
        step(KIB_256, 4, 4),
        step(KIB_64, 1, 16),
        step(KIB_64, 4, 8),
        step(KIB_64, 16, 4),
        step(PAGE_BYTES, 1, 32),
        step(PAGE_BYTES, 4, 16),
        step(PAGE_BYTES, 16, 8),
    ],
    race_shape: (1024, 4096),
    race_rows: [4, 256],
    window_s: 0.1,
    window_write_bytes: 48 * MIB,
    small_write_bytes: 9 * MIB,
    decode_tokens: &[16, 64, 256, 1024],
    decode_hidden: &[512, 2048],
    prompt_tokens: &[16, 64, 512],
};

static FULL_GPU: GpuExtent = GpuExtent {
    rounds: 5,
    sample_s: 0.01,
    most_repeats: 200,
    launches: 500,
    link_bytes: &[KIB_64, MIB, 4 * MIB, 16 * MIB, 64 * MIB],
    gemm_rows: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    gemm_shapes: &[(1024, 4096), (4096, 4096), (7168, 28672)],
    race_shape: (1024, 4096),
    copied_rows: 8192,
    sequences: 64,
    past: 1023,
    prompt: 512,
};

static QUICK: Extent = Extent {
    rounds: 1,
    write_rounds: 1,
    limit_s: 5.0,
    arena_bytes: 24 * MIB,
    cache_multiple: 0,
    gemm_rows: &[1, 8],
    gemm_shapes: &[(512, 1024)],
    near_rows: &[1],
    near_shape: (512, 1024),
    sample_s: 0.0005,
    reads: &[step(4 * MIB, 1, 1), step(MIB, 4, 1)],
    writes: &[step(4 * MIB, 1, 1), step(MIB, 4, 1)],
    race_shape: (512, 1024),
    race_rows: [1, 8],
    window_s: 0.01,
    window_write_bytes: 4 * MIB,
    small_write_bytes: MIB,
    decode_tokens: &[128],
    decode_hidden: &[512, 2048],
    prompt_tokens: &[32],
};

static QUICK_GPU: GpuExtent = GpuExtent {
    rounds: 1,
    sample_s: 0.0005,
    most_repeats: 20,
    launches: 50,
    link_bytes: &[KIB_64, MIB, 4 * MIB, 16 * MIB],
    gemm_rows: &[1, 8, 32],
    gemm_shapes: &[(128, 256), (256, 512)],
    race_shape: (512, 1024),
    copied_rows: 512,
    sequences: 2,
    // More than one part of a row's attention.
    past: 299,
    prompt: 32,
};

impl ProbeScale {
    pub fn extent(self) -> &'static Extent {
        match self {
            ProbeScale::Full => &FULL,
            ProbeScale::Quick => &QUICK,
        }
    }

    pub fn gpu(self) -> &'static GpuExtent {
        match self {
            ProbeScale::Full => &FULL_GPU,
            ProbeScale::Quick => &QUICK_GPU,
        }
    }
}

impl Extent {
    /// Rows of activations in row-wise work and in prompts' attention.
    pub fn rows(&self) -> usize {
        self.prompt_tokens.iter().copied().max().unwrap_or(1)
    }

    /// Bytes that the writing steps cover in one round.
    pub fn round_write_bytes(&self) -> u64 {
        self.writes.iter().map(DiskStep::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_writes_at_most_two_gibibytes() {
        for extent in [&FULL, &QUICK] {
            // Fresh and again; four windows a round write, one alone and three beside another lane, and
            // five with small requests.
            let windows = 4 * extent.window_write_bytes + 5 * extent.small_write_bytes;
            let round = 2 * extent.round_write_bytes() + windows;
            assert!(extent.write_rounds <= extent.rounds);
            assert!(extent.write_rounds as u64 * round < MAX_WRITTEN_BYTES);
        }
    }

    #[test]
    fn every_buffer_fits_the_arena_and_the_window() {
        for extent in [&FULL, &QUICK] {
            let steps = extent.reads.iter().chain(extent.writes);
            assert!(
                steps
                    .map(DiskStep::call_bytes)
                    .all(|b| b <= extent.arena_bytes / 2)
            );
            let largest = extent
                .gemm_shapes
                .iter()
                .map(|(i, o)| i * o * 4)
                .max()
                .unwrap();
            assert!(largest as u64 * 2 <= extent.arena_bytes);
            assert!(extent.reads.iter().any(|s| s.depth == 4));
        }
    }
}
