//! Packing, streaming and scaling beside the machine's own ceilings, measured in the same run.
//! `cargo bench --bench streaming -- SECTION [OPTIONS]`:
//!   packing   packing a checkpoint, as it is and to 4 bits, against a direct copy of the same bytes
//!   overlap   disk and CPU at once where they take about equally long, with overlap and without
//!   roofline  five regimes: measured seconds against perfect overlap at this run's ceilings
//!   ceilings  the machine alone: FMA peak, DRAM reads, direct disk reads and overwrites
//!   cores     how far two cores are from each other, and what DRAM gives both at that time
//!   layer     what a pass consists of: products, attention, everything else
//!   beside    reads and products beside each other, and what a profile says of it
//!   pauses    calls to a disk right after each other, and after pauses
//!   queue     a few writes beside a stream of reads, by their sizes
//!   scaling   tokens x parameters per second over sizes, batches and threads
//! Options: model=opt-1.3b (packing, overlap, roofline, layer), sizes=opt-1.3b,opt-2.7b (scaling), rounds=3,
//! home=DIR (default target/streaming: packed stores are kept there and reused).

mod beside;
mod ceilings;
mod cores;
mod layer;
mod overlap;
mod packing;
mod pauses;
mod program;
mod queue;
mod roofline;
mod scaling;

use std::path::PathBuf;

const SECTIONS: &str =
    "packing, overlap, roofline, layer, beside, ceilings, cores, pauses, queue, scaling";

/// What the command line says.
pub struct Options {
    words: Vec<String>,
}

impl Options {
    pub fn text(&self, name: &str) -> Option<&str> {
        let mut pairs = self.words.iter().filter_map(|word| word.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    pub fn model(&self) -> &str {
        self.text("model").unwrap_or("opt-1.3b")
    }

    pub fn rounds(&self) -> usize {
        self.text("rounds")
            .and_then(|n| n.parse().ok())
            .unwrap_or(3)
    }

    /// A list of words or numbers, or the default.
    pub fn list<'a>(&'a self, name: &str, default: &'a str) -> Vec<&'a str> {
        self.text(name).unwrap_or(default).split(',').collect()
    }

    pub fn home(&self) -> PathBuf {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/streaming");
        let home = self.text("home").map_or(here, PathBuf::from);
        std::fs::create_dir_all(&home).expect("home can be made");
        home
    }
}

/// The middle one; of an even number the lower middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

fn main() {
    let options = Options {
        words: std::env::args().skip(1).collect(),
    };
    for word in &options.words {
        match word.as_str() {
            "packing" => packing::run(&options),
            "overlap" => overlap::run(&options),
            "roofline" => roofline::run(&options),
            "beside" => beside::run(&options),
            "layer" => layer::run(&options),
            "cores" => cores::run(&options),
            "pauses" => pauses::run(&options),
            "queue" => queue::run(&options),
            "scaling" => scaling::run(&options),
            "ceilings" => {
                let threads = loadmaster::machine::os::default_threads();
                println!(
                    "{}",
                    ceilings::Meter::new(&options.home(), threads)
                        .measure()
                        .show()
                );
            }
            // Cargo's own, and options.
            word if word.starts_with("--") || word.contains('=') => {}
            word => println!("no section is called {word}: {SECTIONS}"),
        }
    }
    if !options.words.iter().any(|w| !w.starts_with("--")) {
        println!("name a section: {SECTIONS}");
    }
}
