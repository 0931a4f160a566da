//! What a pass consists of: seconds of the computing lane by kind of operation, each waited for by itself, so that
//! no other lane runs meanwhile. Everything but products and attention should be little.

use super::Options;
use loadmaster::checkpoint::SynthSource;
use loadmaster::cost::figures::LaneFigures;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::{Compute as Arithmetic, Dtype};
use loadmaster::engine::open::{Packed, RunJob, open};
use loadmaster::engine::sampling::Sampling;
use loadmaster::engine::{Engine, EngineError, Finished, Request, RunOptions, Sink};
use loadmaster::machine::ops::{Compute, Op};
use loadmaster::machine::price::Pricer;
use loadmaster::machine::threaded::ThreadedMachine;
use loadmaster::machine::{Fence, Fences, Machine, MachineError, os};
use loadmaster::model::families::named_size;
use loadmaster::policy::{DeviceKind, Policy, Shares};
use loadmaster::profile::{HardwareProfile, compiled_in};
use loadmaster::tier::{Lane, PerLane, Phase, Tier};
use loadmaster::workload::{Lengths, Workload};
use std::sync::atomic::AtomicBool;

/// (sequences, prompt tokens, generated tokens) of a job; what its decode steps have is shown too.
const JOBS: [(usize, u32, u32); 4] = [(1, 128, 9), (8, 128, 9), (32, 32, 9), (8, 1000, 3)];

const KINDS: [&str; 3] = ["products", "attention", "everything else"];

/// Seconds by phase and kind.
type Seconds = [[f64; 3]; 2];

pub fn run(options: &Options) {
    let name = options.model();
    println!("{name}: % of the computing lane's seconds");
    println!(
        "{:>10} {:>16} {:>8} {:>9} {:>10} {:>10} {:>16}",
        "weights", "sequences", "phase", "seconds", KINDS[0], KINDS[1], KINDS[2]
    );
    for (weights, compute, compress) in [
        ("exact", Arithmetic::Exact, false),
        ("bf16", Arithmetic::Bf16, false),
        ("4-bit", Arithmetic::Exact, true),
    ] {
        for job in JOBS {
            let policy = Policy {
                compute,
                compress_weight: compress,
                ..resident(job.0)
            };
            let all = seconds_of(name, &policy, job);
            for (phase, seconds) in ["prompts", "decode"].into_iter().zip(all) {
                let sum: f64 = seconds.iter().sum();
                let [products, attention, rest] = seconds.map(|s| 100.0 * s / sum);
                println!(
                    "{weights:>10} {:>16} {phase:>8} {sum:9.3} {products:10.1} {attention:10.1} {rest:16.1}",
                    format!("{} x ({} + {})", job.0, job.1, job.2)
                );
            }
        }
    }
}

/// Everything in memory, one batch.
fn resident(sequences: usize) -> Policy {
    let percent = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0];
    Policy {
        shares: Shares::from_percent(percent, 1.0).expect("legal"),
        gpu_batch_size: sequences,
        num_gpu_batches: 1,
        pin_weight: false,
        compress_weight: false,
        compress_cache: false,
        cpu_cache_compute: true,
        double_buffer: false,
        overlap: true,
        compute: Arithmetic::Exact,
        kv: Dtype::F16,
        threads: os::default_threads(),
    }
}

fn seconds_of(
    name: &str,
    policy: &Policy,
    (sequences, prompt, gen_tokens): (usize, u32, u32),
) -> Seconds {
    let model = named_size(name).expect("a known size");
    let source = SynthSource::new(model.clone(), 0);
    let spill = tempfile::tempdir().expect("a directory");
    // Prices are not looked at.
    let profile = compiled_in("t4-gcp").expect("a profile");
    let profile = HardwareProfile::from_toml(profile).expect("a profile");
    let rates = Rates::new(&profile, DeviceKind::Cpu, policy.threads).expect("rates");
    let job = RunJob {
        model: &model,
        policy,
        device: DeviceKind::Cpu,
        lengths: Lengths::from(&Workload::uniform(sequences, prompt, gen_tokens)),
        host: HostBytes {
            unpacked: true,
            ..HostBytes::default()
        },
        packed: &Packed::default(),
        source: Some(&source),
        spill: spill.path(),
        pricer: Pricer::new(rates),
        gpu: Default::default(),
    };
    let (mut machine, facts) = open(&job).expect("the run opens");
    let mut timed = Timed {
        machine: &mut machine,
        phase: Phase::Prefill,
        seconds: Seconds::default(),
    };
    let request = |line| Request {
        line,
        prompt: (0..prompt)
            .map(|t| 4 + (line as u32 * 977 + t * 31) % 50_000)
            .collect(),
        max_tokens: gen_tokens as usize,
        sampling: Sampling::GREEDY,
    };
    let options = RunOptions { ignore_eos: true };
    let engine = Engine::new(&mut timed, facts, options);
    let requests = (0..sequences).map(request).collect();
    let ran = engine.run(requests, &mut Nobody, &AtomicBool::new(false));
    ran.expect("the run ends well");
    timed.seconds
}

/// Waits for each operation of the computing lane and adds up how long the lane was busy with it.
struct Timed<'m> {
    machine: &'m mut ThreadedMachine,
    phase: Phase,
    seconds: Seconds,
}

fn kind(op: &Op) -> usize {
    match op {
        Op::Compute(Compute::Gemm(_)) => 0,
        Op::Compute(Compute::Attend(_)) => 1,
        _ => 2,
    }
}

impl Machine for Timed<'_> {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let kind = kind(&op);
        let before = self.machine.lane_figures()[lane].busy_s();
        let fence = self.machine.submit(lane, op, after);
        self.machine.wait(&fence.into()).expect("nothing fails");
        if lane == Lane::CpuCompute {
            let after = self.machine.lane_figures()[lane].busy_s();
            self.seconds[self.phase as usize][kind] += after - before;
        }
        fence
    }
    fn wait(&mut self, fences: &Fences) -> Result<(), MachineError> {
        self.machine.wait(fences)
    }
    fn submitted(&self) -> Fences {
        self.machine.submitted()
    }
    fn put(&mut self, tier: Tier, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        self.machine.put(tier, offset, bytes)
    }
    fn values(&self, tier: Tier, offset: u64, count: usize) -> Option<&[f32]> {
        self.machine.values(tier, offset, count)
    }
    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
        self.machine.set_phase(phase);
    }
    fn lane_figures(&self) -> PerLane<LaneFigures> {
        self.machine.lane_figures()
    }
    fn now_s(&self) -> f64 {
        self.machine.now_s()
    }
}

struct Nobody;

impl Sink for Nobody {
    fn finished(&mut self, _: Finished) -> Result<(), EngineError> {
        Ok(())
    }
    fn refused(&mut self, _: usize, why: String) -> Result<(), EngineError> {
        panic!("{why}")
    }
}
