//! A process that uses the GPU more than once: what cuBLAS keeps of one machine is there for the next, and is counted
//! once; after a fault there is no next one.

use crate::probe::measured;
use crate::stand_in::{Gpu, RAGGED};
use clap::Parser;
use loadmaster::cli::args::Cli;
use loadmaster::cli::commands::dispatch;
use loadmaster::cli::gpu::LocalGpu;
use loadmaster::units::MIB;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;

const RESIDENT: &str = "--percent 100 0 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 2";
/// The management library may know this process by its number, or by another one.
const NUMBERS: [&[(&str, &str)]; 2] = [&[], &[("FAKE_NVML_PID", "1")]];

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Device memory that a run is expected to take, in whole MiB.
fn needed_mib(plan: &Value) -> u64 {
    let peak = plan["estimate"]["tiers"]["gpu"]["peak_bytes"].as_u64();
    peak.expect("a peak").div_ceil(MIB)
}

/// Each of these takes all of the GPU, its context included.
#[test]
fn every_run_of_a_series_may_take_the_whole_gpu() {
    let Some(gpu) = Gpu::new() else { return };
    gpu.run("cuda:0", RESIDENT).good();
    let mib = needed_mib(&gpu.home.json("report.json")["plan"]);
    let vram = (mib * MIB).to_string();
    gpu.home.write("in.jsonl", RAGGED);
    let given = format!("{RESIDENT} --gpu-mem {mib}MiB");
    for number in NUMBERS {
        let told = [("FAKE_CUBLAS_KEEPS", "1"), ("FAKE_CUDA_VRAM", &vram)];
        let full = gpu.with(&told).with(number);
        gpu.home
            .write("runs", &format!("one {given}\ntwo {given}\n"));
        let words =
            "series runs --out out -- --model GOLDEN --gen-len 6 --input in.jsonl --device cuda:0";
        let output = full.output(words);
        assert!(output.status.success(), "{}", said(&output));
    }
}

/// Where nobody says how much, it is as much for each.
#[test]
fn every_run_of_a_series_has_the_same_budget() {
    let Some(gpu) = Gpu::new() else { return };
    gpu.home.write("in.jsonl", RAGGED);
    gpu.home
        .write("runs", &format!("one {RESIDENT}\ntwo {RESIDENT}\n"));
    for number in NUMBERS {
        let kept = gpu.with(&[("FAKE_CUBLAS_KEEPS", "1")]).with(number);
        let words =
            "series runs --out out -- --model GOLDEN --gen-len 6 --input in.jsonl --device cuda:0";
        let output = kept.output(words);
        assert!(output.status.success(), "{}", said(&output));
        let budget = |run: &str| {
            let report = gpu.home.json(&format!("out/{run}.json"));
            report["plan"]["budget"]["gpu_bytes"].as_u64()
        };
        let first = budget("one");
        assert!(first.is_some_and(|bytes| bytes > 512 * MIB), "{first:?}");
        assert_eq!(budget("two"), first);
    }
}

/// A model that takes more of a GPU than a probe does.
const LARGE: &str = "--model synth:opt-125m --unpacked --percent 100 0 100 0 100 0 --gpu-batch-size 2 \
    --num-gpu-batches 1";
/// Told where to work, the test probes and runs; what it may take is told as well.
const INSIDE: &str = "LOADMASTER_TEST_PROBES_AND_RUNS_IN";
const MAY_TAKE: &str = "LOADMASTER_TEST_MAY_TAKE";

/// Libraries are found when a process starts: this test is another one, which it starts itself.
#[test]
fn what_is_probed_again_is_the_same_and_a_run_may_take_all() {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return probed_twice_then_run(Path::new(&dir));
    }
    let Some(gpu) = Gpu::new() else { return };
    let line = "{\"prompt\": [5, 6, 7], \"max_tokens\": 2}\n";
    gpu.run_lines(line, "cuda:0", LARGE).good();
    let mib = needed_mib(&gpu.home.json("report.json")["plan"]);
    for number in NUMBERS {
        let vram = (mib * MIB).to_string();
        let told = [
            ("FAKE_CUBLAS_KEEPS", "1"),
            ("FAKE_CUDA_VRAM", vram.as_str()),
        ];
        let full = gpu.with(&told).with(number);
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        full.beside(&mut command);
        let output = command
            .args([
                "--exact",
                "again::what_is_probed_again_is_the_same_and_a_run_may_take_all",
            ])
            .env(INSIDE, &gpu.home.dir)
            .env(MAY_TAKE, format!("{mib}MiB"))
            .env("LOADMASTER_HOME", &gpu.home.dir)
            .current_dir(&gpu.home.dir)
            .output()
            .expect("started");
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{told} {}", said(&output));
        assert!(told.contains("1 passed"), "{told}");
    }
}

fn probed_twice_then_run(dir: &Path) {
    let gpu = || LocalGpu::find(0).expect("the emulated one");
    let facts = || measured(dir).gpu.expect("a GPU");
    let all = gpu().free_bytes();
    assert_eq!(all, Some(gpu().facts.total_bytes));
    let (first, second) = (facts(), facts());
    assert_eq!(first.context_bytes, 72 * MIB);
    assert_eq!(second.context_bytes, first.context_bytes);
    assert!(2 * second.host_bytes >= first.host_bytes);
    assert_eq!(gpu().free_bytes(), all);
    let may_take = std::env::var(MAY_TAKE).expect("told");
    let words = format!(
        "loadmaster run --input in.jsonl --output out.jsonl --overwrite --device cuda:0 --gpu-mem {may_take} {LARGE}"
    );
    let cli = Cli::try_parse_from(words.split_whitespace()).expect("a command");
    dispatch(cli, &AtomicBool::new(false)).expect("it has run");
}

/// The driver fails every later call: further runs would only say so in other words.
#[test]
fn a_series_ends_with_a_fault() {
    let Some(gpu) = Gpu::new() else { return };
    gpu.home.write("in.jsonl", RAGGED);
    let lines = ["one", "two", "three"].map(|run| format!("{run} {RESIDENT}\n"));
    gpu.home.write("runs", &lines.concat());
    let faulty = gpu.with(&[("FAKE_CUDA_FAULT", "40")]);
    let words =
        "series runs --out out -- --model GOLDEN --gen-len 6 --input in.jsonl --device cuda:0";
    let output = faulty.output(words);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in [
        "1 of 3 runs failed; one: ",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "start the program again",
        "the process must be started again: not run are two, three",
    ] {
        assert!(said.contains(part), "no {part:?}: {said}");
    }
    assert!(!gpu.home.path("out/two.json").exists());
    // One that fails in another way ends nothing.
    gpu.home.write(
        "runs",
        &format!("one {RESIDENT} --gpu-mem 1MiB\ntwo {RESIDENT}\n"),
    );
    gpu.output(words);
    assert!(gpu.home.path("out/two.json").exists());
}
