//! `series`: many runs in one process, each by a line of flags. What one run does is `run`'s.

use super::args::{Cli, Command, DASH, RunArgs, SeriesArgs};
use super::commands::{Ran, ran, say, say_json};
use super::failure::Failure;
use super::progress::Talk;
use super::show_compare;
use crate::compare::Comparison;
use crate::machine::cuda;
use crate::report::RunReport;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

struct Run {
    name: String,
    args: Box<RunArgs>,
}

/// Every line is read before anything runs. A run that fails does not keep the others from theirs.
pub fn series(args: &SeriesArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let text = read(&args.runs).map_err(|e| {
        Failure::failed(format!("{}: cannot be read ({e})", args.runs.display()))
            .with_hint("give a file with one run a line, or - and the lines on stdin")
    })?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let runs: Result<Vec<Run>, Failure> = lines.map(|line| parse(line, args)).collect();
    let runs = runs?;
    let mut names = BTreeSet::new();
    if let Some(twice) = runs.iter().find(|run| !names.insert(&run.name)) {
        return Err(
            Failure::usage(format!("two lines are called {}", twice.name))
                .with_hint("a run's files have its name: give each line one of its own"),
        );
    }
    std::fs::create_dir_all(&args.out)
        .map_err(|e| Failure::failed(format!("{}: cannot be made ({e})", args.out.display())))?;
    let (mut reports, mut failures) = (Vec::new(), Vec::new());
    let mut hint = None;
    for (number, run) in runs.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            failures.push(Failure::failed("interrupted").of(&run.name));
            break;
        }
        talk.note(&format!("run {}", run.name));
        let (report, failure) = one(run, talk, stop);
        reports.extend(report.map(|report| (run.name.clone(), report)));
        hint = after_a_fault(&runs[number + 1..]);
        // One that was met only when the machine was closed.
        let late = || hint.as_ref().and(cuda::fault()).map(Failure::failed);
        let failure = failure.or_else(late);
        failures.extend(failure.map(|failure| failure.of(&run.name)));
        if hint.is_some() {
            break;
        }
    }
    tell(&Comparison::new(reports), args.json)?;
    if failures.is_empty() {
        return Ok(());
    }
    let told: Vec<&str> = failures.iter().map(|f| f.message.as_str()).collect();
    let (count, all) = (failures.len(), runs.len());
    let why = format!("{count} of {all} runs failed; {}", told.join("; "));
    let failure = Failure::failed(why).after_document(args.json);
    Err(match hint {
        Some(hint) => failure.with_hint(hint),
        None => failure,
    })
}

/// What to do with the runs that are left, where the GPU can no longer be used by this process: each of them would
/// fail, and with an error that says nothing of why.
fn after_a_fault(left: &[Run]) -> Option<String> {
    let fault = cuda::fault().filter(|_| !left.is_empty())?;
    let names: Vec<&str> = left.iter().map(|run| run.name.as_str()).collect();
    Some(format!(
        "after {} the process must be started again: not run are {}; start a series of these",
        fault.text,
        names.join(", ")
    ))
}

/// A run's report and failure. That a budget does not hold it is a finding.
fn one(run: &Run, talk: &mut Talk, stop: &AtomicBool) -> (Option<RunReport>, Option<Failure>) {
    let ended = ran(&run.args, talk, stop);
    talk.end();
    match ended {
        Ok(Ran::Done(_, done)) => (Some(done.report), done.failure),
        Ok(Ran::DoesNotFit(failure)) => {
            talk.note(&format!("{} does not fit: {}", run.name, failure.message));
            (None, None)
        }
        Err(failure) => (None, Some(failure)),
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    if path == Path::new(DASH) {
        std::io::stdin().lock().read_to_string(&mut text)?;
    } else {
        text = std::fs::read_to_string(path)?;
    }
    Ok(text)
}

fn tell(comparison: &Comparison, json: bool) -> Result<(), Failure> {
    match json {
        true => say_json(comparison),
        false => say(&show_compare::show(comparison)),
    }
}

/// A line's run, as `run` would read the same flags.
fn parse(line: &str, series: &SeriesArgs) -> Result<Run, Failure> {
    let mut words = line.split_whitespace().map(str::to_owned);
    let name = words.next().unwrap_or_default();
    if name.starts_with('-') || name.contains('/') {
        let why = "a line begins with the run's name, which names its files";
        return Err(Failure::usage(format!("\"{line}\": {why}")));
    }
    let file = |extension: &str| series.out.join(format!("{name}.{extension}"));
    let own = [
        "--overwrite".into(),
        "--output".into(),
        file("jsonl").into_os_string(),
        "--report".into(),
        file("json").into_os_string(),
    ];
    let given = series.shared.iter().cloned().chain(words).map(Into::into);
    let command = ["loadmaster".into(), "run".into()];
    let all = command.into_iter().chain(given).chain(own);
    match Cli::read(all)
        .map_err(|e| Failure::from_clap(&e).of(&name))?
        .command
    {
        Command::Run(args) => Ok(Run { name, args }),
        _ => Err(Failure::usage(format!("\"{line}\" is no run"))),
    }
}
