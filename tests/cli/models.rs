//! Models that cannot be used: each says what is wrong and what to do, and nothing is packed.

use crate::harness::{Home, golden};
use std::path::Path;

const RUN: &str = "run --model ./model --num-prompts 1 --prompt-len 3 --gen-len 1";

fn refused(home: &Home, parts: &[&str]) {
    let ended = home.run(RUN);
    ended.fails(1, parts);
    assert_eq!(ended.stdout, "");
    assert!(!home.path("store").exists(), "nothing was packed");
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).expect("a text");
    assert!(text.contains(from), "{from}");
    std::fs::write(path, text.replace(from, to)).expect("written");
}

fn cut(path: &Path, bytes: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path);
    file.and_then(|f| f.set_len(bytes)).expect("cut");
}

#[test]
fn a_missing_model_says_where_it_was_looked_for() {
    let home = Home::new();
    let parts = [
        "./model: no such directory",
        "Hugging Face layout",
        "synth:",
    ];
    refused(&home, &parts);
    let hub = home.run("run --model facebook/opt-125m --num-prompts 1");
    let cache = home.path("hf/hub");
    let parts = [
        "hf download facebook/opt-125m",
        "synth:opt-125m",
        &cache.to_string_lossy(),
    ];
    hub.fails(1, &parts);
    let size = home.run("run --model opt-1.3b --num-prompts 1");
    size.fails(1, &["hf download facebook/opt-1.3b", "synth:opt-1.3b"]);
    let unknown = home.run("plan --model synth:opt-3b");
    unknown.fails(1, &["opt-3b", "opt-2.7b"]);
}

#[test]
fn an_id_is_found_in_the_hub_cache() {
    let home = Home::new();
    let from = home.copy_golden("opt-like");
    let repo = home.path("hf/hub/models--facebook--opt-125m");
    let snapshot = repo.join("snapshots/27dcfa74");
    std::fs::create_dir_all(repo.join("refs")).expect("made");
    std::fs::create_dir_all(&snapshot).expect("made");
    std::fs::write(repo.join("refs/main"), "27dcfa74").expect("written");
    for file in ["config.json", "model.safetensors"] {
        std::fs::rename(from.join(file), snapshot.join(file)).expect("moved");
    }
    let run = "run --num-prompts 2 --prompt-len 3 --gen-len 1 --model";
    let by_id = home.run(&format!("{run} facebook/opt-125m")).good().lines();
    assert_eq!(by_id.len(), 2);
    let by_path = home.run(&format!("{run} {}", snapshot.display())).good();
    assert_eq!(by_path.lines(), by_id);
    let file = snapshot.join("config.json");
    let ended = home.run(&format!("{run} {}", file.display()));
    ended.fails(1, &["config.json is a file", "the directory that it is in"]);
}

#[test]
fn a_missing_shard_is_named() {
    for (name, shard) in [
        ("untied", "model-00002-of-00002.safetensors"),
        ("gelu", "pytorch_model-00001-of-00002.bin"),
    ] {
        let home = Home::new();
        let model = home.copy_golden(name);
        std::fs::remove_file(model.join(shard)).expect("removed");
        refused(&home, &[shard, "missing", "download"]);
    }
}

#[test]
fn sizes_are_enough_to_plan_with() {
    let home = Home::new();
    let model = home.copy_golden("opt-like");
    let words = "plan --model ./model --num-prompts 2 --prompt-len 3 --gen-len 2";
    let whole = home.run(words).good().stdout;
    std::fs::remove_file(model.join("model.safetensors")).expect("removed");
    let planned = home.run(words).good().stdout;
    let percent = |text: &str| {
        text.find("--percent")
            .map(|at| text[at..at + 30].to_owned())
    };
    assert!(percent(&whole).is_some());
    assert_eq!(percent(&planned), percent(&whole));
    refused(&home, &["no weights", "hf download"]);
}

#[test]
fn a_truncated_download_is_seen() {
    for (name, file) in [
        ("opt-like", "model.safetensors"),
        ("head-20", "pytorch_model.bin"),
    ] {
        let home = Home::new();
        let model = home.copy_golden(name);
        for bytes in [100_000, 5, 0] {
            cut(&model.join(file), bytes);
            refused(&home, &[file, "damaged", "download it again"]);
        }
    }
}

#[test]
fn a_damaged_pickle_is_refused() {
    let home = Home::new();
    let file = home.copy_golden("head-20").join("pytorch_model.bin");
    let whole = std::fs::read(&file).expect("committed");
    for at in [70, 90, 120, whole.len() - 20] {
        let mut bytes = whole.clone();
        bytes[at..at + 16].fill(b'X');
        std::fs::write(&file, bytes).expect("written");
        let ended = home.run(RUN);
        let text = ended.fails(1, &["./model"]);
        let way_out = ["download it again", "convert", "another model"];
        assert!(way_out.iter().any(|way| text.contains(way)), "{text}");
    }
}

#[test]
fn other_architectures_and_switches_are_refused() {
    let home = Home::new();
    let config = home.copy_golden("opt-like").join("config.json");
    let plain = std::fs::read(golden("opt-like").join("config.json")).expect("committed");
    let spoil = |from, to| {
        std::fs::write(&config, &plain).expect("written");
        replace(&config, from, to);
    };
    for (from, to, part) in [
        ("OPTForCausalLM", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("\"relu\"", "\"swish\"", "swish"),
        ("\"float16\"", "\"float8\"", "float8"),
        ("\"ffn_dim\": 256,", "", "3072"),
        ("\"hidden_size\": 64", "\"hidden_size\": 65", "65"),
        (
            "\"vocab_size\": 320",
            "\"vocab_size\": 999999",
            "embed_tokens",
        ),
        ("{", "", "config.json"),
    ] {
        spoil(from, to);
        refused(&home, &[part]);
    }
    std::fs::remove_file(&config).expect("removed");
    refused(&home, &["config.json"]);
}

#[test]
fn every_file_format_of_the_goldens_is_read() {
    let home = Home::new();
    home.write("in.jsonl", "{\"prompt\": [5, 6, 7], \"max_tokens\": 2}\n");
    for name in [
        "untied",
        "gelu",
        "shared-and-strided",
        "post-norm-projections",
    ] {
        let model = golden(name);
        let words = format!("run --input in.jsonl --model {}", model.display());
        assert_eq!(home.run(&words).good().lines().len(), 1, "{name}");
    }
}
