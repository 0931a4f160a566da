//! How a run ends early: a closed stdout is quiet, a signal leaves whole lines.

use crate::harness::{Ended, Home, RAGGED, in_order};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

#[test]
fn a_closed_stdout_is_no_failure() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    for words in [
        "run --model GOLDEN --input in.jsonl --report report.json",
        "plan --model GOLDEN --input in.jsonl",
        "plan --model GOLDEN --input in.jsonl --json",
        "store list",
    ] {
        let mut child = home
            .command(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        drop(child.stdout.take());
        let ended = Ended::new(words, child.wait_with_output().expect("ended")).good();
        assert!(!ended.stderr.contains("error:"), "{}", ended.stderr);
    }
    // Nobody wanted the rest: its figures are those of what was done, and teach no profile anything.
    let report = home.json("report.json");
    assert_eq!(report["outcome"], "interrupted");
    assert!(report["measured"]["total_s"].as_f64() > Some(0.0));
    assert!(report["measured"]["generated_tokens"].as_u64() > Some(0));
    home.run("calibrate report.json --dry-run")
        .fails(1, &["did not end well"]);
}

#[test]
fn help_and_version_are_answers() {
    let home = Home::new();
    assert!(home.run("--help").good().stdout.contains("plan"));
    assert!(home.run("run --help").good().stdout.contains("--cpu-mem"));
    let version = home.run("--version").good().stdout;
    assert_eq!(
        version.trim(),
        format!("loadmaster {}", env!("CARGO_PKG_VERSION"))
    );
}

/// One sequence at a time, so that lines end one by one for long enough to be interrupted.
const SLOW: &str = "run --model synth:opt-125m --prompt-len 4 --gen-len 24 --num-prompts 200 \
    --gpu-batch-size 1 --num-gpu-batches 1 --ignore-eos --report report.json";

fn interrupted_by(signal: &str) {
    let home = Home::packed();
    let mut child = home
        .command(SLOW)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut reader = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut results = String::new();
    reader.read_line(&mut results).expect("a first line");
    send(signal, child.id());
    std::io::Read::read_to_string(&mut reader, &mut results).expect("UTF-8");
    let ended = Ended::new(signal, child.wait_with_output().expect("ended"));
    ended.fails(1, &["interrupted", "finished lines"]);
    let lines = in_order(&results);
    assert!((1..200).contains(&lines.len()), "{}", lines.len());
    for line in &lines {
        assert_eq!(line["token_ids"].as_array().map(Vec::len), Some(24));
    }
    let report = home.json("report.json");
    assert_eq!(report["outcome"], "interrupted");
    assert_eq!(report["lines"]["ok"], lines.len());
    assert_eq!(report["lines"]["total"], 200);
    let tokens = |of: &str| report[of]["generated_tokens"].as_u64();
    assert_eq!(
        tokens("repriced"),
        tokens("measured"),
        "of the lines that were begun"
    );
    let left = std::fs::read_dir(home.path("spill")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "spill files are gone");
    let shown = home.run("compare report.json report.json").good().stdout;
    let told = format!("; interrupted: {} of 200 lines done)", lines.len());
    assert!(shown.contains(&told), "{shown}");
    assert!(
        shown.contains("2 that were interrupted left out"),
        "{shown}"
    );
}

#[test]
fn signals_leave_whole_lines() {
    interrupted_by("INT");
    interrupted_by("TERM");
    interrupted_by("HUP");
}

#[test]
fn a_signal_while_packing_leaves_no_half_store() {
    let home = Home::new();
    let words = "run --model synth:opt-1.3b --prompt-len 4 --gen-len 2 --num-prompts 1";
    let talk = failed_after(&home, words, ("packing the weights", "TERM"));
    assert!(
        talk.lines()
            .last()
            .is_some_and(|l| l.starts_with("error: ")),
        "{talk}"
    );
    let entries = std::fs::read_dir(home.path("store"))
        .expect("begun")
        .flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    let left: Vec<String> = names.filter(|name| !name.ends_with(".lock")).collect();
    assert_eq!(left, [""; 0]);
}

/// A cache of some GB on disk is written out first, and the set-up ends with the first signal.
#[test]
fn a_signal_while_a_file_is_written_out_ends_it_and_loses_nothing() {
    let home = Home::packed();
    home.write("out.jsonl", "of before\n");
    let words = "run --model synth:opt-125m --prompt-len 1000 --gen-len 1000 --num-prompts 48 --report report.json \
         --output out.jsonl --overwrite --percent 0 100 0 0 0 100 --gpu-batch-size 48 --num-gpu-batches 1";
    let talk = failed_after(&home, words, ("mapping memory", "INT"));
    assert!(talk.contains("interrupted before the first pass"), "{talk}");
    assert!(!talk.contains("generating"), "{talk}");
    assert_eq!(home.json("report.json")["outcome"], "interrupted");
    assert_eq!(
        std::fs::read_to_string(home.path("out.jsonl")).expect("kept"),
        "of before\n"
    );
}

/// What a run says that gets a signal at this stage and fails.
fn failed_after(home: &Home, words: &str, (stage, signal): (&str, &str)) -> String {
    let mut child = home
        .command(words)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut reader = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut talk = String::new();
    while !talk.contains(stage) {
        assert_ne!(reader.read_line(&mut talk).expect("UTF-8"), 0, "{talk}");
    }
    send(signal, child.id());
    std::io::Read::read_to_string(&mut reader, &mut talk).expect("UTF-8");
    assert_eq!(child.wait().expect("ended").code(), Some(1), "{talk}");
    talk
}

fn send(signal: &str, pid: u32) {
    let kill = format!("kill -{signal} {pid}");
    let status = std::process::Command::new("sh")
        .args(["-c", &kill])
        .status();
    assert!(status.expect("a shell").success());
}
