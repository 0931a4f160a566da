//! The probe of a GPU, all of it but on smaller data: every figure that plans are priced with is there, and is one.
//! Libraries are found when a process starts: this test is another one, which it starts itself.

use crate::stand_in::Gpu;
use loadmaster::dtype::Dtype;
use loadmaster::machine::cpu::kernels::Isa;
use loadmaster::machine::cuda::{GpuChoice, presence};
use loadmaster::machine::os;
use loadmaster::probe::{GpuProbe, ProbeOptions, ProbeScale, probe};
use loadmaster::profile::{GemmCurve, GpuLink, HardwareProfile};
use loadmaster::units::{GIB, MIB};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

/// Told where to write, the test probes.
const INSIDE: &str = "LOADMASTER_TEST_PROBES_IN";

#[test]
fn a_gpu_is_measured_in_every_figure() {
    if let Some(dir) = std::env::var_os(INSIDE) {
        return is_whole(&measured(Path::new(&dir)));
    }
    let Some(gpu) = Gpu::new() else { return };
    // An old one, too.
    for without_bf16 in ["0", "1"] {
        probed(&gpu.with(&[(NO_BF16, without_bf16)]));
    }
}

/// Of what cuBLAS may refuse.
const NO_BF16: &str = "FAKE_CUBLAS_NO_BF16";

/// In a process of its own.
fn probed(gpu: &Gpu) {
    let log = gpu.home.path("log.txt");
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    gpu.beside(&mut command);
    command
        .args(["--exact", "probe::a_gpu_is_measured_in_every_figure"])
        .env(INSIDE, &gpu.home.dir)
        .env("FAKE_CUDA_LOG", &log);
    let output = command.output().expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
    // What was timed is what runs launch.
    let books = gpu.home.read("log.txt");
    for format in ["f32", "f16", "q4"] {
        assert!(books.contains(&format!("launch attend_decode_{format} ")));
        assert!(books.contains(&format!("launch gemm_small_{format}_1 ")));
    }
    for name in [
        "launch attend_prefill_mma_f16_128 ",
        "launch append_q4 ",
        "launch dequantise_q4_f16 ",
        "launch copy_table ",
        "products ",
        "copy up ",
        "copy down ",
    ] {
        assert!(books.contains(name), "no {name}: {books}");
    }
}

pub fn measured(dir: &Path) -> HardwareProfile {
    let facts = presence::find_gpu(0).expect("the emulated one");
    let choice = GpuChoice {
        index: 0,
        kernel_cache: dir.join("kernels"),
    };
    let options = ProbeOptions {
        offload_dir: dir,
        threads: os::default_threads(),
        budget_bytes: GIB,
        isa: Isa::detect(),
        scale: ProbeScale::Quick,
        command: "a test",
        gpu: Some(GpuProbe { facts, choice }),
        progress: &mut |_| {},
        stop: &AtomicBool::new(false),
    };
    probe(options).expect("measured")
}

fn is_whole(profile: &HardwareProfile) {
    let gpu = profile.gpu.as_ref().expect("a GPU");
    assert_eq!((gpu.name.as_str(), gpu.total_bytes), ("Emulated GPU", GIB));
    // What the stand-in driver takes for its context, and cuBLAS for its handle: the arena is not counted.
    assert_eq!(gpu.context_bytes, 72 * MIB);
    assert!(gpu.host_bytes > 0 && gpu.host_bytes < GIB);
    assert!(gpu.copy_bytes_per_s > 0.0);
    assert!(gpu.launch_s > 0.0 && gpu.launch_s < 0.05);
    grows(&gpu.widen_q4_bytes_per_s, 2, "widening");
    let quantise = gpu.quantise.expect("rates");
    assert!(quantise.pack_bytes_per_s > 0.0 && quantise.append_bytes_per_s > 0.0);
    let refused = std::env::var(NO_BF16).is_ok_and(|told| told == "1");
    assert_eq!(gpu.gemm.len(), if refused { 3 } else { 4 });
    let seconds = gpu.gemm.iter().map(|(name, curve)| products(curve, name));
    let seconds: Vec<_> = seconds.collect();
    let [small, large] = [0, 1].map(|shape| seconds.iter().map(|s| s[shape]).sum::<f64>());
    assert!(small < large, "a matrix four times as large: {seconds:?}");
    for format in [Dtype::F16, Dtype::F32, Dtype::Q4] {
        let rates = &gpu.attention[format.name()];
        assert!(rates.decode_bytes_per_s > 0.0 && rates.prefill_flop_per_s > 0.0);
    }
    link(&profile.links.cpu_to_gpu, "up");
    link(&profile.links.gpu_to_cpu, "down");
    for compute in ["gpu_compute", "cpu_compute"] {
        for lane in ["cpu_to_gpu", "gpu_to_cpu"] {
            let keeps = profile.contention[&format!("{compute}+{lane}")];
            assert!(keeps.iter().all(|&keep| keep > 0.0 && keep <= 1.0));
        }
    }
}

/// Rates over bytes that grow, each a number.
fn grows(points: &[(u64, f64)], least: usize, what: &str) {
    assert!(points.len() >= least, "{what}: {points:?}");
    assert!(points.is_sorted_by(|a, b| a.0 < b.0), "{what}: {points:?}");
    let is_rate = |p: &(u64, f64)| p.1 > 0.0 && p.1.is_finite();
    assert!(points.iter().all(is_rate), "{what}: {points:?}");
}

/// Three counts of rows, few and many, of two matrices; the seconds of each matrix.
fn products(curve: &GemmCurve, what: &str) -> [f64; 2] {
    let points = &curve.points;
    let shapes: Vec<_> = points.chunk_by(|a, b| (a.1, a.2) == (b.1, b.2)).collect();
    let [small, large] = shapes[..] else {
        panic!("{what}: {shapes:?}")
    };
    for points in [small, large] {
        assert_eq!(points.len(), 3, "{what}: {points:?}");
        assert!(points.is_sorted_by(|a, b| a.0 < b.0), "{what}: {points:?}");
        assert!(points.iter().all(|p| p.3 > 0.0), "{what}: {points:?}");
    }
    [small, large].map(|points| points.iter().map(|p| p.3).sum())
}

fn link(link: &Option<GpuLink>, what: &str) {
    let link = link.as_ref().expect(what);
    assert!(link.latency_s > 0.0 && link.latency_s < 0.05, "{what}");
    for points in [&link.pinned, &link.unpinned] {
        grows(points, 4, what);
        let seconds = |(bytes, rate): (u64, f64)| bytes as f64 / rate;
        // 64 KiB and 16 MiB.
        assert!(
            seconds(points[0]) < seconds(points[3]),
            "{what}: {points:?}"
        );
    }
    let both = link.both_directions_pct;
    assert!(both > 0.0 && both <= 100.0, "{what}: {both}");
}
