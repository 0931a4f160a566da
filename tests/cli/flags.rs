//! Flags that cannot be: usage errors that name what would do, and places that cannot be written.

use crate::harness::{Home, RAGGED};

const RUN: &str = "run --model GOLDEN --input in.jsonl --output out.jsonl";

fn ready() -> Home {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    home
}

#[test]
fn usage_errors_name_what_would_do() {
    let home = ready();
    for (flags, parts) in [
        ("--cpu-mem 16", &["--cpu-mem", "16GiB"][..]),
        (
            "--percent 50 50 0 100 0 100",
            &["no GPU", "--percent 0 100 0 100 0 100"],
        ),
        ("--percent 0 50 0 100", &["--percent", "6 values"]),
        (
            "--percent 0 120 0 100 0 100",
            &["--percent", "from 0 to 100"],
        ),
        (
            "--device host:64MiB --percent 60 60 0 100 0 100",
            &["60", "sum to at most 100"],
        ),
        ("--device cuda:0", &["cuda", "--device cpu"]),
        ("--gpu-mem 1GiB", &["--gpu-mem", "no GPU", "leave it out"]),
        ("--device tpu", &["--device", "cuda:0"]),
        ("--path /models", &["--path", "--model DIR"]),
        ("--sep-layer 1", &["--sep-layer", "leave it out"]),
        ("--attn-sparsity 0.1", &["--attn-sparsity", "leave it out"]),
        ("--cpu-memory 1GiB", &["--cpu-memory", "--cpu-mem"]),
        ("--gpu-batch-size 0", &["--gpu-batch-size", "at least 1"]),
        ("--threads 100000", &["--threads", "at most"]),
        (
            "--gpu-batch-size 99999999999",
            &["--gpu-batch-size", "at most"],
        ),
        (
            "--gpu-batch-size 9999 --num-gpu-batches 9999",
            &["--num-gpu-batches", "at most"],
        ),
        ("--compress maybe", &["--compress", "fastest"]),
        ("--profile nowhere", &["nowhere", "t4-gcp", "probe"]),
        ("--prompt-len 3", &["--prompt-len", "--input"]),
        ("--num-prompts 1000000000000", &["--num-prompts", "at most"]),
    ] {
        let ended = home.run(&format!("{RUN} {flags}"));
        ended.fails(2, parts);
        assert!(!home.path("out.jsonl").exists(), "{flags}");
    }
    home.run("run --input in.jsonl").fails(2, &["--model"]);
    home.run("run --model GOLDEN --input in.jsonl --json")
        .fails(2, &["--output FILE"]);
    home.run("").fails(2, &["command is missing", "--help"]);
    home.run("store")
        .fails(2, &["command is missing", "store --help"]);
    home.run("fly").fails(2, &["fly", "loadmaster"]);
}

#[test]
fn the_memory_named_is_enough() {
    let home = Home::packed();
    for size in [
        "--prompt-len 16 --gen-len 4 --num-prompts 2",
        "--prompt-len 40 --gen-len 3 --num-prompts 5 --gpu-batch-size 5",
    ] {
        let words = format!("run --model synth:opt-125m {size}");
        let ended = home.run(&format!("{words} --cpu-mem 1MiB"));
        let text = ended.fails(1, &["cpu memory missing", "--cpu-mem"]);
        let named = text.split("this is enough: ").nth(1).expect("an amount");
        let enough = named.lines().next().expect("flags");
        home.run(&format!("{words} {enough}")).good();
        let mib: u64 = enough
            .split_whitespace()
            .find_map(|w| w.strip_suffix("MiB"))
            .and_then(|n| n.parse().ok())
            .expect("mebibytes");
        home.run(&format!("{words} --cpu-mem {}MiB", mib - 1))
            .fails(1, &["nothing fits"]);
    }
}

#[test]
fn what_is_there_is_kept() {
    let home = ready();
    home.write("out.jsonl", "precious\n");
    home.run(RUN).fails(1, &["out.jsonl exists", "--overwrite"]);
    assert_eq!(home.read("out.jsonl"), "precious\n");
    home.write("report.json", "precious\n");
    let report = "run --model GOLDEN --input in.jsonl --report report.json";
    let ended = home.run(report);
    ended.fails(1, &["report.json exists", "--overwrite"]);
    assert_eq!(ended.stdout, "", "refused before the work");
    assert_eq!(home.read("report.json"), "precious\n");
    home.run(&format!("{RUN} --overwrite --report report.json"))
        .good();
    assert_eq!(home.read("out.jsonl").lines().count(), 5);
    assert_eq!(home.json("report.json")["outcome"], "done");
    let same = "run --model GOLDEN --input in.jsonl --output in.jsonl --overwrite";
    home.run(same).fails(2, &["--input file"]);
    assert_eq!(home.read("in.jsonl"), RAGGED);
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let home = ready();
    let run = "run --model GOLDEN --input in.jsonl";
    home.run(&format!("{run} --output /proc/out.jsonl"))
        .fails(1, &["/proc/out.jsonl", "permissions"]);
    home.run(&format!("{run} --output nowhere/out.jsonl"))
        .fails(1, &["nowhere/out.jsonl", "check the path"]);
    let report = home.run(&format!("{run} --report nowhere/report.json"));
    report.fails(1, &["nowhere/report.json", "check the path"]);
    assert_eq!(report.stdout, "", "refused before the work");
    home.run("plan --model GOLDEN --input in.jsonl -o nowhere/plan.toml")
        .fails(1, &["nowhere/plan.toml", "check the path"]);
    home.run(&format!("{run} --output /dev/full"))
        .fails(1, &["/dev/full", "make room"]);
}

#[test]
fn an_offload_dir_must_be_a_disk_that_can_be_written() {
    let home = ready();
    let shm = format!("/dev/shm/loadmaster-test-{}", std::process::id());
    let memory = home.run(&format!("{RUN} --offload-dir {shm}"));
    memory.fails(1, &["tmpfs", "--offload-dir"]);
    assert!(!std::path::Path::new(&shm).exists(), "nothing is left");
    home.run(&format!("{RUN} --offload-dir /proc/loadmaster"))
        .fails(1, &["/proc/loadmaster", "--offload-dir"]);
    home.write("file", "");
    home.run(&format!("{RUN} --offload-dir file/below"))
        .fails(1, &["file/below", "--offload-dir"]);
    assert!(!home.path("out.jsonl").exists());
}

#[test]
fn a_disk_limit_is_kept() {
    let home = ready();
    home.run(&format!("{RUN} --disk-space 1KiB"))
        .fails(1, &["disk", "--disk-space"]);
    assert!(!home.path("store").exists());
}
