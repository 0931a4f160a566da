//! Never out of memory: random (model, workload, budget) triples, and what a run within a budget must
//! show. Drawing and judging; the memory cgroup is machine/os's, the child the door's.

use super::draw::Draws;
use crate::dtype::Dtype;
use crate::model::{Activation, ModelSpec};
use crate::units::MIB;
use serde::{Deserialize, Serialize};

pub const CAMPAIGN_SCHEMA: &str = "loadmaster.campaign/1";
/// A plan's bytes may be above what the run took by this part, or by this much.
const NEAR_PART: f64 = 0.02;
const NEAR_BYTES: u64 = 16 * MIB;
/// Drawn budgets below what is enough: about this part of all triples.
const SHORT_PART: f64 = 0.05;
/// Refusals may be at most this part of so many triples or more; with fewer, chance decides.
const REFUSED_PART: f64 = 0.1;
const REFUSALS_COUNT_FROM: usize = 50;

/// A workload of a triple.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrawnWork {
    pub prompts: usize,
    pub prompt_tokens: u32,
    pub gen_tokens: u32,
}

/// Parameters times prompt tokens of one job: a few seconds on two cores.
const MOST_WORK: u64 = 500_000_000_000;

/// Work whose prompts fit a model, and not too many tokens for a few seconds.
pub fn drawn_work(draws: &mut Draws, model: &ModelSpec) -> DrawnWork {
    let longest = model.positions.min(384) as u32;
    let prompt_tokens = draws.log_between(4, longest - 16);
    let tokens = (MOST_WORK / model.parameters().max(1)).min(6144) as u32;
    let most = (tokens / prompt_tokens).clamp(1, 64);
    DrawnWork {
        prompts: draws.log_between(1, most) as usize,
        prompt_tokens,
        gen_tokens: draws.log_between(1, 12),
    }
}

/// A budget in whole MiB between what is just enough and more than anything needs; sometimes less.
pub fn drawn_budget(draws: &mut Draws, (least_bytes, most_bytes): (u64, u64)) -> u64 {
    let (least, most) = (
        least_bytes as f64,
        most_bytes.max(least_bytes) as f64 * 1.15,
    );
    let bytes = if draws.chance(SHORT_PART) {
        least * (0.6 + 0.38 * draws.unit())
    } else {
        least * (most / least).powf(draws.unit())
    };
    (bytes as u64).next_multiple_of(MIB)
}

/// A small model of random shape.
pub fn drawn_model(draws: &mut Draws, number: usize) -> ModelSpec {
    let head_size = draws.one_of(&[32, 64, 80, 128]);
    let heads = draws.one_of(&[2, 4, 6, 8, 12]);
    let hidden = heads * head_size;
    let width = if draws.chance(0.25) {
        hidden / 2
    } else {
        hidden
    };
    let bias = draws.chance(0.85);
    let pre_norm = draws.chance(0.8);
    ModelSpec {
        name: format!("random-{number}"),
        layers: draws.log_between(1, 24) as usize,
        hidden,
        heads,
        ffn: hidden * draws.one_of(&[2, 3, 4]),
        vocab: draws.log_between(600, 60_000) as usize,
        positions: draws.one_of(&[256, 512, 2048]),
        embed_width: width,
        pre_norm,
        final_norm: pre_norm,
        bias,
        norm_affine: true,
        activation: draws.one_of(&[Activation::Relu, Activation::Gelu]),
        tied_head: true,
        dtype: draws.one_of(&[Dtype::F16, Dtype::F16, Dtype::Bf16, Dtype::F32]),
        pad_id: 1,
        bos_id: 2,
        eos_ids: vec![2],
    }
}

/// What was seen of a run inside its cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub budget_bytes: u64,
    pub planned_bytes: u64,
    /// The child's VmHWM, planning and loading included.
    pub peak_bytes: u64,
    pub failed_charges: u64,
    pub kills: u64,
    /// It ended well.
    pub done: bool,
}

/// Everything that is wrong with a run; empty where nothing is.
pub fn faults(seen: &Seen) -> Vec<String> {
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let mut faults = Vec::new();
    if !seen.done {
        faults.push("it did not end well".to_owned());
    }
    if seen.kills > 0 {
        faults.push(format!("{} kills", seen.kills));
    }
    if seen.failed_charges > 0 {
        faults.push(format!("{} failed charges", seen.failed_charges));
    }
    if !seen.done {
        return faults;
    }
    if seen.planned_bytes > seen.budget_bytes {
        faults.push(format!(
            "planned {:.1} MiB of a budget of {:.1}",
            mib(seen.planned_bytes),
            mib(seen.budget_bytes)
        ));
    }
    if seen.peak_bytes > seen.planned_bytes {
        faults.push(format!(
            "took {:.1} MiB, {:.1} more than planned",
            mib(seen.peak_bytes),
            mib(seen.peak_bytes - seen.planned_bytes)
        ));
    }
    let near = NEAR_BYTES.max((seen.peak_bytes as f64 * NEAR_PART) as u64);
    if seen.planned_bytes > seen.peak_bytes + near {
        faults.push(format!(
            "planned {:.1} MiB, {:.1} more than it took",
            mib(seen.planned_bytes),
            mib(seen.planned_bytes - seen.peak_bytes)
        ));
    }
    faults
}

/// A planner that refuses more often than budgets were drawn too small refuses what would run.
pub fn too_many_refusals(refused: usize, triples: usize) -> Option<String> {
    let many = refused as f64 > REFUSED_PART * triples as f64;
    (triples >= REFUSALS_COUNT_FROM && many)
        .then(|| format!("{refused} of {triples} triples were refused: more than a tenth"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Seen = Seen {
        budget_bytes: 400 * MIB,
        planned_bytes: 390 * MIB,
        peak_bytes: 380 * MIB,
        failed_charges: 0,
        kills: 0,
        done: true,
    };

    #[test]
    fn each_way_to_be_wrong_is_told() {
        assert_eq!(faults(&GOOD), [""; 0]);
        let one = |seen: Seen| assert_eq!(faults(&seen).len(), 1, "{seen:?}");
        one(Seen {
            failed_charges: 2,
            ..GOOD
        });
        one(Seen { kills: 1, ..GOOD });
        one(Seen {
            done: false,
            ..GOOD
        });
        one(Seen {
            peak_bytes: 391 * MIB,
            ..GOOD
        });
        one(Seen {
            peak_bytes: 370 * MIB,
            ..GOOD
        });
        one(Seen {
            budget_bytes: 389 * MIB,
            ..GOOD
        });
        let large = |peak: u64| Seen {
            budget_bytes: 9000 * MIB,
            planned_bytes: 8000 * MIB,
            peak_bytes: peak * MIB,
            ..GOOD
        };
        assert_eq!(faults(&large(7850)), [""; 0], "within two percent");
        one(large(7800));
    }

    #[test]
    fn a_tenth_may_be_refused() {
        assert_eq!(too_many_refusals(20, 200), None);
        assert!(too_many_refusals(21, 200).is_some_and(|w| w.contains("21 of 200")));
        assert_eq!(too_many_refusals(3, 10), None, "too few to tell");
    }

    #[test]
    fn few_budgets_are_too_small_and_shapes_are_whole() {
        let mut draws = Draws::new(5, 0);
        let budgets: Vec<u64> = (0..400)
            .map(|_| drawn_budget(&mut draws, (100 * MIB, 300 * MIB)))
            .collect();
        let short = budgets.iter().filter(|&&b| b < 100 * MIB).count();
        assert!(short > 5 && short < 60, "{short}");
        assert!(budgets.iter().all(|b| b % MIB == 0 && *b < 360 * MIB));
        for number in 0..50 {
            let model = drawn_model(&mut draws, number);
            assert_eq!(model.hidden % model.heads, 0);
            let work = drawn_work(&mut draws, &model);
            assert!(work.prompt_tokens + work.gen_tokens <= model.positions as u32);
        }
    }
}
