//! The one table of affine terms: for a model, a workload and everything of a policy but its shares,
//! each lane's seconds and bytes and each tier's home bytes as constant + Σ coefficient · share. The
//! linear program, the estimator and the ladder read this table; nobody else writes formulas.
//!
//! A stage's time is the largest of its rows: its lanes, the resources that lanes share, pairs of
//! lanes that slow each other, and the chain that one batch must pass in order. Without overlap it is
//! the sum of the lanes.

use crate::cost::affine::{Affine, CACHE, HIDDEN};
use crate::cost::footprint::{CHUNK_ROWS_MAX, RUN_AHEAD_BYTES};
use crate::cost::layer::LayerBuilder;
use crate::cost::rates::Rates;
use crate::cost::steps::{Moments, Step, steps};
use crate::model::ModelSpec;
use crate::policy::{DeviceKind, Policy};
use crate::tier::{Lane, PerLane, PerTier, Phase, Resource, Tier};

/// Of a layer's products the first one's part: 3 of 12 hidden² weights where ffn = 4 · hidden.
const FIRST_PRODUCT: f64 = 0.25;

/// What a table is made from. The policy's shares are not looked at.
#[derive(Clone, Copy)]
pub struct TermInput<'a> {
    pub model: &'a ModelSpec,
    pub moments: &'a Moments,
    pub rates: &'a Rates,
    pub policy: &'a Policy,
    /// On a device with a GPU: may the CPU multiply rows beside it? That costs transfers of the
    /// inputs whatever the share, so it is a choice of its own.
    pub cpu_side: bool,
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
    /// One batch passing its steps in order; the lane that takes most of it.
    Chain(Lane),
    /// The same by way of the products that the CPU makes beside a GPU.
    SideChain(Lane),
    /// The GPU waiting for attention on the CPU, for its products, or for both, batch after batch.
    Attending,
    Multiplying,
    AttendingAndMultiplying,
    /// The same with the CPU's results waiting on the link.
    Queued,
    /// Weights that can only come once the layer before is nearly done with its own.
    Stall(Lane),
    /// No overlap: all lanes one after another.
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
    /// How small each lane's requests are on average.
    pub smallness: PerLane<f64>,
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
    /// What a batch must do in order, besides products.
    pub serial: PerLane<Affine>,
    /// Products of the compute device, and those that the CPU makes beside it.
    pub products: Affine,
    pub side_products: Affine,
    /// Rows down to the CPU for its products, and its results up.
    pub side_links: Affine,
    /// Attention on the compute device, and on the CPU beside it with its rows down and up.
    pub attention: Affine,
    pub beside: Affine,
    /// Streamed weights on their lane.
    pub streams: PerLane<Affine>,
    /// Cache on its way up from disk.
    pub cache_reads: Affine,
    /// The lanes' seconds times how small their requests are.
    pub small: PerLane<Affine>,
}

impl Work {
    /// How small a lane's requests are on average, at equal shares.
    fn smallness(&self, lane: Lane) -> f64 {
        let sum = |affine: &Affine| affine.constant + affine.coef.iter().sum::<f64>();
        let all = sum(&self.lanes[lane]);
        if all > 0.0 {
            sum(&self.small[lane]) / all
        } else {
            0.0
        }
    }
}

impl Terms {
    pub fn new(input: &TermInput) -> Terms {
        let policy = input.policy;
        let all = steps(input.moments, policy.gpu_batch_size, policy.num_gpu_batches);
        let builder = LayerBuilder::new(input);
        let mut segments = Vec::with_capacity(2 * all.len() + 1);
        for step in &all {
            let layers = step.times * input.model.layers as f64;
            let layer = builder.layer(step);
            segments.push(segment(input, step, (Part::Layer, layers), layer));
            let tokens = builder.tokens(step);
            segments.push(segment(input, step, (Part::Tokens, step.times), tokens));
            let ends = builder.ends(step);
            segments.push(segment(input, step, (Part::Ends, step.times), ends));
        }
        if policy.overlap
            && let Some(first) = all.first()
        {
            segments.push(segment(input, first, (Part::Fill, 1.0), builder.fill()));
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

fn segment(input: &TermInput, step: &Step, (part, times): (Part, f64), work: Work) -> Segment {
    let rows = if part == Part::Fill || !input.policy.overlap {
        serial_rows(&work)
    } else {
        parallel_rows(input, step, &work)
    };
    let mut smallness = PerLane::default();
    Lane::ALL
        .iter()
        .for_each(|&lane| smallness[lane] = work.smallness(lane));
    Segment {
        phase: step.phase,
        part,
        times,
        smallness,
        lanes: work.lanes,
        bytes: work.bytes,
        rows: undominated(rows),
    }
}

fn serial_rows(work: &Work) -> Vec<Row> {
    let mut sum = Affine::default();
    Lane::ALL.iter().for_each(|&l| sum.add(&work.lanes[l]));
    vec![Row {
        bound: Bound::Sum,
        seconds: sum,
    }]
}

fn parallel_rows(input: &TermInput, step: &Step, work: &Work) -> Vec<Row> {
    let mut rows: Vec<Row> = Lane::ALL
        .iter()
        .map(|&lane| Row {
            bound: Bound::Lane(lane),
            seconds: work.lanes[lane],
        })
        .collect();
    rows.extend(resource_rows(input, work));
    rows.extend(pair_rows(input.rates, work));
    rows.extend(chain_rows(step, work));
    if input.rates.device.has_gpu() {
        rows.extend(beside_rows(work));
    }
    rows.extend(stall_rows(input, step, work));
    rows
}

/// What reads and writes cost each other on the disk is measured: see `pair_rows`.
fn resource_rows(input: &TermInput, work: &Work) -> [Row; 2] {
    let lanes = &work.lanes;
    let mut cores = lanes.cpu_compute;
    if input.rates.device == DeviceKind::Host {
        // The CPU plays the GPU and the links too.
        cores.add(&lanes.gpu_compute);
        cores.add(&lanes.cpu_to_gpu);
        cores.add(&lanes.gpu_to_cpu);
    }
    let bus = work
        .dram_bytes
        .scaled(1.0 / input.rates.dram_read_bytes_per_s);
    [(Resource::DramBus, bus), (Resource::CpuCores, cores)].map(|(resource, seconds)| Row {
        bound: Bound::Resource(resource),
        seconds,
    })
}

/// Two lanes with a and b seconds of their own, keeping ka and kb of their rates while both run, take
/// max(b + a·(1−kb)/ka, a + b·(1−ka)/kb): the shorter one is slow throughout, the longer one only as
/// long as that. Where running together would be slower than one after the other, it is the sum.
fn pair_rows(rates: &Rates, work: &Work) -> Vec<Row> {
    let mut rows = Vec::new();
    for a in Lane::ALL {
        for b in Lane::ALL {
            let with_small = |lane| (lane, work.smallness(lane));
            let (first, second) = (with_small(a), with_small(b));
            let (keep_a, keep_b) = (rates.keep(first, &[second]), rates.keep(second, &[first]));
            if a == b || keep_b >= 1.0 || work.lanes[a].is_zero() || work.lanes[b].is_zero() {
                continue;
            }
            let mut seconds = work.lanes[b];
            let delay = ((1.0 - keep_b) / keep_a).min(1.0);
            seconds.add_scaled(&work.lanes[a], delay);
            rows.push(Row {
                bound: Bound::Pair(a, b),
                seconds,
            });
        }
    }
    rows
}

/// A layer of one batch waits for the same batch's layer before it, so that a layer can take no less
/// than one batch's own way through it: attention and transfers, then the slower of the two computers.
fn chain_rows(step: &Step, work: &Work) -> Vec<Row> {
    let mut common = Affine::default();
    let mut longest = (Lane::CpuCompute, 0.0);
    for lane in Lane::ALL {
        common.add(&work.serial[lane]);
        let weight = work.serial[lane].constant + work.serial[lane].coef.iter().sum::<f64>();
        if weight > longest.1 {
            longest = (lane, weight);
        }
    }
    let part = 1.0 / step.batch_count().max(1.0);
    let ways = [
        (Bound::Chain(longest.0), work.products),
        (Bound::SideChain(longest.0), work.side_products),
    ];
    ways.into_iter()
        .filter(|(_, products)| !products.is_zero())
        .map(|(bound, products)| Row {
            bound,
            seconds: common.plus(&products).scaled(part),
        })
        .collect()
}

/// Operations of one lane run in the order of the schedule, a batch's after those of the batch before:
/// while the CPU attends or multiplies for a batch, the GPU has nothing else to do. What the CPU sends up
/// waits on the link behind the next batch's cache and weights, and what comes after waits for it.
fn beside_rows(work: &Work) -> Vec<Row> {
    let gpu = &work.lanes.gpu_compute;
    let mut rows = Vec::new();
    let attending = gpu.minus(&work.attention).plus(&work.beside);
    if !work.beside.is_zero() {
        rows.push((Bound::Attending, attending));
    }
    if !work.side_products.is_zero() {
        let side = work.side_products.plus(&work.side_links);
        let multiplying = |other: &Affine| other.minus(&work.products).plus(&side);
        rows.push((Bound::Multiplying, multiplying(gpu)));
        rows.push((Bound::AttendingAndMultiplying, multiplying(&attending)));
        let mut queued = work.lanes.cpu_to_gpu.plus(&work.cache_reads);
        queued.add(&multiplying(gpu));
        queued.add_scaled(&work.side_products, -FIRST_PRODUCT);
        rows.push((Bound::Queued, queued));
    }
    rows.into_iter()
        .map(|(bound, seconds)| Row { bound, seconds })
        .collect()
}

/// Where several products meet a layer's streamed weights, the ring holds one layer and little more: the
/// next layer's come in while the last product lets go of its own, and are waited for by the next first
/// one. What lies between has the lane to itself.
fn stall_rows(input: &TermInput, step: &Step, work: &Work) -> Vec<Row> {
    let gpu = input.rates.device.has_gpu();
    let products = step.chunks().iter().map(|c| c.1).sum::<f64>();
    let overlapped = if work.beside.is_zero() { 2.0 } else { 1.0 };
    if products <= overlapped {
        return Vec::new();
    }
    let between = 1.0 - overlapped / products;
    let mut busy = if gpu {
        work.lanes.gpu_compute
    } else {
        work.lanes.cpu_compute
    };
    if !work.beside.is_zero() {
        busy = busy.minus(&work.attention).plus(&work.beside);
    }
    let row = |lane: Lane| {
        let mut seconds = work.streams[lane];
        seconds.constant -= input.rates.stream_s(lane, RUN_AHEAD_BYTES as f64);
        seconds.add_scaled(&busy, between);
        Row {
            bound: Bound::Stall(lane),
            seconds,
        }
    };
    let lanes = [Lane::DiskToCpu, Lane::CpuToGpu];
    let streaming = lanes.into_iter().filter(|&l| !work.streams[l].is_zero());
    streaming.map(row).collect()
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
