//! The best command line of FlexLLMGen that fits a budget, among all placements that its rounding can
//! tell apart. What a command line takes and holds is flexllmgen.rs.

use crate::planner::flexllmgen::{Flags, Setup};
use crate::planner::parallel::in_parallel;
use crate::tier::PerTier;

/// Shares of weights at which its placement changes, in the middle of each stretch: percentages that
/// realise every placement there is.
const WEIGHT_STEPS: [f64; 8] = [0.0, 19.0, 31.0, 44.0, 56.0, 69.0, 81.0, 100.0];
const SIZES: [usize; 16] = [
    1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384,
];
const COUNTS: [usize; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 24];

/// Its fastest command line that fits the budget, by `Setup::throughput`; None where nothing fits.
pub fn best_flags(setup: &Setup, budget: &PerTier<u64>, most: usize) -> Option<Flags> {
    let all: Vec<Flags> = every(&setup.flags)
        .into_iter()
        .filter(|f| f.sequences() <= most)
        .collect();
    let priced = in_parallel(&all, |&flags| {
        let tried = Setup { flags, ..*setup };
        tried.fits(budget).then(|| (tried.throughput(), flags))
    });
    let best = priced
        .into_iter()
        .reduce(|best, next| if next.0 > best.0 { next } else { best });
    best.map(|(_, flags)| flags)
}

/// Every placement that its rounding can tell apart, for the formats given. It keeps the cache whole, has
/// no activations on disk, and attends on the CPU only to an uncompressed cache.
fn every(formats: &Flags) -> Vec<Flags> {
    let mut all = Vec::new();
    for gpu in WEIGHT_STEPS {
        for cpu in WEIGHT_STEPS
            .into_iter()
            .filter(|cpu| gpu + cpu <= 100.0)
            .chain([100.0 - gpu])
        {
            for (cache, hidden) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] {
                let pair = |at: usize| [[100.0, 0.0], [0.0, 100.0], [0.0, 0.0]][at];
                let ([cg, cc], [hg, hc]) = (pair(cache), pair(hidden));
                let by_cpu = [false, true];
                let attends = |on_cpu: &bool| !on_cpu || (cache > 0 && !formats.compress_cache);
                for cpu_cache_compute in by_cpu.into_iter().filter(attends) {
                    let percent = [gpu, cpu, cg, cc, hg, hc];
                    all.extend(SIZES.into_iter().flat_map(|gpu_batch_size| {
                        COUNTS.into_iter().map(move |num_gpu_batches| Flags {
                            percent,
                            gpu_batch_size,
                            num_gpu_batches,
                            cpu_cache_compute,
                            ..*formats
                        })
                    }));
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::rates::Rates;
    use crate::model::families::named_size;
    use crate::planner::flexllmgen::Lengths;
    use crate::policy::DeviceKind;
    use crate::profile::{HardwareProfile, compiled_in};
    use crate::units::GIB;

    #[test]
    fn an_emitted_command_fits_and_nothing_that_fits_is_faster() {
        let profile = HardwareProfile::from_toml(compiled_in("t4-gcp").unwrap()).unwrap();
        let rates = Rates::new(&profile, DeviceKind::Cuda, 16).unwrap();
        let model = named_size("opt-30b").unwrap();
        let setup = Setup {
            model: &model,
            rates: &rates,
            flags: Flags {
                percent: [0.0; 6],
                gpu_batch_size: 1,
                num_gpu_batches: 1,
                pin_weight: true,
                compress_weight: false,
                compress_cache: false,
                cpu_cache_compute: false,
            },
            lengths: Lengths {
                prompt: 512,
                generated: 32,
                projected: false,
            },
        };
        let budget = PerTier {
            gpu: 14 * GIB,
            cpu: 180 * GIB,
            disk: 500 * GIB,
        };
        let best = best_flags(&setup, &budget, 1024).unwrap();
        let chosen = Setup {
            flags: best,
            ..setup
        };
        assert!(chosen.fits(&budget));
        for other in every(&setup.flags).into_iter().step_by(37) {
            let other = Setup {
                flags: other,
                ..setup
            };
            assert!(
                !other.fits(&budget)
                    || other.flags.sequences() > 1024
                    || other.throughput() <= chosen.throughput()
            );
        }
        assert!(
            best_flags(
                &setup,
                &PerTier {
                    gpu: GIB,
                    cpu: GIB,
                    disk: GIB
                },
                1024
            )
            .is_none()
        );
        assert!(chosen.command().contains("--percent"));
    }
}
