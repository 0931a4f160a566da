//! Placement must not change results: whatever the shares, batch shape, overlap and machine, logits are
//! the same bits.

mod common;

use common::{Ran, pack, policy, requests, run, small_model};
use loadmaster::checkpoint::SynthSource;
use loadmaster::dtype::Dtype;
use loadmaster::policy::DeviceKind;

const LENGTHS: [(usize, usize); 5] = [(5, 4), (17, 3), (1, 6), (9, 2), (12, 5)];

fn assert_same(a: &Ran, b: &Ran, what: &str) {
    assert_eq!(a.collected.logits.len(), b.collected.logits.len(), "{what}");
    for (key, logits) in &a.collected.logits {
        let other = &b.collected.logits[key];
        let first = logits
            .iter()
            .zip(other)
            .position(|(x, y)| x.to_bits() != y.to_bits());
        assert_eq!(first, None, "{what}: line and step {key:?}");
    }
    for (line, done) in &a.collected.lines {
        assert_eq!(done.token_ids, b.collected.lines[line].token_ids, "{what}");
    }
}

#[test]
fn tiers_and_batches_give_the_same_bits() {
    let model = small_model(Dtype::F16);
    let pack = pack(&SynthSource::new(model.clone(), 11), false);
    let lines = || requests(&model, &LENGTHS);
    let plain = run(
        &model,
        &pack,
        &policy([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 1.0, (5, 1)),
        DeviceKind::Cpu,
        lines(),
    );
    assert_eq!(plain.collected.lines.len(), LENGTHS.len());
    let disk = run(
        &model,
        &pack,
        &policy([0.0, 30.0, 0.0, 50.0, 0.0, 50.0], 1.0, (2, 2)),
        DeviceKind::Cpu,
        lines(),
    );
    assert_same(&plain, &disk, "over DRAM and disk");
    for share in [0.0, 0.5, 1.0] {
        let p = policy([30.0, 30.0, 40.0, 30.0, 50.0, 25.0], share, (3, 2));
        let host = run(&model, &pack, &p, DeviceKind::Host, lines());
        assert_same(
            &plain,
            &host,
            &format!("over three tiers, computed in place {share}"),
        );
    }
}
