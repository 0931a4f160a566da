//! How a workload falls into blocks, batches and steps: which passes there are, how often each comes
//! and how many rows and cached tokens it meets. No seconds (terms.rs) and no bytes (footprint.rs).

use crate::cost::footprint::CHUNK_ROWS_MAX;
use crate::tier::Phase;
use crate::workload::Workload;

/// Decode is priced as this many stretches of tokens, each with its own maximum over lanes.
const DECODE_STRETCHES: usize = 3;

/// Means of a workload's lengths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    pub lines: f64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// Lines that return a first token with their prefill.
    pub first_tokens: u64,
    /// Mean prompt.
    pub prompt: f64,
    /// Mean of Σ keys seen over a prompt's queries.
    pub prompt_keys: f64,
    /// Mean and largest number of decode steps of a line.
    pub steps: f64,
    pub steps_max: f64,
    /// Mean cached tokens.
    pub kv: f64,
}

impl Moments {
    pub fn new(workload: &Workload) -> Self {
        let lines = workload.prompts().max(1) as f64;
        let mean = |of: &dyn Fn(f64, f64) -> f64| {
            let sum: f64 = workload
                .lines
                .iter()
                .map(|l| of(l.prompt_tokens as f64, l.gen_tokens as f64))
                .sum();
            sum / lines
        };
        let first = workload.lines.iter().filter(|l| l.gen_tokens > 0).count();
        Moments {
            lines: workload.prompts() as f64,
            prompt_tokens: workload.prompt_tokens(),
            generated_tokens: workload.gen_tokens(),
            first_tokens: first as u64,
            prompt: mean(&|p, _| p),
            prompt_keys: mean(&|p, _| p * (p + 1.0) / 2.0),
            steps: mean(&|_, g| (g - 1.0).max(0.0)),
            steps_max: (workload.gen_tokens_max() as f64 - 1.0).max(0.0),
            kv: mean(&|p, g| p + (g - 1.0).max(0.0)),
        }
    }
}

impl Moments {
    /// As many times the same lines.
    pub fn times(self, count: u64) -> Moments {
        Moments {
            lines: self.lines * count as f64,
            prompt_tokens: self.prompt_tokens * count,
            generated_tokens: self.generated_tokens * count,
            first_tokens: self.first_tokens * count,
            ..self
        }
    }
}

/// One pass over all stages for one block, and how often it comes in the whole job.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub phase: Phase,
    pub times: f64,
    /// (sequences, batches of that many), sequences being means over a stretch.
    pub batches: Vec<(f64, f64)>,
    /// New rows per sequence.
    pub rows: f64,
    /// Cached tokens that each sequence's attention reads, the new ones included.
    pub context: f64,
    /// Σ keys seen over the new rows' queries, per sequence.
    pub keys: f64,
}

impl Step {
    pub fn sequences(&self) -> f64 {
        self.batches.iter().map(|(n, count)| n * count).sum()
    }

    pub fn batch_count(&self) -> f64 {
        self.batches.iter().map(|b| b.1).sum()
    }

    /// (rows of a chunk, chunks of that many) over all batches: a batch is cut evenly.
    pub fn chunks(&self) -> Vec<(f64, f64)> {
        let cut = |&(sequences, count): &(f64, f64)| {
            let rows = sequences * self.rows;
            let pieces = (rows / CHUNK_ROWS_MAX as f64 - 1e-9).ceil().max(1.0);
            (rows / pieces, pieces * count)
        };
        self.batches.iter().map(cut).collect()
    }
}

/// All steps of a job whose blocks hold `gpu_batch_size · num_gpu_batches` sequences.
pub fn steps(moments: &Moments, gpu_batch_size: usize, num_gpu_batches: usize) -> Vec<Step> {
    let slots = (gpu_batch_size * num_gpu_batches) as f64;
    let full_blocks = (moments.lines / slots).floor();
    let rest = moments.lines - full_blocks * slots;
    let mut all = Vec::new();
    if full_blocks > 0.0 {
        let batches = vec![(gpu_batch_size as f64, num_gpu_batches as f64)];
        // While more lines wait, a finished sequence's slot is refilled at once.
        let refilled = rest > 0.0 || full_blocks > 1.0;
        let length = if refilled {
            moments.steps
        } else {
            moments.steps_max
        };
        all.extend(block_steps(moments, batches, (full_blocks, length)));
    }
    if rest > 0.0 {
        let size = gpu_batch_size as f64;
        let mut batches = vec![(size, (rest / size).floor()), (rest % size, 1.0)];
        batches.retain(|b| b.0 > 0.0 && b.1 > 0.0);
        all.extend(block_steps(moments, batches, (1.0, moments.steps_max)));
    }
    all
}

/// Prefill and decode stretches of `times` equal blocks that each decode for `length` steps.
fn block_steps(
    moments: &Moments,
    batches: Vec<(f64, f64)>,
    (times, length): (f64, f64),
) -> Vec<Step> {
    let mut all = vec![Step {
        phase: Phase::Prefill,
        times,
        batches: batches.clone(),
        rows: moments.prompt,
        context: moments.prompt,
        keys: moments.prompt_keys,
    }];
    if length <= 0.0 {
        return all;
    }
    // Sequences that ended early leave fewer rows to the later steps.
    let active = (moments.steps / length).min(1.0);
    let stretches = (length.ceil() as usize).min(DECODE_STRETCHES);
    let part = length / stretches as f64;
    for stretch in 0..stretches {
        let context = moments.prompt + (stretch as f64 + 0.5) * part + 0.5;
        all.push(Step {
            phase: Phase::Decode,
            times: times * part,
            batches: batches.iter().map(|&(n, c)| (n * active, c)).collect(),
            rows: 1.0,
            context,
            keys: context,
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lines_fall_into_whole_blocks_and_a_rest() {
        let moments = Moments::new(&Workload::uniform(11, 100, 7));
        let all = steps(&moments, 2, 2);
        let decode = |s: &&Step| s.phase == Phase::Decode;
        let tokens: f64 = all
            .iter()
            .filter(decode)
            .map(|s| s.times * s.sequences())
            .sum();
        assert!((tokens - 66.0).abs() < 1e-9, "{tokens}");
        let prompts: f64 = all
            .iter()
            .filter(|s| s.phase == Phase::Prefill)
            .map(|s| s.times * s.sequences() * s.rows)
            .sum();
        assert!((prompts - 1100.0).abs() < 1e-9);
        // Each decode step attends to the prompt and all tokens before it, itself included.
        let attended: f64 = all
            .iter()
            .filter(decode)
            .map(|s| s.times * s.sequences() * s.context)
            .sum();
        let exact: f64 = (1..=6).map(|t| (100.0 + t as f64) * 11.0).sum();
        assert!((attended - exact).abs() < 1e-6, "{attended} {exact}");
    }

    #[test]
    fn chunks_hold_all_rows() {
        let moments = Moments::new(&Workload::uniform(3, 700, 1));
        let all = steps(&moments, 3, 1);
        assert_eq!(all.len(), 1);
        let rows: f64 = all[0].chunks().iter().map(|(m, c)| m * c).sum();
        assert_eq!(rows, 2100.0);
        assert!(all[0].chunks().iter().all(|(m, _)| *m <= 512.0));
    }
}
