<<<<<<< HEAD
//! What several test files share: small models, packed weights on disk, profiles, runs.
#![allow(dead_code)]

use loadmaster::checkpoint::WeightSource;
use loadmaster::cost::figures::LaneFigures;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::open::{Packed, RunJob, open};
use loadmaster::engine::sampling::Sampling;
use loadmaster::engine::{Engine, EngineError, Finished, Outcome, Request, RunOptions, Sink};
use loadmaster::machine::Machine;
use loadmaster::machine::cpu::kernels::{Isa, PackSource, pack_panels};
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::machine::price::Pricer;
use loadmaster::model::{Activation, ModelSpec};
use loadmaster::policy::{Compute, DeviceKind, Policy, Shares};
use loadmaster::profile::HardwareProfile;
use loadmaster::tier::PerLane;
use loadmaster::workload::{Lengths, LineLength, Workload};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

pub fn small_model(dtype: Dtype) -> ModelSpec {
    ModelSpec {
        name: "small".into(),
        layers: 3,
        hidden: 160,
        heads: 4,
        ffn: 448,
        vocab: 390,
        positions: 128,
        embed_width: 160,
=======
//! Models and machines that several tests share. Made-up figures of plausible size, nothing measured.
#![allow(dead_code)]

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
>>>>>>> planner
        pre_norm: true,
        final_norm: true,
        bias: true,
        norm_affine: true,
        activation: Activation::Relu,
        tied_head: true,
<<<<<<< HEAD
        dtype,
=======
        dtype: Dtype::F16,
>>>>>>> planner
        pad_id: 1,
        bos_id: 2,
        eos_id: 2,
    }
}

<<<<<<< HEAD
/// Packed weights in a temporary folder.
pub struct PackedFile {
    pub dir: tempfile::TempDir,
    pub file: PathBuf,
    pub matrix_offsets: Vec<u64>,
    pub smalls: Vec<Vec<u8>>,
}

/// Packs a source the plain way: everything in memory, one file.
pub fn pack(source: &dyn WeightSource, compress: bool) -> PackedFile {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let pool = Pool::new(2);
    let model = source.spec().clone();
    let mut bytes = Vec::new();
    let mut matrix_offsets = Vec::new();
    for matrix in model.matrices() {
        bytes.resize(bytes.len().next_multiple_of(4096), 0u8);
        matrix_offsets.push(bytes.len() as u64);
        let mut rows =
            vec![0u8; (matrix.rows as u64 * model.dtype.row_bytes(matrix.inputs)) as usize];
        source
            .read_rows(&matrix, 0, matrix.rows, &mut rows)
            .expect("rows");
        let format = matrix.format(model.dtype, compress);
        let mut packed = vec![0u8; matrix.panels() * format.panel_bytes(matrix.inputs) as usize];
        let from = PackSource {
            bytes: &rows,
            dtype: model.dtype,
            rows: matrix.rows,
            inputs: matrix.inputs,
        };
        pack_panels(&pool, Isa::detect(), from, format, &mut packed);
        bytes.extend_from_slice(&packed);
    }
    bytes.resize(bytes.len().next_multiple_of(4096) + 4096, 0);
    let file = dir.path().join("weights.bin");
    std::fs::write(&file, bytes).expect("write the pack");
    let small = |small: &loadmaster::model::Small| {
        let mut bytes = vec![0u8; small.bytes() as usize];
        source.read_small(small, &mut bytes).expect("small");
        bytes
    };
    let smalls = model.smalls().iter().map(small).collect();
    PackedFile {
        dir,
        file,
        matrix_offsets,
        smalls,
    }
}

impl PackedFile {
    pub fn packed(&self) -> Packed<'_> {
        Packed {
            file: &self.file,
            matrix_offsets: self.matrix_offsets.clone(),
            smalls: self.smalls.clone(),
        }
    }
}

/// A profile of round figures.
pub fn round_profile() -> HardwareProfile {
    let grid = |scale: f64| {
        let point = |m: usize| {
            let seconds = (1024.0 * 4096.0 * 2.0 / 25e9f64)
                .max(2.0 * m as f64 * 1024.0 * 4096.0 / 190e9)
                * scale;
            format!("[{m}, 1024, 4096, {seconds:e}]")
        };
        [1, 4, 16, 64, 256, 512].map(point).join(", ")
    };
    let formats = [("f16", 1.0), ("f32", 2.0), ("bf16", 1.0), ("q4", 0.4)];
    let gemm: String = formats
        .iter()
        .map(|(f, s)| format!("[cpu.gemm.{f}]\npoints = [{}]\n", grid(*s)))
        .collect();
    let attention: String = ["f16", "f32", "q4"]
        .map(|f| {
            format!("[cpu.attention.{f}]\ndecode_bytes_per_s = 2e10\nprefill_flop_per_s = 1e11\n")
        })
        .join("");
    let text = format!(
        "schema = 1\n[machine]\nname = \"round\"\ndate = \"2026-11-23\"\ncommand = \"tests\"\nprovenance = \"made up\"\n\
         cpu = \"two cores\"\nthreads = 2\nkernels = \"1\"\ndisk = \"ext4\"\n\
         [memory]\ncpu_total_bytes = 24000000000\npage_locked_limit_bytes = 0\n\
         [links.disk_to_cpu]\nlatency_s = 1e-4\ndirect = [[262144, 1, 1.5e9, 5.0], [4194304, 4, 3e9, 5.0]]\n\
         [links.cpu_to_disk]\nlatency_s = 1e-4\nfresh = [[4194304, 4, 1.6e9, 5.0]]\noverwrite = [[4194304, 4, 2.9e9, 5.0]]\n\
         [cpu]\ndram_read_bytes_per_s = 2.8e10\ndram_copy_bytes_per_s = 1.2e10\nlaunch_s = 5e-6\n{gemm}{attention}"
    );
    HardwareProfile::from_toml(&text).expect("a valid profile")
}

/// Collects everything that a run gives.
#[derive(Default)]
pub struct Collected {
    pub lines: BTreeMap<usize, Finished>,
    pub refused: BTreeMap<usize, String>,
    pub logits: BTreeMap<(usize, usize), Vec<f32>>,
}

impl Sink for Collected {
    fn finished(&mut self, line: Finished) -> Result<(), EngineError> {
        self.lines.insert(line.line, line);
        Ok(())
    }
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        self.refused.insert(line, why);
        Ok(())
    }
    fn logits(&mut self, line: usize, generated: usize, logits: &[f32]) {
        self.logits.insert((line, generated), logits.to_vec());
    }
}

pub fn policy(percent: [f64; 6], cpu_compute_share: f64, (gbs, ngb): (usize, usize)) -> Policy {
    Policy {
        shares: Shares::from_percent(percent, cpu_compute_share).expect("percentages"),
        gpu_batch_size: gbs,
        num_gpu_batches: ngb,
        pin_weight: true,
        compress_weight: false,
        compress_cache: false,
        cpu_cache_compute: false,
        overlap: true,
        compute: Compute::Exact,
        kv: Dtype::F32,
        threads: 2,
    }
}

/// Prompts with the lengths given, ids spread over the vocabulary.
pub fn requests(model: &ModelSpec, lengths: &[(usize, usize)]) -> Vec<Request> {
    let id = |line: usize, at: usize| {
        (4 + (line * 7919 + at * 104_729 + line * at) % (model.vocab - 4)) as u32
    };
    let request = |(line, &(prompt, max_tokens)): (usize, &(usize, usize))| Request {
        line,
        prompt: (0..prompt).map(|at| id(line, at)).collect(),
        max_tokens,
        sampling: Sampling::GREEDY,
    };
    lengths.iter().enumerate().map(request).collect()
}

pub fn workload(requests: &[Request]) -> Workload {
    let line = |r: &Request| LineLength {
        prompt_tokens: r.prompt.len() as u32,
        gen_tokens: r.max_tokens as u32,
    };
    Workload {
        lines: requests.iter().map(line).collect(),
    }
}

pub struct Ran {
    pub outcome: Outcome,
    pub collected: Collected,
    pub lanes: PerLane<LaneFigures>,
}

/// Runs requests under a policy on real threads.
pub fn run(
    model: &ModelSpec,
    pack: &PackedFile,
    policy: &Policy,
    device: DeviceKind,
    lines: Vec<Request>,
) -> Ran {
    let rates = Rates::new(&round_profile(), device, policy.threads).expect("rates");
    let packed = pack.packed();
    let lengths = Lengths::from(&workload(&lines));
    let spill: &Path = pack.dir.path();
    let host = HostBytes::default();
    let job = RunJob {
        model,
        policy,
        device,
        lengths,
        host,
        packed: &packed,
        spill,
        pricer: Pricer::new(rates),
    };
    let (mut machine, facts) = open(&job).expect("the run opens");
    let mut collected = Collected::default();
    let engine = Engine::new(&mut machine, facts, RunOptions { ignore_eos: true });
    let outcome = engine
        .run(lines, &mut collected, &AtomicBool::new(false))
        .expect("the run ends well");
    let all = machine.submitted();
    machine.wait(&all).expect("nothing fails afterwards");
    Ran {
        outcome,
        collected,
        lanes: machine.lane_figures(),
    }
}
=======
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
>>>>>>> planner
