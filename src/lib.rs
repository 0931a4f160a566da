//! loadmaster: plans where an OPT model's weights, KV cache and activations go over GPU, DRAM and
//! disk so that generation runs as fast as the machine allows and never out of memory, runs it, and
//! says how right the plan was. Modules stand on floors; a lower floor knows nothing of a higher one.

// Floor 0: words
pub mod dtype;
pub mod tier;
pub mod units;

// Floor 1: facts
pub mod model;
pub mod profile;
pub mod workload;

// Floor 2: judgement
pub mod cost;
pub mod placement;
pub mod policy;

// Floor 3: decision
pub mod plan;
pub mod planner;

// Floor 4: hands
pub mod machine;

// Floor 5: work
pub mod checkpoint;
pub mod engine;
pub mod probe;
pub mod store;
pub mod tokenizer;

// Floor 6: telling
pub mod compare;
pub mod measured;
pub mod proof;
pub mod report;

// Floor 7: door
pub mod cli;
