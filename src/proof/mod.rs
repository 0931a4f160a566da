//! What proves the plan: jobs drawn at random and judged (accuracy), multipliers fitted to reports
//! (calibrate), budgets tried in memory cgroups (campaign), the planner's choice against others
//! (rivals). Drawing, running, judging and their saved files; nothing is printed here.

pub mod bound;
pub mod draw;
pub mod duel;
pub mod fit;
pub mod judge;
pub mod record;
pub mod triple;
pub mod visit;
