//! The CPU as a compute device: its threads and its kernels.

pub mod kernels;
pub mod pool;
