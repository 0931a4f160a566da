//! Re-pricing a policy by running the real schedule on the virtual-time machine: the whole job where it
//! is small, else the prompt pass and three decode passes of one block, summed up between them.

use super::core::{Core, RunFacts, RunFiles};
use super::run::{Engine, EngineError, Finished, Request, RunOptions, Sink};
use super::sampling::Sampling;
use super::step::{Sequence, Step};
use crate::cost::estimate::{EstimateInput, estimate};
use crate::cost::figures::{Figures, LaneFigures};
use crate::cost::footprint::{BlockShape, Footprint, FootprintInput};
use crate::machine::ops::FileId;
use crate::machine::price::Pricer;
use crate::machine::virtual_time::VirtualMachine;
use crate::machine::{Machine, MachineError};
use crate::placement::Placement;
use crate::tier::{Lane, PerLane, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::sync::atomic::AtomicBool;

/// Operations that may be simulated one by one for one candidate: a tenth of a second or so.
const MOST_OPERATIONS: usize = 60_000;
/// Operations of one layer and chunk, roughly.
const OPERATIONS_PER_CHUNK: usize = 14;
/// Passes of a sampled replay: the prompts', and three decode passes run twice, in two block sizes.
const SAMPLED_PASSES: usize = 14;

/// The estimate of the closed form with times and lanes of the replayed schedule. None where even the
/// sampled passes have too many operations to be replayed while somebody waits.
pub fn replay(input: &EstimateInput) -> Option<Figures> {
    let facts = run_facts(input);
    let timed = match replay_operations(input, &facts) {
        (whole, _) if whole <= MOST_OPERATIONS => whole_job(input, facts),
        (_, sample) if sample <= MOST_OPERATIONS => sampled(input, facts),
        _ => return None,
    };
    let timed = timed.ok()?;
    let mut figures = estimate(input);
    figures.prefill_s = timed.prefill_s;
    figures.decode_s = timed.decode_s;
    figures.generated_tokens = timed.generated_tokens;
    figures.lanes = timed.lanes;
    figures.finish(timed.first_tokens);
    Some(figures)
}

/// Operations of the whole job, and of its sampled passes.
fn replay_operations(input: &EstimateInput, facts: &RunFacts) -> (usize, usize) {
    let batches = facts.policy.num_gpu_batches;
    let per_decode = facts.model.stages() * batches * OPERATIONS_PER_CHUNK;
    let chunks = facts
        .block
        .batch_rows
        .div_ceil(facts.block.chunk_rows.max(1)) as usize;
    let longest = input.workload.gen_tokens_max().max(1) as usize;
    let blocks = input
        .workload
        .prompts()
        .div_ceil(facts.policy.slots().max(1));
    let whole = blocks * per_decode * (chunks + longest);
    (whole, 2 * chunks * per_decode + SAMPLED_PASSES * per_decode)
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
    let placement = Placement::new(input.model, input.policy);
    let block = BlockShape::new(input.workload, input.policy, &placement);
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
        model: input.model.clone(),
        policy: input.policy.clone(),
        placement,
        block,
        footprint,
        device,
        matrix_offsets,
        files: RunFiles {
            store: FileId::STORE,
            cache: FileId::CACHE,
            hidden: FileId::HIDDEN,
        },
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
#[derive(Clone, Copy, Default)]
struct Pass {
    seconds: f64,
    lanes: PerLane<LaneFigures>,
}

/// Mean lengths: a prompt pass, and decode passes at the first, middle and last token, each run twice so
/// that what runs ahead of a pass is there.
fn sampled(input: &EstimateInput, facts: RunFacts) -> Result<Timed, EngineError> {
    let workload = input.workload;
    let lines = workload.prompts().max(1);
    let slots = facts.policy.slots();
    let prompt = (workload.prompt_tokens() as usize / lines).max(1);
    let generated = (workload.gen_tokens() as usize).div_ceil(lines).max(1);
    let mut machine = VirtualMachine::new(Pricer::new(input.rates.clone()));
    let mut core = Core::new(&mut machine, facts);
    let mut timed = Timed {
        generated_tokens: workload.gen_tokens(),
        first_tokens: lines as u64,
        ..Timed::default()
    };
    for (active, blocks) in [(slots.min(lines), lines / slots), (lines % slots, 1)] {
        if active == 0 || blocks == 0 {
            continue;
        }
        let prefill = one_pass(&mut core, active, (prompt, 0))?;
        timed.add(&prefill, blocks as f64);
        let decodes = generated - 1;
        for (done, weight) in decode_samples(decodes) {
            one_pass(&mut core, active, (prompt, done))?;
            let pass = one_pass(&mut core, active, (prompt, done))?;
            timed.add(&pass, blocks as f64 * weight);
        }
    }
    Ok(timed)
}

/// Tokens done before each sampled decode pass, and how many passes it stands for: Simpson's rule.
fn decode_samples(decodes: usize) -> Vec<(usize, f64)> {
    let n = decodes as f64;
    match decodes {
        0 => Vec::new(),
        1..=3 => (1..=decodes).map(|g| (g, 1.0)).collect(),
        _ => vec![
            (1, n / 6.0),
            (decodes.div_ceil(2), 4.0 * n / 6.0),
            (decodes, n / 6.0),
        ],
    }
}

/// A pass of `active` equal sequences that have `done` tokens generated (0: their prompts come now).
fn one_pass(
    core: &mut Core,
    active: usize,
    (prompt, done): (usize, usize),
) -> Result<Pass, EngineError> {
    let missing = || {
        EngineError::Machine(MachineError::Memory(
            "the block's cache does not hold its own sequences".into(),
        ))
    };
    let mut sequences = Vec::with_capacity(active);
    for slot in 0..active {
        let tier = core.facts.placement.cache_tiers[slot];
        let cache = core
            .pool
            .reserve(tier, (prompt + done.saturating_sub(1)) as u64)
            .ok_or_else(missing)?;
        let cached = if done == 0 { 0 } else { prompt + done - 1 };
        sequences.push(Sequence {
            line: slot,
            tokens: vec![0; prompt + done],
            prompt_tokens: prompt,
            max_tokens: done + 1,
            cached,
            slot,
            cache,
        });
    }
    let slots: Vec<Option<&Sequence>> = sequences.iter().map(Some).collect();
    let step = Step::new(&core.step_rules(), &slots);
    let (start_s, before) = (core.machine.now_s(), core.machine.lane_figures());
    let ready = core.run_pass(&step, true)?;
    core.machine.wait(&ready)?;
    let vocab = core.facts.model.vocab;
    for _ in &step.active {
        // What drawing the tokens takes.
        core.machine.values(Tier::Cpu, 0, vocab);
    }
    let pass = Pass {
        seconds: core.machine.now_s() - start_s,
        lanes: minus(core.machine.lane_figures(), &before),
    };
    sequences.iter().for_each(|s| core.pool.give_back(&s.cache));
    Ok(pass)
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
        let decode = pass.lanes[Lane::CpuCompute].decode_s + pass.lanes[Lane::GpuCompute].decode_s;
        let prefill =
            pass.lanes[Lane::CpuCompute].prefill_s + pass.lanes[Lane::GpuCompute].prefill_s;
        match decode > prefill {
            true => self.decode_s += times * pass.seconds,
            false => self.prefill_s += times * pass.seconds,
        }
        for lane in Lane::ALL {
            let (sum, one) = (&mut self.lanes[lane], &pass.lanes[lane]);
            sum.prefill_s += times * one.prefill_s;
            sum.decode_s += times * one.decode_s;
            sum.work_s += times * one.work_s;
            sum.bytes += (times * one.bytes as f64).round() as u64;
        }
    }
}
