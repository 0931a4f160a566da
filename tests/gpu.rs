//! The program on a GPU that is not there: the whole CUDA machine over stand-in libraries (tests/cuda), as a
//! user starts it. Tokens are those of the host machine; what is missing is told, with the way out.

#[path = "gpu/again.rs"]
mod again;
#[path = "gpu/bench.rs"]
mod bench;
#[path = "gpu/books.rs"]
mod books;
#[path = "gpu/goldens.rs"]
mod goldens;
#[path = "gpu/heads.rs"]
mod heads;
#[path = "gpu/libraries.rs"]
mod libraries;
#[path = "gpu/probe.rs"]
mod probe;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/stand_in.rs"]
mod stand_in;
#[path = "gpu/waits.rs"]
mod waits;

mod running;

use stand_in::{Gpu, HOST};

/// Prompts of four lengths: products of few rows, so that both machines add up in fp32.
const SPLIT: &str = "--percent 30 30 40 30 50 50 --gpu-batch-size 2 --num-gpu-batches 2";

#[test]
fn the_gpu_gives_the_hosts_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    assert_eq!(on_host.len(), 5);
    assert_eq!(gpu.tokens("cuda:0", SPLIT), on_host);
    let report = gpu.home.json("report.json");
    assert_eq!(report["host"]["gpu"], "Emulated GPU");
    let lanes = &report["measured"]["lanes"];
    for lane in ["cpu_to_gpu", "gpu_to_cpu", "gpu_compute", "disk_to_cpu"] {
        let busy = lanes[lane]["prefill_s"].as_f64().expect("seconds");
        assert!(busy > 0.0, "{lane} was never busy: {lanes}");
    }
    assert!(report["measured"]["tiers"]["gpu"]["peak_bytes"].as_u64() > Some(0));
}

#[test]
fn every_share_and_switch_gives_the_hosts_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    for words in [
        "--percent 100 0 100 0 100 0 --gpu-batch-size 4 --num-gpu-batches 1",
        "--percent 0 0 0 0 0 0 --gpu-batch-size 2 --num-gpu-batches 2",
        "--percent 0 100 0 100 0 100 --gpu-batch-size 3 --num-gpu-batches 2 --pin-weight 0",
        "--percent 0 100 0 100 0 100 --gpu-batch-size 2 --num-gpu-batches 2 --cpu-cache-compute 1",
        "--percent 40 60 50 50 50 50 --gpu-batch-size 2 --num-gpu-batches 2 --cpu-compute-share 50",
        "--percent 20 30 50 50 50 50 --gpu-batch-size 2 --num-gpu-batches 2 --cpu-compute-share 50",
        "--percent 0 0 100 0 0 100 --gpu-batch-size 2 --num-gpu-batches 1 --cpu-compute-share 100 --compress-weight 1 --compute fp32",
        "--percent 30 30 40 30 50 50 --gpu-batch-size 2 --num-gpu-batches 2 --compress-weight 1 --compress-cache 1 --compute fp32",
        "--percent 30 30 40 30 50 50 --gpu-batch-size 1 --num-gpu-batches 3 --overlap 0 --kv f32",
    ] {
        assert_eq!(
            gpu.tokens("cuda:0", words),
            gpu.tokens(HOST, words),
            "{words}"
        );
    }
}

/// Bytes that each lane of the last run moved, and what the run wrote to files of its own.
fn moved(gpu: &Gpu) -> (impl Fn(&str) -> u64 + use<>, u64) {
    let report = gpu.home.json("report.json");
    let lanes = report["measured"]["lanes"].clone();
    let spilled = report["plan"]["setup"]["spill_bytes"].as_u64();
    let bytes = move |lane: &str| lanes[lane]["bytes"].as_u64().expect("bytes");
    (bytes, spilled.expect("bytes"))
}

/// Turned into the CPU's layout when the weights are loaded, they come from disk once a pass and stay in DRAM.
#[test]
fn rows_that_the_cpu_multiplies_from_disk_never_pass_the_link() {
    let Some(gpu) = Gpu::new() else { return };
    let shape = "--percent 0 0 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 2";
    let words = format!("{shape} --cpu-compute-share 100");
    let on_host = gpu.tokens(HOST, &words);
    let (host_bytes, host_spilled) = moved(&gpu);
    assert_eq!(gpu.tokens("cuda:0", &words), on_host);
    let (bytes, spilled) = moved(&gpu);
    for lane in ["cpu_to_gpu", "gpu_to_cpu"] {
        assert_eq!(bytes(lane), host_bytes(lane), "{lane}");
    }
    // In their own file chunks begin with pages: no more of them than of the store are read.
    let read = bytes("disk_to_cpu");
    assert!(read > 0 && read <= host_bytes("disk_to_cpu"));
    assert!(spilled > 0 && host_spilled == 0);
    assert_eq!(
        gpu.tokens("cuda:0", &format!("{shape} --cpu-compute-share 0")),
        on_host
    );
    assert!(moved(&gpu).0("cpu_to_gpu") > bytes("cpu_to_gpu"));
    assert_eq!(moved(&gpu).1, 0);
}

/// Tied and not: tokens are looked up in rows that the CPU has in its own layout, too.
#[test]
fn weights_straight_from_their_source_give_the_hosts_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    for model in ["opt-like", "untied"] {
        let model = stand_in::golden(model).display().to_string();
        for shares in [
            "--percent 20 40 50 50 50 50 --cpu-compute-share 50",
            "--percent 0 0 0 0 0 0 --cpu-compute-share 0",
            "--percent 0 50 100 0 100 0 --cpu-compute-share 100 --compress-weight 1 --compute fp32",
        ] {
            let words = format!(
                "--model {model} --gen-len 6 --gpu-batch-size 2 --num-gpu-batches 2 {shares}"
            );
            let run = |device: &str, how: &str| {
                let input = stand_in::RAGGED;
                stand_in::tokens(
                    &gpu.run_lines(input, device, &format!("{words}{how}"))
                        .good(),
                )
            };
            let on_host = run(HOST, "");
            assert_eq!(run("cuda:0", " --unpacked"), on_host, "{words}");
        }
    }
    let stores = gpu.output("store list");
    let listed = String::from_utf8_lossy(&stores.stdout).into_owned();
    assert!(!listed.contains("-gpu-"), "{listed}");
}

#[test]
fn delays_change_nothing() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 0 50 50 50 50 50 --gpu-batch-size 1 --num-gpu-batches 3";
    let on_host = gpu.tokens(HOST, words);
    for seed in ["1", "2", "3"] {
        let slow = gpu.with(&[("FAKE_CUDA_DELAY_US", "200"), ("FAKE_CUDA_SEED", seed)]);
        assert_eq!(slow.tokens("cuda:0", words), on_host, "seed {seed}");
    }
}

/// Fills and copies from DRAM that is not page-locked go on there after their calls have returned.
#[test]
fn the_drivers_own_stream_is_waited_for() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let slow = gpu.with(&[
        ("FAKE_CUDA_DELAY_STREAM", "0"),
        ("FAKE_CUDA_DELAY_US", "20000"),
    ]);
    assert_eq!(slow.tokens("cuda:0", SPLIT), on_host);
}

#[test]
fn what_cannot_be_page_locked_travels_through_the_relay() {
    let Some(gpu) = Gpu::new() else { return };
    let on_host = gpu.tokens(HOST, SPLIT);
    let refusing = gpu.with(&[("FAKE_CUDA_PINNED", "0")]);
    let ended = refusing.run("cuda:0", SPLIT).good();
    assert!(
        ended.stderr.contains("could not be page-locked"),
        "{}",
        ended.stderr
    );
    assert_eq!(stand_in::tokens(&ended), on_host);
}

/// What a copy down writes to memory that is not page-locked may be there only when the copy is over, not when its call
/// has returned: the relay is filled after that.
#[test]
fn the_relay_waits_for_what_comes_down() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 100 0 100 0 0 100 --gpu-batch-size 1 --num-gpu-batches 3";
    let on_host = gpu.tokens(HOST, words);
    let late = gpu.with(&[
        ("FAKE_CUDA_PINNED", "0"),
        ("FAKE_CUDA_LATE", "1"),
        ("FAKE_CUDA_DELAY_STREAM", "2"),
        ("FAKE_CUDA_DELAY_US", "4000"),
    ]);
    assert_eq!(late.tokens("cuda:0", words), on_host);
}

/// The bytes that were page-locked at most, from the stand-in driver's log.
fn page_locked_bytes(log: &str) -> u64 {
    let line = log
        .lines()
        .find_map(|l| l.strip_prefix("pinned peak bytes "));
    line.expect("in the log").parse().expect("a number")
}

#[test]
fn weights_that_cannot_be_page_locked_are_planned_anew() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 0 100 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 2";
    let on_host = gpu.tokens(HOST, words);
    let log = gpu.home.path("log.txt").display().to_string();
    let unpinned = gpu.with(&[("FAKE_CUDA_LOG", &log)]);
    unpinned
        .run("cuda:0", &format!("{words} --pin-weight 0"))
        .good();
    // Enough for everything but the weights.
    let limit = page_locked_bytes(&gpu.home.read("log.txt")).to_string();
    let refusing = gpu.with(&[("FAKE_CUDA_PINNED", &limit)]);
    let pins = || gpu.home.json("report.json")["plan"]["policy"]["pin_weight"].clone();
    let ended = refusing.run("cuda:0", words).good();
    assert!(ended.stderr.contains("planning again without"));
    assert_eq!(
        (stand_in::tokens(&ended), pins()),
        (on_host.clone(), false.into())
    );
    // Asked for, they stay as planned and take the relay.
    let ended = refusing
        .run("cuda:0", &format!("{words} --pin-weight 1"))
        .good();
    assert!(ended.stderr.contains("go through a relay"));
    assert!(!ended.stderr.contains("planning again"));
    assert_eq!(
        (stand_in::tokens(&ended), pins()),
        (on_host.clone(), true.into())
    );
    // A saved plan, too, is made anew.
    let plan = format!(
        "plan --model GOLDEN --input in.jsonl --gen-len 6 --device cuda:0 {words} -o plan.toml"
    );
    assert!(gpu.output(&plan).status.success());
    let exec = "exec plan.toml --input in.jsonl --gen-len 6 --report report.json --overwrite";
    let output = refusing.output(exec);
    assert!(String::from_utf8_lossy(&output.stderr).contains("planning again without"));
    let lines = stand_in::tokens_of(&output);
    assert_eq!((lines, pins()), (on_host, false.into()));
    // As it was but for that.
    let policy = gpu.home.json("report.json")["plan"]["policy"].clone();
    let batch = (&policy["gpu_batch_size"], &policy["num_gpu_batches"]);
    assert_eq!(batch, (&2.into(), &2.into()));
    assert_eq!(
        policy["percent"],
        serde_json::json!([0.0, 100.0, 100.0, 0.0, 100.0, 0.0])
    );
}

/// The cache is the largest buffer of DRAM here; everything else fits the limit.
#[test]
fn a_cache_that_cannot_be_page_locked_is_priced_as_what_it_is() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 100 0 0 100 100 0 --cpu-cache-compute 0 --gpu-batch-size 8 --num-gpu-batches 2 --compute fp32";
    let line = |line: usize| {
        let prompt: Vec<usize> = (0..40).map(|at| 4 + (7 * line + 3 * at) % 90).collect();
        format!("{{\"prompt\": {prompt:?}, \"max_tokens\": 2}}\n")
    };
    let lines: String = (0..16).map(line).collect();
    let run = |gpu: &Gpu, device: &str, more: &str| {
        let words = format!("--model GOLDEN {words}{more}");
        gpu.run_lines(&lines, device, &words).good()
    };
    let on_host = stand_in::tokens(&run(&gpu, HOST, ""));
    let log = gpu.home.path("log.txt").display().to_string();
    run(&gpu.with(&[("FAKE_CUDA_LOG", &log)]), "cuda:0", "");
    let repriced = || {
        let report = gpu.home.json("report.json");
        let busy = &report["repriced"]["lanes"]["cpu_to_gpu"];
        busy["decode_s"].as_f64().expect("seconds")
    };
    let (all, straight_s) = (page_locked_bytes(&gpu.home.read("log.txt")), repriced());
    let refusing = gpu.with(&[("FAKE_CUDA_PINNED", &(all - 1).to_string())]);
    let ended = run(&refusing, "cuda:0", "");
    assert_eq!(stand_in::tokens(&ended), on_host);
    let said = ended
        .stderr
        .lines()
        .find(|l| l.contains("could not be page-locked"));
    let said = said.expect("told").to_owned();
    assert!(
        said.contains("the cache") && said.contains("tok/s are expected"),
        "{said}"
    );
    // The profile's DRAM that is not page-locked is half as fast.
    assert!(repriced() > 1.2 * straight_s, "{} {straight_s}", repriced());
    // A saved plan, too.
    let plan = format!("plan --model GOLDEN --input in.jsonl --device cuda:0 {words} -o plan.toml");
    assert!(gpu.output(&plan).status.success());
    let exec = "exec plan.toml --input in.jsonl --report report.json --overwrite";
    let output = refusing.output(exec);
    assert!(String::from_utf8_lossy(&output.stderr).contains("(the cache)"));
    assert_eq!(stand_in::tokens_of(&output), on_host);
    assert!(repriced() > 1.2 * straight_s);
}

#[test]
fn a_relay_that_cannot_be_page_locked_whole_is_made_smaller() {
    let Some(gpu) = Gpu::new() else { return };
    let words = "--percent 0 60 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 2";
    let on_host = gpu.tokens(HOST, words);
    let log = gpu.home.path("log.txt").display().to_string();
    let allowing = |bytes: &str| {
        let told = [("FAKE_CUDA_PINNED", bytes), ("FAKE_CUDA_LOG", log.as_str())];
        let ended = gpu.with(&told).run("cuda:0", words).good();
        assert_eq!(stand_in::tokens(&ended), on_host, "{bytes}");
        (ended.stderr, page_locked_bytes(&gpu.home.read("log.txt")))
    };
    let (said, locked_bytes) = allowing("1572864");
    assert!(said.contains("go through a relay of 1.00 MiB"), "{said}");
    // The few weights fit beside it.
    assert!((1 << 20..1572864).contains(&locked_bytes), "{locked_bytes}");
    // Nothing is allowed: all of it is used as it is.
    let (said, locked_bytes) = allowing("4096");
    assert!(said.contains("go through a relay of 8.00 MiB"), "{said}");
    assert_eq!(locked_bytes, 0);
}

#[test]
fn a_gpu_that_is_too_small_is_told_before_anything_runs() {
    let Some(gpu) = Gpu::new() else { return };
    let small = gpu.with(&[("FAKE_CUDA_VRAM", "100000000")]);
    let planned = small.run("cuda:0", SPLIT);
    planned.fails(1, &["gpu memory missing", "--gpu-mem"]);
    // A budget that says otherwise than the GPU does is found out before the weights are loaded.
    let told = format!("{SPLIT} --gpu-mem 900MiB");
    let started = small.run("cuda:0", &told);
    started.fails(1, &["of GPU memory", "are free", "--gpu-mem"]);
    assert!(
        !started.stderr.contains("loading the weights"),
        "{}",
        started.stderr
    );
}

#[test]
fn without_a_gpu_the_cpu_runs_and_asking_for_one_fails() {
    let Some(gpu) = Gpu::new() else { return };
    let absent = gpu.with(&[("FAKE_CUDA_DEVICES", "0")]);
    let cpu = "--percent 0 50 0 50 0 50 --gpu-batch-size 2";
    let ended = absent.run("auto", cpu).good();
    assert_eq!(absent.home.json("report.json")["plan"]["device"], "cpu");
    assert_eq!(stand_in::tokens(&ended).len(), 5);
    absent
        .run("cuda:0", SPLIT)
        .fails(2, &["no GPU", "--device cpu"]);
    gpu.run("cuda:1", SPLIT).fails(2, &["no GPU number 1"]);
}

#[test]
fn kernels_are_compiled_once_and_a_torn_one_is_made_anew() {
    let Some(gpu) = Gpu::new() else { return };
    let first = gpu.tokens("cuda:0", SPLIT);
    let kept = || -> Vec<_> {
        let entries = std::fs::read_dir(gpu.home.path("kernels")).expect("kept");
        let mut files: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
        files.sort();
        files
    };
    let files = kept();
    assert!(files.len() >= 8, "{files:?}");
    let whole = std::fs::read(&files[0]).expect("a cubin");
    std::fs::write(&files[0], &whole[..whole.len() / 2]).expect("torn");
    assert_eq!(gpu.tokens("cuda:0", SPLIT), first);
    assert_eq!(std::fs::read(&files[0]).expect("a cubin"), whole);
    assert_eq!(kept(), files);
    // What is kept is what runs: the compiler is not asked again.
    let broken = gpu.with(&[("FAKE_NVRTC_FAIL", "1")]);
    assert_eq!(broken.tokens("cuda:0", SPLIT), first);
}
