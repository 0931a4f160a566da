//! Every figure that a probe takes of a GPU is priced: where it is worse, some policy takes longer or holds more,
//! and none takes less.

use crate::common::planning::HOST;
use crate::common::{opt_1_3b, t4};
use crate::policy::policy;
use loadmaster::cost::estimate::{EstimateInput, estimate};
use loadmaster::cost::footprint::Buffer;
use loadmaster::cost::locks::Unlocked;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::model::ModelSpec;
use loadmaster::policy::{DeviceKind, Policy, Shares};
use loadmaster::profile::{GpuFacts, GpuLink, HardwareProfile, QuantiseRates};
use loadmaster::tier::{Lane, PerTier, Tier};
use loadmaster::workload::Workload;

/// The T4's profile with the figures that its sources do not tell.
fn whole() -> HardwareProfile {
    let mut profile = t4();
    let gpu = profile.gpu.as_mut().expect("a GPU");
    gpu.host_bytes = 1 << 28;
    gpu.widen_q4_bytes_per_s = vec![(1 << 20, 50e9)];
    for format in ["f32", "bf16"] {
        let of_f16 = gpu.gemm["f16"].clone();
        gpu.gemm.insert(format.to_owned(), of_f16);
    }
    let of_f16 = gpu.attention["f16"].clone();
    gpu.attention.insert("f32".into(), of_f16);
    for pair in ["gpu_compute+cpu_to_gpu", "gpu_compute+gpu_to_cpu"] {
        profile.contention.insert(pair.to_owned(), [0.9, 0.9]);
    }
    profile
}

type Worse = (String, Box<dyn Fn(&mut HardwareProfile)>);

fn gpu(name: &str, worse: impl Fn(&mut GpuFacts) + 'static) -> Worse {
    let change = move |p: &mut HardwareProfile| worse(p.gpu.as_mut().expect("a GPU"));
    (name.to_owned(), Box::new(change))
}

fn quarter(points: &mut [(u64, f64)]) {
    points.iter_mut().for_each(|point| point.1 /= 4.0);
}

/// All of them, each four times as bad.
fn worse() -> Vec<Worse> {
    let mut all = vec![
        gpu("context_bytes", |g| g.context_bytes *= 4),
        gpu("host_bytes", |g| g.host_bytes *= 4),
        gpu("copy_bytes_per_s", |g| g.copy_bytes_per_s /= 4.0),
        gpu("launch_s", |g| g.launch_s *= 4.0),
        gpu("widen", |g| quarter(&mut g.widen_q4_bytes_per_s)),
        gpu("quantise.append", |g| {
            let rates = g.quantise.expect("rates");
            g.quantise = Some(QuantiseRates {
                append_bytes_per_s: rates.append_bytes_per_s / 4.0,
                ..rates
            });
        }),
    ];
    for format in ["f16", "bf16", "f32", "q4"] {
        all.push(gpu(&format!("gemm.{format}"), move |g| {
            let curve = g.gemm.get_mut(format).expect("a curve");
            curve.points.iter_mut().for_each(|point| point.3 *= 4.0);
        }));
    }
    for format in ["f16", "f32", "q4"] {
        all.push(gpu(&format!("attention.{format}.decode"), move |g| {
            let rates = g.attention.get_mut(format).expect("rates");
            rates.decode_bytes_per_s /= 4.0;
        }));
        all.push(gpu(&format!("attention.{format}.prefill"), move |g| {
            let rates = g.attention.get_mut(format).expect("rates");
            rates.prefill_flop_per_s /= 4.0;
        }));
    }
    all.extend(worse_links());
    for pair in [
        "gpu_compute+cpu_to_gpu",
        "gpu_compute+gpu_to_cpu",
        "cpu_compute+cpu_to_gpu",
        "cpu_compute+gpu_to_cpu",
    ] {
        let change = move |p: &mut HardwareProfile| {
            let keeps = p.contention.get_mut(pair).expect("a pair");
            *keeps = keeps.map(|keep| keep / 4.0);
        };
        all.push((pair.to_owned(), Box::new(change)));
    }
    all
}

type LinkChange = (&'static str, fn(&mut GpuLink));

fn worse_links() -> Vec<Worse> {
    let changes: [LinkChange; 4] = [
        ("latency_s", |link| link.latency_s *= 4.0),
        ("pinned", |link| quarter(&mut link.pinned)),
        ("unpinned", |link| quarter(&mut link.unpinned)),
        ("both_directions_pct", |link| {
            link.both_directions_pct /= 4.0
        }),
    ];
    let one = |(name, change): LinkChange, up: bool| -> Worse {
        let of = move |p: &mut HardwareProfile| {
            let link = match up {
                true => p.links.cpu_to_gpu.as_mut(),
                false => p.links.gpu_to_cpu.as_mut(),
            };
            change(link.expect("a link"));
        };
        let direction = if up { "cpu_to_gpu" } else { "gpu_to_cpu" };
        (format!("{direction}.{name}"), Box::new(of))
    };
    let both = changes.into_iter();
    both.flat_map(|change| [true, false].map(|up| one(change, up)))
        .collect()
}

/// A model and how it is run.
struct Case {
    model: ModelSpec,
    policy: Policy,
    unlocked: Vec<Buffer>,
}

impl Case {
    fn new(percent: [f64; 6], dtype: Dtype, batch: (usize, usize)) -> Case {
        Case {
            model: ModelSpec {
                dtype,
                ..opt_1_3b()
            },
            policy: Policy {
                kv: Dtype::F16,
                threads: 16,
                ..policy(percent, 0.0, batch)
            },
            unlocked: Vec::new(),
        }
    }

    /// Seconds, those in which lanes are busy, and bytes on the GPU and in DRAM.
    fn price(&self, profile: &HardwareProfile) -> [f64; 4] {
        let rates = Rates::new(profile, DeviceKind::Cuda, 16).expect("rates");
        let rates = rates.with_unlocked(Unlocked(self.unlocked.clone()));
        let workload = Workload::uniform(self.policy.slots(), 256, 16);
        let figures = estimate(&EstimateInput {
            model: &self.model,
            workload: &workload,
            rates: &rates,
            policy: &self.policy,
            host: HOST.with_gpu(DeviceKind::Cuda, profile.gpu.as_ref()),
            budget: PerTier::default(),
        });
        let bytes = [Tier::Gpu, Tier::Cpu].map(|tier| figures.tiers[tier].peak_bytes as f64);
        let busy_s: f64 = Lane::ALL
            .map(|lane| figures.lanes[lane].busy_s())
            .iter()
            .sum();
        [figures.total_s, busy_s, bytes[0], bytes[1]]
    }
}

fn cases() -> Vec<Case> {
    let resident = [100.0, 0.0, 100.0, 0.0, 100.0, 0.0];
    let weights = [0.0, 100.0, 100.0, 0.0, 100.0, 0.0];
    let cache = [100.0, 0.0, 0.0, 100.0, 0.0, 100.0];
    let of = |percent, dtype, batch, change: fn(&mut Policy)| {
        let mut case = Case::new(percent, dtype, batch);
        change(&mut case.policy);
        case
    };
    let plain: fn(&mut Policy) = |_| {};
    vec![
        of(resident, Dtype::F16, (32, 1), plain),
        of(resident, Dtype::Bf16, (32, 1), plain),
        of(resident, Dtype::F32, (32, 1), |p| p.kv = Dtype::F32),
        of(resident, Dtype::F16, (32, 1), |p| {
            (p.compress_weight, p.compress_cache) = (true, true);
        }),
        of(weights, Dtype::F16, (2, 1), plain),
        of(weights, Dtype::F16, (2, 1), |p| p.pin_weight = false),
        of(cache, Dtype::F16, (8, 4), plain),
        Case {
            unlocked: vec![Buffer::Cache, Buffer::Hidden],
            ..of(cache, Dtype::F16, (8, 4), plain)
        },
        of(cache, Dtype::F16, (8, 4), |p| p.cpu_cache_compute = true),
        of(
            [0.0, 100.0, 100.0, 0.0, 0.0, 100.0],
            Dtype::F16,
            (32, 2),
            plain,
        ),
        of(weights, Dtype::F16, (8, 2), |p| {
            p.shares = Shares::from_percent([0.0, 100.0, 100.0, 0.0, 0.0, 100.0], 1.0)
                .expect("percentages");
        }),
        of(weights, Dtype::F16, (8, 2), |p| {
            p.shares = Shares::from_percent([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 0.5)
                .expect("percentages");
        }),
    ]
}

#[test]
fn every_figure_of_a_gpu_is_priced() {
    let cases = cases();
    let base = whole();
    let priced: Vec<[f64; 4]> = cases.iter().map(|case| case.price(&base)).collect();
    let mut unpriced = Vec::new();
    for (name, change) in worse() {
        let mut profile = base.clone();
        change(&mut profile);
        let mut noticed = false;
        for (case, before) in cases.iter().zip(&priced) {
            for (now, before) in case.price(&profile).into_iter().zip(before) {
                assert!(now >= before * (1.0 - 1e-9), "{name}: {now} after {before}");
                noticed |= now > before * (1.0 + 1e-6);
            }
        }
        if !noticed {
            unpriced.push(name);
        }
    }
    assert!(unpriced.is_empty(), "not priced: {unpriced:?}");
}
