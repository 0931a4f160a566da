//! Plan files that `exec` must refuse: other weights, other versions, other shapes, too much for now.

use crate::harness::{Ended, Home, golden};
use loadmaster::plan::Plan;
use loadmaster::profile::compiled_in;

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
    let ended = limited(&home, &format!("{words} --strict"));
    ended.fails(1, &["memory", "are missing", "--cpu-mem"]);
    assert_eq!(home.read("out.jsonl"), "precious\n");
    assert!(!home.path("store").exists(), "nothing was packed for it");
    // Without --strict it steps down to what is free, says so, and generates the same text.
    let ended = limited(&home, &format!("{words} --report report.json")).good();
    let told = "memory has shrunk since planning";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    let report = home.json("report.json");
    let explain = &report["plan"]["explain"]["stepped_down"];
    assert!(
        explain
            .as_str()
            .expect("named in the report")
            .contains("the same text")
    );
    let stepped = home.read("out.jsonl");
    home.run("exec plan.toml --input in.jsonl --output out.jsonl --overwrite")
        .good();
    assert_eq!(home.read("out.jsonl"), stepped);
}

#[test]
fn more_input_than_planned_is_in_the_account() {
    let home = planned();
    home.write("many.jsonl", &"{\"prompt\": [5]}\n".repeat(400_000));
    home.run("plan --model GOLDEN --input in.jsonl --cpu-mem 120MiB -o small.toml")
        .good();
    home.run("exec small.toml --input in.jsonl").good();
    let words = "exec small.toml --input many.jsonl";
    let grown = "more input than was planned for (400000 lines";
    home.run(&format!("{words} --strict"))
        .fails(1, &[grown, "120.00 MiB", "plan again with this input"]);
    home.run(words)
        .fails(1, &[grown, "nothing with the same text fits"]);
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
fn the_next_command_is_one_that_runs() {
    let (home, elsewhere) = (planned(), Home::new());
    let place = elsewhere.dir.display();
    let words = format!("--input in.jsonl --gen-len 5 --offload-dir {place}");
    let plan = format!("plan --model GOLDEN {words} -o p2.toml --json");
    let plan = home.run(&plan).good().document();
    let next = plan["next_command"].as_str().expect("a command");
    let results = "--output out.jsonl --report report.json";
    let expected = format!("loadmaster exec p2.toml {words} {results}");
    assert_eq!(next, expected);
    let saved = Plan::from_toml(&home.read("p2.toml")).expect("a plan");
    assert!(!saved.is_edited());
    let check = plan["check_command"].as_str().expect("a command");
    for command in [next, check] {
        let words = command.strip_prefix("loadmaster ").expect("the program");
        home.run(words).good();
    }
    assert_eq!(home.json("report.json")["plan"]["id"], plan["id"]);
    let unsaved = home.run("plan --model GOLDEN --input in.jsonl").good();
    let told = "next: loadmaster plan … -o plan.toml && loadmaster exec plan.toml --input in.jsonl";
    assert!(unsaved.stdout.contains(told), "{}", unsaved.stdout);
}

#[test]
fn dram_that_plays_a_gpu_is_no_other_dram() {
    let home = planned();
    let budget = |flags: &str| {
        let words = format!("plan --model opt-125m --profile t4-gcp --json {flags}");
        let plan = home.run(&words).good().document();
        ["gpu_bytes", "cpu_bytes"].map(|key| plan["budget"][key].as_u64())
    };
    let gib = 1u64 << 30;
    let [none, all] = budget("--device cpu");
    let rest = |bytes: u64| all.map(|all| all - bytes);
    assert_eq!((none, all), (None, Some(208_000_000_000 / 10 * 9)));
    assert_eq!(
        budget("--device host:64GiB"),
        [Some(64 * gib), rest(64 * gib)]
    );
    let asked = budget("--device host:4GiB --gpu-mem 1GiB");
    assert_eq!(asked, [Some(gib), rest(gib)]);
    let more = budget("--device host:1GiB --gpu-mem 64GiB --cpu-mem 2GiB");
    assert_eq!(more, [Some(gib), Some(2 * gib)]);
    // What if that machine had a larger one?
    let other = budget("--gpu-mem 64GiB --cpu-mem 2GiB");
    assert_eq!(other, [Some(64 * gib), Some(2 * gib)]);
}

#[test]
fn a_machine_with_this_cpu_and_a_gpu_that_is_not_here_is_another_machine() {
    let home = planned();
    let t4 = compiled_in("t4-gcp").expect("compiled in");
    let cpu_of = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("cpu = "));
        line.expect("a cpu").to_owned()
    };
    let saved = std::fs::read_dir(home.path("profiles")).expect("saved");
    let own = saved.map(|file| std::fs::read_to_string(file.expect("a file").path()));
    let own = own.last().expect("a profile").expect("text");
    home.write("node.toml", &t4.replacen(&cpu_of(t4), &cpu_of(&own), 1));
    let device = |flags: &str| {
        let words = format!("plan --model opt-125m --profile node.toml --json {flags}");
        let plan = home.run(&words).good().document();
        (plan["device"].clone(), plan["budget"]["gpu_bytes"].is_u64())
    };
    assert_eq!(device(""), ("cuda:0".into(), true));
    assert_eq!(device("--device cpu"), ("cpu".into(), false));
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

#[test]
fn flags_that_change_nothing_without_a_gpu_are_told() {
    let home = planned();
    let words = "plan --model GOLDEN --input in.jsonl";
    let plain = home.run(words).good();
    assert!(
        !plain.stderr.contains("changes nothing"),
        "{}",
        plain.stderr
    );
    for flag in ["--pin-weight", "--cpu-cache-compute"] {
        for value in ["0", "1"] {
            let ended = home.run(&format!("{words} {flag} {value}")).good();
            let told = format!("{flag} changes nothing here");
            assert_eq!(ended.stderr.matches(&told).count(), 1, "{}", ended.stderr);
        }
    }
    let played = home
        .run(&format!("{words} --device host:64MiB --pin-weight 1"))
        .good();
    assert!(
        !played.stderr.contains("changes nothing"),
        "{}",
        played.stderr
    );
}

#[test]
fn what_ifs_change_the_estimate_and_are_named_in_the_plan() {
    let home = planned();
    let words = "plan --model opt-30b --profile t4-gcp --cpu-mem 40GiB --num-prompts 64 --json";
    let speed = |flags: &str| {
        let plan = home.run(&format!("{words} {flags}")).good().document();
        let changes = plan["profile"]["changes"].as_array().expect("a list").len();
        let tok_s = plan["estimate"]["throughput_tok_s"].as_f64();
        (tok_s.expect("a figure"), changes)
    };
    let (now, none) = speed("");
    let (faster, two) = speed("--disk-read 7GB/s --link 24GB/s");
    assert!(faster > 1.2 * now, "{faster} {now}");
    assert_eq!((none, two), (0, 2));
    let (slower, one) = speed("--disk-read 400MB/s");
    assert!(slower < now && one == 1, "{slower} {now}");
    for (flags, part) in [
        ("--disk-read 7", "--disk-read"),
        ("--disk-write 0GB/s", "--disk-write"),
        ("--cpu-speed -2", "--cpu-speed"),
        ("--gpu-speed fast", "--gpu-speed"),
    ] {
        home.run(&format!("{words} {flags}")).fails(2, &[part]);
    }
    let cpu = "plan --model GOLDEN --input in.jsonl --link 12GB/s";
    home.run(cpu).fails(2, &["--link", "no GPU"]);
}

#[test]
fn flexllmgen_is_compared_with_and_gets_a_command_line_that_fits() {
    let home = planned();
    let table = home.run("flexllmgen --profile t4-gcp").good().stdout;
    for part in [
        "opt-175b",
        "its own model",
        "mean",
        "20 80 0 100 0 100",
        "8.3 91.7 0.0",
    ] {
        assert!(table.contains(part), "no {part}: {table}");
    }
    let words = "plan --model opt-30b --profile t4-gcp --prompt-len 512 --gen-len 32";
    let line = home
        .run(&format!("{words} --emit flexllmgen"))
        .good()
        .stdout;
    assert!(
        line.contains("flexllmgen.flex_opt --model facebook/opt-30b --percent "),
        "{line}"
    );
    assert!(!line.contains("--compress"), "{line}");
    home.run(&format!("{words} --cpu-mem 6GiB --emit flexllmgen"))
        .fails(1, &["FlexLLMGen", "fits"]);
    home.run("plan --model GOLDEN --input in.jsonl --emit flexllmgen")
        .fails(2, &["needs a GPU"]);
}
