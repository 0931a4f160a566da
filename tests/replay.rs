//! One formula, one schedule: what the closed form predicts and what the real schedule takes on a clock
//! agree, in seconds and in bytes of every lane.

mod common;
#[path = "replay/drawn.rs"]
mod drawn;
#[path = "replay/noted.rs"]
mod noted;
#[path = "replay/order.rs"]
mod order;
#[path = "replay/races.rs"]
mod races;
mod running;
#[path = "replay/touched.rs"]
mod touched;

use common::t4;
use drawn::{Class, Drawn, drawn};
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
use running::policy::policy;
use running::round_profile;

fn both(
    size: &str,
    policy: &Policy,
    device: DeviceKind,
    workload: &Workload,
) -> (Figures, Figures) {
    let rates = Rates::new(&round_profile(), device, 2).expect("rates");
    priced(size, policy, (&rates, workload))
}

fn priced(
    size: &str,
    policy: &Policy,
    (rates, workload): (&Rates, &Workload),
) -> (Figures, Figures) {
    let model = named_size(size).expect("a known size");
    let input = EstimateInput {
        model: &model,
        workload,
        rates,
        policy,
        host: HostBytes::default(),
        budget: PerTier::default(),
    };
    let played = replay(&input).expect("small enough to replay");
    (estimate(&input), played)
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
                off < 3.0,
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
                    a == b || off_percent(a, b) < 3.0,
                    "{what}: {} {a} and {b} bytes",
                    lane.name()
                );
            }
        }
    }
}

/// Two batches of a small model meet a layer's weights one after the other: the second one finds them in the last cache.
#[test]
fn weights_in_the_cache_are_priced_alike_and_only_where_they_are_met_again() {
    let seconds = |size: &str, batches: usize, percent, cached: bool| {
        let mut profile = round_profile();
        if cached {
            profile.cpu.cache_bytes = 32 << 20;
            let parts = vec![(1, 0.25), (8, 0.5)];
            profile.cpu.gemm_cached.insert("f16".to_owned(), parts);
        }
        let rates = Rates::new(&profile, DeviceKind::Cpu, 2).expect("rates");
        let p = policy(percent, 1.0, (8 / batches, batches));
        let workload = Workload::uniform(8, 64, 32);
        let (closed, played) = priced(size, &p, (&rates, &workload));
        let off = off_percent(closed.decode_s, played.decode_s);
        assert!(off < 3.0, "{size}, {batches} batches: {off:.1} % apart");
        played.decode_s
    };
    let dram = [0.0, 100.0, 0.0, 100.0, 0.0, 100.0];
    let none = seconds("opt-125m", 4, dram, false);
    assert!(seconds("opt-125m", 4, dram, true) < 0.8 * none);
    // Of a layer three times as large as the cache a part is left, of one twelve times as large nothing.
    let ratio = seconds("opt-1.3b", 4, dram, true) / seconds("opt-1.3b", 4, dram, false);
    assert!((0.8..0.98).contains(&ratio), "{ratio}");
    for (size, batches) in [("opt-125m", 1), ("opt-6.7b", 4)] {
        let none = seconds(size, batches, dram, false);
        assert_eq!(seconds(size, batches, dram, true), none, "{size}");
    }
    // What comes from the disk is in no cache, but the second batch finds what the first one has met.
    let disk = [0.0, 0.0, 0.0, 100.0, 0.0, 100.0];
    assert!(seconds("opt-125m", 4, disk, true) <= seconds("opt-125m", 4, disk, false));
}

/// How far apart one drawn policy's figures are, in percent, and what it is.
fn apart(drawn: &Drawn) -> (f64, String) {
    let rates = Rates::new(&drawn.profile, drawn.device, drawn.policy.threads).expect("rates");
    let (closed, played) = priced(drawn.size, &drawn.policy, (&rates, &drawn.workload));
    let off = off_percent(closed.total_s, played.total_s);
    let (a, b) = (closed.total_s, played.total_s);
    (off, format!("{off:.1} %: {a:.3} s and {b:.3} s: {drawn}"))
}

/// What the classes mean, and why three of them are further apart, is in docs/measurements.md.
#[test]
fn drawn_policies_are_priced_alike_by_closed_form_and_replay() {
    let mut found: Vec<(Class, f64, String)> = drawn(20261124, 600)
        .iter()
        .map(|drawn| {
            let (off, what) = apart(drawn);
            (drawn.class(), off, what)
        })
        .collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (class, within, most) in [
        (Class::Plain, 0.95, 12.0),
        (Class::HiddenBesideWeights, 0.75, 25.0),
        (Class::UnlikeBatches, 0.75, 30.0),
        (Class::RowsBeside, 0.6, 35.0),
    ] {
        let of: Vec<_> = found.iter().filter(|f| f.0 == class).collect();
        let near = of.iter().filter(|f| f.1 <= 3.0).count() as f64 / of.len() as f64;
        let worst: Vec<&str> = of.iter().take(8).map(|f| f.2.as_str()).collect();
        println!(
            "{class:?}: {} policies, {:.1} % within 3 %, worst {}",
            of.len(),
            100.0 * near,
            worst[0]
        );
        assert!(
            of.len() >= 10,
            "{class:?} has been drawn {} times",
            of.len()
        );
        assert!(
            near >= within && of[0].1 <= most,
            "{class:?}: {near:.3} within 3 %; {}",
            worst.join("\n")
        );
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

/// Where the CPU attends as long as the GPU computes, the GPU has another batch meanwhile: a pass takes the longer of the
/// two, not both, in the schedule as in the formula.
#[test]
fn attention_on_the_cpu_is_overlapped_with_the_next_batch() {
    let rates = Rates::new(&t4(), DeviceKind::Cuda, 16).expect("rates");
    let of = |batches: usize, overlap: bool| {
        let p = Policy {
            kv: Dtype::F16,
            cpu_cache_compute: true,
            threads: 16,
            overlap,
            ..policy([100.0, 0.0, 0.0, 100.0, 100.0, 0.0], 0.0, (16, batches))
        };
        let work = Workload::uniform(16 * batches, 256, 16);
        let (closed, played) = priced("opt-6.7b", &p, (&rates, &work));
        let lanes = [Lane::GpuCompute, Lane::CpuCompute].map(|l| played.lanes[l].decode_s);
        let (longer, both) = (lanes[0].max(lanes[1]), lanes[0] + lanes[1]);
        assert!(longer < 0.65 * both, "one of them hardly counts: {lanes:?}");
        assert!(off_percent(closed.decode_s, played.decode_s) < 3.0);
        (played.decode_s / longer, played.decode_s / both)
    };
    for batches in [2, 3, 4] {
        let (of_longer, _) = of(batches, true);
        assert!(
            of_longer < 1.1,
            "{batches} batches: {of_longer} times the longer one"
        );
    }
    for (batches, overlap) in [(1, true), (2, false)] {
        let (_, of_both) = of(batches, overlap);
        assert!(
            of_both > 0.98,
            "{batches} batches, overlap {overlap}: {of_both} of the sum"
        );
    }
}
