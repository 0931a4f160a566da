//! Stand-in CUDA libraries, built once a test run, and a home with a profile of the GPU that they play.

#[path = "../cli/harness.rs"]
#[allow(dead_code)] // the program's other tests use the rest
mod harness;

pub use harness::RAGGED;
pub use harness::golden;
use harness::{Ended, Home};
use loadmaster::machine::cpu::kernels::Isa;
use loadmaster::machine::os;
use loadmaster::probe::{ProfileKey, save_profile};
use loadmaster::profile::HardwareProfile;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// DRAM plays a GPU of the same size.
pub const HOST: &str = "host:1GiB";

/// The stand-in driver's context and cuBLAS's handle take 72 MiB.
const FACTS: &str = r#"
[gpu]
name = "Emulated GPU"
total_bytes = 1073741824
context_bytes = 75497472
host_bytes = 16777216
copy_bytes_per_s = 2e11
launch_s = 5e-6
[gpu.gemm.f16]
points = [[1, 1024, 4096, 5e-5], [512, 1024, 4096, 2e-4]]
[gpu.attention.f16]
decode_bytes_per_s = 1e11
prefill_flop_per_s = 1e13
[links.cpu_to_gpu]
latency_s = 1e-5
pinned = [[1048576, 1e10], [16777216, 1.2e10]]
unpinned = [[1048576, 5e9], [16777216, 6e9]]
both_directions_pct = 90.0
[links.gpu_to_cpu]
latency_s = 1e-5
pinned = [[1048576, 1e10], [16777216, 1.2e10]]
unpinned = [[1048576, 5e9], [16777216, 6e9]]
both_directions_pct = 90.0
"#;

/// One emulated GPU: which libraries, and what they are told.
pub struct Gpu {
    pub home: std::rc::Rc<Home>,
    libraries: PathBuf,
    told: Vec<(String, String)>,
}

/// Directories of libraries; None, said once, where there is no C++ compiler.
fn built() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        if Command::new("g++").arg("--version").output().is_err() {
            eprintln!("skipped: there is no g++ to build the stand-in CUDA libraries with");
            return None;
        }
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/build.sh");
        let built = Command::new("bash").arg(script).arg(&out).output();
        let built = built.expect("bash");
        let text = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "{text}");
        Some(out)
    };
    BUILT.get_or_init(build).as_deref()
}

impl Gpu {
    pub fn new() -> Option<Gpu> {
        let libraries = built()?.join("default");
        let home = Home::new();
        save_profile(&home.dir, &profile(&home.dir)).expect("saved");
        Some(Gpu {
            home: home.into(),
            libraries,
            told: Vec::new(),
        })
    }

    /// Where they are.
    pub fn libraries(&self) -> &Path {
        &self.libraries
    }

    /// The same home over other libraries.
    pub fn over(&self, libraries: &str) -> Gpu {
        Gpu {
            home: self.home.clone(),
            libraries: self.libraries.with_file_name(libraries),
            told: Vec::new(),
        }
    }

    /// The same GPU, told more.
    pub fn with(&self, told: &[(&str, &str)]) -> Gpu {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Gpu {
            home: self.home.clone(),
            libraries: self.libraries.clone(),
            told: self
                .told
                .iter()
                .cloned()
                .chain(told.iter().map(owned))
                .collect(),
        }
    }

    /// `run` of the golden checkpoint over ragged lines.
    pub fn run(&self, device: &str, words: &str) -> Ended {
        self.run_lines(
            RAGGED,
            device,
            &format!("--model GOLDEN --gen-len 6 {words}"),
        )
    }

    pub fn run_lines(&self, lines: &str, device: &str, words: &str) -> Ended {
        self.home.write("in.jsonl", lines);
        let words = format!(
            "run --input in.jsonl --report report.json --overwrite --device {device} {words}"
        );
        Ended::new(&words, self.output(&words))
    }

    /// Whatever becomes of a program with these words.
    pub fn output(&self, words: &str) -> Output {
        let mut command = self.home.command(words);
        self.beside(&mut command);
        command.output().expect("started")
    }

    /// Whatever the command starts finds this GPU.
    pub fn beside(&self, command: &mut Command) {
        command.env("LD_LIBRARY_PATH", &self.libraries);
        for variable in ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME"] {
            command.env_remove(variable);
        }
        // Python's packages are looked for there, too.
        command.env("PATH", "").env("HOME", &self.home.dir);
        command.envs(self.told.iter().cloned());
    }

    /// Token ids of every line.
    pub fn tokens(&self, device: &str, words: &str) -> Vec<String> {
        tokens(&self.run(device, words).good())
    }
}

pub fn tokens_of(output: &Output) -> Vec<String> {
    tokens(&Ended::new("", output.clone()).good())
}

pub fn tokens(ended: &Ended) -> Vec<String> {
    let ids = |line: &serde_json::Value| line["token_ids"].to_string();
    ended.lines().iter().map(ids).collect()
}

/// Round figures of this machine and of the emulated GPU.
fn profile(dir: &Path) -> HardwareProfile {
    let key = ProfileKey::of_this_machine(dir, os::default_threads(), Isa::detect().name())
        .with_gpu(Some("Emulated GPU"));
    let text = crate::running::round_profile().to_toml() + FACTS;
    let profile = HardwareProfile::from_toml(&text).expect("a profile");
    crate::running::owned_by(key, profile)
}
