//! `rivals`: the planner's choice for a job and a budget against other feasible policies. All are
//! measured once beside the choice; the best three then meet it in alternating pairs.

use super::args::RivalsArgs;
use super::commands::{say, say_json};
use super::failure::Failure;
use super::progress::Talk;
use super::settle::{Model, Target};
use super::solve::{fixed_as, plan_fixed};
use super::trial::Trial;
use crate::plan::Plan;
use crate::planner::{CompressMode, Fixed};
use crate::proof::draw::{Draws, drawn_policy};
use crate::proof::duel::{Duel, duel};
use crate::tier::Tier;
use crate::units::{show_bytes, show_seconds};
use crate::workload::Workload;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Rivals that meet the choice again and again.
const FINALISTS: usize = 3;
/// Draws for each random rival before there are no more.
const MOST_DRAWS: usize = 60;

/// A policy, where it comes from, and what it brought.
#[derive(Clone, Debug, Serialize)]
struct Rival {
    name: String,
    predicted_tok_s: f64,
    measured_tok_s: f64,
    #[serde(skip)]
    plan: Plan,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    seed: u64,
    model: &'a str,
    budget_bytes: u64,
    choice: &'a Rival,
    rivals: &'a [Rival],
    duels: &'a [Duel],
    holds: bool,
}

pub fn rivals(args: &RivalsArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<(), Failure> {
    let mut arena = Arena::new(args, talk, stop)?;
    let mut choice = arena.choice()?;
    let mut rivals = arena.rivals(&choice)?;
    talk.note(&format!(
        "{} rivals against {}",
        rivals.len(),
        choice.plan.flags
    ));
    if rivals.len() < args.policies {
        talk.note("fewer different feasible policies than asked for were found");
    }
    let all = rivals.iter().chain([&choice]);
    let peaks = all.filter_map(|rival| rival.plan.peak_bytes(Tier::Cpu));
    arena.series_bytes = peaks.max().unwrap_or(0);
    arena.measure_all(&mut choice, &mut rivals, (talk, stop))?;
    rivals.sort_by(|a, b| b.measured_tok_s.total_cmp(&a.measured_tok_s));
    let mut duels = Vec::new();
    for rival in rivals.iter().take(FINALISTS) {
        let ratios = arena.pairs(&choice, rival, (talk, stop))?;
        duels.extend(duel(&rival.name, &ratios));
        if stop.load(Ordering::Relaxed) {
            talk.note("interrupted: what was measured is shown");
            break;
        }
    }
    talk.end();
    let whole =
        duels.len() == rivals.len().min(FINALISTS) && duels.iter().all(|d| d.pairs == args.pairs);
    let document = Document {
        schema: "loadmaster.rivals/1",
        seed: args.seed,
        model: &args.model,
        budget_bytes: arena.target.budget.cpu_bytes,
        choice: &choice,
        rivals: &rivals,
        duels: &duels,
        holds: whole && !duels.is_empty() && duels.iter().all(|d| d.holds),
    };
    match args.json {
        true => say_json(&document)?,
        false => say(&shown(&document))?,
    }
    let why = match (document.holds, duels.is_empty(), whole) {
        (true, ..) => return Ok(()),
        (_, true, true) => "no other feasible policy was found to compare with",
        (.., false) => "interrupted before all pairs were measured",
        _ => "the interval of a ratio does not reach 0.97: a rival is faster than the choice",
    };
    Err(Failure::failed(why).after_document(args.json))
}

fn shown(d: &Document) -> String {
    let mut text = format!(
        "{}, DRAM {}: choice {} ({:.2} tok/s predicted, {:.2} measured)\n\n| policy | predicted tok/s | measured |\n|---|---|---|\n",
        d.model,
        show_bytes(d.budget_bytes),
        d.choice.name,
        d.choice.predicted_tok_s,
        d.choice.measured_tok_s
    );
    for rival in d.rivals {
        text += &format!(
            "| {} | {:.2} | {:.2} |\n",
            rival.name, rival.predicted_tok_s, rival.measured_tok_s
        );
    }
    text += "\n| choice against | pairs | median ratio | 95 % interval | reaches 0.97 |\n|---|---|---|---|---|\n";
    for duel in d.duels {
        text += &format!(
            "| {} | {} | {:.3} | {:.3}–{:.3} | {} |\n",
            duel.rival,
            duel.pairs,
            duel.median_ratio,
            duel.interval[0],
            duel.interval[1],
            if duel.holds { "yes" } else { "no" }
        );
    }
    text
}

/// The job, the machine and the budget that all policies share.
struct Arena<'a> {
    args: &'a RivalsArgs,
    model: Model,
    target: Target,
    workload: Workload,
    offload_dir: PathBuf,
    /// Memory of the policy that needs most.
    series_bytes: u64,
}

impl<'a> Arena<'a> {
    fn new(args: &'a RivalsArgs, talk: &mut Talk, stop: &AtomicBool) -> Result<Self, Failure> {
        let model = Model::find(&args.model, 0, false)?;
        let room = model.spec.room_after(args.prompt_len as usize) as u32;
        let gen_len = args.gen_len.min(room);
        Ok(Arena {
            args,
            model,
            target: Target::settle(&args.limits, talk, stop)?,
            workload: Workload::uniform(args.num_prompts, args.prompt_len, gen_len),
            offload_dir: args.limits.place.offload_dir(),
            series_bytes: 0,
        })
    }

    fn plan(&self, fixed: Fixed, mode: CompressMode) -> Result<Plan, Failure> {
        let how = (&self.workload, fixed, mode);
        plan_fixed(&self.model, &self.target, how, &self.offload_dir)
    }

    fn choice(&self) -> Result<Rival, Failure> {
        let plan = self.plan(Fixed::default(), CompressMode::Auto)?;
        match plan.feasible {
            true => Ok(rival("the planner's choice", plan)),
            false => Err(Failure::failed("nothing fits this budget").with_hint("raise --cpu-mem")),
        }
    }

    /// Feasible policies other than the choice: ladder rungs, runners-up, published and random ones.
    fn rivals(&self, choice: &Rival) -> Result<Vec<Rival>, Failure> {
        let lossless = self.args.lossless || choice.plan.lossless;
        let mut found: Vec<Rival> = Vec::new();
        let mut add = |name: String, fixed: Fixed| -> Result<(), Failure> {
            let lossy = fixed.compress_weight == Some(true) || fixed.compress_cache == Some(true);
            if lossless && lossy {
                return Ok(());
            }
            let plan = self.plan(fixed, CompressMode::Auto)?;
            let same = |r: &Rival| r.plan.policy == plan.policy;
            if plan.feasible && !same(choice) && !found.iter().any(same) {
                found.push(rival(&name, plan));
            }
            Ok(())
        };
        for rung in choice.plan.ladder.iter().filter(|r| r.fits) {
            if let Some(policy) = &rung.policy {
                add(format!("ladder: {}", rung.name), fixed_as(policy))?;
            }
        }
        for (place, other) in choice.plan.runners_up.iter().enumerate() {
            add(format!("runner-up {}", place + 1), fixed_as(&other.policy))?;
        }
        for (name, fixed) in published(self.args.num_prompts) {
            add(name, fixed)?;
        }
        self.random(lossless, choice, &mut found)?;
        found.truncate(self.args.policies.max(1));
        Ok(found)
    }

    fn random(
        &self,
        lossless: bool,
        choice: &Rival,
        found: &mut Vec<Rival>,
    ) -> Result<(), Failure> {
        let mut draws = Draws::new(self.args.seed, 0);
        let lines = self.args.num_prompts;
        for number in 0..MOST_DRAWS.saturating_mul(self.args.policies) {
            if found.len() >= self.args.policies {
                break;
            }
            let size = draws.log_between(1, lines as u32) as usize;
            let count = draws.one_of(&[1, 1, 2]).min(lines.div_ceil(size));
            let mut fixed = drawn_policy(&mut draws, (size, count));
            fixed.overlap = Some(true);
            if lossless {
                (fixed.compress_weight, fixed.compress_cache) = (Some(false), Some(false));
            }
            let plan = self.plan(fixed, CompressMode::Auto)?;
            let same = |r: &Rival| r.plan.policy == plan.policy;
            if plan.feasible && !same(choice) && !found.iter().any(same) {
                found.push(rival(&format!("random {number}"), plan));
            }
        }
        Ok(())
    }

    /// Every policy once, the choice before every fourth of them and counted by its median.
    fn measure_all(
        &self,
        choice: &mut Rival,
        rivals: &mut [Rival],
        (talk, stop): (&mut Talk, &AtomicBool),
    ) -> Result<(), Failure> {
        let begin = Instant::now();
        let mut of_choice = Vec::new();
        let count = rivals.len();
        for (place, rival) in rivals.iter_mut().enumerate() {
            talk.stage(&format!(
                "policy {} of {count}, {} so far",
                place + 1,
                show_seconds(begin.elapsed().as_secs_f64())
            ));
            if place % 4 == 0 {
                of_choice.push(self.measure(choice, (&mut *talk, stop))?);
            }
            rival.measured_tok_s = self.measure(rival, (&mut *talk, stop))?;
        }
        choice.measured_tok_s = crate::probe::median(&of_choice).unwrap_or(0.0);
        Ok(())
    }

    /// Throughput of one visit.
    fn measure(
        &self,
        rival: &Rival,
        (talk, stop): (&mut Talk, &AtomicBool),
    ) -> Result<f64, Failure> {
        let who = (&self.model, &rival.plan);
        let trial = Trial::new(who, &self.target.profile, &self.offload_dir, (talk, stop))?;
        let run = trial.run(self.series_bytes, stop)?;
        Ok(run.measured.throughput_tok_s)
    }

    /// Ratios of alternating pairs: choice then rival, rival then choice.
    fn pairs(
        &self,
        choice: &Rival,
        other: &Rival,
        (talk, stop): (&mut Talk, &AtomicBool),
    ) -> Result<Vec<f64>, Failure> {
        let mut ratios = Vec::new();
        for pair in 0..self.args.pairs {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            talk.stage(&format!(
                "pair {} of {} against {}",
                pair + 1,
                self.args.pairs,
                other.name
            ));
            let order = if pair % 2 == 0 {
                [choice, other]
            } else {
                [other, choice]
            };
            let first = self.measure(order[0], (&mut *talk, stop));
            let second = self.measure(order[1], (&mut *talk, stop));
            if stop.load(Ordering::Relaxed) {
                // A pair that was broken off does not count; those before it do.
                break;
            }
            let (first, second) = (first?, second?);
            ratios.push(if pair % 2 == 0 {
                first / second
            } else {
                second / first
            });
        }
        Ok(ratios)
    }
}

fn rival(name: &str, plan: Plan) -> Rival {
    let flags = plan.flags.clone();
    Rival {
        name: format!("{name} ({flags})"),
        predicted_tok_s: plan.estimate.as_ref().map_or(0.0, |e| e.throughput_tok_s),
        measured_tok_s: 0.0,
        plan,
    }
}

/// FlexLLMGen's published policies for opt-6.7b, opt-30b and opt-175b, and its README's advice for little
/// memory (all weights on disk), each in fp16 and with 4-bit weights; what was on the GPU there is in DRAM here.
fn published(lines: usize) -> Vec<(String, Fixed)> {
    let half = lines.div_ceil(2).max(1);
    let near = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0];
    let policies = [
        ("opt-6.7b", near, lines, 1),
        ("opt-30b", near, half, 2),
        ("opt-175b", [0.0, 50.0, 0.0, 0.0, 0.0, 100.0], half, 2),
        (
            "weights on disk",
            [0.0, 0.0, 0.0, 100.0, 0.0, 100.0],
            lines,
            1,
        ),
    ];
    let with = |(name, percent, size, count): (&str, [f64; 6], usize, usize), four_bit: bool| {
        let format = if four_bit { "4-bit" } else { "fp16" };
        let fixed = Fixed {
            percent: Some(percent),
            gpu_batch_size: Some(size.min(lines)),
            num_gpu_batches: Some(count),
            compress_weight: Some(four_bit),
            compress_cache: Some(false),
            overlap: Some(true),
            ..Fixed::default()
        };
        (format!("published: {name}, {format}"), fixed)
    };
    let both = |policy| [with(policy, false), with(policy, true)];
    policies.into_iter().flat_map(both).collect()
}
