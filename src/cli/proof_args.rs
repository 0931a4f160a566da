//! Flags of the commands that prove the plan: accuracy, calibrate, campaign, rivals. What the commands
//! do with them lives in their own files.

use super::arg_groups::{LimitArgs, PlaceArgs};
use super::values::{self, DeviceChoice};
use crate::model::ModelSpec;
use clap::Args;
use clap::error::ErrorKind;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub struct AccuracyArgs {
    /// Seed of the draw: the same seed draws the same rows
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Rows to measure
    #[arg(long, value_name = "R", default_value_t = 20, value_parser = values::count)]
    pub rows: usize,
    /// Interleaved runs of each row; five or more make a median to be trusted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = values::count)]
    pub runs: usize,
    /// Rows that are predicted to take longer are drawn again
    #[arg(long = "max-row-seconds", value_name = "SECONDS", default_value_t = 20.0, value_parser = values::seconds)]
    pub max_row_s: f64,
    /// Sizes to draw from; their packed weights stay under --offload-dir
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = values::model_size,
        default_value = "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b,opt-13b")]
    pub sizes: Vec<ModelSpec>,
    /// Folder for profile, plans and measured rows; a measurement begun there is gone on with
    /// [default: accuracy/seed-N under --offload-dir]
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Measure nothing: judge the rows saved in this file
    #[arg(long, value_name = "FILE", help_heading = "Output", conflicts_with_all = ["out", "plan_only"])]
    pub judge: Option<PathBuf>,
    /// With --judge: predict anew with this version instead of taking the plans' predictions
    #[arg(long, requires = "judge", help_heading = "Output")]
    pub reprice: bool,
    /// One run of one row, in a process of its own: how the command runs its rows
    #[arg(long, value_name = "INDEX", hide = true, requires = "out")]
    pub visit: Option<usize>,
    /// Write profile and plans, and stop before anything runs
    #[arg(long, help_heading = "Output")]
    pub plan_only: bool,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

impl AccuracyArgs {
    /// What clap's own rules cannot say.
    pub fn check(&self) -> Result<(), (ErrorKind, String)> {
        check_device(&self.limits, "accuracy")
    }
}

/// Only this machine's own CPU can be measured yet.
fn check_device(limits: &LimitArgs, command: &str) -> Result<(), (ErrorKind, String)> {
    match limits.device {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(()),
        _ => Err((
            ErrorKind::ValueValidation,
            format!("`{command}` measures the CPU: leave --device out"),
        )),
    }
}

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Reports saved by `exec --report` or `run --report`, or rows saved by `accuracy`
    #[arg(value_name = "REPORT", required = true)]
    pub reports: Vec<PathBuf>,
    /// The profile to refine: a file, or a name [default: the one that the reports' plans name]
    #[arg(long, value_name = "FILE|NAME")]
    pub profile: Option<String>,
    /// Show what would be written, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Take the profile's multipliers away instead
    #[arg(long, conflicts_with = "dry_run")]
    pub reset: bool,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print one JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct CampaignArgs {
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Triples of model, workload and budget
    #[arg(long, value_name = "T", default_value_t = 200, value_parser = values::count)]
    pub triples: usize,
    /// Named sizes among the models, the first ones most often; the others are small ones of random shape.
    /// Budgets reach up to what the largest one wants
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = values::model_size,
        default_value = "opt-125m,opt-350m,opt-1.3b,opt-2.7b,opt-6.7b")]
    pub sizes: Vec<ModelSpec>,
    /// Save every triple's figures here, as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RivalsArgs {
    /// A directory in Hugging Face layout, an id in the local hub cache, or synth:SIZE
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// Prompts of the job
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = values::prompts)]
    pub num_prompts: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = values::tokens)]
    pub prompt_len: u32,
    /// Tokens to generate for each
    #[arg(long, value_name = "TOKENS", default_value_t = 16, value_parser = values::tokens)]
    pub gen_len: u32,
    /// Seed of the random policies among the rivals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Policies that are measured once against the choice
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = values::count)]
    pub policies: usize,
    /// Alternating pairs that each of the best three runs against the choice
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = values::count)]
    pub pairs: usize,
    /// Rivals of the same losses only: the planner never compresses unasked where it need not
    #[arg(long)]
    pub lossless: bool,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Print one JSON document on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}
