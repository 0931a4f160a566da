//! Re-pricing a policy by running the real schedule on the virtual-time machine: the whole job where it
//! is small, else each step that the closed form knows (cost/steps.rs), once, on a few of the model's
//! layers. Layers are alike: what more of them take follows from two shortened models.

use super::core::{Core, RunFacts};
use super::run::{Engine, EngineError, Finished, Request, RunOptions, Sink};
use super::sampling::Sampling;
use super::step::{Sequence, Step};
use crate::cost::estimate::{EstimateInput, estimate, estimate_parts};
use crate::cost::figures::{Figures, LaneFigures};
use crate::cost::footprint::{
    BlockShape, CHUNK_ROWS_MAX, Footprint, FootprintInput, RUN_AHEAD_BYTES,
};
use crate::cost::spill::OwnRows;
use crate::cost::steps::{self, Moments};
use crate::cost::terms::Part;
use crate::machine::price::Pricer;
use crate::machine::virtual_time::VirtualMachine;
use crate::machine::{Machine, MachineError};
use crate::model::ModelSpec;
use crate::placement::{Placement, WeightHome};
use crate::tier::{Lane, PerLane, Phase, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::sync::atomic::AtomicBool;

/// Operations that may be simulated one by one for a whole job: a few milliseconds.
const WHOLE_JOB_OPERATIONS: usize = 12_000;
/// Operations of one layer and chunk, roughly.
const OPERATIONS_PER_CHUNK: usize = 14;
/// Layers of the shorter of two shortened models, beside those that weights may run ahead of their use:
/// the first ones meet a pipeline that is filling. The longer one has two more.
const FEW_LAYERS: usize = 2;
const MORE_LAYERS: usize = 2;
/// Decode passes before the first timed one: what runs ahead of a pass must be there.
const WARM_PASSES: usize = 2;
/// Chunks of one sampled pass, all batches together: larger chunks stand for many of 512 rows.
const SAMPLED_CHUNKS: u64 = 64;

/// The estimate of the closed form with times and lanes of the replayed schedule. None where the
/// block's own sequences do not fit its cache, so that there is nothing to run.
pub fn replay(input: &EstimateInput) -> Option<Figures> {
    let timed = if whole_job_operations(input) <= WHOLE_JOB_OPERATIONS {
        whole_job(input, run_facts(input))
    } else {
        sampled(input)
    };
    let timed = timed.ok()?;
    let mut figures = estimate(input);
    let looked_up = looked_up(input);
    figures.prefill_s = timed.prefill_s + looked_up.prefill_s;
    figures.decode_s = timed.decode_s + looked_up.decode_s;
    figures.generated_tokens = timed.generated_tokens;
    figures.lanes = timed.lanes;
    for lane in Lane::ALL {
        figures.lanes[lane].add(&looked_up.lanes[lane]);
    }
    figures.finish(timed.first_tokens);
    Some(figures)
}

/// Fetching token rows takes thousands of small operations that nothing else can overlap with. Replayed
/// sequences repeat one token and fetch nothing; the closed form's part for real ones is added.
fn looked_up(input: &EstimateInput) -> Figures {
    let realised = Placement::new(input.model, input.policy).realised();
    estimate_parts(input, (&realised, |part| part == Part::Tokens))
}

fn whole_job_operations(input: &EstimateInput) -> usize {
    let policy = input.policy;
    let per_chunk = input.model.stages() * OPERATIONS_PER_CHUNK;
    let slots = policy.slots().max(1);
    let blocks = input.workload.prompts().div_ceil(slots);
    let rows = input.workload.prompt_tokens() as usize / CHUNK_ROWS_MAX;
    let longest = input.workload.gen_tokens_max().max(1) as usize;
    let passes = blocks.saturating_mul(policy.num_gpu_batches * (longest + 1));
    per_chunk.saturating_mul(rows.saturating_add(passes))
}

/// What a replay finds.
#[derive(Default)]
struct Timed {
    prefill_s: f64,
    decode_s: f64,
    lanes: PerLane<LaneFigures>,
    generated_tokens: u64,
    first_tokens: u64,
}

/// The facts of a run of this policy, with the file layout that a packed store has.
pub fn run_facts(input: &EstimateInput) -> RunFacts {
    run_facts_with(input, |_| {})
}

fn run_facts_with(input: &EstimateInput, change: impl Fn(&mut BlockShape)) -> RunFacts {
    let placement = Placement::new(input.model, input.policy);
    let mut block = BlockShape::new(input.workload, input.policy, &placement);
    change(&mut block);
    let device = input.rates.device;
    let footprint = Footprint::new(&FootprintInput {
        model: input.model,
        policy: input.policy,
        placement: &placement,
        block: &block,
        device,
        host: input.host,
    });
    let mut offset = round_up(placement.smalls_bytes, PAGE_BYTES);
    let mut matrix_offsets = Vec::with_capacity(placement.matrices.len());
    for (matrix, panel) in placement.matrices.iter().zip(&placement.panel_bytes) {
        matrix_offsets.push(offset);
        offset += round_up(matrix.panels() as u64 * panel, PAGE_BYTES);
    }
    RunFacts {
        own: OwnRows::new(&placement, device, input.host.unpacked),
        model: input.model.clone(),
        policy: input.policy.clone(),
        placement,
        block,
        footprint,
        device,
        matrix_offsets,
        fetches_tokens: false,
        unlocked: input.rates.unlocked.clone(),
    }
}

struct Silent;

impl Sink for Silent {
    fn finished(&mut self, _: Finished) -> Result<(), EngineError> {
        Ok(())
    }
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        Err(EngineError::Output(format!("line {line}: {why}")))
    }
}

/// Every pass of every line, slots refilled as they will be.
fn whole_job(input: &EstimateInput, facts: RunFacts) -> Result<Timed, EngineError> {
    let mut machine = VirtualMachine::new(Pricer::new(input.rates.clone()));
    let request = |(line, l): (usize, &crate::workload::LineLength)| Request {
        line,
        prompt: vec![0; l.prompt_tokens.max(1) as usize],
        max_tokens: l.gen_tokens as usize,
        sampling: Sampling::GREEDY,
    };
    let requests = input
        .workload
        .lines
        .iter()
        .enumerate()
        .map(request)
        .collect();
    let engine = Engine::new(&mut machine, facts, RunOptions { ignore_eos: true });
    let outcome = engine.run(requests, &mut Silent, &AtomicBool::new(false))?;
    Ok(Timed {
        prefill_s: outcome.prefill_s,
        decode_s: outcome.decode_s,
        lanes: machine.lane_figures(),
        generated_tokens: outcome.generated_tokens,
        first_tokens: outcome.first_tokens,
    })
}

/// One pass of a block in virtual time.
#[derive(Clone, Copy)]
struct Pass {
    phase: Phase,
    seconds: f64,
    lanes: PerLane<LaneFigures>,
}

/// Every step of the job, once each, at its mean lengths.
fn sampled(input: &EstimateInput) -> Result<Timed, EngineError> {
    let moments = Moments::new(input.workload);
    let (size, batches) = (input.policy.gpu_batch_size, input.policy.num_gpu_batches);
    let all = steps::steps(&moments, size, batches);
    let layers = input.model.layers;
    let few_layers = FEW_LAYERS + layers_ahead(input);
    let mut timed = if layers <= 2 * few_layers + MORE_LAYERS {
        run_steps(input, &all)?
    } else {
        let longer = few_layers + MORE_LAYERS;
        let few = run_steps(&shortened(input, few_layers).input(input), &all)?;
        let more = run_steps(&shortened(input, longer).input(input), &all)?;
        more.grown(&few, (layers - longer) as f64 / MORE_LAYERS as f64)
    };
    timed.generated_tokens = moments.generated_tokens;
    timed.first_tokens = moments.first_tokens;
    Ok(timed)
}

/// Layers whose streamed weights fit into what may be read ahead; at least the next one's in a double buffer.
fn layers_ahead(input: &EstimateInput) -> usize {
    let placement = Placement::new(input.model, input.policy);
    let homes = [
        WeightHome::CpuShip,
        WeightHome::DiskShip,
        WeightHome::DiskCompute,
    ];
    let streamed = homes.map(|home| placement.stage_bytes(1, home));
    let least = usize::from(input.policy.double_buffer);
    match streamed.iter().sum::<u64>() {
        0 => 0,
        layer => least.max((RUN_AHEAD_BYTES / layer) as usize),
    }
}

/// The same model with fewer layers.
struct Shortened(ModelSpec);

fn shortened(input: &EstimateInput, layers: usize) -> Shortened {
    Shortened(ModelSpec {
        layers,
        ..input.model.clone()
    })
}

impl Shortened {
    fn input<'a>(&'a self, input: &EstimateInput<'a>) -> EstimateInput<'a> {
        EstimateInput {
            model: &self.0,
            ..*input
        }
    }
}

/// Prompt passes come first on an empty pipeline, then as often as there are more blocks on a full one;
/// decode passes are timed once what runs ahead of a pass is there.
fn run_steps(input: &EstimateInput, all: &[steps::Step]) -> Result<Timed, EngineError> {
    let mut machine = VirtualMachine::new(Pricer::new(input.rates.clone()));
    let facts = run_facts_with(input, |block| larger_chunks(block, input));
    let mut core = Core::new(&mut machine, facts);
    let mut timed = Timed::default();
    let mut before = None;
    for kind in all.chunk_by(|_, next| next.phase == Phase::Decode) {
        let mut block = Block::new(&mut core, kind)?;
        for step in kind {
            block.set(step);
            let mut times = step.times;
            if step.phase == Phase::Prefill && before.is_none() {
                timed.add(&block.pass(&mut core, step.phase)?, 1.0_f64.min(times));
                times -= 1.0;
            } else if step.phase == Phase::Decode && before == Some(Phase::Prefill) {
                for _ in 0..WARM_PASSES {
                    block.pass(&mut core, step.phase)?;
                }
            }
            if times > 0.0 {
                timed.add(&block.pass(&mut core, step.phase)?, times);
            }
            before = Some(step.phase);
        }
        block.end(&mut core);
    }
    Ok(timed)
}

/// Bounds a pass's operations; what several chunks of one batch mean for its weights stays.
fn larger_chunks(block: &mut BlockShape, input: &EstimateInput) {
    let chunks = block.batch_rows.div_ceil(block.chunk_rows.max(1));
    let most = (SAMPLED_CHUNKS / input.policy.num_gpu_batches as u64).max(2);
    if chunks > most {
        block.chunk_rows = block.batch_rows.div_ceil(most);
    }
}

/// The sequences of one kind of block, from its prompts to its last tokens.
struct Block {
    sequences: Vec<Sequence>,
    per_batch: usize,
    /// How many of each batch take part in the step.
    sizes: Vec<usize>,
}

impl Block {
    /// As many sequences in each batch as the first step has, with room for what the last ones cache.
    fn new(core: &mut Core, kind: &[steps::Step]) -> Result<Block, EngineError> {
        let room = kind.iter().map(|s| whole(s.context)).max().unwrap_or(1);
        let per_batch = core.facts.policy.gpu_batch_size;
        let mut block = Block {
            sequences: Vec::new(),
            per_batch,
            sizes: Vec::new(),
        };
        block.set(&kind[0]);
        for (batch, &size) in block.sizes.iter().enumerate() {
            for place in 0..size {
                let slot = batch * per_batch + place;
                block.sequences.push(sequence(core, slot, room)?);
            }
        }
        block.set(&kind[0]);
        Ok(block)
    }

    /// Lengths and numbers of a step; sequences that ended early take no part.
    fn set(&mut self, step: &steps::Step) {
        let sizes = step
            .batches
            .iter()
            .flat_map(|&(n, count)| std::iter::repeat_n(whole(n), count.round() as usize));
        self.sizes = sizes.map(|n| n.min(self.per_batch)).collect();
        let (rows, cached) = match step.phase {
            Phase::Prefill => (whole(step.rows), 0),
            Phase::Decode => (1, whole(step.context - step.rows)),
        };
        for s in &mut self.sequences {
            s.tokens.resize(cached + rows, 0);
            s.cached = cached;
            s.prompt_tokens = if cached == 0 { rows } else { cached };
        }
    }

    fn takes_part(&self, sequence: &Sequence) -> bool {
        let (batch, place) = (
            sequence.slot / self.per_batch,
            sequence.slot % self.per_batch,
        );
        self.sizes.get(batch).is_some_and(|&size| place < size)
    }

    fn pass(&self, core: &mut Core, phase: Phase) -> Result<Pass, EngineError> {
        let last = self.sequences.last().map_or(0, |s| s.slot + 1);
        let mut slots: Vec<Option<&Sequence>> = vec![None; last];
        let active = self.sequences.iter().filter(|s| self.takes_part(s));
        active.for_each(|s| slots[s.slot] = Some(s));
        let made = Step::new(&core.step_rules(), &slots);
        let (start_s, before) = (core.machine.now_s(), core.machine.lane_figures());
        let ready = core.run_pass(&made, true);
        core.machine.wait(&ready)?;
        let vocab = core.facts.model.vocab;
        for _ in &made.active {
            // What drawing the tokens takes.
            core.machine.values(Tier::Cpu, 0, vocab);
        }
        Ok(Pass {
            phase,
            seconds: core.machine.now_s() - start_s,
            lanes: minus(core.machine.lane_figures(), &before),
        })
    }

    fn end(&self, core: &mut Core) {
        // The newest first: extents come free from the end.
        let newest_first = self.sequences.iter().rev();
        newest_first.for_each(|s| core.pool.give_back(&s.cache));
    }
}

fn whole(mean: f64) -> usize {
    mean.round().max(1.0) as usize
}

/// A sequence in a slot with room for so many cached tokens.
fn sequence(core: &mut Core, slot: usize, room: usize) -> Result<Sequence, EngineError> {
    let tier = core.facts.placement.cache_tiers[slot];
    let cache = core.pool.reserve(tier, room as u64);
    let cache = cache.ok_or_else(|| {
        EngineError::Machine(MachineError::Memory(
            "the block's cache does not hold its own sequences".into(),
        ))
    })?;
    Ok(Sequence {
        line: slot,
        prompt_tokens: 1,
        max_tokens: 1,
        tokens: Vec::with_capacity(room),
        cached: 0,
        slot,
        cache,
    })
}

fn minus(mut after: PerLane<LaneFigures>, before: &PerLane<LaneFigures>) -> PerLane<LaneFigures> {
    for lane in Lane::ALL {
        let (a, b) = (&mut after[lane], &before[lane]);
        a.prefill_s -= b.prefill_s;
        a.decode_s -= b.decode_s;
        a.work_s -= b.work_s;
        a.bytes -= b.bytes;
    }
    after
}

impl Timed {
    fn add(&mut self, pass: &Pass, times: f64) {
        match pass.phase {
            Phase::Decode => self.decode_s += times * pass.seconds,
            Phase::Prefill => self.prefill_s += times * pass.seconds,
        }
        for lane in Lane::ALL {
            let (sum, one) = (&mut self.lanes[lane], &pass.lanes[lane]);
            sum.prefill_s += times * one.prefill_s;
            sum.decode_s += times * one.decode_s;
            sum.work_s += times * one.work_s;
            sum.bytes += (times * one.bytes as f64).round() as u64;
        }
    }

    /// What a model takes that has `beyond` times as many layers more as this one has over `few`.
    fn grown(&self, few: &Timed, beyond: f64) -> Timed {
        let line = |more: f64, few: f64| (more + beyond * (more - few)).max(0.0);
        let mut grown = Timed {
            prefill_s: line(self.prefill_s, few.prefill_s),
            decode_s: line(self.decode_s, few.decode_s),
            ..Timed::default()
        };
        for lane in Lane::ALL {
            let (more, few) = (&self.lanes[lane], &few.lanes[lane]);
            grown.lanes[lane] = LaneFigures {
                prefill_s: line(more.prefill_s, few.prefill_s),
                decode_s: line(more.decode_s, few.decode_s),
                work_s: line(more.work_s, few.work_s),
                bytes: line(more.bytes as f64, few.bytes as f64).round() as u64,
            };
        }
        grown
    }
}
