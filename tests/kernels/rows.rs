//! Norms, gathers, additions and the bandwidth loops.

use crate::*;
use loadmaster::dtype::Arithmetic;
use loadmaster::machine::cpu::kernels::*;

fn norm_reference(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = x.iter().map(|&v| v as f64).sum::<f64>() / n;
    let variance = x.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (variance + 1e-5).sqrt();
    let line = x.iter().enumerate().map(|(i, &v)| {
        let weight = weight.map_or(1.0, |w| w[i] as f64);
        (v as f64 - mean) * scale * weight + bias.map_or(0.0, |b| b[i] as f64)
    });
    line.collect()
}

type Affine<'a> = (Option<&'a [f32]>, Option<&'a [f32]>);

/// Both results of every named row against the reference.
fn check_norms(
    x: &[f32],
    rows: &[u32],
    (found, in_place): (&[u32], &[u32]),
    (weight, bias): Affine,
) {
    let width = found.len() / rows.len();
    for (i, &row) in rows.iter().enumerate() {
        let from = row as usize * width;
        let line = &found[i * width..(i + 1) * width];
        assert_eq!(line, &in_place[from..from + width], "in place differs");
        let exact = norm_reference(&x[from..from + width], weight, bias);
        for (value, exact) in floats(line).iter().zip(exact) {
            assert!(
                (*value as f64 - exact).abs() <= 2e-6 * exact.abs().max(1.0),
                "{value} not {exact}"
            );
        }
    }
}

#[test]
fn norms_are_exact_and_the_same_everywhere() {
    let mut random = Random(11);
    for width in [1, 5, 16, 63, 64, 100, 768, 4100] {
        let (m, total) = (7, 12);
        let x: Vec<f32> = random
            .values(total * width)
            .iter()
            .map(|v| v * 3.0 + 1.0)
            .collect();
        let (w, b) = (random.values(width), random.values(width));
        for (weight, bias) in [
            (Some(&w[..]), Some(&b[..])),
            (None, Some(&b)),
            (Some(&w), None),
            (None, None),
        ] {
            let rows = [3u32, 0, 11, 5, 4, 1, 10];
            let found = same_everywhere(|pool, isa| {
                let mut out = vec![0.0; m * width];
                layer_norm(
                    pool,
                    isa,
                    NormArgs {
                        x: &x,
                        rows: Some(&rows),
                        m,
                        width,
                        weight,
                        bias,
                        eps: 1e-5,
                        out: &mut out,
                    },
                );
                bits(&out)
            });
            let in_place = same_everywhere(|pool, isa| {
                let mut x = x.clone();
                layer_norm_in_place(
                    pool,
                    isa,
                    NormInPlace {
                        x: &mut x,
                        rows: Some(&rows),
                        m,
                        width,
                        weight,
                        bias,
                        eps: 1e-5,
                    },
                );
                bits(&x)
            });
            check_norms(&x, &rows, (&found, &in_place), (weight, bias));
            assert_eq!(
                in_place[2 * width..3 * width],
                bits(&x[2 * width..3 * width]),
                "row 2 was not named"
            );
        }
    }
}

#[test]
fn embeddings_and_positions() {
    let mut random = Random(12);
    for format in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (vocabulary, width, ldo) = (150, 90, 100);
        let values = random.values(vocabulary * width);
        let source = encode(&values, format);
        let mut table = vec![0; 3 * format.panel_bytes(width) as usize];
        let from = PackSource {
            bytes: &source,
            dtype: format,
            rows: vocabulary,
            inputs: width,
        };
        pack_panels(&Pool::new(1), Isa::SCALAR, from, format, &mut table);
        let (ids, out_rows) = ([0u32, 149, 64, 63, 7], [4u32, 0, 3, 2, 6]);
        let stored = rounded(&values, format);
        let found = same_everywhere(|pool, _| {
            let mut out = vec![0.0; 7 * ldo];
            embed_rows(
                pool,
                EmbedArgs {
                    table: &table,
                    format,
                    width,
                    ids: &ids,
                    out: &mut out,
                    ldo,
                    out_rows: &out_rows,
                },
            );
            bits(&out)
        });
        for (&id, &row) in ids.iter().zip(&out_rows) {
            let line = &found[row as usize * ldo..][..width];
            assert_eq!(line, bits(&stored[id as usize * width..][..width]));
        }
        let x = random.values(7 * width);
        let sums = same_everywhere(|pool, _| {
            let mut x = x.clone();
            add_rows_typed(
                pool,
                &mut x,
                &out_rows,
                Table {
                    bytes: &source,
                    format,
                    width,
                },
                &ids,
            );
            bits(&x)
        });
        for (i, &sum) in sums.iter().enumerate() {
            let index = out_rows.iter().position(|&row| row as usize == i / width);
            let added = index.map_or(x[i], |j| x[i] + stored[ids[j] as usize * width + i % width]);
            assert_eq!(sum, added.to_bits());
        }
    }
}

#[test]
fn gathers_and_residuals() {
    let mut random = Random(13);
    let width = 5000;
    let (x, y) = (random.values(9 * width), random.values(4 * width));
    let rows = [8u32, 1, 5, 0];
    let copied = same_everywhere(|pool, _| {
        let mut out = vec![0.0; 4 * width];
        copy_rows(pool, &x, &rows, width, &mut out);
        bits(&out)
    });
    let added = same_everywhere(|pool, _| {
        let mut x = x.clone();
        add_rows(pool, &mut x, Some(&rows), &y, width);
        bits(&x)
    });
    for (i, &row) in rows.iter().enumerate() {
        for c in 0..width {
            let at = row as usize * width + c;
            assert_eq!(copied[i * width + c], x[at].to_bits());
            assert_eq!(added[at], (x[at] + y[i * width + c]).to_bits());
        }
    }
    assert_eq!(added[2 * width], x[2 * width].to_bits());
}

#[test]
#[should_panic(expected = "names a row twice")]
fn a_row_named_twice_is_refused() {
    add_rows(&Pool::new(2), &mut [0.0; 20], Some(&[1, 1]), &[0.0; 20], 10);
}

#[test]
fn bandwidth_loops_touch_everything() {
    let mut random = Random(14);
    let bytes: Vec<u8> = (0..(3 << 20) + 256).map(|_| random.word() as u8).collect();
    let words = bytes
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(std::array::from_fn(|i| w[i])));
    let expected = words.fold(0, u64::wrapping_add);
    assert_eq!(
        same_everywhere(|pool, isa| vec![memory_read_sum(pool, isa, &bytes)]),
        [expected]
    );
    let copied = same_everywhere(|pool, _| {
        let mut to = vec![0; bytes.len()];
        copy_bytes(pool, &bytes, &mut to);
        to
    });
    assert_eq!(copied, bytes);
    for isa in Isa::available() {
        for arithmetic in [Arithmetic::Fp32, Arithmetic::Bf16, Arithmetic::Int8] {
            let done = multiply_peak(&Pool::new(2), isa, arithmetic, 1000);
            assert!(done >= 2.0 * 2.0 * 16.0 * 1000.0);
        }
    }
}
