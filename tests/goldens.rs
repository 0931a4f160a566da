//! transformers' own tokens and logits, from checkpoints of every switch and file format: read, packed
//! and generated as a user's would be, over DRAM, disk and three tiers.

mod running;

use loadmaster::checkpoint::{Checkpoint, WeightSource};
use loadmaster::dtype::Dtype;
use loadmaster::engine::Request;
use loadmaster::engine::sampling::Sampling;
use loadmaster::policy::{Compute, DeviceKind, Policy};
use running::policy::policy;
use running::{PackedFile, Ran, pack, run_with};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Golden {
    vocab: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: Vec<u32>,
    ids: Vec<u32>,
    stopped_ids: Vec<u32>,
}

/// One model with what transformers made of it.
struct Fixture {
    name: String,
    source: Checkpoint,
    golden: Golden,
    logits: Vec<f32>,
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/models")
}

fn fixtures() -> Vec<Fixture> {
    let entries = std::fs::read_dir(models()).expect("goldens are committed");
    let mut dirs: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    dirs.sort();
    dirs.iter().map(|dir| fixture(dir)).collect()
}

fn fixture(dir: &Path) -> Fixture {
    let text = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let bytes = std::fs::read(dir.join("logits.bin")).expect("logits.bin");
    let value = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("four bytes"));
    Fixture {
        name: dir
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned(),
        source: Checkpoint::open(dir).expect("a whole checkpoint"),
        golden: serde_json::from_str(&text).expect("golden.json is JSON"),
        logits: bytes.chunks_exact(4).map(value).collect(),
    }
}

impl Fixture {
    fn requests(&self) -> Vec<Request> {
        let request = |(line, case): (usize, &Case)| Request {
            line,
            prompt: case.prompt.clone(),
            max_tokens: case.ids.len(),
            sampling: Sampling::GREEDY,
        };
        self.golden.cases.iter().enumerate().map(request).collect()
    }

    fn run(
        &self,
        pack: &PackedFile,
        (policy, device): (&Policy, DeviceKind),
        ignore_eos: bool,
    ) -> Ran {
        run_with(
            self.source.spec(),
            pack,
            policy,
            (device, ignore_eos),
            self.requests(),
        )
    }

    fn logits_of(&self, case: usize, step: usize) -> &[f32] {
        let before: usize = self.golden.cases[..case].iter().map(|c| c.ids.len()).sum();
        &self.logits[(before + step) * self.golden.vocab..][..self.golden.vocab]
    }

    /// Largest difference of a logit, relative to the largest logit, over steps with equal histories.
    fn worst_error(&self, ran: &Ran) -> f32 {
        let mut worst = 0.0f32;
        for (line, case) in self.golden.cases.iter().enumerate() {
            let ours = &ran.collected.lines[&line].token_ids;
            let same = ours
                .iter()
                .zip(&case.ids)
                .take_while(|(a, b)| a == b)
                .count();
            for step in 0..(same + 1).min(ours.len()) {
                worst = worst.max(error(
                    &ran.collected.logits[&(line, step)],
                    self.logits_of(line, step),
                ));
            }
        }
        worst
    }

    fn assert_tokens(&self, ran: &Ran, what: &str) {
        for (line, case) in self.golden.cases.iter().enumerate() {
            assert_eq!(
                ran.collected.lines[&line].token_ids, case.ids,
                "{}: {what}, line {line}",
                self.name
            );
        }
    }
}

fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    let largest = theirs.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    let differences = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / largest
}

fn all_in_dram(sequences: usize) -> Policy {
    policy([0.0, 100.0, 0.0, 100.0, 0.0, 100.0], 1.0, (sequences, 1))
}

#[test]
fn goldens_are_varied_enough_to_judge_by() {
    let fixtures = fixtures();
    assert!(fixtures.len() >= 12, "{} checkpoints", fixtures.len());
    for fixture in &fixtures {
        for case in &fixture.golden.cases {
            let distinct: std::collections::BTreeSet<u32> = case.ids.iter().copied().collect();
            assert!(distinct.len() >= 8, "{}: {:?}", fixture.name, case.ids);
        }
    }
    let any = |test: fn(&loadmaster::model::ModelSpec) -> bool| {
        fixtures.iter().any(|f| test(f.source.spec()))
    };
    assert!(
        any(|m| !m.pre_norm)
            && any(|m| !m.bias)
            && any(|m| !m.norm_affine)
            && any(|m| !m.tied_head)
    );
    assert!(
        any(|m| !m.final_norm)
            && any(|m| m.embed_width != m.hidden)
            && any(|m| m.head_size() == 80)
    );
    assert!(any(|m| m.activation == loadmaster::model::Activation::Gelu));
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        assert!(
            fixtures.iter().any(|f| f.source.spec().dtype == dtype),
            "{dtype:?}"
        );
    }
}

#[test]
fn tokens_and_logits_are_transformers_own() {
    for fixture in fixtures() {
        let pack = pack(&fixture.source, false);
        let sequences = fixture.golden.cases.len();
        let ran = fixture.run(&pack, (&all_in_dram(sequences), DeviceKind::Cpu), true);
        fixture.assert_tokens(&ran, "in DRAM");
        let worst = fixture.worst_error(&ran);
        assert!(
            worst <= 1e-4,
            "{}: logits off by {worst:e} of the largest",
            fixture.name
        );
        let split = policy([0.0, 40.0, 0.0, 50.0, 0.0, 50.0], 1.0, (2, 2));
        let ran = fixture.run(&pack, (&split, DeviceKind::Cpu), true);
        fixture.assert_tokens(&ran, "over DRAM and disk");
        let three = Policy {
            cpu_cache_compute: true,
            ..policy([30.0, 30.0, 40.0, 30.0, 50.0, 25.0], 0.5, (2, 2))
        };
        let ran = fixture.run(&pack, (&three, DeviceKind::Host), true);
        fixture.assert_tokens(&ran, "over three tiers");
    }
}

#[test]
fn a_cache_in_fp16_stays_within_two_in_a_thousand() {
    for fixture in fixtures() {
        let pack = pack(&fixture.source, false);
        let half = Policy {
            kv: Dtype::F16,
            ..all_in_dram(fixture.golden.cases.len())
        };
        let worst = fixture.worst_error(&fixture.run(&pack, (&half, DeviceKind::Cpu), true));
        assert!(
            worst <= 2e-3,
            "{}: logits off by {worst:e} of the largest",
            fixture.name
        );
    }
}

#[test]
fn bf16_stays_within_three_in_a_hundred() {
    for fixture in fixtures() {
        let pack = pack(&fixture.source, false);
        let narrow = Policy {
            compute: Compute::Bf16,
            ..all_in_dram(fixture.golden.cases.len())
        };
        let worst = fixture.worst_error(&fixture.run(&pack, (&narrow, DeviceKind::Cpu), true));
        println!(
            "{}: bf16 logits off by {worst:.2e} of the largest",
            fixture.name
        );
        assert!(worst > 0.0 && worst <= 3e-2, "{}: {worst:e}", fixture.name);
    }
}

/// 4-bit weights are lossy; 8-bit activations must add little to that.
#[test]
fn eight_bit_activations_add_little_to_four_bit_weights() {
    let (mut four_bit, mut eight_bit) = (Vec::new(), Vec::new());
    for fixture in fixtures() {
        let pack = pack(&fixture.source, true);
        let first_logits = |compute| {
            let policy = Policy {
                compress_weight: true,
                compute,
                ..all_in_dram(fixture.golden.cases.len())
            };
            let ran = fixture.run(&pack, (&policy, DeviceKind::Cpu), true);
            let lines = 0..fixture.golden.cases.len();
            lines
                .map(|line| ran.collected.logits[&(line, 0)].clone())
                .collect::<Vec<_>>()
        };
        let (wide, narrow) = (first_logits(Compute::Fp32), first_logits(Compute::Exact));
        for (line, (wide, narrow)) in wide.iter().zip(&narrow).enumerate() {
            four_bit.push(error(wide, fixture.logits_of(line, 0)));
            eight_bit.push(error(narrow, wide));
        }
    }
    let mean = |errors: &[f32]| errors.iter().sum::<f32>() / errors.len() as f32;
    let (four_bit, eight_bit) = (mean(&four_bit), mean(&eight_bit));
    println!(
        "of the largest logit, on average: 4-bit weights {four_bit:.2e}, 8-bit activations {eight_bit:.2e}"
    );
    assert!(
        eight_bit > 0.0 && eight_bit < four_bit / 4.0,
        "{eight_bit:e} of {four_bit:e}"
    );
}

#[test]
fn the_end_token_ends_a_line_where_transformers_ends_it() {
    let mut stopped = 0;
    for fixture in fixtures() {
        let pack = pack(&fixture.source, false);
        // Fewer slots than lines: what a finished line leaves is taken by the next.
        let ran = fixture.run(&pack, (&all_in_dram(2), DeviceKind::Cpu), false);
        for (line, case) in fixture.golden.cases.iter().enumerate() {
            assert_eq!(
                ran.collected.lines[&line].token_ids, case.stopped_ids,
                "{}: line {line}",
                fixture.name
            );
            stopped += usize::from(case.stopped_ids.len() < case.ids.len());
        }
    }
    assert!(stopped > 5, "only {stopped} lines meet their end token");
}
