//! Weights straight from their source, and many runs in one process: `--unpacked` and `series`.

use crate::harness::{Home, RAGGED, golden, in_order};

/// Tied, untied, with projections and of odd sizes.
const MODELS: [&str; 4] = [
    "opt-like",
    "untied",
    "post-norm-projections",
    "wide-embedding",
];

#[test]
fn weights_straight_from_their_source_give_the_same_tokens_and_leave_no_store() {
    let home = Home::new();
    let size = "--prompt-len 9 --gen-len 4 --num-prompts 5 --gpu-batch-size 2 --num-gpu-batches 2";
    for name in MODELS {
        for placement in [
            "--percent 0 30 0 50 0 100",
            "--percent 0 0 0 100 0 100 --compress-weight 1",
            "--device host:64MiB --percent 20 30 50 50 50 50 --cpu-compute-share 50",
        ] {
            let model = golden(name).display().to_string();
            let words =
                format!("--report report.json --overwrite --model {model} {size} {placement}");
            let straight = home.run(&format!("run {words} --unpacked")).good().lines();
            let list = home.run("store list").good().stdout;
            assert!(list.starts_with("0 stores"), "{list}");
            let report = home.json("report.json");
            let written = report["setup"]["written_bytes"].as_u64();
            assert_eq!(written, report["plan"]["setup"]["spill_bytes"].as_u64());
            let weights = report["plan"]["placement"]["weight_bytes"].clone();
            let on_disk = ["disk_ship", "disk_compute"].map(|home| weights[home].as_u64());
            assert!(
                written >= on_disk.into_iter().sum(),
                "{written:?} {weights}"
            );
            let packed = home.run(&format!("run {words}")).good().lines();
            assert_eq!(straight, packed, "{name} {placement}");
            let list = home.run("store list").good().stdout;
            let store = list.split_whitespace().next().expect("a name");
            home.run(&format!("store rm {store}")).good();
        }
    }
}

#[test]
fn only_what_is_at_home_on_disk_counts_there() {
    let home = Home::new();
    let words = "plan --model opt-1.3b --prompt-len 8 --gen-len 4 --num-prompts 2";
    home.run(&format!("{words} --disk-space 100MiB"))
        .fails(1, &["of disk memory"]);
    let run = "run --model synth:opt-125m --prompt-len 8 --gen-len 2 --num-prompts 2";
    let resident = "--unpacked --disk-space 1MiB --percent 0 100 0 100 0 100";
    assert_eq!(
        home.run(&format!("{run} {resident}")).good().lines().len(),
        2
    );
    let short = "--unpacked --disk-space 100MiB --percent 0 20 0 100 0 100";
    home.run(&format!("{run} {short}"))
        .fails(1, &["of disk memory"]);
}

#[test]
fn a_series_runs_what_its_lines_say_in_one_process() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let shared = "--model GOLDEN --input in.jsonl";
    let alone = home.run(&format!("run {shared}")).good().lines();
    home.write(
        "runs.txt",
        "resident --percent 0 100 0 100 0 100\n\ndisk --percent 0 0 0 0 0 0 --unpacked\nsmall --cpu-mem 1MiB\n",
    );
    let ended = home
        .run(&format!("series runs.txt --out made -- {shared}"))
        .good();
    assert!(ended.stdout.contains("2 runs: mean error of throughput"));
    assert!(ended.stderr.contains("small does not fit: nothing fits"));
    for name in ["resident", "disk"] {
        assert_eq!(in_order(&home.read(&format!("made/{name}.jsonl"))), alone);
        assert_eq!(home.json(&format!("made/{name}.json"))["outcome"], "done");
    }
    // Two of one name would write the same files.
    home.write("runs.txt", "one --cpu-mem 2GiB\none --cpu-mem 3GiB\n");
    home.run(&format!("series runs.txt --out made -- {shared}"))
        .fails(2, &["two lines are called one"]);
    // One that fails is named, and the others run all the same.
    let here = golden("opt-like").display().to_string();
    home.write(
        "runs.txt",
        &format!("gone --model nowhere\nhere --model {here}\n"),
    );
    let ended = home.run("series runs.txt --out made --json -- --input in.jsonl");
    ended.fails(1, &["1 of 2 runs failed; gone: ", "nowhere"]);
    assert_eq!(ended.document()["runs"][0]["report"], "here");
    // Nothing runs before every line is understood.
    home.write("runs.txt", "first\nsecond --percent 1 2\n");
    let ended = home.run(&format!("series runs.txt --out none -- {shared}"));
    ended.fails(2, &["second: "]);
    assert!(!home.path("none").exists());
    home.run("series nowhere.txt --out made")
        .fails(1, &["nowhere.txt"]);
}
