//! The saved plan: one tree that is both `plan --json` and plan.toml (TOML has no null: a key that is
//! not there is unknown), its checks, and the way back to the policy that the engine runs. How a plan
//! is found is planner/.
//!
//! A person may edit `policy`: batch sizes and switches count as written; where `policy.percent` or
//! `policy.cpu_compute_share_percent` differ from `placement.percent` and
//! `placement.cpu_compute_share_percent` (both as realised), the edited numbers win and the fractions
//! under `placement` are not used. Otherwise the fractions are, because they realise the same bytes.

use crate::cost::figures::Figures;
use crate::dtype::Dtype;
use crate::policy::{Compute, DeviceKind, Policy, PolicyError, Shares, WeightShares};
use crate::tier::{PerTier, Tier};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// The schema that this version writes and reads.
pub const PLAN_SCHEMA: &str = "loadmaster.plan/1";
/// Decimals of a share in percent that a person can tell apart.
const PERCENT_TOLERANCE: f64 = 1e-6;
const SUM_TOLERANCE: f64 = 1e-6;
/// More than any machine that this runs on has; each takes memory of its own.
pub const MOST_THREADS: usize = 1024;
/// Sequences of a block; tables are made per sequence.
pub const MOST_SEQUENCES: usize = 1 << 20;

/// Why a plan could not be read or used.
#[derive(Debug, Error)]
pub enum PlanFileError {
    #[error("plan: {0}; make a new one with `loadmaster plan -o plan.toml`")]
    Toml(#[from] toml::de::Error),
    #[error("plan: {0}; make a new one with `loadmaster plan --json`")]
    Json(#[from] serde_json::Error),
    #[error("plan: schema is \"{0}\", but this version reads \"{PLAN_SCHEMA}\": plan again")]
    Schema(String),
    #[error("plan: {key} must be {rule}, but is {value}")]
    Value {
        key: String,
        rule: &'static str,
        value: String,
    },
    #[error("plan: it is infeasible and holds no policy: plan again with more memory")]
    Infeasible,
    #[error("plan: policy: {0}")]
    Policy(#[from] PolicyError),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub schema: String,
    /// First 12 hex digits of the content's SHA-256.
    pub id: String,
    pub feasible: bool,
    pub lossless: bool,
    /// Whether `exec` may turn to 4-bit formats where memory has shrunk since planning. A person may set it.
    #[serde(default)]
    pub may_become_lossy: bool,
    /// As asked by --device: "cpu", "cuda:0", "host:4GiB".
    pub device: String,
    pub flags: String,
    pub next_command: String,
    pub check_command: String,
    pub model: PlanModel,
    pub workload: PlanWorkload,
    pub profile: PlanProfile,
    pub budget: PlanBudget,
    pub policy: Option<PlanPolicy>,
    pub placement: Option<PlanPlacement>,
    pub estimate: Option<Figures>,
    pub setup: PlanSetup,
    pub missing_bytes: PerTier<Option<u64>>,
    /// A budget with which planning again succeeds; only in infeasible plans.
    pub enough_bytes: Option<PlanBudget>,
    pub ladder: Vec<Rung>,
    pub runners_up: Vec<RunnerUp>,
    pub explain: Explain,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanModel {
    pub name: String,
    pub fingerprint: Option<String>,
    pub parameters: u64,
    /// In the store's format as planned.
    pub weights_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanWorkload {
    pub prompts: u64,
    pub prompt_tokens: u64,
    pub prompt_tokens_max: u64,
    pub gen_tokens: u64,
    pub gen_tokens_max: u64,
    /// Tokens whose keys and values are kept: all lines together, and the longest line.
    pub kv_tokens: u64,
    pub kv_tokens_max: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanProfile {
    pub name: String,
    pub measured_at: String,
    /// Figures that were replaced to see what another machine would do.
    #[serde(default)]
    pub changes: Vec<String>,
}

/// Bytes that the process may take of each tier; without a GPU there is no `gpu_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanBudget {
    pub gpu_bytes: Option<u64>,
    pub cpu_bytes: u64,
    pub disk_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanPolicy {
    pub percent: [f64; 6],
    /// Of the weights outside the GPU, the part multiplied where it lies.
    pub cpu_compute_share_percent: f64,
    pub gpu_batch_size: usize,
    pub num_gpu_batches: usize,
    pub pin_weight: bool,
    pub compress_weight: bool,
    pub compress_cache: bool,
    pub cpu_cache_compute: bool,
    #[serde(default)]
    pub double_buffer: bool,
    pub overlap: bool,
    pub compute: Compute,
    pub kv: Dtype,
    pub threads: usize,
}

/// The exact fractions behind `policy.percent`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanPlacement {
    /// `policy.percent` and `policy.cpu_compute_share_percent` as they were planned.
    pub percent: [f64; 6],
    pub cpu_compute_share_percent: f64,
    /// Fractions asked; every layer realises them in whole 64-row panels and whole sequences.
    pub weights: WeightShares,
    pub cache: PerTier<f64>,
    pub activations: PerTier<f64>,
    /// Bytes of weight panels at each home, as realised.
    pub weight_bytes: WeightBytes,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightBytes {
    pub gpu: u64,
    pub cpu_ship: u64,
    pub cpu_compute: u64,
    pub disk_ship: u64,
    pub disk_compute: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSetup {
    pub pack_s: f64,
    /// Weights into memory, and files of the run's own written out.
    #[serde(default)]
    pub load_s: f64,
    pub store_bytes: u64,
    pub spill_bytes: u64,
}

/// One out-of-memory strategy: whether it fits here and what it would bring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rung {
    pub name: String,
    pub lossless: bool,
    pub fits: bool,
    pub throughput_tok_s: Option<f64>,
    pub missing_bytes: PerTier<Option<u64>>,
    pub tier_bytes: PerTier<Option<u64>>,
    pub note: String,
    pub policy: Option<PlanPolicy>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerUp {
    pub throughput_tok_s: f64,
    pub why: String,
    pub policy: PlanPolicy,
}

/// Why the plan is as it is, and what would change it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Explain {
    /// One line on 4-bit, where the plan is lossless and 4-bit would be faster.
    pub four_bit: Option<String>,
    /// One line where bf16 products were asked for and exact ones are as fast.
    #[serde(default)]
    pub exact: Option<String>,
    /// Where lossy settings were needed: the loud line.
    pub warning: Option<String>,
    /// How far the closed form is from the replay that the estimate is, and why where it is far.
    #[serde(default)]
    pub closed_form: Option<String>,
    /// Why the plan is better than the strategies that people know.
    #[serde(default)]
    pub beside_ladder: Option<String>,
    /// Where `exec` found less memory than planned: what it gave up.
    #[serde(default)]
    pub stepped_down: Option<String>,
    pub what_if: Vec<WhatIf>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WhatIf {
    pub change: String,
    pub throughput_tok_s: f64,
    pub gain_percent: f64,
}

impl Plan {
    pub fn from_toml(text: &str) -> Result<Plan, PlanFileError> {
        let plan: Plan = toml::from_str(text)?;
        plan.check()?;
        Ok(plan)
    }

    pub fn from_json(text: &str) -> Result<Plan, PlanFileError> {
        let plan: Plan = serde_json::from_str(text)?;
        plan.check()?;
        Ok(plan)
    }

    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a plan is plain data with finite numbers")
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan is plain data with string keys")
    }

    /// Most bytes of a tier that the process holds at a time, as estimated; none in an infeasible plan.
    pub fn peak_bytes(&self, tier: Tier) -> Option<u64> {
        let figures = self.estimate.as_ref()?;
        Some(figures.tiers[tier].peak_bytes)
    }

    /// Hash of everything but the id itself.
    pub fn content_id(&self) -> String {
        let mut bare = self.clone();
        bare.id.clear();
        let hash = Sha256::digest(bare.to_json().as_bytes());
        hash.iter().take(6).map(|b| format!("{b:02x}")).collect()
    }

    /// True where somebody changed the plan after it was made.
    pub fn is_edited(&self) -> bool {
        self.id != self.content_id()
    }

    pub fn device_kind(&self) -> Result<DeviceKind, PlanFileError> {
        match self.device.split(':').next().unwrap_or("") {
            "cpu" => Ok(DeviceKind::Cpu),
            "host" => Ok(DeviceKind::Host),
            "cuda" => Ok(DeviceKind::Cuda),
            _ => Err(value("device", "cpu, host:SIZE or cuda:N", &self.device)),
        }
    }

    /// The policy to run, checked against the plan's device.
    pub fn to_policy(&self) -> Result<Policy, PlanFileError> {
        let policy = self.policy.as_ref().ok_or(PlanFileError::Infeasible)?;
        let policy = policy.to_policy(self.placement.as_ref())?;
        policy.check(self.device_kind()?)?;
        Ok(policy)
    }

    fn check(&self) -> Result<(), PlanFileError> {
        if self.schema != PLAN_SCHEMA {
            return Err(PlanFileError::Schema(self.schema.clone()));
        }
        let device = self.device_kind()?;
        if self.feasible != self.policy.is_some() {
            let feasible = if self.feasible { "true" } else { "false" };
            return Err(value(
                "feasible",
                "true exactly where there is a policy",
                feasible,
            ));
        }
        if let Some(placement) = &self.placement {
            placement.check()?;
        }
        let Some(policy) = &self.policy else {
            return Ok(());
        };
        policy.check()?;
        if device.has_gpu() && self.budget.gpu_bytes.is_none() {
            return Err(value(
                "budget.gpu_bytes",
                "there on a device with a GPU tier",
                "absent",
            ));
        }
        self.to_policy().map(|_| ())
    }
}

fn value(key: &str, rule: &'static str, value: impl ToString) -> PlanFileError {
    PlanFileError::Value {
        key: key.to_owned(),
        rule,
        value: value.to_string(),
    }
}

impl PlanPolicy {
    /// The policy as a person reads it: `realised` are the shares that panels and sequences gave.
    pub fn new(policy: &Policy, realised: &Shares) -> Self {
        PlanPolicy {
            percent: realised.percent(),
            cpu_compute_share_percent: cpu_compute_share_percent(&realised.weights),
            gpu_batch_size: policy.gpu_batch_size,
            num_gpu_batches: policy.num_gpu_batches,
            pin_weight: policy.pin_weight,
            compress_weight: policy.compress_weight,
            compress_cache: policy.compress_cache,
            cpu_cache_compute: policy.cpu_cache_compute,
            double_buffer: policy.double_buffer,
            overlap: policy.overlap,
            compute: policy.compute,
            kv: policy.kv,
            threads: policy.threads,
        }
    }

    fn to_policy(&self, placement: Option<&PlanPlacement>) -> Result<Policy, PlanFileError> {
        let unedited = placement.filter(|p| {
            let near = |a: f64, b: f64| (a - b).abs() <= PERCENT_TOLERANCE;
            let same = self.percent.iter().zip(p.percent).all(|(&a, b)| near(a, b));
            same && near(self.cpu_compute_share_percent, p.cpu_compute_share_percent)
        });
        let shares = match unedited {
            Some(p) => Shares {
                weights: p.weights,
                cache: p.cache,
                activations: p.activations,
            },
            None => Shares::from_percent(self.percent, self.cpu_compute_share_percent / 100.0)?,
        };
        Ok(Policy {
            shares,
            gpu_batch_size: self.gpu_batch_size,
            num_gpu_batches: self.num_gpu_batches,
            pin_weight: self.pin_weight,
            compress_weight: self.compress_weight,
            compress_cache: self.compress_cache,
            cpu_cache_compute: self.cpu_cache_compute,
            double_buffer: self.double_buffer,
            overlap: self.overlap,
            compute: self.compute,
            kv: self.kv,
            threads: self.threads,
        })
    }

    fn check(&self) -> Result<(), PlanFileError> {
        let share = self.cpu_compute_share_percent;
        if !(0.0..=100.0 + SUM_TOLERANCE).contains(&share) {
            return Err(value(
                "policy.cpu_compute_share_percent",
                "in 0..100",
                share,
            ));
        }
        for (key, count) in [
            ("policy.gpu_batch_size", self.gpu_batch_size),
            ("policy.num_gpu_batches", self.num_gpu_batches),
        ] {
            if count == 0 || count > MOST_SEQUENCES {
                return Err(value(key, "at least 1 and at most 1048576", count));
            }
        }
        // Both are in range now: their product cannot overflow.
        let sequences = self.gpu_batch_size * self.num_gpu_batches;
        if sequences > MOST_SEQUENCES {
            let key = "policy.gpu_batch_size x num_gpu_batches";
            return Err(value(key, "at most 1048576 sequences", sequences));
        }
        if self.threads == 0 || self.threads > MOST_THREADS {
            return Err(value(
                "policy.threads",
                "at least 1 and at most 1024",
                self.threads,
            ));
        }
        if !matches!(self.kv, Dtype::F16 | Dtype::F32) {
            return Err(value("policy.kv", "f16 or f32", self.kv.name()));
        }
        Ok(())
    }
}

/// Part of the weights outside the GPU that is multiplied where it lies; 100 where all are on the GPU.
fn cpu_compute_share_percent(weights: &WeightShares) -> f64 {
    let away = weights.cpu() + weights.disk();
    if away <= 0.0 {
        return 100.0;
    }
    100.0 * (weights.cpu_compute + weights.disk_compute) / away
}

impl PlanPlacement {
    fn check(&self) -> Result<(), PlanFileError> {
        let tiers = |s: &PerTier<f64>| [s.gpu, s.cpu, s.disk];
        check_group("placement.weights", &self.weights.as_array())?;
        check_group("placement.cache", &tiers(&self.cache))?;
        check_group("placement.activations", &tiers(&self.activations))
    }
}

fn check_group(key: &str, shares: &[f64]) -> Result<(), PlanFileError> {
    if let Some(bad) = shares
        .iter()
        .find(|s| !(0.0..=1.0 + SUM_TOLERANCE).contains(*s))
    {
        return Err(value(key, "made of fractions in 0..1", bad));
    }
    let sum: f64 = shares.iter().sum();
    if (sum - 1.0).abs() > SUM_TOLERANCE {
        return Err(value(key, "a group that sums to 1", sum));
    }
    Ok(())
}
