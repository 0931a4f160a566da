//! What reads and products keep of their rates beside each other, by their sizes, and what the profile says of it.
//! `profile=FILE` is one that was probed just before.

use super::{Options, median};
use loadmaster::cost::rates::Rates;
use loadmaster::dtype::{Arithmetic, Dtype};
use loadmaster::policy::DeviceKind;
use loadmaster::probe::{Burst, BurstPlace, Bursts, CallSize, Products, Reads, said_to_keep};
use loadmaster::profile::HardwareProfile;
use std::sync::atomic::AtomicBool;

const CALLS: [(u64, u64); 9] = [
    (1, 4096),
    (4, 4096),
    (16, 4096),
    (1, 65536),
    (4, 65536),
    (16, 131072),
    (1, 1 << 20),
    (1, 4 << 20),
    (1, 16 << 20),
];
const PRODUCTS: [(Dtype, Arithmetic, usize); 4] = [
    (Dtype::F16, Arithmetic::Fp32, 1),
    (Dtype::Q4, Arithmetic::Int8, 1),
    (Dtype::Q4, Arithmetic::Int8, 16),
    (Dtype::F16, Arithmetic::Fp32, 256),
];

pub fn run(options: &Options) {
    let file = options.text("profile").expect("profile=FILE");
    let text = std::fs::read_to_string(file).expect("the profile can be read");
    let profile = HardwareProfile::from_toml(&text).expect("a profile");
    let rates = Rates::new(&profile, DeviceKind::Cpu, profile.machine.threads).expect("rates");
    let store = options.home().join("beside.store");
    std::fs::write(&store, vec![1; 256 << 20]).expect("room for a file");
    let stop = AtomicBool::new(false);
    let place = BurstPlace {
        threads: profile.machine.threads,
        store: &store,
        spill: &options.home(),
        rates: &rates,
        stop: &stop,
    };
    let mut bursts = Bursts::new(&place).expect("memory");
    println!(
        "{:>14} {:>14} {:>22} {:>22}",
        "products", "reads", "reads keep, said", "products keep, said"
    );
    for product in PRODUCTS {
        for call in CALLS {
            one((product, call), &mut bursts, (&rates, options.rounds()));
        }
    }
    std::fs::remove_file(store).expect("it can be removed");
}

/// Alone and beside each other, in turn. Slowdowns are against the same price, in company divided by what is said.
fn one(
    ((format, arithmetic, rows), (requests, request_bytes)): (
        (Dtype, Arithmetic, usize),
        (u64, u64),
    ),
    bursts: &mut Bursts,
    (rates, rounds): (&Rates, usize),
) {
    let products = Products {
        format,
        arithmetic,
        rows,
        times: 1,
        passed_bytes: 0,
    };
    let reads = Reads {
        spilled: false,
        size: CallSize {
            request_bytes,
            requests,
        },
    };
    let all = [
        Burst::Reads(reads),
        Burst::ReadsBeside(reads, products),
        Burst::Product(products),
        Burst::ProductBeside(products, reads),
    ];
    let [products_said, reads_said] = said_to_keep(products, reads.size, rates);
    let mut kept: [Vec<f64>; 2] = Default::default();
    for _ in 0..rounds {
        let slow = bursts.slowdowns(&all).expect("bursts");
        kept[0].push(slow[0] / slow[1] * reads_said);
        kept[1].push(slow[2] / slow[3] * products_said);
    }
    let [read, multiplied] = kept.map(median);
    println!(
        "{:>14} {:>14} {read:>15.2} {reads_said:>6.2} {multiplied:>15.2} {products_said:>6.2}",
        format!("{} x {rows}", format.name()),
        format!("{requests} x {} KiB", request_bytes >> 10)
    );
}
