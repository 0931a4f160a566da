//! Memory is taken before the first token: over the passes that follow, what the process holds on its
//! heap does not grow. Alone in this file, because the allocator that counts is the whole program's.

mod running;

use loadmaster::checkpoint::SynthSource;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::open::{RunJob, open};
use loadmaster::engine::{Engine, EngineError, Finished, Progress, RunOptions, Sink};
use loadmaster::machine::cpu::kernels::kv::record_bytes;
use loadmaster::machine::cpu::kernels::{AttendArgs, AttendItem, Isa, KvView, Slots, attend};
use loadmaster::machine::cpu::pool::Pool;
use loadmaster::machine::price::Pricer;
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::workload::Lengths;
use running::policy::policy;
use running::{PackedFile, pack, requests, round_profile, small_model, workload};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed};

/// Bytes that are allocated now, and the most since the mark was last set back.
static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);
static PEAK_BYTES: AtomicI64 = AtomicI64::new(0);

struct Counting;

fn count(bytes: i64) {
    let live = LIVE_BYTES.fetch_add(bytes, Relaxed) + bytes;
    PEAK_BYTES.fetch_max(live, Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a pass may hold more than the first ones did, result tokens included.
const GROWTH_BYTES: i64 = 64 * 1024;
/// A prefill and a decode step: every kind of work was done once.
const FIRST_PASSES: usize = 2;
const MOST_PASSES: usize = 4096;

/// (live, most since the pass before) after every pass, without allocating meanwhile.
struct Watch {
    samples: Vec<(i64, i64)>,
    finished: usize,
}

impl Watch {
    fn new() -> Watch {
        Watch {
            samples: Vec::with_capacity(MOST_PASSES),
            finished: 0,
        }
    }

    fn growth(&self) -> (i64, i64) {
        let (first, later) = self.samples.split_at(FIRST_PASSES);
        let (live, peak) = first[FIRST_PASSES - 1];
        let most = |pick: fn(&(i64, i64)) -> i64| later.iter().map(pick).max().expect("passes");
        (most(|s| s.0) - live, most(|s| s.1) - peak.max(first[0].1))
    }
}

impl Sink for Watch {
    fn finished(&mut self, _line: Finished) -> Result<(), EngineError> {
        self.finished += 1;
        Ok(())
    }
    fn refused(&mut self, line: usize, why: String) -> Result<(), EngineError> {
        Err(EngineError::Output(format!("line {line}: {why}")))
    }
    fn progress(&mut self, _progress: &Progress) {
        assert!(self.samples.len() < MOST_PASSES);
        let live = LIVE_BYTES.load(Relaxed);
        self.samples.push((live, PEAK_BYTES.swap(live, Relaxed)));
    }
}

/// Lines of many lengths, so that some end early and others take their slots.
const LENGTHS: [(usize, usize); 8] = [
    (7, 90),
    (30, 60),
    (1, 100),
    (12, 30),
    (25, 80),
    (3, 50),
    (40, 70),
    (9, 90),
];

fn watched(pack: &PackedFile, (policy, device): (&Policy, DeviceKind)) -> Watch {
    let model = small_model(Dtype::F16);
    let lines = requests(&model, &LENGTHS);
    let packed = pack.packed();
    let job = RunJob {
        model: &model,
        policy,
        device,
        lengths: Lengths::from(&workload(&lines)),
        host: HostBytes::default(),
        packed: &packed,
        source: None,
        spill: pack.dir.path(),
        pricer: Pricer::new(Rates::new(&round_profile(), device, policy.threads).expect("rates")),
        gpu: Default::default(),
    };
    let (mut machine, facts) = open(&job).expect("the run opens");
    let mut watch = Watch::new();
    let options = RunOptions { ignore_eos: true };
    PEAK_BYTES.store(LIVE_BYTES.load(Relaxed), Relaxed);
    let engine = Engine::new(&mut machine, facts, options);
    let outcome = engine.run(lines, &mut watch, &AtomicBool::new(false));
    assert_eq!(outcome.expect("ends well").lines_done, LENGTHS.len());
    watch
}

#[test]
fn the_heap_does_not_grow_while_generating() {
    // In one test with the rest, because tests side by side would count each other's bytes.
    growth_would_be_seen();
    long_sequences_take_no_memory();
    let pack = pack(&SynthSource::new(small_model(Dtype::F16), 11), false);
    let cases = [
        (
            [0.0, 100.0, 0.0, 100.0, 0.0, 100.0],
            (4, 1),
            DeviceKind::Cpu,
        ),
        ([0.0, 30.0, 0.0, 50.0, 0.0, 50.0], (2, 2), DeviceKind::Cpu),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], (3, 1), DeviceKind::Cpu),
        (
            [30.0, 30.0, 40.0, 30.0, 50.0, 25.0],
            (2, 2),
            DeviceKind::Host,
        ),
        (
            [100.0, 0.0, 100.0, 0.0, 100.0, 0.0],
            (4, 1),
            DeviceKind::Host,
        ),
    ];
    for (percent, shape, device) in cases {
        for overlap in [true, false] {
            let policy = Policy {
                overlap,
                ..policy(percent, 0.5, shape)
            };
            let watch = watched(&pack, (&policy, device));
            assert_eq!(watch.finished, LENGTHS.len());
            assert!(watch.samples.len() > 100, "{} passes", watch.samples.len());
            let (live, peak) = watch.growth();
            let case = format!("{percent:?} {shape:?} {device:?} overlap {overlap}");
            assert!(live <= GROWTH_BYTES, "{case}: {live} bytes more are held");
            assert!(peak <= GROWTH_BYTES, "{case}: a peak of {peak} bytes more");
        }
    }
}

/// Attention of sequences whose keys two threads share by halves: 590 KiB of what is kept of them.
fn long_sequences_take_no_memory() {
    let (heads, head_size, keys) = (32, 128, 600);
    let hidden = heads * head_size;
    let cache = vec![0u8; keys * record_bytes(Dtype::F16, hidden)];
    let qkv = vec![0.5f32; 4 * 3 * hidden];
    let mut out = vec![0f32; 4 * hidden];
    let pool = Pool::new(2);
    let slots = Slots::Contiguous { first: 0 };
    let kv = KvView {
        bytes: &cache,
        slots,
    };
    let items: Vec<AttendItem> = (0..4)
        .map(|row| AttendItem {
            first_row: row,
            q_rows: 1,
            past: keys - 1,
            decode: true,
            kv,
        })
        .collect();
    PEAK_BYTES.store(LIVE_BYTES.load(Relaxed), Relaxed);
    let before = LIVE_BYTES.load(Relaxed);
    let args = AttendArgs {
        qkv: &qkv,
        ld: 3 * hidden,
        heads,
        head_size,
        format: Dtype::F16,
        items: &items,
        out: &mut out,
        ldo: hidden,
    };
    attend(&pool, Isa::detect(), args);
    let most = PEAK_BYTES.load(Relaxed) - before;
    assert!(most <= 4 * 1024, "attention took {most} bytes");
}

fn growth_would_be_seen() {
    let before = LIVE_BYTES.load(Relaxed);
    let held = vec![1u8; 8 << 20];
    assert!(LIVE_BYTES.load(Relaxed) - before >= 7 << 20);
    drop(held);
    let mut watch = Watch::new();
    watch.samples = vec![(10, 20), (10, 30), (10, 90), (70, 80)];
    assert_eq!(watch.growth(), (60, 60));
}
