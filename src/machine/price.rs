//! Seconds of single operations, from the same rates that price whole plans (cost/rates). The
//! virtual-time machine runs on these prices, and real machines log them as each lane's work.

use super::ops::{Attention, Compute, KvItem, Op, tier_of};
use crate::cost::load::Load;
use crate::cost::rates::{AttentionWork, Rates};
use crate::tier::{Lane, Tier};
use std::collections::BTreeMap;
use std::ops::Range;

/// fp32 activations.
const VALUE_BYTES: f64 = 4.0;

/// Prices operations for one machine, in the order in which they are computed.
#[derive(Clone)]
pub struct Pricer {
    rates: Rates,
    reuse: Reuse,
}

/// When weights were met the last time, in bytes that computing has passed since the beginning.
#[derive(Clone, Default)]
struct Reuse {
    passed_bytes: f64,
    /// By where they are in DRAM.
    begun: BTreeMap<u64, f64>,
}

impl Reuse {
    /// Bytes since these weights were begun the last time; `bytes` pass now.
    fn meet(&mut self, weights: u64, bytes: f64) -> f64 {
        let now = self.passed_bytes;
        self.passed_bytes += bytes;
        let before = self.begun.insert(weights, now);
        before.map_or(f64::INFINITY, |before| now - before)
    }

    /// What lay there is something else now.
    fn overwritten(&mut self, memory: Range<u64>) {
        let there = self.begun.range(memory).map(|(&weights, _)| weights);
        for weights in there.collect::<Vec<_>>() {
            self.begun.remove(&weights);
        }
    }
}

impl Pricer {
    pub fn new(rates: Rates) -> Self {
        Pricer {
            rates,
            reuse: Reuse::default(),
        }
    }

    /// Seconds of `op` alone on its lane.
    pub fn seconds(&mut self, lane: Lane, op: &Op) -> f64 {
        let bytes = op.bytes() as f64;
        match op {
            Op::Read(spans) => {
                for span in spans {
                    self.reuse
                        .overwritten(span.memory..span.memory + span.bytes);
                }
                let block = bytes / spans.len().max(1) as f64;
                self.rates.disk_read_s(bytes, block)
            }
            Op::Write(spans) => {
                let block = bytes / spans.len().max(1) as f64;
                // What a run writes to was written once when it was opened, or in the layer before.
                self.rates.disk_write_s(bytes, block, false)
            }
            Op::Load(_) => self.rates.disk_read_s(bytes, bytes),
            Op::Copy { pinned, .. } => self.rates.link_s(lane, bytes, *pinned),
            Op::Compute(compute) => {
                let on = tier_of(lane);
                let work_s = self.compute_s(on, compute);
                self.rates.operations_s(on, 1.0, work_s)
            }
        }
    }

    fn compute_s(&mut self, on: Tier, compute: &Compute) -> f64 {
        let rates = &self.rates;
        let rowwise = |rows: usize, width: usize, passes: f64| {
            rates.rowwise_s(on, passes * VALUE_BYTES * (rows * width) as f64)
        };
        match compute {
            Compute::Gemm(g) => {
                let weights = (g.format, g.arithmetic);
                let products = self.rates.products(on, (g.format, g.wide), g.m as f64);
                let seconds = self.rates.gemm_s(on, weights, g.m, g.inputs, g.rows);
                // Where no cache counts, nobody need remember.
                if self.rates.kept(on, 0.0) == 0.0 {
                    return products * seconds;
                }
                let rows_bytes = VALUE_BYTES * (g.m * (g.inputs + g.rows)) as f64;
                let passed = read_bytes(compute) + rows_bytes;
                let passed_bytes = self.reuse.meet(g.weights, passed);
                let near = (g.m as f64, passed_bytes);
                products * seconds * self.rates.near_part(on, weights, near)
            }
            Compute::Embed { ids, to, .. } => rowwise(ids.len, to.width, 2.0),
            Compute::AddPositions { indices, to, .. } => rowwise(indices.len, to.width, 3.0),
            Compute::Norm { from, .. } | Compute::Gather { from, .. } => {
                rowwise(from.rows.len, from.width, 2.0)
            }
            Compute::NormInPlace { rows, .. } => rowwise(rows.rows.len, rows.width, 2.0),
            Compute::Scatter { to, .. } => rowwise(to.rows.len, to.width, 2.0),
            Compute::AddRows { to, .. } => rowwise(to.rows.len, to.width, 3.0),
            Compute::Append(a) => self.append_s(on, a),
            Compute::Attend(a) => {
                self.reuse.passed_bytes += read_bytes(compute);
                self.attend_s(on, a)
            }
            Compute::Widen(w) => self.rates.widen_s(on, (w.inputs * w.rows) as f64),
        }
    }

    fn append_s(&self, on: Tier, attention: &Attention) -> f64 {
        let rows: usize = attention.items.iter().map(|i| i.rows).sum();
        let bytes = 2.0 * VALUE_BYTES * (rows * attention.hidden) as f64;
        self.rates.append_call_s(on) + self.rates.append_s(on, attention.format, bytes)
    }

    /// One-token rows by the bytes of keys and values they read, prompt rows by their FLOP.
    fn attend_s(&self, on: Tier, attention: &Attention) -> f64 {
        let record = 2.0 * attention.format.row_bytes(attention.hidden) as f64;
        let prompt = (attention.format, attention.wide);
        let prompt = self.rates.prompt_format(on, prompt);
        let item_s = |item: &KvItem| {
            let (rows, tokens) = (item.rows as f64, (item.past + item.rows) as f64);
            let work = if item.decode {
                AttentionWork::Decode {
                    kv_bytes: tokens * record,
                    tokens,
                    hidden: attention.hidden as f64,
                }
            } else {
                let keys_seen = rows * item.past as f64 + rows * (rows + 1.0) / 2.0;
                AttentionWork::Prefill {
                    flop: 4.0 * attention.hidden as f64 * keys_seen,
                    tokens,
                }
            };
            let format = if item.decode {
                attention.format
            } else {
                prompt
            };
            self.rates.attention_s(on, format, work)
        };
        let call_s = match attention.items.iter().any(|item| item.decode) {
            true => self.rates.decode_call_s(on, attention.format),
            false => 0.0,
        };
        call_s + attention.items.iter().map(item_s).sum::<f64>()
    }

    /// Seconds until an idle lane begins what it waited for; longer where the CPU computes meanwhile.
    pub fn handover_s(&self, computing: bool) -> f64 {
        match computing {
            true => self.rates.handover_busy_s,
            false => self.rates.handover_s,
        }
    }

    /// Seconds that the CPU's computing loses when this lane wakes up meanwhile.
    pub fn wake_takes_s(&self, lane: Lane) -> f64 {
        match lane {
            Lane::DiskToCpu | Lane::CpuToDisk => self.rates.wake_takes_s,
            _ => 0.0,
        }
    }

    /// Seconds in which the host draws a token from so many logits.
    pub fn sampling_s(&self, logits: usize) -> f64 {
        self.rates.sampling_s(VALUE_BYTES * logits as f64)
    }

    /// What an operation of so many seconds is to the lanes beside it.
    pub fn load(&self, (lane, work_s): (Lane, f64), op: &Op) -> Load {
        match op {
            Op::Read(spans) | Op::Write(spans) => {
                let bytes = op.bytes() as f64;
                Load::of_disk(lane, work_s, (bytes, bytes / spans.len().max(1) as f64))
            }
            Op::Compute(compute) if lane == Lane::CpuCompute => {
                Load::computing(self.rates.memory_part(read_bytes(compute), work_s))
            }
            _ => Load::default(),
        }
    }

    /// What `lane` keeps of its rate while the `active` lanes run.
    pub fn keep(&self, lane: (Lane, Load), active: &[(Lane, Load)]) -> f64 {
        self.rates.keep(lane, active)
    }
}

/// Weights and cached tokens that a computation reads once; prompts look at theirs again and again.
fn read_bytes(compute: &Compute) -> f64 {
    match compute {
        Compute::Gemm(g) => g.format.row_bytes(g.inputs) as f64 * g.rows as f64,
        Compute::Attend(a) => {
            let decoded = a.items.iter().filter(|item| item.decode);
            let tokens: usize = decoded.map(|item| item.past + item.rows).sum();
            2.0 * a.format.row_bytes(a.hidden) as f64 * tokens as f64
        }
        _ => 0.0,
    }
}
