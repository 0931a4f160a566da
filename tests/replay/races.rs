//! Every two operations of the schedule that touch the same bytes, one of them writing, are in order; and every
//! wait is needed for that: without it two of them are not. Over random policies of small models.

use crate::common::planning::random;
use crate::common::{t4, two_cores};
use crate::drawn::{drawn_policy, pick};
use crate::noted::{Noted, events};
use crate::running::{requests, small_model, workload};
use loadmaster::cost::estimate::EstimateInput;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::RunFacts;
use loadmaster::engine::replay::run_facts;
use loadmaster::machine::price::Pricer;
use loadmaster::model::ModelSpec;
use loadmaster::policy::{DeviceKind, Policy};
use loadmaster::tier::PerTier;
use std::collections::BTreeMap;

struct Job {
    model: ModelSpec,
    policy: Policy,
    device: DeviceKind,
    /// Prompt and generated tokens of each line.
    lengths: Vec<(usize, usize)>,
}

fn drawn(next: &mut impl FnMut() -> f64, overlap: bool) -> Job {
    let gpu = next() < 0.7;
    let gpu_batch_size = pick(next, &[1, 2, 3, 4]);
    let num_gpu_batches = pick(next, &[1, 2, 2, 3, 4]);
    let policy = Policy {
        double_buffer: gpu && num_gpu_batches > 1 && next() < 0.5,
        overlap,
        kv: pick(next, &[Dtype::F16, Dtype::F32]),
        ..drawn_policy(next, gpu, (gpu_batch_size, num_gpu_batches))
    };
    let blocks = pick(next, &[0.7, 1.0, 1.7]);
    let lines = (policy.slots() as f64 * blocks).ceil() as usize;
    let mut line = || (pick(next, &[1, 5, 9, 40]), pick(next, &[1, 2, 3, 4]));
    let lengths = (0..lines).map(|_| line()).collect();
    Job {
        model: model(next),
        policy,
        device: if gpu {
            DeviceKind::Cuda
        } else {
            DeviceKind::Cpu
        },
        lengths,
    }
}

/// Also with norms behind, and with projections around, the layers.
fn model(next: &mut impl FnMut() -> f64) -> ModelSpec {
    let mut model = small_model(Dtype::F16);
    model.layers = pick(next, &[2, 3, 5]);
    model.tied_head = next() < 0.5;
    if next() < 0.3 {
        model.pre_norm = false;
        model.final_norm = false;
        model.embed_width = 96;
    }
    model
}

impl Job {
    fn noted(&self) -> Noted {
        let profile = match self.device {
            DeviceKind::Cuda => t4(),
            _ => two_cores(),
        };
        let rates = Rates::new(&profile, self.device, self.policy.threads).expect("rates");
        let facts = RunFacts {
            fetches_tokens: true,
            ..run_facts(&EstimateInput {
                model: &self.model,
                workload: &workload(&requests(&self.model, &self.lengths)),
                rates: &rates,
                policy: &self.policy,
                host: HostBytes::default(),
                budget: PerTier::default(),
            })
        };
        Noted::new(events(facts, Pricer::new(rates), &self.lengths))
    }

    fn words(&self) -> String {
        format!("{:?} {:?} {:?}", self.device, self.policy, self.lengths)
    }
}

#[test]
fn what_touches_the_same_bytes_is_in_order() {
    let mut next = random(20261130);
    for _ in 0..400 {
        let overlap = next() < 0.8;
        let job = drawn(&mut next, overlap);
        if let Some(race) = job.noted().race(None) {
            panic!("{}:\n{race}", job.words());
        }
    }
}

/// A wait's kind: which operation waits for which, on which lanes.
#[derive(Default)]
struct Kind {
    all: usize,
    /// Those that can be left out without harm, in words.
    spare: Vec<String>,
}

#[test]
fn no_wait_can_be_left_out() {
    let mut next = random(7);
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    for _ in 0..150 {
        let job = drawn(&mut next, true);
        let noted = job.noted();
        for wait in noted.waits() {
            let kind = kinds.entry(noted.kind(wait)).or_default();
            kind.all += 1;
            if noted.race(Some(wait)).is_none() {
                kind.spare.push(noted.words(wait));
            }
        }
    }
    let all: usize = kinds.values().map(|k| k.all).sum();
    let spare: usize = kinds.values().map(|k| k.spare.len()).sum();
    println!("{spare} of {all} to spare, {} kinds", kinds.len());
    for (name, kind) in &kinds {
        let one = kind.spare.first();
        assert!(
            kind.spare.len() < kind.all,
            "{name} is never needed:\n{one:?}"
        );
    }
    // A wait is for a whole half of a buffer, of which these sequences may need another part, and what it was to keep
    // apart may come after the job's end.
    assert!(spare * 100 <= all, "{spare} of {all} waits are not needed");
}
