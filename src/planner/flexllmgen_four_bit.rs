//! What FlexLLMGen's 4-bit formats cost its GPU: passes of PyTorch operations, bytes counted from its
//! compression.py. When they run is flexllmgen.rs.

use crate::planner::flexllmgen::Setup;
use crate::tier::Tier;

/// Before every product and every attention its 4-bit data becomes fp16, in passes of their own
/// (`decompress` in compression.py), for every batch again: shifted and masked (half a byte read and written
/// each), both spread over every second value (half a byte read, one written each), divided and added to (two
/// read and two written each).
const DEQUANTISE_BYTES_PER_VALUE: f64 = 13.0;
/// The cache's groups lie along the last dimension: every second value there is half of each 32-byte sector,
/// and sectors are written as a whole, twice.
const DEQUANTISE_CACHE_BYTES_PER_VALUE: f64 = DEQUANTISE_BYTES_PER_VALUE + 2.0;
/// So many operations for each tensor.
const DEQUANTISE_LAUNCHES: f64 = 6.0;
/// New keys and values become 4-bit (`compress`): least and largest (two read each), the least taken off,
/// scaled, cut off, rounded (two read and two written each), made bytes (two read, one written), every second
/// one shifted (a sector read, half a byte written) and joined with the others (a sector and half a byte read,
/// half a byte written).
const QUANTISE_BYTES_PER_VALUE: f64 = 26.5;

/// Bytes of a weight, a key or a value: fp16, or 4 bits and two fp16 figures for each 64.
pub(super) fn value_bytes(compressed: bool) -> f64 {
    match compressed {
        true => 0.5625,
        false => 2.0,
    }
}

impl Setup<'_> {
    /// Weights of so many tensors; nothing where they are not 4-bit.
    pub(super) fn dequantise_s(&self, values: f64, tensors: f64) -> f64 {
        if !self.flags.compress_weight {
            return 0.0;
        }
        let launches_s = tensors * DEQUANTISE_LAUNCHES * self.rates.launch_s(Tier::Gpu);
        let bytes = DEQUANTISE_BYTES_PER_VALUE * values;
        launches_s + self.rates.rowwise_s(Tier::Gpu, bytes)
    }

    /// Keys and values of one batch. A cache at home on the GPU becomes fp16 as a whole, with the room for
    /// tokens to come.
    pub(super) fn dequantise_cache_s(&self, context: f64) -> f64 {
        if !self.flags.compress_cache {
            return 0.0;
        }
        let all = (self.lengths.prompt + self.lengths.generated) as f64 - 1.0;
        let at_home = self.flags.percent[2] >= 100.0;
        let values = self.kv_values(if at_home { all } else { context });
        let launches_s = 2.0 * DEQUANTISE_LAUNCHES * self.rates.launch_s(Tier::Gpu);
        let bytes = DEQUANTISE_CACHE_BYTES_PER_VALUE * values;
        launches_s + self.rates.rowwise_s(Tier::Gpu, bytes)
    }

    /// New keys and values of one batch.
    pub(super) fn quantise_s(&self, rows: f64) -> f64 {
        if !self.flags.compress_cache {
            return 0.0;
        }
        let bytes = QUANTISE_BYTES_PER_VALUE * self.kv_values(rows);
        self.rates.rowwise_s(Tier::Gpu, bytes)
    }
}
