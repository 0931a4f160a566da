//! In which order and after what the schedule's operations are submitted: read off a machine that notes them,
//! on a clock.

use crate::common::t4;
use crate::noted::{Event, Submitted, events};
use crate::running::policy::policy;
use loadmaster::cost::estimate::EstimateInput;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::replay::run_facts;
use loadmaster::machine::ops::{Compute, Op};
use loadmaster::machine::price::Pricer;
use loadmaster::machine::{Fence, Fences};
use loadmaster::model::families::named_size;
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::tier::{Lane, PerTier, Phase};
use loadmaster::workload::Workload;

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
fn noted(policy: &Policy) -> Vec<Submitted> {
    with_input(policy, |input| {
        let lengths = vec![(PROMPT, TOKENS as usize); policy.slots()];
        let pricer = Pricer::new(input.rates.clone());
        let all = events(run_facts(input), pricer, &lengths);
        let submitted = all.into_iter().filter_map(|event| match event {
            Event::Submitted(submitted) => Some(submitted),
            _ => None,
        });
        submitted.collect()
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

/// Without overlap an operation comes after everything on other lanes, with it after what it needs; here a task
/// has one lane.
#[test]
fn without_overlap_tasks_follow_each_other() {
    let waits_for_all = |overlap: bool| {
        let policy = Policy {
            overlap,
            ..with([100.0, 0.0, 0.0, 100.0, 0.0, 100.0], false)
        };
        let mut before = Fences::none();
        let all = noted(&policy);
        let ordered = all.iter().filter(|n| {
            let mut others = Lane::ALL.into_iter().filter(|&lane| lane != n.lane);
            let waits = others.all(|lane| n.after.mark(lane) == before.mark(lane));
            before.add(Fence {
                lane: n.lane,
                number: n.number,
            });
            waits
        });
        (ordered.count(), all.len())
    };
    let (ordered, all) = waits_for_all(false);
    assert_eq!(ordered, all);
    let (ordered, all) = waits_for_all(true);
    assert!(ordered < all / 2, "{ordered} of {all}");
}

fn is_attention(noted: &Submitted) -> bool {
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

/// A batch's queries, keys and values, or a piece of them.
fn makes_queries(noted: &Submitted) -> bool {
    let hidden = named_size(SIZE).expect("a known size").hidden;
    matches!(&noted.op, Op::Compute(Compute::Gemm(g)) if g.out_stride == 3 * hidden)
}

/// How many batches' queries are asked of the GPU, after the one that the CPU attends for, before what waits for that.
fn computed_meanwhile(percent: [f64; 6], batches: usize) -> Vec<usize> {
    let all = noted(&Policy {
        num_gpu_batches: batches,
        ..with(percent, true)
    });
    let decode: Vec<&Submitted> = all.iter().filter(|n| n.phase == Phase::Decode).collect();
    let on = |lane: Lane| decode.iter().copied().filter(move |n| n.lane == lane);
    let copy = |lane: Lane, number: u64| on(lane).find(|n| n.number == number).expect("a copy");
    let attended = on(Lane::CpuCompute).filter(|n| is_attention(n));
    let meanwhile = |attention: &Submitted| {
        let append = on(Lane::CpuCompute).find(|n| n.number + 1 == attention.number);
        let down = append.expect("before attending").after.mark(Lane::GpuToCpu);
        let queries = copy(Lane::GpuToCpu, down).after.mark(Lane::GpuCompute);
        let up = on(Lane::CpuToGpu).find(|n| n.after.mark(Lane::CpuCompute) == attention.number);
        let up = up.expect("attended rows come up").number;
        let waits = |n: &&Submitted| n.number > queries && n.after.mark(Lane::CpuToGpu) >= up;
        let end = on(Lane::GpuCompute)
            .find(waits)
            .expect("somebody waits")
            .number;
        let between = on(Lane::GpuCompute).filter(|n| n.number > queries && n.number < end);
        let made: Vec<bool> = between.map(makes_queries).collect();
        made.chunk_by(|a, b| a == b).filter(|run| run[0]).count()
    };
    attended.map(meanwhile).collect()
}

/// While the CPU attends for a batch the GPU has the next one, also across layers; only a pass's last batch has none after it.
#[test]
fn the_gpu_has_the_next_batch_while_the_cpu_attends() {
    let layers = named_size(SIZE).expect("a known size").layers;
    for (percent, batches) in [
        ([100.0, 0.0, 0.0, 100.0, 100.0, 0.0], 4),
        ([100.0, 0.0, 0.0, 100.0, 100.0, 0.0], 2),
        ([0.0, 100.0, 50.0, 50.0, 0.0, 100.0], 3),
        ([0.0, 50.0, 0.0, 100.0, 0.0, 50.0], 3),
    ] {
        let found = computed_meanwhile(percent, batches);
        assert_eq!(found.len(), layers * batches * (TOKENS as usize - 1));
        for pass in found.chunks(layers * batches) {
            let (last, others) = pass.split_last().expect("a pass");
            assert!(
                others.iter().all(|&n| n == 1),
                "{percent:?} x {batches}: {pass:?}"
            );
            assert_eq!(*last, 0, "{percent:?} x {batches}");
        }
    }
    // One batch, and two whose hidden states have to go and come between layers.
    for (hidden, batches) in [(100.0, 1), (50.0, 2)] {
        let found = computed_meanwhile([100.0, 0.0, 0.0, 100.0, hidden, 0.0], batches);
        assert!(found.iter().all(|&n| n == 0), "{batches}: {found:?}");
    }
}
