//! Result lines in good times, on a full disk, and when nobody reads them any more.

use super::*;
#[cfg(unix)]
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex};

fn line(index: usize) -> Finished {
    Finished {
        line: index,
        prompt_tokens: 3,
        token_ids: vec![4, 5, 2],
        reason: FinishReason::Stop,
    }
}

fn bad(message: &str) -> LineError {
    LineError {
        message: message.to_owned(),
        code: "bad_line",
    }
}

/// A disk with room for so many bytes.
#[derive(Clone)]
struct Small {
    bytes: Arc<Mutex<Vec<u8>>>,
    room: usize,
    full: ErrorKind,
}

impl Write for Small {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut bytes = self.bytes.lock().expect("whole");
        let fits = data.len().min(self.room - bytes.len());
        bytes.extend(&data[..fits]);
        if fits == 0 {
            Err(self.full.into())
        } else {
            Ok(fits)
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Target for Small {
    fn cut(&mut self, bytes: u64) {
        self.bytes.lock().expect("whole").truncate(bytes as usize);
    }
}

fn small(room: usize, full: ErrorKind) -> (Small, Results<'static>) {
    let bytes = Arc::default();
    let disk = Small { bytes, room, full };
    let results = Results::new(Box::new(disk.clone()), "r.jsonl".to_owned(), None);
    (disk, results)
}

#[test]
fn lines_have_exactly_the_keys_of_their_kind() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("r.jsonl");
    let tokenizer = Tokenizer::byte_level(50272);
    let mut results = Results::open(Some(&path), false, Some(&tokenizer)).expect("new");
    results.finished(&line(7)).expect("written");
    results.failed(1, &bad("line 2: \"x\"")).expect("written");
    let last = Finished {
        reason: FinishReason::Length,
        token_ids: vec![],
        ..line(0)
    };
    results.finished(&last).expect("written");
    let text = std::fs::read_to_string(&path).expect("there");
    let expected = "{\"index\":7,\"text\":\"!\\\"\",\"token_ids\":[4,5,2],\"finish_reason\":\"stop\",\"prompt_tokens\":3}\n\
        {\"index\":1,\"finish_reason\":\"error\",\"error\":{\"message\":\"line 2: \\\"x\\\"\",\"code\":\"bad_line\"}}\n\
        {\"index\":0,\"text\":\"\",\"token_ids\":[],\"finish_reason\":\"length\",\"prompt_tokens\":3}\n";
    assert_eq!(text, expected);
    assert_eq!(
        results.counts_of(3),
        LineCounts {
            total: 3,
            ok: 2,
            failed: 1
        }
    );
}

#[test]
fn what_is_there_is_replaced_only_when_asked() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("r.jsonl");
    std::fs::write(&path, "old and rather long\n").expect("written");
    let refused = Results::open(Some(&path), false, None)
        .err()
        .expect("refused");
    assert!(refused.to_string().contains("--overwrite"), "{refused}");
    assert_eq!(
        std::fs::read(&path).expect("there"),
        b"old and rather long\n"
    );
    drop(Results::open(Some(&path), true, None).expect("asked"));
    assert_eq!(std::fs::read(&path).expect("there"), b"");
    let nowhere = Results::open(Some(&dir.path().join("no/r.jsonl")), false, None).err();
    assert!(matches!(nowhere, Some(ResultError::Open { .. })));
    let directory = Results::open(Some(dir.path()), true, None).err();
    assert!(matches!(directory, Some(ResultError::Open { .. })));
    let mut sink = Results::open(Some(Path::new("/dev/null")), false, None).expect("a device");
    sink.finished(&line(0)).expect("swallowed");
}

#[test]
fn a_full_disk_leaves_whole_lines() {
    let (disk, mut results) = small(200, ErrorKind::StorageFull);
    results.finished(&line(0)).expect("room for one");
    results.finished(&line(1)).expect("room for two");
    let error = results.finished(&line(2)).expect_err("full").to_string();
    assert!(
        error.contains("r.jsonl") && error.contains("2 whole lines"),
        "{error}"
    );
    let bytes = disk.bytes.lock().expect("whole").clone();
    let text = String::from_utf8(bytes).expect("text");
    assert!(text.ends_with('\n') && text.lines().count() == 2, "{text}");
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).expect("whole");
    }
    assert!(!results.is_closed());
    assert_eq!(results.counts_of(2).ok, 2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_real_full_device_is_told() {
    let mut results = Results::open(Some(Path::new("/dev/full")), false, None).expect("a device");
    let error = results.finished(&line(0)).expect_err("full").to_string();
    assert!(
        error.contains("/dev/full") && error.contains("make room"),
        "{error}"
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let (_, mut results) = small(0, ErrorKind::BrokenPipe);
    assert!(matches!(
        results.finished(&line(0)),
        Err(ResultError::Closed)
    ));
    assert!(results.is_closed());
}

#[test]
fn the_sink_counts_says_once_and_goes_on() {
    let (disk, mut results) = small(4096, ErrorKind::StorageFull);
    let (page, _) = small(4096, ErrorKind::StorageFull);
    let mut talk = Talk::new(Box::new(page.clone()), Box::new(|| 0.0), None);
    let mut sink = ResultSink::new(&mut results, &mut talk, 100);
    sink.refused(4, "too much".to_owned()).expect("written");
    sink.finished(line(0)).expect("written");
    sink.finished(line(1)).expect("written");
    sink.progress(&Progress::default());
    let said = String::from_utf8(page.bytes.lock().expect("whole").clone()).expect("text");
    assert_eq!(said.matches("no tokenizer").count(), 1, "{said}");
    assert!(said.contains("line 5: too much"), "{said}");
    let written = String::from_utf8(disk.bytes.lock().expect("whole").clone()).expect("text");
    assert!(
        written.contains("\"does_not_fit\"") && written.contains("\"text\":\"\""),
        "{written}"
    );
    assert_eq!(
        results.counts_of(3),
        LineCounts {
            total: 3,
            ok: 2,
            failed: 1
        }
    );
}

/// Runs itself again as the process whose stdout is closed.
#[cfg(unix)]
#[test]
fn a_closed_stdout_is_noticed() {
    use super::super::failure::run_this_test;
    const ROLE: &str = "LOADMASTER_TEST_CLOSED";
    if std::env::var_os(ROLE).is_some() {
        let mut results = Results::open(None, false, None).expect("stdout");
        let ended = (0..1_000_000).find_map(|i| results.finished(&line(i)).err());
        let quiet = matches!(ended, Some(ResultError::Closed)) && results.is_closed();
        std::process::exit(if quiet { 0 } else { 3 });
    }
    let mut child = run_this_test("results::tests::a_closed_stdout", ROLE);
    // The test program itself talks first, and would not bear a closed stdout.
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut said = stdout.by_ref().lines();
    assert!(said.any(|line| line.is_ok_and(|l| l.contains("\"index\":0,"))));
    drop(stdout);
    assert_eq!(child.wait().expect("ended").code(), Some(0));
}

#[test]
fn a_directory_is_no_place_for_a_file() {
    let dir = tempfile::tempdir().expect("a directory");
    for overwrite in [false, true] {
        let error = check_place(dir.path(), overwrite).expect_err("a directory");
        assert!(matches!(error, ResultError::Open { .. }), "{error}");
    }
    let there = dir.path().join("r.jsonl");
    std::fs::write(&there, "of before").expect("written");
    check_place(&there, true).expect("may be replaced");
    assert_eq!(std::fs::read_to_string(&there).expect("kept"), "of before");
}
