//! The text of a plan.

use super::failure::Failure;
use crate::plan::Plan;

pub fn show(plan: &Plan, _explain: bool) -> String {
    plan.to_toml()
}

/// Why nothing fits, and what would be enough.
pub fn shortfall(plan: &Plan) -> Failure {
    Failure::failed(format!("{:?}", plan.missing_bytes))
}
