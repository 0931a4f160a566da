//! How rates scale: with the size of the model (4-bit, all in DRAM), with the batch, with threads.

use crate::program::Program;
use crate::{Options, median};
use loadmaster::machine::os;
use loadmaster::model::families::named_size;

const RESIDENT: &str = "--percent 0 100 0 100 0 100 --num-gpu-batches 1";

pub fn run(options: &Options) {
    let program = Program::new(&options.home());
    sizes(options, &program);
    batches(options, &program);
    threads(options, &program);
}

/// Tokens x parameters per second while decoding, against the first size's.
fn sizes(options: &Options, program: &Program) {
    let batch = options.list("batch", "1")[0];
    println!("4-bit, resident, batch {batch}: decode tokens/s x parameters");
    let mut first = None;
    for model in options.list("sizes", "opt-1.3b,opt-2.7b,opt-6.7b,opt-13b") {
        let spec = named_size(model).expect("a known size");
        let flags = format!(
            "{RESIDENT} --compress-weight 1 --gpu-batch-size {batch} --num-prompts {batch} --prompt-len 4 --gen-len 12"
        );
        let one = || program.run(model, &flags).decode_tok_s();
        let tokens_per_s = median((0..options.rounds()).map(|_| one()).collect());
        let rate = tokens_per_s * spec.parameters() as f64;
        let base = *first.get_or_insert(rate);
        println!(
            "  {model:10} {tokens_per_s:8.2} tok/s {:7.1} G parameters/s, {:.2} of the first",
            rate / 1e9,
            rate / base
        );
    }
}

fn batches(options: &Options, program: &Program) {
    println!("{}, resident: decode tokens/s by batch", options.model());
    let mut before = 0.0;
    for batch in options.list("batches", "1,2,4,8,16,32,64,128,256") {
        let flags = format!(
            "{RESIDENT} --gpu-batch-size {batch} --num-prompts {batch} --prompt-len 2 --gen-len 6"
        );
        let one = || program.run(options.model(), &flags).decode_tok_s();
        let rate = median((0..options.rounds()).map(|_| one()).collect());
        let word = if rate >= before {
            ""
        } else {
            "  less than before"
        };
        println!("  {batch:>4} {rate:9.2} tok/s{word}");
        before = rate;
    }
}

/// A prompt of 256 tokens: bound by arithmetic.
fn threads(options: &Options, program: &Program) {
    let one = |threads: usize| {
        let flags = format!(
            "{RESIDENT} --threads {threads} --gpu-batch-size 1 --num-prompts 1 --prompt-len 256 --gen-len 1"
        );
        program.run(options.model(), &flags).prefill_s()
    };
    let all = os::default_threads();
    let seconds = |threads| median((0..options.rounds()).map(|_| one(threads)).collect());
    let (single, many) = (seconds(1), seconds(all));
    println!(
        "{}, prefill of 256 tokens: 1 thread {single:.2} s, {all} threads {many:.2} s: {:.2} x",
        options.model(),
        single / many
    );
}
