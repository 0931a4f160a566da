//! The one table of affine terms: for a model, a workload and everything of a policy but its shares,
//! each lane's seconds and bytes and each tier's home bytes as constant + Σ coefficient · share. The
//! linear program, the estimator and the ladder read this table; nobody else writes formulas.
//!
//! A stage's time is the largest of its rows (cycles.rs).

use crate::cost::affine::{Affine, CACHE, HIDDEN, ShareVector};
use crate::cost::cycles::{Place, Turn, parallel_rows};
use crate::cost::footprint::CHUNK_ROWS_MAX;
use crate::cost::layer::LayerBuilder;
use crate::cost::load::Load;
use crate::cost::rates::Rates;
use crate::cost::serial::serial_rows;
use crate::cost::steps::{Moments, steps};
use crate::model::ModelSpec;
use crate::policy::{DeviceKind, Policy};
use crate::tier::{Lane, PerLane, PerTier, Phase, Resource, Tier};

/// What a table is made from. The policy's own shares are not looked at.
#[derive(Clone, Copy)]
pub struct TermInput<'a> {
    pub model: &'a ModelSpec,
    pub moments: &'a Moments,
    pub rates: &'a Rates,
    pub policy: &'a Policy,
    /// On a device with a GPU: may the CPU multiply rows beside it? That costs transfers of the
    /// inputs whatever the share, so it is a choice of its own.
    pub cpu_side: bool,
    /// The shares at which the table will be read, where they are known: the first piece of anything
    /// brings operations and waits of its own, which no affine term can say. The linear program's tables
    /// go without them and are nowhere above.
    pub at: Option<ShareVector>,
}

/// Which part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// One decoder layer.
    Layer,
    /// Looking up the tokens of one pass: nothing else can run before.
    Tokens,
    /// Head of one pass, and what is done to embedded rows.
    Ends,
    /// Filling the pipeline, once.
    Fill,
}

/// What holds a part's time up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    Lane(Lane),
    Resource(Resource),
    /// The second lane, slowed while the first runs.
    Pair(Lane, Lane),
    /// A cycle of waits: which, on which of a computation's ways, and the lane that takes most of it.
    Cycle(Turn, u8, Lane),
    /// The GPU waiting for attention on the CPU, for its products, or for both, batch after batch.
    Attending,
    Multiplying,
    AttendingAndMultiplying,
    /// What visits over a lane waiting there behind weights.
    Queued(Lane),
    /// Weights that can only come once the layer before is nearly done with its own.
    Stall(Lane),
    /// No overlap: tasks one after another, in each the longest of what it sets going.
    Serial(u8),
    /// Everything one after another.
    Sum,
}

#[derive(Clone, Debug)]
pub struct Row {
    pub bound: Bound,
    pub seconds: Affine,
}

/// One part of one step: equal stages share one segment.
#[derive(Clone, Debug)]
pub struct Segment {
    pub phase: Phase,
    pub part: Part,
    /// How often it comes in the whole job.
    pub times: f64,
    pub lanes: PerLane<Affine>,
    pub bytes: PerLane<Affine>,
    /// What each lane is on average to those beside it.
    pub load: PerLane<Load>,
    /// The time of the segment is the largest of these.
    pub rows: Vec<Row>,
}

#[derive(Clone, Debug)]
pub struct Terms {
    pub segments: Vec<Segment>,
    /// Bytes that grow with the shares; everything else is footprint.rs's.
    pub homes: PerTier<Affine>,
    pub overlap: bool,
}

/// What a builder gathers of one segment before its rows are known.
#[derive(Clone, Debug, Default)]
pub struct Work {
    pub lanes: PerLane<Affine>,
    pub bytes: PerLane<Affine>,
    /// Bytes that pass the DRAM bus.
    pub dram_bytes: Affine,
    /// Products of the compute device, and those that the CPU makes beside it.
    pub products: Affine,
    pub side_products: Affine,
    /// Rows down to the CPU for its products, and its results up.
    pub side: PerLane<Affine>,
    /// Norms and sums.
    pub rowwise: Affine,
    /// Attention on the compute device, and on the CPU beside it with its rows down and up.
    pub attention: Affine,
    pub beside: PerLane<Affine>,
    /// Streamed weights, cache and hidden state on their lanes.
    pub streams: PerLane<Affine>,
    pub cache: PerLane<Affine>,
    pub hidden: PerLane<Affine>,
    /// The lanes' seconds times what they are to others (`Load`).
    pub hard: PerLane<Affine>,
    pub flight: PerLane<Affine>,
}

impl Work {
    /// A disk's lane works for so many seconds for what is at one home.
    pub(super) fn moves(&mut self, (lane, home): (Lane, usize), seconds: f64, load: Load) {
        self.lanes[lane].coef[home] += seconds;
        self.hard[lane].coef[home] += seconds * load.hard;
        self.flight[lane].coef[home] += seconds * load.flight_s;
    }

    /// A lane computes for so many seconds on bytes in DRAM that are at one home.
    pub(super) fn reads(
        &mut self,
        (lane, home): (Lane, usize),
        (bytes, seconds): (f64, f64),
        rates: &Rates,
    ) {
        self.dram_bytes.coef[home] += bytes;
        self.hard[lane].coef[home] += seconds * rates.memory_part(bytes, seconds);
    }

    /// What a lane is to others on average, at equal shares.
    pub(super) fn load(&self, lane: Lane) -> Load {
        let sum = |affine: &Affine| affine.constant + affine.coef.iter().sum::<f64>();
        let all = sum(&self.lanes[lane]);
        if all <= 0.0 {
            return Load::default();
        }
        Load {
            hard: (sum(&self.hard[lane]) / all).min(1.0),
            flight_s: sum(&self.flight[lane]) / all,
        }
    }
}

impl Terms {
    pub fn new(input: &TermInput) -> Terms {
        let policy = input.policy;
        let all = steps(input.moments, policy.gpu_batch_size, policy.num_gpu_batches);
        let builder = LayerBuilder::new(input);
        let (streamed_bytes, streamed_pieces) =
            (builder.streamed_bytes(), builder.streamed_pieces());
        let mut segments = Vec::with_capacity(2 * all.len() + 1);
        for step in &all {
            let place = |part| Place {
                step,
                part,
                streamed_bytes,
                streamed_pieces,
            };
            let layers = step.times * input.model.layers as f64;
            for (part, times, work) in [
                (Part::Layer, layers, builder.layer(step)),
                (Part::Tokens, step.times, builder.tokens(step)),
                (Part::Ends, step.times, builder.ends(step)),
            ] {
                segments.push(segment(input, (place(part), times), work));
            }
        }
        if policy.overlap
            && let Some(first) = all.first()
        {
            let place = Place {
                step: first,
                part: Part::Fill,
                streamed_bytes,
                streamed_pieces,
            };
            segments.push(segment(input, (place, 1.0), builder.fill()));
        }
        segments.retain(|s| !s.rows.is_empty());
        Terms {
            segments,
            homes: homes(input, &builder),
            overlap: policy.overlap,
        }
    }
}

/// Bytes that grow with the shares: homes, and the parts of staging buffers and rings that do.
fn homes(input: &TermInput, builder: &LayerBuilder) -> PerTier<Affine> {
    let (model, policy, moments) = (input.model, input.policy, input.moments);
    let gpu = input.rates.device.has_gpu();
    let weights = builder.weights_bytes();
    let record = model.kv_record_bytes(policy.kv_format()) as f64;
    let batch_cache = policy.gpu_batch_size as f64 * moments.kv * record;
    let batch_hidden = policy.gpu_batch_size as f64 * moments.prompt * builder.hidden_row_bytes();
    let batches = policy.num_gpu_batches as f64;
    let mut homes = PerTier::<Affine>::default();
    homes.gpu.coef[0] = weights;
    homes.cpu.coef[1] = weights;
    homes.cpu.coef[2] = weights;
    if input.rates.device == DeviceKind::Cuda {
        // Turned into a file of the run's own: spill.rs.
        homes.disk.coef[4] = weights;
    }
    for tier in Tier::ALL {
        homes[tier].coef[CACHE + tier as usize] = model.layers as f64 * batches * batch_cache;
        homes[tier].coef[HIDDEN + tier as usize] = batches * batch_hidden;
    }
    // Two batches on their way, of what is at home elsewhere.
    let disk = Tier::Disk as usize;
    homes.cpu.coef[CACHE + disk] += 2.0 * batch_cache;
    homes.cpu.coef[HIDDEN + disk] += 2.0 * batch_hidden;
    for away in [Tier::Cpu, Tier::Disk].into_iter().filter(|_| gpu) {
        if !policy.cpu_cache_compute {
            homes.gpu.coef[CACHE + away as usize] += 2.0 * batch_cache;
        }
        homes.gpu.coef[HIDDEN + away as usize] += 2.0 * batch_hidden;
    }
    let batch_rows = policy.gpu_batch_size as f64 * moments.prompt;
    if policy.num_gpu_batches > 1 || batch_rows > CHUNK_ROWS_MAX as f64 {
        // A layer's streamed panels meet several products: all of them are there at once.
        let layer = builder.layer_bytes();
        homes.cpu.coef[3] += layer;
        homes.cpu.coef[4] += layer;
        if gpu {
            homes.gpu.coef[1] += layer;
            homes.gpu.coef[3] += layer;
        }
    }
    homes
}

fn segment(input: &TermInput, (place, times): (Place, f64), work: Work) -> Segment {
    let (step, part) = (place.step, place.part);
    let rows = match part {
        Part::Fill => vec![sum_row(&work)],
        Part::Tokens if !input.policy.overlap => vec![sum_row(&work)],
        _ if !input.policy.overlap => serial_rows(input, &place, &work),
        _ => parallel_rows(input, &place, &work),
    };
    let mut load = PerLane::default();
    Lane::ALL
        .iter()
        .for_each(|&lane| load[lane] = work.load(lane));
    Segment {
        phase: step.phase,
        part,
        times,
        load,
        lanes: work.lanes,
        bytes: work.bytes,
        rows: undominated(rows),
    }
}

fn sum_row(work: &Work) -> Row {
    let mut seconds = Affine::default();
    Lane::ALL.iter().for_each(|&l| seconds.add(&work.lanes[l]));
    Row {
        bound: Bound::Sum,
        seconds,
    }
}

/// Drops rows that can never be the largest.
fn undominated(rows: Vec<Row>) -> Vec<Row> {
    let mut kept: Vec<Row> = Vec::with_capacity(rows.len());
    for row in rows {
        if row.seconds.is_zero() || kept.iter().any(|k| row.seconds.is_below(&k.seconds)) {
            continue;
        }
        kept.retain(|k| !k.seconds.is_below(&row.seconds));
        kept.push(row);
    }
    kept
}
