//! What the planner chooses from: the discrete choices (batch sizes, formats, who attends), each with
//! its table of terms and a quick lower bound. Choosing among them is search.rs.

use crate::cost::affine::{CACHE, SHARES, ShareVector, shares_from};
use crate::cost::footprint::{BlockShape, Buffer, Footprint, FootprintInput, HostBytes};
use crate::cost::rates::Rates;
use crate::cost::steps::Moments;
use crate::cost::terms::{TermInput, Terms};
use crate::dtype::Dtype;
use crate::model::ModelSpec;
use crate::placement::{MatrixSplit, Placement, WeightHome};
use crate::plan::MOST_SEQUENCES;
use crate::planner::lp::{Equality, Program};
use crate::planner::parallel::in_parallel;
use crate::policy::{Compute, DeviceKind, Policy, Shares, multiplied_in_place};
use crate::tier::{PerTier, Tier};
use crate::workload::{Lengths, Workload};
use std::borrow::Cow;

/// Sequences per batch and batches per block that are tried besides even cuts of the prompts.
const BATCH_SIZES: [usize; 19] = [
    1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024,
];
const BATCH_COUNTS: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
/// Even cuts of the prompts into this many rounds of batches are tried as well.
const EVEN_CUTS: usize = 6;
/// A block of free size holds at most this many sequences: beyond, nothing is gained per token.
const FREE_BLOCK_MAX: usize = 4096;

/// What the caller has decided already; None leaves it to the planner.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fixed {
    /// FlexLLMGen's six numbers.
    pub percent: Option<[f64; 6]>,
    /// Fraction of the weights outside the GPU that is multiplied where it lies.
    pub cpu_compute_share: Option<f64>,
    pub gpu_batch_size: Option<usize>,
    pub num_gpu_batches: Option<usize>,
    pub pin_weight: Option<bool>,
    pub compress_weight: Option<bool>,
    pub compress_cache: Option<bool>,
    pub cpu_cache_compute: Option<bool>,
    pub overlap: Option<bool>,
    pub compute: Compute,
}

/// What is to be generated.
#[derive(Clone, Copy, Debug)]
pub enum Job<'a> {
    Given(&'a Workload),
    /// One full block of equal prompts, as large as is best per token.
    BestBlock {
        prompt_tokens: u32,
        gen_tokens: u32,
    },
}

impl Job<'_> {
    /// The lines of a free block end where the model's positions do, as those of a given job already do.
    pub fn within(self, model: &ModelSpec) -> Self {
        match self {
            Job::Given(_) => self,
            Job::BestBlock {
                prompt_tokens,
                gen_tokens,
            } => Job::BestBlock {
                prompt_tokens,
                gen_tokens: gen_tokens.min(model.room_after(prompt_tokens as usize) as u32),
            },
        }
    }
}

/// Candidates with lower bounds of their seconds (per token where the block is free), rising.
pub type Bounds = Vec<(f64, Candidate)>;

/// What tables and sizes follow from: a given job's lengths, or those of one line of a free block.
#[derive(Clone, Copy, Debug)]
pub struct JobLengths {
    moments: Moments,
    lengths: Lengths,
}

impl JobLengths {
    pub fn new(job: &Job) -> Self {
        let of = |workload: &Workload| JobLengths {
            moments: Moments::new(workload),
            lengths: Lengths::from(workload),
        };
        match *job {
            Job::Given(workload) => of(workload),
            Job::BestBlock {
                prompt_tokens,
                gen_tokens,
            } => of(&Workload::uniform(1, prompt_tokens, gen_tokens)),
        }
    }
}

/// One discrete choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub gpu_batch_size: usize,
    pub num_gpu_batches: usize,
    pub double_buffer: bool,
    pub compress_weight: bool,
    pub compress_cache: bool,
    pub cpu_cache_compute: bool,
    /// May the CPU multiply rows beside a GPU?
    pub cpu_side: bool,
}

impl Candidate {
    pub fn lossless(&self) -> bool {
        !self.compress_weight && !self.compress_cache
    }

    pub fn slots(&self) -> usize {
        self.gpu_batch_size * self.num_gpu_batches
    }
}

/// Everything that a search looks at.
#[derive(Clone)]
pub struct Space<'a> {
    pub model: &'a ModelSpec,
    pub job: Job<'a>,
    pub lengths: JobLengths,
    pub rates: Cow<'a, Rates>,
    pub fixed: Fixed,
    pub host: HostBytes,
    /// Bytes of the whole process per tier; `gpu` is 0 without one.
    pub budget: PerTier<u64>,
    /// Only batch sizes and counts that are powers of two: enough to say what a strategy brings.
    pub coarse: bool,
    /// Packed stores that exist already, native and 4-bit: their bytes need no room again.
    pub stored_bytes: [u64; 2],
    /// The system lets us page-lock as much as could ever be pinned.
    pub may_pin: bool,
    pub kv: Dtype,
    pub threads: usize,
}

/// A candidate's tables.
pub struct Priced {
    pub lengths: Lengths,
    pub moments: Moments,
    pub policy: Policy,
    pub terms: Terms,
    /// Everything but the homes, at the least.
    pub overhead_bytes: PerTier<f64>,
}

impl<'a> Space<'a> {
    pub fn device(&self) -> DeviceKind {
        self.rates.device
    }

    /// The workload of a block size.
    pub fn workload(&self, slots: usize) -> Cow<'a, Workload> {
        match self.job {
            Job::Given(workload) => Cow::Borrowed(workload),
            Job::BestBlock {
                prompt_tokens,
                gen_tokens,
            } => Cow::Owned(Workload::uniform(slots, prompt_tokens, gen_tokens)),
        }
    }

    /// Means and sums of the lengths of the job, or of one block of so many equal lines.
    fn sizes_of(&self, slots: usize) -> (Moments, Lengths) {
        let JobLengths { moments, lengths } = self.lengths;
        match self.job {
            Job::Given(_) => (moments, lengths),
            Job::BestBlock { .. } => (moments.times(slots as u64), lengths.times(slots as u64)),
        }
    }

    /// Room for one tier, an existing store's bytes included.
    pub fn room_bytes(&self, tier: Tier, compress_weight: bool) -> f64 {
        let stored = match tier {
            Tier::Disk => self.stored_bytes[usize::from(compress_weight)],
            _ => 0,
        };
        (self.budget[tier] + stored) as f64
    }

    /// All discrete choices, in a fixed order.
    pub fn candidates(&self) -> Vec<Candidate> {
        let gpu = self.device().has_gpu();
        let either = |fixed: Option<bool>| match fixed {
            Some(value) => vec![value],
            None => vec![false, true],
        };
        let by_cpu = if gpu {
            either(self.fixed.cpu_cache_compute)
        } else {
            vec![true]
        };
        let sides = match self.fixed.cpu_compute_share {
            _ if !gpu => vec![true],
            Some(share) => vec![share > 0.0],
            None => vec![false, true],
        };
        let mut all = Vec::new();
        for (gpu_batch_size, num_gpu_batches, double_buffer) in self.buffered_shapes() {
            for &compress_weight in &either(self.fixed.compress_weight) {
                for &compress_cache in &either(self.fixed.compress_cache) {
                    for &cpu_cache_compute in &by_cpu {
                        all.extend(sides.iter().map(|&cpu_side| Candidate {
                            gpu_batch_size,
                            num_gpu_batches,
                            double_buffer,
                            compress_weight,
                            compress_cache,
                            cpu_cache_compute,
                            cpu_side,
                        }));
                    }
                }
            }
        }
        all
    }

    /// With one batch nothing is computed while the next layer's weights could come.
    fn buffered_shapes(&self) -> Vec<(usize, usize, bool)> {
        let once = self
            .shapes()
            .into_iter()
            .map(|(size, count)| (size, count, false));
        let gpu = self.device().has_gpu();
        let twice = |&(size, count, _): &(usize, usize, bool)| {
            (gpu && count > 1 && !self.coarse).then_some((size, count, true))
        };
        once.flat_map(|shape| [Some(shape), twice(&shape)].into_iter().flatten())
            .collect()
    }

    /// Batch shapes that are tried: no more slots than prompts need.
    fn shapes(&self) -> Vec<(usize, usize)> {
        let lines = match self.job {
            Job::Given(workload) => workload.prompts().max(1),
            Job::BestBlock { .. } => FREE_BLOCK_MAX,
        };
        let counts: Vec<usize> = match self.fixed.num_gpu_batches {
            Some(count) => vec![count],
            None if !self.device().has_gpu() => vec![1],
            None => self.thinned(&BATCH_COUNTS),
        };
        let mut shapes = Vec::new();
        for &count in &counts {
            for size in self.sizes(lines, count) {
                let whole_batches_idle = (count - 1).saturating_mul(size) >= lines;
                let asked = self.fixed.num_gpu_batches.is_some();
                if asked || !whole_batches_idle {
                    shapes.push((size, count));
                }
            }
        }
        shapes
    }

    fn thinned(&self, steps: &[usize]) -> Vec<usize> {
        let keep = |n: &&usize| !self.coarse || n.is_power_of_two();
        steps.iter().filter(keep).copied().collect()
    }

    fn sizes(&self, lines: usize, count: usize) -> Vec<usize> {
        if let Some(size) = self.fixed.gpu_batch_size {
            return vec![size];
        }
        let mut sizes = self.thinned(&BATCH_SIZES);
        sizes.retain(|&s| s <= lines);
        if matches!(self.job, Job::Given(_)) {
            sizes.extend((1..=EVEN_CUTS).map(|cut| lines.div_ceil(cut * count)));
        }
        // What a saved plan may hold.
        sizes.retain(|&s| s * count <= MOST_SEQUENCES);
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// The policy of a candidate with given shares.
    pub fn policy(&self, candidate: &Candidate, shares: Shares) -> Policy {
        Policy {
            shares,
            gpu_batch_size: candidate.gpu_batch_size,
            num_gpu_batches: candidate.num_gpu_batches,
            pin_weight: self.pin_weight(),
            compress_weight: candidate.compress_weight,
            compress_cache: candidate.compress_cache,
            cpu_cache_compute: candidate.cpu_cache_compute,
            double_buffer: candidate.double_buffer,
            overlap: self.fixed.overlap.unwrap_or(true),
            compute: self.fixed.compute,
            kv: self.kv,
            threads: self.threads,
        }
    }

    /// Pinned copies are never slower and our pinned memory is exact, so that only the system's limit
    /// on page-locked bytes speaks against it.
    fn pin_weight(&self) -> bool {
        let useful = self.device().has_gpu() && self.may_pin;
        self.fixed.pin_weight.unwrap_or(useful)
    }

    /// Shares that may be positive.
    pub fn allowed(&self, candidate: &Candidate) -> [bool; SHARES] {
        let gpu = self.device().has_gpu();
        let mut allowed = [true; SHARES];
        for index in [0, 1, 3, 5, 8] {
            allowed[index] = gpu;
        }
        for index in [2, 4] {
            allowed[index] = !gpu || candidate.cpu_side;
        }
        // A CUDA machine's store has the GPU's layout: rows on disk that the CPU multiplies are written
        // again, turned, whenever a run begins. They are where that is asked for.
        allowed[4] &= self.device() != DeviceKind::Cuda || self.fixed.cpu_compute_share.is_some();
        allowed
    }

    /// What the caller fixed, as equations.
    pub fn equalities(&self) -> Vec<Equality> {
        let equal = |terms: &[(usize, f64)], value: f64| Equality {
            terms: terms.to_vec(),
            value,
        };
        let mut list = Vec::new();
        if let Some(percent) = self.fixed.percent {
            let [wg, wc, cg, cc, hg, hc] = percent.map(|p| p / 100.0);
            list.push(equal(&[(0, 1.0)], wg));
            list.push(equal(&[(1, 1.0), (2, 1.0)], wc));
            for (index, value) in [(5, cg), (6, cc), (8, hg), (9, hc)] {
                list.push(equal(&[(index, 1.0)], value));
            }
        }
        if let Some(part) = self.fixed.cpu_compute_share
            && self.device().has_gpu()
        {
            match self.fixed.percent {
                Some([wg, wc, ..]) => {
                    let [cpu, all] = [wc, 100.0 - wg].map(|p| p / 100.0);
                    let [cpu, disk] = multiplied_in_place([cpu, (all - cpu).max(0.0)], part);
                    list.extend([equal(&[(2, 1.0)], cpu), equal(&[(4, 1.0)], disk)]);
                }
                // compute = part · (ship + compute) of both together.
                None => {
                    let (ship, compute) = (-part, 1.0 - part);
                    let both = [(1, ship), (2, compute), (3, ship), (4, compute)];
                    list.push(equal(&both, 0.0));
                }
            }
        }
        list
    }

    /// The tables of one candidate.
    pub fn price(&self, candidate: &Candidate) -> Priced {
        let (moments, lengths) = self.sizes_of(candidate.slots());
        let policy = self.policy(candidate, self.nearest_home());
        let mut terms = Terms::new(&TermInput {
            model: self.model,
            moments: &moments,
            rates: &self.rates,
            policy: &policy,
            cpu_side: candidate.cpu_side,
            at: None,
        });
        if self.host.unpacked {
            // Without a store rows at home on disk are what is written there.
            let weights = terms.homes.gpu.coef[0];
            terms.homes.disk.coef[3..CACHE].fill(weights);
        }
        let overhead_bytes = self.least_overhead(&policy, &lengths);
        Priced {
            lengths,
            moments,
            policy,
            terms,
            overhead_bytes,
        }
    }

    /// Lower bounds of all candidates in seconds (per token where the block is free), rising.
    pub fn bounds(&self, keep: &dyn Fn(&Candidate) -> bool) -> Bounds {
        let equalities = self.equalities();
        let candidates: Vec<Candidate> = self.candidates().into_iter().filter(keep).collect();
        let one = |candidate: &Candidate| {
            let priced = self.price(candidate);
            let program = self.program(candidate, &priced, (&equalities, priced.overhead_bytes));
            Some((program.bound_s()? / priced.per(self.job), *candidate))
        };
        let mut bounds = in_parallel(&candidates, one);
        // A stable sort: equal bounds stay in the candidates' order whatever the number of threads.
        bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        bounds
    }

    /// The linear program of a candidate, given what everything but the homes takes.
    pub fn program<'p>(
        &self,
        candidate: &Candidate,
        priced: &'p Priced,
        (equalities, overhead_bytes): (&'p [Equality], PerTier<f64>),
    ) -> Program<'p> {
        let mut capacity_bytes = PerTier::default();
        for tier in Tier::ALL {
            let room = self.room_bytes(tier, candidate.compress_weight);
            capacity_bytes[tier] = room - overhead_bytes[tier];
        }
        Program {
            terms: &priced.terms,
            allowed: self.allowed(candidate),
            equalities,
            capacity_bytes,
        }
    }

    /// Everything at home where it is computed with.
    fn nearest_home(&self) -> Shares {
        let mut vector: ShareVector = [0.0; SHARES];
        let gpu = self.device().has_gpu();
        let homes = if gpu { [0, 5, 8] } else { [2, 6, 9] };
        homes.into_iter().for_each(|i| vector[i] = 1.0);
        shares_from(&vector)
    }

    /// Buffers and process of a run that streams nothing: no placement takes less beside its homes.
    fn least_overhead(&self, policy: &Policy, lengths: &Lengths) -> PerTier<f64> {
        let head_only = ModelSpec {
            layers: 0,
            ..self.model.clone()
        };
        let home = if self.device().has_gpu() {
            WeightHome::Gpu
        } else {
            WeightHome::CpuCompute
        };
        let mut placement = Placement::new(&head_only, policy);
        for (split, matrix) in placement.splits.iter_mut().zip(&placement.matrices) {
            *split = MatrixSplit::default();
            split.panels[home as usize] = matrix.panels();
        }
        placement.smalls_bytes = self.model.smalls().iter().map(|s| s.bytes()).sum();
        let block = BlockShape::from_lengths(lengths, policy, &placement);
        let footprint = self.footprint((policy, &placement, &block));
        let tables = crate::cost::kernel_bytes(footprint.arena_bytes(Tier::Cpu)) as f64;
        PerTier {
            gpu: overhead(&footprint, Tier::Gpu),
            cpu: overhead(&footprint, Tier::Cpu) - tables,
            disk: footprint.store_bytes as f64,
        }
    }

    /// The exact bytes of a realised policy.
    pub fn footprint(
        &self,
        (policy, placement, block): (&Policy, &Placement, &BlockShape),
    ) -> Footprint {
        Footprint::new(&FootprintInput {
            model: self.model,
            policy,
            placement,
            block,
            device: self.device(),
            host: self.host,
        })
    }
}

/// A tier's bytes beside weight panels, cache and hidden states at home.
fn overhead(footprint: &Footprint, tier: Tier) -> f64 {
    let at_home: u64 = [Buffer::Weights, Buffer::Cache, Buffer::Hidden]
        .iter()
        .map(|&buffer| footprint.buffer(tier, buffer))
        .sum();
    footprint.total(tier).saturating_sub(at_home) as f64
}

impl Priced {
    /// What seconds are divided by: nothing for a given job, tokens where the block is free.
    pub fn per(&self, job: Job) -> f64 {
        match job {
            Job::Given(_) => 1.0,
            Job::BestBlock { .. } => {
                let tokens = match self.moments.generated_tokens {
                    0 => self.moments.prompt_tokens,
                    generated => generated,
                };
                tokens.max(1) as f64
            }
        }
    }
}
