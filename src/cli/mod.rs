//! The door: what a person sees. Rendering of a plan lives in show_plan; nothing is decided here.
pub mod show_plan;
