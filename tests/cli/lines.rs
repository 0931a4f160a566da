//! What input lines may be: ids or text, each with its own settings; and a bad one fails alone.

use crate::harness::{Ended, Home, RAGGED, in_order};
use serde_json::json;
use std::io::Write;
use std::process::Stdio;

#[test]
fn every_line_has_its_own_length() {
    let home = Home::new();
    let lines = home.generate(RAGGED, "--model GOLDEN --gen-len 7 --ignore-eos");
    let lengths: Vec<usize> = lines
        .iter()
        .map(|l| l["token_ids"].as_array().expect("ids").len())
        .collect();
    assert_eq!(lengths, [12, 12, 3, 1, 7]);
    let prompts: Vec<_> = lines.iter().map(|l| l["prompt_tokens"].clone()).collect();
    assert_eq!(prompts, [1, 4, 3, 11, 3]);
}

#[test]
fn the_end_token_ends_a_line_unless_ignored() {
    let home = Home::new();
    let input = "{\"prompt\": [51], \"max_tokens\": 12}\n";
    let stopped = home.generate(input, "--model GOLDEN");
    assert_eq!(stopped[0]["token_ids"], json!([186, 290]));
    assert_eq!(stopped[0]["finish_reason"], "stop");
    let on = home.generate(input, "--model GOLDEN --ignore-eos");
    let ids = json!([186, 290, 290, 2, 69, 314, 290, 265, 61, 265, 241, 11]);
    assert_eq!(on[0]["token_ids"], ids);
    assert_eq!(on[0]["finish_reason"], "length");
}

#[test]
fn the_last_position_ends_a_line() {
    let home = Home::new();
    let ids: Vec<u32> = (0..62).map(|i| 4 + i).collect();
    let input = format!("{{\"prompt\": {ids:?}, \"max_tokens\": 40}}\n");
    let lines = home.generate(&input, "--model GOLDEN --ignore-eos");
    // 64 positions: the token drawn at the last of them is still returned.
    assert_eq!(lines[0]["token_ids"].as_array().map(Vec::len), Some(3));
    assert_eq!(lines[0]["finish_reason"], "length");
}

const BAD: &str = r#"{"prompt": [51], "max_tokens": 2}
{"prompt": [4
{"prompt": []}
{"prompt": [4000]}
{"prompt": "text"}
{"prompt": [5], "temperature": -1}
{"prompt": [5], "max_token": 3}

{"prompt": [2, 210, 118, 32], "max_tokens": 3}
"#;

#[test]
fn a_bad_line_fails_alone() {
    let home = Home::new();
    home.write("in.jsonl", BAD);
    let ended = home.run("run --model GOLDEN --input in.jsonl --report report.json");
    ended.fails(1, &["7 input lines failed", "the first: line 2"]);
    let lines = ended.lines();
    assert_eq!(lines.len(), 9);
    for good in [0, 8] {
        assert_ne!(lines[good]["finish_reason"], "error");
    }
    let says = [
        (1, "bad_line", "column"),
        (2, "empty_prompt", "at least one"),
        (3, "unknown_token", "from 0 to 319"),
        (4, "no_tokenizer", "token ids"),
        (5, "bad_value", "temperature"),
        (6, "bad_line", "max_tokens"),
        (7, "empty_prompt", "take the line out"),
    ];
    for (line, code, part) in says {
        assert_eq!(lines[line]["finish_reason"], "error");
        let error = &lines[line]["error"];
        assert_eq!(error["code"], code, "{error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.starts_with(&format!("line {}: ", line + 1)));
        assert!(message.contains(part), "{message}");
    }
    let report = home.json("report.json");
    assert_eq!(report["outcome"], "failed");
    assert_eq!(report["lines"], json!({"total": 9, "ok": 2, "failed": 7}));
}

#[test]
fn a_prompt_beyond_the_positions_fails_alone() {
    let home = Home::new();
    let long = vec![5; 65];
    home.write("in.jsonl", &format!("{{\"prompt\": {long:?}}}\n{RAGGED}"));
    let ended = home.run("run --model GOLDEN --input in.jsonl");
    ended.fails(1, &["65 tokens", "64 positions", "shorten"]);
    assert_eq!(ended.lines()[0]["error"]["code"], "prompt_too_long");
    assert_eq!(ended.lines().len(), 6);
    let only = home.run("run --model GOLDEN --num-prompts 1 --prompt-len 65 --gen-len 1");
    only.fails(2, &["--prompt-len 65", "at most 64"]);
}

#[test]
fn a_line_beyond_the_plan_fails_alone() {
    let home = Home::new();
    home.write("short.jsonl", "{\"prompt\": [51], \"max_tokens\": 2}\n");
    home.run("plan --model GOLDEN --input short.jsonl -o plan.toml")
        .good();
    home.write(
        "in.jsonl",
        "{\"prompt\": [4, 5, 6, 7, 8, 9], \"max_tokens\": 20}\n{\"prompt\": [51], \"max_tokens\": 2}\n",
    );
    let ended = home.run("exec plan.toml --input in.jsonl");
    ended.fails(1, &["1 input line failed"]);
    let lines = ended.lines();
    assert_eq!(lines[0]["error"]["code"], "does_not_fit");
    let message = lines[0]["error"]["message"].as_str().expect("a message");
    assert!(message.contains("plan with this input"), "{message}");
    assert_eq!(lines[1]["token_ids"], json!([186, 290]));
}

#[test]
fn prompts_are_text_where_there_is_a_tokenizer() {
    let home = Home::packed();
    home.write("in.txt", "Paris is\nRome is\n");
    let model = "run --model synth:opt-125m --gen-len 2";
    let from_file = home.run(&format!("{model} --input in.txt")).good().lines();
    let mut words = home.command(&format!("{model} --prompt"));
    let ended = words.args(["Paris is", "Rome is"]).output();
    let from_flags = Ended::new("--prompt", ended.expect("started")).good();
    assert_eq!(from_file, from_flags.lines());
    let piped = fed(&home, &format!("{model} --input -"), "Paris is\nRome is\n");
    assert_eq!(piped.good().lines(), from_file);
    // --prompt - is one prompt, its inner line ends included, among others.
    let piped = fed(&home, &format!("{model} --prompt Paris -"), "Rome\nis\n").good();
    let lengths: Vec<_> = piped
        .lines()
        .iter()
        .map(|l| l["prompt_tokens"].clone())
        .collect();
    assert_eq!(lengths, [6, 8]);
    let nothing = fed(&home, &format!("{model} --prompt -"), "");
    nothing.fails(1, &["the prompt is empty"]);
    fed(&home, &format!("{model} --prompt - -"), "a").fails(2, &["only once"]);
    fed(&home, &format!("{model} --input -"), "").fails(1, &["standard input is empty"]);
    // The begin token and eight bytes.
    assert_eq!(from_file[0]["prompt_tokens"], 9);
}

/// Runs with a text on standard input.
fn fed(home: &Home, words: &str, text: &str) -> Ended {
    let mut command = home.command(words);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("started");
    let mut stdin = child.stdin.take().expect("a pipe");
    // Who refuses the flags does not listen.
    let _ = stdin.write_all(text.as_bytes());
    drop(stdin);
    Ended::new(words, child.wait_with_output().expect("ended"))
}

#[test]
fn a_checkpoint_with_a_tokenizer_takes_text() {
    let home = Home::new();
    let model = home.copy_golden("opt-like");
    let from = crate::harness::golden("../tokenizer-opt");
    home.write("in.txt", "the\n");
    let words = "run --model ./model --input in.txt --gen-len 2 --ignore-eos";
    let without = home.run(words);
    without.fails(1, &["no tokenizer", "vocab.json and merges.txt"]);
    for file in ["vocab.json", "merges.txt"] {
        std::fs::copy(from.join(file), model.join(file)).expect("copied");
    }
    let ended = home.run(words).good();
    let line = &ended.lines()[0];
    assert_eq!(line["finish_reason"], "length");
    assert_eq!(line["token_ids"].as_array().map(Vec::len), Some(2));
}

#[test]
fn no_prompts_are_an_error() {
    let home = Home::packed();
    home.write("empty.jsonl", "");
    home.write("prompts.csv", "a,b\n");
    std::fs::write(home.path("latin.txt"), b"caf\xe9\n").expect("written");
    let model = "run --model synth:opt-125m --gen-len 2";
    for (input, parts) in [
        ("empty.jsonl", ["is empty", "one prompt a line"]),
        ("none.jsonl", ["none.jsonl: no such file", "--input"]),
        ("latin.txt", ["line 1 is not UTF-8", "iconv"]),
    ] {
        let ended = home.run(&format!("{model} --input {input}"));
        ended.fails(1, &parts);
        assert_eq!(ended.stdout, "");
    }
    let csv = home.run(&format!("{model} --input prompts.csv"));
    csv.fails(2, &[".jsonl", "rename"]);
    let ended = home.command(&format!("{model} --prompt")).arg("").output();
    Ended::new("--prompt ''", ended.expect("started")).fails(1, &["prompt is empty"]);
    home.run(&format!("{model} --input"))
        .fails(2, &["--input <FILE>", "value"]);
}

#[test]
fn lines_that_are_all_bad_have_error_lines_all_the_same() {
    let home = Home::new();
    home.write(
        "bad.jsonl",
        "{\"prompt\": []}\n{\"prompt\": [4\n{\"prompt\": [4000]}\n",
    );
    home.write("one.txt", "\n");
    let run = "run --model GOLDEN --input bad.jsonl";
    let codes = |lines: &[serde_json::Value]| -> Vec<String> {
        let code = |l: &serde_json::Value| l["error"]["code"].as_str().expect("a code").to_owned();
        lines.iter().map(code).collect()
    };
    let expected = ["empty_prompt", "bad_line", "unknown_token"];
    let ended = home.run(run);
    ended.fails(1, &["none of the 3 input lines", "line 1", "at least one"]);
    assert_eq!(codes(&ended.lines()), expected);
    home.run(&format!("{run} --output out.jsonl"))
        .fails(1, &["none of the 3"]);
    assert_eq!(codes(&in_order(&home.read("out.jsonl"))), expected);
    home.run(&format!("{run} --output out.jsonl"))
        .fails(1, &["exists", "--overwrite"]);
    let planned = home.run("plan --model GOLDEN --input bad.jsonl");
    planned.fails(1, &["none of the 3 input lines"]);
    assert_eq!(planned.stdout, "");
    // exec has a plan, and says the same of its lines.
    home.write("good.jsonl", "{\"prompt\": [51], \"max_tokens\": 2}\n");
    home.run("plan --model GOLDEN --input good.jsonl -o plan.toml")
        .good();
    let ended = home.run("exec plan.toml --input bad.jsonl");
    ended.fails(1, &["3 input lines failed", "line 1"]);
    assert_eq!(codes(&ended.lines()), expected);
}

#[test]
fn all_lines_come_out_whatever_the_block() {
    let home = Home::new();
    let line = |n: usize| {
        format!(
            "{{\"prompt\": [{}, 7], \"max_tokens\": {}}}\n",
            4 + n,
            n % 5
        )
    };
    let input: String = (0..40).map(line).collect();
    home.write("in.jsonl", &input);
    let whole = home.generate(&input, "--model GOLDEN");
    assert_eq!(whole.len(), 40);
    // Blocks that never fill, batches without a sequence, a last block of a few.
    for shape in [(3, 2), (1, 1), (100, 3), (1, 1000)] {
        let flags = format!("--gpu-batch-size {} --num-gpu-batches {}", shape.0, shape.1);
        let lines = home.generate(&input, &format!("--model GOLDEN {flags}"));
        assert_eq!(lines, whole, "{flags}");
    }
}
