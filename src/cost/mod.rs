//! What a policy costs: bytes per tier (footprint) and seconds per lane (rates, terms, estimate).

pub mod affine;
pub mod block;
pub mod cuda_buffers;
pub mod curves;
pub mod estimate;
pub mod figures;
pub mod footprint;
pub mod layer;
pub mod rates;
pub mod steps;
pub mod terms;

/// Page tables take 8 bytes for each 4 KiB page, a 512th of the arenas. A memory cgroup charges more as
/// arenas grow (pages in flight to and from disks, pages in the processors' own lists), and the heap of
/// planning and packing grows with the model: with a 512th, opt-13b was killed in a cgroup of its 8 GiB.
pub const ARENA_BYTES_PER_KERNEL_BYTE: u64 = 128;
