//! `exec`, and the second half of `run`: a plan, a model and lines become results and a report.

use super::args::ResultArgs;
use super::failure::Failure;
use super::gpu::{LocalGpu, gpu_index};
use super::progress::Talk;
use super::prompt_lines::{Line, LineError};
use super::prompts;
use super::results::{ResultSink, Results, check_place};
use super::room::{check_gpu_room, check_room};
use super::settle::{Input, Model};
use super::weights::{Waiting, packed, source_of, store_of, to_pack_bytes};
use crate::cost::footprint::HostBytes;
use crate::cost::rates::Rates;
use crate::engine::open::{Packed, RunJob, Started, start};
use crate::engine::{Engine, EngineError, Outcome, Request, RunFacts, RunOptions};
use crate::machine::cuda;
use crate::machine::disk::write_atomically;
use crate::machine::price::Pricer;
use crate::machine::threaded::ThreadedMachine;
use crate::machine::{Machine, os};
use crate::measured::{Measured, expected_figures, measured_figures, repriced_figures};
use crate::plan::Plan;
use crate::policy::DeviceKind;
use crate::probe;
use crate::profile::HardwareProfile;
use crate::report::{HostFacts, REPORT_SCHEMA, RunOutcome, RunReport, SetupFigures};
use crate::units::show_bytes;
use crate::workload::Lengths;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// What is to be carried out.
#[derive(Clone, Copy)]
pub struct Execution<'a> {
    pub plan: &'a Plan,
    pub model: &'a Model,
    pub profile: &'a HardwareProfile,
    pub lines: &'a [Line],
    pub results: &'a ResultArgs,
    pub offload_dir: &'a Path,
    pub ignore_eos: bool,
    /// What the set-up took so far.
    pub setup: SetupFigures,
    /// The weights come straight from their source: no store is made or looked for.
    pub unpacked: bool,
    /// Nothing is run where the weights cannot be page-locked as planned: there will be another plan.
    pub may_replan: bool,
}

/// A report, and why the run did not end well where it did not.
pub struct Executed {
    pub report: RunReport,
    pub failure: Option<Failure>,
}

/// What the set-up took so far, where another plan is wanted: no results have been written then.
pub type Attempt = Result<Result<Executed, SetupFigures>, Failure>;

/// Packs where needed, runs, measures.
pub fn execute(job: Execution, talk: &mut Talk, stop: &AtomicBool) -> Attempt {
    let started_at = probe::timestamp();
    let policy = job.plan.to_policy().map_err(Failure::failed)?;
    let device = job.plan.device_kind().map_err(Failure::failed)?;
    let gpu = gpu_of(job.plan, device)?;
    let rates = Rates::new(job.profile, device, policy.threads).map_err(Failure::failed)?;
    check_places(job.results)?;
    let mut setup = job.setup;
    let run = RunJob {
        model: &job.model.spec,
        policy: &policy,
        device,
        lengths: planned_lengths(job.plan),
        host: host_bytes(&job, device, policy.threads),
        packed: &Packed::default(),
        source: job.unpacked.then(|| source_of(job.model)).transpose()?,
        spill: &spill_dir(job.offload_dir)?,
        pricer: Pricer::new(rates.clone()),
        gpu: LocalGpu::choice_of(gpu.as_ref(), job.offload_dir),
    };
    // Before the packing, so that it is not for nothing, and after it: disk and memory may be taken meanwhile.
    os::release_free_heap();
    check_gpu_room(&run, gpu.as_ref())?;
    check_room(&run, job.offload_dir, to_pack_bytes(&job, &policy)?)?;
    let store = store_of(&job, &policy, (&mut setup, talk), stop)?;
    let packed = store.as_ref().map(packed).unwrap_or_default();
    let run = RunJob {
        packed: &packed,
        ..run
    };
    compile_kernels(&run)?;
    os::release_free_heap();
    check_room(&run, job.offload_dir, 0)?;
    let (requests, bad) = prompts::split(job.lines);
    let mut measured = Measured::new(job.plan.budget, shapes(&requests));
    measured.gpu_bus_id = gpu.as_ref().map(|gpu| gpu.facts.bus_id.clone());
    let started = begin(&run, (&mut measured, &mut setup), talk, stop);
    if job.may_replan && is_unpinned(&started, talk) {
        return Ok(Err(setup));
    }
    let rates = as_locked(&job, (&run, rates), &started, talk);
    let loaded = load((&run, started), &mut setup, talk, stop);
    let mut results = open_results(&job, loaded.is_ok(), &bad)?;
    let ignore_eos = job.ignore_eos;
    let ran = generate(
        loaded,
        (requests, RunOptions { ignore_eos }),
        &mut measured,
        (&mut results, talk),
        stop,
    );
    talk.end();
    let counts = results.counts_of(job.lines.len());
    let failure = how_it_ended(&ran, (counts.failed, bad.first()), results.is_closed());
    let report = RunReport {
        schema: REPORT_SCHEMA.to_owned(),
        plan: job.plan.clone(),
        outcome: outcome_of(&ran, &failure, results.is_closed()),
        started_at,
        finished_at: probe::timestamp(),
        lines: counts,
        host: host_facts(gpu.as_ref()),
        setup,
        repriced: repriced_figures(&run, &rates, &measured),
        measured: measured_figures(&run, &measured),
    };
    // Where it cannot be saved it is returned all the same, with the run's own failure first.
    let failure = failure.or(save(&report, job.results).err());
    Ok(Ok(Executed { report, failure }))
}

fn save(report: &RunReport, to: &ResultArgs) -> Result<(), Failure> {
    let write = |path| write_atomically(path, report.to_json().as_bytes());
    let written = to.report.as_deref().map_or(Ok(()), write);
    written.map_err(Failure::failed)
}

fn host_bytes(job: &Execution, device: DeviceKind, threads: usize) -> HostBytes {
    let came = Input::of(&prompts::workload(job.lines));
    let input = Input::planned(job.plan).at_least(came);
    let own = job.model.host_bytes(input, threads);
    HostBytes {
        unpacked: job.unpacked,
        ..own.with_gpu(device, job.profile.gpu.as_ref())
    }
}

/// Whether results and report can be written, before there is anything to write.
fn check_places(results: &ResultArgs) -> Result<(), Failure> {
    let places = [results.output_file(), results.report.as_deref()];
    places
        .into_iter()
        .flatten()
        .try_for_each(|path| check_place(path, results.overwrite))
        .map_err(Failure::failed)
}

/// Only when the run can start: one that cannot leaves no empty file, and keeps what --overwrite replaces.
/// Lines that cannot be run are in them from the beginning.
fn open_results<'a>(
    job: &Execution<'a>,
    can_start: bool,
    bad: &[(usize, LineError)],
) -> Result<Results<'a>, Failure> {
    let tokenizer = job.model.tokenizer.as_ref();
    let (file, overwrite) = (job.results.output_file(), job.results.overwrite);
    let mut results = match can_start {
        true => Results::open(file, overwrite, tokenizer).map_err(Failure::failed)?,
        false => Results::nowhere(),
    };
    let written = bad
        .iter()
        .try_for_each(|(line, error)| results.failed(*line, error));
    match written {
        // Nobody reads any more: the first good line will say so again.
        Err(_) if results.is_closed() => Ok(results),
        written => written.map(|()| results).map_err(Failure::failed),
    }
}

/// (line, prompt tokens, most generated tokens) of every request.
fn shapes(requests: &[Request]) -> Vec<(usize, usize, usize)> {
    let shape = |r: &Request| (r.line, r.prompt.len(), r.max_tokens);
    requests.iter().map(shape).collect()
}

/// The GPU that a plan names, once it is known to be usable.
pub(super) fn gpu_of(plan: &Plan, device: DeviceKind) -> Result<Option<LocalGpu>, Failure> {
    match device {
        DeviceKind::Cuda => LocalGpu::find(gpu_index(&plan.device)).map(Some),
        _ => Ok(None),
    }
}

/// A plan holds for the weights that it was made for; one of a size's name for any weights of that size.
pub(super) fn check_model(plan: &Plan, model: &Model) -> Result<(), Failure> {
    let (planned, name) = (&plan.model, &model.name);
    let compress = plan.policy.as_ref().is_some_and(|p| p.compress_weight);
    let (parameters, bytes) = (model.spec.parameters(), model.spec.weights_bytes(compress));
    let other_size = parameters != planned.parameters || bytes != planned.weights_bytes;
    match (&planned.fingerprint, model.fingerprint()) {
        (Some(planned), Some(here)) if *planned != here => Err(Failure::failed(format!(
            "the plan was made for other weights than {name} has now (files that were copied or downloaded anew count as others)"
        ))
        .with_hint(match name.starts_with("synth:") {
            true => "give the --seed that it was planned with: it draws the weights, too; or plan again",
            false => "plan again with this model",
        })),
        (None, _) if other_size => Err(Failure::failed(format!(
            "the plan was made for a model of {} parameters in {}; {name} has {parameters} in {}",
            planned.parameters,
            show_bytes(planned.weights_bytes),
            show_bytes(bytes)
        ))
        .with_hint("plan again with this model")),
        _ => Ok(()),
    }
}

pub(super) fn planned_lengths(plan: &Plan) -> Lengths {
    let w = &plan.workload;
    Lengths {
        prompts: w.prompts,
        prompt_tokens: w.prompt_tokens,
        prompt_tokens_max: w.prompt_tokens_max,
        kv_tokens: w.kv_tokens,
        kv_tokens_max: w.kv_tokens_max,
    }
}

pub(super) fn spill_dir(offload_dir: &Path) -> Result<PathBuf, Failure> {
    let dir = offload_dir.join("spill");
    let failed = |e| Failure::failed(format!("{}: cannot be made ({e})", dir.display()));
    std::fs::create_dir_all(&dir).map_err(failed)?;
    Ok(dir)
}

/// Before anything is held for the run, which has no memory for the compiler.
fn compile_kernels(run: &RunJob) -> Result<(), Failure> {
    match run.device {
        DeviceKind::Cuda => cuda::compile_kernels(&run.gpu).map_err(Failure::failed),
        _ => Ok(()),
    }
}

/// Opens the machine, as part of the time to load.
fn begin(
    run: &RunJob,
    (measured, setup): (&mut Measured, &mut SetupFigures),
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<Started, EngineError> {
    os::reset_peak();
    measured.others();
    talk.stage("mapping memory");
    let began = Instant::now();
    let started = start(run, &mut Waiting { talk, stop, began });
    setup.load_s = began.elapsed().as_secs_f64();
    started
}

fn is_unpinned(started: &Result<Started, EngineError>, talk: &mut Talk) -> bool {
    let why = started.as_ref().ok().and_then(Started::unpinned);
    if let Some(why) = why {
        talk.note(&format!("note: {why}; planning again without"));
    }
    why.is_some()
}

/// The rates of what really is page-locked; where that is not all, what it costs is said.
fn as_locked(
    job: &Execution,
    (run, rates): (&RunJob, Rates),
    started: &Result<Started, EngineError>,
    talk: &mut Talk,
) -> Rates {
    let Some((unlocked, why)) = started.as_ref().ok().and_then(Started::unlocked) else {
        return rates;
    };
    if unlocked.0.is_empty() {
        talk.note(&format!("note: {why}"));
        return rates;
    }
    let locked = rates.clone().with_unlocked(unlocked.clone());
    let workload = prompts::workload(job.lines);
    let speed = |rates| {
        let figures = expected_figures(run, rates, (&workload, job.plan.budget));
        figures.throughput_tok_s
    };
    let (planned, left) = (speed(&rates), speed(&locked));
    talk.note(&format!(
        "note: {why} ({}): {left:.2} tok/s are expected, {planned:.2} with all of it",
        unlocked.describe()
    ));
    locked
}

/// A machine with its weights at home.
type Loaded = (ThreadedMachine, RunFacts);

/// Brings the weights home, the rest of the time to load.
fn load(
    (run, started): (&RunJob, Result<Started, EngineError>),
    setup: &mut SetupFigures,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<Loaded, EngineError> {
    let started = started?;
    talk.stage("loading the weights");
    let began = Instant::now();
    let (machine, facts) = started.load(run, &mut Waiting { talk, stop, began })?;
    setup.load_s += began.elapsed().as_secs_f64();
    setup.written_bytes += facts.footprint.spill.rows + facts.cache_file_bytes();
    Ok((machine, facts))
}

/// Generates; what was measured is kept even when the run breaks off.
fn generate(
    loaded: Result<Loaded, EngineError>,
    (requests, options): (Vec<Request>, RunOptions),
    measured: &mut Measured,
    (results, talk): (&mut Results, &mut Talk),
    stop: &AtomicBool,
) -> Result<Outcome, EngineError> {
    let (mut machine, facts) = loaded?;
    talk.stage("generating");
    let most_tokens = requests.iter().map(|r| r.max_tokens as u64).sum();
    let mut sink = ResultSink::new(results, talk, most_tokens);
    let outcome = Engine::new(&mut machine, facts, options).run(
        requests,
        &mut *measured.watch(&mut sink),
        stop,
    );
    let all = machine.submitted();
    let settled = machine.wait(&all);
    measured.lanes = machine.lane_figures();
    measured.peaks();
    measured.outcome = measured.so_far();
    let outcome = outcome?;
    settled?;
    measured.outcome = outcome;
    Ok(outcome)
}

fn how_it_ended(
    ran: &Result<Outcome, EngineError>,
    (failed_lines, first_bad): (u64, Option<&(usize, LineError)>),
    closed: bool,
) -> Option<Failure> {
    match ran {
        _ if closed => None,
        Err(error) => Some(Failure::failed(error)),
        Ok(outcome) if outcome.interrupted => {
            let done = outcome.lines_done;
            Some(Failure::failed(format!(
                "interrupted after {done} finished lines, which are all written"
            )))
        }
        Ok(_) if failed_lines > 0 => {
            let first = first_bad.map_or("; their results say why".to_owned(), |(_, e)| {
                format!("; the first: {}", e.message)
            });
            let lines = if failed_lines == 1 { "line" } else { "lines" };
            Some(Failure::failed(format!(
                "{failed_lines} input {lines} failed, the others are done{first}"
            )))
        }
        Ok(_) => None,
    }
}

fn outcome_of(
    ran: &Result<Outcome, EngineError>,
    failure: &Option<Failure>,
    closed: bool,
) -> RunOutcome {
    match (ran, failure) {
        (Err(_), _) if closed => RunOutcome::Interrupted,
        (Ok(outcome), _) if outcome.interrupted => RunOutcome::Interrupted,
        (Err(EngineError::Interrupted), _) => RunOutcome::Interrupted,
        (_, Some(_)) => RunOutcome::Failed,
        _ => RunOutcome::Done,
    }
}

pub(super) fn host_facts(gpu: Option<&LocalGpu>) -> HostFacts {
    HostFacts {
        cpu: os::cpu_info().describe(),
        gpu: gpu.map(|gpu| gpu.facts.name.clone()),
        kernel: os::kernel_version(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
