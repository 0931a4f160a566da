//! Figures of a finished run: what the machine's log, the operating system and the engine's outcome say,
//! and the estimate at the lengths that really came.

use crate::cost::estimate::{EstimateInput, estimate};
use crate::cost::figures::{Binding, Figures, LaneFigures, TierFigures};
use crate::cost::footprint::Footprint;
use crate::cost::rates::Rates;
use crate::engine::open::{RunJob, footprint};
use crate::engine::replay::replay;
use crate::engine::{EngineError, Finished, Outcome, Progress, Sink};
use crate::machine::nvml::{self, GpuInfo};
use crate::machine::os;
use crate::plan::PlanBudget;
use crate::report::busiest;
use crate::tier::{PerLane, PerTier, Tier};
use crate::workload::{LineLength, Workload};
use std::collections::BTreeMap;

/// What is gathered while a run goes on.
#[derive(Default)]
pub struct Measured {
    pub budget: PlanBudget,
    /// (line, prompt tokens, most generated tokens) of every line that is to be run.
    pub lines: Vec<(usize, usize, usize)>,
    /// Generated tokens of every line that was started, so far.
    generated: BTreeMap<usize, usize>,
    /// Of lines that are done.
    prompt_tokens: u64,
    progress: Progress,
    pub lanes: PerLane<LaneFigures>,
    pub outcome: Outcome,
    pub peak_bytes: u64,
    /// Of a CUDA device, to ask about its memory.
    pub gpu_bus_id: Option<String>,
    gpu_peak_bytes: u64,
    gpu_before: Option<GpuInfo>,
    others_bytes: u64,
    total_bytes: u64,
    free_bytes: u64,
}

impl Measured {
    pub fn new(budget: PlanBudget, lines: Vec<(usize, usize, usize)>) -> Self {
        Measured {
            budget,
            lines,
            ..Measured::default()
        }
    }

    /// The process's most DRAM, and the device memory that it holds. That does not change while a run goes
    /// on: one arena and what context and libraries took when they were opened.
    pub fn peaks(&mut self) {
        self.peak_bytes = os::process_memory().map_or(0, |m| m.peak_bytes);
        let Some(bus_id) = self.gpu_bus_id.as_deref() else {
            return;
        };
        let by_difference = || {
            let free = nvml::gpu(Some(bus_id))?.free_bytes;
            Some(self.gpu_before.as_ref()?.free_bytes.saturating_sub(free))
        };
        let held = nvml::process_bytes(bus_id).or_else(by_difference);
        self.gpu_peak_bytes = held.unwrap_or(0);
    }

    /// Memory in use by others, before the arenas are mapped.
    pub fn others(&mut self) {
        let bus_id = self.gpu_bus_id.as_deref();
        self.gpu_before =
            bus_id.and_then(|id| nvml::before_the_first(id).or_else(|| nvml::gpu(Some(id))));
        if let Ok(now) = os::memory_now() {
            let own = os::process_memory().map_or(0, |m| m.resident_bytes);
            self.total_bytes = now.total_bytes;
            self.free_bytes = now.free_bytes;
            self.others_bytes = now.total_bytes.saturating_sub(now.free_bytes + own);
        }
    }

    /// The run's own sink, with each line's length noted on the way.
    pub fn watch<'s>(&'s mut self, sink: &'s mut dyn Sink) -> Box<dyn Sink + 's> {
        Box::new(Watch {
            generated: &mut self.generated,
            prompt_tokens: &mut self.prompt_tokens,
            last: &mut self.progress,
            sink,
        })
    }

    /// What a run did that broke off, as of its last whole pass.
    pub fn so_far(&self) -> Outcome {
        let Progress {
            lines_done,
            generated_tokens,
            prefill_s,
            decode_s,
            ..
        } = self.progress;
        Outcome {
            prompt_tokens: self.prompt_tokens,
            generated_tokens,
            first_tokens: (self.generated.len() as u64).min(generated_tokens),
            prefill_s,
            decode_s,
            lines_done,
            ..Outcome::default()
        }
    }

    /// Lengths as they came: lines that ended early count with what they generated, those that were not begun not at
    /// all. All as they were to be where none was begun.
    fn workload(&self) -> Workload {
        let none = self.generated.is_empty();
        let line = |&(line, prompt, most): &(usize, usize, usize)| {
            let came = self.generated.get(&line).copied();
            let gen_tokens = came.or(none.then_some(most))? as u32;
            Some(LineLength {
                prompt_tokens: prompt as u32,
                gen_tokens,
            })
        };
        Workload {
            lines: self.lines.iter().filter_map(line).collect(),
        }
    }
}

struct Watch<'s> {
    generated: &'s mut BTreeMap<usize, usize>,
    prompt_tokens: &'s mut u64,
    last: &'s mut Progress,
    sink: &'s mut dyn Sink,
}

impl Sink for Watch<'_> {
    fn finished(&mut self, line: Finished) -> Result<(), EngineError> {
        self.generated.insert(line.line, line.token_ids.len());
        *self.prompt_tokens += line.prompt_tokens as u64;
        self.sink.finished(line)
    }
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        self.sink.refused(line, why)
    }
    fn progress(&mut self, progress: &Progress) {
        *self.last = *progress;
        self.sink.progress(progress);
    }
    fn logits(&mut self, line: usize, generated: usize, logits: &[f32]) {
        self.generated.insert(line, generated + 1);
        self.sink.logits(line, generated, logits);
    }
}

/// The estimate at the lengths that came, by the schedule where it can be replayed.
pub fn repriced_figures(run: &RunJob, rates: &Rates, measured: &Measured) -> Figures {
    expected_figures(run, rates, (&measured.workload(), measured.budget))
}

/// What a job is expected to take.
pub fn expected_figures(
    run: &RunJob,
    rates: &Rates,
    (workload, budget): (&Workload, PlanBudget),
) -> Figures {
    let budget = PerTier {
        gpu: budget.gpu_bytes.unwrap_or(0),
        cpu: budget.cpu_bytes,
        disk: budget.disk_bytes,
    };
    let input = EstimateInput {
        model: run.model,
        workload,
        rates,
        policy: run.policy,
        host: run.host,
        budget,
    };
    replay(&input).unwrap_or_else(|| estimate(&input))
}

/// What was measured, in the estimate's shape.
pub fn measured_figures(run: &RunJob, measured: &Measured) -> Figures {
    let outcome = &measured.outcome;
    let mut figures = Figures {
        prompt_tokens: outcome.prompt_tokens,
        generated_tokens: outcome.generated_tokens,
        prefill_s: outcome.prefill_s,
        decode_s: outcome.decode_s,
        lanes: measured.lanes,
        binding: Binding {
            prefill: busiest(&measured.lanes, |l| l.prefill_s),
            decode: busiest(&measured.lanes, |l| l.decode_s),
        },
        ..Figures::default()
    };
    figures.finish(outcome.first_tokens);
    let footprint = footprint(run);
    for tier in Tier::ALL {
        figures.tiers[tier] = tier_bytes(&footprint, tier, measured);
    }
    figures
}

/// total = others + free + peak; peak = weights + cache + activations + buffers + process + unaccounted.
fn tier_bytes(footprint: &Footprint, tier: Tier, measured: &Measured) -> TierFigures {
    let mut bytes = TierFigures {
        weights_bytes: footprint.weights_bytes(tier),
        cache_bytes: footprint.cache_bytes(tier),
        activations_bytes: footprint.activations_bytes(tier),
        buffers_bytes: footprint.buffers_bytes(tier),
        process_bytes: footprint.process[tier],
        ..TierFigures::default()
    };
    match tier {
        Tier::Cpu => {
            // On the host machine the Gpu tier is DRAM of this process too.
            let played = match measured.gpu_bus_id {
                None => footprint.arena_bytes(Tier::Gpu),
                Some(_) => 0,
            };
            bytes.peak_bytes = measured.peak_bytes.saturating_sub(played);
            bytes.total_bytes = measured.total_bytes;
            bytes.others_bytes = measured.others_bytes;
            bytes.free_bytes = measured.free_bytes.saturating_sub(bytes.peak_bytes);
        }
        Tier::Gpu if measured.gpu_bus_id.is_some() => {
            // 0 where nothing counts it: what was planned is no measurement.
            bytes.peak_bytes = measured.gpu_peak_bytes;
            if let Some(before) = &measured.gpu_before {
                bytes.total_bytes = before.total_bytes;
                bytes.others_bytes = before.total_bytes - before.free_bytes;
                bytes.free_bytes = before.free_bytes.saturating_sub(bytes.peak_bytes);
            }
        }
        Tier::Gpu => {
            bytes.peak_bytes = footprint.arena_bytes(Tier::Gpu);
            bytes.total_bytes = measured.budget.gpu_bytes.unwrap_or(0);
            bytes.free_bytes = bytes.total_bytes.saturating_sub(bytes.peak_bytes);
        }
        Tier::Disk => bytes.peak_bytes = footprint.total(Tier::Disk),
    }
    let known = bytes.weights_bytes
        + bytes.cache_bytes
        + bytes.activations_bytes
        + bytes.buffers_bytes
        + bytes.process_bytes;
    if tier != Tier::Disk && bytes.peak_bytes > 0 {
        bytes.unaccounted_bytes = bytes.peak_bytes as i64 - known as i64;
    }
    bytes
}
