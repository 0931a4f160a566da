//! What a run is predicted to take and what it took, in one shape, so that they subtract field by
//! field (schema.md: LANE, TIER, FIGURES). Plain data.

use crate::tier::{PerLane, PerTier};
use serde::{Deserialize, Serialize};

/// One lane's time and traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneFigures {
    /// Union of in-flight time while prompts are read; waits excluded.
    pub prefill_s: f64,
    pub decode_s: f64,
    /// Bytes or FLOPs divided by the probed rate.
    pub work_s: f64,
    /// Bytes moved; 0 for compute lanes.
    pub bytes: u64,
}

impl LaneFigures {
    pub fn busy_s(&self) -> f64 {
        self.prefill_s + self.decode_s
    }

    pub fn add(&mut self, other: &LaneFigures) {
        self.prefill_s += other.prefill_s;
        self.decode_s += other.decode_s;
        self.work_s += other.work_s;
        self.bytes += other.bytes;
    }
}

/// One tier's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierFigures {
    pub total_bytes: u64,
    /// In use before we started.
    pub others_bytes: u64,
    pub free_bytes: u64,
    pub weights_bytes: u64,
    pub cache_bytes: u64,
    pub activations_bytes: u64,
    pub buffers_bytes: u64,
    pub process_bytes: u64,
    pub unaccounted_bytes: i64,
    pub peak_bytes: u64,
}

/// What binds each phase: a lane's or a resource's key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    pub prefill: String,
    pub decode: String,
}

/// A whole job's figures, predicted or measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub prefill_s: f64,
    pub decode_s: f64,
    pub total_s: f64,
    pub throughput_tok_s: f64,
    pub decode_tok_s: f64,
    pub lanes: PerLane<LaneFigures>,
    pub tiers: PerTier<TierFigures>,
    pub binding: Binding,
}

impl Figures {
    /// Fills in the totals that follow from the phases. `first_tokens` are the generated tokens that
    /// prefill steps returned (one a sequence); the others came in decode steps.
    pub fn finish(&mut self, first_tokens: u64) {
        self.total_s = self.prefill_s + self.decode_s;
        let per_s = |tokens: u64, seconds: f64| {
            if seconds > 0.0 {
                tokens as f64 / seconds
            } else {
                0.0
            }
        };
        self.throughput_tok_s = per_s(self.generated_tokens, self.total_s);
        self.decode_tok_s = per_s(
            self.generated_tokens.saturating_sub(first_tokens),
            self.decode_s,
        );
    }
}
