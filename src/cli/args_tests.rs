//! Command lines read as a person would type them. Nothing is run.

use super::super::arg_groups::offload_dir_from;
use super::*;
use crate::checkpoint::DEFAULT_SHARD_BYTES;
use crate::policy::Compute;
use crate::units::GIB;
use std::path::Path;

fn read(line: &str) -> Result<Cli, clap::Error> {
    Cli::read(line.split_whitespace())
}

fn solve(flags: &str) -> SolveArgs {
    match read(&format!("loadmaster plan --model opt-1.3b {flags}")) {
        Ok(cli) => match cli.command {
            Command::Plan(args) => args.solve,
            other => panic!("not a plan: {other:?}"),
        },
        Err(e) => panic!("{flags}: {e}"),
    }
}

fn refusal(line: &str) -> String {
    let error = read(&format!("loadmaster {line}")).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn the_tree_of_commands_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_flag_of_the_predecessor_reads_in_its_spelling() {
    let args = solve(
        "--percent 20 80 0 100.0 0 100 --gpu-batch-size 48 --num-gpu-batches 3 --pin-weight 0 \
         --overlap --cpu-cache-compute --compress-weight --compress-cache false --gen-len 8 \
         --prompt-len 64 --num-prompts 10 --offload-dir /tmp/x",
    );
    let policy = &args.policy;
    assert_eq!(policy.percent(), Some([20.0, 80.0, 0.0, 100.0, 0.0, 100.0]));
    assert_eq!(policy.pin_weight, Some(false));
    assert_eq!(policy.overlap, Some(true));
    assert_eq!(policy.cpu_cache_compute, Some(true));
    assert_eq!(policy.compress_weight, Some(true));
    assert_eq!(policy.compress_cache, Some(false));
    assert_eq!(
        (policy.gpu_batch_size, policy.num_gpu_batches),
        (Some(48), Some(3))
    );
    let work = &args.work;
    assert_eq!(
        (work.prompt_len, work.gen_len, work.num_prompts),
        (Some(64), Some(8), Some(10))
    );
    assert_eq!(args.limits.place.offload_dir(), Path::new("/tmp/x"));
}

#[test]
fn what_is_not_given_is_the_planners() {
    let args = solve("");
    assert_eq!(args.limits.device, DeviceChoice::Auto);
    assert_eq!(args.policy.percent(), None);
    assert_eq!(args.policy.pin_weight, None);
    assert_eq!(args.policy.compress, Compress::Auto);
    assert_eq!(args.policy.compute, Compute::Exact);
    assert_eq!(args.policy.kv, Kv::Auto);
    assert!(args.work.is_random());
    assert_eq!(args.work.seed, 0);
}

#[test]
fn sizes_carry_units() {
    let args = solve("--cpu-mem 16GiB --disk-space 1.5TB --device host:4GiB --gpu-mem 3GiB");
    assert_eq!(args.limits.cpu_mem_bytes, Some(16 * GIB));
    assert_eq!(
        args.limits.device,
        DeviceChoice::Host { gpu_bytes: 4 * GIB }
    );
    let bare = refusal("plan --model opt-1.3b --cpu-mem 16");
    assert!(
        bare.contains("--cpu-mem") && bare.contains("16GiB"),
        "{bare}"
    );
}

#[test]
fn prompts_come_from_one_place() {
    for flags in [
        "--input a.txt --prompt hello",
        "--input a.txt --prompt-len 5",
        "--input a.txt --num-prompts 5",
        "--prompt hello --prompt-len 5",
        "--prompt hello --num-prompts 5",
    ] {
        let message = refusal(&format!("plan --model opt-1.3b {flags}"));
        assert!(message.contains("cannot be used with"), "{message}");
    }
    let args = solve("--prompt one two --gen-len 4");
    assert_eq!(args.work.prompt, ["one", "two"]);
    assert_eq!(solve("--prompt - --seed 1").work.prompt, ["-"]);
    let input = solve("--input - --gen-len 3").work.input;
    assert_eq!(input.as_deref(), Some(Path::new(DASH)));
}

#[test]
fn wrong_values_are_usage_errors_that_name_the_flag() {
    for (flags, hint) in [
        ("--percent 0 100 0 100 0", "6 values"),
        ("--percent 0 101 0 100 0 100", "0 to 100"),
        ("--percent 0 -1 0 100 0 100", "0 to 100"),
        ("--percent 60 60 0 100 0 100", "at most 100"),
        ("--gpu-batch-size 0", "at least 1"),
        ("--gen-len 0", "at least 1"),
        ("--pin-weight 2", "1 or 0"),
        ("--compute fp8", "exact"),
        ("--kv q4", "f16"),
        ("--device tpu", "cuda:0"),
        ("--device cpu --gpu-mem 1GiB", "--gpu-mem"),
        ("--compress both --compress-weight", "cannot be used with"),
        ("--compress auto --compress-cache 0", "cannot be used with"),
        ("--threads=-1", "at least 1"),
        ("--cpu-compute-share 101", "0 to 100"),
        ("--no-such-flag", "--no-such-flag"),
    ] {
        let message = refusal(&format!("plan --model opt-1.3b {flags}"));
        let flag = flags
            .split([' ', '='])
            .find(|w| w.starts_with("--"))
            .unwrap_or("");
        assert!(
            message.contains(hint) && message.contains(flag),
            "{flags}: {message}"
        );
    }
    assert!(refusal("plan").contains("--model"));
}

#[test]
fn flags_without_a_counterpart_get_a_hint() {
    for (flag, hint) in [
        ("--path ./weights", "--model DIR"),
        ("--sep-layer", "always split"),
        ("--sep-layer 1", "always split"),
        ("--attn-sparsity 0.1", "changes results"),
    ] {
        let message = refusal(&format!("run --model opt-1.3b {flag}"));
        assert!(message.contains(hint), "{message}");
    }
    let help = Cli::command()
        .find_subcommand_mut("run")
        .map(|c| c.render_long_help().to_string());
    assert!(!help.expect("run is a command").contains("--sep-layer"));
}

#[test]
fn results_never_mix_with_the_document_or_the_prompts() {
    let run = "run --model opt-1.3b";
    assert!(refusal(&format!("{run} --json")).contains("--output FILE"));
    assert!(refusal(&format!("{run} --json --output -")).contains("--output FILE"));
    assert!(refusal("exec plan.toml --json").contains("--output FILE"));
    assert!(refusal(&format!("{run} --overwrite")).contains("--overwrite"));
    let same = refusal(&format!(
        "{run} --input a.jsonl --output a.jsonl --overwrite"
    ));
    assert!(same.contains("replace the prompts"), "{same}");
    let cli = read("loadmaster exec plan.toml --json --output r.jsonl --overwrite").expect("fine");
    assert!(cli.json());
    let Command::Exec(args) = cli.command else {
        panic!("not exec")
    };
    assert_eq!(args.results.output_file(), Some(Path::new("r.jsonl")));
}

#[test]
fn the_smaller_commands_read() {
    let synth = read("loadmaster synth opt-125m --out d").expect("fine");
    let Command::Synth(args) = synth.command else {
        panic!("not synth")
    };
    assert_eq!(
        (args.shard_bytes, args.dtype),
        (DEFAULT_SHARD_BYTES, Dtype::F16)
    );
    assert!(refusal("synth opt-126m --out d").contains("opt-125m"));
    assert!(refusal("synth opt-125m --out d --shard-size 0B").contains("--shard-size"));
    let store = read("loadmaster store rm x --offload-dir /o").expect("fine");
    let Command::Store(args) = store.command else {
        panic!("not store")
    };
    assert!(matches!(&args.action, StoreAction::Rm { name } if name == "x"));
    assert_eq!(args.place.offload_dir(), Path::new("/o"));
    assert!(
        read("loadmaster probe --force -o p.toml --cpu-mem 350MiB --json")
            .expect("fine")
            .json()
    );
    assert!(refusal("compare").contains("REPORT"));
}

#[test]
fn one_file_has_one_purpose_however_it_is_spelled() {
    let twice = "run --model m --output r.jsonl --report ./r.jsonl";
    assert!(refusal(twice).contains("name the same file"));
    let over = "run --model m --input Cargo.toml --output src/../Cargo.toml --overwrite";
    assert!(refusal(over).contains("would replace the prompts"));
}

#[test]
fn the_offload_directory_follows_the_environment() {
    let from = |set: &[(&str, &str)]| {
        offload_dir_from(|name| {
            let found = set.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| OsString::from(value))
        })
    };
    let all = [
        ("LOADMASTER_HOME", "/l"),
        ("XDG_CACHE_HOME", "/x"),
        ("HOME", "/h"),
    ];
    assert_eq!(from(&all), Path::new("/l"));
    assert_eq!(from(&all[1..]), Path::new("/x/loadmaster"));
    assert_eq!(from(&all[2..]), Path::new("/h/.cache/loadmaster"));
    let relative = [
        ("LOADMASTER_HOME", ""),
        ("XDG_CACHE_HOME", "x"),
        ("HOME", "/h"),
    ];
    assert_eq!(from(&relative), Path::new("/h/.cache/loadmaster"));
}
