//! The door: what a person sees. Rendering of a plan lives in show_plan; nothing is decided here.

pub mod accuracy;
pub mod arg_groups;
pub mod args;
pub mod calibrate;
pub mod campaign;
pub mod commands;
pub mod execute;
pub mod failure;
pub mod flexllmgen;
pub mod gpu;
pub mod progress;
pub mod prompt_lines;
pub mod prompts;
pub mod proof_args;
pub mod results;
pub mod rivals;
mod room;
pub mod series;
pub mod settle;
pub mod show_accuracy;
pub mod show_compare;
pub mod show_plan;
pub mod solve;
pub mod step_down;
pub mod trial;
pub mod values;
pub mod weights;
