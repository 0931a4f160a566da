//! Every wait for an event is needed: with one kind of them left out, tokens come out wrong or the run fails.
//!
//! A kind is who waits for whom: the operation (its kernel, or the direction of its copy) on either side, and the
//! streams. One kind may serve several ends (a ring's room, a visitor's arrival), so each policy here moves one
//! thing alone, and within it a kind is one end. All waits of a kind are left out together: leaving out a single
//! one proves less, since the next of its kind often makes up for it.

use crate::stand_in::{Gpu, HOST, golden};
use std::collections::BTreeSet;

/// More lines than slots, for a model of three layers: the ring of streamed weights holds two. All prompts meet the
/// same kernels.
const LINES: &str = r#"{"prompt": [51, 2, 210, 77, 11], "max_tokens": 3}
{"prompt": [5, 6, 7, 300, 20, 31, 40], "max_tokens": 2}
{"prompt": [9, 8, 7, 6, 5, 4], "max_tokens": 3}
{"prompt": [118, 32, 5, 99, 18, 240, 3], "max_tokens": 3}
"#;

/// The lanes' streams (0 is the driver's own), and the longest delay in microseconds before a copy, or a kernel, of
/// which there are many more, on a slow one.
const STREAMS: [(&str, &str); 3] = [("1", "2500"), ("2", "2500"), ("3", "800")];
const SEEDS: [&str; 2] = ["1", "2"];

struct Machine {
    gpu: Gpu,
    words: String,
    right: Option<String>,
}

impl Machine {
    fn new(gpu: Gpu, policy: &str) -> Machine {
        gpu.home.write("in.jsonl", LINES);
        let words = |device: &str, policy: &str| {
            format!(
                "run --input in.jsonl --output out.jsonl --overwrite --model {} --ignore-eos --device {device} {policy}",
                golden("shared-and-strided").display()
            )
        };
        let mut machine = Machine {
            gpu,
            words: words(HOST, policy),
            right: None,
        };
        machine.right = machine.results(&[]);
        assert!(machine.right.is_some(), "{}", machine.words);
        machine.words = words("cuda:0", policy);
        machine
    }

    /// What a run writes, its lines in order; None where it fails.
    fn results(&self, told: &[(&str, &str)]) -> Option<String> {
        let ended = self.gpu.with(told).output(&self.words);
        let text = self.gpu.home.read("out.jsonl");
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        ended.status.success().then(|| lines.join("\n"))
    }

    /// Right with every wait in place, however slow one stream is: the kinds of waits that were met.
    fn kinds(&self) -> BTreeSet<String> {
        let log = self.gpu.home.path("log.txt");
        let path = log.display().to_string();
        let mut kinds = BTreeSet::new();
        for (stream, slow_us) in STREAMS {
            let told = [
                ("FAKE_CUDA_LOG", path.as_str()),
                ("FAKE_CUDA_DELAY_STREAM", stream),
                ("FAKE_CUDA_DELAY_US", slow_us),
            ];
            assert_eq!(self.results(&told), self.right, "{} {told:?}", self.words);
            let text = std::fs::read_to_string(&log).expect("the stand-in driver's log");
            let waits = text.lines().filter_map(|line| line.strip_prefix("wait "));
            kinds.extend(waits.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())));
        }
        kinds
    }

    /// Whether a run without the waits of this kind goes wrong. The driver holds back what they waited for (its
    /// stream is slow, so that it has not begun), so that who does not wait is first.
    fn notices(&self, kind: &str) -> bool {
        let (who, awaited) = kind.split_once(" > ").expect("who > whom");
        let stream = awaited.split(' ').next().unwrap_or(awaited);
        // Nobody is held back for a host thread: it has to be overtaken by delay alone.
        let slow = STREAMS.into_iter().find(|(name, _)| *name == stream);
        let slow_us = match who {
            "its thread" => "20000",
            _ => slow.expect("a lane's").1,
        };
        SEEDS.iter().any(|seed| {
            let told = [
                ("FAKE_CUDA_DROP_WAITS", kind),
                ("FAKE_CUDA_DELAY_STREAM", stream),
                ("FAKE_CUDA_DELAY_US", slow_us),
                ("FAKE_CUDA_SEED", seed),
            ];
            self.results(&told) != self.right
        })
    }
}

/// All that are met under this policy; those of host threads only where `host` says so.
fn every_wait_is_needed(policy: &str, host: bool) {
    let Some(gpu) = Gpu::new() else { return };
    let machine = Machine::new(gpu, policy);
    let of_host = |kind: &String| kind.contains("thread");
    let kinds = machine.kinds();
    let mut kinds = kinds
        .iter()
        .filter(|kind| host || !of_host(kind))
        .peekable();
    assert!(kinds.peek().is_some(), "nothing waits: {policy}");
    let unnoticed: Vec<_> = kinds.filter(|kind| !machine.notices(kind)).collect();
    assert!(unnoticed.is_empty(), "{policy}: {unnoticed:#?}");
}

#[test]
fn weights_from_dram() {
    let words = "--percent 0 100 100 0 100 0 --gpu-batch-size 2 --num-gpu-batches 1";
    every_wait_is_needed(words, true);
}

#[test]
fn weights_from_disk() {
    let words = "--percent 0 0 100 0 100 0 --gpu-batch-size 1 --num-gpu-batches 2";
    every_wait_is_needed(words, false);
}

#[test]
fn weights_through_the_relay() {
    let words = "--percent 0 100 100 0 100 0 --pin-weight 0 --gpu-batch-size 2 --num-gpu-batches 1";
    every_wait_is_needed(words, true);
}

#[test]
fn weights_multiplied_on_the_cpu() {
    let words = "--percent 50 50 100 0 100 0 --cpu-compute-share 100 --gpu-batch-size 1 --num-gpu-batches 2";
    every_wait_is_needed(words, false);
}

#[test]
fn cache_in_dram() {
    let words =
        "--percent 100 0 0 100 100 0 --cpu-cache-compute 0 --gpu-batch-size 1 --num-gpu-batches 3";
    every_wait_is_needed(words, false);
}

#[test]
fn cache_on_disk() {
    let words =
        "--percent 100 0 0 0 100 0 --cpu-cache-compute 0 --gpu-batch-size 1 --num-gpu-batches 3";
    every_wait_is_needed(words, false);
}

#[test]
fn cache_attended_on_the_cpu() {
    let words =
        "--percent 100 0 0 100 100 0 --cpu-cache-compute 1 --gpu-batch-size 1 --num-gpu-batches 2";
    every_wait_is_needed(words, false);
}

#[test]
fn hidden_state_in_dram() {
    let words = "--percent 100 0 100 0 0 100 --gpu-batch-size 1 --num-gpu-batches 3";
    every_wait_is_needed(words, false);
}

#[test]
fn hidden_state_on_disk() {
    let words = "--percent 100 0 100 0 0 0 --gpu-batch-size 1 --num-gpu-batches 3";
    every_wait_is_needed(words, false);
}
