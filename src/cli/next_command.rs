//! What to type after a plan: `exec` of the file that it was saved to, with the flags of `plan` that a plan does not
//! hold; after a refusal, a budget that is enough. Every word is one that a shell reads back.

use super::args::{DASH, DEFAULT_GEN_LEN, SolveArgs, WorkArgs, default_offload_dir};
use crate::plan::{Plan, PlanBudget};
use crate::units::MIB;
use std::path::Path;

/// Where a plan goes that was not saved, or was written to standard output.
const PLAN_FILE: &str = "plan.toml";

/// The command that runs a plan; `out` is what `-o` said.
pub fn next_command(args: &SolveArgs, out: Option<&Path>, plan: &Plan) -> String {
    let saved = out.filter(|_| plan.feasible);
    let file = saved.filter(|path| *path != Path::new(DASH));
    let mut words = vec![
        "loadmaster exec".to_owned(),
        quoted(&file.map_or(PLAN_FILE.into(), Path::to_string_lossy)),
    ];
    words.extend(work_flags(&args.work, plan.workload.gen_tokens_max));
    if args.limits.no_calibration {
        words.push("--no-calibration".to_owned());
    }
    let offload_dir = args.limits.place.offload_dir();
    if offload_dir != default_offload_dir() {
        words.push(flag("--offload-dir", &offload_dir.to_string_lossy()));
    }
    words.push("--output out.jsonl --report report.json".to_owned());
    let exec = words.join(" ");
    match saved {
        Some(_) => exec,
        None => format!("loadmaster plan … -o {PLAN_FILE} && {exec}"),
    }
}

/// What is generated from. Random prompts of the planned lengths are what `exec` makes unasked.
fn work_flags(work: &WorkArgs, longest_gen_tokens: u64) -> Vec<String> {
    let mut words = Vec::new();
    let input = work.input.iter();
    words.extend(input.map(|path| flag("--input", &path.to_string_lossy())));
    words.extend(work.prompt.iter().map(|text| flag("--prompt", text)));
    // A line without max_tokens would get the plan's longest.
    let gen_len = work.gen_len.unwrap_or(DEFAULT_GEN_LEN);
    if !work.is_random() && u64::from(gen_len) != longest_gen_tokens {
        words.push(format!("--gen-len {gen_len}"));
    }
    if work.seed != 0 {
        words.push(format!("--seed {}", work.seed));
    }
    if work.ignore_eos {
        words.push("--ignore-eos".to_owned());
    }
    words
}

/// A flag with its value, which must not be taken for another flag.
fn flag(name: &str, value: &str) -> String {
    let tie = match value.starts_with('-') && value != DASH {
        true => "=",
        false => " ",
    };
    format!("{name}{tie}{}", quoted(value))
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// How a refusal's hint begins that names a budget.
pub(super) const ENOUGH: &str = "this is enough:";

/// A budget that is enough, as flags.
pub(super) fn enough_flags(enough: &PlanBudget) -> String {
    let mib = |bytes: u64| bytes.div_ceil(MIB);
    let gpu = enough
        .gpu_bytes
        .map_or(String::new(), |b| format!("--gpu-mem {}MiB ", mib(b)));
    format!(
        "{ENOUGH} {gpu}--cpu-mem {}MiB --disk-space {}MiB",
        mib(enough.cpu_bytes),
        mib(enough.disk_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::super::args::{Cli, Command};
    use super::*;

    const RESULTS: &str = "--output out.jsonl --report report.json";

    fn next(words: &[&str], change: impl Fn(&mut Plan)) -> String {
        let plan = ["loadmaster", "plan", "--model", "opt-125m"];
        let cli = Cli::read(plan.iter().chain(words)).expect("a command line");
        let Command::Plan(args) = cli.command else {
            panic!("not a plan: {words:?}");
        };
        let mut plan: Plan = serde_json::from_str(SOME_PLAN).expect("a plan");
        change(&mut plan);
        next_command(&args.solve, args.out.as_deref(), &plan)
    }

    /// A feasible plan of lines that generate up to 32 tokens; what is missing is not looked at.
    const SOME_PLAN: &str = r#"{
        "schema": "loadmaster.plan/1", "id": "", "feasible": true, "lossless": true, "device": "cpu",
        "flags": "", "next_command": "", "check_command": "",
        "model": {"name": "opt-125m", "fingerprint": null, "parameters": 1, "weights_bytes": 1},
        "workload": {"prompts": 1, "prompt_tokens": 1, "prompt_tokens_max": 1, "gen_tokens": 32,
            "gen_tokens_max": 32, "kv_tokens": 1, "kv_tokens_max": 1},
        "profile": {"name": "", "measured_at": ""},
        "budget": {"gpu_bytes": null, "cpu_bytes": 1, "disk_bytes": 1},
        "policy": null, "placement": null, "estimate": null,
        "setup": {"pack_s": 0.0, "load_s": 0.0, "store_bytes": 0, "spill_bytes": 0},
        "missing_bytes": {"gpu": null, "cpu": null, "disk": null}, "enough_bytes": null,
        "ladder": [], "runners_up": [],
        "explain": {"four_bit": null, "warning": null, "what_if": []}}"#;

    #[test]
    fn what_a_plan_does_not_hold_is_typed_again() {
        let same = |_: &mut Plan| ();
        let exec = format!("loadmaster exec p2.toml --input my.jsonl {RESULTS}");
        assert_eq!(next(&["--input", "my.jsonl", "-o", "p2.toml"], same), exec);
        let random = ["--prompt-len", "9", "--num-prompts", "2", "-o", "p.toml"];
        let exec = format!("loadmaster exec p.toml {RESULTS}");
        assert_eq!(next(&random, same), exec);
        let all = "--input - --gen-len 7 --seed 3 --ignore-eos --no-calibration";
        let words = format!("{all} --offload-dir /far/away -o p.toml");
        let words: Vec<&str> = words.split(' ').collect();
        let exec = format!("loadmaster exec p.toml {all} --offload-dir /far/away {RESULTS}");
        assert_eq!(next(&words, same), exec);
    }

    #[test]
    fn lines_without_a_length_get_the_planned_one() {
        let longer = |plan: &mut Plan| plan.workload.gen_tokens_max = 200;
        let exec = format!("loadmaster exec p.toml --input a.jsonl --gen-len 32 {RESULTS}");
        assert_eq!(next(&["--input", "a.jsonl", "-o", "p.toml"], longer), exec);
    }

    #[test]
    fn words_are_what_a_shell_reads_back() {
        let same = |_: &mut Plan| ();
        let words = [
            "--prompt",
            "it's one",
            "two",
            "--prompt=-3",
            "-o",
            "my plan.toml",
        ];
        let exec =
            r"loadmaster exec 'my plan.toml' --prompt 'it'\''s one' --prompt two --prompt=-3";
        assert_eq!(next(&words, same), format!("{exec} {RESULTS}"));
        assert_eq!((quoted(""), quoted("$x")), ("''".into(), "'$x'".into()));
    }

    #[test]
    fn a_plan_that_is_in_no_file_is_to_be_saved_first() {
        let exec = format!("loadmaster exec plan.toml {RESULTS}");
        let save = format!("loadmaster plan … -o plan.toml && {exec}");
        assert_eq!(next(&[], |_| ()), save);
        let infeasible = |plan: &mut Plan| plan.feasible = false;
        assert_eq!(next(&["-o", "p.toml"], infeasible), save);
        assert_eq!(next(&["-o", "-"], |_| ()), exec);
    }
}
