//! From logits to a token: greedy, temperature, top-k, top-p. Random numbers are keyed by (seed, line,
//! position), so that a line's text depends on nothing else.

/// How one line's tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the k likeliest; 0 = all.
    pub top_k: usize,
    /// Keep the likeliest whose probabilities sum to this; 1 = all.
    pub top_p: f32,
    pub seed: u64,
}

impl Sampling {
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
    };
}

/// What identifies a draw beside the seed.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    pub line: u64,
    pub position: u64,
}

/// The next token. Ties go to the smaller id; NaN logits are never chosen.
pub fn sample(logits: &[f32], sampling: &Sampling, draw: Draw) -> u32 {
    if sampling.temperature <= 0.0 {
        return argmax(logits);
    }
    let candidates = likeliest(logits, sampling);
    let total: f64 = candidates.iter().map(|(_, p)| p).sum();
    let mut left = unit_random(sampling.seed, draw) * total;
    for (id, p) in &candidates {
        left -= p;
        if left < 0.0 {
            return *id;
        }
    }
    candidates.last().map_or(0, |(id, _)| *id)
}

/// The largest first, in lanes that a compiler makes vectors of, then the first place where it stands.
fn argmax(logits: &[f32]) -> u32 {
    let mut lanes = [f32::NEG_INFINITY; 32];
    let (chunks, rest) = logits.as_chunks::<32>();
    for chunk in chunks {
        for (most, &logit) in lanes.iter_mut().zip(chunk) {
            // A NaN compares false and leaves what was there.
            *most = if logit > *most { logit } else { *most };
        }
    }
    let most = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&l| l == most).unwrap_or(0) as u32
}

/// Candidates with unnormalised probabilities, likeliest first, cut by top-k and then top-p.
fn likeliest(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
    let finite = logits.iter().enumerate().filter(|(_, l)| !l.is_nan());
    let mut order: Vec<(u32, f32)> = finite.map(|(id, &l)| (id as u32, l)).collect();
    let by_logit = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        order.select_nth_unstable_by(sampling.top_k - 1, by_logit);
        order.truncate(sampling.top_k);
    }
    order.sort_unstable_by(by_logit);
    let top = order.first().map_or(0.0, |o| o.1);
    let weight = |l: f32| (((l - top) / sampling.temperature) as f64).exp();
    let mut weighted: Vec<(u32, f64)> = order.into_iter().map(|(id, l)| (id, weight(l))).collect();
    let total: f64 = weighted.iter().map(|(_, p)| p).sum();
    let mut seen = 0.0;
    let kept = weighted.iter().take_while(|(_, p)| {
        let keep = seen < sampling.top_p as f64 * total;
        seen += p;
        keep
    });
    let kept = kept.count().max(1);
    weighted.truncate(kept);
    weighted
}

/// A number in [0, 1) from a counter (splitmix64 over seed, line and position).
pub fn unit_random(seed: u64, draw: Draw) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(mix(seed) ^ draw.line) ^ draw.position);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw = Draw {
        line: 3,
        position: 9,
    };

    #[test]
    fn greedy_takes_the_first_largest() {
        assert_eq!(
            sample(&[0.0, 2.0, f32::NAN, 2.0], &Sampling::GREEDY, DRAW),
            1
        );
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0, 3.0, 2.9, -1.0, 1.0];
        let sampling = Sampling {
            temperature: 1.0,
            top_k: 2,
            top_p: 1.0,
            seed: 7,
        };
        for position in 0..200 {
            let id = sample(&logits, &sampling, Draw { line: 0, position });
            assert!(id == 1 || id == 2);
            let nucleus = Sampling {
                top_k: 0,
                top_p: 0.4,
                ..sampling
            };
            assert_eq!(sample(&logits, &nucleus, Draw { line: 0, position }), 1);
        }
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.0f32, (3.0f32).ln()];
        let sampling = Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 1,
        };
        let draws = 20_000;
        let ones = (0..draws)
            .filter(|&position| sample(&logits, &sampling, Draw { line: 5, position }) == 1)
            .count();
        assert!((ones as f64 / draws as f64 - 0.75).abs() < 0.01, "{ones}");
        let other = Sampling {
            seed: 2,
            ..sampling
        };
        let differ = |p| {
            sample(
                &logits,
                &sampling,
                Draw {
                    line: 5,
                    position: p,
                },
            ) != sample(
                &logits,
                &other,
                Draw {
                    line: 5,
                    position: p,
                },
            )
        };
        assert!((0..100).any(differ));
    }
}
