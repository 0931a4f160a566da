//! What rates.rs prices, tried on profiles of known figures.

use super::*;
use crate::cost::load::Load;
use crate::profile::{
    LARGE_REQUEST_BYTES, MEMORY_SUFFIX, SMALL_REQUEST_BYTES, SMALL_REQUESTS, compiled_in,
};
use crate::units::MIB;

const F16: (Dtype, Arithmetic) = (Dtype::F16, Arithmetic::Fp32);

fn t4() -> HardwareProfile {
    HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap()
}

#[test]
fn gemm_passes_through_its_points_and_rises_with_rows() {
    let rates = Rates::new(&t4(), DeviceKind::Cuda, 16).unwrap();
    let at = |m| rates.gemm_s(Tier::Gpu, F16, m, 7168, 28672);
    assert!((at(1) - 1.6056e-3).abs() < 1e-9);
    assert!((at(512) - 6.4756e-3).abs() < 1e-9);
    assert!((at(1024) - 2.0 * at(512)).abs() < 1e-9);
    for m in 1..2000 {
        assert!(at(m) <= at(m + 1));
    }
    let half = rates.gemm_s(Tier::Gpu, F16, 8, 7168, 14336);
    assert!(
        (2.0 * half - at(8)).abs() < 1e-12,
        "bytes and FLOPs halve with the outputs"
    );
}

#[test]
fn fp32_activations_cost_a_gpu_a_product_for_each_part() {
    let rates = Rates::new(&t4(), DeviceKind::Cuda, 16).unwrap();
    let wide = |on, format, m| rates.products(on, (format, true), m);
    assert_eq!(wide(Tier::Gpu, Dtype::F16, 16.0), 1.0);
    assert_eq!(wide(Tier::Gpu, Dtype::F16, 17.0), 2.0);
    assert_eq!(wide(Tier::Gpu, Dtype::Bf16, 64.0), 3.0);
    assert_eq!(wide(Tier::Gpu, Dtype::F32, 64.0), 1.0);
    assert_eq!(wide(Tier::Cpu, Dtype::F16, 64.0), 1.0);
    assert_eq!(rates.products(Tier::Gpu, (Dtype::F16, false), 64.0), 1.0);
    let prompt = |on, wide| rates.prompt_format(on, (Dtype::F16, wide));
    assert_eq!(prompt(Tier::Gpu, true), Dtype::F32);
    assert_eq!(prompt(Tier::Gpu, false), Dtype::F16);
    assert_eq!(prompt(Tier::Cpu, true), Dtype::F16);
}

#[test]
fn a_gpu_is_handed_operations_while_it_works_and_a_cpu_is_not() {
    let device = |kind| Rates::new(&t4(), kind, 16).unwrap();
    let gpu = device(DeviceKind::Cuda);
    let launch_s = gpu.launch_s(Tier::Gpu);
    assert!(launch_s > 0.0);
    let of = |work_s| gpu.operations_s(Tier::Gpu, 10.0, work_s);
    assert_eq!(of(100.0 * launch_s), 100.0 * launch_s);
    assert_eq!(of(launch_s), 10.0 * launch_s);
    assert_eq!(gpu.apart_s(Tier::Gpu, 10.0), 0.0);
    for rates in [device(DeviceKind::Cpu), device(DeviceKind::Host), gpu] {
        let apart_s = 10.0 * rates.launch_s(Tier::Cpu);
        assert_eq!(rates.operations_s(Tier::Cpu, 10.0, 1.0), 1.0 + apart_s);
        assert_eq!(rates.apart_s(Tier::Cpu, 10.0), apart_s);
    }
}

#[test]
fn a_single_large_point_has_a_floor_of_reading_the_weights() {
    let mut profile = t4();
    let gpu = profile.gpu.as_mut().unwrap();
    gpu.gemm.get_mut("f16").unwrap().points = vec![(512, 7168, 28672, 6.4756e-3)];
    let rates = Rates::new(&profile, DeviceKind::Cuda, 16).unwrap();
    let bytes = 7168.0 * 28672.0 * 2.0;
    let one = rates.gemm_s(Tier::Gpu, F16, 1, 7168, 28672);
    assert!((one - bytes / 256e9).abs() < 1e-9);
}

#[test]
fn a_missing_format_is_never_faster_than_what_stands_in() {
    let mut profile = t4();
    profile.cpu.gemm.remove("q4");
    profile.cpu.attention.remove("q4");
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let gemm = |format| rates.gemm_s(Tier::Cpu, (format, Arithmetic::Fp32), 1, 7168, 28672);
    let narrow = (Dtype::F16, Arithmetic::Bf16);
    let narrow_s = rates.gemm_s(Tier::Cpu, narrow, 1, 7168, 28672);
    assert_eq!(narrow_s, gemm(Dtype::F16));
    assert_eq!(gemm(Dtype::Q4), gemm(Dtype::F16));
    assert_eq!(gemm(Dtype::Bf16), gemm(Dtype::F16));
    assert!((gemm(Dtype::F32) - 2.0 * gemm(Dtype::F16)).abs() < 1e-12);
    let attention = |format, kv_bytes| {
        let work = AttentionWork::Decode {
            kv_bytes,
            tokens: 1024.0,
            hidden: 4096.0,
        };
        rates.attention_s(Tier::Cpu, format, work)
    };
    assert!((attention(Dtype::Q4, 0.5625e9) - attention(Dtype::F16, 2e9)).abs() < 1e-9);
    profile.cpu.gemm.clear();
    let error = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap_err();
    assert!(error.to_string().contains("cpu.gemm"));
}

#[test]
fn copies_and_requests_follow_their_curves() {
    let rates = Rates::new(&t4(), DeviceKind::Cuda, 16).unwrap();
    let big = rates.link_s(Lane::CpuToGpu, 1.2e9, true);
    assert!((big - 0.1).abs() < 1e-9);
    assert!((rates.link_s(Lane::CpuToGpu, 1.2e9, false) - 0.2).abs() < 1e-9);
    let tiny = rates.link_s(Lane::CpuToGpu, 4.0, true);
    assert!((1e-5..1.01e-5).contains(&tiny), "latency first: {tiny}");
    assert_eq!(rates.link_s(Lane::DiskToCpu, 4.0, true), 0.0);
    assert!((rates.disk_read_s(1.6e9, 16e6) - 1.0).abs() < 1e-9);
    assert!(
        rates.disk_read_s(1.6e9, 4096.0) > 20.0,
        "small requests are slow"
    );
    assert!((rates.disk_write_s(1.3e9, 16e6, true) - 1.0).abs() < 1e-9);
    let host = Rates::new(&t4(), DeviceKind::Host, 16).unwrap();
    assert!((host.link_s(Lane::GpuToCpu, 25e9, false) - 1.0).abs() < 1e-9);
    let on = |tier| host.gemm_s(tier, F16, 4, 4096, 4096);
    assert_eq!(on(Tier::Gpu), on(Tier::Cpu), "the CPU plays the GPU");
}

#[test]
fn fewer_threads_calibration_and_contention() {
    let mut profile = t4();
    let seconds = |profile: &HardwareProfile, threads| {
        let rates = Rates::new(profile, DeviceKind::Cpu, threads).unwrap();
        rates.gemm_s(Tier::Cpu, F16, 64, 4096, 4096)
    };
    let all = seconds(&profile, 16);
    assert!((seconds(&profile, 4) - 4.0 * all).abs() < 1e-12);
    assert_eq!(seconds(&profile, 64), all);
    profile.calibration.terms.insert("gemm".into(), 1.5);
    assert!((seconds(&profile, 16) - 1.5 * all).abs() < 1e-12);
    profile.calibration.terms.insert("gemm.cpu".into(), 2.0);
    assert!((seconds(&profile, 16) - 2.0 * all).abs() < 1e-12);
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let compute = (Lane::CpuCompute, Load::default());
    let others = [Lane::DiskToCpu, Lane::CpuToGpu].map(|lane| (lane, Load::default()));
    let keep = rates.keep(compute, &others);
    assert!((keep - 0.95 * 0.85).abs() < 1e-12);
    assert_eq!(rates.keep(compute, &[compute]), 1.0);
    let small = "cpu_compute+disk_to_cpu_small".to_owned();
    profile.contention.insert(small, [0.55, 0.9]);
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let read = |bytes: f64| {
        let load = Load::of_disk(Lane::DiskToCpu, 0.0, (bytes, bytes));
        [(Lane::DiskToCpu, load)]
    };
    let beside = |bytes: f64| rates.keep(compute, &read(bytes));
    assert!((beside(64e6) - 0.95).abs() < 1e-12);
    assert!((beside(4096.0) - 0.55).abs() < 1e-12);
    let bound = format!("cpu_compute{MEMORY_SUFFIX}+disk_to_cpu");
    profile.contention.insert(bound, [0.75, 0.6]);
    let with = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let by_memory =
        |part: f64, bytes: f64| with.keep((Lane::CpuCompute, Load::computing(part)), &read(bytes));
    assert!((by_memory(1.0, 64e6) - 0.75).abs() < 1e-12);
    assert!((by_memory(0.5, 64e6) - 0.85).abs() < 1e-12);
    assert!(
        (by_memory(1.0, 4096.0) - 0.55).abs() < 1e-12,
        "as measured where it is easier"
    );
    assert!((with.memory_part(with.dram_read_bytes_per_s, 4.0) - 0.25).abs() < 1e-12);
    let middle = (LARGE_REQUEST_BYTES * SMALL_REQUEST_BYTES).sqrt();
    assert!((beside(middle) - 0.75).abs() < 1e-12);
    profile.contention.insert("disk".into(), [0.5, 0.5]);
    let error = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap_err();
    assert!(error.to_string().contains("\"disk\""));
}

/// What reads and writes keep beside each other in calls of so many requests of so many bytes.
fn beside(profile: &HardwareProfile, read: (f64, f64), write: (f64, f64)) -> [f64; 2] {
    let rates = Rates::new(profile, DeviceKind::Cpu, 16).unwrap();
    let load = |lane: Lane, (count, each): (f64, f64)| {
        let (bytes, block) = (count * each, each);
        let call_s = match lane {
            Lane::DiskToCpu => rates.disk_read_s(bytes, block),
            _ => rates.disk_write_s(bytes, block, false),
        };
        (lane, Load::of_disk(lane, call_s, (bytes, block)))
    };
    let (read, write) = (load(Lane::DiskToCpu, read), load(Lane::CpuToDisk, write));
    [rates.keep(read, &[write]), rates.keep(write, &[read])]
}

#[test]
fn a_write_waits_for_what_reads_have_in_flight() {
    let mut profile = t4();
    let (large, small) = (
        (1.0, LARGE_REQUEST_BYTES),
        (SMALL_REQUESTS as f64, SMALL_REQUEST_BYTES),
    );
    let close = |a: [f64; 2], b: [f64; 2]| {
        let near = (a[0] - b[0]).abs() < 1e-9 && (a[1] - b[1]).abs() < 1e-9;
        assert!(near, "{a:?} {b:?}");
    };
    close(beside(&profile, large, large), [0.6, 0.6]);
    for (pair, parts) in [
        ("disk_to_cpu+cpu_to_disk_small", [0.9, 0.1]),
        ("disk_to_cpu_small+cpu_to_disk_small", [0.7, 0.8]),
    ] {
        profile.contention.insert(pair.to_owned(), parts);
    }
    close(beside(&profile, large, large), [0.6, 0.6]);
    close(beside(&profile, large, small), [0.9, 0.1]);
    close(beside(&profile, small, small), [0.7, 0.8]);
    // Twice as much in flight is waited for twice as long; more than threads ask for makes no difference.
    let part = |of: f64| 1.0 / of - 1.0;
    let (one, two) = ((1.0, MIB as f64), (2.0, MIB as f64));
    let [_, behind_one] = beside(&profile, one, large);
    let [_, behind_two] = beside(&profile, two, large);
    assert!((part(behind_two) / part(behind_one) - 2.0).abs() < 0.1);
    let many = |count: f64| beside(&profile, (count, MIB as f64), large);
    close(many(4.0), many(8.0));
    profile.contention.clear();
    close(beside(&profile, large, large), [0.5, 0.5]);
}

#[test]
fn reads_and_writes_are_a_pair_in_either_order_and_unknown_kinds_are_errors() {
    let mut profile = t4();
    profile.contention.clear();
    let reversed = "cpu_to_disk+disk_to_cpu".to_owned();
    profile.contention.insert(reversed, [0.2, 0.9]);
    let large = (1.0, LARGE_REQUEST_BYTES);
    let [read, write] = beside(&profile, large, large);
    assert!((read - 0.9).abs() < 1e-9 && (write - 0.2).abs() < 1e-9);
    for unknown in [
        "cpu_compute_small+disk_to_cpu",
        "disk_to_cpu+cpu_compute_memory",
    ] {
        let mut profile = t4();
        profile.contention.insert(unknown.to_owned(), [0.5, 0.5]);
        let error = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap_err();
        assert!(error.to_string().contains(unknown), "{error}");
    }
}

#[test]
fn short_contexts_cost_what_was_measured_for_them() {
    let mut profile = t4();
    let table = profile.cpu.attention.get_mut("f16").unwrap();
    // A sequence takes 10 units and one a token.
    table.decode_by_tokens = vec![(1000, 1000.0 / 1010.0), (10, 0.5)];
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let seconds = |tokens: f64| {
        let work = AttentionWork::Decode {
            kv_bytes: tokens,
            tokens,
            hidden: 4096.0,
        };
        rates.attention_s(Tier::Cpu, Dtype::F16, work)
    };
    for tokens in [5.0, 10.0, 40.0, 1000.0] {
        assert!((seconds(tokens) - (10.0 + tokens)).abs() < 1e-9, "{tokens}");
    }
    assert!(
        (seconds(2000.0) - 2020.0).abs() < 1e-9,
        "by the last point's rate"
    );
}

#[test]
fn products_are_priced_by_size_and_aspect() {
    let mut profile = t4();
    let table = profile.cpu.gemm.get_mut("f16").unwrap();
    // A product takes 1 for each weight, 100 for each input and a million.
    let seconds = |i: usize, o: usize| (i * o + 100 * i + 1_000_000) as f64;
    let shapes = [(512, 2048), (2048, 512), (1024, 4096), (4096, 1024)];
    table.points = shapes.map(|(i, o)| (1, i, o, seconds(i, o))).into();
    profile.cpu.dram_read_bytes_per_s = 1e12;
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let off = |(i, o)| rates.gemm_s(Tier::Cpu, F16, 1, i, o) / seconds(i, o) - 1.0;
    // As measured; between two aspects; of fewer outputs than any.
    for shape in shapes
        .into_iter()
        .chain([(2048, 2048), (8192, 128), (16384, 256)])
    {
        assert!(off(shape).abs() < 1e-12, "{shape:?}: {}", off(shape));
    }
    // Between two sizes, and half of the smallest: its weights are fewer, its beginning and its end are not.
    for shape in [(768, 2304), (2304, 768), (512, 1024), (1024, 512)] {
        assert!(off(shape).abs() < 0.1, "{shape:?}: {}", off(shape));
    }
}

#[test]
fn short_keys_are_read_more_slowly() {
    let mut profile = t4();
    let table = profile.cpu.attention.get_mut("f16").unwrap();
    // A key takes 512 units and one a value.
    table.decode_by_hidden = vec![(512, 0.5), (2048, 0.8)];
    let rates = Rates::new(&profile, DeviceKind::Cpu, 16).unwrap();
    let seconds = |hidden: f64| {
        let work = AttentionWork::Decode {
            kv_bytes: 1e9,
            tokens: 64.0,
            hidden,
        };
        rates.attention_s(Tier::Cpu, Dtype::F16, work)
    };
    let against = |hidden: f64| (hidden + 512.0) / hidden / 1.25;
    for hidden in [512.0, 768.0, 1024.0, 2048.0] {
        let ratio = seconds(hidden) / seconds(2048.0);
        assert!(
            (ratio / against(hidden) - 1.0).abs() < 1e-9,
            "{hidden}: {ratio}"
        );
    }
    assert_eq!(seconds(7168.0), seconds(2048.0));
}

const Q4: (Dtype, Arithmetic) = (Dtype::Q4, Arithmetic::Fp32);

/// The T4's assumption as a rate: 2.5625 bytes a weight at 256 GB/s, of which 0.5625 are counted.
fn t4_that_widens() -> HardwareProfile {
    let mut profile = t4();
    let gpu = profile.gpu.as_mut().unwrap();
    gpu.widen_q4_bytes_per_s = vec![(1 << 20, 256e9 * 0.5625 / 2.5625)];
    profile
}

#[test]
fn widening_4_bit_weights_takes_as_long_for_any_number_of_rows() {
    let whole = Rates::new(&t4(), DeviceKind::Cuda, 16).unwrap();
    let parts = Rates::new(&t4_that_widens(), DeviceKind::Cuda, 16).unwrap();
    let at = |rates: &Rates, m| rates.gemm_s(Tier::Gpu, Q4, m, 7168, 28672);
    let widen_s = parts.widen_s(Tier::Gpu, 7168.0 * 28672.0);
    assert!((widen_s - 7168.0 * 28672.0 * 2.5625 / 256e9).abs() < 1e-9);
    for measured in [1, 16, 128, 512] {
        assert!((at(&whole, measured) - at(&parts, measured)).abs() < 1e-9);
    }
    // Beyond what was measured only the product grows.
    assert!((at(&parts, 1024) - (2.0 * at(&parts, 512) - widen_s)).abs() < 1e-9);
    assert!((at(&whole, 1024) - 2.0 * at(&whole, 512)).abs() < 1e-9);
    for m in 1..2000 {
        assert!(at(&parts, m) <= at(&parts, m + 1));
    }
    // Less than the smallest piece that was measured takes as long as that.
    let small_s = parts.widen_s(Tier::Gpu, 64.0 * 64.0);
    assert!((small_s - 1048576.0 / (256e9 * 0.5625 / 2.5625)).abs() < 1e-12);
    assert_eq!(parts.widen_s(Tier::Cpu, 4096.0), 0.0);
}

#[test]
fn fp16_products_stand_in_for_4_bit_ones_after_widening() {
    let mut profile = t4_that_widens();
    profile.gpu.as_mut().unwrap().gemm.remove("q4");
    let rates = Rates::new(&profile, DeviceKind::Cuda, 16).unwrap();
    let at = |stored, m| rates.gemm_s(Tier::Gpu, stored, m, 7168, 28672);
    let widen_s = rates.widen_s(Tier::Gpu, 7168.0 * 28672.0);
    for m in [17, 128, 512] {
        assert!((at(Q4, m) - at(F16, m) - widen_s).abs() < 1e-9, "{m}");
    }
    assert!((at(Q4, 16) - at(F16, 16)).abs() < 1e-12);
}

#[test]
fn a_rate_of_widening_must_be_positive() {
    let mut profile = t4_that_widens();
    assert!(HardwareProfile::from_toml(&profile.to_toml()).unwrap() == profile);
    profile.gpu.as_mut().unwrap().widen_q4_bytes_per_s[0].1 = 0.0;
    let error = HardwareProfile::from_toml(&profile.to_toml()).unwrap_err();
    assert!(
        error.to_string().contains("widen_q4_bytes_per_s"),
        "{error}"
    );
}
