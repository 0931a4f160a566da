//! The commands, each a short way from flags to a document or a table on stdout.

use super::accuracy;
use super::args::{
    Cli, Command, CompareArgs, DASH, ExecArgs, PlanArgs, ProbeArgs, ResultArgs, RunArgs,
    StoreAction, StoreArgs, SynthArgs,
};
use super::calibrate;
use super::campaign;
use super::execute::{Executed, Execution, check_model, execute};
use super::failure::Failure;
use super::flexllmgen;
use super::gpu::{LocalGpu, gpu_index};
use super::next_command::enough_flags;
use super::progress::{Talk, Unit};
use super::prompt_lines::Line;
use super::prompts::Source;
use super::rivals;
use super::series;
use super::settle::{Model, make_offload_dir, measure, named_profile, own_profile};
use super::show_compare;
use super::show_plan;
use super::solve::{Asked, Solved, solve, work_lines};
use super::step_down::{Shrunk, free_bytes, refuse_outgrown, step_down, without_pins};
use crate::checkpoint::{SynthJob, write_synth};
use crate::compare::Comparison;
use crate::machine::disk::write_atomically;
use crate::machine::os;
use crate::model::ModelSpec;
use crate::plan::Plan;
use crate::policy::DeviceKind;
use crate::probe;
use crate::profile::HardwareProfile;
use crate::report::{RunReport, SetupFigures};
use crate::store;
use crate::tier::Tier;
use crate::units::show_bytes;
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Runs one command; its data go to stdout, its talk to stderr.
pub fn dispatch(cli: Cli, stop: &AtomicBool) -> Result<(), Failure> {
    let mut talk = Talk::stderr();
    let ended = match cli.command {
        Command::Probe(args) => probe(&args, &mut talk, stop),
        Command::Plan(args) => plan(&args, &mut talk, stop),
        Command::Exec(args) => exec(&args, &mut talk, stop),
        Command::Compare(args) => compare(&args),
        Command::Run(args) => run(&args, &mut talk, stop),
        Command::Series(args) => series::series(&args, &mut talk, stop),
        Command::Synth(args) => synth(&args, &mut talk, stop),
        Command::Store(args) => stores(&args),
        Command::Accuracy(args) => accuracy::accuracy(&args, &mut talk, stop),
        Command::Calibrate(args) => calibrate::calibrate(&args),
        Command::Campaign(args) => campaign::campaign(&args, &mut talk, stop),
        Command::Rivals(args) => rivals::rivals(&args, &mut talk, stop),
        Command::Flexllmgen(args) => flexllmgen::table(&args.profile, &args.place.offload_dir())
            .and_then(|table| say(&table)),
    };
    talk.end();
    ended
}

/// Writes to stdout; a reader that went away is no failure.
pub(super) fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::failed(format!(
            "standard output cannot be written ({e})"
        ))),
        _ => Ok(()),
    }
}

pub(super) fn say_json(document: &impl Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(document).map_err(|e| Failure::failed(e.to_string()))?;
    say(&(text + "\n"))
}

fn probe(args: &ProbeArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let offload_dir = args.place.offload_dir();
    let threads = args.threads.unwrap_or_else(os::default_threads);
    let gpu = LocalGpu::asked(&args.device)?;
    let how = (threads, args.cpu_mem_bytes, gpu.as_ref());
    let profile = match args.force {
        true => measure(&offload_dir, how, talk, stop)?,
        false => own_profile(&offload_dir, how, talk, stop)?.0,
    };
    if let Some(path) = &args.out {
        write_atomically(path, profile.to_toml().as_bytes()).map_err(Failure::failed)?;
    }
    if args.json {
        return say_json(&profile);
    }
    let saved = probe::profiles_dir(&offload_dir).join(format!("{}.toml", profile.machine.name));
    let mut lines = probe::summary(&profile);
    lines.push(format!(
        "profile {} of {}: {}",
        profile.machine.name,
        profile.machine.date,
        saved.display()
    ));
    say(&(lines.join("\n") + "\n"))
}

fn plan(args: &PlanArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let asked = Asked {
        sizes_do: true,
        explain: args.explain,
        out: args.out.as_deref(),
        changes: args.what_if.changes(),
        ..Asked::default()
    };
    let solved = solve(&args.solve, asked, talk, stop)?;
    talk.end();
    if args.emit.is_some() {
        return say(&flexllmgen::emit(&solved)?);
    }
    let out = args.out.as_deref().filter(|_| solved.plan.feasible);
    let piped = out == Some(Path::new(DASH));
    if let Some(path) = out.filter(|_| !piped) {
        write_atomically(path, solved.plan.to_toml().as_bytes()).map_err(Failure::failed)?;
    }
    match args.solve.json {
        true => say_json(&solved.plan)?,
        false if piped => say(&solved.plan.to_toml())?,
        false => say(&show_plan::show_plan(&solved.plan, args.explain))?,
    }
    feasible(&solved.plan).map_err(|failure| failure.after_document(args.solve.json))
}

/// An infeasible plan is a failure after it has been shown.
fn feasible(plan: &Plan) -> Result<(), Failure> {
    match plan.feasible {
        true => Ok(()),
        false => Err(shortfall(plan)),
    }
}

/// What is missing, and a budget that is enough.
fn shortfall(plan: &Plan) -> Failure {
    let missing = &plan.missing_bytes;
    let tiers = Tier::ALL
        .into_iter()
        .filter_map(|t| missing[t].filter(|&b| b > 0).map(|b| (t, b)));
    let short: Vec<String> = tiers
        .map(|(t, b)| format!("{} of {} memory", show_bytes(b), t.name()))
        .collect();
    let failure = Failure::failed(format!("nothing fits: {} missing", short.join(" and ")));
    match &plan.enough_bytes {
        Some(enough) => failure.with_hint(enough_flags(enough)),
        None => failure.with_hint(
            "more prompts than memory holds can be run in smaller blocks: lower --gpu-batch-size",
        ),
    }
}

fn exec(args: &ExecArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let plan = read_plan(&args.plan)?;
    feasible(&plan)?;
    let offload_dir = args.place.offload_dir();
    make_offload_dir(&offload_dir)?;
    let model = Model::find(&plan.model.name, args.work.seed, false)?;
    check_model(&plan, &model)?;
    let lines = planned_lines(args, &plan, &model)?;
    let profile = exec_profile((args, &plan), &offload_dir, talk, stop)?;
    let shrunk = Shrunk {
        plan: &plan,
        model: &model,
        profile: &profile,
        lines: &lines,
        offload_dir: &offload_dir,
    };
    // Lines that all failed need no plan: each gets its error line.
    let works = lines.iter().any(|line| line.result.is_ok());
    let instead = match (works, args.strict) {
        (false, _) => None,
        (true, true) => refuse_outgrown(&shrunk).map(|()| None)?,
        (true, false) => step_down(&shrunk, free_bytes()?)?,
    };
    instead.iter().for_each(|plan| say_step(plan, talk));
    let execution = Execution {
        plan: instead.as_ref().unwrap_or(&plan),
        model: &model,
        profile: &profile,
        lines: &lines,
        results: &args.results,
        offload_dir: &offload_dir,
        ignore_eos: args.work.ignore_eos,
        setup: SetupFigures::default(),
        unpacked: false,
        may_replan: !args.strict,
    };
    let done = match execute(execution, talk, stop)? {
        Ok(done) => done,
        Err(setup) => {
            let plan = without_pins(&Shrunk {
                plan: execution.plan,
                ..shrunk
            })?;
            feasible(&plan)?;
            say_step(&plan, talk);
            let again = Execution {
                plan: &plan,
                may_replan: false,
                setup,
                ..execution
            };
            execute(again, talk, stop)?
                .unwrap_or_else(|_| unreachable!("a plan that may not be made anew is carried out"))
        }
    };
    if args.json {
        say_json(&done.report)?;
    } else {
        let name = report_name(&args.results);
        talk.note(&show_compare::show(&Comparison::new(vec![(
            name,
            done.report,
        )])));
    }
    ended(done.failure, args.json)
}

fn say_step(plan: &Plan, talk: &mut Talk) {
    plan.explain
        .stepped_down
        .iter()
        .for_each(|line| talk.note(line));
}

/// The plan's profile where it is still there, else this machine's.
fn exec_profile(
    (args, plan): (&ExecArgs, &Plan),
    offload_dir: &Path,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<HardwareProfile, Failure> {
    let threads = plan
        .policy
        .as_ref()
        .map_or_else(os::default_threads, |p| p.threads);
    let profile = match named_profile(&plan.profile.name, offload_dir) {
        Ok(profile) => profile,
        Err(_) => {
            let gpu = match plan.device_kind() {
                Ok(DeviceKind::Cuda) => Some(LocalGpu::find(gpu_index(&plan.device))?),
                _ => None,
            };
            let how = (threads, Some(plan.budget.cpu_bytes), gpu.as_ref());
            own_profile(offload_dir, how, talk, stop)?.0
        }
    };
    Ok(match args.no_calibration {
        true => profile.without_calibration(),
        false => profile,
    })
}

/// What a comparison calls a run.
fn report_name(results: &ResultArgs) -> String {
    let file = results.report.as_ref();
    file.map_or("this run".to_owned(), |path| path.display().to_string())
}

/// What a run that was told of ends with.
fn ended(failure: Option<Failure>, json: bool) -> Result<(), Failure> {
    failure.map_or(Ok(()), |failure| Err(failure.after_document(json)))
}

fn read_plan(path: &Path) -> Result<Plan, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        Failure::failed(format!("{}: cannot be read ({e})", path.display()))
            .with_hint("make one with `loadmaster plan … -o plan.toml`")
    })?;
    let json = text.trim_start().starts_with('{');
    let plan = if json {
        Plan::from_json(&text)
    } else {
        Plan::from_toml(&text)
    };
    plan.map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

/// What the flags say, else random prompts of the planned lengths.
fn planned_lines(args: &ExecArgs, plan: &Plan, model: &Model) -> Result<Vec<Line>, Failure> {
    let w = &plan.workload;
    let random = Source::Random {
        prompts: args.work.num_prompts.unwrap_or(w.prompts as usize),
        prompt_tokens: args.work.prompt_len.unwrap_or(w.prompt_tokens_max as u32),
    };
    work_lines(&args.work, model, (random, w.gen_tokens_max as u32))
}

fn compare(args: &CompareArgs) -> Result<(), Failure> {
    let read = |path: &std::path::PathBuf| {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::failed(format!("{}: cannot be read ({e})", path.display())).with_hint(
                "name reports saved by `loadmaster exec --report` or `loadmaster run --report`",
            )
        })?;
        let report = RunReport::from_json(&text)
            .map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
        Ok((path.display().to_string(), report))
    };
    let reports: Result<Vec<_>, Failure> = args.reports.iter().map(read).collect();
    let comparison = Comparison::new(reports?);
    match args.json {
        true => say_json(&comparison),
        false => say(&show_compare::show(&comparison)),
    }
}

#[derive(Serialize)]
struct RunDocument<'a> {
    schema: &'static str,
    plan: &'a Plan,
    report: &'a RunReport,
    compare: &'a Comparison,
}

/// How planning and running ended.
pub(super) enum Ran {
    Done(Box<Plan>, Box<Executed>),
    DoesNotFit(Failure),
}

/// A run whose weights could not be page-locked as planned: what was read, which need not be there a second time, and
/// what the set-up took so far.
struct Unpinned {
    lines: Option<Vec<Line>>,
    setup: SetupFigures,
}

/// Plans and runs, with another plan where the weights cannot be page-locked.
pub(super) fn ran(args: &RunArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<Ran, Failure> {
    match plan_and_run((args, None), talk, stop)? {
        Ok(ran) => Ok(ran),
        Err(unpinned) => Ok(plan_and_run((args, Some(unpinned)), talk, stop)?
            .unwrap_or_else(|_| unreachable!("a plan that may not be made anew is carried out"))),
    }
}

fn run(args: &RunArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let (plan, done) = match ran(args, talk, stop)? {
        Ran::Done(plan, done) => (plan, done),
        Ran::DoesNotFit(failure) => return Err(failure),
    };
    let name = report_name(&args.results);
    let comparison = Comparison::new(vec![(name, done.report.clone())]);
    if args.solve.json {
        let schema = "loadmaster.run/1";
        say_json(&RunDocument {
            schema,
            plan: &plan,
            report: &done.report,
            compare: &comparison,
        })?;
    } else {
        talk.note(&show_compare::show(&comparison));
    }
    ended(done.failure, args.solve.json)
}

/// `Unpinned` where the weights could not be page-locked as planned, and the flags leave that open.
fn plan_and_run(
    (args, before): (&RunArgs, Option<Unpinned>),
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<Result<Ran, Unpinned>, Failure> {
    let unpinned = before.is_some();
    let (lines, setup) = before.map_or((None, None), |b| (b.lines, Some(b.setup)));
    let asked = Asked {
        results: Some(&args.results),
        lines: lines.as_deref(),
        unpinned,
        unpacked: args.unpacked,
        ..Asked::default()
    };
    let solved = solve(&args.solve, asked, talk, stop)?;
    talk.note(&show_plan::show_plan(&solved.plan, false));
    if let Err(failure) = feasible(&solved.plan) {
        return Ok(Ok(Ran::DoesNotFit(failure)));
    }
    let made = match &solved.lines {
        Some(_) => Vec::new(),
        None => block_lines(args, &solved)?,
    };
    let execution = Execution {
        plan: &solved.plan,
        model: &solved.model,
        profile: &solved.target.profile,
        lines: solved.lines.as_deref().unwrap_or(&made),
        results: &args.results,
        offload_dir: &args.solve.limits.place.offload_dir(),
        ignore_eos: args.solve.work.ignore_eos,
        setup: setup.unwrap_or(SetupFigures::after_probe(solved.target.probe_s)),
        unpacked: args.unpacked,
        may_replan: !unpinned && args.solve.policy.pin_weight.is_none(),
    };
    let done = execute(execution, talk, stop)?;
    let plan = solved.plan;
    Ok(match done {
        Ok(done) => Ok(Ran::Done(Box::new(plan), Box::new(done))),
        Err(setup) => Err(Unpinned {
            lines: solved.lines,
            setup,
        }),
    })
}

/// Random prompts that fill the block that was planned.
fn block_lines(args: &RunArgs, solved: &Solved) -> Result<Vec<Line>, Failure> {
    let w = &solved.plan.workload;
    let random = Source::Random {
        prompts: w.prompts as usize,
        prompt_tokens: w.prompt_tokens_max as u32,
    };
    work_lines(
        &args.solve.work,
        &solved.model,
        (random, w.gen_tokens_max as u32),
    )
}

fn synth(args: &SynthArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    talk.stage(&format!(
        "writing random weights of {} to {}",
        args.model.name,
        args.out.display()
    ));
    let mut progress = |done: u64, total: u64| talk.step(done, total, Unit::Bytes, 0.0);
    write_synth(SynthJob {
        spec: ModelSpec {
            dtype: args.dtype,
            ..args.model.clone()
        },
        seed: args.seed,
        dir: &args.out,
        shard_bytes: args.shard_bytes,
        progress: &mut progress,
        stop,
    })
    .map_err(Failure::failed)?;
    talk.end();
    say(&format!(
        "{}: a checkpoint of {} with random weights\n",
        args.out.display(),
        args.model.name
    ))
}

fn stores(args: &StoreArgs) -> Result<(), Failure> {
    let offload_dir = args.place.offload_dir();
    match &args.action {
        StoreAction::List => {
            let list = store::list(&offload_dir).map_err(Failure::failed)?;
            let line = |s: &store::StoreInfo| format!("{}  {}\n", s.name, show_bytes(s.bytes));
            let total: u64 = list.iter().map(|s| s.bytes).sum();
            let lines: String = list.iter().map(line).collect();
            say(&format!(
                "{lines}{} stores, {} in {}\n",
                list.len(),
                show_bytes(total),
                store::store_dir(&offload_dir).display()
            ))
        }
        StoreAction::Rm { name } => {
            let removed = store::remove(&offload_dir, name).map_err(Failure::failed)?;
            say(&format!(
                "removed {} ({})\n",
                removed.name,
                show_bytes(removed.bytes)
            ))
        }
        StoreAction::Prune => {
            let removed = store::prune(&offload_dir).map_err(Failure::failed)?;
            let line =
                |r: &store::Removed| format!("removed {} ({})\n", r.name, show_bytes(r.bytes));
            say(&format!(
                "{}{} removed\n",
                removed.iter().map(line).collect::<String>(),
                removed.len()
            ))
        }
    }
}
