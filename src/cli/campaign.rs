//! `campaign`: random triples of model, workload and budget, each run as a child inside a memory cgroup
//! equal to its budget. Prints what was seen; judging is proof/triple's.

use super::args::CampaignArgs;
use super::commands::{say, say_json};
use super::failure::Failure;
use super::next_command::ENOUGH;
use super::progress::Talk;
use super::results::check_place;
use super::settle::{Model, Target, make_offload_dir};
use super::solve::plan_fixed;
use super::trial::Trial;
use crate::checkpoint::{SynthJob, write_synth};
use crate::cost::figures::Figures;
use crate::machine::disk::write_atomically;
use crate::machine::os::{MemoryGroup, wait_for_peak};
use crate::plan::Plan;
use crate::planner::{CompressMode, Fixed};
use crate::proof::draw::Draws;
use crate::proof::triple::{
    CAMPAIGN_SCHEMA, DrawnWork, Seen, drawn_budget, drawn_model, drawn_work, faults,
    too_many_refusals,
};
use crate::report::RunReport;
use crate::tier::Tier;
use crate::units::{MIB, show_bytes, show_seconds};
use crate::workload::Workload;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Models of random shape in a campaign.
const RANDOM_MODELS: usize = 12;
/// The part of the triples that are of a named size.
const NAMED_PART: f64 = 0.55;
/// A refused budget's sufficient one, less this part, must be refused again.
const LESS: f64 = 0.9;

/// One triple and what became of it.
#[derive(Clone, Debug, Serialize)]
struct Outcome {
    number: usize,
    model: String,
    work: DrawnWork,
    budget_bytes: u64,
    /// The drawn budget was refused; `seen` is then of the budget that the refusal named.
    refused: bool,
    seen: Seen,
    faults: Vec<String>,
    seconds: f64,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    seed: u64,
    triples: usize,
    refused: usize,
    faulty: usize,
    seconds: f64,
    outcomes: &'a [Outcome],
}

/// What all triples share.
struct Campaign<'a> {
    target: Target,
    offload_dir: PathBuf,
    folder: PathBuf,
    models: Vec<(String, Model)>,
    named: usize,
    stop: &'a AtomicBool,
}

pub fn campaign(args: &CampaignArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let begin = Instant::now();
    // Where no group can be made, say so before anything is packed.
    drop(MemoryGroup::new(&group_name(0), 64 * MIB).map_err(Failure::failed)?);
    if let Some(path) = &args.out {
        check_place(path, true).map_err(Failure::failed)?;
    }
    let campaign = Campaign::new(args, talk, stop)?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for number in 1..=args.triples {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        talk.stage(&format!(
            "triple {number} of {}: {} refused, {} faulty, {} so far",
            args.triples,
            outcomes.iter().filter(|o| o.refused).count(),
            outcomes.iter().filter(|o| !o.faults.is_empty()).count(),
            show_seconds(begin.elapsed().as_secs_f64())
        ));
        let outcome = campaign.triple(args.seed, number)?;
        if stop.load(Ordering::Relaxed) {
            break;
        }
        for fault in &outcome.faults {
            talk.note(&format!("triple {number} ({}): {fault}", outcome.model));
        }
        outcomes.push(outcome);
        if let Some(path) = &args.out {
            let text = json(&document(args, &outcomes, begin.elapsed().as_secs_f64()));
            write_atomically(path, text.as_bytes()).map_err(Failure::failed)?;
        }
    }
    talk.end();
    drop(campaign);
    let document = document(args, &outcomes, begin.elapsed().as_secs_f64());
    match args.json {
        true => say_json(&document)?,
        false => say(&shown(&document))?,
    }
    let faulty = document.faulty;
    if let Some(many) = too_many_refusals(document.refused, outcomes.len()) {
        return Err(Failure::failed(many).after_document(args.json));
    }
    match (faulty, outcomes.len() < args.triples) {
        (0, false) => Ok(()),
        (0, true) => Err(
            Failure::failed(format!("interrupted after {} triples", outcomes.len()))
                .after_document(args.json),
        ),
        _ => Err(Failure::failed(format!(
            "{faulty} of {} triples show a fault",
            outcomes.len()
        ))
        .after_document(args.json)),
    }
}

fn json(document: &Document) -> String {
    serde_json::to_string_pretty(document).expect("outcomes are plain data")
}

fn document<'a>(args: &CampaignArgs, outcomes: &'a [Outcome], seconds: f64) -> Document<'a> {
    Document {
        schema: CAMPAIGN_SCHEMA,
        seed: args.seed,
        triples: outcomes.len(),
        refused: outcomes.iter().filter(|o| o.refused).count(),
        faulty: outcomes.iter().filter(|o| !o.faults.is_empty()).count(),
        seconds,
        outcomes,
    }
}

fn shown(d: &Document) -> String {
    let over = |o: &Outcome| o.seen.planned_bytes as f64 - o.seen.peak_bytes as f64;
    let ran = || d.outcomes.iter().filter(|o| o.seen.done);
    let most = ran().map(over).fold(f64::MIN, f64::max) / MIB as f64;
    let least = ran().map(over).fold(f64::MAX, f64::min) / MIB as f64;
    let above = match ran().next() {
        Some(_) => format!("{least:.1} to {most:.1} MiB"),
        None => "-".to_owned(),
    };
    let mut text = format!(
        "| seed | triples | refused | kills | failed charges | over plan | plan above VmHWM | faults | time |\n|---|---|---|---|---|---|---|---|---|\n| {} | {} | {} | {} | {} | {} | {above} | {} | {} |\n",
        d.seed,
        d.triples,
        d.refused,
        d.outcomes.iter().map(|o| o.seen.kills).sum::<u64>(),
        d.outcomes
            .iter()
            .map(|o| o.seen.failed_charges)
            .sum::<u64>(),
        ran()
            .filter(|o| o.seen.peak_bytes > o.seen.planned_bytes)
            .count(),
        d.faulty,
        show_seconds(d.seconds)
    );
    for outcome in d.outcomes.iter().filter(|o| !o.faults.is_empty()) {
        text += &format!(
            "triple {} ({}, {} x {} + {}, budget {}): {}\n",
            outcome.number,
            outcome.model,
            outcome.work.prompts,
            outcome.work.prompt_tokens,
            outcome.work.gen_tokens,
            show_bytes(outcome.budget_bytes),
            outcome.faults.join("; ")
        );
    }
    text
}

fn group_name(number: usize) -> String {
    format!("loadmaster-{}-{number}", std::process::id())
}

impl<'a> Campaign<'a> {
    /// Models of random shape are written, all weights are packed: no child packs.
    fn new(args: &CampaignArgs, talk: &mut Talk, stop: &'a AtomicBool) -> Result<Self, Failure> {
        let offload_dir = args.place.offload_dir();
        make_offload_dir(&offload_dir)?;
        let limits = super::arg_groups::LimitArgs::of_place(&args.place);
        let target = Target::settle(&limits, talk, stop)?;
        let folder = offload_dir.join(format!("campaign-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(Failure::failed)?;
        let mut campaign = Campaign {
            target,
            offload_dir,
            folder,
            models: Vec::new(),
            named: args.sizes.len(),
            stop,
        };
        for size in &args.sizes {
            let name = format!("synth:{}", size.name);
            let model = Model::find(&name, 0, false)?;
            campaign.models.push((name, model));
        }
        for number in 0..RANDOM_MODELS {
            campaign.write_model(args.seed, number)?;
        }
        for index in 0..campaign.models.len() {
            talk.stage(&format!(
                "packing model {} of {}",
                index + 1,
                campaign.models.len()
            ));
            campaign.pack(index, talk)?;
        }
        Ok(campaign)
    }

    fn write_model(&mut self, seed: u64, number: usize) -> Result<(), Failure> {
        let spec = drawn_model(&mut Draws::new(seed, 1_000_000 + number as u64), number);
        let dir = self.folder.join(&spec.name);
        write_synth(SynthJob {
            spec,
            seed,
            dir: &dir,
            shard_bytes: 1 << 30,
            progress: &mut |_, _| (),
            stop: self.stop,
        })
        .map_err(Failure::failed)?;
        let name = dir.display().to_string();
        let model = Model::find(&name, 0, false)?;
        self.models.push((name, model));
        Ok(())
    }

    /// Both formats: a small budget may need 4-bit weights.
    fn pack(&self, index: usize, talk: &mut Talk) -> Result<(), Failure> {
        let (_, model) = &self.models[index];
        for mode in [CompressMode::Never, CompressMode::Weights] {
            let plan = plan_fixed(
                model,
                &self.target,
                (&Workload::uniform(1, 4, 1), Fixed::default(), mode),
                &self.offload_dir,
            )?;
            Trial::new(
                (model, &plan),
                &self.target.profile,
                &self.offload_dir,
                (&mut *talk, self.stop),
            )?;
        }
        Ok(())
    }

    fn triple(&self, seed: u64, number: usize) -> Result<Outcome, Failure> {
        let begin = Instant::now();
        let mut draws = Draws::new(seed, number as u64);
        let index = match draws.chance(NAMED_PART) && self.named > 0 {
            true => self.named_model(&mut draws),
            false => self.named + (draws.unit() * RANDOM_MODELS as f64) as usize,
        };
        let (name, model) = &self.models[index];
        let work = drawn_work(&mut draws, &model.spec);
        let bounds = self.bounds(model, &work)?;
        let most_bytes = self.target.budget.cpu_bytes;
        let budget_bytes = drawn_budget(&mut draws, bounds).min(most_bytes);
        let first = self.child((number, budget_bytes), name, &work)?;
        let mut outcome = Outcome {
            number,
            model: name.rsplit('/').next().unwrap_or(name).to_owned(),
            work,
            budget_bytes,
            refused: first.enough_bytes.is_some(),
            seen: first.seen,
            faults: Vec::new(),
            seconds: 0.0,
        };
        outcome.faults = match first.enough_bytes {
            Some(enough) => {
                self.after_refusal((number, enough), (name, &work), &mut outcome.seen)?
            }
            None => told(&first),
        };
        outcome.seconds = begin.elapsed().as_secs_f64();
        Ok(outcome)
    }

    /// The smallest named size most often: it is the quickest.
    fn named_model(&self, draws: &mut Draws) -> usize {
        let falling = draws.unit().powi(2);
        ((falling * self.named as f64) as usize).min(self.named - 1)
    }

    /// (least budget with which anything runs, bytes of the plan that has all it wants).
    fn bounds(&self, model: &Model, work: &DrawnWork) -> Result<(u64, u64), Failure> {
        let workload = Workload::uniform(work.prompts, work.prompt_tokens, work.gen_tokens);
        let with = |cpu_bytes: u64| -> Result<Plan, Failure> {
            let mut target = self.target.clone();
            target.budget.cpu_bytes = cpu_bytes;
            let how = (&workload, Fixed::default(), CompressMode::Auto);
            plan_fixed(model, &target, how, &self.offload_dir)
        };
        let least = with(MIB)?.enough_bytes.map_or(128 * MIB, |b| b.cpu_bytes);
        let most = with(self.target.budget.cpu_bytes)?;
        Ok((least, most.peak_bytes(Tier::Cpu).unwrap_or(least)))
    }

    /// What a refusal names must do, and a tenth less must not.
    fn after_refusal(
        &self,
        (number, enough_bytes): (usize, u64),
        (name, work): (&str, &DrawnWork),
        seen: &mut Seen,
    ) -> Result<Vec<String>, Failure> {
        let with = self.child((number, enough_bytes), name, work)?;
        *seen = with.seen;
        let mut faults = match with.enough_bytes {
            Some(_) => vec![format!(
                "refused again with the {} that it named",
                show_bytes(enough_bytes)
            )],
            None => told(&with),
        };
        let less_bytes = (enough_bytes as f64 * LESS) as u64 / MIB * MIB;
        let less = self.child((number, less_bytes), name, work)?;
        if less.enough_bytes.is_none() {
            let what = match less.seen.done {
                true => "were enough".to_owned(),
                false => format!("were not refused but failed: {}", less.error),
            };
            faults.push(format!(
                "it named {}, and {} {what}",
                show_bytes(enough_bytes),
                show_bytes(less_bytes)
            ));
        }
        Ok(faults)
    }

    /// `run` in a cgroup of the budget.
    fn child(
        &self,
        (number, budget_bytes): (usize, u64),
        name: &str,
        work: &DrawnWork,
    ) -> Result<Child, Failure> {
        let group = MemoryGroup::new(&group_name(number), budget_bytes).map_err(Failure::failed)?;
        let report = self.folder.join("report.json");
        let _ = std::fs::remove_file(&report);
        let program = std::env::current_exe().map_err(Failure::failed)?;
        let mut command = group.command(&program);
        command
            .args([
                "run",
                "--json",
                "--overwrite",
                "--ignore-eos",
                "--model",
                name,
            ])
            .args(["--num-prompts", &work.prompts.to_string()])
            .args(["--prompt-len", &work.prompt_tokens.to_string()])
            .args(["--gen-len", &work.gen_tokens.to_string()])
            .args(["--cpu-mem", &format!("{budget_bytes}B")])
            .arg("--output")
            .arg(self.folder.join("out.jsonl"))
            .arg("--report")
            .arg(&report)
            .arg("--offload-dir")
            .arg(&self.offload_dir)
            .stdin(Stdio::null())
            .stdout(self.file("stdout.json")?)
            .stderr(self.file("stderr.txt")?);
        let mut process = command.spawn().map_err(Failure::failed)?;
        let (peak_bytes, done) = wait_for_peak(&mut process).map_err(Failure::failed)?;
        let account = group.account();
        let read = |name: &str| std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        let report = std::fs::read_to_string(&report).ok();
        let report = report.and_then(|text| RunReport::from_json(&text).ok());
        let cpu_peak = |f: &Figures| f.tiers[Tier::Cpu].peak_bytes;
        let own_peak = report.as_ref().map_or(0, |r| cpu_peak(&r.measured));
        let planned = report.and_then(|r| r.plan.estimate);
        let planned = planned.as_ref().map_or(0, cpu_peak);
        let error = match done {
            true => String::new(),
            false => read("stderr.txt")
                .lines()
                .last()
                .unwrap_or_default()
                .to_owned(),
        };
        Ok(Child {
            enough_bytes: enough_bytes(&read("stdout.json")),
            seen: Seen {
                budget_bytes,
                planned_bytes: planned,
                peak_bytes: peak_bytes.max(own_peak),
                failed_charges: account.failed_charges,
                kills: account.kills,
                done,
            },
            error,
        })
    }

    fn file(&self, name: &str) -> Result<std::fs::File, Failure> {
        std::fs::File::create(self.folder.join(name)).map_err(Failure::failed)
    }
}

impl Drop for Campaign<'_> {
    /// Models of random shape and their stores are of no further use.
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
        for (_, model) in self.models.iter().skip(self.named) {
            remove_stores(&self.offload_dir, model);
        }
    }
}

fn remove_stores(offload_dir: &Path, model: &Model) {
    let Some(fingerprint) = model.fingerprint() else {
        return;
    };
    for compress in [false, true] {
        let name = crate::store::store_name(&model.spec, &fingerprint, compress);
        let _ = crate::store::remove(offload_dir, &name);
    }
}

/// What became of a child.
struct Child {
    /// What a refusal named.
    enough_bytes: Option<u64>,
    seen: Seen,
    error: String,
}

fn told(child: &Child) -> Vec<String> {
    let mut all = faults(&child.seen);
    if !child.error.is_empty() {
        all.push(child.error.clone());
    }
    all
}

/// "this is enough: --cpu-mem 120MiB --disk-space 300MiB" of a refusal's document.
fn enough_bytes(stdout: &str) -> Option<u64> {
    let document: serde_json::Value = serde_json::from_str(stdout).ok()?;
    // A plan that found no room for itself has other words, and is a fault.
    let hint = document.get("hint")?.as_str()?;
    let hint = hint.strip_prefix(ENOUGH)?;
    let words: Vec<&str> = hint.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "--cpu-mem")?;
    crate::units::parse_bytes(words.get(at + 1)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_s_budget_is_read_from_its_hint() {
        let text = r#"{"schema": "loadmaster.error/1", "kind": "failed", "message": "nothing fits",
            "hint": "this is enough: --cpu-mem 120MiB --disk-space 300MiB"}"#;
        assert_eq!(enough_bytes(text), Some(120 * MIB));
        let no_room = text.replace("this is enough:", "end other programs, or plan again with");
        assert_eq!(enough_bytes(&no_room), None);
        assert_eq!(enough_bytes(r#"{"schema": "loadmaster.run/1"}"#), None);
        assert_eq!(enough_bytes(""), None);
    }
}
