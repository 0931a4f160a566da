//! Measures a GPU through the lanes that a run uses: links both ways, products, attention, memory, the
//! start of an operation, and what copies and arithmetic cost each other. Seconds are the device's own.

use super::ProbeError;
use super::gpu_work::{self as work, Room, Task};
use super::samples::{Series, tidy};
use super::scale::GpuExtent;
use crate::cost::rates::Rates;
use crate::dtype::Dtype;
use crate::machine::cuda::{self, DeviceFacts, GpuChoice};
use crate::machine::price::Pricer;
use crate::machine::threaded::{OpenRequest, ThreadedMachine};
use crate::machine::{Fences, Machine, nvml, os};
use crate::policy::DeviceKind;
use crate::profile::{
    AttentionRates, GemmCurve, GpuFacts, GpuLink, HardwareProfile, QuantiseRates,
};
use crate::tier::{Lane, PerLane};
use crate::units::MIB;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The GPU to measure.
#[derive(Clone, Debug)]
pub struct GpuProbe {
    pub facts: DeviceFacts,
    pub choice: GpuChoice,
}

/// What is expected to take longer than this once is left out: its smaller neighbours stand for it.
const LONG_S: f64 = 0.5;

/// Adds the GPU and its links to a profile.
pub fn measure(
    profile: &mut HardwareProfile,
    probe: &GpuProbe,
    (threads, extent): (usize, &'static GpuExtent),
    (progress, stop): (&mut dyn FnMut(&str), &AtomicBool),
) -> Result<(), ProbeError> {
    progress(&format!("measuring {}", probe.facts.name));
    let before = Held::before(&probe.facts.bus_id);
    let free = before.device_free.unwrap_or(probe.facts.total_bytes);
    let room = Room::within((free, probe.facts.l2_bytes), extent);
    let request = OpenRequest {
        device: DeviceKind::Cuda,
        gpu_bytes: room.places().arena_bytes,
        cpu_bytes: room.cpu_bytes(),
        threads,
        files: Vec::new(),
        pricer: Pricer::new(Rates::new(profile, DeviceKind::Cpu, threads)?),
        gpu: Some((probe.choice.clone(), room.places())),
    };
    let mut meter = Meter {
        machine: ThreadedMachine::open(request)?,
        room,
        stop,
        turns: PerLane::default(),
    };
    meter.fill()?;
    let memory = meter.memory()?;
    let mut gpu = GpuFacts {
        name: probe.facts.name.clone(),
        total_bytes: probe.facts.total_bytes,
        context_bytes: 0,
        host_bytes: 0,
        copy_bytes_per_s: memory,
        launch_s: meter.launch()?,
        widen_q4_bytes_per_s: meter.widening()?,
        gemm: meter.products()?,
        attention: meter.attention()?,
        quantise: None,
    };
    gpu.quantise = Some(QuantiseRates {
        pack_bytes_per_s: memory,
        append_bytes_per_s: meter.append()?,
    });
    meter.links(profile)?;
    meter.contention(profile)?;
    // Last: libraries load some of their kernels when these are first used.
    let after = Held::now(&probe.facts.bus_id);
    gpu.context_bytes = after.context_bytes(&before, meter.room.places().arena_bytes);
    let host_bytes = after.host_bytes(&before, meter.room.cpu_bytes());
    gpu.host_bytes = host_bytes.max(cuda::opening_bytes());
    profile.gpu = Some(gpu);
    Ok(())
}

/// Memory at one moment.
struct Held {
    device_free: Option<u64>,
    resident: u64,
}

/// Where nobody tells what is free: more than any context was seen to take.
const CONTEXT_BYTES: u64 = 600 * MIB;

impl Held {
    /// Before the machine is opened. Of the device as if no machine had ever been: the context of an earlier one may
    /// be there still, and counts as this one's.
    fn before(bus_id: &str) -> Held {
        Held {
            device_free: nvml::free_without_this_process(bus_id),
            ..Held::now(bus_id)
        }
    }

    fn now(bus_id: &str) -> Held {
        Held {
            device_free: nvml::gpu(Some(bus_id)).map(|gpu| gpu.free_bytes),
            resident: os::process_memory().map_or(0, |m| m.resident_bytes),
        }
    }

    /// Device memory beside the arena: context, libraries, kernels.
    fn context_bytes(&self, before: &Held, arena_bytes: u64) -> u64 {
        match (self.device_free, before.device_free) {
            (Some(now), Some(then)) => then.saturating_sub(now).saturating_sub(arena_bytes),
            _ => CONTEXT_BYTES,
        }
    }

    /// DRAM beside the arena that this process has gained.
    fn host_bytes(&self, before: &Held, arena_bytes: u64) -> u64 {
        let gained = self.resident.saturating_sub(before.resident);
        gained.saturating_sub(arena_bytes)
    }
}

/// Runs tasks on the machine and times them.
struct Meter<'a> {
    machine: ThreadedMachine,
    room: Room,
    stop: &'a AtomicBool,
    /// Operations that were begun.
    turns: PerLane<u64>,
}

/// What is put into the arenas at once.
const FILLING_BYTES: u64 = 4 * MIB;

impl Meter<'_> {
    /// Numbers everywhere: hardware may be faster, and clocks higher, with zeros.
    fn fill(&mut self) -> Result<(), ProbeError> {
        let numbers = work::numbers(FILLING_BYTES);
        for (tier, region) in self.room.measured() {
            let end = region.offset + region.bytes;
            for offset in (region.offset..end).step_by(FILLING_BYTES as usize) {
                let bytes = FILLING_BYTES.min(end - offset) as usize;
                self.machine.put(tier, offset, &numbers[..bytes])?;
            }
        }
        Ok(())
    }

    /// Begins a task once more.
    fn submit(&mut self, task: &Task) {
        let op = task.turn(self.turns[task.lane]);
        self.turns[task.lane] += 1;
        self.machine.submit(task.lane, op, &Fences::none());
    }

    /// Seconds that `lane` was busy with `repeats` of a task.
    fn busy(&mut self, task: &Task, repeats: usize) -> Result<f64, ProbeError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(ProbeError::Stopped);
        }
        let busy = |m: &ThreadedMachine| {
            let figures = m.lane_figures()[task.lane];
            figures.prefill_s + figures.decode_s
        };
        let before = busy(&self.machine);
        for _ in 0..repeats {
            self.submit(task);
        }
        let all = self.machine.submitted();
        self.machine.wait(&all)?;
        Ok(busy(&self.machine) - before)
    }

    /// Median seconds of one run of a task; the first run, which may load code, does not count.
    fn seconds(&mut self, task: &Task) -> Result<f64, ProbeError> {
        let extent = self.room.extent;
        self.busy(task, 1)?;
        let once = self.busy(task, 1)?.max(1e-7);
        let repeats = ((extent.sample_s / once) as usize).clamp(1, extent.most_repeats);
        let rounds = match once > extent.sample_s {
            true => extent.rounds.min(2),
            false => extent.rounds,
        };
        let mut series = Series::default();
        for _ in 0..rounds {
            series.push(self.busy(task, repeats)? / repeats as f64);
        }
        Ok(series.median().unwrap_or(once).max(1e-8))
    }

    /// Bytes per second of rows copied within device memory, read and written.
    fn memory(&mut self) -> Result<f64, ProbeError> {
        let (task, bytes) = work::gather(&self.room);
        Ok(tidy(2.0 * bytes as f64 / self.seconds(&task)?))
    }

    /// Wall seconds from submitting to finishing, per operation, over many that do next to nothing.
    fn launch(&mut self) -> Result<f64, ProbeError> {
        let task = work::nothing(&self.room);
        let launches = self.room.extent.launches;
        self.busy(&task, launches)?;
        let mut series = Series::default();
        for _ in 0..self.room.extent.rounds {
            let start = Instant::now();
            self.busy(&task, launches)?;
            series.push(start.elapsed().as_secs_f64() / launches as f64);
        }
        Ok(tidy(series.median().unwrap_or(0.0).max(1e-7)))
    }

    fn products(&mut self) -> Result<BTreeMap<String, GemmCurve>, ProbeError> {
        let mut curves = BTreeMap::new();
        for format in [Dtype::F16, Dtype::Q4, Dtype::Bf16, Dtype::F32] {
            // Another format stands in for one that the GPU is too old for.
            if !self.machine.multiplies(format) {
                continue;
            }
            let mut points = Vec::new();
            for &(inputs, outputs) in self.room.extent.gemm_shapes {
                let mut last = None;
                for &rows in self.room.extent.gemm_rows {
                    let long = |(m, s): (usize, f64)| s * rows as f64 / m as f64 > LONG_S;
                    let shape = (rows, inputs, outputs);
                    let Some(task) = work::product(&self.room, format, shape) else {
                        break;
                    };
                    if last.is_some_and(long) {
                        break;
                    }
                    let seconds = self.seconds(&task)?;
                    last = Some((rows, seconds));
                    points.push((rows, inputs, outputs, tidy(seconds)));
                }
                if last.is_some_and(|(_, s)| s > LONG_S) {
                    break;
                }
            }
            curves.insert(format.name().to_owned(), GemmCurve { points });
        }
        Ok(curves)
    }

    /// 4-bit bytes per second to fp16, by how many there are.
    fn widening(&mut self) -> Result<Vec<(u64, f64)>, ProbeError> {
        let mut curve = Vec::new();
        for &(inputs, outputs) in self.room.extent.gemm_shapes {
            let Some((task, bytes)) = work::widen(&self.room, (inputs, outputs)) else {
                break;
            };
            curve.push((bytes, tidy(bytes as f64 / self.seconds(&task)?)));
        }
        Ok(curve)
    }

    fn attention(&mut self) -> Result<BTreeMap<String, AttentionRates>, ProbeError> {
        let mut rates = BTreeMap::new();
        for format in [Dtype::F16, Dtype::F32, Dtype::Q4] {
            let (decode, bytes) = work::decode(&self.room, format);
            let decode_s = self.seconds(&decode)?;
            let (prefill, flop) = work::prefill(&self.room, format);
            let prefill_s = self.seconds(&prefill)?;
            let of_format = AttentionRates {
                decode_bytes_per_s: tidy(bytes as f64 / decode_s),
                prefill_flop_per_s: tidy(flop / prefill_s),
                ..AttentionRates::default()
            };
            rates.insert(format.name().to_owned(), of_format);
        }
        Ok(rates)
    }

    /// Bytes of fp32 keys and values turned into 4 bits per second.
    fn append(&mut self) -> Result<f64, ProbeError> {
        let (task, bytes) = work::append(&self.room);
        Ok(tidy(bytes as f64 / self.seconds(&task)?))
    }

    fn links(&mut self, profile: &mut HardwareProfile) -> Result<(), ProbeError> {
        let both = self.both_directions()?;
        let mut link = |lane: Lane, percent: f64| -> Result<GpuLink, ProbeError> {
            let smallest = work::copy(&self.room, lane, (64, true));
            let latency_s = self.seconds(&smallest)?;
            let most = self.room.link_bytes;
            let mut curves = [Vec::new(), Vec::new()];
            for (curve, pinned) in curves.iter_mut().zip([true, false]) {
                let sizes = self.room.extent.link_bytes.iter().copied();
                for bytes in sizes.filter(|&b| b <= most) {
                    let task = work::copy(&self.room, lane, (bytes, pinned));
                    let seconds = self.seconds(&task)?;
                    curve.push((bytes, tidy(bytes as f64 / seconds)));
                }
            }
            let [pinned, unpinned] = curves;
            Ok(GpuLink {
                latency_s: tidy(latency_s),
                pinned,
                unpinned,
                both_directions_pct: percent,
            })
        };
        profile.links.cpu_to_gpu = Some(link(Lane::CpuToGpu, both[0])?);
        profile.links.gpu_to_cpu = Some(link(Lane::GpuToCpu, both[1])?);
        Ok(())
    }

    /// What each direction keeps of its rate while the other runs, in percent.
    fn both_directions(&mut self) -> Result<[f64; 2], ProbeError> {
        let bytes = self.room.link_bytes.min(16 * MIB);
        let up = work::copy(&self.room, Lane::CpuToGpu, (bytes, true));
        let down = work::copy(&self.room, Lane::GpuToCpu, (bytes, true));
        let kept = self.race(&up, &down)?;
        Ok(kept.map(|share| tidy(100.0 * share)))
    }

    /// What each of two tasks keeps of its rate beside the other: seconds alone over seconds together,
    /// in which both lanes stay busy.
    fn race(&mut self, first: &Task, second: &Task) -> Result<[f64; 2], ProbeError> {
        let alone = [self.seconds(first)?, self.seconds(second)?];
        // As many of each as take about the same time.
        let window_s = (4.0 * alone[0].max(alone[1])).max(self.room.extent.sample_s);
        let counts = alone
            .map(|s| ((window_s / s).round() as usize).clamp(1, self.room.extent.most_repeats));
        let mut kept = [Series::default(), Series::default()];
        for _ in 0..self.room.extent.rounds {
            let before = self.machine.lane_figures();
            let tasks = [first, second];
            for turn in 0..counts[0].max(counts[1]) {
                for (task, _) in tasks.iter().zip(counts).filter(|(_, count)| turn < *count) {
                    self.submit(task);
                }
            }
            let all = self.machine.submitted();
            self.machine.wait(&all)?;
            let after = self.machine.lane_figures();
            for index in 0..2 {
                let lane = tasks[index].lane;
                let busy = |f: &crate::cost::figures::LaneFigures| f.prefill_s + f.decode_s;
                let each = (busy(&after[lane]) - busy(&before[lane])) / counts[index] as f64;
                kept[index].push((alone[index] / each.max(1e-9)).clamp(0.05, 1.0));
            }
        }
        Ok(kept.map(|series| series.median().unwrap_or(1.0)))
    }

    fn contention(&mut self, profile: &mut HardwareProfile) -> Result<(), ProbeError> {
        let copy = self.room.link_bytes.min(16 * MIB);
        let (inputs, outputs) = self.room.extent.race_shape;
        let product = work::product(&self.room, Dtype::F16, (8, inputs, outputs));
        let beside = work::cpu_product(&self.room);
        for (name, task) in [("gpu_compute", product), ("cpu_compute", Some(beside))] {
            for lane in [Lane::CpuToGpu, Lane::GpuToCpu] {
                let Some(task) = &task else { continue };
                let copies = work::copy(&self.room, lane, (copy, true));
                let kept = self.race(task, &copies)?.map(tidy);
                let pair = format!("{name}+{}", lane.name());
                profile.contention.insert(pair, kept);
            }
        }
        Ok(())
    }
}
