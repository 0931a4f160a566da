//! The rows of one segment: what its time is the largest of. Lanes, resources and pairs of lanes are busy
//! that long; a cycle is a way round the schedule's own waits (engine/schedule.rs, engine/visits.rs) that
//! comes back to the same place some steps later and takes no less than the sum of what lies on it.

use crate::cost::affine::{Affine, SHARES};
use crate::cost::block::can_stagger;
use crate::cost::footprint::RUN_AHEAD_BYTES;
use crate::cost::load::Load;
use crate::cost::steps::Step;
use crate::cost::terms::{Bound, Part, Row, TermInput, Work};
use crate::cost::traffic::constant;
use crate::cost::waits::{NODES, Node, Order, Waits};
use crate::policy::DeviceKind;
use crate::tier::{Lane, PerLane, Phase, Resource};

/// Of a layer's products the first one's part: 3 of 12 hidden² weights where ffn = 4 · hidden.
const FIRST_PRODUCT: f64 = 0.25;
/// Of its products' inputs the first one's (1 of 7 hidden), and of their outputs (3 of 9).
const FIRST_INPUT: f64 = 1.0 / 7.0;
const FIRST_OUTPUT: f64 = 1.0 / 3.0;

/// Which wait closes a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A batch's layer after its layer before, and a buffer's half after its last visitor.
    Batch,
    /// A half of the cache's staging buffer after its last visitor.
    CacheHalf,
    /// Whichever takes longest at the shares that are known.
    Slowest,
}

/// Seconds of one batch's computation, all batches together, on one of the ways that it can take: attention
/// on the compute device or on the CPU beside it, products on the one or the other.
pub(super) struct Way {
    pub number: u8,
    attention: Affine,
    pub products: Affine,
    rowwise: Affine,
}

impl Way {
    pub(super) fn all(input: &TermInput, work: &Work) -> Vec<Way> {
        let side = sum(&work.side).plus(&work.side_products);
        let mut ways = Vec::with_capacity(4);
        for (by_cpu, attention) in [(0, work.attention), (1, sum(&work.beside))] {
            for (by_side, products) in [(0, work.products), (2, side)] {
                if by_cpu > 0 && !is_there(input, &attention) {
                    continue;
                }
                if by_side > 0 && !is_there(input, &work.side_products) {
                    continue;
                }
                ways.push(Way {
                    number: by_cpu + by_side,
                    attention,
                    products,
                    rowwise: work.rowwise,
                });
            }
        }
        ways
    }

    /// The one that takes longest at the shares that are known, or at all of them.
    fn slowest(input: &TermInput, work: &Work) -> Way {
        let everywhere = [1.0; SHARES];
        let at = input.at.as_ref().unwrap_or(&everywhere);
        let mut all = Way::all(input, work);
        all.sort_by(|a, b| a.whole().at(at).total_cmp(&b.whole().at(at)));
        all.pop()
            .expect("the compute device's own way is always there")
    }

    pub(super) fn whole(&self) -> Affine {
        self.attention.plus(&self.products).plus(&self.rowwise)
    }
}

/// True where something takes time: at the shares that are known, or at any.
pub(super) fn is_there(input: &TermInput, seconds: &Affine) -> bool {
    match &input.at {
        Some(at) => seconds.at(at) > 0.0,
        None => !seconds.is_zero(),
    }
}

pub(super) fn sum(lanes: &PerLane<Affine>) -> Affine {
    let mut all = Affine::default();
    Lane::ALL.iter().for_each(|&lane| all.add(&lanes[lane]));
    all
}

/// What a segment is: which part of which step.
pub struct Place<'s> {
    pub step: &'s Step,
    pub part: Part,
    /// Bytes of one layer that come to where they are multiplied.
    pub streamed_bytes: f64,
    /// And their pieces.
    pub streamed_pieces: f64,
}

impl Place<'_> {
    /// Batches that follow each other; the ends are passed by the whole block at once.
    pub(super) fn batches(&self) -> f64 {
        match self.part {
            Part::Layer => self.step.batch_count().max(1.0),
            _ => 1.0,
        }
    }

    /// Whether a layer's batches are staggered (engine/schedule.rs), where it is known what is there; whether they
    /// may be, where not.
    fn is_staggered(&self, input: &TermInput, work: &Work) -> bool {
        let decodes = self.part == Part::Layer && self.step.phase == Phase::Decode;
        let beside = is_there(input, &work.beside.cpu_compute);
        let travels = input.at.is_some() && is_there(input, &sum(&work.hidden));
        let several = self.batches() > 1.0;
        decodes && beside && several && can_stagger(input.policy, input.rates.device, travels)
    }

    /// How many products meet each weight.
    fn uses(&self) -> f64 {
        match self.part {
            Part::Layer => self.step.chunks().iter().map(|c| c.1).sum::<f64>(),
            _ => 1.0,
        }
    }
}

pub fn parallel_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    let mut rows: Vec<Row> = Lane::ALL
        .iter()
        .map(|&lane| Row {
            bound: Bound::Lane(lane),
            seconds: work.lanes[lane],
        })
        .collect();
    rows.extend(resource_rows(input, work));
    rows.extend(pair_rows(input, place, work));
    rows.extend(cycle_rows(input, place, work));
    if place.part == Part::Layer {
        if input.rates.device.has_gpu() {
            rows.extend(beside_rows(input, place, work));
        }
        rows.extend(stall_rows(input, place, work));
    }
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
fn pair_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    let rates = input.rates;
    let mut rows = Vec::new();
    let busy = Lane::ALL
        .into_iter()
        .filter(|&lane| !work.lanes[lane].is_zero());
    let busy: Vec<(Lane, Load)> = busy.map(|lane| (lane, work.load(lane))).collect();
    for &first in &busy {
        for &second in &busy {
            let (a, b) = (first.0, second.0);
            let (keep_a, keep_b) = (rates.keep(first, &[second]), rates.keep(second, &[first]));
            if a == b || keep_b >= 1.0 {
                continue;
            }
            let mut seconds = work.lanes[b];
            let delay = ((1.0 - keep_b) / keep_a).min(1.0);
            seconds.add_scaled(&work.lanes[a], delay);
            if b == Lane::CpuCompute {
                let woken = wakes(input, place, work, a);
                seconds.add(&constant(rates.wake_takes_s * woken));
            }
            rows.push(Row {
                bound: Bound::Pair(a, b),
                seconds,
            });
        }
    }
    rows
}

/// How often a lane of the disk wakes up in a layer for cache and hidden states, where it is known what is
/// there: once a batch for each. Weights keep their lane awake.
fn wakes(input: &TermInput, place: &Place, work: &Work, lane: Lane) -> f64 {
    let disk = matches!(lane, Lane::DiskToCpu | Lane::CpuToDisk);
    let Some(at) = input.at.as_ref().filter(|_| disk) else {
        return 0.0;
    };
    let there = [&work.cache, &work.hidden].map(|moved| moved[lane].at(at) > 0.0);
    place.batches() * there.into_iter().filter(|&there| there).count() as f64
}

/// Batches are alike, so that a cycle over one step of a batch is `1 ÷ batches` of the whole layer's
/// seconds, as often as there are steps in the layer. Where the shares are known, the slowest of all
/// cycles is looked for; the linear program has the two that need nothing to be there.
fn cycle_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    if let Some(at) = input.at.as_ref().filter(|_| place.part == Part::Layer) {
        // A cycle within what a lane is busy anyway tells nothing new.
        let lanes_s = Lane::ALL.map(|lane| work.lanes[lane].at(at));
        let busiest_s = lanes_s.into_iter().fold(0.0, f64::max);
        let slowest = slowest_row(input, place, work, busiest_s);
        return slowest.into_iter().collect();
    }
    let hidden = sum(&work.hidden);
    let cache = sum(&work.cache);
    let staggered = place.is_staggered(input, work);
    let batches = place.batches();
    let mut rows = Vec::new();
    for way in Way::all(input, work) {
        let mut add = |turn: Turn, seconds: Affine, steps: f64| {
            rows.push(Row {
                bound: Bound::Cycle(turn, way.number, heaviest(work)),
                seconds: seconds.scaled(1.0 / steps),
            });
        };
        let through = hidden.plus(&way.whole());
        if staggered {
            // Of what is attended there are two halves, of hidden states three places.
            add(Turn::Batch, way.whole(), batches.min(2.0));
            add(Turn::Batch, through, batches.min(3.0));
        } else {
            add(Turn::Batch, through, batches.min(2.0));
        }
        if !cache.is_zero() {
            add(Turn::CacheHalf, cache.plus(&way.attention), 2.0);
        }
    }
    rows
}

/// Seconds of a layer's operations by node, all batches together. Of a batch in chunks the first one has
/// the beginning and the last one the end.
fn operations(input: &TermInput, place: &Place, work: &Work) -> [Affine; NODES] {
    let mut all = [Affine::default(); NODES];
    let first = place.batches() / place.uses();
    let mut set =
        |node: Node, seconds: &Affine, part: f64| all[node as usize] = seconds.scaled(part);
    let gpu = work.products.plus(&work.rowwise);
    for (node, lane) in [
        (Node::ReadWeights, work.streams.disk_to_cpu),
        (Node::ShipWeights, work.streams.cpu_to_gpu),
        (Node::ReadCache, work.cache.disk_to_cpu),
        (Node::ShipCache, work.cache.cpu_to_gpu),
        (Node::ReadHidden, work.hidden.disk_to_cpu),
        (Node::ShipHidden, work.hidden.cpu_to_gpu),
        (Node::ReturnHidden, work.hidden.gpu_to_cpu),
        (Node::WriteHidden, work.hidden.cpu_to_disk),
        (Node::ReturnCache, work.cache.gpu_to_cpu),
        (Node::WriteCache, work.cache.cpu_to_disk),
    ] {
        set(node, &lane, 1.0);
    }
    set(Node::Begin, &gpu, first * FIRST_PRODUCT);
    set(Node::Attend, &work.attention, first);
    set(Node::End, &gpu, first * (1.0 - FIRST_PRODUCT));
    set(Node::AttendDown, &work.beside.gpu_to_cpu, first);
    set(Node::AttendBeside, &work.beside.cpu_compute, first);
    set(Node::AttendUp, &work.beside.cpu_to_gpu, first);
    let (down, up) = (&work.side.gpu_to_cpu, &work.side.cpu_to_gpu);
    set(Node::BeginDown, down, first * FIRST_INPUT);
    set(
        Node::BeginBeside,
        &work.side_products,
        first * FIRST_PRODUCT,
    );
    set(Node::BeginUp, up, first * FIRST_OUTPUT);
    set(Node::EndDown, down, first * (1.0 - FIRST_INPUT));
    set(
        Node::EndBeside,
        &work.side_products,
        first * (1.0 - FIRST_PRODUCT),
    );
    set(Node::EndUp, up, first * (1.0 - FIRST_OUTPUT));
    if first < 1.0 {
        let way = Way::slowest(input, work);
        set(Node::Middle, &way.whole(), 1.0 - first);
    }
    all
}

/// The slowest cycle of waits at given shares, where a layer takes longer by it than `floor_s`.
fn slowest_row(input: &TermInput, place: &Place, work: &Work, floor_s: f64) -> Option<Row> {
    let at = input.at.as_ref()?;
    let operations = operations(input, place, work);
    let batches = place.batches();
    let durations = operations.map(|seconds| {
        let seconds = seconds.at(at) / batches;
        (seconds > 0.0).then_some(seconds)
    });
    // While the only batch is on its way the CPU does nothing; of several, it computes another one.
    let several = batches > 1.0;
    let busy = several && input.rates.device != DeviceKind::Cuda;
    let others_s = match busy {
        true => input.rates.handover_busy_s,
        false => input.rates.handover_s,
    };
    let order = order(input, place, work);
    let waits = Waits::new(durations, order, [input.rates.handover_s, others_s]);
    let cycle = waits.slowest(floor_s / batches)?;
    let mut seconds = constant(batches * cycle.wakes_s / cycle.steps);
    for node in cycle.nodes {
        seconds.add_scaled(&operations[node as usize], 1.0 / cycle.steps);
    }
    Some(Row {
        bound: Bound::Cycle(Turn::Slowest, 0, heaviest(work)),
        seconds,
    })
}

/// How the batches of a layer follow each other at shares that are known, or could.
fn order(input: &TermInput, place: &Place, work: &Work) -> Order {
    if place.is_staggered(input, work) {
        return Order::Staggered;
    }
    match place.batches() > 1.0 {
        true => Order::InTurn,
        false => Order::Alone,
    }
}

/// The lane that has most to do besides products: it is named for a cycle.
fn heaviest(work: &Work) -> Lane {
    let weight = |lane: &Lane| {
        let moved = work.hidden[*lane]
            .plus(&work.cache[*lane])
            .plus(&work.beside[*lane]);
        moved.constant + moved.coef.iter().sum::<f64>()
    };
    let own = if work.beside.cpu_compute.is_zero() && work.lanes.gpu_compute.is_zero() {
        Lane::CpuCompute
    } else {
        Lane::GpuCompute
    };
    let moving = Lane::ALL
        .into_iter()
        .max_by(|a, b| weight(a).total_cmp(&weight(b)));
    moving.filter(|lane| weight(lane) > 0.0).unwrap_or(own)
}

/// Operations of one lane run in the order of the schedule, a batch's after those of the batch before:
/// while the CPU attends or multiplies for a batch, the GPU has nothing else to do. What the CPU sends up
/// waits on the link behind the next batch's cache and weights, and what comes after waits for it.
/// Staggered, the GPU has the next batch while the CPU attends.
fn beside_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    let gpu = &work.lanes.gpu_compute;
    let mut rows = Vec::new();
    let beside = sum(&work.beside);
    let attending = gpu.minus(&work.attention).plus(&beside);
    let staggered = place.is_staggered(input, work);
    if !beside.is_zero() && !staggered {
        rows.push((Bound::Attending, attending));
    }
    if !work.side_products.is_zero() {
        let side = work.side_products.plus(&sum(&work.side));
        let multiplying = |other: &Affine| other.minus(&work.products).plus(&side);
        rows.push((Bound::Multiplying, multiplying(gpu)));
        if !staggered {
            rows.push((Bound::AttendingAndMultiplying, multiplying(&attending)));
        }
        if input.at.is_none() {
            let mut queued = work.lanes.cpu_to_gpu;
            if !work.cache.cpu_to_gpu.is_zero() {
                queued.add(&work.cache.disk_to_cpu);
            }
            queued.add(&multiplying(gpu));
            queued.add_scaled(&work.side_products, -FIRST_PRODUCT);
            rows.push((Bound::Queued(Lane::CpuToGpu), queued));
        }
    }
    rows.into_iter()
        .map(|(bound, seconds)| Row { bound, seconds })
        .collect()
}

/// Where several products meet a layer's streamed weights, the ring holds one layer and little more: the
/// next layer's come in while the last product lets go of its own, and are waited for by the next first
/// one. What lies between has the lane to itself. Where hidden states or cache come over the same lane,
/// the next batch's are queued behind all of these weights and the first part of the following layer's.
/// In a double buffer a part of the next layer's comes with each batch.
fn stall_rows(input: &TermInput, place: &Place, work: &Work) -> Vec<Row> {
    let (uses, batches) = (place.uses(), place.batches());
    let gpu = input.rates.device.has_gpu();
    // From disk to a GPU, DRAM has a ring of its own, one layer large: reading goes on.
    let stalled = if gpu { Lane::CpuToGpu } else { Lane::DiskToCpu };
    if uses <= 1.0 || input.policy.double_buffer {
        return Vec::new();
    }
    let pace = pace(input, place, work);
    let mut rows = Vec::new();
    for lane in [Lane::DiskToCpu, Lane::CpuToGpu] {
        let ahead_s = input.rates.stream_s(lane, RUN_AHEAD_BYTES as f64);
        let mut late = work.streams[lane];
        late.constant -= ahead_s;
        if lane == stalled && is_there(input, &work.streams[lane]) {
            rows.push(Row {
                bound: Bound::Stall(lane),
                seconds: late.plus(&pace.scaled(1.0 - 2.0 / uses)),
            });
        }
        let visits = visits_on(lane, work);
        let Some(at) = input.at.as_ref().filter(|at| visits.at(at) > 0.0) else {
            continue;
        };
        let streamed_s = work.streams[lane].at(at);
        if streamed_s > ahead_s {
            late.constant += (streamed_s / batches).min(ahead_s);
            let own_up = work.beside[Lane::CpuToGpu].at(at) > 0.0 && lane == Lane::CpuToGpu;
            let first = if own_up { 0.0 } else { 1.0 / batches };
            let last = if lane == stalled {
                1.0 / uses
            } else {
                1.0 / batches
            };
            let between = (1.0 - first - last).max(0.0);
            rows.push(Row {
                bound: Bound::Queued(lane),
                seconds: late
                    .plus(&visits.scaled(1.0 / batches))
                    .plus(&pace.scaled(between)),
            });
        }
    }
    rows
}

/// How fast batches follow each other where no weights come in their way: as the computation goes, or the
/// slowest cycle of waits.
fn pace(input: &TermInput, place: &Place, work: &Work) -> Affine {
    let beside = sum(&work.beside);
    let mut busy = if input.rates.device.has_gpu() {
        work.lanes.gpu_compute
    } else {
        work.lanes.cpu_compute
    };
    if is_there(input, &beside) && !place.is_staggered(input, work) {
        busy = busy.minus(&work.attention).plus(&beside);
    }
    let Some(at) = input.at.as_ref() else {
        return busy;
    };
    let resident = Work {
        streams: PerLane::default(),
        ..work.clone()
    };
    slowest_row(input, place, &resident, busy.at(at)).map_or(busy, |row| row.seconds)
}

/// What comes over a lane besides weights.
fn visits_on(lane: Lane, work: &Work) -> Affine {
    work.hidden[lane]
        .plus(&work.cache[lane])
        .plus(&work.beside[lane])
}
