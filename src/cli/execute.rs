//! `exec`, and the second half of `run`: a plan, a model and lines become results and a report.

use super::args::ResultArgs;
use super::failure::Failure;
use super::gpu::{LocalGpu, gpu_index};
use super::progress::{Talk, Unit};
use super::prompt_lines::{Line, LineError};
use super::prompts;
use super::results::{ResultSink, Results, check_place};
use super::settle::Model;
use crate::checkpoint::WeightSource;
use crate::cost::footprint::HostBytes;
use crate::cost::rates::Rates;
use crate::engine::open::{Packed, RunJob, Started, footprint, start};
use crate::engine::{Engine, EngineError, Outcome, Request, RunOptions};
use crate::machine::cpu::pool::Pool;
use crate::machine::disk::write_atomically;
use crate::machine::price::Pricer;
use crate::machine::{Machine, disk, os};
use crate::measured::{Measured, expected_figures, measured_figures, repriced_figures};
use crate::plan::Plan;
use crate::policy::{DeviceKind, Policy};
use crate::probe;
use crate::profile::HardwareProfile;
use crate::report::{HostFacts, REPORT_SCHEMA, RunOutcome, RunReport, SetupFigures};
use crate::store::{self, PackJob, Packing, Store};
use crate::tier::Tier;
use crate::units::{MIB, show_bytes};
use crate::workload::Lengths;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Packing keeps its buffers within this.
const PACK_MEMORY_BYTES: u64 = 192 * MIB;

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
    pub probe_s: f64,
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

/// None where another plan is wanted: nothing has been written then.
pub type Attempt = Result<Option<Executed>, Failure>;

/// Packs where needed, runs, measures.
pub fn execute(job: Execution, talk: &mut Talk, stop: &AtomicBool) -> Attempt {
    let started_at = probe::timestamp();
    let policy = job.plan.to_policy().map_err(Failure::failed)?;
    let device = job.plan.device_kind().map_err(Failure::failed)?;
    let gpu = gpu_of(job.plan, device)?;
    check_model(job.plan, job.model)?;
    let rates = Rates::new(job.profile, device, policy.threads).map_err(Failure::failed)?;
    check_places(job.results)?;
    let mut setup = SetupFigures {
        probe_s: job.probe_s,
        ..SetupFigures::default()
    };
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
    check_room(&run, job.offload_dir).and_then(|()| check_gpu_room(&run, gpu.as_ref()))?;
    let store = store_of(&job, &policy, (&mut setup, talk), stop)?;
    let packed = store.as_ref().map(packed).unwrap_or_default();
    let run = RunJob {
        packed: &packed,
        ..run
    };
    os::release_free_heap();
    check_room(&run, job.offload_dir)?;
    let (requests, bad) = prompts::split(job.lines);
    let mut measured = Measured::new(job.plan.budget, shapes(&requests));
    measured.gpu_bus_id = gpu.as_ref().map(|gpu| gpu.facts.bus_id.clone());
    let started = begin(&run, (&mut measured, &mut setup), talk);
    if job.may_replan && is_unpinned(&started, talk) {
        return Ok(None);
    }
    let rates = as_locked(&job, (&run, rates), &started, talk);
    let mut results = open_results(&job, &bad)?;
    let ignore_eos = job.ignore_eos;
    let ran = generate(
        (&run, started),
        (requests, RunOptions { ignore_eos }),
        (&mut measured, &mut setup),
        (&mut results, talk),
        stop,
    );
    talk.end();
    let counts = results.counts();
    let failure = how_it_ended(&ran, (counts.failed, bad.first()), results.is_closed());
    let report = RunReport {
        schema: REPORT_SCHEMA.to_owned(),
        plan: job.plan.clone(),
        outcome: outcome_of(&ran, &failure),
        started_at,
        finished_at: probe::timestamp(),
        lines: counts,
        host: host_facts(gpu.as_ref()),
        setup,
        repriced: repriced_figures(&run, &rates, &measured),
        measured: measured_figures(&run, &measured),
    };
    save(&report, job.results)?;
    Ok(Some(Executed { report, failure }))
}

fn save(report: &RunReport, to: &ResultArgs) -> Result<(), Failure> {
    let write = |path| write_atomically(path, report.to_json().as_bytes());
    let written = to.report.as_deref().map_or(Ok(()), write);
    written.map_err(Failure::failed)
}

fn host_bytes(job: &Execution, device: DeviceKind, threads: usize) -> HostBytes {
    let prompt_tokens = job.plan.workload.prompt_tokens;
    let own = job.model.host_bytes(prompt_tokens, threads);
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
    bad: &[(usize, LineError)],
) -> Result<Results<'a>, Failure> {
    let tokenizer = job.model.tokenizer.as_ref();
    let mut results = Results::open(job.results.output_file(), job.results.overwrite, tokenizer)
        .map_err(Failure::failed)?;
    bad.iter()
        .try_for_each(|(line, error)| results.failed(*line, error))
        .map_err(Failure::failed)?;
    Ok(results)
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

/// A plan holds for the weights that it was made for.
fn check_model(plan: &Plan, model: &Model) -> Result<(), Failure> {
    match (&plan.model.fingerprint, model.fingerprint()) {
        (Some(planned), Some(here)) if *planned != here => Err(Failure::failed(format!(
            "the plan was made for other weights than {} has now",
            model.name
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

/// What is missing is missing now: memory and disk against what is free at this moment.
pub(super) fn check_room(run: &RunJob, offload_dir: &Path) -> Result<(), Failure> {
    let needed = footprint(run);
    // DRAM plays the GPU of the host machine.
    let played = if run.device == DeviceKind::Host {
        needed.arena_bytes(Tier::Gpu)
    } else {
        0
    };
    let memory = needed.total(Tier::Cpu) + played;
    // What this process holds already is part of what the plan counts.
    let own = os::process_memory().map_or(0, |m| m.resident_bytes);
    let free = os::memory_now().map_err(Failure::failed)?.free_bytes + own;
    if memory > free {
        return Err(Failure::failed(format!(
            "the plan needs {} of memory and {} are free: {} are missing",
            show_bytes(memory),
            show_bytes(free),
            show_bytes(memory - free)
        ))
        .with_hint(format!(
            "end other programs, or plan again with --cpu-mem {}MiB",
            free / MIB * 9 / 10
        )));
    }
    let spill = needed.spill.total();
    let room = disk::free_bytes(offload_dir).map_err(Failure::failed)?;
    if spill > room {
        return Err(Failure::failed(format!(
            "the plan writes {} of cache, hidden state and turned weights to disk and {} are free: {} are missing",
            show_bytes(spill),
            show_bytes(room),
            show_bytes(spill - room)
        ))
        .with_hint("make room, or name another disk with --offload-dir"));
    }
    Ok(())
}

/// Device memory against what is free on the GPU now, context and libraries included.
fn check_gpu_room(run: &RunJob, gpu: Option<&LocalGpu>) -> Result<(), Failure> {
    let needed = footprint(run).total(Tier::Gpu);
    let free = gpu.and_then(LocalGpu::free_bytes).unwrap_or(u64::MAX);
    if needed <= free {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "the plan needs {} of GPU memory and {} are free: {} are missing",
        show_bytes(needed),
        show_bytes(free),
        show_bytes(needed - free)
    ))
    .with_hint(format!(
        "end other programs on the GPU, or plan again with --gpu-mem {}MiB",
        free / MIB
    )))
}

/// Where the model's weights come from.
fn source_of(model: &Model) -> Result<&dyn WeightSource, Failure> {
    let only_named = || {
        let name = &model.name;
        Failure::failed(format!("{name} is only a size's name")).with_hint(format!(
            "give a model's directory, or synth:{name} for random weights"
        ))
    };
    model.source.as_deref().ok_or_else(only_named)
}

/// The store of the plan's weights, where there is to be one.
fn store_of(
    job: &Execution,
    policy: &Policy,
    told: (&mut SetupFigures, &mut Talk),
    stop: &AtomicBool,
) -> Result<Option<Store>, Failure> {
    match job.unpacked {
        true => Ok(None),
        false => packed_store(job, policy, told, stop).map(Some),
    }
}

/// The store of the plan's weights: reused, or packed now.
pub(super) fn packed_store(
    job: &Execution,
    policy: &Policy,
    (setup, talk): (&mut SetupFigures, &mut Talk),
    stop: &AtomicBool,
) -> Result<Store, Failure> {
    let source = source_of(job.model)?;
    let device = job.plan.device_kind().map_err(Failure::failed)?;
    let compress = policy.compress_weight;
    let packing = Packing {
        compress,
        layout: device.weight_layout(),
    };
    if let Some(store) = store::find(
        job.offload_dir,
        source.spec(),
        &source.fingerprint(),
        packing,
    ) {
        return Ok(store);
    }
    let bytes = source.spec().weights_bytes(compress);
    let room = disk::free_bytes(job.offload_dir).map_err(Failure::failed)?;
    let limit = job.plan.budget.disk_bytes.min(room);
    if bytes > limit {
        return Err(Failure::failed(format!(
            "the packed weights take {} on disk and {} may be used: {} are missing",
            show_bytes(bytes), show_bytes(limit), show_bytes(bytes - limit)
        ))
        .with_hint("make room (loadmaster store list), raise --disk-space, or name another disk with --offload-dir"));
    }
    talk.stage(&format!("packing the weights once ({})", show_bytes(bytes)));
    let start = Instant::now();
    let pool = Pool::new(policy.threads);
    let mut progress = |done: u64, total: u64| {
        talk.step(
            done,
            total,
            Unit::Bytes,
            done as f64 / start.elapsed().as_secs_f64().max(1e-9),
        );
    };
    let store = store::pack(PackJob {
        source,
        offload_dir: job.offload_dir,
        packing,
        pool: &pool,
        memory_bytes: PACK_MEMORY_BYTES.min(job.plan.budget.cpu_bytes / 2),
        progress: &mut progress,
        stop,
    });
    let store = store.map_err(Failure::failed)?;
    setup.pack_s = start.elapsed().as_secs_f64();
    setup.written_bytes = store.file_bytes();
    talk.end();
    Ok(store)
}

/// The store as the engine reads it.
pub(super) fn packed(store: &Store) -> Packed {
    let spec = store.spec();
    let matrices = 0..spec.matrices().len();
    let smalls = 0..spec.smalls().len();
    Packed {
        file: store.file_path(),
        matrix_offsets: matrices.map(|i| store.matrix_offset(i)).collect(),
        small_offsets: smalls.map(|i| store.small_range(i).start as u64).collect(),
    }
}

/// Opens the machine, as part of the time to load.
fn begin(
    run: &RunJob,
    (measured, setup): (&mut Measured, &mut SetupFigures),
    talk: &mut Talk,
) -> Result<Started, EngineError> {
    os::reset_peak();
    measured.others();
    talk.stage("mapping memory");
    let began = Instant::now();
    let started = start(run);
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

/// Loads and generates; what was measured is kept even when the run breaks off.
fn generate(
    (run, started): (&RunJob, Result<Started, EngineError>),
    (requests, options): (Vec<Request>, RunOptions),
    (measured, setup): (&mut Measured, &mut SetupFigures),
    (results, talk): (&mut Results, &mut Talk),
    stop: &AtomicBool,
) -> Result<Outcome, EngineError> {
    let started = started?;
    talk.stage("loading the weights");
    let began = Instant::now();
    let (mut machine, facts) = started.load(run)?;
    setup.load_s += began.elapsed().as_secs_f64();
    let spill = facts.footprint.spill;
    setup.written_bytes += spill.rows + spill.cache * u64::from(facts.block.kv_tokens.disk > 0);
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

fn outcome_of(ran: &Result<Outcome, EngineError>, failure: &Option<Failure>) -> RunOutcome {
    match (ran, failure) {
        (Ok(outcome), _) if outcome.interrupted => RunOutcome::Interrupted,
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
