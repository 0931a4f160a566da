//! What a run did, as one document (schema.md: report): the plan as run, the estimate at the lengths
//! that really came, and what was measured. Plain data and its reading; comparing is compare.rs.

use crate::cost::figures::{Figures, LaneFigures};
use crate::plan::Plan;
use crate::tier::{Lane, PerLane};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub const REPORT_SCHEMA: &str = "loadmaster.report/1";

/// Why a report could not be read.
#[derive(Debug, Error)]
pub enum ReportError {
    #[error("report: {0}; make a new one with `loadmaster exec PLAN --report FILE`")]
    Json(#[from] serde_json::Error),
    #[error("report: schema is \"{0}\", but this version reads \"{REPORT_SCHEMA}\": run again")]
    Schema(String),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunOutcome {
    Done,
    Interrupted,
    Failed,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LineCounts {
    pub total: u64,
    pub ok: u64,
    pub failed: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFacts {
    pub cpu: String,
    pub gpu: Option<String>,
    pub kernel: String,
    pub version: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetupFigures {
    pub probe_s: f64,
    pub pack_s: f64,
    pub load_s: f64,
    pub written_bytes: u64,
}

impl SetupFigures {
    /// Of a run that has measured the machine and done nothing else yet.
    pub fn after_probe(probe_s: f64) -> Self {
        SetupFigures {
            probe_s,
            ..SetupFigures::default()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunReport {
    pub schema: String,
    pub plan: Plan,
    pub outcome: RunOutcome,
    pub started_at: String,
    pub finished_at: String,
    pub lines: LineCounts,
    pub host: HostFacts,
    pub setup: SetupFigures,
    /// The estimate at the lengths that really came.
    pub repriced: Figures,
    pub measured: Figures,
}

impl RunReport {
    pub fn from_json(text: &str) -> Result<Self, ReportError> {
        let report: RunReport = serde_json::from_str(text)?;
        if report.schema != REPORT_SCHEMA {
            return Err(ReportError::Schema(report.schema));
        }
        Ok(report)
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report is plain data with string keys")
    }
}

/// The lane that was busy longest in each phase.
pub fn busiest(lanes: &PerLane<LaneFigures>, seconds: fn(&LaneFigures) -> f64) -> String {
    let longest = Lane::with_most(|lane| seconds(&lanes[lane]));
    longest.name().to_owned()
}
