//! Rows that the CPU multiplies where they lie, beside a GPU: worth it for few sequences wherever DRAM is faster than
//! the link, and left alone for many.

use crate::common::opt_6_7b;
use crate::common::planning::{Setting, on_t4, throughput};
use loadmaster::plan::Plan;
use loadmaster::planner::{CompressMode, plan};
use loadmaster::units::GIB;
use loadmaster::workload::Workload;

/// DRAM is this many times as fast as the link up.
fn setting(times: f64, sequences: usize) -> Setting {
    let mut setting = on_t4(opt_6_7b(), 64 * GIB, Workload::uniform(sequences, 64, 32));
    setting.budget.gpu_bytes = Some(6 * GIB);
    let dram = setting.profile.cpu.dram_read_bytes_per_s;
    let up = setting.profile.links.cpu_to_gpu.as_mut().expect("a link");
    let fastest = up.pinned.iter().map(|p| p.1).fold(0.0, f64::max);
    for point in up.pinned.iter_mut().chain(&mut up.unpinned) {
        point.1 *= dram / times / fastest;
    }
    setting
}

fn planned(setting: &Setting, cpu_compute_share: Option<f64>) -> Plan {
    let mut request = setting.request();
    request.compress = CompressMode::Never;
    request.explain = false;
    request.fixed.cpu_compute_share = cpu_compute_share;
    plan(&request).unwrap()
}

fn multiplied_in_dram(plan: &Plan) -> u64 {
    plan.placement.as_ref().unwrap().weight_bytes.cpu_compute
}

#[test]
fn few_sequences_are_faster_with_the_cpu_wherever_dram_is_faster_than_the_link() {
    for (times, sequences, least) in [
        (1.25, 1, 1.05),
        (1.5, 1, 1.1),
        (2.0, 1, 1.2),
        (2.0, 4, 1.1),
        (4.0, 1, 1.5),
        (4.0, 8, 1.2),
        (8.0, 1, 2.0),
    ] {
        let setting = setting(times, sequences);
        let (free, shipped) = (planned(&setting, None), planned(&setting, Some(0.0)));
        let gain = throughput(&free) / throughput(&shipped);
        println!("DRAM {times} times the link, {sequences} sequences: {gain:.2}");
        assert!(
            multiplied_in_dram(&free) > 0 && gain > least,
            "{times} {sequences}: {gain}"
        );
    }
}

#[test]
fn many_sequences_are_shipped_to_and_the_cpu_would_only_slow_them() {
    for times in [1.25, 2.0, 5.0] {
        let setting = setting(times, 512);
        let (free, forced) = (planned(&setting, None), planned(&setting, Some(0.5)));
        assert_eq!(multiplied_in_dram(&free), 0, "{times}");
        assert!(throughput(&forced) < throughput(&free), "{times}");
    }
}
