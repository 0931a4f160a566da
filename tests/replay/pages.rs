//! What is written to a spilled cache: no request has both pages that were written before and new ones, which a file
//! system writes while nobody else may use the file.

use crate::common::{t4, two_cores};
use crate::noted::{Event, events};
use crate::running::policy::policy;
use crate::running::{requests, small_model, workload};
use loadmaster::cost::estimate::EstimateInput;
use loadmaster::cost::footprint::HostBytes;
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::Dtype;
use loadmaster::engine::RunFacts;
use loadmaster::engine::replay::run_facts;
use loadmaster::machine::ops::{FileId, FileSpan, Op};
use loadmaster::machine::price::Pricer;
use loadmaster::policy::DeviceKind;
use loadmaster::tier::PerTier;
use loadmaster::units::PAGE_BYTES;
use std::collections::BTreeSet;

/// Prompt and generated tokens; records are 1280 bytes.
const LENGTHS: [(usize, usize); 4] = [(9, 12), (3, 7), (16, 9), (1, 12)];

fn spans_written(device: DeviceKind) -> Vec<FileSpan> {
    let model = small_model(Dtype::F16);
    let profile = match device {
        DeviceKind::Cuda => t4(),
        _ => two_cores(),
    };
    let on_cpu = match device {
        DeviceKind::Cpu => 1.0,
        _ => 0.0,
    };
    let policy = policy([0.0, 100.0, 0.0, 0.0, 0.0, 100.0], on_cpu, (2, 2));
    let rates = Rates::new(&profile, device, policy.threads).expect("rates");
    let facts = RunFacts {
        fetches_tokens: true,
        ..run_facts(&EstimateInput {
            model: &model,
            workload: &workload(&requests(&model, &LENGTHS)),
            rates: &rates,
            policy: &policy,
            host: HostBytes::default(),
            budget: PerTier::default(),
        })
    };
    let spans = events(facts, Pricer::new(rates), &LENGTHS).into_iter();
    spans
        .filter_map(|event| match event {
            Event::Submitted(submitted) => match submitted.op {
                Op::Write(spans) => Some(spans),
                _ => None,
            },
            _ => None,
        })
        .flatten()
        .filter(|span| span.file == FileId::CACHE)
        .collect()
}

#[test]
fn old_pages_and_new_ones_are_written_apart() {
    for device in [DeviceKind::Cpu, DeviceKind::Cuda] {
        let mut written = BTreeSet::new();
        let (mut old, mut new) = (0, 0);
        for span in spans_written(device) {
            let pages = span.offset / PAGE_BYTES..(span.offset + span.bytes) / PAGE_BYTES;
            let known = pages.clone().filter(|page| written.contains(page)).count();
            assert!(
                known == 0 || known == pages.clone().count(),
                "{device:?}: {span:?}"
            );
            match known {
                0 => new += 1,
                _ => old += 1,
            }
            written.extend(pages);
        }
        assert!(old > 100 && new > 30, "{old} and {new} requests");
    }
}
