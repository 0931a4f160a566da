//! What every test of the program shares: a home with a profile, commands, what they answered. What is
//! expected of a command stands in the tests themselves.

use crate::running::round_profile;
use loadmaster::machine::cpu::kernels::Isa;
use loadmaster::machine::os;
use loadmaster::probe::{ProfileKey, save_profile};
use loadmaster::profile::HardwareProfile;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Prompts of the golden checkpoint `opt-like` as token ids, each line with settings of its own.
pub const RAGGED: &str = r#"{"prompt": [51], "max_tokens": 12}
{"prompt": [2, 210, 118, 32], "max_tokens": 12}
{"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0.8, "seed": 7}
{"prompt": [9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5], "max_tokens": 1}
{"prompt": [300, 20, 11], "temperature": 1.3, "top_p": 0.9, "top_k": 50}
"#;

/// A place where one test's files are, and where its programs write.
pub struct Home {
    pub dir: PathBuf,
    _own: Option<tempfile::TempDir>,
}

/// The target directory is on a real disk, which the temporary one often is not.
fn target_tmp() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Numbers of threads that tests ask for beside the default: each has its profile.
const OTHER_THREADS: [usize; 2] = [3, 24];

fn save_profiles(dir: &Path) {
    for threads in OTHER_THREADS.into_iter().chain([os::default_threads()]) {
        save_profile(dir, &own_profile(dir, threads)).expect("saved");
    }
}

/// A profile of round figures that this machine takes for its own.
fn own_profile(dir: &Path, threads: usize) -> HardwareProfile {
    let key = ProfileKey::of_this_machine(dir, threads, Isa::detect().name());
    crate::running::owned_by(key, round_profile())
}

impl Home {
    /// Empty but for the profile; gone at the end.
    pub fn new() -> Home {
        let own = tempfile::tempdir_in(target_tmp()).expect("a directory under target");
        save_profiles(own.path());
        Home {
            dir: own.path().to_owned(),
            _own: Some(own),
        }
    }

    /// With synth:opt-125m packed already; files of this test are apart from other tests' all the same.
    pub fn packed() -> Home {
        static PACKED: OnceLock<PathBuf> = OnceLock::new();
        let dir = PACKED.get_or_init(|| {
            let dir = target_tmp().join("cli-home");
            save_profiles(&dir);
            let home = Home {
                dir: dir.clone(),
                _own: None,
            };
            let words = "run --model synth:opt-125m --prompt-len 2 --gen-len 1 --num-prompts 1";
            home.run(words).good();
            dir
        });
        let own = tempfile::tempdir_in(target_tmp()).expect("a directory under target");
        std::os::unix::fs::symlink(dir.join("store"), own.path().join("store")).expect("linked");
        save_profiles(own.path());
        Home {
            dir: own.path().to_owned(),
            _own: Some(own),
        }
    }

    /// Profiles for another offload directory, whose disk may be another.
    pub fn save_profiles_in(&self, dir: &Path) {
        save_profiles(dir);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect(name)
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).expect(name)
    }

    /// A copy of a golden checkpoint that a test may spoil.
    pub fn copy_golden(&self, name: &str) -> PathBuf {
        let to = self.path("model");
        std::fs::create_dir_all(&to).expect("made");
        for entry in std::fs::read_dir(golden(name)).expect("committed") {
            let entry = entry.expect("an entry");
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
        }
        to
    }

    /// The program in this home, its words split at blanks. `GOLDEN` stands for the checkpoint opt-like.
    pub fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_loadmaster"));
        let golden = golden("opt-like");
        let word = |w: &str| match w {
            "GOLDEN" => golden.clone().into_os_string(),
            w => w.into(),
        };
        command
            .args(words.split_whitespace().map(word))
            .current_dir(&self.dir)
            .env("LOADMASTER_HOME", &self.dir)
            .env("HF_HOME", self.path("hf"))
            .env_remove("HF_HUB_CACHE")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &str) -> Ended {
        let output = self.command(words).output().expect("started");
        Ended::new(words, output)
    }

    /// `run` over an input of these lines, with a report; what it wrote as results.
    pub fn generate(&self, input: &str, words: &str) -> Vec<Value> {
        self.write("in.jsonl", input);
        let words = format!("run --input in.jsonl --report report.json --overwrite {words}");
        self.run(&words).good().lines()
    }
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens/models")
        .join(name)
}

/// A program that has ended.
pub struct Ended {
    pub words: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn new(words: &str, output: Output) -> Ended {
        let text = |bytes| String::from_utf8(bytes).expect("streams are UTF-8");
        let ended = Ended {
            words: words.to_owned(),
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        };
        assert!(!ended.stderr.contains("panicked"), "{}", ended.told());
        ended
    }

    fn told(&self) -> String {
        format!("{}\n{:?}\n{}", self.words, self.code, self.stderr)
    }

    pub fn good(self) -> Ended {
        assert_eq!(self.code, Some(0), "{}", self.told());
        self
    }

    /// The failure's text (hint and error), after checking that it ends as a failure should.
    pub fn fails(&self, code: i32, parts: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{}", self.told());
        let mut last = self.stderr.lines().rev();
        let error = last.next().unwrap_or_default();
        assert!(error.starts_with("error: "), "{}", self.told());
        let hint = last.next().filter(|l| l.starts_with("hint: "));
        let text = format!("{}\n{error}", hint.unwrap_or_default());
        for part in parts {
            assert!(text.contains(part), "no {part:?}: {}", self.told());
        }
        text
    }

    /// stdout as one JSON document and nothing else.
    pub fn document(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// stdout as result lines, in order of input.
    pub fn lines(&self) -> Vec<Value> {
        in_order(&self.stdout)
    }
}

/// Result lines by their index; each one whole.
pub fn in_order(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'), "a torn line");
    let parse = |line| serde_json::from_str(line).expect("whole lines of JSON");
    let mut lines: Vec<Value> = text.lines().map(parse).collect();
    lines.sort_by_key(|line| line["index"].as_u64().expect("an index"));
    lines
}

pub fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

/// Every key is there; more may be.
pub fn assert_keys(value: &Value, expected: &str) {
    for key in expected.split_whitespace() {
        assert!(keys(value).contains(&key), "no {key} in {value}");
    }
}
