//! Input as people write it, right and wrong; the tokenizer is the byte-level one.

use super::super::failure::FailureKind;
use super::*;
use crate::model::ModelSpec;
use crate::model::families::named_size;
use crate::tokenizer::Tokenizer;
use std::collections::HashSet;

fn model() -> ModelSpec {
    named_size("opt-125m").expect("a known size")
}

fn with_rules<T>(work: impl FnOnce(&Rules) -> T) -> T {
    let model = model();
    let tokenizer = Tokenizer::byte_level(model.vocab);
    work(&Rules {
        model: &model,
        tokenizer: Some(&tokenizer),
        gen_tokens: 32,
        seed: 7,
    })
}

fn from_file(name: &str, content: &[u8]) -> Result<Vec<Line>, PromptError> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join(name);
    std::fs::write(&path, content).expect("written");
    with_rules(|rules| read_lines(Source::Input(&path), rules))
}

fn json_line(json: &str) -> Result<Request, LineError> {
    with_rules(|rules| rules.json_line(3, json).result)
}

fn code_of(json: &str) -> (&'static str, String) {
    let error = json_line(json).expect_err(json);
    assert!(error.message.starts_with("line 4: "), "{}", error.message);
    (error.code, error.message)
}

#[test]
fn text_lines_are_prompts_and_empty_ones_fail_alone() {
    let lines = from_file("p.txt", "\u{feff}ab\r\n\nc \n".as_bytes()).expect("readable");
    assert_eq!(lines.len(), 3);
    let first = lines[0].result.as_ref().expect("good");
    assert_eq!(
        first.prompt,
        with_rules(|r| r.tokenizer.expect("there").encode("ab").expect("text"))
    );
    assert_eq!(
        (first.line, first.max_tokens, first.sampling.seed),
        (0, 32, 7)
    );
    assert_eq!(first.sampling.temperature, 0.0);
    let error = lines[1].result.as_ref().expect_err("empty");
    assert_eq!(error.code, "empty_prompt");
    assert!(error.message.contains("line 2"), "{}", error.message);
    assert_eq!(lines[2].result.as_ref().expect("good").prompt.len(), 3);
    let (requests, failed) = split(&lines);
    assert_eq!(requests.iter().map(|r| r.line).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(failed[0].0, 1);
}

#[test]
fn json_lines_carry_their_own_settings() {
    let request = json_line(
        r#"{"prompt": [5, 6], "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 1}"#,
    );
    let request = request.expect("good");
    assert_eq!(
        (request.line, request.prompt, request.max_tokens),
        (3, vec![5, 6], 9)
    );
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.seed), (0.5, 0.9, 40, 1));
    // Text gets the start token in front, ids get nothing; null is as good as not there.
    let text = json_line(r#"{"prompt": "a", "max_tokens": null}"#).expect("good");
    assert_eq!(
        (text.prompt.len(), text.prompt[0], text.max_tokens),
        (2, 2, 32)
    );
    assert_eq!(
        json_line(r#"{"prompt": [2], "max_tokens": 0}"#)
            .expect("good")
            .max_tokens,
        0
    );
}

#[test]
fn a_bad_line_says_what_is_wrong_with_it() {
    for (json, code, part) in [
        (
            r#"{"prompt": "a", "max_token": 3}"#,
            "bad_line",
            "max_token",
        ),
        (r#"{"prompt": "a", "prompt": "b"}"#, "bad_line", "prompt"),
        (r#"{"prompt": "a""#, "bad_line", "column"),
        (r#"["a"]"#, "bad_line", "object"),
        (r#"[[5], 1, 0, 1, 0, 0]"#, "bad_line", "object"),
        (r#"{"max_tokens": 3}"#, "bad_line", "prompt"),
        (r#"{"prompt": 7}"#, "bad_value", "\"prompt\" is 7"),
        (r#"{"prompt": []}"#, "empty_prompt", "no tokens"),
        ("  ", "empty_prompt", "empty"),
        (r#"{"prompt": [50272]}"#, "unknown_token", "0 to 50271"),
        (r#"{"prompt": [-1]}"#, "unknown_token", "-1"),
        (r#"{"prompt": [1.5]}"#, "unknown_token", "1.5"),
        (r#"{"prompt": [4294967298]}"#, "unknown_token", "4294967298"),
        (
            r#"{"prompt": "a", "max_tokens": -1}"#,
            "bad_value",
            "max_tokens",
        ),
        (
            r#"{"prompt": "a", "temperature": -0.1}"#,
            "bad_value",
            "temperature",
        ),
        (
            r#"{"prompt": "a", "temperature": "hot"}"#,
            "bad_value",
            "temperature",
        ),
        (
            r#"{"prompt": "a", "temperature": 1e300}"#,
            "bad_value",
            "temperature",
        ),
        (r#"{"prompt": "a", "top_p": 0}"#, "bad_value", "top_p"),
        (r#"{"prompt": "a", "top_p": 1.1}"#, "bad_value", "top_p"),
        (r#"{"prompt": "a", "top_k": 1.5}"#, "bad_value", "top_k"),
        (r#"{"prompt": "a", "seed": -1}"#, "bad_value", "seed"),
    ] {
        let (found, message) = code_of(json);
        assert_eq!(found, code, "{json}: {message}");
        assert!(message.contains(part), "{json}: {message}");
    }
}

#[test]
fn positions_bound_prompts_and_what_follows_them() {
    let ids = |n: usize| format!("{{\"prompt\": {:?}, \"max_tokens\": 100}}", vec![9; n]);
    assert_eq!(json_line(&ids(2000)).expect("fits").max_tokens, 49);
    assert_eq!(json_line(&ids(2048)).expect("just fits").max_tokens, 1);
    let (code, message) = code_of(&ids(2049));
    assert_eq!(code, "prompt_too_long");
    assert!(
        message.contains("2049") && message.contains("2048"),
        "{message}"
    );
}

#[test]
fn files_that_are_no_work_say_so() {
    let message =
        |name: &str, content: &[u8]| from_file(name, content).expect_err(name).to_string();
    assert!(message("p.txt", b"").contains("empty"));
    let not_utf8 = message("p.jsonl", b"{\"prompt\":\"a\"}\n\xff\n");
    assert!(
        not_utf8.contains("line 2") && not_utf8.contains("UTF-8"),
        "{not_utf8}"
    );
    assert!(message("p.json", b"{}").contains(".jsonl"));
    let long = vec![b'a'; MOST_LINE_BYTES as usize + 2];
    assert!(message("p.txt", &long).contains("2 MiB"));
    let missing = with_rules(|r| read_lines(Source::Input(Path::new("/no/such.txt")), r));
    let missing = Failure::from(missing.expect_err("missing"));
    assert!(missing.message.contains("/no/such.txt"), "{missing}");
    assert_eq!(missing.kind, FailureKind::Failed);
    assert_eq!(
        Failure::from(PromptError::DashTwice).kind,
        FailureKind::Usage
    );
}

#[test]
fn without_a_name_the_first_line_tells_the_format() {
    let read = |text: &str| {
        let name = (Path::new("standard input"), Format::Guess);
        with_rules(|rules| read_from(text.as_bytes(), name, rules)).expect("readable")
    };
    let json = read("{\"prompt\": [5]}\n{\"prompt\": [6]}");
    assert_eq!(json[1].result.as_ref().expect("good").prompt, [6]);
    assert_eq!(read("a {\n").len(), 1);
    assert!(
        read("a\n{\"prompt\": [5]}\n")[1]
            .result
            .as_ref()
            .expect("text")
            .prompt
            .len()
            > 5
    );
}

#[test]
fn prompts_on_the_command_line_may_come_from_stdin_once() {
    let texts = |t: &[&str]| t.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let lines = with_rules(|r| read_lines(Source::Texts(&texts(&["a", "", "b"])), r));
    let good: Vec<bool> = lines
        .expect("read")
        .iter()
        .map(|l| l.result.is_ok())
        .collect();
    assert_eq!(good, [true, false, true]);
    let twice = with_rules(|r| read_lines(Source::Texts(&texts(&["-", "-"])), r));
    assert!(matches!(twice, Err(PromptError::DashTwice)));
    let whole = read_whole("\u{feff}two\nlines\r\n".as_bytes(), Path::new("stdin")).expect("text");
    assert_eq!(whole, "two\nlines");
}

#[test]
fn text_without_a_tokenizer_names_the_remedy() {
    let model = model();
    let rules = Rules {
        model: &model,
        tokenizer: None,
        gen_tokens: 4,
        seed: 0,
    };
    let texts = ["a".to_owned()];
    let error = read_lines(Source::Texts(&texts), &rules).expect_err("no tokenizer");
    assert!(error.to_string().contains("vocab.json"), "{error}");
    let error = rules
        .json_line(0, r#"{"prompt": "a"}"#)
        .result
        .expect_err("no tokenizer");
    assert_eq!(error.code, "no_tokenizer");
    assert!(error.message.contains("vocab.json"), "{}", error.message);
    assert!(rules.json_line(0, r#"{"prompt": [5]}"#).result.is_ok());
    let random = Source::Random {
        prompts: 2,
        prompt_tokens: 3,
    };
    assert_eq!(read_lines(random, &rules).expect("ids").len(), 2);
}

fn random(seed: u64, prompts: usize, prompt_tokens: u32) -> Vec<Vec<u32>> {
    let model = model();
    let rules = Rules {
        model: &model,
        tokenizer: None,
        gen_tokens: 4,
        seed,
    };
    let lines = read_lines(
        Source::Random {
            prompts,
            prompt_tokens,
        },
        &rules,
    )
    .expect("made");
    split(&lines).0.into_iter().map(|r| r.prompt).collect()
}

#[test]
fn random_prompts_depend_on_seed_line_and_position_only() {
    let (few, many) = (random(1, 2, 50), random(1, 9, 80));
    assert_eq!(few[1], many[1][..50]);
    let all: HashSet<&Vec<u32>> = many.iter().collect();
    assert_eq!(all.len(), 9);
    assert_ne!(random(2, 2, 50), few);
    assert!(many.iter().flatten().all(|id| (4..50272).contains(id)));
    let mean = many.iter().flatten().map(|id| f64::from(*id)).sum::<f64>() / 720.0;
    // 720 uniform draws: five standard errors are 2700.
    assert!((mean - 25138.0).abs() < 2700.0, "{mean}");
    let model = model();
    let rules = Rules {
        model: &model,
        tokenizer: None,
        gen_tokens: 4,
        seed: 0,
    };
    let long = read_lines(
        Source::Random {
            prompts: 1,
            prompt_tokens: 2049,
        },
        &rules,
    );
    assert!(matches!(
        long,
        Err(PromptError::TooLong { asked: 2049, .. })
    ));
    let many = Source::Random {
        prompts: 1 << 40,
        prompt_tokens: 512,
    };
    let error = read_lines(many, &rules).expect_err("two pebibytes");
    assert!(error.to_string().contains("--num-prompts"), "{error}");
}

#[test]
fn special_ids_are_stepped_over_wherever_they_are() {
    let ids = TextIds::new(9, &[7, 4, 1]);
    let step = u64::MAX / 3;
    let drawn: HashSet<u32> = [0, step + 1, u64::MAX].map(|bits| ids.draw(bits)).into();
    assert_eq!(drawn, HashSet::from([5, 6, 8]));
    assert_eq!(TextIds::new(5, &[4, 2, 1]).count, 0);
    assert_eq!(TextIds::new(3, &[2, 2, 2]).count, 0);
}

#[test]
fn the_workload_is_that_of_good_lines() {
    let jsonl = b"{\"prompt\": [5, 6], \"max_tokens\": 3}\nx\n{\"prompt\": [5]}\n";
    let work = workload(&from_file("p.jsonl", jsonl).expect("readable"));
    let lengths = [(2, 3), (1, 32)];
    let expected = lengths.map(|(prompt_tokens, gen_tokens)| LineLength {
        prompt_tokens,
        gen_tokens,
    });
    assert_eq!(work.lines, expected);
}
