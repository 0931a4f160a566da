//! The tokenizer against transformers' own, text by text.

use loadmaster::tokenizer::{Tokenizer, byte_level_files};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Golden {
    vocab: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

fn check(name: &str, least_cases: usize) {
    let dir = golden_dir(name);
    let golden = std::fs::read(dir.join("cases.json")).expect("there");
    let golden: Golden = serde_json::from_slice(&golden).expect("valid");
    let tokenizer = Tokenizer::open(&dir, golden.vocab).expect("opens");
    assert!(golden.cases.len() >= least_cases);
    for case in golden.cases {
        assert_eq!(
            tokenizer.encode(&case.text).expect("encodes"),
            case.ids,
            "{:?}",
            case.text
        );
        assert_eq!(
            tokenizer.decode(&case.ids).expect("decodes"),
            case.decoded,
            "{:?}",
            case.text
        );
    }
}

#[test]
fn vocab_and_merges_as_the_slow_gpt2_tokenizer() {
    check("tokenizer-opt", 300);
}

#[test]
fn tokenizer_json_as_galactica_has_it() {
    check("tokenizer-galactica", 100);
}

#[test]
fn ids_beyond_the_model_are_errors() {
    let tokenizer = Tokenizer::open(&golden_dir("tokenizer-opt"), 200).expect("opens");
    let error = tokenizer.encode("The loadmaster 😀").expect_err("beyond");
    assert!(error.to_string().contains("another model"), "{error}");
    assert!(tokenizer.decode(&[200]).is_err());
    let long = tokenizer
        .encode(&"a".repeat(1 << 20))
        .expect_err("too long");
    assert!(long.to_string().contains("1048576 bytes"), "{long}");
}

#[test]
fn synthetic_models_speak_bytes_with_and_without_files() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (vocab, merges) = byte_level_files(1000);
    std::fs::write(dir.path().join("vocab.json"), vocab).expect("written");
    std::fs::write(dir.path().join("merges.txt"), merges).expect("written");
    let (files, bytes) = (
        Tokenizer::open(dir.path(), 1000).expect("opens"),
        Tokenizer::byte_level(1000),
    );
    let texts = [
        "",
        "a",
        " two  words\r\n",
        "</s>x<pad><s>",
        "naïve 敏捷 😀\0",
        "it's\t1",
    ];
    for text in texts {
        let ids = bytes.encode(text).expect("encodes");
        assert_eq!(files.encode(text).expect("encodes"), ids, "{text:?}");
        assert_eq!(
            files.decode(&ids).expect("decodes"),
            bytes.decode(&ids).expect("decodes")
        );
        let plain = text.replace("</s>", "").replace("<pad>", "");
        assert_eq!(bytes.decode(&ids).expect("decodes"), plain);
    }
    let odd = [0, 3, 5, 260, 999, 4];
    assert_eq!(
        files.decode(&odd).expect("decodes"),
        bytes.decode(&odd).expect("decodes")
    );
}

#[test]
fn damaged_or_missing_tokenizers_are_errors() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let message = |dir: &Path| match Tokenizer::open(dir, 1000) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    };
    assert!(message(dir.path()).contains("token ids"));
    std::fs::write(dir.path().join("vocab.json"), "{\"a\": 0}").expect("written");
    std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\n").expect("written");
    assert!(message(dir.path()).contains("<pad>"));
    std::fs::write(dir.path().join("vocab.json"), "{").expect("written");
    assert!(message(dir.path()).contains("vocab.json"));
    std::fs::write(dir.path().join("tokenizer.json"), "[]").expect("written");
    assert!(message(dir.path()).contains("tokenizer.json"));
}

#[test]
fn what_the_last_user_asked_for_neither_cuts_nor_fills_prompts() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let from = golden_dir("tokenizer-galactica").join("tokenizer.json");
    let text = std::fs::read(&from).expect("there");
    let mut json: serde_json::Value = serde_json::from_slice(&text).expect("valid");
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    });
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"
    });
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).expect("written");
    let open = |dir: &Path| Tokenizer::open(dir, 50_000).expect("opens");
    let words = "one two three four five six seven eight nine ten";
    let ids = open(dir.path()).encode(words).expect("encodes");
    let plain = open(&golden_dir("tokenizer-galactica")).encode(words);
    assert_eq!(ids, plain.expect("encodes"));
}

#[test]
fn tokens_added_later_are_tokens() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).expect("written");
    };
    let (vocab, merges) = byte_level_files(1000);
    file("vocab.json", &vocab);
    file("merges.txt", &merges);
    let open = || Tokenizer::open(dir.path(), 1010);
    let plain = open().expect("opens").encode("ab").expect("encodes");
    file(
        "added_tokens.json",
        r#"{"<|bot|>": 1001, "<|user|>": 1000}"#,
    );
    file(
        "tokenizer_config.json",
        r#"{"added_tokens_decoder": {"1": {"content": "<pad>", "special": true},
            "1001": {"content": "<|bot|>", "special": true}}}"#,
    );
    let tokenizer = open().expect("opens");
    let ids = tokenizer.encode("<|user|>ab<|bot|>").expect("encodes");
    assert_eq!(ids, [&[2, 1000], &plain[1..], &[1001]].concat());
    assert_eq!(tokenizer.decode(&ids).expect("decodes"), "<|user|>ab");
    file("tokenizer_config.json", r#"{"add_bos_token": false}"#);
    let ids = open().expect("opens").encode("ab").expect("encodes");
    assert_eq!(ids, plain[1..]);
    file("added_tokens.json", r#"{"<|bot|>": 1005}"#);
    let error = open().err().expect("another id").to_string();
    assert!(
        error.contains("<|bot|>") && error.contains("1005"),
        "{error}"
    );
}
