//! One formula, one schedule: what the closed form predicts and what the real schedule takes on a clock
//! agree, in seconds and in bytes of every lane.

mod running;

use loadmaster::cost::estimate::{EstimateInput, estimate};
use loadmaster::cost::figures::Figures;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::replay::replay;
use loadmaster::model::families::named_size;
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::tier::{Lane, PerTier};
use loadmaster::workload::Workload;
use running::{policy, round_profile};

fn both(
    size: &str,
    policy: &Policy,
    device: DeviceKind,
    workload: &Workload,
) -> (Figures, Figures) {
    let model = named_size(size).expect("a known size");
    let rates = Rates::new(&round_profile(), device, 2).expect("rates");
    let (host, budget) = (HostBytes::default(), PerTier::default());
    let input = EstimateInput {
        model: &model,
        workload,
        rates: &rates,
        policy,
        host,
        budget,
    };
    (
        estimate(&input),
        replay(&input).expect("small enough to replay"),
    )
}

fn off_percent(a: f64, b: f64) -> f64 {
    100.0 * (a - b).abs() / b
}

#[test]
fn closed_form_and_replay_agree() {
    let dram = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0];
    let half = [0.0, 50.0, 0.0, 100.0, 0.0, 100.0];
    let disk = [0.0, 10.0, 0.0, 0.0, 0.0, 100.0];
    for (size, percent, sequences, prompt, generated) in [
        ("opt-125m", dram, 8, 64, 16),
        ("opt-1.3b", dram, 8, 128, 8),
        ("opt-1.3b", half, 16, 128, 8),
        ("opt-1.3b", half, 1, 32, 8),
        ("opt-6.7b", half, 32, 64, 8),
        ("opt-1.3b", disk, 16, 256, 8),
    ] {
        for overlap in [true, false] {
            let p = Policy {
                kv: Dtype::F16,
                overlap,
                cpu_cache_compute: true,
                ..policy(percent, 1.0, (sequences, 1))
            };
            let work = Workload::uniform(sequences, prompt, generated);
            let (closed, played) = both(size, &p, DeviceKind::Cpu, &work);
            let what = format!(
                "{size} {percent:?} {sequences} x {prompt} + {generated}, overlap {overlap}"
            );
            let off = off_percent(closed.total_s, played.total_s);
            assert!(
                off < 12.5,
                "{what}: {} s and {} s, {off:.1} % apart",
                closed.total_s,
                played.total_s
            );
            for lane in Lane::ALL {
                let (a, b) = (
                    closed.lanes[lane].bytes as f64,
                    played.lanes[lane].bytes as f64,
                );
                assert!(
                    a == b || off_percent(a, b) < 5.0,
                    "{what}: {} {a} and {b} bytes",
                    lane.name()
                );
            }
        }
    }
}

#[test]
fn sampled_passes_stand_for_the_whole_job() {
    let p = Policy {
        kv: Dtype::F16,
        cpu_cache_compute: true,
        ..policy([0.0, 50.0, 0.0, 50.0, 0.0, 100.0], 1.0, (16, 1))
    };
    // One job small enough to be run whole on the clock, and one ten times as long that is sampled.
    let short = both(
        "opt-1.3b",
        &p,
        DeviceKind::Cpu,
        &Workload::uniform(16, 64, 16),
    )
    .1;
    let long = both(
        "opt-1.3b",
        &p,
        DeviceKind::Cpu,
        &Workload::uniform(160, 64, 16),
    )
    .1;
    let off = off_percent(long.total_s, 10.0 * short.total_s);
    assert!(
        off < 2.0,
        "{} s and ten times {} s",
        long.total_s,
        short.total_s
    );
}
