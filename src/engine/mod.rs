//! The offloaded runtime: sequences in slots, one pass after another over the stages, tokens out.

mod cache;
mod core;
mod forward;
mod layout;
mod product;
mod ring;
mod schedule;
mod step;
mod visits;
mod weights;
