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

// Floor 4: hands
pub mod machine;

// Floor 5: work
pub mod checkpoint;
pub mod probe;
pub mod store;
pub mod tokenizer;
