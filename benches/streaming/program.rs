//! The program as a user runs it, and the figures of its report.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One home for stores and profile; the program measures the machine once.
pub struct Program {
    home: PathBuf,
}

/// One report's figures.
pub struct Measured {
    measured: Value,
    /// The policy that ran, as flags.
    pub flags: String,
}

impl Program {
    pub fn new(home: &Path) -> Program {
        let home = home.to_owned();
        Program { home }
    }

    /// `run` with these flags. The first run of a model packs it, which no figure here contains.
    pub fn run(&self, model: &str, flags: &str) -> Measured {
        let report = self.home.join("report.json");
        let output = self.home.join("out.jsonl");
        let ended = Command::new(env!("CARGO_BIN_EXE_loadmaster"))
            .args(["run", "--ignore-eos", "--overwrite", "--model"])
            .arg(format!("synth:{model}"))
            .arg("--report")
            .arg(&report)
            .arg("--output")
            .arg(&output)
            .args(flags.split_whitespace())
            .env("LOADMASTER_HOME", &self.home)
            .stdin(Stdio::null())
            .output()
            .expect("started");
        assert!(
            ended.status.success(),
            "{flags}: {}",
            String::from_utf8_lossy(&ended.stderr)
        );
        let text = std::fs::read_to_string(&report).expect("a report");
        let report: Value = serde_json::from_str(&text).expect("JSON");
        Measured {
            measured: report["measured"].clone(),
            flags: report["plan"]["flags"].as_str().expect("flags").to_owned(),
        }
    }
}

impl Measured {
    fn number(&self, keys: &[&str]) -> f64 {
        let found = keys.iter().fold(&self.measured, |value, key| &value[key]);
        found
            .as_f64()
            .unwrap_or_else(|| panic!("no {keys:?} in {}", self.measured))
    }

    pub fn prefill_s(&self) -> f64 {
        self.number(&["prefill_s"])
    }

    pub fn decode_s(&self) -> f64 {
        self.number(&["decode_s"])
    }

    pub fn decode_tok_s(&self) -> f64 {
        self.number(&["decode_tok_s"])
    }

    /// Seconds that a lane was busy while decoding.
    pub fn busy_decode_s(&self, lane: &str) -> f64 {
        self.number(&["lanes", lane, "decode_s"])
    }

    pub fn bytes(&self, lane: &str) -> f64 {
        self.number(&["lanes", lane, "bytes"])
    }

    /// Seconds that a lane's work takes at its probed rates, both phases.
    pub fn work_s(&self, lane: &str) -> f64 {
        self.number(&["lanes", lane, "work_s"])
    }
}
