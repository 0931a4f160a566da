//! What a run takes is what its plan says at most, seen from outside as well as by itself.

use crate::harness::Home;
use loadmaster::machine::os::wait_for_peak;
use serde_json::Value;
use std::process::Stdio;

/// (planned peak, measured peak, the kernel's peak) in bytes.
fn peaks(home: &Home, flags: &str) -> (u64, u64, u64) {
    let words = format!(
        "run --model synth:opt-125m {flags} --report report.json --output out.jsonl --overwrite"
    );
    let child = home.command(&words).stderr(Stdio::null()).spawn();
    // Not what `wait4` accounts: that begins with the pages of the process that started the child.
    let (outside, good) = wait_for_peak(&mut child.expect("started")).expect("waited for");
    assert!(good, "{flags}");
    let report = home.json("report.json");
    let peak = |figures: &Value| {
        figures["tiers"]["cpu"]["peak_bytes"]
            .as_u64()
            .expect("bytes")
    };
    let setup = &report["setup"];
    assert_eq!(
        (&setup["pack_s"], &setup["probe_s"]),
        (&0.0.into(), &0.0.into())
    );
    (
        peak(&report["plan"]["estimate"]),
        peak(&report["measured"]),
        outside,
    )
}

const SIZE: &str = "--prompt-len 48 --gen-len 6 --num-prompts 6";

#[test]
fn no_run_takes_more_than_planned() {
    let home = Home::packed();
    // Packs the 4-bit store, so that no run below has to.
    home.run(&format!(
        "run --model synth:opt-125m {SIZE} --compress-weight 1"
    ))
    .good();
    for flags in [
        "--percent 0 100 0 100 0 100",
        "--percent 0 50 0 50 0 50 --gpu-batch-size 3 --num-gpu-batches 2",
        "--percent 0 0 0 0 0 100 --gpu-batch-size 6",
        "--cpu-mem 200MiB",
        "--compress-weight 1 --compress-cache 1",
        "--threads 24",
    ] {
        let (planned, measured, outside) = peaks(&home, &format!("{SIZE} {flags}"));
        assert!(measured <= planned, "{flags}: {measured} > {planned}");
        assert!(outside <= planned, "{flags}: {outside} > {planned}");
        // The report's peak begins when the weights are loaded; the outside sees planning too. The two
        // accounts are brought up to date page by page, each in its own time.
        let seen = outside + (1 << 20);
        assert!(measured <= seen, "{flags}: {measured} and {outside}");
        // Not by a plan that asks for the moon: the fixed part is slack of at most this.
        assert!(
            planned - measured < 64 << 20,
            "{flags}: {planned} {measured}"
        );
    }
}
