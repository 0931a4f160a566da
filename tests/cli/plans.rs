//! Plan files that `exec` must refuse: other weights, other versions, other shapes, too much for now.

use crate::harness::{Ended, Home, golden};

fn planned() -> Home {
    let home = Home::new();
    home.write("in.jsonl", "{\"prompt\": [51], \"max_tokens\": 3}\n");
    home.run("plan --model GOLDEN --input in.jsonl -o plan.toml")
        .good();
    home
}

/// The first place of `from` becomes `to`, and exec reads that.
fn spoiled(home: &Home, from: &str, to: &str) -> Ended {
    let plan = home.read("plan.toml");
    assert!(plan.contains(from), "{from}");
    home.write("spoiled.toml", &plan.replacen(from, to, 1));
    home.run("exec spoiled.toml --input in.jsonl --output out.jsonl")
}

fn refused(home: &Home, (from, to): (&str, &str), parts: &[&str]) {
    let ended = spoiled(home, from, to);
    ended.fails(1, parts);
    assert!(!home.path("out.jsonl").exists(), "nothing was begun");
}

#[test]
fn a_plan_of_other_weights_is_refused() {
    let home = planned();
    let other = golden("gelu");
    let (here, there) = (golden("opt-like"), other);
    let names = (&*here.to_string_lossy(), &*there.to_string_lossy());
    refused(&home, names, &["other weights", "plan again"]);
    refused(
        &home,
        ("fingerprint = \"", "fingerprint = \"0"),
        &["other weights"],
    );
    let gone = (names.0, "/nowhere/at/all");
    refused(&home, gone, &["/nowhere/at/all", "no such directory"]);
}

#[test]
fn a_plan_that_cannot_be_read_is_refused() {
    let home = planned();
    let again = "loadmaster plan -o plan.toml";
    refused(
        &home,
        ("feasible = true", "feasible = true\nextra = 1"),
        &["extra", "line 4", again],
    );
    refused(&home, ("[budget]", "[budget"), &["spoiled.toml", again]);
    refused(
        &home,
        ("loadmaster.plan/1", "loadmaster.plan/9"),
        &["loadmaster.plan/9", "plan again"],
    );
    refused(&home, ("schema = ", "# "), &["schema", again]);
    home.run("exec nothere.toml")
        .fails(1, &["nothere.toml", "loadmaster plan"]);
}

#[test]
fn a_plan_out_of_range_is_refused() {
    let home = planned();
    for (from, to, part) in [
        (
            "percent = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0]",
            "percent = [0.0, 100.0, 0.0, 100.0, 0.0, 130.0]",
            "130",
        ),
        (
            "percent = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0]",
            "percent = [50.0, 50.0, 0.0, 100.0, 0.0, 100.0]",
            "nearest plan",
        ),
        ("threads = ", "threads = 9", "policy.threads"),
        ("gpu_batch_size = ", "gpu_batch_size = 0 # ", "at least 1"),
        ("device = \"cpu\"", "device = \"tpu\"", "tpu"),
        ("kv = \"f16\"", "kv = \"q4\"", "policy.kv"),
    ] {
        let to = to.replace("threads = 9", "threads = 99999999");
        refused(&home, (from, &to), &[part]);
    }
}

#[test]
fn a_plan_for_more_memory_than_is_free_is_refused() {
    let home = planned();
    let mut plan = home.read("plan.toml");
    for key in ["prompts", "prompt_tokens", "kv_tokens"] {
        plan = set(&plan, key, "100000000000");
    }
    plan = set(&plan, "prompt_tokens_max", "64");
    plan = set(&plan, "kv_tokens_max", "64");
    plan = set(&plan, "gpu_batch_size", "1000000");
    let blocks = set(&plan, "num_gpu_batches", "1000000");
    home.write("blocks.toml", &blocks);
    limited(&home, "exec blocks.toml --input in.jsonl").fails(1, &["sequences", "at most 1048576"]);
    plan = set(&plan, "num_gpu_batches", "1");
    home.write("huge.toml", &plan);
    home.write("out.jsonl", "precious\n");
    let words = "exec huge.toml --input in.jsonl --output out.jsonl --overwrite";
    let ended = limited(&home, words);
    ended.fails(1, &["memory", "are missing", "--cpu-mem"]);
    assert_eq!(home.read("out.jsonl"), "precious\n");
    assert!(!home.path("store").exists(), "nothing was packed for it");
}

/// Should a check ever be lost, this limit keeps the machine that the test runs on alive.
fn limited(home: &Home, words: &str) -> Ended {
    let program = home.command(words);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -v 4000000; exec \"$@\"", "sh"]);
    shell.arg(program.get_program()).args(program.get_args());
    shell
        .current_dir(&home.dir)
        .env("LOADMASTER_HOME", &home.dir);
    Ended::new(words, shell.output().expect("started"))
}

/// The plan with one whole-number key of its first such line set.
fn set(plan: &str, key: &str, value: &str) -> String {
    let start = plan.find(&format!("\n{key} = ")).expect(key) + 1;
    let end = start + plan[start..].find('\n').expect("a line's end");
    format!("{}{key} = {value}{}", &plan[..start], &plan[end..])
}

#[test]
fn an_infeasible_plan_is_not_saved() {
    let home = planned();
    let words = "plan --model GOLDEN --input in.jsonl --cpu-mem 1MiB -o small.toml";
    home.run(words).fails(1, &["nothing fits"]);
    assert!(!home.path("small.toml").exists());
}

#[test]
fn reports_that_cannot_be_read_are_refused() {
    let home = planned();
    let help = "--report";
    home.run("compare plan.toml").fails(1, &["plan.toml", help]);
    home.run("compare none.json").fails(1, &["none.json", help]);
    home.run("compare").fails(2, &["REPORT"]);
}
