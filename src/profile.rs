//! What one machine can do, as data: rates measured by `probe` or taken from datasheets.
//! Totals only: what is free is read at every plan and exec (machine/os). Parsing lives here, checking in
//! profile/check.rs; measuring (probe/) and pricing (cost/) do not.

mod check;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a profile could not be used.
#[derive(Debug, Error)]
pub enum ProfileError {
    #[error("profile: {0}")]
    Toml(#[from] toml::de::Error),
    #[error("profile: schema {0} is not known to this version (it reads schema 1)")]
    Schema(u32),
    #[error("profile: {key} must be {rule}, but is {value}")]
    Value {
        key: String,
        rule: &'static str,
        value: String,
    },
}

/// Requests of a disk lane that count as large and as small in [contention]; between them, figures follow the
/// logarithm of the size.
pub const LARGE_REQUEST_BYTES: f64 = 8.0 * 1024.0 * 1024.0;
pub const SMALL_REQUEST_BYTES: f64 = 4096.0;
/// Small ones come so many together, as a batch's caches do.
pub const SMALL_REQUESTS: usize = 4;
pub const SMALL_SUFFIX: &str = "_small";
/// Behind a compute lane's name in [contention], where its products wait for memory instead of arithmetic.
pub const MEMORY_SUFFIX: &str = "_memory";

/// The rates and totals of one machine (schema.md, profiles/NAME.toml).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareProfile {
    pub schema: u32,
    pub machine: MachineKey,
    pub memory: MemoryTotals,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuFacts>,
    pub links: Links,
    pub cpu: CpuFacts,
    /// What a lane keeps of its rate while another runs: "cpu_compute+disk_to_cpu" = [first, second], and
    /// "cpu_compute+disk_to_cpu_small" where the disk lane's requests are small: they cost the processor more;
    /// "cpu_compute_memory+disk_to_cpu" where products are bound by memory, which the disk's bytes pass, too.
    #[serde(default)]
    pub contention: BTreeMap<String, [f64; 2]>,
    /// Written only by `calibrate`.
    #[serde(default, skip_serializing_if = "Calibration::is_empty")]
    pub calibration: Calibration,
}

/// What measured runs have taught: multipliers of the cost terms, and where they come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub date: String,
    /// The reports that were fitted.
    pub reports: Vec<String>,
    /// Mean error of the lanes' busy seconds, without the multipliers and with them.
    pub before_pct: f64,
    pub after_pct: f64,
    /// Multiplier per term ("gemm.cpu", "disk_read").
    pub terms: BTreeMap<String, f64>,
}

impl Calibration {
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }
}

/// What must match for a profile to be reused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineKey {
    pub name: String,
    pub date: String,
    pub command: String,
    /// "measured", "datasheet", or a sentence per key where sources are mixed.
    pub provenance: String,
    pub cpu: String,
    pub threads: usize,
    /// Revision of loadmaster's CPU kernels that were measured.
    pub kernels: String,
    pub disk: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryTotals {
    pub cpu_total_bytes: u64,
    pub page_locked_limit_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuFacts {
    pub name: String,
    pub total_bytes: u64,
    /// Device memory that the context, libraries and modules take.
    pub context_bytes: u64,
    /// DRAM that they take in the process.
    #[serde(default)]
    pub host_bytes: u64,
    pub copy_bytes_per_s: f64,
    pub launch_s: f64,
    /// 4-bit weights turned into fp16 before a product of many rows: (their bytes, bytes per second). Empty where
    /// that was not measured: it is then a part of the products' own figures.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub widen_q4_bytes_per_s: Vec<(u64, f64)>,
    #[serde(default)]
    pub gemm: BTreeMap<String, GemmCurve>,
    #[serde(default)]
    pub attention: BTreeMap<String, AttentionRates>,
    /// Bytes of 4-bit data (de)quantised per second, by direction; absent when nothing lossy was probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantise: Option<QuantiseRates>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_to_gpu: Option<GpuLink>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_to_cpu: Option<GpuLink>,
    pub disk_to_cpu: DiskLink,
    pub cpu_to_disk: DiskWriteLink,
}

/// A link between DRAM and GPU: one floor and a curve of (block bytes, bytes per second).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuLink {
    pub latency_s: f64,
    pub pinned: Vec<(u64, f64)>,
    pub unpinned: Vec<(u64, f64)>,
    /// What each direction keeps of its rate while both run, in percent.
    pub both_directions_pct: f64,
}

/// One disk figure: (block bytes, depth, bytes per second, spread in percent of the median). A block is one
/// request, depth is how many of them one call hands to the I/O pool, which runs several beside each other and
/// cuts large ones into pieces; the rate is that of the whole call, its latency included.
pub type DiskPoint = (u64, u32, f64, f64);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLink {
    /// Seconds of a request of one page: the floor under any request, already in every rate.
    pub latency_s: f64,
    /// True where direct I/O was refused and buffered I/O with drop-behind was measured instead.
    #[serde(default)]
    pub buffered: bool,
    pub direct: Vec<DiskPoint>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskWriteLink {
    pub latency_s: f64,
    #[serde(default)]
    pub buffered: bool,
    pub fresh: Vec<DiskPoint>,
    pub overwrite: Vec<DiskPoint>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuFacts {
    pub dram_read_bytes_per_s: f64,
    pub dram_copy_bytes_per_s: f64,
    /// Seconds to start one compute operation on all threads.
    #[serde(default)]
    pub launch_s: f64,
    /// Seconds that pass between the end of an operation and the start of one that waited for it on
    /// another, idle lane: threads wake up. 0 = not measured.
    #[serde(default)]
    pub handover_s: f64,
    /// The same while all threads compute: who wakes up must first get a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover_busy_s: Option<f64>,
    /// Seconds that the CPU's computing loses each time a lane of the disk wakes up meanwhile, besides what
    /// [contention] says of the operation that follows.
    #[serde(default)]
    pub wake_takes_s: f64,
    /// Bytes of logits that the host draws tokens from per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_bytes_per_s: Option<f64>,
    /// Bytes of activations that row-wise operations (norms, residual adds) pass per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rowwise_bytes_per_s: Option<f64>,
    /// Bytes of fp32 keys and values that are put into a 16-bit cache per second, and seconds that a call takes
    /// besides: rows are few and lie apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append_bytes_per_s: Option<f64>,
    #[serde(default)]
    pub append_call_s: f64,
    /// Bytes of the last cache, which all threads share. 0 = not known.
    #[serde(default)]
    pub cache_bytes: u64,
    /// (bytes that pass ÷ that cache, part of them that is still there when they come again). Empty: as other
    /// caches have it (cost/near.rs).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cache_keeps: Vec<(f64, f64)>,
    pub gemm: BTreeMap<String, GemmCurve>,
    /// (rows M, part of its seconds) of a product whose weights are still in that cache, by table as `gemm`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gemm_cached: BTreeMap<String, Vec<(usize, f64)>>,
    pub attention: BTreeMap<String, AttentionRates>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantise: Option<QuantiseRates>,
}

/// GEMM seconds over a grid: (rows M, inputs, outputs, seconds).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemmCurve {
    pub points: Vec<(usize, usize, usize, f64)>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionRates {
    /// KV bytes read per second by one-token attention over long contexts.
    pub decode_bytes_per_s: f64,
    /// FLOP per second of long prompts' attention (4 · queries · keys · hidden, causal half counted).
    pub prefill_flop_per_s: f64,
    /// The same over the tokens looked at: (tokens, bytes or FLOP per second). Short contexts are slower.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_by_tokens: Vec<(usize, f64)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefill_by_tokens: Vec<(usize, f64)>,
    /// One-token attention over the width of the keys: (hidden, bytes per second), at the same tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_by_hidden: Vec<(usize, f64)>,
    /// Seconds that one call of one-token attention takes besides what its bytes take.
    #[serde(default)]
    pub decode_call_s: f64,
}

impl AttentionRates {
    /// Every rate, to be checked or multiplied.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut f64> {
        let curves = self
            .decode_by_tokens
            .iter_mut()
            .chain(&mut self.prefill_by_tokens)
            .chain(&mut self.decode_by_hidden);
        [&mut self.decode_bytes_per_s, &mut self.prefill_flop_per_s]
            .into_iter()
            .chain(curves.map(|point| &mut point.1))
    }
}

/// Source bytes quantised or KV bytes appended per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantiseRates {
    /// fp16 weight bytes turned into 4 bits per second (packing).
    pub pack_bytes_per_s: f64,
    /// fp32 K and V values turned into 4 bits, values' bytes per second.
    pub append_bytes_per_s: f64,
}

impl QuantiseRates {
    pub fn times(self, factor: f64) -> QuantiseRates {
        QuantiseRates {
            pack_bytes_per_s: self.pack_bytes_per_s * factor,
            append_bytes_per_s: self.append_bytes_per_s * factor,
        }
    }
}

impl HardwareProfile {
    /// Parses and checks a profile. Errors name the key and the rule it breaks.
    pub fn from_toml(text: &str) -> Result<Self, ProfileError> {
        let profile: HardwareProfile = toml::from_str(text)?;
        if profile.schema != 1 {
            return Err(ProfileError::Schema(profile.schema));
        }
        profile.check()?;
        Ok(profile)
    }

    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a profile is plain data")
    }

    /// As it was measured.
    pub fn without_calibration(mut self) -> Self {
        self.calibration = Calibration::default();
        self
    }
}

/// Profiles that come with the program, by name.
pub const COMPILED_IN: [(&str, &str); 1] = [("t4-gcp", include_str!("../profiles/t4-gcp.toml"))];

/// The text of a profile that comes with the program.
pub fn compiled_in(name: &str) -> Option<&'static str> {
    let found = COMPILED_IN.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text)
}
