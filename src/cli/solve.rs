//! `plan`, and the first half of `run`: flags to a request, the planner's answer to a document.

use super::args::{
    Compress, DEFAULT_GEN_LEN, DEFAULT_PROMPT_LEN, Kv, PolicyArgs, ResultArgs, SolveArgs, WorkArgs,
};
use super::failure::Failure;
use super::next_command::next_command;
use super::progress::Talk;
use super::prompt_lines::{Line, Rules};
use super::prompts::{self, Source};
use super::results::Results;
use super::settle::{Input, Model, Target, has_work};
use crate::cost::estimate::EstimateInput;
use crate::cost::figures::Figures;
use crate::cost::footprint::HostBytes;
use crate::dtype::Dtype;
use crate::engine::replay::replay;
use crate::plan::{Plan, PlanPolicy};
use crate::planner::changes::Changes;
use crate::planner::{self, CompressMode, Fixed, Job, PlanError, PlanRequest, Replay, Repricer};
use crate::policy::DeviceKind;
use crate::store::{self, Packing};
use crate::workload::Workload;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// A plan with everything that carrying it out needs.
pub struct Solved {
    pub model: Model,
    pub target: Target,
    pub plan: Plan,
    /// What to generate from; None where one best block was planned. Without results one random prompt
    /// stands for all.
    pub lines: Option<Vec<Line>>,
}

/// What differs between `plan` and `run`.
#[derive(Clone, Copy, Default)]
pub struct Asked<'a> {
    /// Figures of another machine in place of the profile's.
    pub changes: Changes,
    /// A size's name is enough: there need be no weights.
    pub sizes_do: bool,
    pub explain: bool,
    /// Where the plan is to be saved.
    pub out: Option<&'a Path>,
    /// Lines that were read before.
    pub lines: Option<&'a [Line]>,
    /// Where error lines go when no line is any good; None where nothing is to be generated.
    pub results: Option<&'a ResultArgs>,
    /// The weights in DRAM cannot be page-locked.
    pub unpinned: bool,
    /// The weights come straight from their source.
    pub unpacked: bool,
}

/// Plans by running the engine's own schedule on the virtual-time machine.
pub struct ScheduleRepricer;

impl Repricer for ScheduleRepricer {
    fn replay(&self, asked: &Replay) -> Option<Figures> {
        let input = EstimateInput {
            model: asked.model,
            workload: asked.workload,
            rates: asked.rates,
            policy: asked.policy,
            host: asked.host,
            budget: asked.budget,
        };
        replay(&input)
    }
}

/// Model, machine, work, plan.
pub fn solve(
    args: &SolveArgs,
    asked: Asked,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<Solved, Failure> {
    let model = Model::find(&args.model, args.work.seed, asked.sizes_do)?;
    let (drawn, times) = random_prompts(args, asked);
    let lines = match asked.lines {
        Some(lines) => Some(lines.to_vec()),
        None => has_work(&args.work)
            .then(|| read_lines(args, &model, drawn))
            .transpose()?,
    };
    if let Some(lines) = &lines {
        some_good(lines, asked.results)?;
    }
    let workload = lines.as_deref().map(|lines| Workload {
        lines: prompts::workload(lines).lines.repeat(times),
    });
    let mut target = Target::settle(&args.limits, talk, stop)?;
    target.profile = asked
        .changes
        .apply(&target.profile)
        .map_err(Failure::usage)?;
    idle_flags(&args.policy, target.device)
        .iter()
        .for_each(|line| talk.note(line));
    let mut plan = plan((args, asked), &model, &target, workload.as_ref())?;
    plan.next_command = next_command(args, asked.out, &plan);
    let plan = named(plan, &model);
    Ok(Solved {
        model,
        target,
        plan,
        lines,
    })
}

/// A line for each flag that is accepted everywhere and changes nothing on this device.
fn idle_flags(policy: &PolicyArgs, device: DeviceKind) -> Vec<String> {
    if device.has_gpu() {
        return Vec::new();
    }
    let mut lines = Vec::new();
    if policy.pin_weight.is_some() {
        lines.push("--pin-weight changes nothing here: no GPU takes part, so nothing is page-locked for its copies".to_owned());
    }
    if policy.cpu_cache_compute.is_some() {
        lines.push("--cpu-cache-compute changes nothing here: without a GPU attention is always computed on the CPU".to_owned());
    }
    lines
}

/// Random prompts to draw, and how often each counts: they are equally long, so that one stands for all
/// where none is generated from.
fn random_prompts(args: &SolveArgs, asked: Asked) -> (usize, usize) {
    let prompts = args.work.num_prompts.unwrap_or(1);
    match asked.results {
        None if args.work.is_random() => (prompts.min(1), prompts),
        _ => (prompts, 1),
    }
}

fn read_lines(args: &SolveArgs, model: &Model, drawn: usize) -> Result<Vec<Line>, Failure> {
    let work = &args.work;
    let random = Source::Random {
        prompts: drawn,
        prompt_tokens: work.prompt_len.unwrap_or(DEFAULT_PROMPT_LEN),
    };
    work_lines(work, model, (random, DEFAULT_GEN_LEN))
}

/// Lines from --input or --prompt, else the given random ones.
pub fn work_lines(
    work: &WorkArgs,
    model: &Model,
    (random, gen_tokens): (Source, u32),
) -> Result<Vec<Line>, Failure> {
    let source = match &work.input {
        Some(path) => Source::Input(path),
        None if !work.prompt.is_empty() => Source::Texts(&work.prompt),
        None => random,
    };
    let rules = Rules {
        model: &model.spec,
        tokenizer: model.tokenizer.as_ref(),
        gen_tokens: work.gen_len.unwrap_or(gen_tokens),
        seed: work.seed,
    };
    prompts::read_lines(source, &rules).map_err(Failure::from)
}

fn plan(
    (args, asked): (&SolveArgs, Asked),
    model: &Model,
    target: &Target,
    workload: Option<&Workload>,
) -> Result<Plan, Failure> {
    let job = match workload {
        Some(workload) => Job::Given(workload),
        None => Job::BestBlock {
            prompt_tokens: args.work.prompt_len.unwrap_or(DEFAULT_PROMPT_LEN),
            gen_tokens: args.work.gen_len.unwrap_or(DEFAULT_GEN_LEN),
        },
    };
    let fingerprint = model.fingerprint();
    let stored = |compress| {
        stored_bytes(
            &args.limits.place.offload_dir(),
            model,
            fingerprint.as_deref(),
            Packing {
                compress,
                layout: target.device.weight_layout(),
            },
        )
    };
    let request = PlanRequest {
        model: &model.spec,
        fingerprint: fingerprint.as_deref(),
        job,
        device: target.device,
        device_name: &target.device_name,
        profile: &target.profile,
        calibrated: true,
        explain: asked.explain,
        changes: &asked.changes,
        budget: target.budget,
        fixed: Fixed {
            pin_weight: args.policy.pin_weight.or(asked.unpinned.then_some(false)),
            ..fixed(&args.policy)
        },
        compress: compress_mode(args.policy.compress),
        kv: kv_format(args.policy.kv, model.spec.dtype),
        threads: target.threads,
        host: HostBytes {
            unpacked: asked.unpacked,
            ..model
                .host_bytes(workload.map_or(Input::default(), Input::of), target.threads)
                .with_gpu(target.device, target.profile.gpu.as_ref())
        },
        stored_bytes: match asked.unpacked {
            true => [0, 0],
            false => [stored(false), stored(true)],
        },
        repricer: Some(&ScheduleRepricer),
    };
    planner::plan(&request).map_err(|error| match error {
        PlanError::Rates(_) => Failure::failed(error),
        _ => Failure::usage(error),
    })
}

/// A planned policy as choices that are made: what it says of any machine.
pub fn fixed_as(policy: &PlanPolicy) -> Fixed {
    Fixed {
        percent: Some(policy.percent),
        gpu_batch_size: Some(policy.gpu_batch_size),
        num_gpu_batches: Some(policy.num_gpu_batches),
        compress_weight: Some(policy.compress_weight),
        compress_cache: Some(policy.compress_cache),
        overlap: Some(policy.overlap),
        ..Fixed::default()
    }
}

/// A plan of known lengths with choices that are made already: what the proving commands try out.
pub fn plan_fixed(
    model: &Model,
    target: &Target,
    (workload, fixed, compress): (&Workload, Fixed, CompressMode),
    offload_dir: &Path,
) -> Result<Plan, Failure> {
    let fingerprint = model.fingerprint();
    let layout = target.device.weight_layout();
    let stored = |compress| {
        let packing = Packing { compress, layout };
        stored_bytes(offload_dir, model, fingerprint.as_deref(), packing)
    };
    let request = PlanRequest {
        model: &model.spec,
        fingerprint: fingerprint.as_deref(),
        job: Job::Given(workload),
        device: target.device,
        device_name: &target.device_name,
        profile: &target.profile,
        calibrated: true,
        explain: false,
        changes: &Changes::default(),
        budget: target.budget,
        fixed,
        compress,
        kv: kv_format(Kv::Auto, model.spec.dtype),
        threads: target.threads,
        host: model
            .host_bytes(Input::of(workload), target.threads)
            .with_gpu(target.device, target.profile.gpu.as_ref()),
        stored_bytes: [stored(false), stored(true)],
        repricer: Some(&ScheduleRepricer),
    };
    let plan = planner::plan(&request).map_err(Failure::failed)?;
    Ok(named(plan, model))
}

/// A plan says the model as the user did, so that `exec` finds it again. The last to change it: its id is that of all
/// that it says.
fn named(mut plan: Plan, model: &Model) -> Plan {
    plan.model.name = model.name.clone();
    plan.id = plan.content_id();
    plan
}

/// Where every line is bad there is nothing to plan: each gets its error line all the same.
fn some_good(lines: &[Line], results: Option<&ResultArgs>) -> Result<(), Failure> {
    if lines.iter().any(|line| line.result.is_ok()) {
        return Ok(());
    }
    let bad = || {
        let error = |line: &Line| line.result.as_ref().err().cloned().map(|e| (line.index, e));
        lines.iter().filter_map(error)
    };
    if let Some(places) = results {
        let file = places.output_file();
        let mut to = Results::open(file, places.overwrite, None).map_err(Failure::failed)?;
        let written = bad().try_for_each(|(index, error)| to.failed(index, &error));
        if !to.is_closed() {
            written.map_err(Failure::failed)?;
        }
    }
    let why = bad()
        .next()
        .map_or("there are none".to_owned(), |(_, e)| e.message);
    let none = match lines.len() {
        1 => "the only input line cannot be generated from".to_owned(),
        count => format!("none of the {count} input lines can be generated from; the first"),
    };
    Err(Failure::failed(format!("{none}: {why}")))
}

pub fn stored_bytes(
    offload_dir: &Path,
    model: &Model,
    fingerprint: Option<&str>,
    packing: Packing,
) -> u64 {
    let find = |f: &str| store::find(offload_dir, &model.spec, f, packing);
    fingerprint
        .and_then(find)
        .map_or(0, |store| store.file_bytes())
}

fn fixed(policy: &PolicyArgs) -> Fixed {
    Fixed {
        percent: policy.percent(),
        cpu_compute_share: policy.cpu_compute_share_percent.map(|p| p / 100.0),
        gpu_batch_size: policy.gpu_batch_size,
        num_gpu_batches: policy.num_gpu_batches,
        pin_weight: policy.pin_weight,
        compress_weight: policy.compress_weight,
        compress_cache: policy.compress_cache,
        cpu_cache_compute: policy.cpu_cache_compute,
        overlap: policy.overlap,
        compute: policy.compute,
    }
}

fn compress_mode(compress: Compress) -> CompressMode {
    match compress {
        Compress::Auto => CompressMode::Auto,
        Compress::Never => CompressMode::Never,
        Compress::Weights => CompressMode::Weights,
        Compress::Cache => CompressMode::Cache,
        Compress::Both => CompressMode::Both,
        Compress::Fastest => CompressMode::Fastest,
    }
}

/// fp16, but nothing is narrowed unasked: fp32 checkpoints keep an fp32 cache.
fn kv_format(kv: Kv, weights: Dtype) -> Dtype {
    match (kv, weights) {
        (Kv::F32, _) | (Kv::Auto, Dtype::F32) => Dtype::F32,
        _ => Dtype::F16,
    }
}
