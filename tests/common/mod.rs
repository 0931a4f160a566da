//! Models and machines that several tests share. Made-up figures of plausible size, nothing measured.
#![allow(dead_code)]

pub mod planning;

use loadmaster::dtype::Dtype;
use loadmaster::model::{Activation, ModelSpec};
use loadmaster::profile::{HardwareProfile, compiled_in};

/// A pre-norm OPT with tied head.
pub fn opt(name: &str, layers: usize, hidden: usize, heads: usize) -> ModelSpec {
    ModelSpec {
        name: name.into(),
        layers,
        hidden,
        heads,
        ffn: 4 * hidden,
        vocab: 50272,
        positions: 2048,
        embed_width: hidden,
        pre_norm: true,
        final_norm: true,
        bias: true,
        norm_affine: true,
        activation: Activation::Relu,
        tied_head: true,
        dtype: Dtype::F16,
        pad_id: 1,
        bos_id: 2,
        eos_ids: vec![2],
    }
}

pub fn opt_125m() -> ModelSpec {
    opt("opt-125m", 12, 768, 12)
}

pub fn opt_1_3b() -> ModelSpec {
    opt("opt-1.3b", 24, 2048, 32)
}

pub fn opt_6_7b() -> ModelSpec {
    opt("opt-6.7b", 32, 4096, 32)
}

pub fn opt_30b() -> ModelSpec {
    opt("opt-30b", 48, 7168, 56)
}

pub fn opt_175b() -> ModelSpec {
    opt("opt-175b", 96, 12288, 96)
}

/// Two cores: f16 weights at 25 GB/s for one row, 190 GFLOP/s for 512, 28 GB/s of DRAM, a 3 GB/s disk.
pub fn two_cores() -> HardwareProfile {
    HardwareProfile::from_toml(TWO_CORES).expect("the test profile is valid")
}

pub fn t4() -> HardwareProfile {
    HardwareProfile::from_toml(compiled_in("t4-gcp").expect("compiled in")).expect("valid")
}

const TWO_CORES: &str = r#"
schema = 1
[machine]
name = "two-cores"
date = "2026-11-23"
command = "made up"
provenance = "made up for tests"
cpu = "two cores"
threads = 2
kernels = "test"
disk = "test"
[memory]
cpu_total_bytes = 25000000000
page_locked_limit_bytes = 8388608
[links.disk_to_cpu]
latency_s = 1e-4
direct = [[262144, 4, 2.2e9, 10.0], [1048576, 4, 2.8e9, 10.0], [16777216, 4, 3.0e9, 10.0]]
[links.cpu_to_disk]
latency_s = 1e-4
fresh = [[262144, 4, 1.0e9, 10.0], [4194304, 4, 1.6e9, 10.0]]
overwrite = [[262144, 4, 1.8e9, 10.0], [4194304, 4, 2.9e9, 10.0]]
[cpu]
dram_read_bytes_per_s = 28e9
dram_copy_bytes_per_s = 12e9
launch_s = 1e-5
rowwise_bytes_per_s = 20e9
# 4096 x 4096: 33.5 MB of f16 weights
[cpu.gemm.f16]
points = [[1, 4096, 4096, 1.342e-3], [4, 4096, 4096, 1.45e-3], [16, 4096, 4096, 3.2e-3], [64, 4096, 4096, 1.15e-2], [512, 4096, 4096, 9.04e-2]]
[cpu.gemm.f32]
points = [[1, 4096, 4096, 2.6e-3], [16, 4096, 4096, 3.9e-3], [512, 4096, 4096, 9.04e-2]]
[cpu.gemm.q4]
points = [[1, 4096, 4096, 0.5e-3], [4, 4096, 4096, 1.0e-3], [16, 4096, 4096, 3.4e-3], [64, 4096, 4096, 1.2e-2], [512, 4096, 4096, 9.2e-2]]
[cpu.attention.f16]
decode_bytes_per_s = 20e9
prefill_flop_per_s = 120e9
[cpu.attention.f32]
decode_bytes_per_s = 22e9
prefill_flop_per_s = 130e9
[cpu.attention.q4]
decode_bytes_per_s = 6e9
prefill_flop_per_s = 100e9
[cpu.quantise]
pack_bytes_per_s = 2e9
append_bytes_per_s = 2e9
[contention]
"cpu_compute+disk_to_cpu" = [0.93, 0.9]
"cpu_compute+cpu_to_disk" = [0.95, 0.9]
"disk_to_cpu+cpu_to_disk" = [0.6, 0.6]
"#;
