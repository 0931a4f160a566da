//! Functions of one value in deterministic f32: the same bits on every machine and vector width.
//! Only +, *, fma, / and bit operations, so no libm's rounding gets in.

use super::simd::Simd;

/// Below this, e^x counts as its value here (1.6e-38, the last normal): softmax cannot tell it from 0.
const EXP_MIN: f32 = -87.0;
const EXP_MAX: f32 = 88.0;
/// Adding it leaves the nearest integer in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// e^r on |r| <= ln 2 / 2, after 1 + r: coefficients of r^2 upwards, highest first (Cephes).
const EXP: [f32; 6] = [
    1.987_569_1e-4,
    1.398_2e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    0.166_666_65,
    0.5,
];

/// e^x to 2 ulp on [-87, 88], clamped outside; not a number stays so.
#[inline(always)]
pub(super) fn exp<V: Simd>(x: V::F) -> V::F {
    let x = V::min(V::splat(EXP_MAX), V::max(V::splat(EXP_MIN), x));
    let power = V::fma(x, V::splat(std::f32::consts::LOG2_E), V::splat(ROUNDER));
    let whole = V::sub(power, V::splat(ROUNDER));
    let r = V::fma(whole, V::splat(-LN2_HIGH), x);
    let r = V::fma(whole, V::splat(-LN2_LOW), r);
    let tail = polynomial::<V, 6>(r, EXP);
    let mantissa = V::add(V::fma(V::mul(r, r), tail, r), V::splat(1.0));
    V::add_exponent(mantissa, power)
}

/// ln(erfc(z) e^(z^2) / t) in t = 1 / (1 + z / 2), highest power first (Numerical Recipes, erfcc).
const ERFC: [f32; 10] = [
    0.170_872_77,
    -0.822_152_2,
    1.488_515_9,
    -1.135_204,
    0.278_868_07,
    -0.186_288_06,
    0.096_784_18,
    0.374_091_96,
    1.000_023_7,
    -1.265_512_2,
];

/// x * Phi(x), the exact (erf) form: max(x, 0) - |x| erfc(|x| / sqrt 2) / 2.
#[inline(always)]
pub(super) fn gelu<V: Simd>(x: V::F) -> V::F {
    let zero = V::splat(0.0);
    let size = V::max(x, V::sub(zero, x));
    let z = V::mul(size, V::splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = V::div(V::splat(1.0), V::fma(z, V::splat(0.5), V::splat(1.0)));
    let log = V::fma(V::sub(zero, z), z, polynomial::<V, 10>(t, ERFC));
    let erfc = V::mul(t, exp::<V>(log));
    V::fma(V::mul(size, V::splat(-0.5)), erfc, V::max(zero, x))
}

/// Horner's rule, highest coefficient first.
#[inline(always)]
fn polynomial<V: Simd, const N: usize>(x: V::F, coefficients: [f32; N]) -> V::F {
    let mut sum = V::splat(coefficients[0]);
    for &next in &coefficients[1..] {
        sum = V::fma(sum, x, V::splat(next));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::simd::{Body, LANES, Scalar, lanes};
    use super::*;

    struct Both([f32; LANES]);
    impl Body for Both {
        type Out = ([f32; LANES], [f32; LANES]);
        #[inline(always)]
        fn run<V: Simd>(self) -> Self::Out {
            // SAFETY: sixteen lanes.
            let x = unsafe { V::load(self.0.as_ptr()) };
            (lanes::<V>(exp::<V>(x)), lanes::<V>(gelu::<V>(x)))
        }
    }

    fn sweep() -> impl Iterator<Item = [f32; LANES]> {
        (0..12_000).map(|i| std::array::from_fn(|j| (i as f32 - 6000.0) / 70.0 + j as f32 / 1234.5))
    }

    #[test]
    fn exp_is_within_two_ulp() {
        for x in sweep() {
            for (x, y) in x.into_iter().zip(exp::<Scalar>(x)) {
                if (EXP_MIN..EXP_MAX).contains(&x) {
                    let exact = (x as f64).exp();
                    let ulp = (exact as f32).next_up() as f64 - exact as f32 as f64;
                    assert!(
                        (y as f64 - exact).abs() <= 2.0 * ulp,
                        "exp({x}) = {y}, not {exact}"
                    );
                }
            }
        }
    }

    /// erf by its series, which converges everywhere in f64 up to |x| = 5.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn gelu_is_the_erf_form() {
        for x in sweep().filter(|x| x.iter().all(|x| x.abs() < 6.5)) {
            for (x, y) in x.into_iter().zip(gelu::<Scalar>(x)) {
                let exact = 0.5 * x as f64 * (1.0 + erf(x as f64 / 2f64.sqrt()));
                assert!(
                    (y as f64 - exact).abs() <= 3e-7 * (1.0 + exact.abs()),
                    "gelu({x}) = {y}"
                );
            }
        }
    }

    #[test]
    fn every_path_gives_the_twins_bits() {
        let odd = [
            0.0, -0.0, 1e-30, -1e-30, 100.0, -100.0, 89.0, -89.0, 1e30, -1e30, 3.3, -3.3, 1.0,
            -1.0, 0.5, 88.0,
        ];
        for isa in Isa::available() {
            for x in sweep().step_by(97).chain([odd]) {
                let (e, g) = isa.call(Both(x));
                let (e0, g0) = Isa::SCALAR.call(Both(x));
                assert_eq!(
                    e.map(f32::to_bits),
                    e0.map(f32::to_bits),
                    "{} exp {x:?}",
                    isa.name()
                );
                assert_eq!(
                    g.map(f32::to_bits),
                    g0.map(f32::to_bits),
                    "{} gelu {x:?}",
                    isa.name()
                );
            }
        }
    }
}
