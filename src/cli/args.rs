//! The command line: which commands and flags there are, their help, and which exclude each other.
//! How one value is read lives in values.rs; what a command does with them lives in its own file.

use super::values::{
    self, DeviceChoice, NotOffered, attn_sparsity_hint, path_hint, sep_layer_hint,
};
use crate::dtype::Dtype;
use crate::model::ModelSpec;
use crate::policy::{Compute, Shares};
use crate::units::parse_bytes;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What `--prompt-len` and `--gen-len` are where neither a flag nor a plan says.
pub const DEFAULT_PROMPT_LEN: u32 = 512;
pub const DEFAULT_GEN_LEN: u32 = 32;
/// What Hugging Face writes; the same as `checkpoint::DEFAULT_SHARD_BYTES`.
const DEFAULT_SHARD_SIZE: &str = "5GB";
/// A path that means standard input or standard output.
pub const DASH: &str = "-";

const CLI_EXAMPLES: &str = "\
Examples:
  loadmaster run --model synth:opt-125m --prompt-len 64 --gen-len 16 --num-prompts 8
  loadmaster plan --model opt-30b --cpu-mem 16GiB -o plan.toml && loadmaster exec plan.toml

Sizes need a unit (16GiB, 1.5GB). Exit code: 0 done, 1 failed, 2 usage error.";

const PLAN_EXAMPLES: &str = "\
Examples:
  loadmaster plan --model opt-175b --device cpu --cpu-mem 16GiB --disk-space 400GiB
  loadmaster plan --model ./opt-6.7b --input prompts.jsonl --explain -o plan.toml
  loadmaster plan --model opt-30b --device host:4GiB --percent 20 80 0 100 0 100 --gpu-batch-size 16";

const RUN_EXAMPLES: &str = "\
Examples:
  loadmaster run --model ./opt-1.3b --prompt \"Paris is\" \"Rome is\" --gen-len 16
  loadmaster run --model ./opt-13b --cpu-mem 8GiB --input prompts.txt --output results.jsonl
  loadmaster run --model synth:opt-1.3b --prompt-len 128 --gen-len 32 --num-prompts 16";

/// Plans where an OPT model's weights, KV cache and activations go over GPU, DRAM and disk, runs the
/// plan, and says how right it was.
#[derive(Debug, Parser)]
#[command(name = "loadmaster", version, after_help = CLI_EXAMPLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure this machine into a profile
    Probe(ProbeArgs),
    /// Find the fastest plan that fits, and show what it costs and why
    Plan(Box<PlanArgs>),
    /// Run a saved plan
    #[command(
        after_help = "Example:\n  loadmaster exec plan.toml --input prompts.txt --output results.jsonl --report report.json"
    )]
    Exec(ExecArgs),
    /// Show predicted against measured figures of runs
    #[command(after_help = "Example:\n  loadmaster compare report-a.json report-b.json")]
    Compare(CompareArgs),
    /// Plan, run and compare in one go
    Run(Box<RunArgs>),
    /// Write a random-weight checkpoint of a named size, in the real file format
    #[command(after_help = "Example:\n  loadmaster synth opt-125m --out ./opt-125m-random")]
    Synth(SynthArgs),
    /// List or remove packed weights
    Store(StoreArgs),
}

#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Write the profile here too, as TOML
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Measure again even where a profile of this machine is there
    #[arg(long)]
    pub force: bool,
    /// Memory that the probe may take [default: 350MiB]
    #[arg(long = "cpu-mem", value_name = "SIZE", value_parser = parse_bytes)]
    pub cpu_mem_bytes: Option<u64>,
    /// Threads that compute [default: physical cores that this process may use]
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print the profile as one JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = PLAN_EXAMPLES)]
pub struct PlanArgs {
    #[command(flatten)]
    pub solve: SolveArgs,
    /// Save the plan here, as TOML, for `loadmaster exec`
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Also say what binds, what more memory or a faster link would bring, and why others lost
    #[arg(long, help_heading = "Output")]
    pub explain: bool,
}

#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    #[command(flatten)]
    pub solve: SolveArgs,
    #[command(flatten)]
    pub results: ResultArgs,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// A plan saved by `loadmaster plan -o`
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    #[command(flatten)]
    pub work: WorkArgs,
    #[command(flatten)]
    pub results: ResultArgs,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print the report as one JSON document on stdout; results then need --output FILE
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Reports saved by `exec --report` or `run --report`
    #[arg(value_name = "REPORT", required = true)]
    pub reports: Vec<PathBuf>,
    /// Print one JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SynthArgs {
    /// A size's name, like opt-1.3b
    #[arg(value_name = "MODEL", value_parser = values::model_size)]
    pub model: ModelSpec,
    /// The directory to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the random weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Format of the weights: f16, bf16 or f32
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = values::weight_format)]
    pub dtype: Dtype,
    /// Largest file of weights
    #[arg(long = "shard-size", value_name = "SIZE", value_parser = parse_bytes,
        default_value = DEFAULT_SHARD_SIZE)]
    pub shard_bytes: u64,
}

#[derive(Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    pub action: StoreAction,
    #[command(flatten)]
    pub place: PlaceArgs,
}

#[derive(Debug, Subcommand)]
pub enum StoreAction {
    /// Show packed weights and what they occupy
    List,
    /// Remove one
    Rm {
        /// As `loadmaster store list` shows it
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Remove all that no checkpoint or version of loadmaster here can use, and what was left half-made
    Prune,
}

/// Where everything is written.
#[derive(Debug, Args)]
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

fn offload_dir_from(var: impl Fn(&str) -> Option<OsString>) -> PathBuf {
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
    /// Prompts: .txt (one a line), .jsonl, or - for standard input
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
    #[arg(long, value_name = "N", value_parser = values::count)]
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

/// What `plan` and `run` solve.
#[derive(Debug, Args)]
pub struct SolveArgs {
    /// A directory in Hugging Face layout, an id in the local hub cache, or synth:SIZE;
    /// to plan, a size's name alone is enough (opt-125m … opt-175b)
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub work: WorkArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
    #[command(flatten)]
    hints: HintArgs,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
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
    /// DRAM for the whole process [default: what is available - max(1GiB, 10%)]
    #[arg(long = "cpu-mem", value_name = "SIZE", value_parser = parse_bytes)]
    pub cpu_mem_bytes: Option<u64>,
    /// Disk for packed weights and spilled cache [default: free - 5%]
    #[arg(long = "disk-space", value_name = "SIZE", value_parser = parse_bytes)]
    pub disk_space_bytes: Option<u64>,
    /// Threads that compute [default: physical cores that this process may use]
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub threads: Option<usize>,
    /// A machine's measured rates: a file, or the name of one that is built in
    /// [default: this machine's, measured first where there is none]
    #[arg(long, value_name = "FILE|NAME")]
    pub profile: Option<String>,
    #[command(flatten)]
    pub place: PlaceArgs,
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
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub gpu_batch_size: Option<usize>,
    /// Batches that share one pass over the weights
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub num_gpu_batches: Option<usize>,
    /// Percent of the weights outside the GPU that the CPU multiplies where they lie
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
    /// Arithmetic: exact = products and sums in fp32
    #[arg(long, value_name = "HOW", default_value = "exact",
        value_parser = PossibleValuesParser::new(["exact"]).map(|_| Compute::Exact))]
    pub compute: Compute,
    /// Format of the KV cache where it is not 4-bit
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub kv: Kv,
}

impl PolicyArgs {
    /// The six percentages, if given.
    pub fn percent(&self) -> Option<[f64; 6]> {
        self.percent.as_deref()?.try_into().ok()
    }
}

/// Flags of FlexLLMGen that have no counterpart: each says what to do instead.
#[derive(Debug, Args)]
struct HintArgs {
    #[arg(long, hide = true, value_parser = path_hint)]
    path: Option<NotOffered>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "1", value_parser = sep_layer_hint)]
    sep_layer: Option<NotOffered>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "1", value_parser = attn_sparsity_hint)]
    attn_sparsity: Option<NotOffered>,
}

impl Cli {
    /// Reads a command line whose first word is the program's name. An error may also be a request
    /// for help or for the version.
    pub fn read<T: Into<OsString> + Clone>(
        words: impl IntoIterator<Item = T>,
    ) -> Result<Cli, clap::Error> {
        let cli = Cli::try_parse_from(words)?;
        cli.check()
            .map_err(|(kind, why)| Cli::command().error(kind, why))?;
        Ok(cli)
    }

    /// Whether stdout gets one JSON document.
    pub fn json(&self) -> bool {
        match &self.command {
            Command::Probe(args) => args.json,
            Command::Plan(args) => args.solve.json,
            Command::Exec(args) => args.json,
            Command::Compare(args) => args.json,
            Command::Run(args) => args.solve.json,
            Command::Synth(_) | Command::Store(_) => false,
        }
    }

    /// What clap's own rules cannot say.
    fn check(&self) -> Result<(), (ErrorKind, String)> {
        match &self.command {
            Command::Plan(args) => check_solve(&args.solve),
            Command::Run(args) => {
                check_solve(&args.solve)?;
                check_results(&args.results, &args.solve.work, self.json())
            }
            Command::Exec(args) => check_results(&args.results, &args.work, self.json()),
            Command::Synth(args) if args.shard_bytes == 0 => Err((
                ErrorKind::ValueValidation,
                "--shard-size 0 holds no weights: write a size like 5GB".to_owned(),
            )),
            _ => Ok(()),
        }
    }
}

fn check_solve(solve: &SolveArgs) -> Result<(), (ErrorKind, String)> {
    let invalid = |why| Err((ErrorKind::ValueValidation, why));
    if let Some(percent) = solve.policy.percent()
        && let Err(e) = Shares::from_percent(percent, 0.0)
    {
        return invalid(e.to_string());
    }
    if solve.limits.device == DeviceChoice::Cpu && solve.limits.gpu_mem_bytes.is_some() {
        let why = "--gpu-mem says nothing with --device cpu: leave one of them out".to_owned();
        return Err((ErrorKind::ArgumentConflict, why));
    }
    Ok(())
}

fn check_results(
    results: &ResultArgs,
    work: &WorkArgs,
    json: bool,
) -> Result<(), (ErrorKind, String)> {
    let conflict = |why: String| Err((ErrorKind::ArgumentConflict, why));
    let file = results.output_file();
    if json && file.is_none() {
        let why = "--json prints one document on stdout: write the results with --output FILE";
        return Err((ErrorKind::MissingRequiredArgument, why.to_owned()));
    }
    if results.overwrite && file.is_none() && results.report.is_none() {
        return conflict("--overwrite needs --output FILE or --report FILE".to_owned());
    }
    if file.is_some() && file == work.input.as_deref() {
        let why = "--output is the --input file: results would replace the prompts".to_owned();
        return conflict(why);
    }
    if file.is_some() && file == results.report.as_deref() {
        return conflict("--output and --report name the same file: give two".to_owned());
    }
    Ok(())
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
