//! The command line: which commands and flags there are, their help, and which exclude each other.
//! How one value is read lives in values.rs; what a command does with them lives in its own file.

pub use super::arg_groups::{
    Compress, DASH, DEFAULT_GEN_LEN, DEFAULT_PROMPT_LEN, HintArgs, Kv, LimitArgs, PlaceArgs,
    PolicyArgs, ResultArgs, WhatIfArgs, WorkArgs, default_offload_dir,
};
pub use super::proof_args::{AccuracyArgs, CalibrateArgs, CampaignArgs, RivalsArgs};
use super::values::{self, DeviceChoice};
use crate::dtype::Dtype;
use crate::model::ModelSpec;
use crate::plan::MOST_SEQUENCES;
use crate::policy::Shares;
use crate::units::parse_bytes;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What Hugging Face writes: the same as `checkpoint::DEFAULT_SHARD_BYTES`.
const DEFAULT_SHARD_SIZE: &str = "5GB";

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

const SERIES_EXAMPLE: &str = "\
Example:
  loadmaster series runs.txt --out results -- --model synth:opt-6.7b --unpacked --num-prompts 16
with runs.txt like
  resident --percent 100 0 100 0 100 0
  disk --percent 0 0 100 0 100 0 --overlap 0";

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
    /// Plan, run and compare many times in one process
    #[command(after_help = SERIES_EXAMPLE)]
    Series(SeriesArgs),
    /// Write a random-weight checkpoint of a named size, in the real file format
    #[command(after_help = "Example:\n  loadmaster synth opt-125m --out ./opt-125m-random")]
    Synth(SynthArgs),
    /// List or remove packed weights
    Store(StoreArgs),
    /// Measure random jobs against their plans: how true the estimates are
    #[command(after_help = "Example:\n  loadmaster accuracy --seed 991 --rows 20")]
    Accuracy(AccuracyArgs),
    /// Refine this machine's profile from measured runs, by least squares
    #[command(
        after_help = "Example:\n  loadmaster calibrate report-a.json report-b.json --dry-run"
    )]
    Calibrate(CalibrateArgs),
    /// Run random jobs inside memory cgroups of exactly their budgets: nothing may run out
    #[command(after_help = "Example:\n  loadmaster campaign --seed 7 --triples 200")]
    Campaign(CampaignArgs),
    /// Measure the planner's choice against many other policies
    #[command(
        after_help = "Example:\n  loadmaster rivals --seed 3 --model synth:opt-1.3b --cpu-mem 2GiB --num-prompts 16 --prompt-len 64 --gen-len 8"
    )]
    Rivals(RivalsArgs),
    /// FlexLLMGen's published results against its runtime priced on a machine's profile, and what
    /// loadmaster would do there
    Flexllmgen(FlexllmgenArgs),
}

#[derive(Debug, Args)]
pub struct FlexllmgenArgs {
    /// A machine with a GPU: a file, or the name of a profile that is built in
    #[arg(long, value_name = "FILE|NAME", default_value = "t4-gcp")]
    pub profile: String,
    #[command(flatten)]
    pub place: PlaceArgs,
}

#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Write the profile here too, as TOML
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Measure again even where a profile of this machine is there
    #[arg(long)]
    pub force: bool,
    /// Memory that the probe may take [default: 24 times the last-level cache, some buffers and 0.7 MiB a thread: 0.3 to 1.2 GiB]
    #[arg(long = "cpu-mem", value_name = "SIZE", value_parser = parse_bytes)]
    pub cpu_mem_bytes: Option<u64>,
    /// Threads that compute [default: physical cores that this process may use]
    #[arg(long, value_name = "N", value_parser = values::threads)]
    pub threads: Option<usize>,
    /// Which GPU is measured beside CPU and disk: auto, cpu (none) or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = values::device)]
    pub device: DeviceChoice,
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
    #[command(flatten)]
    pub what_if: WhatIfArgs,
    /// Save the plan here, as TOML, for `loadmaster exec`
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Print a command line of another program instead, whose placement fits the same budget
    #[arg(long, value_name = "PROGRAM", value_parser = ["flexllmgen"], help_heading = "Output",
        conflicts_with_all = ["out", "json", "explain"])]
    pub emit: Option<String>,
    /// Also say what binds, what more memory or a faster link would bring, and why others lost
    #[arg(long, help_heading = "Output")]
    pub explain: bool,
}

#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    #[command(flatten)]
    pub solve: SolveArgs,
    /// Bring the weights straight from the model into memory, without packing them to disk first: for weights
    /// that are used once
    #[arg(long, help_heading = "Machine")]
    pub unpacked: bool,
    #[command(flatten)]
    pub results: ResultArgs,
}

#[derive(Debug, Args)]
pub struct SeriesArgs {
    /// One run a line: its name, then flags of `run` for it alone; - reads them from stdin
    #[arg(value_name = "FILE")]
    pub runs: PathBuf,
    /// Folder for each run's results and report, NAME.jsonl and NAME.json; what is there is replaced
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: PathBuf,
    /// Flags of `run` that all share
    #[arg(last = true, value_name = "FLAG")]
    pub shared: Vec<String>,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// A plan saved by `loadmaster plan -o`
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// Leave what `loadmaster calibrate` has taught the profile out of account
    #[arg(long)]
    pub no_calibration: bool,
    #[command(flatten)]
    pub work: WorkArgs,
    #[command(flatten)]
    pub results: ResultArgs,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Refuse where memory has shrunk since planning, instead of solving again for what is free
    #[arg(long, help_heading = "Machine")]
    pub strict: bool,
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
    pub hints: HintArgs,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
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
            Command::Series(args) => args.json,
            Command::Accuracy(args) => args.json,
            Command::Calibrate(args) => args.json,
            Command::Campaign(args) => args.json,
            Command::Rivals(args) => args.json,
            Command::Synth(_) | Command::Store(_) | Command::Flexllmgen(_) => false,
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
            Command::Accuracy(args) => args.check(),
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
    let (size, batches) = (solve.policy.gpu_batch_size, solve.policy.num_gpu_batches);
    // Each is in range by itself: their product cannot overflow.
    if size.unwrap_or(1) * batches.unwrap_or(1) > MOST_SEQUENCES {
        return invalid(format!(
            "--gpu-batch-size x --num-gpu-batches is a block's sequences: at most {MOST_SEQUENCES}"
        ));
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
    if results.report.as_deref() == Some(Path::new(DASH)) {
        return conflict("--report names a file: --json prints the report on stdout".to_owned());
    }
    if results.overwrite && file.is_none() && results.report.is_none() {
        return conflict("--overwrite needs --output FILE or --report FILE".to_owned());
    }
    if is_same(file, work.input.as_deref()) {
        let why = "--output is the --input file: results would replace the prompts".to_owned();
        return conflict(why);
    }
    if is_same(file, results.report.as_deref()) {
        return conflict("--output and --report name the same file: give two".to_owned());
    }
    Ok(())
}

/// Whether two places are one file, however they are spelled.
fn is_same(one: Option<&Path>, other: Option<&Path>) -> bool {
    let whole = |path: &Path| {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        let dir = std::fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
        let there = std::fs::canonicalize(path).ok();
        there.or_else(|| Some(dir.join(path.file_name()?)))
    };
    let same = |(a, b): (&Path, &Path)| a == b || whole(a).is_some_and(|a| whole(b) == Some(a));
    one.zip(other).is_some_and(same)
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
