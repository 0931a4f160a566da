//! Packing and products.

use crate::*;
use half::bf16;
use loadmaster::dtype::{Arithmetic, Compute, PANEL_ROWS, panels};
use loadmaster::machine::cpu::kernels::*;

/// A matrix packed, and what its elements are as stored.
struct Packed {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

fn pack(values: &[f32], (rows, inputs): (usize, usize), from: Dtype, format: Dtype) -> Packed {
    let source = encode(values, from);
    let size = panels(rows) * format.panel_bytes(inputs) as usize;
    let bytes = same_everywhere(|pool, isa| {
        let mut out = vec![0xaa; size];
        let source = PackSource {
            bytes: &source,
            dtype: from,
            rows,
            inputs,
        };
        pack_panels(pool, isa, source, format, &mut out);
        out
    });
    let mut all = vec![0.0; panels(rows) * PANEL_ROWS * inputs];
    for (panel, out) in bytes
        .chunks_exact(format.panel_bytes(inputs) as usize)
        .zip(all.chunks_exact_mut(PANEL_ROWS * inputs))
    {
        unpack_panel(format, panel, inputs, out);
    }
    assert!(
        all[rows * inputs..].iter().all(|&v| v == 0.0),
        "rows past the matrix are zero"
    );
    all.truncate(rows * inputs);
    Packed { bytes, values: all }
}

const SHAPES: [(usize, usize); 6] = [
    (1, 1),
    (64, 64),
    (70, 33),
    (130, 100),
    (200, 259),
    (65, 576),
];

#[test]
fn packing_keeps_every_element() {
    let mut random = Random(1);
    for shape in SHAPES {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let values = random.values(shape.0 * shape.1);
            let packed = pack(&values, shape, dtype, dtype);
            assert_eq!(
                bits(&packed.values),
                bits(&rounded(&values, dtype)),
                "{shape:?} {dtype:?}"
            );
        }
    }
}

#[test]
fn four_bits_are_within_half_a_step() {
    let mut random = Random(2);
    for shape in SHAPES {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let size = 10f32.powi(random.below(5) as i32 - 2);
            let values: Vec<f32> = random
                .values(shape.0 * shape.1)
                .iter()
                .map(|v| v * size)
                .collect();
            let packed = pack(&values, shape, dtype, Dtype::Q4);
            let values = rounded(&values, dtype);
            let rows = values.chunks(shape.1).zip(packed.values.chunks(shape.1));
            for (from, to) in rows.flat_map(|(a, b)| a.chunks(64).zip(b.chunks(64))) {
                let low = from.iter().fold(f32::MAX, |a, &b| a.min(b));
                let high = from.iter().fold(f32::MIN, |a, &b| a.max(b));
                // Half a step, and what rounding scale (15 of them) and minimum to fp16 adds.
                let bound = (high - low) / 30.0 * 1.001 + (high - low + low.abs()) / 2048.0 + 1e-6;
                for (a, b) in from.iter().zip(to) {
                    assert!((a - b).abs() <= bound, "{a} became {b}, bound {bound}");
                }
            }
        }
    }
}

#[test]
fn four_bits_survive_extremes() {
    let groups = [
        [3.25f32; 64],
        [0.0; 64],
        [1e-9; 64],
        [-7e4; 64],
        [f32::MAX; 64],
    ];
    let mut mixed = [0.5; 64];
    (mixed[3], mixed[7]) = (f32::MAX, f32::MIN);
    let mut tiny = [0.0; 64];
    tiny[5] = 1e-8;
    let values: Vec<f32> = groups
        .iter()
        .chain([&mixed, &tiny])
        .flatten()
        .copied()
        .collect();
    let packed = pack(&values, (1, values.len()), Dtype::F32, Dtype::Q4);
    assert!(packed.values.iter().all(|v| v.is_finite()));
    assert!(
        packed.values[..64].iter().all(|&v| v == 3.25),
        "equal values come back as they were"
    );
    assert!(packed.values[64..128].iter().all(|&v| v == 0.0));
}

struct Case {
    m: usize,
    shape: (usize, usize),
    format: Dtype,
    arithmetic: Arithmetic,
    bias: bool,
    activation: Activation,
}

/// What the arithmetic makes of one row of x.
fn as_multiplied(x: &[f32], arithmetic: Arithmetic) -> Vec<f32> {
    let rounded = |x: &f32| bf16::from_f32(*x).to_f32();
    match arithmetic {
        Arithmetic::Fp32 => x.to_vec(),
        Arithmetic::Bf16 => x.iter().map(rounded).collect(),
        Arithmetic::Int8 => {
            let in_group = |group: &[f32]| {
                let largest = group.iter().fold(0f32, |a, b| a.max(b.abs()));
                let code = |x: &f32| (x * (127.0 / largest)).round_ties_even();
                let codes: Vec<f32> = group.iter().map(code).collect();
                codes.into_iter().map(move |c| c * (largest / 127.0))
            };
            x.chunks(64).flat_map(in_group).collect()
        }
    }
}

fn product(case: &Case, random: &mut Random) {
    let ((rows, inputs), m) = (case.shape, case.m);
    let values = random.values(rows * inputs);
    let (ldx, ldo) = (inputs + random.below(5), rows + random.below(5));
    let (x, bias) = (random.values(m * ldx), random.values(rows));
    product_of(case, &values, (&x, ldx), (&bias, ldo));
}

/// On every instruction set the twin's bits, and near the sums in f64.
fn product_of(
    case: &Case,
    values: &[f32],
    (x, ldx): (&[f32], usize),
    (bias, ldo): (&[f32], usize),
) {
    let ((rows, inputs), m) = (case.shape, case.m);
    let from = if case.format == Dtype::Q4 {
        Dtype::F16
    } else {
        case.format
    };
    let packed = pack(values, case.shape, from, case.format);
    let [found, by_unit] = same_as_twins(|pool, isa| {
        let mut out = vec![7.0; m * ldo];
        let bias = case.bias.then_some(bias);
        let (format, activation) = (case.format, case.activation);
        let weights = &packed.bytes;
        gemm(
            pool,
            isa,
            GemmArgs {
                x,
                ldx,
                m,
                inputs,
                weights,
                format,
                arithmetic: case.arithmetic,
                rows,
                bias,
                activation,
                out: &mut out,
                ldo,
            },
        );
        bits(&out)
    });
    let weights = match case.arithmetic {
        Arithmetic::Bf16 => rounded(&packed.values, Dtype::Bf16),
        _ => packed.values,
    };
    if case.arithmetic != Arithmetic::Bf16 {
        assert_eq!(found, by_unit, "the unit's order of sums is for bf16 alone");
    }
    for found in [found, by_unit] {
        close_to_exact(case, (x, ldx), (&weights, bias), (&floats(&found), ldo));
    }
}

/// Against sums in f64.
fn close_to_exact(
    case: &Case,
    (x, ldx): (&[f32], usize),
    (weights, bias): (&[f32], &[f32]),
    (found, ldo): (&[f32], usize),
) {
    let (rows, inputs) = case.shape;
    for (i, line) in found.chunks(ldo).enumerate() {
        let x = as_multiplied(&x[i * ldx..][..inputs], case.arithmetic);
        assert!(
            line[rows..].iter().all(|&v| v == 7.0),
            "beyond the rows nothing is written"
        );
        for (n, &value) in line[..rows].iter().enumerate() {
            let products = (0..inputs).map(|k| x[k] as f64 * weights[n * inputs + k] as f64);
            let sum = products.clone().sum::<f64>() + if case.bias { bias[n] as f64 } else { 0.0 };
            if case.activation != Activation::Gelu {
                let exact = if case.activation == Activation::Relu {
                    sum.max(0.0)
                } else {
                    sum
                };
                let bound = 1e-6 * (1.0 + products.clone().map(f64::abs).sum::<f64>());
                assert!(
                    (value as f64 - exact).abs() < bound,
                    "[{i}, {n}] = {value}, not {exact}"
                );
            } else {
                assert!(value as f64 >= -0.17 && value as f64 <= sum.max(0.0) + 1e-4);
            }
        }
    }
}

/// Formats and ways to multiply them, each once.
fn every_way() -> impl Iterator<Item = (Dtype, Compute)> {
    let all = Dtype::ALL.map(|format| Compute::ALL.map(|compute| (format, compute)));
    let new = |&(format, compute): &(Dtype, Compute)| match compute {
        Compute::Exact => true,
        other => other.arithmetic(format) != Compute::Exact.arithmetic(format),
    };
    all.into_iter().flatten().filter(new)
}

#[test]
fn products_are_right_and_the_same_everywhere() {
    let mut random = Random(3);
    let activations = [Activation::None, Activation::Relu, Activation::Gelu];
    for (format, compute) in every_way() {
        let arithmetic = compute.arithmetic(format);
        for m in (1..=26).chain([70]) {
            let shape = SHAPES[1 + random.below(SHAPES.len() - 1)];
            let (bias, activation) = (random.below(2) == 0, activations[random.below(3)]);
            product(
                &Case {
                    m,
                    shape,
                    format,
                    arithmetic,
                    bias,
                    activation,
                },
                &mut random,
            );
        }
    }
}

/// All codes but one of a group are 15, all of x 127 or all -127: what is summed up in fewer bits must hold them.
#[test]
fn the_largest_codes_overflow_nothing() {
    let (rows, inputs) = (70, 320);
    let element = |i: usize| if i.is_multiple_of(64) { -1.0 } else { 1.0 };
    let values: Vec<f32> = (0..rows * inputs).map(element).collect();
    for m in [1, 2, 3, 4, 5, 7, 13, 64] {
        let sign = |i: usize| {
            if (i / inputs).is_multiple_of(2) {
                3.0
            } else {
                -3.0
            }
        };
        let x: Vec<f32> = (0..m * inputs).map(sign).collect();
        let case = Case {
            m,
            shape: (rows, inputs),
            format: Dtype::Q4,
            arithmetic: Arithmetic::Int8,
            bias: false,
            activation: Activation::None,
        };
        product_of(&case, &values, (&x, inputs), (&[], rows));
    }
}

#[test]
fn a_large_batch_crosses_every_block() {
    let mut random = Random(4);
    let (bias, activation) = (true, Activation::None);
    for (format, compute) in [
        (Dtype::F16, Compute::Exact),
        (Dtype::F16, Compute::Bf16),
        (Dtype::Q4, Compute::Exact),
        (Dtype::Q4, Compute::Bf16),
    ] {
        let case = Case {
            m: 250,
            shape: (330, 1300),
            format,
            arithmetic: compute.arithmetic(format),
            bias,
            activation,
        };
        product(&case, &mut random);
    }
}

#[test]
fn a_matrix_unit_takes_more_rows_and_inputs_than_fit_its_scratch() {
    let mut random = Random(6);
    let cases = [(530, (70, 560)), (40, (66, 7000)), (3, (64, 18000))];
    let formats = [
        (Dtype::Bf16, Compute::Bf16),
        (Dtype::F32, Compute::Bf16),
        (Dtype::Q4, Compute::Bf16),
    ];
    for ((m, shape), (format, compute)) in cases.into_iter().zip(formats) {
        let case = Case {
            m,
            shape,
            format,
            arithmetic: compute.arithmetic(format),
            bias: true,
            activation: Activation::Relu,
        };
        product(&case, &mut random);
    }
}

#[test]
fn neither_batch_nor_split_changes_a_row() {
    let mut random = Random(5);
    let (rows, inputs, m) = (200, 520, 70);
    for (format, compute) in every_way() {
        let arithmetic = compute.arithmetic(format);
        let from = if format == Dtype::Q4 {
            Dtype::F16
        } else {
            format
        };
        let packed = pack(&random.values(rows * inputs), (rows, inputs), from, format);
        let x = random.values(m * inputs);
        let pool = Pool::new(2);
        let run = |isa: Isa, from: usize, m: usize, panel: usize, rows: usize| {
            let mut out = vec![0.0; m * rows];
            let weights = &packed.bytes[panel * format.panel_bytes(inputs) as usize..];
            let (x, bias, activation) = (&x[from * inputs..], None, Activation::None);
            gemm(
                &pool,
                isa,
                GemmArgs {
                    x,
                    ldx: inputs,
                    m,
                    inputs,
                    weights,
                    format,
                    arithmetic,
                    rows,
                    bias,
                    activation,
                    out: &mut out,
                    ldo: rows,
                },
            );
            bits(&out)
        };
        for isa in Isa::available() {
            let whole = run(isa, 0, m, 0, rows);
            for (from, count) in (1..=26).map(|count| (count / 2, count)).chain([(40, 30)]) {
                let some = run(isa, from, count, 1, rows - 64);
                for (i, line) in some.chunks(rows - 64).enumerate() {
                    let expected = &whole[(from + i) * rows + 64..(from + i + 1) * rows];
                    assert_eq!(line, expected, "{} of {count}", isa.name());
                }
            }
        }
    }
}
