//! Five regimes against perfect overlap. "ceilings": bytes and FLOPs over what this machine gives in this
//! very run (ceilings.rs); "probed": the busiest lane's work at the profile's rates. 1.00 is perfect.
//! The mixed one a second time with each phase's own busiest lane: no decode step can begin before the prompts'
//! last product, and reading goes ahead by the ring alone, so that one phase's idle lane does nothing for the other.

use crate::ceilings::{Ceilings, Meter};
use crate::program::{Measured, Program};
use crate::{Options, median};
use loadmaster::machine::os;
use loadmaster::model::ModelSpec;
use loadmaster::model::families::named_size;

/// Seconds of perfect overlap, from what a run moved and what the machine gives.
type Bound = Box<dyn Fn(&Measured, &Ceilings) -> f64>;

/// One regime: what runs, what counts, and its bound.
struct Regime {
    name: &'static str,
    model: String,
    flags: String,
    seconds: fn(&Measured) -> f64,
    /// Seconds at the ceilings.
    perfect: Bound,
    /// Lanes whose work bounds the seconds that count.
    lanes: &'static [&'static str],
    /// Where both phases count and each has another busiest lane: the flags of a job of the prompts alone.
    prompts_only: Option<String>,
}

fn whole(m: &Measured) -> f64 {
    m.prefill_s() + m.decode_s()
}

pub fn run(options: &Options) {
    let home = options.home();
    let program = Program::new(&home);
    let mut meter = Meter::new(&home, os::default_threads());
    let regimes = regimes(options);
    for regime in &regimes {
        // Packs, and tells nothing.
        program.run(&regime.model, "--num-prompts 1 --prompt-len 4 --gen-len 1");
    }
    println!("median of {} rounds; perfect / measured", options.rounds());
    println!(
        "{:22} {:9} {:>9} {:>9} {:>8}  ceilings around it",
        "regime", "model", "measured", "ceilings", "probed"
    );
    for regime in &regimes {
        let (mut ceilings, mut rows) = (vec![meter.measure()], vec![]);
        for _ in 0..options.rounds() {
            rows.push(program.run(&regime.model, &regime.flags));
            ceilings.push(meter.measure());
        }
        let ceiling = Ceilings::median(&ceilings);
        let seconds = rows.iter().map(regime.seconds).collect();
        let hard = rows
            .iter()
            .map(|m| (regime.perfect)(m, &ceiling) / (regime.seconds)(m));
        let probed = rows.iter().map(|m| {
            let work = |lane: &&str| m.work_s(lane);
            busiest(regime.lanes, work) / (regime.seconds)(m)
        });
        println!(
            "{:22} {:9} {:7.2} s {:9.2} {:8.2}  {}",
            regime.name,
            regime.model,
            median(seconds),
            median(hard.collect()),
            median(probed.collect()),
            ceiling.show()
        );
        if let Some(prompts_only) = &regime.prompts_only {
            by_phase(&program, (regime, prompts_only), &rows);
        }
    }
}

/// Seconds of whichever of these lanes has most to do.
fn busiest(lanes: &[&str], work_s: impl Fn(&&str) -> f64) -> f64 {
    lanes.iter().map(work_s).fold(0.0, f64::max)
}

/// Against the sum of each phase's busiest lane. What lanes have to do for the prompts is that of a run of the same
/// policy that ends with them.
fn by_phase(program: &Program, (regime, prompts_only): (&Regime, &str), rows: &[Measured]) {
    let ratios = rows.iter().map(|m| {
        let prompts = program.run(&regime.model, &format!("{} {prompts_only}", m.flags));
        let first = busiest(regime.lanes, |lane| prompts.work_s(lane));
        let then = busiest(regime.lanes, |lane| m.work_s(lane) - prompts.work_s(lane));
        (first + then) / (regime.seconds)(m)
    });
    println!(
        "{:22} {:9} {:>9} {:>9} {:8.2}",
        format!("{}, by phase", regime.name),
        regime.model,
        "",
        "",
        median(ratios.collect())
    );
}

fn spec(model: &str) -> ModelSpec {
    named_size(model).expect("a known size")
}

/// Multiply-adds of the layers for one token, times two; the head's are counted by sequence.
fn layer_flop(m: &ModelSpec) -> f64 {
    (2 * m.layers * (4 * m.hidden * m.hidden + 2 * m.hidden * m.ffn)) as f64
}

fn regimes(options: &Options) -> Vec<Regime> {
    let model = options.model().to_owned();
    let kv_model = options.list("kv-model", "opt-125m")[0].to_owned();
    let all = [
        prefill(&model),
        decode(&model),
        disk_weights(&model),
        disk_cache(&kv_model),
        mixed(&model),
    ];
    let wanted = options.list("regimes", "prefill,decode,disk weights,disk cache,mixed");
    all.into_iter()
        .filter(|r| wanted.contains(&r.name))
        .collect()
}

fn prefill(model: &str) -> Regime {
    let (batch, tokens) = (8, 128);
    let m = spec(model);
    // Causal attention: half of two products of tokens x tokens x hidden.
    let attention = (2 * m.layers * tokens * tokens * m.hidden * batch) as f64;
    let head = (2 * m.vocab * m.hidden * batch) as f64;
    let flop = layer_flop(&m) * (batch * tokens) as f64 + attention + head;
    Regime {
        name: "prefill",
        model: model.to_owned(),
        flags: format!(
            "--percent 0 100 0 100 0 100 --num-prompts {batch} --gpu-batch-size {batch} --prompt-len {tokens} --gen-len 1"
        ),
        seconds: Measured::prefill_s,
        perfect: Box::new(move |_, c| flop / c.flop_per_s),
        lanes: &["cpu_compute"],
        prompts_only: None,
    }
}

fn decode(model: &str) -> Regime {
    let bytes = spec(model).weights_bytes(false) as f64;
    let steps = 31.0;
    Regime {
        name: "decode",
        model: model.to_owned(),
        flags: "--percent 0 100 0 100 0 100 --num-prompts 1 --prompt-len 2 --gen-len 32".to_owned(),
        seconds: Measured::decode_s,
        perfect: Box::new(move |_, c| steps * bytes / c.dram_bytes_per_s),
        lanes: &["cpu_compute"],
        prompts_only: None,
    }
}

fn disk_weights(model: &str) -> Regime {
    Regime {
        name: "disk weights",
        model: model.to_owned(),
        flags: "--percent 0 0 0 100 0 100 --num-prompts 4 --gpu-batch-size 4 --prompt-len 4 --gen-len 6"
            .to_owned(),
        seconds: whole,
        perfect: Box::new(|m, c| m.bytes("disk_to_cpu") / c.read_bytes_per_s),
        lanes: &["disk_to_cpu"],
        prompts_only: None,
    }
}

/// Reading counts from the first decode step on; one new record a step and layer is written.
fn disk_cache(model: &str) -> Regime {
    let (batch, steps) = (32, 15);
    let m = spec(model);
    let written = (batch * steps * m.layers * 4096) as f64;
    Regime {
        name: "disk cache",
        model: model.to_owned(),
        flags: format!(
            "--percent 0 100 0 0 0 100 --num-prompts {batch} --gpu-batch-size {batch} --prompt-len 256 --gen-len {}",
            steps + 1
        ),
        seconds: Measured::decode_s,
        perfect: Box::new(move |m, c| {
            m.bytes("disk_to_cpu") / c.read_bytes_per_s + written / c.write_bytes_per_s
        }),
        lanes: &["disk_to_cpu"],
        prompts_only: None,
    }
}

/// The planner's own split of a model that does not fit: what is on disk and what is computed with
/// should take equally long.
fn mixed(model: &str) -> Regime {
    let m = spec(model);
    let (batch, prompt, steps) = (64, 8, 11);
    let budget = m.weights_bytes(false) * 6 / 10 / (1 << 20);
    let tokens = (batch * (prompt + steps)) as f64;
    let flop = layer_flop(&m) * tokens + (2 * m.vocab * m.hidden * batch * (steps + 1)) as f64;
    Regime {
        name: "mixed",
        model: model.to_owned(),
        flags: format!(
            "--cpu-mem {budget}MiB --num-prompts {batch} --prompt-len {prompt} --gen-len {}",
            steps + 1
        ),
        prompts_only: Some(format!(
            "--cpu-mem {budget}MiB --num-prompts {batch} --prompt-len {prompt} --gen-len 1"
        )),
        seconds: whole,
        perfect: Box::new(move |m, c| {
            let disk = m.bytes("disk_to_cpu") / c.read_bytes_per_s
                + m.bytes("cpu_to_disk") / c.write_bytes_per_s;
            disk.max(flop / c.flop_per_s)
        }),
        lanes: &["disk_to_cpu", "cpu_compute"],
    }
}
