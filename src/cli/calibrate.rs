//! `calibrate`: multipliers of a profile's terms from measured runs, shown before and after, written
//! into the profile with where they come from.

use super::args::CalibrateArgs;
use super::commands::{say, say_json};
use super::failure::Failure;
use super::settle::{Model, named_profile};
use crate::cost::figures::Figures;
use crate::machine::disk::write_atomically;
use crate::plan::Plan;
use crate::policy::Policy;
use crate::probe::{profiles_dir, timestamp};
use crate::profile::{Calibration, HardwareProfile};
use crate::proof::fit::{Fit, Sample, fit};
use crate::proof::record::Rows;
use crate::proof::visit::median_figures;
use crate::report::{RunOutcome, RunReport};
use crate::workload::Workload;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A run that counts.
struct Job {
    name: String,
    plan: Plan,
    policy: Policy,
    model: Model,
    measured: Figures,
    /// Lines that were done.
    lines: u64,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    profile: &'a str,
    written: Option<String>,
    jobs: usize,
    equations: usize,
    before_pct: f64,
    after_pct: f64,
    old: &'a Calibration,
    new: &'a Calibration,
}

pub fn calibrate(args: &CalibrateArgs) -> Result<(), Failure> {
    let jobs = read_jobs(&args.reports)?;
    let (path, mut profile) = profile_of(args, &jobs)?;
    let old = profile.calibration.clone();
    let fitted = fitted(&profile, &jobs)?;
    let new = match args.reset {
        true => Calibration::default(),
        false => Calibration {
            date: timestamp(),
            reports: args
                .reports
                .iter()
                .map(|p| p.display().to_string())
                .collect(),
            before_pct: rounded(fitted.before_pct),
            after_pct: rounded(fitted.after_pct),
            terms: fitted.multipliers.clone(),
        },
    };
    profile.calibration = new.clone();
    let written = (!args.dry_run).then(|| path.display().to_string());
    if !args.dry_run {
        // What is written is what will be read: checked by the same reader.
        let text = profile.to_toml();
        HardwareProfile::from_toml(&text).map_err(Failure::failed)?;
        write_atomically(&path, text.as_bytes()).map_err(Failure::failed)?;
    }
    let document = Document {
        schema: "loadmaster.calibrate/1",
        profile: &profile.machine.name,
        written,
        jobs: jobs.len(),
        equations: fitted.equations,
        before_pct: rounded(fitted.before_pct),
        after_pct: rounded(fitted.after_pct),
        old: &old,
        new: &new,
    };
    match args.json {
        true => say_json(&document),
        false => say(&shown(&document)),
    }
}

fn rounded(pct: f64) -> f64 {
    (pct * 100.0).round() / 100.0
}

fn shown(d: &Document) -> String {
    let mut text = format!(
        "{} jobs, {} measured lanes: mean error of busy seconds {:.1} % without multipliers, {:.1} % with these (closed form)\n",
        d.jobs, d.equations, d.before_pct, d.after_pct
    );
    text += "term                 before   after\n";
    let names: std::collections::BTreeSet<&String> =
        d.old.terms.keys().chain(d.new.terms.keys()).collect();
    for name in names {
        let of = |c: &Calibration| c.terms.get(name).copied().unwrap_or(1.0);
        text += &format!("{name:<20} {:>6.3}  {:>6.3}\n", of(d.old), of(d.new));
    }
    text += &match &d.written {
        Some(path) => format!(
            "written to {path}; `--no-calibration` ignores it, `calibrate --reset` takes it away\n"
        ),
        None => "nothing was written (--dry-run)\n".to_owned(),
    };
    text
}

fn fitted(profile: &HardwareProfile, jobs: &[Job]) -> Result<Fit, Failure> {
    let sample = |job: &'_ Job| -> Result<_, Failure> {
        // What came, which need not be what was planned.
        let came = &job.measured;
        let tokens = (came.prompt_tokens, came.generated_tokens);
        Ok((
            job.plan.device_kind().map_err(Failure::failed)?,
            Workload::of_totals(job.lines, tokens.0, tokens.1),
        ))
    };
    let mut samples = Vec::with_capacity(jobs.len());
    for job in jobs {
        let (device, workload) = sample(job)?;
        samples.push(Sample {
            name: job.name.clone(),
            model: &job.model.spec,
            policy: &job.policy,
            device,
            workload,
            measured: &job.measured,
        });
    }
    fit(profile, &samples).map_err(Failure::failed)
}

/// Reports of finished runs, and rows of `accuracy` by the median of their runs.
fn read_jobs(paths: &[PathBuf]) -> Result<Vec<Job>, Failure> {
    let mut jobs = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let failed = |e: String| {
            Failure::failed(format!("{name}: {e}")).with_hint(
                "name reports saved by `loadmaster exec --report` or rows saved by `loadmaster accuracy`",
            )
        };
        let text =
            std::fs::read_to_string(path).map_err(|e| failed(format!("cannot be read ({e})")))?;
        if let Ok(rows) = Rows::from_json(&text) {
            for row in rows.rows.into_iter().filter(|r| !r.runs.is_empty()) {
                let runs: Vec<Figures> = row.runs.into_iter().map(|r| r.measured).collect();
                let lines = row.plan.workload.prompts;
                let name = format!("{name}:{}", row.name);
                jobs.push(job(name, row.plan, (median_figures(&runs), lines))?);
            }
            continue;
        }
        let report = RunReport::from_json(&text).map_err(|e| failed(e.to_string()))?;
        if report.outcome != RunOutcome::Done || report.lines.ok == 0 {
            return Err(failed(
                "the run did not end well, so its figures teach nothing".to_owned(),
            ));
        }
        let measured = (report.measured, report.lines.ok);
        jobs.push(job(name.clone(), report.plan, measured)?);
    }
    match jobs.is_empty() {
        true => Err(Failure::failed("there is no finished run in these files")),
        false => Ok(jobs),
    }
}

fn job(name: String, plan: Plan, (measured, lines): (Figures, u64)) -> Result<Job, Failure> {
    Ok(Job {
        name,
        policy: plan.to_policy().map_err(Failure::failed)?,
        model: Model::find(plan.model.name.trim_start_matches("synth:"), 0, true)
            .or_else(|_| Model::find(&plan.model.name, 0, true))?,
        plan,
        measured,
        lines,
    })
}

/// The profile to refine and its file. One that is compiled in becomes a file under profiles/.
fn profile_of(args: &CalibrateArgs, jobs: &[Job]) -> Result<(PathBuf, HardwareProfile), Failure> {
    let offload_dir = args.place.offload_dir();
    let name = match &args.profile {
        Some(name) => name.clone(),
        None => jobs[0].plan.profile.name.clone(),
    };
    let strange = jobs
        .iter()
        .find(|j| args.profile.is_none() && j.plan.profile.name != name);
    if let Some(job) = strange {
        return Err(Failure::usage(format!(
            "{} was planned with profile \"{}\", the others with \"{name}\"",
            job.name, job.plan.profile.name
        ))
        .with_hint("calibrate with runs of one machine, or name the profile with --profile"));
    }
    let profile = named_profile(&name, &offload_dir)?;
    let as_file = Path::new(&name);
    // The file that it was read from; a profile's own name need not be its file's.
    let saved = |name: &str| profiles_dir(&offload_dir).join(format!("{name}.toml"));
    let path = match as_file.is_file() {
        true => as_file.to_owned(),
        false if saved(&name).is_file() => saved(&name),
        false => saved(&profile.machine.name),
    };
    if let (Some(dir), false) = (path.parent(), args.dry_run) {
        std::fs::create_dir_all(dir).map_err(Failure::failed)?;
    }
    Ok((path, profile))
}
