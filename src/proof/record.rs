//! Measured rows as they are saved: profile, plans and every run, so that they can be judged again, by
//! another version's estimate too. Plain data and its reading.

use crate::cost::figures::Figures;
use crate::plan::Plan;
use crate::probe::Burst;
use crate::profile::HardwareProfile;
use crate::report::HostFacts;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub const ROWS_SCHEMA: &str = "loadmaster.rows/1";

/// Why saved rows could not be read.
#[derive(Debug, Error)]
pub enum RecordError {
    #[error("rows: {0}; make new ones with `loadmaster accuracy`")]
    Json(#[from] serde_json::Error),
    #[error("rows: schema is \"{0}\", but this version reads \"{ROWS_SCHEMA}\": measure again")]
    Schema(String),
}

/// A burst before and after a run: seconds ÷ the profile's seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bracket {
    pub burst: Burst,
    pub before: f64,
    pub after: f64,
}

impl Bracket {
    /// How far the machine was another before the run than after it: 0 when it was the same.
    fn change(&self) -> f64 {
        (self.before / self.after).max(self.after / self.before) - 1.0
    }
}

/// One visit to a row: loaded once, run `repeats` times, the median of those.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRecord {
    pub repeats: usize,
    pub measured: Figures,
    pub brackets: Vec<Bracket>,
}

impl RunRecord {
    /// How far the machine changed while it ran, by the burst that changed most.
    pub fn change(&self) -> f64 {
        self.brackets
            .iter()
            .map(Bracket::change)
            .fold(0.0, f64::max)
    }
}

/// A row: its plan, and its runs so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowRecord {
    pub name: String,
    pub plan: Plan,
    /// Of the plan's file as it was written before anything ran.
    pub plan_sha256: String,
    pub runs: Vec<RunRecord>,
}

/// A whole measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    pub schema: String,
    pub seed: u64,
    pub max_row_s: f64,
    pub started_at: String,
    pub host: HostFacts,
    pub profile_sha256: String,
    pub profile: HardwareProfile,
    pub rows: Vec<RowRecord>,
}

impl Rows {
    pub fn from_json(text: &str) -> Result<Rows, RecordError> {
        let rows: Rows = serde_json::from_str(text)?;
        if rows.schema != ROWS_SCHEMA {
            return Err(RecordError::Schema(rows.schema));
        }
        Ok(rows)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("rows are plain data with string keys")
    }
}
