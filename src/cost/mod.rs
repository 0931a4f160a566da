//! What a policy costs: bytes per tier (footprint) and seconds per lane.

pub mod figures;
pub mod footprint;
pub mod rates;
