//! FlexLLMGen as its runtime behaves: where its whole tensors go, what it holds beside them, how long its
//! schedule takes on a machine's rates. Nothing here is fitted to its published results (flexllmgen_rows.rs); assumptions say that they are.

use crate::cost::rates::{AttentionWork, Rates};
use crate::dtype::{Arithmetic, Dtype};
use crate::model::ModelSpec;
use crate::planner::flexllmgen_four_bit::value_bytes;
use crate::tier::{Lane, PerTier, Tier};
use crate::units::GIB;

/// Its disk reads are this small.
const READ_BLOCK_BYTES: f64 = 128.0 * 1024.0;
/// Its CPU attention turns fp16 KV into fp32 first: about five times the traffic.
const CPU_ATTENTION_TRAFFIC: f64 = 5.0;
/// Operations that one layer starts on the GPU (assumption).
const LAUNCHES: f64 = 16.0;
/// Rows of its table of positions.
const POSITIONS: f64 = 2050.0;
/// What the biases behind a matrix shift its middle, as part of the layer: it decides on borders only.
const BIASES: f64 = 1e-6;
/// Pinned buffers between disk and GPU.
const RELAY_BYTES: u64 = 8 * GIB;

/// A command line of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flags {
    pub percent: [f64; 6],
    pub gpu_batch_size: usize,
    pub num_gpu_batches: usize,
    pub pin_weight: bool,
    pub compress_weight: bool,
    pub compress_cache: bool,
    pub cpu_cache_compute: bool,
}

/// What it generates: equal, padded prompts, exactly one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    pub prompt: usize,
    pub generated: usize,
    /// Decode is what ten layers take for the second token, times steps and layers, the two ends counted as a
    /// layer (`--debug-mode fewer_batch`).
    pub projected: bool,
}

/// Bytes of one layer of each kind, and of the two ends, per tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Homes {
    attention: PerTier<f64>,
    ffn: PerTier<f64>,
    ends: PerTier<f64>,
    /// What page-locked blocks of two to some power take beyond the layers' bytes in DRAM.
    rounding: f64,
}

/// One model under one command line.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    pub model: &'a ModelSpec,
    pub rates: &'a Rates,
    pub flags: Flags,
    pub lengths: Lengths,
}

/// Seconds of one step's transfers and its computation.
#[derive(Clone, Copy, Default)]
struct Load {
    /// Pageable DRAM is copied to page-locked by the thread that launches everything, before the computation.
    before_s: f64,
    up_s: f64,
    down_s: f64,
    read_s: f64,
    write_s: f64,
}

impl Load {
    fn plus(self, other: Load) -> Load {
        Load {
            before_s: self.before_s + other.before_s,
            up_s: self.up_s + other.up_s,
            down_s: self.down_s + other.down_s,
            read_s: self.read_s + other.read_s,
            write_s: self.write_s + other.write_s,
        }
    }

    /// Both legs of a way over the disk block the thread that goes it; everything ends before the next step.
    fn step_s(self, compute_s: f64) -> f64 {
        let legs = [self.up_s, self.down_s, self.read_s, self.write_s];
        let up = self.read_s + if self.read_s > 0.0 { self.up_s } else { 0.0 };
        let down = self.write_s + if self.write_s > 0.0 { self.down_s } else { 0.0 };
        legs.into_iter()
            .chain([up, down, self.before_s + compute_s])
            .fold(0.0, f64::max)
    }
}

impl Flags {
    pub fn sequences(&self) -> usize {
        self.gpu_batch_size * self.num_gpu_batches
    }

    fn share(&self, pair: usize) -> PerTier<f64> {
        let (gpu, cpu) = (self.percent[pair] / 100.0, self.percent[pair + 1] / 100.0);
        PerTier {
            gpu,
            cpu,
            disk: (1.0 - gpu - cpu).max(0.0),
        }
    }
}

/// The tier of a tensor whose middle lies at `middle` of its layer: disk first, then DRAM, then GPU.
fn tier_at(share: &PerTier<f64>, middle: f64) -> Tier {
    match middle {
        m if m < share.disk + BIASES => Tier::Disk,
        m if m < share.disk + share.cpu + BIASES => Tier::Cpu,
        _ => Tier::Gpu,
    }
}

impl Setup<'_> {
    fn kv_bytes(&self, tokens: f64) -> f64 {
        value_bytes(self.flags.compress_cache) * self.kv_values(tokens)
    }

    /// Keys and values of one batch in one layer.
    pub(super) fn kv_values(&self, tokens: f64) -> f64 {
        2.0 * self.model.hidden as f64 * self.flags.gpu_batch_size as f64 * tokens
    }

    /// Whole tensors at home by their middles, layer by layer.
    pub fn homes(&self) -> Homes {
        let (h, ffn) = (self.model.hidden as f64, self.model.ffn as f64);
        let share = self.flags.share(0);
        let mut rounding = 0.0f64;
        let mut place = |tensors: &[f64], times: f64| {
            let total: f64 = tensors.iter().sum();
            let (mut bytes, mut before) = (PerTier::<f64>::default(), 0.0);
            for tensor in tensors {
                let size = tensor * value_bytes(self.flags.compress_weight);
                let tier = tier_at(&share, (before + tensor / 2.0) / total);
                bytes[tier] += size;
                if tier == Tier::Cpu && self.flags.pin_weight {
                    rounding += times * ((size as u64).next_power_of_two() as f64 - size);
                }
                before += tensor;
            }
            bytes
        };
        let layers = self.model.layers as f64;
        let attention = place(&[h * h; 4], layers);
        let ffn = place(&[h * ffn; 2], layers);
        let table = self.model.vocab as f64 * h;
        let (first, last) = (place(&[table, POSITIONS * h], 1.0), place(&[table], 1.0));
        let mut ends = PerTier::<f64>::default();
        Tier::ALL
            .into_iter()
            .for_each(|t| ends[t] = first[t] + last[t]);
        Homes {
            attention,
            ffn,
            ends,
            rounding,
        }
    }

    /// Percent of the layers' weights on GPU, in DRAM and on disk, as it places them.
    pub fn realised_percent(&self) -> PerTier<f64> {
        let homes = self.homes();
        let total: f64 = Tier::ALL
            .into_iter()
            .map(|t| homes.attention[t] + homes.ffn[t])
            .sum();
        let mut percent = PerTier::<f64>::default();
        for tier in Tier::ALL {
            percent[tier] = 100.0 * (homes.attention[tier] + homes.ffn[tier]) / total;
        }
        percent
    }

    fn weights(&self, bytes: &PerTier<f64>) -> Load {
        let pageable = if self.flags.pin_weight {
            0.0
        } else {
            bytes.cpu
        };
        Load {
            before_s: self.relayed_s(pageable),
            up_s: self
                .rates
                .link_s(Lane::CpuToGpu, bytes.cpu + bytes.disk, true),
            read_s: self.rates.disk_read_s(bytes.disk, READ_BLOCK_BYTES),
            ..Load::default()
        }
    }

    /// Between pageable and page-locked DRAM.
    fn relayed_s(&self, bytes: f64) -> f64 {
        bytes / self.rates.dram_copy_bytes_per_s
    }

    /// Cache that comes for one batch: nothing where the CPU attends to what lies in DRAM. There it is never
    /// page-locked ("disable pin_memory due to high memory overhead").
    fn cache_load(&self, tokens: f64) -> Load {
        let share = self.flags.share(2);
        let bytes = self.kv_bytes(tokens);
        let read_s = self.rates.disk_read_s(bytes * share.disk, READ_BLOCK_BYTES);
        if self.flags.cpu_cache_compute {
            return Load {
                read_s,
                ..Load::default()
            };
        }
        let away = bytes * (share.cpu + share.disk);
        Load {
            before_s: self.relayed_s(bytes * share.cpu),
            up_s: self.rates.link_s(Lane::CpuToGpu, away, true),
            read_s,
            ..Load::default()
        }
    }

    /// A prompt's keys and values go down through page-locked relays, by threads of their own: while the ones
    /// are copied on, the others are on the link. A single token's go to pageable DRAM as they are.
    fn cache_store(&self, tokens: f64) -> Load {
        let share = self.flags.share(2);
        let bytes = self.kv_bytes(tokens);
        let (to_dram, to_disk) = (bytes * share.cpu, bytes * share.disk);
        let down = |bytes: f64, pinned: bool| self.rates.link_s(Lane::GpuToCpu, bytes, pinned);
        let relayed = tokens > 1.0;
        let on_s = if relayed {
            self.relayed_s(to_dram) / 2.0
        } else {
            0.0
        };
        Load {
            down_s: down(to_dram, relayed) + on_s + down(to_disk, true),
            write_s: self
                .rates
                .disk_write_s(to_disk, to_disk.min(1048576.0), true),
            ..Load::default()
        }
    }

    fn hidden(&self, rows: f64) -> Load {
        let away = 1.0 - self.flags.percent[4] / 100.0;
        let bytes = away * 2.0 * rows * self.flags.gpu_batch_size as f64 * self.model.hidden as f64;
        Load {
            up_s: self.rates.link_s(Lane::CpuToGpu, bytes, true),
            down_s: self.rates.link_s(Lane::GpuToCpu, bytes, true),
            ..Load::default()
        }
    }

    /// Products with so many equal tensors.
    fn products_s(&self, tensors: f64, shape: (f64, f64), rows: f64) -> f64 {
        let m = rows * self.flags.gpu_batch_size as f64;
        let format = (Dtype::F16, Arithmetic::Fp32);
        let per_weight = self.rates.weight_s(Tier::Gpu, format, m, shape);
        let weights = tensors * shape.0 * shape.1;
        weights * per_weight
            + self.dequantise_s(weights, tensors)
            + LAUNCHES * self.rates.launch_s(Tier::Gpu)
    }

    /// Attention of one batch: scores of all pairs while prompts are read, one row each afterwards.
    fn attention_s(&self, rows: f64, context: f64) -> f64 {
        let size = self.flags.gpu_batch_size as f64;
        if rows > 1.0 {
            let flop = 4.0 * self.model.hidden as f64 * size * rows * rows;
            let work = AttentionWork::Prefill { flop, tokens: rows };
            return self.rates.attention_s(Tier::Gpu, Dtype::F16, work) + self.quantise_s(rows);
        }
        let share = self.flags.share(2);
        let on_cpu = if self.flags.cpu_cache_compute {
            share.cpu + share.disk
        } else {
            0.0
        };
        let values = self.kv_values(context);
        let cpu_bytes = CPU_ATTENTION_TRAFFIC * 2.0 * values * on_cpu;
        let on_gpu = AttentionWork::Decode {
            kv_bytes: 2.0 * values * (1.0 - on_cpu),
            tokens: context,
            hidden: self.model.hidden as f64,
        };
        cpu_bytes / self.rates.dram_read_bytes_per_s
            + self.dequantise_cache_s(context)
            + self.rates.attention_s(Tier::Gpu, Dtype::F16, on_gpu)
            + self.quantise_s(rows)
    }

    /// One attention and one feed-forward layer for all batches, each step ending with a synchronisation.
    fn layer_s(&self, homes: &Homes, (rows, context): (f64, f64)) -> f64 {
        let (h, ffn) = (self.model.hidden as f64, self.model.ffn as f64);
        let prefill = rows > 1.0;
        let none = Load::default();
        let load = if prefill {
            none
        } else {
            self.cache_load(context)
        };
        let (store, hidden) = (self.cache_store(rows), self.hidden(rows));
        let attention_s = self.products_s(4.0, (h, h), rows) + self.attention_s(rows, context);
        let ffn_s = self.products_s(2.0, (h, ffn), rows);
        let batches = self.flags.num_gpu_batches;
        let when = |yes: bool, load: Load| if yes { load } else { none };
        let attend = (0..batches).map(|k| {
            let moved = hidden
                .plus(when(k == 0, self.weights(&homes.ffn)))
                .plus(when(k + 1 < batches, load))
                .plus(when(k > 0, store));
            moved.step_s(attention_s)
        });
        let feed = (0..batches).map(|k| {
            let moved = hidden
                .plus(when(k == 0, self.weights(&homes.attention).plus(store)))
                .plus(when(k + 1 == batches, load));
            moved.step_s(ffn_s)
        });
        attend.chain(feed).sum()
    }

    /// Logits of every position while prompts are read; the tables are fetched for each pass, and become fp16
    /// as a whole before tokens are looked up.
    fn ends_s(&self, homes: &Homes, rows: f64) -> f64 {
        let (vocab, hidden) = (self.model.vocab as f64, self.model.hidden as f64);
        let looked_up_s = self.dequantise_s((vocab + POSITIONS) * hidden, 2.0);
        let batch_s = looked_up_s + self.products_s(1.0, (hidden, vocab), rows);
        let compute_s = self.flags.num_gpu_batches as f64 * batch_s;
        self.weights(&homes.ends).step_s(compute_s)
    }

    /// Seconds of prefill and of decode.
    pub fn seconds(&self) -> (f64, f64) {
        let homes = self.homes();
        let layers = self.model.layers as f64;
        let prompt = self.lengths.prompt as f64;
        let prefill_s =
            layers * self.layer_s(&homes, (prompt, prompt)) + self.ends_s(&homes, prompt);
        let steps = self.lengths.generated.saturating_sub(1) as f64;
        if self.lengths.projected {
            let token_s = (layers + 1.0) * self.layer_s(&homes, (1.0, prompt + 1.0));
            return (prefill_s, steps * token_s);
        }
        let context = prompt + self.lengths.generated as f64 / 2.0;
        let token_s = layers * self.layer_s(&homes, (1.0, context)) + self.ends_s(&homes, 1.0);
        (prefill_s, steps * token_s)
    }

    /// Generated tokens per second, by its own metric.
    pub fn throughput(&self) -> f64 {
        let (prefill_s, decode_s) = self.seconds();
        (self.flags.sequences() * self.lengths.generated) as f64 / (prefill_s + decode_s)
    }

    /// What it holds: homes, copies on their way, relays, workspaces and the rounding of pinned blocks.
    pub fn footprint(&self) -> PerTier<u64> {
        let (homes, m) = (self.homes(), self.model);
        let (layers, batches) = (m.layers as f64, self.flags.num_gpu_batches as f64);
        let size = self.flags.gpu_batch_size as f64;
        let kv = self.kv_bytes((self.lengths.prompt + self.lengths.generated) as f64);
        let rows = size * self.lengths.prompt as f64;
        let hidden = 2.0 * rows * m.hidden as f64;
        let (cache, act) = (self.flags.share(2), self.flags.share(4));
        let mut bytes = PerTier::<f64>::default();
        for tier in Tier::ALL {
            bytes[tier] = layers * (homes.attention[tier] + homes.ffn[tier])
                + homes.ends[tier]
                + layers * batches * kv * cache[tier]
                + batches * hidden * act[tier];
        }
        let streamed = |b: &PerTier<f64>| b.cpu + b.disk;
        bytes.gpu += streamed(&homes.attention) + 2.0 * streamed(&homes.ffn);
        if !self.flags.cpu_cache_compute {
            bytes.gpu += 2.0 * kv * (cache.cpu + cache.disk);
        }
        let widest = (m.hidden.max(m.ffn) * m.hidden) as f64 * 2.0;
        bytes.gpu += if self.flags.compress_weight {
            widest
        } else {
            0.0
        };
        let scores = 2.0 * rows * self.lengths.prompt as f64 * m.heads as f64;
        let logits = 2.0 * rows * m.vocab as f64;
        bytes.gpu += logits
            .max(scores + 3.0 * hidden)
            .max(2.0 * rows * m.ffn as f64)
            + 2.0 * hidden;
        bytes.cpu += homes.rounding + RELAY_BYTES as f64;
        if self.flags.cpu_cache_compute {
            bytes.cpu += 2.0 * kv;
        }
        PerTier {
            gpu: bytes.gpu as u64,
            cpu: bytes.cpu as u64,
            disk: bytes.disk as u64,
        }
    }

    pub fn fits(&self, budget: &PerTier<u64>) -> bool {
        let bytes = self.footprint();
        Tier::ALL.into_iter().all(|t| bytes[t] <= budget[t])
    }

    /// As a person would type it.
    pub fn command(&self) -> String {
        let f = &self.flags;
        let percent = f.percent.map(|p| format!("{p:.0}")).join(" ");
        let name = self.model.name.trim_start_matches("synth:");
        let mut words = vec![
            format!("python3 -m flexllmgen.flex_opt --model facebook/{name}"),
            format!("--percent {percent}"),
            format!(
                "--gpu-batch-size {} --num-gpu-batches {}",
                f.gpu_batch_size, f.num_gpu_batches
            ),
            format!(
                "--prompt-len {} --gen-len {}",
                self.lengths.prompt, self.lengths.generated
            ),
        ];
        let flag = |on: bool, name: &str| on.then(|| name.to_owned());
        words.extend(flag(f.compress_weight, "--compress-weight"));
        words.extend(flag(f.compress_cache, "--compress-cache"));
        words.extend(flag(f.cpu_cache_compute, "--cpu-cache-compute"));
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::families::named_size;
    use crate::policy::DeviceKind;
    use crate::profile::{HardwareProfile, compiled_in};

    fn flags(percent: [f64; 6]) -> Flags {
        Flags {
            percent,
            gpu_batch_size: 48,
            num_gpu_batches: 3,
            pin_weight: true,
            compress_weight: false,
            compress_cache: false,
            cpu_cache_compute: true,
        }
    }

    fn t4() -> Rates {
        let profile = HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap();
        Rates::new(&profile, DeviceKind::Cuda, 16).unwrap()
    }

    #[test]
    fn whole_tensors_realise_what_the_facts_say() {
        let (model, rates) = (named_size("opt-30b").unwrap(), t4());
        let realised = |wg: f64| {
            let setup = Setup {
                model: &model,
                rates: &rates,
                flags: flags([wg, 100.0 - wg, 0.0, 100.0, 0.0, 100.0]),
                lengths: Lengths {
                    prompt: 512,
                    generated: 32,
                    projected: false,
                },
            };
            setup.realised_percent().gpu
        };
        let steps = [
            (0.0, 0.0),
            (20.0, 8.33),
            (25.0, 8.33),
            (26.0, 41.67),
            (40.0, 50.0),
            (70.0, 58.33),
            (80.0, 91.67),
            (100.0, 100.0),
        ];
        for (asked, got) in steps {
            assert!(
                (realised(asked) - got).abs() < 0.01,
                "{asked}: {}",
                realised(asked)
            );
        }
    }
}
