//! Packed weights on disk.

pub mod stream;
