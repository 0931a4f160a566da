//! The hands: what touches memory, cores, disks and accelerators. Everything `unsafe` lives here.
//! Nothing in here knows a model, a plan or a schedule.

pub mod arena;
pub mod cpu;
pub mod disk;
pub mod nvml;
pub mod os;
