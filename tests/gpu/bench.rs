//! `benches/gpu.sh`, every stage at toy size, so that it cannot rot before there is a GPU; and whatever goes wrong
//! in a stage makes it fail.

use crate::stand_in::{Gpu, golden};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

/// Stands in for compute-sanitizer: runs what it is given.
const SANITIZER: &str =
    "#!/bin/sh\nwhile [ \"${1#--}\" != \"$1\" ]; do shift 2; done\nexec \"$@\"\n";
/// Stands in for a Python that has FlexLLMGen.
const PEER: &str = "#!/bin/sh\n[ \"$1\" = -c ] || echo \"$* total throughput: 0.500 token/s\"\n";
/// The program, but for what becomes of its files.
const SPOILING: &str = r#"#!/bin/sh
"$REAL" "$@" || exit
[ "$1" = series ] || exit 0
cd "$OUT" && eval "$SPOIL"
"#;

struct Bench {
    gpu: Gpu,
}

impl Bench {
    fn new() -> Option<Bench> {
        let gpu = Gpu::new()?;
        let models = gpu.home.path("goldens");
        std::fs::create_dir(&models).expect("made");
        for name in ["head-16", "opt-like"] {
            symlink(golden(name), models.join(name)).expect("linked");
        }
        std::fs::create_dir(gpu.home.path("bin")).expect("made");
        Some(Bench { gpu })
    }

    /// A program that the stages find in their path.
    fn tool(&self, name: &str, text: &str) {
        let path = self.gpu.home.path("bin").join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("runnable");
    }

    fn stage(&self, words: &str, told: &[(&str, &str)]) -> Output {
        let home = &self.gpu.home;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(words.split(' '));
        self.gpu.beside(&mut command);
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .env("PATH", format!("{}:{path}", home.path("bin").display()))
            .env("LOADMASTER", env!("CARGO_BIN_EXE_loadmaster"))
            .env("LOADMASTER_HOME", &home.dir)
            .env("GOLDENS", home.path("goldens"))
            .env("OUT", home.path("out"))
            .env("SIZE", golden("opt-like"))
            .env("LARGE", golden("opt-like"))
            .env("PYTHON", home.path("bin").join("python"))
            .envs([
                ("PROMPT", "6"),
                ("GEN", "3"),
                ("BATCH", "2"),
                ("LARGE_PROMPTS", "2"),
            ])
            .envs([("GPU_MEM", "900MiB"), ("PLACEMENTS", "3")])
            .envs([("GOLDEN_PROMPT", "5"), ("GOLDEN_GEN", "3")])
            .envs(told.iter().copied());
        command.output().expect("bash")
    }

    /// What a stage that ends well prints.
    fn good(&self, words: &str) -> String {
        let output = self.stage(words, &[]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words}: {text}{said}");
        assert!(text.contains(": 0 failed, "), "{text}");
        text
    }

    /// What a stage that fails prints.
    fn fails(&self, words: &str, told: &[(&str, &str)]) -> String {
        let output = self.stage(words, told);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{words}: {text}");
        assert!(text.contains("FAILED: "), "{words}: {text}");
        text
    }

    /// What a stage is told, so that this is done to the files of its series.
    fn spoiled<T>(&self, how: &str, stage: impl FnOnce(&[(&str, &str)]) -> T) -> T {
        self.tool("spoiling", SPOILING);
        let spoiling = self.gpu.home.path("bin/spoiling").display().to_string();
        stage(&[
            ("LOADMASTER", spoiling.as_str()),
            ("REAL", env!("CARGO_BIN_EXE_loadmaster")),
            ("SPOIL", how),
            ("PLACEMENTS", "1"),
        ])
    }
}

#[test]
fn every_stage_of_the_bench_runs_at_toy_size() {
    let Some(bench) = Bench::new() else { return };
    let text = bench.good("goldens");
    assert_eq!(text.matches("same tokens").count(), 5, "{text}");
    assert_eq!(text.matches("transformers' tokens").count(), 2, "{text}");
    assert_eq!(text.matches("same first tokens").count(), 2, "{text}");
    assert_eq!(text.matches("% of tokens alike").count(), 6, "{text}");
    assert!(text.contains("no compute-sanitizer here"), "{text}");
    let text = bench.good("rows");
    assert!(text.contains("8 runs: mean error of throughput"), "{text}");
    assert_eq!(text.matches("of the roofline").count(), 8, "{text}");
    // 4 bits where a row says so, and nowhere else.
    assert_eq!(text.matches("-900MiB: --percent ").count(), 8, "{text}");
    assert_eq!(text.matches("--compress-").count(), 2, "{text}");
    let text = bench.good("large");
    assert!(
        text.contains("predicted") && text.contains("measured"),
        "{text}"
    );
    assert!(bench.good("peer").contains("left out"));
    bench.tool("python", PEER);
    let text = bench.good("peer");
    let beside = text
        .lines()
        .filter(|line| line.contains(" 0.500 tok/s, x "));
    assert_eq!(beside.count(), 7, "{text}");
    assert!(text.contains("--gpu-batch-size 1 --num-gpu-batches 2 --cpu-cache-compute total"));
    assert_eq!(bench.good("peer disk q4").matches(", x ").count(), 2);
    let alone = bench.gpu.home.path("alone").display().to_string();
    let output = bench.stage("peer disk q4", &[("OUT", &alone)]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert_eq!(text.matches("run the stage rows for ours").count(), 2);
    // A budget that holds nothing is a finding, not a fault.
    let output = bench.stage("large", &[("GPU_MEM", "84MiB")]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("does not fit"),
        "{text}"
    );
}

#[test]
fn a_stage_of_the_bench_fails_with_what_it_runs() {
    let Some(bench) = Bench::new() else { return };
    let broken = Bench {
        gpu: bench.gpu.over("no-cublas"),
    };
    for stage in ["goldens", "rows unlimited", "large"] {
        broken.fails(stage, &[]);
    }
    let text = bench.fails("rows", &[("GPU_MEM", "84MiB")]);
    assert!(
        text.contains("FAILED: resident-84MiB does not fit"),
        "{text}"
    );
    assert_eq!(text.matches("FAILED").count(), 1, "{text}");
    bench.tool("python", "#!/bin/sh\n[ \"$1\" = -c ]\n");
    bench.fails("peer", &[]);
    bench.tool("compute-sanitizer", "#!/bin/sh\nexit 9\n");
    bench.fails("goldens", &[("PLACEMENTS", "1")]);
    bench.tool("compute-sanitizer", SANITIZER);
    let text = bench.good("goldens");
    assert_eq!(text.matches("=== after").count(), 8, "{text}");
    assert_eq!(text.matches("compute-sanitizer racecheck").count(), 2);
    assert!(text.contains("compute-sanitizer memcheck: --percent 30 30 40 30 50 50"));
}

/// Wrong from the second token on, lines that are missing, wrong first tokens, another token than transformers'.
const OTHER_TOKENS: &str = r#"
sed -i 's/"token_ids":\[\([0-9]*\),[0-9,]*/"token_ids":[\1,0,0/' *-cache4-gpu.jsonl
sed -i '2,$d' *-weights4-gpu.jsonl
sed -i 's/"token_ids":\[[0-9]*/"token_ids":[0/' *-fp16-gpu.jsonl
sed -i '1s/[0-9]*\],/0],/' *-own.jsonl
"#;

#[test]
fn a_stage_of_the_bench_fails_with_tokens_that_are_not_alike() {
    let Some(bench) = Bench::new() else { return };
    let text = bench.spoiled(OTHER_TOKENS, |told| bench.fails("goldens", told));
    for what in [
        "only 33 % of tokens alike",
        "only 25 % of tokens alike",
        "only 66 % of tokens alike",
        "other first tokens",
        "not transformers' tokens",
    ] {
        let what = format!("FAILED: {what}: ");
        assert_eq!(text.matches(&what).count(), 2, "{what}{text}");
    }
    assert_eq!(text.matches("FAILED").count(), 10, "{text}");
}

#[test]
fn a_stage_of_the_bench_fails_with_device_memory_that_is_not_the_plans() {
    let Some(bench) = Bench::new() else { return };
    bench.good("large");
    let report = bench.gpu.home.json("out/large.json");
    let planned = &report["plan"]["estimate"]["tiers"]["gpu"]["peak_bytes"];
    let planned = planned.as_u64().expect("bytes");
    let ends = |held: &str, why: Option<&str>| {
        let how = format!(
            "sed -i '/\"measured\":/,$ s/\"peak_bytes\": .*/\"peak_bytes\": {held}/' large.json"
        );
        let output = bench.spoiled(&how, |told| bench.stage("large", told));
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.success(), why.is_none(), "{held}: {text}");
        assert!(text.contains(why.unwrap_or(": 0 failed")), "{held}: {text}");
    };
    for nothing in ["null", "0"] {
        ends(nothing, Some("FAILED: large: device memory is not known"));
    }
    let slack = 8 << 20;
    ends(&(planned + slack).to_string(), None);
    let above = (planned + slack + 1).to_string();
    ends(&above, Some("more than the"));
    ends(&(planned * 98 / 100).to_string(), None);
    ends(&(planned * 96 / 100).to_string(), Some("3 % less than"));
}

#[test]
fn what_hangs_in_a_stage_is_killed() {
    let Some(bench) = Bench::new() else { return };
    bench.tool(
        "deaf",
        "#!/bin/sh\ntrap '' TERM\nsleep 300 &\nwait\nsleep 300\n",
    );
    let deaf = bench.gpu.home.path("bin/deaf").display().to_string();
    let start = std::time::Instant::now();
    let told = [
        ("LOADMASTER", deaf.as_str()),
        ("STAGE_SECONDS", "1"),
        ("GRACE_SECONDS", "1"),
    ];
    let text = bench.fails("goldens", &told);
    assert!(text.contains("no time left"), "{text}");
    assert!(start.elapsed().as_secs() < 60);
}
