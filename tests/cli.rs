//! The program as a user meets it: the built binary, its files and streams, nothing from inside. Every
//! test has a profile ready, so that none of them measures the machine; what happens inside is tested
//! beside the code and in the other files here.

#[path = "cli/disks.rs"]
mod disks;
#[path = "cli/endings.rs"]
mod endings;
#[path = "cli/flags.rs"]
mod flags;
#[path = "cli/harness.rs"]
mod harness;
#[path = "cli/lines.rs"]
mod lines;
#[path = "cli/memory.rs"]
mod memory;
#[path = "cli/models.rs"]
mod models;
#[path = "cli/placement.rs"]
mod placement;
#[path = "cli/plans.rs"]
mod plans;
#[path = "cli/proofs.rs"]
mod proofs;
mod running;
#[path = "cli/shapes.rs"]
mod shapes;
#[path = "cli/through.rs"]
mod through;
#[path = "cli/unpacked.rs"]
mod unpacked;
