//! What overlap brings while decoding: the busier lane against the wall, and the same without overlap.

use crate::program::Program;
use crate::{Options, median};

/// 10 % of the weights in DRAM; batches at which disk and CPU take about equally long on machine A.
pub fn run(options: &Options) {
    let program = Program::new(&options.home());
    println!(
        "overlap, {}, 10 % of the weights in DRAM, decode steps",
        options.model()
    );
    for batch in options.list("batches", "48,64,80") {
        let run = |overlap: u8| {
            let flags = format!(
                "--percent 0 10 0 100 0 100 --gpu-batch-size {batch} --num-prompts {batch} \
                 --prompt-len 16 --gen-len 12 --overlap {overlap}"
            );
            program.run(options.model(), &flags)
        };
        let (mut lines, mut gains) = (vec![], vec![]);
        for _ in 0..options.rounds() {
            let (on, off) = (run(1), run(0));
            let (disk, cpu) = (
                on.busy_decode_s("disk_to_cpu"),
                on.busy_decode_s("cpu_compute"),
            );
            let apart = 100.0 * (1.0 - disk.min(cpu) / disk.max(cpu));
            lines.push((on.decode_s() / disk.max(cpu), disk, cpu, apart));
            gains.push(off.decode_s() / on.decode_s());
        }
        lines.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, disk, cpu, apart) = lines[(lines.len() - 1) / 2];
        println!(
            "batch {batch}: disk busy {disk:.2} s, cpu busy {cpu:.2} s ({apart:.0} % apart); \
             wall / busier lane {ratio:.3}; without overlap / with {:.2}",
            median(gains)
        );
    }
}
