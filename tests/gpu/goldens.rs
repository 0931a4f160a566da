//! transformers' own tokens on a GPU, from the golden checkpoints over three tiers: prompts of 1 to 40 tokens, so
//! that products of few rows and of many, and both kernels of prompts' attention, are met.

use crate::stand_in::{Gpu, HOST, golden};
use serde_json::Value;
use std::path::PathBuf;

const SPLIT: &str =
    "--percent 30 30 40 30 50 25 --gpu-batch-size 2 --num-gpu-batches 2 --ignore-eos";

/// Of the continuations, so many tokens.
const TOKENS: usize = 6;

/// One checkpoint with what transformers made of it.
struct Golden {
    path: PathBuf,
    vocab: usize,
    /// Prompt and continuation.
    cases: Vec<(Value, Vec<usize>)>,
    logits: Vec<f32>,
}

fn goldens() -> Vec<Golden> {
    let entries = std::fs::read_dir(golden("")).expect("goldens are committed");
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    assert_eq!(paths.len(), 16);
    paths.into_iter().map(Golden::new).collect()
}

impl Golden {
    fn new(path: PathBuf) -> Golden {
        let read = |name: &str| std::fs::read(path.join(name)).expect(name);
        let told: Value = serde_json::from_slice(&read("golden.json")).expect("golden.json");
        let cases = told["cases"].as_array().expect("cases").iter();
        let logits = read("logits.bin");
        let value = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
        Golden {
            vocab: told["vocab"].as_u64().expect("a number") as usize,
            cases: cases
                .map(|c| (c["prompt"].clone(), ids(&c["ids"])))
                .collect(),
            logits: logits.chunks_exact(4).map(value).collect(),
            path,
        }
    }

    /// Continuations of all cases.
    fn run(&self, gpu: &Gpu, device: &str, words: &str) -> Vec<Vec<usize>> {
        let line = |(prompt, _): &(Value, Vec<usize>)| {
            format!("{{\"prompt\": {prompt}, \"max_tokens\": {TOKENS}}}\n")
        };
        let lines: String = self.cases.iter().map(line).collect();
        let words = format!("--model {} {words}", self.path.display());
        let ended = gpu.run_lines(&lines, device, &words).good();
        let lines = ended.lines();
        lines.iter().map(|line| ids(&line["token_ids"])).collect()
    }

    /// How far below the largest logit the first token is that transformers would not have taken, relative to the
    /// largest; 0 where all are the same.
    fn loss(&self, case: usize, ours: &[usize]) -> f32 {
        let theirs = &self.cases[case].1;
        assert_eq!(ours.len(), TOKENS);
        let Some(step) = (0..ours.len()).find(|&i| ours[i] != theirs[i]) else {
            return 0.0;
        };
        let before: usize = self.cases[..case].iter().map(|(_, ids)| ids.len()).sum();
        let logits = &self.logits[(before + step) * self.vocab..][..self.vocab];
        let largest = logits.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        (logits[theirs[step]] - logits[ours[step]]) / largest
    }
}

fn ids(list: &Value) -> Vec<usize> {
    let id = |value: &Value| value.as_u64().expect("a token") as usize;
    list.as_array().expect("tokens").iter().map(id).collect()
}

#[test]
fn with_fp32_activations_tokens_are_transformers_own() {
    let Some(gpu) = Gpu::new() else { return };
    for golden in goldens() {
        let ours = golden.run(&gpu, "cuda:0", &format!("{SPLIT} --kv f32 --compute fp32"));
        for (case, ours) in ours.iter().enumerate() {
            let what = golden.path.display();
            let theirs = &golden.cases[case].1[..TOKENS];
            assert_eq!(ours, theirs, "{what}: line {case}");
        }
    }
}

/// Products of many rows round activations to fp16 (bf16), the cache and prompts' attention are in fp16.
#[test]
fn with_rounded_activations_tokens_are_as_good_as_transformers() {
    let Some(gpu) = Gpu::new() else { return };
    let mut worst = 0.0f32;
    for golden in goldens() {
        let ours = golden.run(&gpu, "cuda:0", SPLIT);
        for (case, ours) in ours.iter().enumerate() {
            worst = worst.max(golden.loss(case, ours));
        }
        println!("{}: {worst:e}", golden.path.display());
    }
    assert!(worst <= 1e-2, "{worst:e} of the largest logit");
}

/// The shares alone: the rest is the plan's own choice, activations are rounded where it rounds them, and lines end
/// where the model ends them.
#[test]
fn six_percentages_give_the_hosts_tokens_for_every_checkpoint() {
    let Some(gpu) = Gpu::new() else { return };
    for golden in goldens() {
        let on = |device: &str| golden.run(&gpu, device, "--percent 30 30 40 30 50 50");
        let (wanted, what) = (on(HOST), golden.path.display());
        assert_eq!(on("cuda:0"), wanted, "{what}");
        let report = gpu.home.json("report.json");
        assert_eq!(report["host"]["gpu"], "Emulated GPU");
        for lane in ["cpu_to_gpu", "gpu_to_cpu", "disk_to_cpu", "gpu_compute"] {
            let busy = report["measured"]["lanes"][lane]["decode_s"].as_f64();
            assert!(busy > Some(0.0), "{what}: {lane} was never busy");
        }
    }
}
