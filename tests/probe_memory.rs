//! A probe in a process of its own stays within the memory that it was given.
//! Alone in this file, because every test of a file shares the process whose peak is looked at.

use loadmaster::machine::cpu::kernels::Isa;
use loadmaster::machine::os;
use loadmaster::probe::{ProbeError, ProbeOptions, ProbeScale, probe};
use std::sync::atomic::AtomicBool;

fn quick(dir: &std::path::Path, budget_bytes: u64) -> Result<(), ProbeError> {
    let options = ProbeOptions {
        offload_dir: dir,
        threads: 2,
        budget_bytes,
        isa: Isa::detect(),
        scale: ProbeScale::Quick,
        command: "test",
        gpu: None,
        progress: &mut |_| {},
        stop: &AtomicBool::new(false),
    };
    probe(options).map(drop)
}

#[test]
fn a_probe_keeps_to_the_budget_that_it_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let Err(ProbeError::Budget { needed_bytes, .. }) = quick(dir.path(), 1 << 20) else {
        panic!("one mebibyte cannot be enough");
    };
    let budget_bytes = needed_bytes + (1 << 20);
    quick(dir.path(), budget_bytes).unwrap();
    let peak_bytes = os::process_memory().unwrap().peak_bytes;
    assert!(peak_bytes <= budget_bytes, "{peak_bytes} > {budget_bytes}");
}
