//! What a run takes is what its plan says at most, seen from outside as well as by itself.

use crate::harness::Home;
use serde_json::Value;
use std::process::{Child, Stdio};

/// Peak resident bytes of a child and its exit code, from the kernel's own account.
fn wait_for(child: &Child) -> (u64, i32) {
    let pid = child.id() as libc::pid_t;
    let mut status = 0;
    // SAFETY: zeroes are a valid rusage; wait4 fills both places, which outlive the call, and the
    // child is waited for nowhere else.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::wait4(pid, &mut status, 0, &mut usage), pid);
        usage
    };
    (usage.ru_maxrss as u64 * 1024, status)
}

/// (planned peak, measured peak, the kernel's peak) in bytes.
fn peaks(home: &Home, flags: &str) -> (u64, u64, u64) {
    let words = format!(
        "run --model synth:opt-125m {flags} --report report.json --output out.jsonl --overwrite"
    );
    let child = home.command(&words).stderr(Stdio::null()).spawn();
    let (outside, status) = wait_for(&child.expect("started"));
    assert_eq!(status, 0, "{flags}");
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
