//! Where each sequence's keys and values live: token slots in memory, extents on disk. Reserved when a
//! sequence enters, given back when it ends, so that the next prompt can take them.

use crate::cost::footprint::BlockShape;
use crate::tier::{PerTier, Tier};
use crate::units::{PAGE_BYTES, round_up};
use std::sync::Arc;

/// A sequence's home in the cache, the same in every layer.
#[derive(Clone, Debug)]
pub enum CacheHome {
    /// One token slot a cached token, in a tier's arena.
    Memory { tier: Tier, slots: Arc<[u32]> },
    /// Records from `offset` of each layer's part of the spill file, page-aligned.
    Disk { offset: u64 },
}

impl CacheHome {
    pub fn tier(&self) -> Tier {
        match self {
            CacheHome::Memory { tier, .. } => *tier,
            CacheHome::Disk { .. } => Tier::Disk,
        }
    }
}

/// Free cache of all tiers.
pub struct CachePool {
    free: PerTier<Vec<u32>>,
    extents: Extents,
    record_bytes: u64,
    /// Bytes of one layer in a tier's cache buffer or in the spill file.
    pub layer_bytes: PerTier<u64>,
}

impl CachePool {
    pub fn new(block: &BlockShape, record_bytes: u64) -> Self {
        // Slots are taken from the end: keep them descending so that sequences get ascending ones.
        let slots = |tokens: u64| (0..tokens as u32).rev().collect();
        let tokens = &block.kv_tokens;
        let disk = round_up(
            tokens.disk * record_bytes + block.cache_slots.disk * PAGE_BYTES,
            PAGE_BYTES,
        );
        CachePool {
            free: PerTier {
                gpu: slots(tokens.gpu),
                cpu: slots(tokens.cpu),
                disk: Vec::new(),
            },
            extents: Extents {
                capacity: disk,
                taken: Vec::new(),
                used: 0,
            },
            record_bytes,
            layer_bytes: PerTier {
                gpu: tokens.gpu * record_bytes,
                cpu: tokens.cpu * record_bytes,
                disk,
            },
        }
    }

    /// Room for `tokens` on a tier, or None until other sequences end.
    pub fn reserve(&mut self, tier: Tier, tokens: u64) -> Option<CacheHome> {
        if tier == Tier::Disk {
            let bytes = round_up(tokens * self.record_bytes, PAGE_BYTES);
            return self
                .extents
                .take(bytes)
                .map(|offset| CacheHome::Disk { offset });
        }
        let free = &mut self.free[tier];
        let left = free.len().checked_sub(tokens as usize)?;
        let slots: Arc<[u32]> = free.drain(left..).rev().collect();
        Some(CacheHome::Memory { tier, slots })
    }

    pub fn give_back(&mut self, home: &CacheHome) {
        match home {
            CacheHome::Memory { tier, slots } => self.free[*tier].extend(slots.iter().rev()),
            CacheHome::Disk { offset } => self.extents.give_back(*offset),
        }
    }
}

/// First fit over a stretch of bytes.
struct Extents {
    capacity: u64,
    /// (start, bytes), ascending.
    taken: Vec<(u64, u64)>,
    /// Bytes taken in all.
    used: u64,
}

impl Extents {
    fn give_back(&mut self, offset: u64) {
        if let Ok(at) = self
            .taken
            .binary_search_by_key(&offset, |(start, _)| *start)
        {
            self.used -= self.taken.remove(at).1;
        }
    }

    fn take(&mut self, bytes: u64) -> Option<u64> {
        // Without a gap the first fit is at the end.
        if self.used
            == self
                .taken
                .last()
                .map_or(0, |(start, length)| start + length)
            && self.used + bytes <= self.capacity
        {
            self.taken.push((self.used, bytes));
            self.used += bytes;
            return Some(self.used - bytes);
        }
        let mut start = 0;
        let mut at = 0;
        for (i, &(first, length)) in self.taken.iter().enumerate() {
            if start + bytes <= first {
                break;
            }
            start = first + length;
            at = i + 1;
        }
        if start + bytes > self.capacity {
            return None;
        }
        self.taken.insert(at, (start, bytes));
        self.used += bytes;
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_and_extents_fill_gaps() {
        let block = BlockShape {
            kv_tokens: PerTier {
                gpu: 0,
                cpu: 10,
                disk: 10,
            },
            batch_kv_tokens: PerTier::default(),
            hidden_rows: PerTier::default(),
            batch_hidden_rows: PerTier::default(),
            batch_rows: 1,
            chunk_rows: 1,
            slots: 4,
            cache_slots: PerTier {
                gpu: 0,
                cpu: 2,
                disk: 2,
            },
        };
        let mut pool = CachePool::new(&block, 4096);
        let a = pool.reserve(Tier::Cpu, 6).expect("six of ten");
        assert!(pool.reserve(Tier::Cpu, 5).is_none());
        pool.give_back(&a);
        assert!(pool.reserve(Tier::Cpu, 10).is_some());
        let first = pool.reserve(Tier::Disk, 4).expect("four");
        let second = pool.reserve(Tier::Disk, 6).expect("six");
        pool.give_back(&first);
        let third = pool.reserve(Tier::Disk, 3).expect("the gap");
        let offset = |home: &CacheHome| match home {
            CacheHome::Disk { offset } => *offset,
            CacheHome::Memory { .. } => u64::MAX,
        };
        assert_eq!((offset(&second), offset(&third)), (4 * 4096, 0));
    }
}
