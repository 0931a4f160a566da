//! The one place that turns a profile's figures into seconds of single operations. The closed-form
//! terms and the virtual-time machine both price with exactly these functions. No schedule and no
//! share is known here.
//!
//! Stand-ins: where a format was not measured, the nearest measured one stands in (bf16 and f16 for
//! each other, then f32; f16 for q4) and is never taken to be faster for it: seconds per element
//! stay, or grow with the bytes of an element. A way to multiply that was not measured is taken to be as
//! fast as fp32.

use crate::cost::contention::Keeps;
use crate::cost::curves::{
    AttentionCurves, SizeCurves, Widened, attention_curves, element_bytes, gemm_curves,
    gemm_s_per_weight, rate_at, slow_quantise,
};
use crate::cost::footprint::{Buffer, STREAM_CHUNK_BYTES};
use crate::cost::load::Load;
use crate::cost::locks::Unlocked;
use crate::cost::near::Near;
use crate::cost::requests::DiskRequests;
use crate::dtype::{Arithmetic, Dtype, SMALL_ROWS};
use crate::policy::DeviceKind;
use crate::profile::{GpuLink, HardwareProfile, QuantiseRates};
use crate::tier::{Lane, Tier};
use std::collections::BTreeMap;
use thiserror::Error;

/// Why a profile cannot price this device.
#[derive(Debug, Error, PartialEq)]
pub enum RatesError {
    #[error("profile \"{profile}\" has no {what}: probe this machine again or choose --device cpu")]
    Missing { profile: String, what: String },
    #[error(
        "profile \"{profile}\": [contention] names \"{pair}\", which is not a pair of lanes like \"cpu_compute+disk_to_cpu\""
    )]
    Contention { profile: String, pair: String },
}

/// Attention of sequences that each look at so many tokens.
#[derive(Clone, Copy, Debug)]
pub enum AttentionWork {
    /// One new token each: the KV bytes that are read, and the values of a key.
    Decode {
        kv_bytes: f64,
        tokens: f64,
        hidden: f64,
    },
    /// Prompts: 4 · hidden · keys seen, summed over the queries.
    Prefill { flop: f64, tokens: f64 },
}

/// What one computing tier does.
#[derive(Clone, Debug)]
struct ComputeRates {
    /// By arithmetic and format.
    gemm: [[Vec<SizeCurves>; 4]; 3],
    widened: Option<Widened>,
    attention: [AttentionCurves; 4],
    memory_bytes_per_s: f64,
    rowwise_bytes_per_s: f64,
    append_bytes_per_s: f64,
    append_call_s: f64,
    quantise: QuantiseRates,
    launch_s: f64,
}

#[derive(Clone, Debug)]
struct LinkRates {
    latency_s: f64,
    /// (block bytes, bytes per second)
    pinned: Vec<(f64, f64)>,
    unpinned: Vec<(f64, f64)>,
}

/// All rates of one machine and device. Seconds of an operation are its own, with nothing else running.
#[derive(Clone, Debug)]
pub struct Rates {
    pub device: DeviceKind,
    pub dram_read_bytes_per_s: f64,
    pub dram_copy_bytes_per_s: f64,
    cpu: ComputeRates,
    gpu: Option<ComputeRates>,
    up: LinkRates,
    down: LinkRates,
    read: DiskRequests,
    write_fresh: DiskRequests,
    write_over: DiskRequests,
    keeps: Keeps,
    calibration: BTreeMap<String, f64>,
    /// Seconds until an idle lane begins what it waited for.
    pub handover_s: f64,
    /// The same where all threads compute meanwhile.
    pub handover_busy_s: f64,
    /// What the CPU's computing loses when a lane of the disk wakes up meanwhile.
    pub wake_takes_s: f64,
    near: Near,
    sampling_bytes_per_s: f64,
    /// Nothing, until a machine has been opened.
    pub unlocked: Unlocked,
}

impl Rates {
    /// Rates for `device` with `threads` compute threads. Fewer threads than were measured slow the
    /// CPU in proportion; more bring nothing.
    pub fn new(
        profile: &HardwareProfile,
        device: DeviceKind,
        threads: usize,
    ) -> Result<Rates, RatesError> {
        let slow = (profile.machine.threads as f64 / threads.max(1) as f64).max(1.0);
        let cpu = cpu_rates(profile, slow)?;
        let gpu = match device {
            DeviceKind::Cpu => None,
            DeviceKind::Host => Some(cpu.clone()),
            DeviceKind::Cuda => Some(gpu_rates(profile)?),
        };
        let (up, down) = links(profile, device)?;
        let disk = &profile.links;
        let write = &disk.cpu_to_disk;
        let read = DiskRequests::new(disk.disk_to_cpu.latency_s, &disk.disk_to_cpu.direct);
        let write_over = DiskRequests::new(write.latency_s, &write.overwrite);
        Ok(Rates {
            device,
            dram_read_bytes_per_s: profile.cpu.dram_read_bytes_per_s,
            dram_copy_bytes_per_s: profile.cpu.dram_copy_bytes_per_s,
            cpu,
            gpu,
            up,
            down,
            keeps: Keeps::new(profile, [&read, &write_over])?,
            read,
            write_fresh: DiskRequests::new(write.latency_s, &write.fresh),
            write_over,
            handover_s: profile.cpu.handover_s,
            handover_busy_s: profile
                .cpu
                .handover_busy_s
                .unwrap_or(profile.cpu.handover_s),
            wake_takes_s: profile.cpu.wake_takes_s,
            near: Near::new(&profile.cpu),
            sampling_bytes_per_s: profile
                .cpu
                .sampling_bytes_per_s
                .unwrap_or(profile.cpu.dram_read_bytes_per_s),
            calibration: profile.calibration.terms.clone(),
            unlocked: Unlocked::default(),
        })
    }

    /// The same rates without what `calibrate` has learnt.
    pub fn uncalibrated(mut self) -> Rates {
        self.calibration.clear();
        self
    }

    /// The same rates with these multipliers instead of the profile's.
    pub fn with_multipliers(mut self, multipliers: BTreeMap<String, f64>) -> Rates {
        self.calibration = multipliers;
        self
    }

    /// The same rates where these buffers could not be page-locked.
    pub fn with_unlocked(mut self, unlocked: Unlocked) -> Rates {
        self.unlocked = unlocked;
        self
    }

    /// Whether copies take a buffer of DRAM straight.
    pub fn takes(&self, buffer: Buffer) -> bool {
        !self.unlocked.has(buffer)
    }

    fn on(&self, tier: Tier) -> &ComputeRates {
        match (&self.gpu, tier) {
            (Some(gpu), Tier::Gpu) => gpu,
            _ => &self.cpu,
        }
    }

    fn calibrated(&self, term: &str, on: &str, seconds: f64) -> f64 {
        if self.calibration.is_empty() {
            return seconds;
        }
        let general = self.calibration.get(term).copied().unwrap_or(1.0);
        let special = self.calibration.get(&format!("{term}.{on}"));
        seconds * special.copied().unwrap_or(general)
    }

    /// Seconds of `out[m][rows] = x[m][inputs] · w[rows][inputs]ᵀ`, without its launch.
    pub fn gemm_s(
        &self,
        on: Tier,
        stored: (Dtype, Arithmetic),
        m: usize,
        inputs: usize,
        rows: usize,
    ) -> f64 {
        let shape = (inputs as f64, rows as f64);
        shape.0 * shape.1 * self.weight_s(on, stored, m as f64, shape)
    }

    /// Seconds per weight at M rows, for a matrix of (inputs, outputs), by how it is stored and multiplied.
    pub fn weight_s(
        &self,
        on: Tier,
        (format, arithmetic): (Dtype, Arithmetic),
        m: f64,
        shape: (f64, f64),
    ) -> f64 {
        let rates = self.on(on);
        let floor_s = |format| element_bytes(format) / rates.memory_bytes_per_s;
        let curves = &rates.gemm[arithmetic as usize][format as usize];
        let as_stored = |m: f64| gemm_s_per_weight(curves, m, shape, floor_s(format));
        let small_m = SMALL_ROWS as f64;
        let seconds = match &rates.widened {
            // More rows never take less.
            Some(widened) if format == Dtype::Q4 && m > small_m => widened
                .per_weight_s(m, shape, floor_s(Dtype::F16))
                .max(as_stored(small_m)),
            _ => as_stored(m),
        };
        self.calibrated("gemm", on.name(), seconds)
    }

    /// Part of its seconds that a product takes after so many bytes since its weights were met the last time.
    pub fn near_part(
        &self,
        on: Tier,
        stored: (Dtype, Arithmetic),
        (m, passed_bytes): (f64, f64),
    ) -> f64 {
        1.0 - self.kept(on, passed_bytes) * (1.0 - self.near.part(stored, m))
    }

    /// The same on average over so many products that meet the weights one after the other, the first of them in DRAM.
    pub fn met_part(
        &self,
        on: Tier,
        stored: (Dtype, Arithmetic),
        met: (f64, f64),
        products: f64,
    ) -> f64 {
        let again = 1.0 - 1.0 / products.max(1.0);
        1.0 - again * (1.0 - self.near_part(on, stored, met))
    }

    /// The part of weights that is still in the last cache after so many bytes.
    pub fn kept(&self, on: Tier, passed_bytes: f64) -> f64 {
        // Beside a GPU, or playing one, the CPU has other things to do in between.
        match self.device == DeviceKind::Cpu && on == Tier::Cpu {
            true => self.near.kept(passed_bytes),
            false => 0.0,
        }
    }

    /// Seconds of turning 4-bit weights into fp16, where a GPU does so.
    pub fn widen_s(&self, on: Tier, weights: f64) -> f64 {
        let widened = self.on(on).widened.as_ref();
        widened.map_or(0.0, |widened| widened.widen_s(weights))
    }

    /// How many products there are of one, where activations must stay in fp32 (`wide`).
    pub fn products(&self, on: Tier, (format, wide): (Dtype, bool), m: f64) -> f64 {
        match wide && self.is_gpu(on) {
            true => format.activation_parts(m) as f64,
            false => 1.0,
        }
    }

    /// The format whose prompts' attention takes as long: fp32 where a GPU must not round.
    pub fn prompt_format(&self, on: Tier, (format, wide): (Dtype, bool)) -> Dtype {
        match wide && self.is_gpu(on) {
            true => Dtype::F32,
            false => format,
        }
    }

    pub(super) fn is_gpu(&self, on: Tier) -> bool {
        self.device == DeviceKind::Cuda && on == Tier::Gpu
    }

    /// Seconds of attention without its launch.
    pub fn attention_s(&self, on: Tier, format: Dtype, work: AttentionWork) -> f64 {
        let curves = &self.on(on).attention[format as usize];
        let seconds = match work {
            AttentionWork::Decode {
                kv_bytes,
                tokens,
                hidden,
            } => kv_bytes * curves.decode_s_per_byte(tokens, hidden),
            AttentionWork::Prefill { flop, tokens } => flop * curves.prefill_s_per_flop(tokens),
        };
        self.calibrated("attention", on.name(), seconds)
    }

    /// Seconds of one call of one-token attention besides its launch and its bytes: until memory delivers at
    /// its rate and all threads have something to do.
    pub fn decode_call_s(&self, on: Tier, format: Dtype) -> f64 {
        let seconds = self.on(on).attention[format as usize].decode_call_s;
        self.calibrated("attention", on.name(), seconds)
    }

    /// Seconds to turn `value_bytes` of fp32 K and V values into the cache's format and put them there.
    pub fn append_s(&self, on: Tier, format: Dtype, value_bytes: f64) -> f64 {
        let rates = self.on(on);
        let per_s = match format {
            Dtype::Q4 => rates.quantise.append_bytes_per_s,
            _ => rates.append_bytes_per_s,
        };
        self.calibrated("append", on.name(), value_bytes / per_s)
    }

    /// Seconds of a call that appends, besides its launch and its bytes.
    pub fn append_call_s(&self, on: Tier) -> f64 {
        self.calibrated("append", on.name(), self.on(on).append_call_s)
    }

    /// Seconds in which the host draws a token from `bytes` of logits.
    pub fn sampling_s(&self, bytes: f64) -> f64 {
        bytes / self.sampling_bytes_per_s
    }

    /// Seconds of a norm or a residual add over `bytes` of activations, read and written together.
    pub fn rowwise_s(&self, on: Tier, bytes: f64) -> f64 {
        self.calibrated(
            "rowwise",
            on.name(),
            bytes / self.on(on).rowwise_bytes_per_s,
        )
    }

    /// Seconds to start one operation: launches.rs says when they count.
    pub fn launch_s(&self, on: Tier) -> f64 {
        self.calibrated("launch", on.name(), self.on(on).launch_s)
    }

    /// Seconds of one copy of `bytes` over CpuToGpu or GpuToCpu (0 on other lanes and without a GPU).
    pub fn link_s(&self, lane: Lane, bytes: f64, pinned: bool) -> f64 {
        let link = match lane {
            Lane::CpuToGpu => &self.up,
            Lane::GpuToCpu => &self.down,
            _ => return 0.0,
        };
        if bytes <= 0.0 || self.gpu.is_none() {
            return 0.0;
        }
        let curve = if pinned { &link.pinned } else { &link.unpinned };
        let (first_bytes, first_rate) = curve[0];
        let first_s = first_bytes / first_rate;
        let seconds = if bytes < first_bytes && link.latency_s < first_s {
            // Between an empty copy and the smallest measured one.
            link.latency_s + (first_s - link.latency_s) * bytes / first_bytes
        } else {
            (bytes / rate_at(curve, bytes)).max(link.latency_s)
        };
        self.calibrated("link", lane.name(), seconds)
    }

    /// Seconds of `bytes` of weights that come over a lane in pieces.
    pub fn stream_s(&self, lane: Lane, bytes: f64) -> f64 {
        let pieces = (bytes / STREAM_CHUNK_BYTES as f64).max(1.0);
        match lane {
            Lane::DiskToCpu => self.disk_read_s(bytes, bytes / pieces),
            _ => pieces * self.link_s(lane, bytes / pieces, true),
        }
    }

    /// Seconds of one call that reads `bytes` in requests of `block_bytes`.
    pub fn disk_read_s(&self, bytes: f64, block_bytes: f64) -> f64 {
        self.calibrated("disk_read", "disk", self.read.seconds(bytes, block_bytes))
    }

    /// Seconds of one call that writes `bytes` in requests of `block_bytes`; `fresh` where the file grows.
    pub fn disk_write_s(&self, bytes: f64, block_bytes: f64, fresh: bool) -> f64 {
        let way = if fresh {
            &self.write_fresh
        } else {
            &self.write_over
        };
        self.calibrated("disk_write", "disk", way.seconds(bytes, block_bytes))
    }

    /// The part of `seconds` of a computation in DRAM in which memory would deliver `bytes` at its full rate.
    pub fn memory_part(&self, bytes: f64, seconds: f64) -> f64 {
        (bytes / self.dram_read_bytes_per_s / seconds.max(1e-12)).min(1.0)
    }

    /// Part of its rate that `lane` keeps while all of `others` run.
    pub fn keep(&self, lane: (Lane, Load), others: &[(Lane, Load)]) -> f64 {
        let beside = others.iter().filter(|other| other.0 != lane.0);
        beside.map(|&other| self.keeps.kept(lane, other)).product()
    }

    /// Fresh 4-bit (or copied native) weight bytes packed per second, by one CPU.
    pub fn pack_bytes_per_s(&self, compress: bool) -> f64 {
        if compress {
            self.cpu.quantise.pack_bytes_per_s
        } else {
            self.dram_copy_bytes_per_s
        }
    }
}

fn missing(profile: &HardwareProfile, what: impl Into<String>) -> RatesError {
    RatesError::Missing {
        profile: profile.machine.name.clone(),
        what: what.into(),
    }
}

fn cpu_rates(profile: &HardwareProfile, slow: f64) -> Result<ComputeRates, RatesError> {
    let cpu = &profile.cpu;
    let rowwise = cpu.rowwise_bytes_per_s.unwrap_or(cpu.dram_copy_bytes_per_s);
    let quantise = cpu.quantise.unwrap_or(slow_quantise(rowwise));
    let attention = attention_curves(&cpu.attention, slow);
    Ok(ComputeRates {
        gemm: gemm_curves(&cpu.gemm, slow).ok_or_else(|| missing(profile, "cpu.gemm table"))?,
        widened: None,
        attention: attention.ok_or_else(|| missing(profile, "cpu.attention table"))?,
        memory_bytes_per_s: cpu.dram_read_bytes_per_s,
        rowwise_bytes_per_s: rowwise / slow,
        append_bytes_per_s: cpu.append_bytes_per_s.unwrap_or(rowwise) / slow,
        append_call_s: cpu.append_call_s,
        quantise: quantise.times(1.0 / slow),
        launch_s: cpu.launch_s,
    })
}

fn gpu_rates(profile: &HardwareProfile) -> Result<ComputeRates, RatesError> {
    let gpu = profile
        .gpu
        .as_ref()
        .ok_or_else(|| missing(profile, "[gpu]"))?;
    let attention = attention_curves(&gpu.attention, 1.0);
    Ok(ComputeRates {
        gemm: gemm_curves(&gpu.gemm, 1.0).ok_or_else(|| missing(profile, "gpu.gemm table"))?,
        widened: Widened::new(gpu),
        attention: attention.ok_or_else(|| missing(profile, "gpu.attention table"))?,
        memory_bytes_per_s: gpu.copy_bytes_per_s,
        rowwise_bytes_per_s: gpu.copy_bytes_per_s,
        append_bytes_per_s: gpu.copy_bytes_per_s,
        append_call_s: 0.0,
        quantise: gpu.quantise.unwrap_or(slow_quantise(gpu.copy_bytes_per_s)),
        launch_s: gpu.launch_s,
    })
}

fn links(
    profile: &HardwareProfile,
    device: DeviceKind,
) -> Result<(LinkRates, LinkRates), RatesError> {
    if device != DeviceKind::Cuda {
        // Host: a copy within DRAM. Cpu: never asked.
        let curve = vec![(1.0, profile.cpu.dram_copy_bytes_per_s)];
        let copy = LinkRates {
            latency_s: 0.0,
            pinned: curve.clone(),
            unpinned: curve,
        };
        return Ok((copy.clone(), copy));
    }
    let link = |facts: &Option<GpuLink>, name: &str| {
        let facts = facts.as_ref().filter(|f| !f.pinned.is_empty());
        let facts = facts.ok_or_else(|| missing(profile, format!("[links.{name}]")))?;
        let curve = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
            let sorted: BTreeMap<u64, f64> = points.iter().map(|&(b, r)| (b.max(1), r)).collect();
            sorted.into_iter().map(|(b, r)| (b as f64, r)).collect()
        };
        let unpinned = if facts.unpinned.is_empty() {
            &facts.pinned
        } else {
            &facts.unpinned
        };
        Ok(LinkRates {
            latency_s: facts.latency_s,
            pinned: curve(&facts.pinned),
            unpinned: curve(unpinned),
        })
    };
    let up = link(&profile.links.cpu_to_gpu, "cpu_to_gpu")?;
    Ok((up, link(&profile.links.gpu_to_cpu, "gpu_to_cpu")?))
}

#[cfg(test)]
#[path = "rates_tests.rs"]
mod tests;
