//! Generation: prompts enter free slots, passes run, tokens are drawn, finished lines leave at once and
//! their slots take the next prompts. Where bytes lie and what moves is the core's.

use super::core::{Core, RunFacts};
use super::sampling::{Draw, Sampling, sample};
use super::step::{Sequence, Step};
use crate::checkpoint::CheckpointError;
use crate::cost::footprint::Buffer;
use crate::machine::{Machine, MachineError};
use crate::tier::{PerTier, Phase, Tier};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// One line to generate from. `prompt` is not empty and fits the model's positions.
#[derive(Clone, Debug)]
pub struct Request {
    pub line: usize,
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
}

/// Why a line ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The end token came.
    Stop,
    /// Its own limit, or the model's last position.
    Length,
}

/// A line that is done.
#[derive(Clone, Debug)]
pub struct Finished {
    pub line: usize,
    pub prompt_tokens: usize,
    /// Generated tokens only, a final end token included.
    pub token_ids: Vec<u32>,
    pub reason: FinishReason,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    pub lines_done: usize,
    pub lines_waiting: usize,
    pub generated_tokens: u64,
    pub prefill_s: f64,
    pub decode_s: f64,
}

/// Where results go while the run goes on.
pub trait Sink {
    /// A line is done; an error here ends the run.
    fn finished(&mut self, line: Finished) -> Result<(), EngineError>;
    /// A line that this plan can never hold; the run goes on without it.
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError>;
    /// After every pass.
    fn progress(&mut self, _progress: &Progress) {}
    /// Last-position logits of a line, before its token number `generated` is drawn.
    fn logits(&mut self, _line: usize, _generated: usize, _logits: &[f32]) {}
}

/// Why a run ended early.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Source(#[from] CheckpointError),
    #[error("{0}")]
    Output(String),
    #[error("interrupted before the first pass")]
    Interrupted,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// Generated tokens that steps counted as prefill returned.
    pub first_tokens: u64,
    pub prefill_s: f64,
    pub decode_s: f64,
    pub lines_done: usize,
    pub lines_refused: usize,
    pub interrupted: bool,
}

/// Switches of generation that are not part of the plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    pub ignore_eos: bool,
}

/// The runtime over one machine.
pub struct Engine<'m> {
    core: Core<'m>,
    slots: Vec<Option<Active>>,
    waiting: VecDeque<Request>,
    options: RunOptions,
    outcome: Outcome,
}

struct Active {
    sequence: Sequence,
    sampling: Sampling,
}

impl<'m> Engine<'m> {
    /// An engine whose weights are at home already (load.rs) or never needed (virtual machine).
    pub fn new(machine: &'m mut dyn Machine, facts: RunFacts, options: RunOptions) -> Self {
        let slots = (0..facts.policy.slots()).map(|_| None).collect();
        let core = Core::new(machine, facts);
        Engine {
            core,
            slots,
            waiting: VecDeque::new(),
            options,
            outcome: Outcome::default(),
        }
    }

    /// Generates for all requests. Stops between passes when `stop` is set; finished lines are out by then.
    pub fn run(
        mut self,
        requests: Vec<Request>,
        sink: &mut dyn Sink,
        stop: &AtomicBool,
    ) -> Result<Outcome, EngineError> {
        self.waiting = requests.into();
        loop {
            self.admit(sink)?;
            if self.slots.iter().all(Option::is_none) {
                break;
            }
            if stop.load(Ordering::Relaxed) {
                self.outcome.interrupted = true;
                break;
            }
            if let Err(error) = self.pass(sink) {
                // What was done so far is known all the same.
                sink.progress(&self.progress());
                return Err(error);
            }
        }
        Ok(self.outcome)
    }

    fn pass(&mut self, sink: &mut dyn Sink) -> Result<(), EngineError> {
        let start_s = self.core.machine.now_s();
        let sequences: Vec<Option<&Sequence>> = self
            .slots
            .iter()
            .map(|s| s.as_ref().map(|a| &a.sequence))
            .collect();
        let step = Step::new(&self.core.step_rules(), &sequences);
        let ready = self.core.run_pass(&step, self.more_to_come());
        self.core.machine.wait(&ready)?;
        let ended = self.draw(&step, sink);
        let took_s = self.core.machine.now_s() - start_s;
        match step.phase {
            Phase::Prefill => self.outcome.prefill_s += took_s,
            Phase::Decode => self.outcome.decode_s += took_s,
        }
        for (slot, reason) in ended {
            self.leave(slot, reason, sink)?;
        }
        sink.progress(&self.progress());
        Ok(())
    }

    /// Whether some line goes on after this pass, as far as lengths can tell.
    fn more_to_come(&self) -> bool {
        let goes_on = |a: &Active| a.sequence.generated() + 1 < a.sequence.max_tokens;
        !self.waiting.is_empty() || self.slots.iter().flatten().any(goes_on)
    }

    fn progress(&self) -> Progress {
        let o = &self.outcome;
        Progress {
            lines_done: o.lines_done,
            lines_waiting: self.waiting.len(),
            generated_tokens: o.generated_tokens,
            prefill_s: o.prefill_s,
            decode_s: o.decode_s,
        }
    }

    /// Draws a token for every sequence of the step; returns those that ended.
    fn draw(&mut self, step: &Step, sink: &mut dyn Sink) -> Vec<(usize, FinishReason)> {
        let vocab = self.core.facts.model.vocab;
        let logits = self.core.layout.buffer(Tier::Cpu, Buffer::Logits).offset;
        let mut ended = Vec::new();
        for (row, &slot) in step.active.iter().enumerate() {
            let values =
                self.core
                    .machine
                    .values(Tier::Cpu, logits + (row * vocab * 4) as u64, vocab);
            let Some(active) = &mut self.slots[slot] else {
                continue;
            };
            let sequence = &mut active.sequence;
            sequence.cached = sequence.tokens.len();
            let generated = sequence.generated();
            if generated < sequence.max_tokens {
                let token = values.map_or(0, |values| {
                    sink.logits(sequence.line, generated, values);
                    let position = sequence.tokens.len() as u64;
                    sample(
                        values,
                        &active.sampling,
                        Draw {
                            line: sequence.line as u64,
                            position,
                        },
                    )
                });
                sequence.tokens.push(token);
                self.outcome.generated_tokens += 1;
                self.outcome.first_tokens += (step.phase == Phase::Prefill) as u64;
                let eos = values.is_some()
                    && self.core.facts.model.eos_ids.contains(&token)
                    && !self.options.ignore_eos;
                if eos {
                    ended.push((slot, FinishReason::Stop));
                    continue;
                }
            }
            if sequence.generated() >= sequence.max_tokens {
                ended.push((slot, FinishReason::Length));
            }
        }
        ended
    }

    fn leave(
        &mut self,
        slot: usize,
        reason: FinishReason,
        sink: &mut dyn Sink,
    ) -> Result<(), EngineError> {
        let Some(active) = self.slots[slot].take() else {
            return Ok(());
        };
        let sequence = active.sequence;
        self.core.pool.give_back(&sequence.cache);
        self.outcome.lines_done += 1;
        self.outcome.prompt_tokens += sequence.prompt_tokens as u64;
        sink.finished(Finished {
            line: sequence.line,
            prompt_tokens: sequence.prompt_tokens,
            token_ids: sequence.tokens[sequence.prompt_tokens..].to_vec(),
            reason,
        })
    }

    /// Lets waiting prompts into free slots, in input order, as far as their tiers have room.
    fn admit(&mut self, sink: &mut dyn Sink) -> Result<(), EngineError> {
        while let Some(request) = self.waiting.pop_front() {
            let positions = self.core.facts.model.positions;
            let limit = request
                .max_tokens
                .min((positions + 1).saturating_sub(request.prompt.len()));
            if let Some(sequence) = self.place(&request, limit) {
                let (slot, sampling) = (sequence.slot, request.sampling);
                self.slots[slot] = Some(Active { sequence, sampling });
            } else if self.slots.iter().all(Option::is_none) {
                let why = self.why_not(&request, limit);
                self.outcome.lines_refused += 1;
                sink.refused(request.line, why)?;
            } else {
                self.waiting.push_front(request);
                break;
            }
        }
        Ok(())
    }

    fn why_not(&self, request: &Request, limit: usize) -> String {
        let block = &self.core.facts.block;
        let kv = Tier::ALL
            .iter()
            .map(|&t| block.kv_tokens[t])
            .max()
            .unwrap_or(0);
        format!(
            "a prompt of {} tokens with {} to generate is more than this plan holds (prompts up to {} tokens, {kv} tokens of cache): plan with this input",
            request.prompt.len(),
            limit,
            block.batch_rows
        )
    }

    /// A slot whose tiers have room for the line now.
    fn place(&mut self, request: &Request, limit: usize) -> Option<Sequence> {
        let rows = request.prompt.len() as u64;
        let tokens = rows + (limit as u64).saturating_sub(1);
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_some() || !self.step_has_room(slot, (rows, tokens)) {
                continue;
            }
            let tier = self.core.facts.placement.cache_tiers[slot];
            if let Some(cache) = self.core.pool.reserve(tier, tokens) {
                let mut all = Vec::with_capacity(request.prompt.len() + limit);
                all.extend_from_slice(&request.prompt);
                return Some(Sequence {
                    line: request.line,
                    tokens: all,
                    prompt_tokens: request.prompt.len(),
                    max_tokens: limit,
                    cached: 0,
                    slot,
                    cache,
                });
            }
        }
        None
    }

    /// Whether the slot's batch and tiers can take `rows` more rows and `tokens` more cached tokens.
    fn step_has_room(&self, slot: usize, (rows, tokens): (u64, u64)) -> bool {
        let block = &self.core.facts.block;
        let placement = &self.core.facts.placement;
        let per_batch = self.core.facts.policy.gpu_batch_size;
        let mut batch_rows = rows;
        let (mut hidden, mut batch_hidden, mut batch_kv) =
            (PerTier::default(), PerTier::default(), PerTier::default());
        hidden[placement.hidden_tiers[slot]] = rows;
        batch_hidden[placement.hidden_tiers[slot]] = rows;
        batch_kv[placement.cache_tiers[slot]] = tokens;
        for active in self.slots.iter().flatten() {
            let s = &active.sequence;
            let next = s.next_rows() as u64;
            hidden[placement.hidden_tiers[s.slot]] += next;
            if s.slot / per_batch == slot / per_batch {
                batch_rows += next;
                batch_hidden[placement.hidden_tiers[s.slot]] += next;
                let whole = (s.prompt_tokens + s.max_tokens.saturating_sub(1)) as u64;
                batch_kv[placement.cache_tiers[s.slot]] += whole;
            }
        }
        let fits = |used: &PerTier<u64>, room: &PerTier<u64>| {
            Tier::ALL.iter().all(|&t| used[t] <= room[t])
        };
        batch_rows <= block.batch_rows
            && fits(&hidden, &block.hidden_rows)
            && fits(&batch_hidden, &block.batch_hidden_rows)
            && fits(&batch_kv, &block.batch_kv_tokens)
    }
}
