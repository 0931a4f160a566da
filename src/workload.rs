//! Lengths and counts of what is to be generated. Never the text itself.

use serde::{Deserialize, Serialize};

/// One line of work: a prompt's length and how many tokens may follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineLength {
    pub prompt_tokens: u32,
    pub gen_tokens: u32,
}

impl LineLength {
    /// Tokens whose keys and values are kept: the last generated one is never attended to.
    pub fn kv_tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.gen_tokens.saturating_sub(1))
    }
}

/// All lines in input order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Workload {
    pub lines: Vec<LineLength>,
}

impl Workload {
    /// `prompts` equal lines.
    pub fn uniform(prompts: usize, prompt_tokens: u32, gen_tokens: u32) -> Self {
        Workload {
            lines: vec![
                LineLength {
                    prompt_tokens,
                    gen_tokens
                };
                prompts
            ],
        }
    }

    /// As many lines as have these tokens in all, each with the mean of them, rounded down.
    pub fn of_totals(lines: u64, prompt_tokens: u64, gen_tokens: u64) -> Self {
        let mean = |tokens: u64| (tokens / lines.max(1)) as u32;
        Workload::uniform(lines as usize, mean(prompt_tokens), mean(gen_tokens))
    }

    pub fn prompts(&self) -> usize {
        self.lines.len()
    }

    pub fn prompt_tokens(&self) -> u64 {
        self.lines.iter().map(|l| l.prompt_tokens as u64).sum()
    }

    pub fn prompt_tokens_max(&self) -> u32 {
        self.lines
            .iter()
            .map(|l| l.prompt_tokens)
            .max()
            .unwrap_or(0)
    }

    pub fn gen_tokens(&self) -> u64 {
        self.lines.iter().map(|l| l.gen_tokens as u64).sum()
    }

    pub fn gen_tokens_max(&self) -> u32 {
        self.lines.iter().map(|l| l.gen_tokens).max().unwrap_or(0)
    }

    /// Cached tokens of the longest line.
    pub fn kv_tokens_max(&self) -> u64 {
        self.lines
            .iter()
            .map(LineLength::kv_tokens)
            .max()
            .unwrap_or(0)
    }
}

/// What a block's sizes follow from: totals and maxima of a workload's lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lengths {
    pub prompts: u64,
    pub prompt_tokens: u64,
    pub prompt_tokens_max: u64,
    pub kv_tokens: u64,
    pub kv_tokens_max: u64,
}

impl Lengths {
    /// As many times the same lines.
    pub fn times(self, count: u64) -> Lengths {
        Lengths {
            prompts: self.prompts * count,
            prompt_tokens: self.prompt_tokens * count,
            kv_tokens: self.kv_tokens * count,
            ..self
        }
    }
}

impl From<&Workload> for Lengths {
    fn from(workload: &Workload) -> Self {
        Lengths {
            prompts: workload.prompts() as u64,
            prompt_tokens: workload.prompt_tokens(),
            prompt_tokens_max: workload.prompt_tokens_max() as u64,
            kv_tokens: workload.lines.iter().map(LineLength::kv_tokens).sum(),
            kv_tokens_max: workload.kv_tokens_max(),
        }
    }
}
