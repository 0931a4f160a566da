//! When the start of an operation takes time of its own: asked by the closed form and by the pricer of single
//! operations alike. How long it takes is rates.rs's.

use crate::cost::rates::Rates;
use crate::tier::Tier;

impl Rates {
    /// Seconds of `count` equal operations that work for `seconds` in all. A real GPU is handed the next one while it
    /// works, and waits for that only where it takes longer; elsewhere who computes starts each by itself.
    pub fn operations_s(&self, on: Tier, count: f64, seconds: f64) -> f64 {
        match self.is_gpu(on) {
            true => seconds.max(count * self.launch_s(on)),
            false => seconds + self.apart_s(on, count),
        }
    }

    /// The part of that which comes on top of any work.
    pub fn apart_s(&self, on: Tier, count: f64) -> f64 {
        match self.is_gpu(on) {
            true => 0.0,
            false => count * self.launch_s(on),
        }
    }
}
