//! `accuracy`: random jobs drawn, planned and written down first, then measured round by round, then
//! judged. Nothing that is measured changes what was predicted.

use super::accuracy_files::{Folder, begun, read_rows};
use super::args::AccuracyArgs;
use super::commands::{say, say_json};
use super::execute::host_facts;
use super::failure::Failure;
use super::progress::Talk;
use super::settle::{Input, Model, Target};
use super::show_accuracy::{show_plans, show_verdict};
use super::solve::plan_fixed;
use super::trial::Trial;
use crate::cost::estimate::{EstimateInput, estimate};
use crate::cost::figures::Figures;
use crate::cost::rates::Rates;
use crate::engine::replay::replay;
use crate::plan::Plan;
use crate::planner::CompressMode;
use crate::policy::{Compute, Policy, Shares};
use crate::probe::{burst_bytes, timestamp};
use crate::proof::bound::Bound;
use crate::proof::draw::{DrawnRow, Draws, drawn_row};
use crate::proof::judge::{Judged, Verdict, judge};
use crate::proof::record::{ROWS_SCHEMA, RowRecord, Rows, RunRecord};
use crate::tier::{PerTier, Tier};
use crate::units::{MIB, show_bytes, show_seconds};
use crate::workload::Workload;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Draws for one row before its size is given up.
const MOST_DRAWS: u64 = 400;
/// Left free beside a row and its bursts: others may need some meanwhile.
const SPARE_BYTES: u64 = 256 * MIB;
/// Bursts that differ by no more than this part before and after a run agree.
const STEADY: f64 = 0.15;
/// Until a host has taken back what planning, packing or the largest row has freed.
const ROUND_REST: Duration = Duration::from_secs(10);
/// How often a row runs at most until they do.
const MOST_TRIES: usize = 3;
const BROKEN_OFF: &str = "interrupted: finished rows are kept; the same command goes on";

/// Draws, plans, measures, judges.
pub fn accuracy(args: &AccuracyArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    if let Some(index) = args.visit {
        return visit(args, index, talk, stop);
    }
    let rows = match &args.judge {
        Some(path) => read_rows(path)?,
        None => measured_rows(args, talk, stop)?,
    };
    talk.end();
    if args.plan_only {
        return match args.json {
            true => say_json(&rows),
            false => say(&show_plans(&rows)),
        };
    }
    let verdict = judged(&rows, args.reprice)?;
    if verdict.rows.is_empty() {
        return Err(Failure::failed("no row was measured")
            .with_hint("the same command goes on where it was interrupted"));
    }
    match args.json {
        true => say_json(&verdict)?,
        false => say(&show_verdict(&verdict))?,
    }
    if !verdict.complete {
        talk.note("some rows have fewer than five runs: the same command goes on with them");
    }
    Ok(())
}

/// Judges saved rows by the plans' own predictions, or by this version's.
fn judged(rows: &Rows, reprice: bool) -> Result<Verdict, Failure> {
    let mut specs = Vec::new();
    for row in &rows.rows {
        let model = Model::find(&row.plan.model.name, 0, true)?;
        let policy = row.plan.to_policy().map_err(Failure::failed)?;
        let device = row.plan.device_kind().map_err(Failure::failed)?;
        let rates = Rates::new(&rows.profile, device, policy.threads).map_err(Failure::failed)?;
        let predicted = match (&row.plan.estimate, reprice) {
            (Some(figures), false) => figures.clone(),
            _ => repriced(&row.plan, (&model, &policy, &rates)),
        };
        specs.push((model.spec, policy, rates, predicted));
    }
    let pairs = rows.rows.iter().zip(&specs);
    let judged: Vec<Judged> = pairs
        .map(|(record, (model, policy, rates, predicted))| Judged {
            record,
            bound: Bound {
                model,
                plan: &record.plan,
                policy,
                rates,
            },
            predicted,
        })
        .collect();
    Ok(judge(rows, &judged))
}

fn repriced(plan: &Plan, (model, policy, rates): (&Model, &Policy, &Rates)) -> Figures {
    let w = &plan.workload;
    let workload = Workload::of_totals(w.prompts, w.prompt_tokens, w.gen_tokens);
    let input = EstimateInput {
        model: &model.spec,
        workload: &workload,
        rates,
        policy,
        host: model.host_bytes(Input::planned(plan), policy.threads),
        budget: PerTier {
            gpu: plan.budget.gpu_bytes.unwrap_or(0),
            cpu: plan.budget.cpu_bytes,
            disk: plan.budget.disk_bytes,
        },
    };
    replay(&input).unwrap_or_else(|| estimate(&input))
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes())
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// Plans first, or those of a measurement that was begun; then round after round of runs.
fn measured_rows(args: &AccuracyArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<Rows, Failure> {
    let folder = Folder::of(args)?;
    let offload_dir = args.limits.place.offload_dir();
    let mut rows = match folder.rows().exists() {
        true => begun(args, &read_rows(&folder.rows())?)?,
        false => planned(args, &folder, &offload_dir, (talk, stop))?,
    };
    talk.end();
    for line in show_plans(&rows).lines() {
        talk.note(line);
    }
    if args.plan_only {
        return Ok(rows);
    }
    let begin = Instant::now();
    let order = smallest_first(&rows);
    let finished = rows.rows.iter().map(|row| row.runs.len()).min();
    for round in finished.unwrap_or(0) + 1..=args.runs {
        rest(ROUND_REST, stop);
        for (place, &index) in order.iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                talk.note(BROKEN_OFF);
                return Ok(rows);
            }
            if rows.rows[index].runs.len() >= round {
                continue;
            }
            let name = rows.rows[index].name.clone();
            talk.stage(&format!(
                "round {round} of {}, row {} of {} ({name}), {} so far",
                args.runs,
                place + 1,
                order.len(),
                show_seconds(begin.elapsed().as_secs_f64())
            ));
            match steady_run((&rows, index), &folder, &offload_dir, (talk, stop)) {
                Ok(run) => rows.rows[index].runs.push(run),
                Err(_) if stop.load(Ordering::Relaxed) => {
                    talk.note(BROKEN_OFF);
                    return Ok(rows);
                }
                Err(failure) => return Err(failure),
            }
            folder.save("rows.json", &rows.to_json())?;
        }
    }
    Ok(rows)
}

/// Rows by their memory: the next row takes what the one before has given back, and the host has nothing to take
/// back while it runs.
fn smallest_first(rows: &Rows) -> Vec<usize> {
    let mut order: Vec<usize> = (0..rows.rows.len()).collect();
    order.sort_by_key(|&index| rows.rows[index].plan.peak_bytes(Tier::Cpu));
    order
}

fn rest(time: Duration, stop: &AtomicBool) {
    let begin = Instant::now();
    while begin.elapsed() < time && !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A run around which the bursts agree: where they do not, nobody can say how fast the machine was meanwhile, and
/// the row runs again. That is decided by the bursts alone; after `MOST_TRIES` the steadiest run counts.
fn steady_run(
    row: (&Rows, usize),
    folder: &Folder,
    offload_dir: &Path,
    (talk, stop): (&mut Talk, &AtomicBool),
) -> Result<RunRecord, Failure> {
    let mut steadiest = run_apart(row, folder, offload_dir, (talk, stop))?;
    for _ in 1..MOST_TRIES {
        if steadiest.change() <= STEADY || stop.load(Ordering::Relaxed) {
            break;
        }
        let again = run_apart(row, folder, offload_dir, (talk, stop))?;
        if again.change() < steadiest.change() {
            steadiest = again;
        }
    }
    Ok(steadiest)
}

/// A run in a process of its own, so that its peak of memory is its own too. Packing comes first, in
/// this one.
fn run_apart(
    (rows, index): (&Rows, usize),
    folder: &Folder,
    offload_dir: &Path,
    (talk, stop): (&mut Talk, &AtomicBool),
) -> Result<RunRecord, Failure> {
    let plan = &rows.rows[index].plan;
    let model = Model::find(&plan.model.name, 0, false)?;
    Trial::new((&model, plan), &rows.profile, offload_dir, (talk, stop))?;
    let program = std::env::current_exe().map_err(Failure::failed)?;
    let out = Command::new(program)
        .args(["accuracy", "--visit", &index.to_string(), "--out"])
        .arg(folder.path())
        .arg("--offload-dir")
        .arg(offload_dir)
        .stdin(Stdio::null())
        .output()
        .map_err(Failure::failed)?;
    if !out.status.success() {
        let told = String::from_utf8_lossy(&out.stderr);
        let last = told.lines().last().unwrap_or("it was killed");
        return Err(Failure::failed(format!(
            "{}: {last}",
            rows.rows[index].name
        )));
    }
    serde_json::from_slice(&out.stdout).map_err(|e| Failure::failed(e.to_string()))
}

/// One run of a row, as JSON on stdout.
fn visit(
    args: &AccuracyArgs,
    index: usize,
    talk: &mut Talk,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let mut rows = read_rows(&Folder::of(args)?.rows())?;
    let too_far = || Failure::usage(format!("--visit {index}: there is no such row"));
    let plan = rows.rows.get(index).ok_or_else(too_far)?.plan.clone();
    rows.rows.clear();
    let model = Model::find(&plan.model.name, 0, false)?;
    let offload_dir = args.limits.place.offload_dir();
    let trial = Trial::new((&model, &plan), &rows.profile, &offload_dir, (talk, stop))?;
    say_json(&trial.run_between_bursts(stop)?)
}

/// Profile, plans, and rows without runs: all written before anything is measured.
fn planned(
    args: &AccuracyArgs,
    folder: &Folder,
    offload_dir: &Path,
    (talk, stop): (&mut Talk, &AtomicBool),
) -> Result<Rows, Failure> {
    let mut target = Target::settle(&args.limits, talk, stop)?;
    target.budget.cpu_bytes = target
        .budget
        .cpu_bytes
        .saturating_sub(burst_bytes() + SPARE_BYTES);
    let profile = target.profile.to_toml();
    folder.save("profile.toml", &profile)?;
    talk.stage(&format!("drawing and planning {} rows", args.rows));
    let mut drawing = Drawing::new(args, &target, offload_dir)?;
    let mut rows = Rows {
        schema: ROWS_SCHEMA.to_owned(),
        seed: args.seed,
        max_row_s: args.max_row_s,
        started_at: timestamp(),
        host: host_facts(None),
        profile_sha256: sha256(&profile),
        profile: target.profile.clone(),
        rows: Vec::new(),
    };
    for number in 0..args.rows {
        if stop.load(Ordering::Relaxed) {
            return Err(Failure::failed("interrupted before anything was measured"));
        }
        let (name, plan) = drawing.row(number)?;
        let text = plan.to_toml();
        folder.save(&format!("{name}.toml"), &text)?;
        rows.rows.push(RowRecord {
            name,
            plan,
            plan_sha256: sha256(&text),
            runs: Vec::new(),
        });
    }
    folder.save("rows.json", &rows.to_json())?;
    Ok(rows)
}

/// The draw: sizes in turn, and for each a job that fits and is short enough.
struct Drawing<'a> {
    args: &'a AccuracyArgs,
    target: &'a Target,
    offload_dir: &'a Path,
    rates: Rates,
    models: Vec<Model>,
    /// Stores that rows so far need, by (size, 4-bit), in bytes that are not on the disk yet.
    stores: BTreeMap<(usize, bool), u64>,
}

impl<'a> Drawing<'a> {
    fn new(
        args: &'a AccuracyArgs,
        target: &'a Target,
        offload_dir: &'a Path,
    ) -> Result<Self, Failure> {
        let find =
            |s: &crate::model::ModelSpec| Model::find(&format!("synth:{}", s.name), 0, false);
        let models: Result<Vec<Model>, Failure> = args.sizes.iter().map(find).collect();
        let rates = Rates::new(&target.profile, target.device, target.threads);
        Ok(Drawing {
            args,
            target,
            offload_dir,
            rates: rates.map_err(Failure::failed)?,
            models: models?,
            stores: BTreeMap::new(),
        })
    }

    /// The row of a number: its size is drawn once, the rest until it is kept.
    fn row(&mut self, number: usize) -> Result<(String, Plan), Failure> {
        let mut draws = Draws::new(self.args.seed, number as u64);
        let sizes: Vec<usize> = (0..self.models.len()).collect();
        for _ in 0..4 * sizes.len() {
            let size = draws.one_of(&sizes);
            for _ in 0..MOST_DRAWS {
                let row = drawn_row(&mut draws);
                if let Some(plan) = self.kept(size, &row)? {
                    let short = self.models[size].spec.name.replace("opt-", "");
                    return Ok((format!("row-{:02}-{short}", number + 1), plan));
                }
            }
        }
        Err(Failure::failed(format!(
            "no row of these sizes is predicted to take at most {} s within {} of memory and {} of disk",
            self.args.max_row_s,
            show_bytes(self.target.budget.cpu_bytes),
            show_bytes(self.target.budget.disk_bytes)
        ))
        .with_hint("raise --max-row-seconds, --cpu-mem or --disk-space, or name smaller --sizes"))
    }

    /// The plan of a row, where it fits memory, disk and time.
    fn kept(&mut self, size: usize, row: &DrawnRow) -> Result<Option<Plan>, Failure> {
        let model = &self.models[size];
        let workload = Workload::uniform(row.prompts, row.prompt_tokens, row.gen_tokens);
        if row.prompt_tokens + row.gen_tokens > model.spec.positions as u32 {
            return Ok(None);
        }
        let rough = self.rough(model, row, &workload)?;
        let limit_s = self.args.max_row_s;
        if rough.total_s > 1.2 * limit_s
            || rough.tiers[Tier::Cpu].peak_bytes > self.target.budget.cpu_bytes
            || !self.has_room(size, row, rough.tiers[Tier::Disk].peak_bytes)
        {
            return Ok(None);
        }
        let how = (&workload, row.fixed, CompressMode::Auto);
        let plan = plan_fixed(model, self.target, how, self.offload_dir)?;
        let fits = plan.estimate.as_ref().is_some_and(|e| e.total_s <= limit_s);
        if !fits {
            return Ok(None);
        }
        let four_bit = row.fixed.compress_weight == Some(true);
        let bytes = if plan.setup.pack_s > 0.0 {
            plan.setup.store_bytes
        } else {
            0
        };
        self.stores.insert((size, four_bit), bytes);
        Ok(Some(plan))
    }

    /// The closed form's figures, before anything is searched.
    fn rough(
        &self,
        model: &Model,
        row: &DrawnRow,
        workload: &Workload,
    ) -> Result<Figures, Failure> {
        let fixed = &row.fixed;
        let percent = fixed
            .percent
            .unwrap_or([0.0, 100.0, 0.0, 100.0, 0.0, 100.0]);
        let policy = Policy {
            shares: Shares::from_percent(percent, 1.0).map_err(Failure::failed)?,
            gpu_batch_size: fixed.gpu_batch_size.unwrap_or(1),
            num_gpu_batches: fixed.num_gpu_batches.unwrap_or(1),
            pin_weight: false,
            compress_weight: fixed.compress_weight == Some(true),
            compress_cache: fixed.compress_cache == Some(true),
            cpu_cache_compute: false,
            double_buffer: false,
            overlap: fixed.overlap != Some(false),
            compute: Compute::Exact,
            kv: crate::dtype::Dtype::F16,
            threads: self.target.threads,
        };
        Ok(estimate(&EstimateInput {
            model: &model.spec,
            workload,
            rates: &self.rates,
            policy: &policy,
            host: model.host_bytes(Input::of(workload), self.target.threads),
            budget: PerTier::default(),
        }))
    }

    /// Whether the stores of all rows and this row's spill fit the disk together.
    fn has_room(&self, size: usize, row: &DrawnRow, disk_bytes: u64) -> bool {
        let four_bit = row.fixed.compress_weight == Some(true);
        let others = self
            .stores
            .iter()
            .filter(|(key, _)| **key != (size, four_bit));
        let taken: u64 = others.map(|(_, bytes)| bytes).sum();
        taken + disk_bytes <= self.target.budget.disk_bytes
    }
}
