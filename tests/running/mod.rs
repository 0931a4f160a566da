//! What several test files share: small models, packed weights on disk, profiles, runs.
#![allow(dead_code)]

pub mod policy;

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
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::probe::ProfileKey;
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
        pre_norm: true,
        final_norm: true,
        bias: true,
        norm_affine: true,
        activation: Activation::Relu,
        tied_head: true,
        dtype,
        pad_id: 1,
        bos_id: 2,
        eos_ids: vec![2],
    }
}

/// Packed weights in a temporary folder.
pub struct PackedFile {
    pub dir: tempfile::TempDir,
    pub file: PathBuf,
    pub matrix_offsets: Vec<u64>,
    pub small_offsets: Vec<u64>,
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
    let mut small_offsets = Vec::new();
    for small in model.smalls() {
        let mut values = vec![0u8; small.bytes() as usize];
        source.read_small(&small, &mut values).expect("small");
        small_offsets.push(bytes.len() as u64);
        bytes.extend_from_slice(&values);
    }
    bytes.resize(bytes.len().next_multiple_of(4096) + 4096, 0);
    let file = dir.path().join("weights.bin");
    std::fs::write(&file, bytes).expect("write the pack");
    PackedFile {
        dir,
        file,
        matrix_offsets,
        small_offsets,
    }
}

impl PackedFile {
    pub fn packed(&self) -> Packed {
        Packed {
            file: self.file.clone(),
            matrix_offsets: self.matrix_offsets.clone(),
            small_offsets: self.small_offsets.clone(),
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

/// Runs requests under a policy on real threads, whatever token comes.
pub fn run(
    model: &ModelSpec,
    pack: &PackedFile,
    policy: &Policy,
    device: DeviceKind,
    lines: Vec<Request>,
) -> Ran {
    run_with(model, pack, policy, (device, true), lines)
}

/// The same, with a say in whether the end token ends a line.
pub fn run_with(
    model: &ModelSpec,
    pack: &PackedFile,
    policy: &Policy,
    (device, ignore_eos): (DeviceKind, bool),
    lines: Vec<Request>,
) -> Ran {
    let rates = Rates::new(&round_profile(), device, policy.threads).expect("rates");
    let packed = pack.packed();
    let lengths = Lengths::from(&workload(&lines));
    let spill: &Path = pack.dir.path();
    let host = HostBytes::default();
    let pricer = Pricer::new(rates);
    let job = RunJob {
        model,
        policy,
        device,
        lengths,
        host,
        packed: &packed,
        source: None,
        spill,
        pricer,
        gpu: Default::default(),
    };
    let (mut machine, facts) = open(&job).expect("the run opens");
    let mut collected = Collected::default();
    let engine = Engine::new(&mut machine, facts, RunOptions { ignore_eos });
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

/// The same figures as a profile that a machine of this key takes for its own.
pub fn owned_by(key: ProfileKey, mut profile: HardwareProfile) -> HardwareProfile {
    profile.machine.name = key.name();
    profile.machine.cpu = key.cpu;
    profile.machine.threads = key.threads;
    profile.machine.kernels = key.kernels;
    profile.machine.disk = key.disk;
    profile
}
