//! What a policy costs: bytes per tier (footprint) and seconds per lane (rates, terms, estimate).

pub mod affine;
pub mod block;
pub mod cuda_buffers;
pub mod curves;
pub mod estimate;
pub mod figures;
pub mod footprint;
pub mod layer;
pub mod rates;
pub mod steps;
pub mod terms;
