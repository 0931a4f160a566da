//! Where weights, cache and activations lie never shows in the results.

use crate::harness::{Home, RAGGED};

/// Shares and shapes with every tier in use, on the machine itself and on the one that plays a GPU.
const PLACEMENTS: [&str; 7] = [
    "--percent 0 100 0 100 0 100",
    "--percent 0 50 0 50 0 50 --gpu-batch-size 2 --num-gpu-batches 2",
    "--percent 0 0 0 0 0 0 --gpu-batch-size 3",
    "--percent 0 30 0 100 0 100 --overlap 0 --threads 3",
    "--device host:64MiB --percent 30 30 40 30 50 50 --gpu-batch-size 2 --num-gpu-batches 2",
    "--device host:64MiB --percent 0 50 0 50 50 0 --cpu-compute-share 0",
    "--device host:64MiB --percent 100 0 100 0 100 0 --pin-weight 0",
];

#[test]
fn a_checkpoint_gives_the_same_everywhere() {
    let home = Home::new();
    let plain = home.generate(RAGGED, "--model GOLDEN");
    assert_eq!(plain.len(), 5);
    for placement in PLACEMENTS {
        let lines = home.generate(RAGGED, &format!("--model GOLDEN {placement}"));
        assert_eq!(lines, plain, "{placement}");
        let device = home.json("report.json")["plan"]["device"].clone();
        let host = placement.contains("host:");
        assert_eq!(device == "host:64MiB", host, "{device}");
    }
}

#[test]
fn text_and_sampling_give_the_same_everywhere() {
    let home = Home::packed();
    let prompts = r#"{"prompt": "Paris is", "max_tokens": 5, "temperature": 0.9, "seed": 3}
{"prompt": "Rome", "max_tokens": 4}
{"prompt": "The disk, the memory and the processor", "temperature": 1.1, "top_k": 40}
"#;
    let model = "--model synth:opt-125m --gen-len 6 --seed 0";
    let plain = home.generate(prompts, model);
    let text = |n: usize| plain[n]["text"].as_str().expect("text");
    assert!(!text(0).is_empty() && text(0) != text(1));
    for placement in [
        "--percent 0 60 0 50 0 50",
        "--device host:400MiB --percent 30 40 50 25 50 25 --gpu-batch-size 1 --num-gpu-batches 3",
    ] {
        let lines = home.generate(prompts, &format!("{model} {placement}"));
        assert_eq!(lines, plain, "{placement}");
    }
    let other = home.generate(&prompts.replace("\"seed\": 3", "\"seed\": 4"), model);
    assert_ne!(other[0], plain[0], "another seed, another text");
    assert_eq!(other[1..], plain[1..]);
}

#[test]
fn the_shares_asked_for_are_the_shares_run() {
    let home = Home::packed();
    let size = "--prompt-len 16 --gen-len 3 --num-prompts 4 --gpu-batch-size 4";
    let words = format!(
        "run --model synth:opt-125m {size} --percent 0 40 0 50 0 100 --json --output out.jsonl"
    );
    let document = home.run(&words).good().document();
    let percent = document["plan"]["policy"]["percent"][1].as_f64();
    assert!(
        percent.is_some_and(|p| (p - 40.0).abs() <= 1.0),
        "{percent:?}"
    );
    assert_eq!(document["plan"]["policy"]["percent"][3], 50.0);
    let lanes = &document["report"]["measured"]["lanes"];
    let read = lanes["disk_to_cpu"]["bytes"].as_u64().expect("bytes");
    let weights = document["plan"]["model"]["weights_bytes"].as_u64();
    // Three passes over three fifths of the weights, and the cache beside them.
    assert!(
        Some(read) > weights.map(|w| w * 16 / 10),
        "{read} {weights:?}"
    );
    assert!(
        lanes["cpu_to_disk"]["bytes"].as_u64() > Some(0),
        "spilled cache"
    );
    assert_eq!(lanes["cpu_to_gpu"]["bytes"], 0);
}
