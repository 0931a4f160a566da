//! Sizes of one block: cached tokens, hidden rows and chunk rows per tier, from a workload's lengths
//! and a realised placement. Bytes are footprint.rs's, seconds terms.rs's.

use crate::cost::footprint::CHUNK_ROWS_MAX;
use crate::placement::Placement;
use crate::policy::{DeviceKind, Policy};
use crate::tier::{PerTier, Tier};
use crate::workload::{Lengths, Workload};

/// Sizes of one block, from the workload's lengths and the batch shape.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockShape {
    /// Tokens of cache that fit per tier, all slots together.
    pub kv_tokens: PerTier<u64>,
    /// The same for the largest batch alone.
    pub batch_kv_tokens: PerTier<u64>,
    /// Hidden rows that fit per tier.
    pub hidden_rows: PerTier<u64>,
    pub batch_hidden_rows: PerTier<u64>,
    /// Rows of one batch in one step.
    pub batch_rows: u64,
    pub chunk_rows: u64,
    pub slots: u64,
    /// Slots per tier of the cache.
    pub cache_slots: PerTier<u64>,
}

impl BlockShape {
    pub fn new(workload: &Workload, policy: &Policy, placement: &Placement) -> Self {
        Self::from_lengths(&Lengths::from(workload), policy, placement)
    }

    /// Mean lengths times slots, but never less than the longest line needs.
    pub fn from_lengths(lengths: &Lengths, policy: &Policy, placement: &Placement) -> Self {
        let lines = lengths.prompts.max(1);
        let kv = Spread {
            total: lengths.kv_tokens,
            lines,
            longest: lengths.kv_tokens_max,
        };
        let prompt = Spread {
            total: lengths.prompt_tokens,
            lines,
            longest: lengths.prompt_tokens_max,
        };
        let (cache_slots, batch_cache) = count(&placement.cache_tiers, policy);
        let (hidden_slots, batch_hidden) = count(&placement.hidden_tiers, policy);
        let batch_rows = prompt.for_slots(policy.gpu_batch_size as u64);
        BlockShape {
            kv_tokens: kv.per_tier(&cache_slots),
            batch_kv_tokens: kv.per_tier(&batch_cache),
            hidden_rows: prompt.per_tier(&hidden_slots),
            batch_hidden_rows: prompt.per_tier(&batch_hidden),
            batch_rows,
            chunk_rows: even_chunks(batch_rows),
            slots: policy.slots() as u64,
            cache_slots,
        }
    }

    /// True where decode passes stagger their batches (engine/schedule.rs): the CPU attends for some.
    pub fn staggers(&self, policy: &Policy, device: DeviceKind) -> bool {
        let away = |of: &PerTier<u64>| of.cpu + of.disk > 0;
        let one_chunk = policy.gpu_batch_size as u64 <= self.chunk_rows;
        let travels = away(&self.hidden_rows);
        one_chunk && away(&self.kv_tokens) && can_stagger(policy, device, travels)
    }

    /// True where one layer's weights meet more than one product each: several batches or chunks.
    pub fn weights_reused(&self, policy: &Policy) -> bool {
        policy.num_gpu_batches > 1 || self.batch_rows > self.chunk_rows
    }
}

/// True where the CPU can attend for one batch while a GPU has the next: there is another, and two fit into
/// where else one chunk of prompts is. Of two batches whose hidden states travel between layers, neither's is back when the
/// other's attention begins.
pub fn can_stagger(policy: &Policy, device: DeviceKind, hidden_travels: bool) -> bool {
    let fits = 2 * policy.gpu_batch_size <= CHUNK_ROWS_MAX;
    let least = if hidden_travels { 3 } else { 2 };
    let several = policy.num_gpu_batches >= least && policy.overlap;
    device.has_gpu() && policy.cpu_cache_compute && several && fits
}

/// Rows of a chunk: at most CHUNK_ROWS_MAX, and all chunks nearly equal, so that no short last one lets
/// the next layer's weights wait.
pub fn even_chunks(rows: u64) -> u64 {
    rows.div_ceil(rows.div_ceil(CHUNK_ROWS_MAX as u64).max(1))
}

struct Spread {
    total: u64,
    lines: u64,
    longest: u64,
}

impl Spread {
    fn for_slots(&self, slots: u64) -> u64 {
        if slots == 0 {
            0
        } else {
            (self.total * slots).div_ceil(self.lines).max(self.longest)
        }
    }

    fn per_tier(&self, slots: &PerTier<u64>) -> PerTier<u64> {
        PerTier {
            gpu: self.for_slots(slots.gpu),
            cpu: self.for_slots(slots.cpu),
            disk: self.for_slots(slots.disk),
        }
    }
}

/// Slots per tier, of all batches and of the largest one.
fn count(tiers: &[Tier], policy: &Policy) -> (PerTier<u64>, PerTier<u64>) {
    let (mut all, mut most) = (PerTier::default(), PerTier::default());
    for batch in tiers.chunks(policy.gpu_batch_size) {
        for tier in Tier::ALL {
            let slots = count_of(batch, tier);
            all[tier] += slots;
            most[tier] = slots.max(most[tier]);
        }
    }
    (all, most)
}

/// Summed up in bytes, many at a time: blocks of a million slots are looked at, too.
fn count_of(tiers: &[Tier], tier: Tier) -> u64 {
    let few = tiers.chunks(usize::from(u8::MAX));
    few.map(|few| u64::from(few.iter().map(|&t| u8::from(t == tier)).sum::<u8>()))
        .sum()
}
