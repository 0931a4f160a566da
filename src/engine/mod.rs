//! The offloaded runtime: sequences in slots, one pass after another over the stages, tokens out.

mod bring;
mod cache;
mod core;
mod forward;
mod layout;
mod load;
pub mod loading;
pub mod open;
mod product;
pub mod replay;
mod ring;
mod run;
pub mod sampling;
mod schedule;
mod step;
mod turns;
mod visits;
mod weights;

pub use self::core::RunFacts;
pub use self::layout::Layout;
pub use self::run::{
    Engine, EngineError, FinishReason, Finished, Outcome, Progress, Request, RunOptions, Sink,
};
