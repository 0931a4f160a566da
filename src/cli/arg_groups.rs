//! The groups of flags that several commands share: prompts, results, machine, policy, places.
//! The commands themselves and which flags exclude each other across groups live in args.rs.

use super::values::{
    self, DeviceChoice, NotOffered, attn_sparsity_hint, path_hint, sep_layer_hint,
};
use crate::planner::changes::Changes;
use crate::policy::Compute;
use crate::units::parse_bytes;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A path that means standard input or standard output.
pub const DASH: &str = "-";
/// What `--prompt-len` and `--gen-len` are where neither a flag nor a plan says.
pub const DEFAULT_PROMPT_LEN: u32 = 512;
pub const DEFAULT_GEN_LEN: u32 = 32;

/// Where everything is written.
#[derive(Clone, Debug, Args)]
pub struct PlaceArgs {
    /// Directory for profiles, packed weights and spilled KV cache
    /// [default: $LOADMASTER_HOME, else the user's cache directory]
    #[arg(long, value_name = "DIR", global = true)]
    offload_dir: Option<PathBuf>,
}

impl PlaceArgs {
    pub fn offload_dir(&self) -> PathBuf {
        self.offload_dir.clone().unwrap_or_else(default_offload_dir)
    }
}

/// `$LOADMASTER_HOME`, else `$XDG_CACHE_HOME/loadmaster`, else `~/.cache/loadmaster`.
pub fn default_offload_dir() -> PathBuf {
    offload_dir_from(|name| std::env::var_os(name))
}

pub(super) fn offload_dir_from(var: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let path = |name| var(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // The XDG rules say that a relative path there is to be ignored.
    let cache = || path("XDG_CACHE_HOME").filter(|p| p.is_absolute());
    let home = || path("HOME").unwrap_or_else(|| PathBuf::from("."));
    path("LOADMASTER_HOME").unwrap_or_else(|| {
        cache()
            .unwrap_or_else(|| home().join(".cache"))
            .join("loadmaster")
    })
}

/// What is generated from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Work")]
pub struct WorkArgs {
    /// Prompts: .txt (one a line), .jsonl, or - for standard input (JSON if its first line begins with {)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "prompt_len", "num_prompts"])]
    pub input: Option<PathBuf>,
    /// Prompts as text; - reads one from standard input
    #[arg(long, value_name = "TEXT", num_args = 1.., conflicts_with_all = ["prompt_len", "num_prompts"])]
    pub prompt: Vec<String>,
    /// Tokens of each random prompt [default: 512, or the plan's]
    #[arg(long, value_name = "TOKENS", value_parser = values::tokens)]
    pub prompt_len: Option<u32>,
    /// Tokens to generate for a line that has no max_tokens [default: 32, or the plan's]
    #[arg(long, value_name = "TOKENS", value_parser = values::tokens)]
    pub gen_len: Option<u32>,
    /// Random prompts [default: one best block, or the plan's]
    #[arg(long, value_name = "N", value_parser = values::prompts)]
    pub num_prompts: Option<usize>,
    /// Seed of random prompts, of sampling and of synth weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Generate on after the end token
    #[arg(long)]
    pub ignore_eos: bool,
}

impl WorkArgs {
    /// True where no prompt is given: random ones are made.
    pub fn is_random(&self) -> bool {
        self.input.is_none() && self.prompt.is_empty()
    }
}

/// Where results go.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct ResultArgs {
    /// Write result lines (JSON) here as they finish [default: - = stdout]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replace what --output and --report name
    #[arg(long)]
    pub overwrite: bool,
    /// Save the report of the run here, as JSON, for `loadmaster compare`
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

impl ResultArgs {
    /// The file that results go to; None = standard output.
    pub fn output_file(&self) -> Option<&Path> {
        self.output.as_deref().filter(|p| *p != Path::new(DASH))
    }
}

/// When 4-bit weights and cache may be taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Only when nothing lossless fits
    #[default]
    Auto,
    /// Lossless always
    Never,
    /// 4-bit weights
    Weights,
    /// 4-bit KV cache
    Cache,
    /// 4-bit weights and KV cache
    Both,
    /// Whatever is fastest
    Fastest,
}

/// Format of the KV cache where it is not 4-bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kv {
    /// f32 for f32 checkpoints, else f16
    #[default]
    Auto,
    F32,
    F16,
}

/// What the machine is and how much of it may be used.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub struct LimitArgs {
    /// auto, cpu, cuda:N, or host:SIZE (DRAM plays a GPU of that size, for tests)
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = values::device)]
    pub device: DeviceChoice,
    /// GPU memory for the whole process [default: free - 512MiB]
    #[arg(long = "gpu-mem", value_name = "SIZE", value_parser = parse_bytes)]
    pub gpu_mem_bytes: Option<u64>,
    /// DRAM for the whole process [default: what is available - max(1GiB, 10%), or - 10%
    /// where there is less than 4GiB in all]
    #[arg(long = "cpu-mem", value_name = "SIZE", value_parser = parse_bytes)]
    pub cpu_mem_bytes: Option<u64>,
    /// Disk for packed weights and spilled cache [default: free - 5%]
    #[arg(long = "disk-space", value_name = "SIZE", value_parser = parse_bytes)]
    pub disk_space_bytes: Option<u64>,
    /// Threads that compute [default: physical cores that this process may use]
    #[arg(long, value_name = "N", value_parser = values::threads)]
    pub threads: Option<usize>,
    /// A machine's measured rates: a file, or the name of one that is built in
    /// [default: this machine's, measured first where there is none]
    #[arg(long, value_name = "FILE|NAME")]
    pub profile: Option<String>,
    /// Leave what `loadmaster calibrate` has taught this profile out of account
    #[arg(long)]
    pub no_calibration: bool,
    #[command(flatten)]
    pub place: PlaceArgs,
}

impl LimitArgs {
    /// Nothing limited: this machine as it is.
    pub fn of_place(place: &PlaceArgs) -> LimitArgs {
        LimitArgs {
            device: DeviceChoice::Auto,
            gpu_mem_bytes: None,
            cpu_mem_bytes: None,
            disk_space_bytes: None,
            threads: None,
            profile: None,
            no_calibration: false,
            place: place.clone(),
        }
    }
}

/// Decisions that are the planner's unless given.
#[derive(Debug, Args)]
#[command(next_help_heading = "Policy (each is the planner's choice unless given)")]
pub struct PolicyArgs {
    /// When 4-bit weights and cache may be taken
    #[arg(long, value_enum, value_name = "WHEN", default_value_t)]
    pub compress: Compress,
    /// Percent of weights on GPU and in DRAM, cache on GPU and in DRAM, activations on GPU and in
    /// DRAM; the rest of each goes to disk
    #[arg(long, num_args = 6, action = ArgAction::Set, allow_negative_numbers = true,
        value_names = ["WG", "WC", "CG", "CC", "HG", "HC"], value_parser = values::percentage)]
    percent: Option<Vec<f64>>,
    /// Sequences that compute together
    #[arg(long, value_name = "N", value_parser = values::sequences)]
    pub gpu_batch_size: Option<usize>,
    /// Batches that share one pass over the weights
    #[arg(long, value_name = "N", value_parser = values::sequences)]
    pub num_gpu_batches: Option<usize>,
    /// Percent of the weights outside the GPU that the CPU multiplies where they lie: those in DRAM
    /// first, then those on disk
    #[arg(long = "cpu-compute-share", value_name = "PERCENT", allow_negative_numbers = true,
        value_parser = values::percentage)]
    pub cpu_compute_share_percent: Option<f64>,
    /// Page-lock the weights in DRAM
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_missing_value = "1", value_parser = values::switch)]
    pub pin_weight: Option<bool>,
    /// Copy while computing
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_missing_value = "1", value_parser = values::switch)]
    pub overlap: Option<bool>,
    /// Attention over cache in DRAM on the CPU
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_missing_value = "1", value_parser = values::switch)]
    pub cpu_cache_compute: Option<bool>,
    /// Force 4-bit weights on or off
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_missing_value = "1", value_parser = values::switch,
        conflicts_with = "compress")]
    pub compress_weight: Option<bool>,
    /// Force a 4-bit KV cache on or off
    #[arg(long, value_name = "0|1", num_args = 0..=1, default_missing_value = "1", value_parser = values::switch,
        conflicts_with = "compress")]
    pub compress_cache: Option<bool>,
    /// Arithmetic, sums always in fp32: exact = weights as stored times fp32 activations (4-bit weights
    /// times 8-bit ones; on a GPU, many rows of activations in fp16), bf16 = weights and activations
    /// rounded to bf16 (changes results), fp32 = as exact, but always times fp32 activations
    #[arg(long, value_name = "HOW", default_value = "exact",
        value_parser = PossibleValuesParser::new(Compute::ALL.map(Compute::name)).map(|name| compute(&name)))]
    pub compute: Compute,
    /// Format of the KV cache where it is not 4-bit
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub kv: Kv,
}

/// One of `Compute`'s names.
fn compute(name: &str) -> Compute {
    let named = |compute: &Compute| compute.name() == name;
    Compute::ALL.into_iter().find(named).unwrap_or_default()
}

impl PolicyArgs {
    /// The six percentages, if given.
    pub fn percent(&self) -> Option<[f64; 6]> {
        self.percent.as_deref()?.try_into().ok()
    }
}

/// Figures of another machine in place of the profile's.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "What if (in place of the profile's figures)")]
pub struct WhatIfArgs {
    /// Disk reads at this rate, like 7GB/s
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    disk_read: Option<f64>,
    /// Disk writes at this rate
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    disk_write: Option<f64>,
    /// Copies between DRAM and GPU at this rate
    #[arg(long, value_name = "RATE", value_parser = values::rate)]
    link: Option<f64>,
    /// CPU and DRAM so many times as fast
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true, value_parser = values::factor)]
    cpu_speed: Option<f64>,
    /// GPU so many times as fast
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true, value_parser = values::factor)]
    gpu_speed: Option<f64>,
}

impl WhatIfArgs {
    pub fn changes(&self) -> Changes {
        Changes {
            disk_read_bytes_per_s: self.disk_read,
            disk_write_bytes_per_s: self.disk_write,
            link_bytes_per_s: self.link,
            cpu_speed: self.cpu_speed,
            gpu_speed: self.gpu_speed,
            ..Changes::default()
        }
    }
}

/// Flags of FlexLLMGen that have no counterpart: each says what to do instead.
#[derive(Debug, Args)]
pub struct HintArgs {
    #[arg(long, hide = true, value_parser = path_hint)]
    path: Option<NotOffered>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "1", value_parser = sep_layer_hint)]
    sep_layer: Option<NotOffered>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "1", value_parser = attn_sparsity_hint)]
    attn_sparsity: Option<NotOffered>,
}
