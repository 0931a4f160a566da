//! In which order and after what the schedule's operations are submitted: read off a machine that notes them,
//! on a clock.

use crate::common::t4;
use crate::running::policy::policy;
use crate::running::{Collected, requests};
use loadmaster::cost::estimate::EstimateInput;
use loadmaster::cost::figures::LaneFigures;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::replay::run_facts;
use loadmaster::engine::{Engine, RunOptions};
use loadmaster::machine::ops::{Compute, Op};
use loadmaster::machine::price::Pricer;
use loadmaster::machine::virtual_time::VirtualMachine;
use loadmaster::machine::{Fence, Fences, Machine, MachineError};
use loadmaster::model::families::named_size;
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::tier::{Lane, PerLane, PerTier, Phase, Tier};
use loadmaster::workload::Workload;
use std::sync::atomic::AtomicBool;

/// An operation as it was submitted.
struct Noted {
    lane: Lane,
    number: u64,
    phase: Phase,
    op: Op,
    after: Fences,
}

struct Noting {
    machine: VirtualMachine,
    phase: Phase,
    noted: Vec<Noted>,
}

impl Machine for Noting {
    fn submit(&mut self, lane: Lane, op: Op, after: &Fences) -> Fence {
        let fence = self.machine.submit(lane, op.clone(), after);
        self.noted.push(Noted {
            lane,
            number: fence.number,
            phase: self.phase,
            op,
            after: *after,
        });
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

const SIZE: &str = "opt-1.3b";
const PROMPT: usize = 100;
const TOKENS: u32 = 4;

/// Four batches of four on a T4.
fn with(percent: [f64; 6], cpu_cache_compute: bool) -> Policy {
    Policy {
        kv: Dtype::F16,
        cpu_cache_compute,
        threads: 16,
        ..policy(percent, 0.0, (4, 4))
    }
}

fn with_input<T>(policy: &Policy, then: impl FnOnce(&EstimateInput) -> T) -> T {
    let model = named_size(SIZE).expect("a known size");
    let rates = Rates::new(&t4(), DeviceKind::Cuda, policy.threads).expect("rates");
    then(&EstimateInput {
        model: &model,
        workload: &Workload::uniform(policy.slots(), PROMPT as u32, TOKENS),
        rates: &rates,
        policy,
        host: HostBytes::default(),
        budget: PerTier::default(),
    })
}

/// Everything that a job of one block submits.
fn noted(policy: &Policy) -> Vec<Noted> {
    with_input(policy, |input| {
        let mut machine = Noting {
            machine: VirtualMachine::new(Pricer::new(input.rates.clone())),
            phase: Phase::Prefill,
            noted: Vec::new(),
        };
        let lines = requests(
            input.model,
            &vec![(PROMPT, TOKENS as usize); policy.slots()],
        );
        let engine = Engine::new(
            &mut machine,
            run_facts(input),
            RunOptions { ignore_eos: true },
        );
        let ran = engine.run(lines, &mut Collected::default(), &AtomicBool::new(false));
        ran.expect("the schedule ends");
        machine.noted
    })
}

/// In a double buffer copies of cached tokens wait behind a part of the next layer's weights, never behind all of them.
#[test]
fn weights_of_the_next_layer_are_spread_over_this_ones_batches() {
    let double = Policy {
        double_buffer: true,
        ..with([0.0, 100.0, 0.0, 100.0, 100.0, 0.0], false)
    };
    let all = noted(&double);
    // Less than the smallest matrix: cached tokens of a batch are.
    let matrix_bytes = 2 * 2048 * 2048;
    let ups: Vec<bool> = all
        .iter()
        .filter(|n| n.lane == Lane::CpuToGpu && n.phase == Phase::Decode)
        .map(|n| n.op.bytes() >= matrix_bytes)
        .collect();
    let runs: Vec<(bool, usize)> = ups
        .chunk_by(|a, b| a == b)
        .map(|r| (r[0], r.len()))
        .collect();
    // Layers in the middle of a pass: around its ends the embedding's and the head's weights come, too.
    let middle = &runs[40..120];
    let longest = |weights: bool| {
        let of = middle.iter().filter(|run| run.0 == weights);
        of.map(|run| run.1).max().unwrap_or(0)
    };
    assert_eq!(
        longest(false),
        1,
        "weights come between all batches: {runs:?}"
    );
    // Seven pieces over four batches.
    assert_eq!(longest(true), 2, "{runs:?}");
}

fn is_attention(noted: &Noted) -> bool {
    matches!(noted.op, Op::Compute(Compute::Attend(_)))
}

/// The CPU's part of a batch waits for the batch's queries, not for the GPU's attention, nor the other way round.
#[test]
fn a_batch_is_attended_by_both_at_once() {
    let all = noted(&with([100.0, 0.0, 50.0, 50.0, 100.0, 0.0], true));
    let of = |lane: Lane| {
        let on = all
            .iter()
            .filter(move |n| n.lane == lane && n.phase == Phase::Decode);
        on.filter(|n| is_attention(n)).collect::<Vec<_>>()
    };
    let (gpu, cpu) = (of(Lane::GpuCompute), of(Lane::CpuCompute));
    let layers = named_size(SIZE).expect("a known size").layers;
    assert_eq!(gpu.len(), layers * 4 * (TOKENS as usize - 1));
    assert_eq!(cpu.len(), gpu.len());
    for (gpu, cpu) in gpu.iter().zip(&cpu) {
        assert!(cpu.after.mark(Lane::GpuCompute) < gpu.number);
        assert!(gpu.after.mark(Lane::CpuCompute) < cpu.number);
    }
}
