//! Every wait for an event is needed: with one kind of them left out, tokens come out wrong or the run fails.
//!
//! A kind is who waits for whom: the operation (its kernel, or the direction of its copy) on either side, and the
//! streams. One kind may serve several ends (a ring's room, a visitor's arrival), so each policy here moves one
//! thing alone, and within it a kind is one end. Single waits are left out, too: most are noticed by themselves, of
//! others the next one of their kind makes up for it.

use crate::stand_in::{Gpu, HOST, golden};
use std::collections::{BTreeMap, BTreeSet};

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
        let told = [told, &[("EMULATOR_THREADS", "1")]].concat();
        let ended = self.gpu.with(&told).output(&self.words);
        let text = self.gpu.home.read("out.jsonl");
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        ended.status.success().then(|| lines.join("\n"))
    }

    /// Right with every wait in place, however slow one stream is: the kinds of waits that were met, and how many of
    /// each.
    fn kinds(&self) -> BTreeMap<String, u64> {
        let log = self.gpu.home.path("log.txt");
        let path = log.display().to_string();
        let mut kinds = BTreeMap::new();
        for (stream, slow_us) in STREAMS {
            let told = [
                ("FAKE_CUDA_LOG", path.as_str()),
                ("FAKE_CUDA_DELAY_STREAM", stream),
                ("FAKE_CUDA_DELAY_US", slow_us),
            ];
            assert_eq!(self.results(&told), self.right, "{} {told:?}", self.words);
            let text = std::fs::read_to_string(&log).expect("the stand-in driver's log");
            let waits = text.lines().filter_map(|line| line.strip_prefix("wait "));
            kinds.extend(waits.filter_map(|line| {
                let (kind, count) = line.rsplit_once(' ')?;
                Some((kind.to_owned(), count.parse().ok()?))
            }));
        }
        kinds
    }

    /// Whether a run without the waits of this kind, or one of them, goes wrong. The driver holds back what they waited for (its
    /// stream is slow, so that it has not begun), so that who does not wait is first.
    fn notices(&self, kind: &str, seeds: &[&str], one: Option<u64>) -> bool {
        let (who, awaited) = kind.split_once(" > ").expect("who > whom");
        let stream = awaited.split(' ').next().unwrap_or(awaited);
        // Nobody is held back for a host thread: it has to be overtaken by delay alone.
        let slow = STREAMS.into_iter().find(|(name, _)| *name == stream);
        let slow_us = match who {
            "its thread" => "20000",
            _ => slow.expect("a lane's").1,
        };
        let one = one.unwrap_or(u64::MAX).to_string();
        seeds.iter().any(|&seed| {
            let told = [
                ("FAKE_CUDA_DROP_ONE", one.as_str()),
                ("FAKE_CUDA_DROP_WAITS", kind),
                ("FAKE_CUDA_DELAY_STREAM", stream),
                ("FAKE_CUDA_DELAY_US", slow_us),
                ("FAKE_CUDA_SEED", seed),
            ];
            self.results(&told) != self.right
        })
    }
}

/// How many of the single waits left out are noticed, and how many those are: the first and the last of this kind,
/// and the one in the middle where either is not.
fn singly(machine: &Machine, (kind, count): (&str, u64)) -> (usize, usize) {
    let notices = |place: &u64| machine.notices(kind, &SEEDS[..1], Some(*place));
    let ends = BTreeSet::from([0, count - 1]);
    let noticed = ends.iter().filter(|place| notices(place)).count();
    let middle = count / 2;
    if noticed == ends.len() || ends.contains(&middle) {
        return (noticed, ends.len());
    }
    (noticed + usize::from(notices(&middle)), ends.len() + 1)
}

/// All that are met under this policy; those of host threads only where `host` says so. Of every kind some are left
/// out one by one; where none of these is noticed, all of the kind together.
fn every_wait_is_needed(policy: &str, host: bool) {
    let Some(gpu) = Gpu::new() else { return };
    let machine = Machine::new(gpu, policy);
    let mut kinds = machine.kinds();
    kinds.retain(|kind, _| host || !kind.contains("thread"));
    assert!(!kinds.is_empty(), "nothing waits: {policy}");
    let (mut noticed, mut single) = (0, 0);
    let mut unnoticed = Vec::new();
    for (kind, count) in &kinds {
        let (of_kind, all) = singly(&machine, (kind, *count));
        if of_kind == 0 && !machine.notices(kind, &SEEDS, None) {
            unnoticed.push(kind);
        }
        noticed += of_kind;
        single += all;
    }
    println!("{policy}: {noticed} of {single}, {} kinds", kinds.len());
    assert!(unnoticed.is_empty(), "{policy}: {unnoticed:#?}");
    // What the others would have waited for is waited for again, changes no token, or belongs to the last of them.
    assert!(3 * noticed >= single, "{policy}: {noticed} of {single}");
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

/// Three batches: their order is another one then than with the hidden state at home.
#[test]
fn cache_attended_on_the_cpu_with_hidden_state_in_dram() {
    let words =
        "--percent 100 0 0 100 0 100 --cpu-cache-compute 1 --gpu-batch-size 1 --num-gpu-batches 3";
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
