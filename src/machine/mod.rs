//! The hands: memory, disk and devices as the rest of the program touches them.
//! All `unsafe` of the crate lives below this module; no planning, no schedule, no model knowledge.

pub mod arena;
pub mod cpu;
pub mod disk;
pub mod nvml;
pub mod os;
