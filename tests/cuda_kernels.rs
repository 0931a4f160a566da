//! Every CUDA kernel against its CPU twin: the kernel's source runs under an emulation (tests/cuda) with
//! address sanitizer, over odd and even shapes, with its threads in several orders; and leaving out any barrier
//! must be noticed. Needs bash and g++.

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/case.rs"]
mod case;
#[path = "cuda/twins.rs"]
mod twins;

use case::{Case, Emulation, in_every_order, run};
use half::{bf16, f16};
use loadmaster::dtype::{Arithmetic, Dtype, PANEL_ROWS, panels};
use loadmaster::machine::cpu::kernels as cpu;
use twins::{Random, Twins, close, encode, floats, to_gpu_rows};

const PLAIN: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
const EPS: f32 = 1e-5;

/// The grid of the kernels that move rows.
fn row_grid(count: usize, width: usize) -> (usize, usize) {
    (count, width.div_ceil(1024))
}

/// A case, which of its buffers is the result, and what it must be: bit for bit, or within a tolerance.
struct Expected {
    case: Case,
    buffer: usize,
    values: Vec<f32>,
    tolerance: f32,
}

fn check(all: Vec<Expected>) {
    let cases: Vec<Case> = all.iter().map(|e| e.case.clone()).collect();
    for found in in_every_order(&cases) {
        for (i, (expected, buffers)) in all.iter().zip(&found).enumerate() {
            let values = floats(&buffers[expected.buffer]);
            close(
                &values,
                &expected.values,
                expected.tolerance,
                &format!("case {i}"),
            );
        }
    }
}

#[test]
fn rows_are_moved_and_added_as_on_the_cpu() {
    let mut random = Random::new(1);
    let twins = Twins::new();
    let mut all = Vec::new();
    for width in [1, 7, 64, 1025] {
        let (rows, table): (Vec<u32>, Vec<u32>) = (vec![4, 0, 3], vec![65, 2, 64]);
        let x = random.values(5 * width, 2.0);
        let y = random.values(3 * width, 2.0);
        for format in PLAIN {
            let weights = encode(&random.values(128 * width, 1.0), format);
            let case = |name: &str| {
                let name = format!("{name}_{}", format.name());
                Case::new(&name, row_grid(3, width), 256)
                    .buffer(&weights)
                    .buffer(&table)
                    .buffer(&x)
                    .buffer(&rows)
                    .words([3, width])
            };
            let wide = twins::decode(&weights, format);
            let mut embedded = x.clone();
            let mut added = x.clone();
            for (row, id) in rows.iter().zip(&table) {
                for k in 0..width {
                    let value = wide[*id as usize * width + k];
                    embedded[*row as usize * width + k] = value;
                    added[*row as usize * width + k] += value;
                }
            }
            all.push(Expected {
                case: case("embed"),
                buffer: 2,
                values: embedded,
                tolerance: 0.0,
            });
            all.push(Expected {
                case: case("add_positions"),
                buffer: 2,
                values: added,
                tolerance: 0.0,
            });
        }
        let case = |name: &str| {
            Case::new(name, row_grid(3, width), 256)
                .buffer(&x)
                .buffer(&rows)
                .buffer(&y)
                .words([3, width])
        };
        let mut gathered = vec![0.0; 3 * width];
        cpu::copy_rows(&twins.pool, &x, &rows, width, &mut gathered);
        all.push(Expected {
            case: case("gather_rows"),
            buffer: 2,
            values: gathered,
            tolerance: 0.0,
        });
        let mut added = x.clone();
        cpu::add_rows(&twins.pool, &mut added, Some(&rows), &y, width);
        all.push(Expected {
            case: case("add_rows"),
            buffer: 0,
            values: added,
            tolerance: 0.0,
        });
        let mut scattered = x.clone();
        for (row, from) in rows.iter().zip(y.chunks_exact(width)) {
            scattered[*row as usize * width..][..width].copy_from_slice(from);
        }
        all.push(Expected {
            case: case("scatter_rows"),
            buffer: 0,
            values: scattered,
            tolerance: 0.0,
        });
    }
    check(all);
}

fn norm_cases(widths: &[usize]) -> Vec<Expected> {
    let mut random = Random::new(2);
    let twins = Twins::new();
    let mut all = Vec::new();
    for (i, &width) in widths.iter().enumerate() {
        let rows: Vec<u32> = vec![2, 0, 5];
        let x = random.values(6 * width, 3.0);
        let weight = (i % 2 == 0).then(|| random.values(width, 1.0));
        let bias = (i % 3 != 1).then(|| random.values(width, 1.0));
        let mut values = vec![0.0; 3 * width];
        cpu::layer_norm(
            &twins.pool,
            twins.isa,
            cpu::NormArgs {
                x: &x,
                rows: Some(&rows),
                m: 3,
                width,
                weight: weight.as_deref(),
                bias: bias.as_deref(),
                eps: EPS,
                out: &mut values,
            },
        );
        let start = |out_rows: Option<&[u32]>, in_place: bool| {
            let mut case = Case::new("layer_norm", (3, 1), 256)
                .buffer(&x)
                .buffer(&rows)
                .optional(weight.as_deref())
                .optional(bias.as_deref());
            if in_place {
                case = case.held(0);
            } else {
                case = case.buffer(&vec![f32::NAN; 3 * width]);
            }
            case.optional(out_rows).words([3, width]).float(EPS)
        };
        let out = 2 + usize::from(weight.is_some()) + usize::from(bias.is_some());
        all.push(Expected {
            case: start(None, false),
            buffer: out,
            values: values.clone(),
            tolerance: 2e-5,
        });
        let mut in_place = x.clone();
        for (row, from) in rows.iter().zip(values.chunks_exact(width)) {
            in_place[*row as usize * width..][..width].copy_from_slice(from);
        }
        all.push(Expected {
            case: start(Some(&rows), true),
            buffer: 0,
            values: in_place,
            tolerance: 2e-5,
        });
    }
    all
}

#[test]
fn norms_are_the_cpus() {
    check(norm_cases(&[1, 20, 64, 257, 768, 1000]));
}

#[test]
fn what_stands_around_large_products_is_the_cpus() {
    let mut random = Random::new(3);
    let mut all = Vec::new();
    for (m, rows, stride) in [(1, 3, 3), (2, 64, 70), (3, 1030, 1030)] {
        let out = random.values(m * stride, 4.0);
        let bias = random.values(rows, 1.0);
        for act in 0..3 {
            for bias in [None, Some(bias.as_slice())] {
                let case = Case::new("bias_activate", row_grid(m, rows), 256)
                    .buffer(&out)
                    .words([stride, m, rows])
                    .optional(bias)
                    .word(act);
                let mut values = out.clone();
                for row in values.chunks_mut(stride) {
                    twins::finish(&mut row[..rows], bias, act);
                }
                // One product by one of ones: the twin's own epilogue.
                all.push(Expected {
                    case,
                    buffer: 0,
                    values,
                    tolerance: 0.0,
                });
            }
        }
        let mut x = random.values(m * stride, 4.0);
        x[0] = 70000.0;
        x[rows - 1] = -1e9;
        for (format, part, scale) in PARTS {
            let name = format!("narrow_{}", format.name());
            let case = Case::new(&name, row_grid(m, rows), 256)
                .buffer(&x)
                .word(stride)
                .buffer(&vec![0u16; m * rows])
                .words([rows, m, rows, part])
                .float(scale);
            let rest = |v: &f32| (0..part).fold(*v, |v, _| v - rounded(v, format)) * scale;
            let narrow: Vec<f32> = x
                .chunks(stride)
                .flat_map(|row| row[..rows].iter().map(rest).map(|v| rounded(v, format)))
                .collect();
            let wanted = encode(&narrow, format);
            for found in in_every_order(&[case]) {
                assert_eq!(found[0][1], wanted, "{name} part {part}, {m} × {rows}");
            }
        }
    }
    check(all);
}

/// Formats, how many roundings of a value are taken from it before, and what the rest is multiplied by.
const PARTS: [(Dtype, usize, f32); 5] = [
    (Dtype::F16, 0, 1.0),
    (Dtype::F16, 1, 2048.0),
    (Dtype::Bf16, 0, 1.0),
    (Dtype::Bf16, 1, 1.0),
    (Dtype::Bf16, 2, 1.0),
];

fn rounded(value: f32, format: Dtype) -> f32 {
    match format {
        Dtype::F16 => f16::from_f32(value.clamp(-65504.0, 65504.0)).to_f32(),
        _ => bf16::from_f32(value).to_f32(),
    }
}

#[test]
fn four_bit_weights_widen_as_on_the_cpu() {
    let mut random = Random::new(4);
    let twins = Twins::new();
    for (rows, inputs) in [(1, 1), (64, 64), (70, 200), (3, 2056), (65, 20)] {
        let panel = twins.pack(
            &random.values(rows * inputs, 0.3),
            (rows, inputs),
            Dtype::Q4,
        );
        let wide = twins.unpack(&panel, (rows, inputs), Dtype::Q4);
        let wanted = encode(&wide, Dtype::F16);
        let case = Case::new("dequantise_q4_f16", (rows, inputs.div_ceil(2048)), 256)
            .buffer(&to_gpu_rows(&panel, (rows, inputs), Dtype::Q4))
            .buffer(&vec![0u16; rows * inputs])
            .words([rows, inputs]);
        for found in in_every_order(&[case]) {
            assert_eq!(found[0][1], wanted, "{rows} × {inputs}");
        }
    }
}

/// A product of m rows by the kernel for n.
struct Shape {
    m: usize,
    n: usize,
    inputs: usize,
    rows: usize,
}

fn product_case(random: &mut Random, format: Dtype, shape: Shape) -> Expected {
    let Shape { m, n, inputs, rows } = shape;
    let twins = Twins::new();
    let (x_stride, out_stride) = (inputs + 4 * (rows % 2), rows + rows % 3);
    let x = random.values(m * x_stride, 1.0);
    let panel = twins.pack(&random.values(rows * inputs, 0.5), (rows, inputs), format);
    let bias = (rows % 2 == 0).then(|| random.values(rows, 1.0));
    let act = rows % 3;
    let mut values = vec![0.0; m * out_stride];
    cpu::gemm(
        &twins.pool,
        twins.isa,
        cpu::GemmArgs {
            x: &x,
            ldx: x_stride,
            m,
            inputs,
            weights: &panel,
            format,
            arithmetic: Arithmetic::Fp32,
            rows,
            bias: bias.as_deref(),
            activation: twins::activation(act),
            out: &mut values,
            ldo: out_stride,
        },
    );
    let (blocks, threads) = if n <= 4 { (4, 128) } else { (32, 256) };
    let name = format!("gemm_small_{}_{n}", format.name());
    let case = Case::new(&name, (rows.div_ceil(blocks), 1), threads)
        .buffer(&x)
        .words([x_stride, m, inputs])
        .buffer(&to_gpu_rows(&panel, (rows, inputs), format))
        .word(rows)
        .optional(bias.as_deref())
        .word(act)
        .buffer(&vec![0f32; m * out_stride])
        .word(out_stride);
    let buffer = 2 + usize::from(bias.is_some());
    Expected {
        case,
        buffer,
        values,
        tolerance: 1e-5 * (1.0 + (inputs as f32).sqrt()),
    }
}

#[test]
fn small_products_are_the_cpus() {
    let mut random = Random::new(5);
    let mut all = Vec::new();
    for format in Dtype::ALL {
        for n in [1, 2, 4, 8, 16] {
            // Whole steps with tails, then shapes that no vector load fits.
            for (inputs, rows) in [(512, 68), (1600, 33), (64, 130), (20, 5), (67, 3)] {
                for m in [n / 2 + 1, n] {
                    all.push(product_case(
                        &mut random,
                        format,
                        Shape { m, n, inputs, rows },
                    ));
                }
            }
        }
    }
    check(all);
}

#[test]
fn tables_are_copied_to_their_last_word() {
    let words: Vec<u32> = (0..4 * 600).collect();
    for count in [1usize, 256, 599] {
        let case = Case::new("copy_table", (count.div_ceil(256), 1), 256)
            .buffer(&words)
            .buffer(&vec![0u32; words.len()])
            .word(count);
        for found in in_every_order(&[case]) {
            let (copied, rest) = found[0][1].split_at(16 * count);
            assert_eq!(copied, &found[0][0][..16 * count]);
            assert!(rest.iter().all(|&byte| byte == 0), "{count}");
        }
    }
}

#[test]
fn every_kernel_is_registered_and_documented() {
    let listed = std::process::Command::new(case::runner())
        .arg("--list")
        .output();
    let listed = String::from_utf8(listed.expect("the runner was built").stdout).expect("names");
    let readme = include_str!("../kernels/README.md");
    let family = |name: &str| {
        let parts: Vec<&str> = name.split('_').collect();
        let varying =
            |part: &str| part.parse::<u32>().is_ok() || Dtype::ALL.iter().any(|d| d.name() == part);
        let fixed: Vec<&str> = parts.into_iter().filter(|part| !varying(part)).collect();
        fixed.join("_")
    };
    for name in listed.lines() {
        assert!(
            readme.contains(&family(name)),
            "kernels/README.md does not know {name}"
        );
    }
    assert!(listed.lines().count() > 50);
}

/// Leaves out the barriers of a launch one by one: results or the emulation must tell each time.
fn barriers_are_needed(expected: Vec<Expected>, barriers: usize) {
    for e in &expected {
        for barrier in 0..barriers {
            let told = case::ORDERS.into_iter().any(|order| {
                let emulation = Emulation {
                    order,
                    dropped_barrier: Some(barrier),
                };
                match run(std::slice::from_ref(&e.case), emulation) {
                    Err(_) => true,
                    Ok(found) => {
                        !twins::is_close(&floats(&found[0][e.buffer]), &e.values, e.tolerance)
                    }
                }
            });
            assert!(told, "barrier {barrier} may be left out unnoticed");
        }
    }
}

#[test]
fn a_barrier_left_out_of_a_norm_is_noticed() {
    // After the warps' parts of either sum are written.
    barriers_are_needed(norm_cases(&[768]), 2);
}

#[test]
fn a_barrier_left_out_of_a_product_is_noticed() {
    let mut random = Random::new(6);
    let few = Shape {
        m: 4,
        n: 4,
        inputs: 1024,
        rows: 4,
    };
    barriers_are_needed(vec![product_case(&mut random, Dtype::F16, few)], 1);
    // Staging: before the first, nothing is overwritten.
    let many = Shape {
        m: 8,
        n: 8,
        inputs: 768,
        rows: 32,
    };
    let many = product_case(&mut random, Dtype::F16, many);
    let without = |barrier| {
        let told = case::ORDERS.into_iter().any(|order| {
            let emulation = Emulation {
                order,
                dropped_barrier: Some(barrier),
            };
            run(std::slice::from_ref(&many.case), emulation).map_or(true, |found| {
                !twins::is_close(
                    &floats(&found[0][many.buffer]),
                    &many.values,
                    many.tolerance,
                )
            })
        });
        assert!(told, "barrier {barrier} may be left out unnoticed");
    };
    (1..6).for_each(without);
}

#[test]
fn panels_of_rows_hold_what_panels_of_columns_do() {
    let twins = Twins::new();
    let mut random = Random::new(7);
    for format in Dtype::ALL {
        let (rows, inputs) = (70, 130);
        let panel = twins.pack(&random.values(rows * inputs, 1.0), (rows, inputs), format);
        let gpu = to_gpu_rows(&panel, (rows, inputs), format);
        assert_eq!(
            gpu.len() as u64,
            panels(rows) as u64 * format.panel_bytes(inputs)
        );
        assert_eq!(gpu.len() % PANEL_ROWS, 0);
    }
}
