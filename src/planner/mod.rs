//! The decision: from a model, a workload, a machine's profile and a budget to a plan. This file holds
//! the request and the pipeline; programs, search, ladder and explanations live in the modules below.

pub mod changes;
pub mod document;
pub mod explain;
pub mod flexllmgen;
mod flexllmgen_four_bit;
pub mod flexllmgen_rows;
pub mod flexllmgen_search;
pub mod ladder;
pub mod lp;
pub mod parallel;
pub mod polish;
pub mod realise;
pub mod search;
pub mod shortfall;
pub mod space;

use crate::cost::estimate::{EstimateInput, estimate};
use crate::cost::figures::Figures;
use crate::cost::footprint::HostBytes;
use crate::cost::rates::{Rates, RatesError};
use crate::dtype::Dtype;
use crate::model::ModelSpec;
use crate::plan::{Plan, PlanBudget};
use crate::policy::{DeviceKind, Policy, PolicyError, Shares};
use crate::profile::HardwareProfile;
use crate::tier::PerTier;
use crate::workload::Workload;
use changes::Changes;
use parallel::in_parallel;
use realise::Realised;
use space::JobLengths;
pub use space::{Bounds, Candidate, Fixed, Job, Space};
use std::borrow::Cow;
use thiserror::Error;

/// Candidates whose closed-form time is this near the best are priced again by replay.
const REPLAY_WITHIN: f64 = 0.06;
/// At most this many replays decide.
const REPLAYS: usize = 3;

/// Why no plan could be looked for. That nothing fits is not among them: that is an infeasible plan.
#[derive(Debug, Error)]
pub enum PlanError {
    #[error("{0}")]
    Rates(#[from] RatesError),
    #[error("{0}")]
    Policy(#[from] PolicyError),
    #[error("there is nothing to plan for: give --input, --prompt or --prompt-len")]
    NoWork,
    #[error("--compress {mode} contradicts {flag}: drop one of the two")]
    Compress {
        mode: &'static str,
        flag: &'static str,
    },
    #[error(
        "a prompt of {tokens} tokens is longer than the model's {positions} positions: shorten it"
    )]
    TooLong { tokens: u64, positions: usize },
    #[error("--kv {0} is not a format of the cache: f16 or f32 (4-bit by --compress cache)")]
    Kv(&'static str),
}

/// `--compress`: which lossy formats the planner may choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressMode {
    /// Lossless wherever anything lossless fits.
    #[default]
    Auto,
    Never,
    Weights,
    Cache,
    Both,
    /// Whatever is fastest.
    Fastest,
}

impl CompressMode {
    pub fn name(self) -> &'static str {
        ["auto", "never", "weights", "cache", "both", "fastest"][self as usize]
    }

    /// The (weights, cache) choice that the mode forces, if it does.
    fn forced(self) -> Option<(bool, bool)> {
        match self {
            CompressMode::Auto | CompressMode::Fastest => None,
            CompressMode::Never => Some((false, false)),
            CompressMode::Weights => Some((true, false)),
            CompressMode::Cache => Some((false, true)),
            CompressMode::Both => Some((true, true)),
        }
    }
}

/// What a replay is asked about.
#[derive(Clone, Copy)]
pub struct Replay<'a> {
    pub model: &'a ModelSpec,
    pub workload: &'a Workload,
    pub policy: &'a Policy,
    pub rates: &'a Rates,
    pub host: HostBytes,
    pub budget: PerTier<u64>,
}

/// Runs the real schedule on a virtual clock. None: not possible here, the closed form stands.
pub trait Repricer: Sync {
    fn replay(&self, replay: &Replay) -> Option<Figures>;
}

/// Everything that a plan is made from.
#[derive(Clone, Copy)]
pub struct PlanRequest<'a> {
    pub model: &'a ModelSpec,
    pub fingerprint: Option<&'a str>,
    pub job: Job<'a>,
    pub device: DeviceKind,
    /// As asked: "cpu", "cuda:0", "host:4GiB".
    pub device_name: &'a str,
    pub profile: &'a HardwareProfile,
    /// False ignores the profile's learnt multipliers.
    pub calibrated: bool,
    /// Solve again for what more memory or faster parts would bring.
    pub explain: bool,
    /// What the profile's figures were replaced by, to see what another machine would do.
    pub changes: &'a Changes,
    /// Bytes of the whole process per tier.
    pub budget: PlanBudget,
    pub fixed: Fixed,
    pub compress: CompressMode,
    /// F16 or F32.
    pub kv: Dtype,
    pub threads: usize,
    pub host: HostBytes,
    /// Packed stores that exist already under --offload-dir, native and 4-bit, in bytes.
    pub stored_bytes: [u64; 2],
    pub repricer: Option<&'a dyn Repricer>,
}

/// A chosen policy with its figures.
pub struct Chosen {
    pub realised: Realised,
    pub figures: Figures,
}

/// Finds the best plan, or says what is missing (an infeasible plan).
pub fn plan(request: &PlanRequest) -> Result<Plan, PlanError> {
    check(request)?;
    let mut space = request.space()?;
    force(&mut space.fixed, request)?;
    let found = choose(request, &space);
    Ok(match found {
        Some(found) => document::feasible(request, &space, &found),
        None => document::infeasible(request, &space),
    })
}

/// The chosen plan and the others that were realised on the way, best first.
pub struct Found {
    pub chosen: Chosen,
    pub others: Vec<Realised>,
    /// What was known of all candidates of that level.
    pub bounds: Bounds,
    /// Weights and cache in 4 bits unasked, because nothing else fitted.
    pub forced_lossy: (bool, bool),
}

fn choose(request: &PlanRequest, space: &Space) -> Option<Found> {
    let free = request.compress == CompressMode::Auto;
    let levels: &[fn(&Candidate) -> bool] = if free {
        &[
            |c| c.lossless(),
            |c| c.compress_weight != c.compress_cache,
            |c| c.compress_weight && c.compress_cache,
        ]
    } else {
        &[|_| true]
    };
    for keep in levels {
        let bounds = space.bounds(keep);
        let realised = candidates(request, space, &bounds);
        if let Some((chosen, others)) = best(request, space, realised) {
            let forced_lossy = forced_lossy(request, &chosen.realised.candidate);
            return Some(Found {
                chosen,
                others,
                bounds,
                forced_lossy,
            });
        }
    }
    None
}

/// What of weights and cache is in 4 bits though no flag says so.
fn forced_lossy(request: &PlanRequest, chosen: &Candidate) -> (bool, bool) {
    let (fixed, auto) = (&request.fixed, request.compress == CompressMode::Auto);
    (
        auto && chosen.compress_weight && fixed.compress_weight.is_none(),
        auto && chosen.compress_cache && fixed.compress_cache.is_none(),
    )
}

/// The realised policies of one level, best first. A replay gets something to choose from: where the
/// search ended at once, the best of the other block sizes as well.
fn candidates(request: &PlanRequest, space: &Space, bounds: &Bounds) -> Vec<Realised> {
    let mut realised = search::search_in(space, bounds, &|_| true);
    let first = realised.first().map(|r| r.candidate.slots());
    if let (Some(slots), Some(_)) = (first, request.repricer)
        && realised.len() < REPLAYS
    {
        realised.extend(search::search_in(space, bounds, &|c| c.slots() != slots));
        realised.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
        realised.dedup_by_key(|r| r.candidate);
    }
    realised
}

/// The best of some realised policies: by replay where there is one, else by the closed form.
fn best(
    request: &PlanRequest,
    space: &Space,
    mut realised: Vec<Realised>,
) -> Option<(Chosen, Vec<Realised>)> {
    let first_s = realised.first()?.cost_s;
    let near = |r: &&Realised| r.cost_s <= first_s * (1.0 + REPLAY_WITHIN);
    let tried = match request.repricer {
        Some(_) => realised.iter().take_while(near).count().min(REPLAYS),
        None => 1,
    };
    let rest = realised.split_off(tried);
    let mut priced: Vec<Chosen> = in_parallel(&realised, |realised| {
        Some(Chosen {
            realised: realised.clone(),
            figures: price(request, space, realised),
        })
    });
    priced.sort_by(|a, b| {
        let per_s = |c: &Chosen| speed(&c.figures);
        per_s(b).total_cmp(&per_s(a))
    });
    let mut priced = priced.into_iter();
    let chosen = priced.next()?;
    let others = priced.map(|c| c.realised).chain(rest).collect();
    Some((chosen, others))
}

/// Tokens per second that plans are compared by: generated ones, or read ones where none are asked for.
pub fn speed(figures: &Figures) -> f64 {
    if figures.generated_tokens > 0 || figures.total_s <= 0.0 {
        return figures.throughput_tok_s;
    }
    figures.prompt_tokens as f64 / figures.total_s
}

/// Figures of a realised policy: the replay's, or the closed form's.
pub fn price(request: &PlanRequest, space: &Space, realised: &Realised) -> Figures {
    let workload = space.workload(realised.candidate.slots());
    let replayed = request.repricer.and_then(|repricer| {
        repricer.replay(&Replay {
            model: request.model,
            workload: &workload,
            policy: &realised.policy,
            rates: &space.rates,
            host: request.host,
            budget: space.budget,
        })
    });
    replayed.unwrap_or_else(|| closed_form(space, realised))
}

/// The closed form's figures of a realised policy.
pub fn closed_form(space: &Space, realised: &Realised) -> Figures {
    figures_of(space, &realised.policy, realised.candidate.slots())
}

/// The same of any policy with so many sequences in a block.
fn figures_of(space: &Space, policy: &Policy, slots: usize) -> Figures {
    estimate(&EstimateInput {
        model: space.model,
        workload: &space.workload(slots),
        rates: &space.rates,
        policy,
        host: space.host,
        budget: space.budget,
    })
}

impl<'a> PlanRequest<'a> {
    /// The search space, with formats as fixed by flags only.
    pub fn space(&self) -> Result<Space<'a>, PlanError> {
        self.space_for(self.profile)
    }

    /// The same on another machine.
    pub fn space_for(&self, profile: &HardwareProfile) -> Result<Space<'a>, PlanError> {
        let rates = Rates::new(profile, self.device, self.threads)?;
        let rates = if self.calibrated {
            rates
        } else {
            rates.uncalibrated()
        };
        let job = self.job.within(self.model);
        Ok(Space {
            model: self.model,
            job,
            lengths: JobLengths::new(&job),
            rates: Cow::Owned(rates),
            fixed: self.fixed,
            host: self.host,
            budget: PerTier {
                gpu: self.budget.gpu_bytes.unwrap_or(0),
                cpu: self.budget.cpu_bytes,
                disk: self.budget.disk_bytes,
            },
            coarse: false,
            stored_bytes: self.stored_bytes,
            may_pin: may_pin(self.model, profile),
            kv: self.kv,
            threads: self.threads,
        })
    }
}

/// Judged by the machine's totals, not by the budget: more memory must never unpin. A limit of 0 is
/// an unknown one.
fn may_pin(model: &ModelSpec, profile: &HardwareProfile) -> bool {
    let limit = profile.memory.page_locked_limit_bytes;
    let most = model
        .weights_bytes(false)
        .min(profile.memory.cpu_total_bytes);
    limit == 0 || limit >= most
}

fn is_auto_free(request: &PlanRequest) -> bool {
    let fixed = &request.fixed;
    fixed.compress_weight.is_none() && fixed.compress_cache.is_none()
}

/// Writes what `--compress` forces into the fixed choices.
fn force(fixed: &mut Fixed, request: &PlanRequest) -> Result<(), PlanError> {
    let mode = request.compress;
    if mode != CompressMode::Auto && !is_auto_free(request) {
        let flag = if fixed.compress_weight.is_some() {
            "--compress-weight"
        } else {
            "--compress-cache"
        };
        return Err(PlanError::Compress {
            mode: mode.name(),
            flag,
        });
    }
    if let Some((weights, cache)) = mode.forced() {
        fixed.compress_weight = Some(weights);
        fixed.compress_cache = Some(cache);
    }
    Ok(())
}

fn check(request: &PlanRequest) -> Result<(), PlanError> {
    let (prompts, longest) = match request.job {
        Job::Given(workload) => (workload.prompts(), workload.prompt_tokens_max() as u64),
        Job::BestBlock { prompt_tokens, .. } => (1, prompt_tokens as u64),
    };
    if prompts == 0 || longest == 0 {
        return Err(PlanError::NoWork);
    }
    if longest > request.model.positions as u64 {
        return Err(PlanError::TooLong {
            tokens: longest,
            positions: request.model.positions,
        });
    }
    if !matches!(request.kv, Dtype::F16 | Dtype::F32) {
        return Err(PlanError::Kv(request.kv.name()));
    }
    let fixed = &request.fixed;
    if fixed.gpu_batch_size == Some(0) || fixed.num_gpu_batches == Some(0) {
        return Err(PolicyError::EmptyBatch.into());
    }
    if let Some(percent) = fixed.percent {
        let part = if request.device.has_gpu() {
            fixed.cpu_compute_share.unwrap_or(0.0)
        } else {
            1.0
        };
        let shares = Shares::from_percent(percent, part)?;
        let space = request.space()?;
        let candidate = space
            .candidates()
            .into_iter()
            .next()
            .ok_or(PlanError::NoWork)?;
        space.policy(&candidate, shares).check(request.device)?;
    }
    if fixed.cpu_compute_share.is_some_and(|s| s < 1.0) && !request.device.has_gpu() {
        return Err(PolicyError::NothingToShipTo.into());
    }
    Ok(())
}
