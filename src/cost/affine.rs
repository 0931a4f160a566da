//! Affine functions of the eleven shares, and the order of the shares in them. Arithmetic only: what
//! the terms mean is terms.rs.

use crate::policy::{Shares, WeightShares};
use crate::tier::{PerTier, Tier};

/// Weights 0..5 in `WeightHome::ALL` order, cache 5..8 and activations 8..11 in `Tier::ALL` order.
pub const SHARES: usize = 11;
pub const CACHE: usize = 5;
pub const HIDDEN: usize = 8;
/// The three groups that each sum to one.
pub const GROUPS: [std::ops::Range<usize>; 3] = [0..CACHE, CACHE..HIDDEN, HIDDEN..SHARES];

pub type ShareVector = [f64; SHARES];

/// constant + Σ coef · share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Affine {
    pub constant: f64,
    pub coef: ShareVector,
}

impl Affine {
    pub fn at(&self, shares: &ShareVector) -> f64 {
        let terms = self.coef.iter().zip(shares).map(|(c, s)| c * s);
        self.constant + terms.sum::<f64>()
    }

    pub fn add(&mut self, other: &Affine) {
        self.add_scaled(other, 1.0);
    }

    pub fn add_scaled(&mut self, other: &Affine, factor: f64) {
        self.constant += factor * other.constant;
        for (mine, theirs) in self.coef.iter_mut().zip(other.coef) {
            *mine += factor * theirs;
        }
    }

    pub fn scaled(&self, factor: f64) -> Affine {
        let mut scaled = Affine::default();
        scaled.add_scaled(self, factor);
        scaled
    }

    pub fn plus(mut self, other: &Affine) -> Affine {
        self.add(other);
        self
    }

    pub fn minus(&self, other: &Affine) -> Affine {
        let mut less = *self;
        less.add_scaled(other, -1.0);
        less
    }

    pub fn is_zero(&self) -> bool {
        self.constant == 0.0 && self.coef.iter().all(|&c| c == 0.0)
    }

    /// True where `self` is nowhere above `other`: shares are never negative.
    pub fn is_below(&self, other: &Affine) -> bool {
        let terms = self.coef.iter().zip(&other.coef);
        self.constant <= other.constant && terms.into_iter().all(|(a, b)| a <= b)
    }
}

/// The shares in their order.
pub fn share_vector(shares: &Shares) -> ShareVector {
    let (w, c, h) = (
        shares.weights.as_array(),
        &shares.cache,
        &shares.activations,
    );
    let mut vector = [0.0; SHARES];
    vector[..CACHE].copy_from_slice(&w);
    for tier in Tier::ALL {
        vector[CACHE + tier as usize] = c[tier];
        vector[HIDDEN + tier as usize] = h[tier];
    }
    vector
}

/// Shares from their order.
pub fn shares_from(vector: &ShareVector) -> Shares {
    let tiers = |at: usize| PerTier {
        gpu: vector[at],
        cpu: vector[at + 1],
        disk: vector[at + 2],
    };
    let w = [vector[0], vector[1], vector[2], vector[3], vector[4]];
    Shares {
        weights: WeightShares::from_array(w),
        cache: tiers(CACHE),
        activations: tiers(HIDDEN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_keep_their_order() {
        let shares = Shares::from_percent([10.0, 20.0, 30.0, 40.0, 50.0, 25.0], 0.5).unwrap();
        let vector = share_vector(&shares);
        assert_eq!(shares_from(&vector), shares);
        for group in GROUPS {
            assert!((vector[group].iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        let mut disk = Affine {
            constant: 1.0,
            ..Affine::default()
        };
        disk.coef[HIDDEN + 2] = 4.0;
        assert!((disk.at(&vector) - 2.0).abs() < 1e-12);
        assert!(disk.is_below(&disk.scaled(2.0)) && !disk.scaled(2.0).is_below(&disk));
    }
}
