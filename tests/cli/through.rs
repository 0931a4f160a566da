//! The way through the commands: plan, exec, compare, run, store, and a second run that finds
//! everything ready.

use crate::harness::{Home, RAGGED, golden};
use serde_json::{Value, json};

/// transformers' own tokens of a golden case, the end token ending them.
fn golden_ids(case: usize) -> Value {
    let text = std::fs::read_to_string(golden("opt-like").join("golden.json")).expect("committed");
    let golden: Value = serde_json::from_str(&text).expect("JSON");
    golden["cases"][case]["stopped_ids"].clone()
}

#[test]
fn a_plan_is_saved_run_and_compared() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let plan = home
        .run("plan --model GOLDEN --input in.jsonl -o plan.toml")
        .good();
    assert!(
        plan.stdout.contains("flags: --percent 0 100 0 100 0 100"),
        "{}",
        plan.stdout
    );
    let exec = home
        .run("exec plan.toml --input in.jsonl --output out.jsonl --report report.json")
        .good();
    assert_eq!(exec.stdout, "", "results went to the file");
    let lines = crate::harness::in_order(&home.read("out.jsonl"));
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[0]["token_ids"], golden_ids(0));
    assert_eq!(lines[1]["token_ids"], golden_ids(1));
    let report = home.json("report.json");
    assert_eq!(report["outcome"], "done");
    assert_eq!(report["lines"], json!({"total": 5, "ok": 5, "failed": 0}));
    let compared = home.run("compare report.json report.json").good();
    for word in ["report.json", "throughput", "prefill", "decode", "bytes"] {
        assert!(compared.stdout.contains(word), "{}", compared.stdout);
    }
    let document = home.run("compare report.json --json").good().document();
    assert_eq!(document["runs"][0]["predicted"], report["repriced"]);
    assert_eq!(document["runs"][0]["measured"], report["measured"]);
}

#[test]
fn a_plan_without_an_input_is_run_on_random_prompts() {
    let home = Home::packed();
    let size = "--prompt-len 12 --gen-len 4 --num-prompts 3";
    home.run(&format!("plan --model synth:opt-125m {size} -o plan.toml"))
        .good();
    let lines = home.run("exec plan.toml").good().lines();
    assert_eq!(lines.len(), 3);
    for line in &lines {
        assert_eq!(line["prompt_tokens"], 12);
        assert_eq!(line["token_ids"].as_array().map(Vec::len), Some(4));
    }
    let again = home.run(&format!("run --model synth:opt-125m {size}"));
    assert_eq!(again.good().lines(), lines, "exec and run agree");
    let other = home.run(&format!("run --model synth:opt-125m {size} --seed 9"));
    assert_ne!(other.good().lines(), lines, "another seed, other weights");
}

#[test]
fn the_flags_of_a_plan_give_it_back() {
    let home = Home::new();
    let size = "--prompt-len 12 --gen-len 4 --num-prompts 7 --json";
    let words = format!("plan --model opt-1.3b --cpu-mem 1GiB --disk-space 9GiB {size}");
    let plan = home.run(&words).good().document();
    let flags = plan["flags"].as_str().expect("flags");
    let again = home.run(&format!("{words} {flags}")).good().document();
    assert_eq!(again["policy"], plan["policy"]);
    assert_eq!(again["estimate"]["tiers"], plan["estimate"]["tiers"]);
}

#[test]
fn the_second_run_finds_everything_ready() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let run = |n: usize| {
        let words = format!(
            "run --model GOLDEN --input in.jsonl --json --output out-{n}.jsonl --report report-{n}.json"
        );
        let document = home.run(&words).good().document();
        document["report"]["setup"].clone()
    };
    let (first, second) = (run(1), run(2));
    assert!(first["pack_s"].as_f64() > Some(0.0), "{first}");
    assert!(first["written_bytes"].as_u64() > Some(0), "{first}");
    assert_eq!(first["probe_s"], 0.0, "the profile was there");
    assert_eq!(second["pack_s"], 0.0);
    assert_eq!(second["probe_s"], 0.0);
    assert_eq!(second["written_bytes"], 0);
    assert_eq!(home.read("out-1.jsonl"), home.read("out-2.jsonl"));
    let list = home.run("store list").good().stdout;
    assert!(list.contains("1 stores"), "{list}");
    let name = list.split_whitespace().next().expect("a name");
    home.run(&format!("store rm {name}")).good();
    assert!(home.run("store list").good().stdout.starts_with("0 stores"));
    assert!(run(3)["pack_s"].as_f64() > Some(0.0), "packed again");
}

#[test]
fn a_written_checkpoint_gives_what_its_seed_gives() {
    let home = Home::packed();
    home.run("synth opt-125m --out written --seed 0 --shard-size 100MB")
        .good();
    let work = "--prompt Paris --gen-len 4";
    let written = home.run(&format!("run --model written {work}")).good();
    let direct = home
        .run(&format!("run --model synth:opt-125m {work}"))
        .good();
    assert_eq!(written.lines(), direct.lines());
}
