//! The CPU kernels: slices in, slices out. Every result is bit-identical for every thread count,
//! instruction set, batch and split of the work: one sequential order of sums per output value. Products of
//! bf16 have two such orders, one on machines with a matrix unit and one on all others.
//! No allocation in a call, no knowledge of models, tiers or schedules.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attend;
pub mod bandwidth;
mod codes;
mod copies;
mod cut;
mod decode;
mod decode_q4;
pub mod gemm;
mod halves;
mod isa;
pub mod kv;
mod math;
mod matrix_few;
mod matrix_products;
mod matrix_unit;
pub mod norm;
pub mod pack;
mod pack_q4;
mod panel;
mod prefill;
mod q4;
pub mod rowmajor;
pub mod rows;
mod shared;
mod simd;
mod tile;
#[cfg(target_arch = "x86_64")]
mod transpose;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_avx2;
#[cfg(target_arch = "x86_64")]
mod x86_quarters;

pub use attend::{AttendArgs, AttendItem, MAX_HEAD_SIZE, attend};
pub use bandwidth::{copy_bytes, memory_read_sum, multiply_peak};
pub use gemm::{Activation, GemmArgs, gemm};
pub use isa::Isa;
pub use kv::{AppendArgs, KvView, Slots, append_kv};
pub use norm::{NormArgs, NormInPlace, layer_norm, layer_norm_in_place};
pub use pack::{PackSource, pack_panels, unpack_panel};
pub use rowmajor::{pack_rows, rows_to_panels};
pub use rows::{EmbedArgs, Table, add_rows, add_rows_typed, copy_rows, embed_rows};

/// Changes whenever a kernel's speed or rounding does, or what is measured of it: profiles are valid for
/// one revision.
pub const KERNEL_REVISION: &str = "16";
