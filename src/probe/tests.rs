//! Tests of the probe: a quick one of this machine, its file, its limits, its reuse.

use super::*;
use crate::cost::rates::Rates;
use crate::dtype::{Arithmetic, Dtype};
use crate::policy::DeviceKind;
use std::sync::atomic::Ordering;

/// Room for the whole test process, other tests included.
const ROOMY_BYTES: u64 = 16 << 30;

fn quick(dir: &Path, stop: &AtomicBool, budget_bytes: u64) -> Result<HardwareProfile, ProbeError> {
    probe(ProbeOptions {
        offload_dir: dir,
        threads: 2,
        budget_bytes,
        isa: Isa::detect(),
        scale: ProbeScale::Quick,
        command: "loadmaster probe",
        gpu: None,
        progress: &mut |_| {},
        stop,
    })
}

#[test]
fn a_quick_probe_is_a_valid_profile_that_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let offload = dir.path().join("made/by/the/probe");
    let profile = quick(&offload, &AtomicBool::new(false), ROOMY_BYTES).unwrap();
    assert_eq!(
        std::fs::read_dir(&offload).unwrap().count(),
        0,
        "nothing stays"
    );
    let points = super::compute::products().count() * 2;
    assert_eq!(
        profile
            .cpu
            .gemm
            .values()
            .map(|c| c.points.len())
            .sum::<usize>(),
        points
    );
    assert_eq!(profile.cpu.attention.len(), 3);
    assert_eq!(profile.contention.len(), 11);
    assert_eq!(profile.links.disk_to_cpu.direct.len(), 2);
    assert!(profile.cpu.launch_s > 0.0 && profile.links.disk_to_cpu.latency_s > 0.0);
    assert!(summary(&profile).len() >= 7);

    let path = save_profile(&offload, &profile).unwrap();
    assert!(path.starts_with(profiles_dir(&offload)));
    let key = ProfileKey::of_this_machine(&offload, 2, Isa::detect().name());
    assert_eq!(find_profile(&offload, &key), Some(profile.clone()));
    let other = ProfileKey {
        threads: 3,
        ..key.clone()
    };
    assert_eq!(find_profile(&offload, &other), None);
    std::fs::write(profiles_dir(&offload).join("broken.toml"), "schema = 9").unwrap();
    assert_eq!(find_profile(&offload, &key), Some(profile));
}

#[test]
fn every_burst_of_a_machine_just_probed_is_told_beside_its_price() {
    let dir = tempfile::tempdir().unwrap();
    let profile = quick(dir.path(), &AtomicBool::new(false), ROOMY_BYTES).unwrap();
    let rates = Rates::new(&profile, DeviceKind::Cpu, 2).unwrap();
    let (store, stop) = (dir.path().join("store"), AtomicBool::new(false));
    std::fs::write(&store, vec![7; 3 << 20]).unwrap();
    let place = BurstPlace {
        threads: 2,
        store: &store,
        spill: dir.path(),
        rates: &rates,
        stop: &stop,
    };
    let size = CallSize {
        request_bytes: 8192,
        requests: 3,
    };
    let reads = |spilled| Reads { spilled, size };
    let products = |times, passed_bytes| Products {
        format: Dtype::Q4,
        arithmetic: Arithmetic::Int8,
        rows: 2,
        times,
        passed_bytes,
    };
    let bursts = [
        Burst::Product(products(1, 0)),
        Burst::Product(products(3, 12 << 20)),
        Burst::Reads(reads(false)),
        Burst::Reads(reads(true)),
        Burst::Writes(size),
        Burst::ProductBeside(products(2, 12 << 20), reads(false)),
        Burst::ReadsBeside(reads(true), products(1, 0)),
    ];
    let slowdowns = Bursts::new(&place).unwrap().slowdowns(&bursts).unwrap();
    // A quick probe is rough; what is asked for is the scale.
    let plausible = |slow: &f64| (0.02..50.0).contains(slow);
    assert!(
        slowdowns.len() == bursts.len() && slowdowns.iter().all(plausible),
        "{slowdowns:?}"
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "the store alone stays"
    );
    stop.store(true, Ordering::Relaxed);
    let stopped = Bursts::new(&place).unwrap().slowdowns(&bursts[2..]);
    assert!(matches!(stopped, Err(ProbeError::Stopped)));
}

#[test]
fn a_stopped_probe_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let mut heard = 0;
    let result = probe(ProbeOptions {
        offload_dir: dir.path(),
        threads: 1,
        budget_bytes: ROOMY_BYTES,
        isa: Isa::detect(),
        scale: ProbeScale::Quick,
        command: "loadmaster probe",
        gpu: None,
        progress: &mut |_| {
            heard += 1;
            stop.store(true, Ordering::Relaxed);
        },
        stop: &stop,
    });
    assert!(matches!(result, Err(ProbeError::Stopped)), "{result:?}");
    assert!(heard > 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_budget_that_is_too_small_is_an_error_that_says_how_much_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let error = quick(dir.path(), &AtomicBool::new(false), 8 << 20).unwrap_err();
    assert!(matches!(error, ProbeError::Budget { .. }), "{error}");
    assert!(error.to_string().contains("--cpu-mem"), "{error}");
}

#[test]
fn the_default_budget_grows_with_the_threads_as_what_is_needed_does() {
    let needed_bytes = |threads| match room_within(0, threads, ProbeScale::Full.extent()) {
        Err(ProbeError::Budget { needed_bytes, .. }) => needed_bytes,
        other => panic!("nothing is no room: {other:?}"),
    };
    // Beside what other tests hold meanwhile, which comes and goes.
    let noise_bytes = 64 << 20;
    let more = default_budget_bytes(1024) - default_budget_bytes(2);
    let needed = needed_bytes(1024) - needed_bytes(2);
    assert!(more > 600 << 20 && more.abs_diff(needed) < noise_bytes);
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_no_place_to_probe() {
    let result = quick(
        Path::new("/dev/shm/x"),
        &AtomicBool::new(false),
        ROOMY_BYTES,
    );
    assert!(matches!(
        result,
        Err(ProbeError::Disk(DiskError::MemoryBacked { .. }))
    ));
    assert!(!Path::new("/dev/shm/x").exists());
}

#[test]
fn a_busy_machine_is_named_in_the_profile() {
    assert_eq!(provenance(Some(0.3), 2), "measured");
    assert_eq!(provenance(None, 2), "measured");
    assert!(provenance(Some(3.0), 2).contains("3.0 cores"));
}
