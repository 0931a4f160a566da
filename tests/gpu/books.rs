//! What the driver was asked for, by its own books: which kernels, how often memory was page-locked, how far ahead
//! the host was, how much memory was taken.

use crate::SPLIT;
use crate::stand_in::{Gpu, HOST, RAGGED, golden};
use std::collections::HashMap;

/// Counts by name of one run of lines of so many prompt tokens.
fn books(gpu: &Gpu, (prompt, max_tokens): (usize, usize), words: &str) -> HashMap<String, u64> {
    let line = |line: usize| {
        let prompt: Vec<usize> = (0..prompt).map(|at| 4 + (7 * line + 3 * at) % 90).collect();
        format!("{{\"prompt\": {prompt:?}, \"max_tokens\": {max_tokens}}}\n")
    };
    let lines: String = (0..4).map(line).collect();
    counted(gpu, &lines, &format!("--model GOLDEN --ignore-eos {words}"))
}

/// The same of any lines and model.
fn counted(gpu: &Gpu, lines: &str, words: &str) -> HashMap<String, u64> {
    let log = gpu.home.path("log.txt").display().to_string();
    let told = gpu.with(&[("FAKE_CUDA_LOG", &log)]);
    told.run_lines(lines, "cuda:0", words).good();
    let text = gpu.home.read("log.txt");
    let count = |line: &str| {
        let (name, count) = line.rsplit_once(' ')?;
        Some((name.to_owned(), count.parse().ok()?))
    };
    text.lines().filter_map(count).collect()
}

/// Products by which cuBLAS is made to load its kernels, as many of them as there is room for.
const WARM_UP: u64 = 6;

const RESIDENT: &str = "--percent 100 0 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 2";

/// Which kernels of these were launched.
fn launched<'a>(books: &HashMap<String, u64>, kernels: &[&'a str]) -> Vec<&'a str> {
    let begins = |kernel: &&str| {
        let of = format!("launch {kernel}");
        books.keys().any(|name| name.starts_with(&of))
    };
    kernels.iter().copied().filter(begins).collect()
}

#[test]
fn few_rows_never_widen_4_bit_weights_and_many_do() {
    let Some(gpu) = Gpu::new() else { return };
    let words = format!("{RESIDENT} --compress-weight 1");
    let kernels = ["gemm_small_q4", "dequantise_q4_f16"];
    let few = books(&gpu, (2, 4), &words);
    assert_eq!(launched(&few, &kernels), ["gemm_small_q4"]);
    let of_opening = few.get("products").copied().unwrap_or(0);
    assert!(of_opening <= WARM_UP);
    let many = books(&gpu, (20, 4), &words);
    assert_eq!(launched(&many, &kernels), kernels);
    assert!(many["products"] > of_opening);
}

#[test]
fn attention_is_by_the_kernel_of_its_rows_and_format() {
    let Some(gpu) = Gpu::new() else { return };
    let kernels = [
        "attend_prefill_mma_f16_",
        "attend_prefill_mma_q4_",
        "attend_prefill_f16",
        "attend_prefill_f32",
        "attend_decode_f16",
        "attend_decode_f32",
        "attend_decode_q4",
    ];
    for (words, wanted) in [
        ("", ["attend_prefill_mma_f16_", "attend_decode_f16"]),
        (
            "--compress-cache 1",
            ["attend_prefill_mma_q4_", "attend_decode_q4"],
        ),
        ("--kv f32", ["attend_prefill_f32", "attend_decode_f32"]),
        (
            "--compute fp32",
            ["attend_prefill_f16", "attend_decode_f16"],
        ),
    ] {
        let found = books(&gpu, (20, 4), &format!("{RESIDENT} {words}"));
        assert_eq!(launched(&found, &kernels), wanted, "{words}");
    }
}

#[test]
fn memory_is_page_locked_once_however_long_a_run_is() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 0 100 0 100 0 100 --pin-weight 0 --gpu-batch-size 2 --num-gpu-batches 2";
    let locks = |tokens| {
        let found = books(&gpu, (4, tokens), words);
        (found["page locks"], found["copy up"])
    };
    let ((few, few_copies), (many, many_copies)) = (locks(2), locks(12));
    assert!(few > 0 && many_copies > 3 * few_copies);
    assert_eq!(many, few);
}

/// Rows of sequences that lie beside each other, or equally far apart, go over the links by one call for all of them.
#[test]
fn sequences_share_their_copies() {
    let Some(gpu) = Gpu::new() else { return };
    let line = "{\"prompt\": [5, 6, 7, 8], \"max_tokens\": 6}\n";
    for homes in [
        "100 0 0 100 0 100 --cpu-cache-compute 1",
        "100 0 0 100 0 100 --cpu-cache-compute 0",
    ] {
        let copies = |sequences: usize| {
            let words = format!(
                "--model GOLDEN --ignore-eos --gpu-batch-size {sequences} --num-gpu-batches 1 --percent {homes}"
            );
            let found = counted(&gpu, &line.repeat(sequences), &words);
            (found["copy up"], found["copy down"])
        };
        let (one, four) = (copies(1), copies(4));
        assert!(one.0 > 20 && one.1 > 20, "{one:?}");
        assert_eq!(four, one, "{homes}");
    }
}

/// Small tables come by a kernel that reads them in page-locked DRAM: the copy engine has none of them, unless that DRAM
/// is one that kernels cannot read.
#[test]
fn tables_leave_the_copy_engine_to_others() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let copies = |told: &[(&str, &str)]| {
        let gpu = gpu.with(told);
        assert_eq!(gpu.tokens("cuda:0", SPLIT), on_host, "{told:?}");
        let found = books(&gpu, (20, 4), SPLIT);
        let of = |name: &str| found.get(name).copied().unwrap_or(0);
        (of("launch copy_table"), of("copy up"))
    };
    let (by_kernel, streamed) = copies(&[]);
    assert!(by_kernel > 0 && streamed > 0);
    let refused = copies(&[("FAKE_CUDA_MAPS", "0")]);
    assert_eq!(refused, (0, streamed + by_kernel));
    let (none, by_engine) = copies(&[("FAKE_CUDA_PINNED", "0")]);
    assert!(none == 0 && by_engine > streamed);
}

/// The host has a pass's operations queued before the first of them is over, without overlap too: there events
/// keep them apart.
#[test]
fn the_host_runs_ahead_of_a_slow_gpu() {
    let Some(gpu) = Gpu::new() else { return };
    let slow = gpu.with(&[
        ("FAKE_CUDA_DELAY_US", "3000"),
        ("FAKE_CUDA_DELAY_STREAM", "3"),
    ]);
    // Where the CPU attends, what comes after it is not handed over before.
    let words =
        "--percent 50 50 50 50 50 50 --cpu-cache-compute 0 --gpu-batch-size 1 --num-gpu-batches 4";
    let ahead = |words: &str| books(&slow, (3, 3), words)["operations queued at most"];
    let (free, apart) = (ahead(words), ahead(&format!("{words} --overlap 0")));
    // Two layers of four batches have more than eighty.
    assert!(free > 60 && apart > 60, "{free} {apart}");
}

/// By the driver and by the management library; the plan is an upper bound, and a close one.
#[test]
fn device_memory_is_what_was_planned() {
    let Some(gpu) = Gpu::new() else { return };
    for words in [
        SPLIT,
        RESIDENT,
        "--percent 0 0 0 0 0 0 --gpu-batch-size 2 --compress-weight 1",
    ] {
        let taken = books(&gpu, (20, 4), words)["device peak bytes"];
        let report = gpu.home.json("report.json");
        let planned = peak(&report["plan"]["estimate"]);
        is_close(taken, planned, words);
        is_close(peak(&report["measured"]), planned, words);
    }
}

fn peak(of: &serde_json::Value) -> u64 {
    let bytes = of["tiers"]["gpu"]["peak_bytes"].as_u64();
    bytes.expect("a peak")
}

fn is_close(taken: u64, planned: u64, what: &str) {
    assert!(
        taken <= planned && 100 * taken >= 97 * planned,
        "{what}: {taken} of {planned}"
    );
}

/// There the management library knows processes by other numbers, and what a run holds is a difference: also of the
/// second run, whose context cuBLAS has kept from the first.
#[test]
fn device_memory_is_counted_in_a_container_too() {
    let Some(gpu) = Gpu::new() else { return };
    let contained = gpu.with(&[("FAKE_NVML_PID", "1"), ("FAKE_CUBLAS_KEEPS", "1")]);
    gpu.home.write("in.jsonl", RAGGED);
    gpu.home
        .write("runs", &format!("one {SPLIT}\ntwo {RESIDENT}\n"));
    let words = "series runs --out out -- --model GOLDEN --input in.jsonl --device cuda:0";
    let output = contained.output(words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for run in ["one", "two"] {
        let report = gpu.home.json(&format!("out/{run}.json"));
        let measured = &report["measured"];
        is_close(peak(measured), peak(&report["plan"]["estimate"]), run);
        assert_eq!(measured["tiers"]["gpu"]["others_bytes"], 0, "{run}");
    }
}

/// Small products are ours alone, so these are of the opening, before anything is timed: in each format, of few rows
/// and of many.
#[test]
fn cublas_is_warm_before_the_first_pass() {
    let Some(gpu) = Gpu::new() else { return };
    let line = "{\"prompt\": [5, 6, 7], \"max_tokens\": 2}\n";
    let words = "--model synth:opt-125m --unpacked --gpu-mem 512MiB --percent 100 0 100 0 100 0 \
        --gpu-batch-size 2 --num-gpu-batches 1";
    assert_eq!(counted(&gpu, line, words)["products"], WARM_UP);
    // One that has no bf16 is missed by nobody but models in bf16.
    let old = gpu.with(&[("FAKE_CUBLAS_NO_BF16", "1")]);
    assert_eq!(counted(&old, line, words)["products"], WARM_UP - 2);
}

#[test]
fn a_gpu_without_bf16_is_told_by_models_in_bf16() {
    let Some(gpu) = Gpu::new() else { return };
    let old = gpu.with(&[("FAKE_CUBLAS_NO_BF16", "1")]);
    let prompt: Vec<u32> = (4..44).collect();
    let line = format!("{{\"prompt\": {prompt:?}, \"max_tokens\": 2}}\n");
    let run = |model: &str| {
        let words = format!("--model {} {RESIDENT}", golden(model).display());
        old.run_lines(&line, "cuda:0", &words)
    };
    run("opt-like").good();
    let told = ["this GPU multiplies no bf16", "--device cpu"];
    let said = run("wide-embedding").fails(1, &told);
    assert!(!said.contains("loading the weights"), "{said}");
}
