//! Placement must not change results on a GPU either: random policies give the host machine's tokens. Activations
//! stay in fp32 (`--compute fp32`), so that nothing but placement could tell the two apart.

use crate::stand_in::{Gpu, HOST};
use std::collections::HashMap;

const POLICIES: usize = 28;

/// splitmix64.
struct Random(u64);

impl Random {
    /// 0 to `end` - 1.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn switch(&mut self, name: &str) -> String {
        format!("--{name} {}", self.below(2))
    }

    /// Two percentages that sum to at most 100.
    fn shares(&mut self) -> (u64, u64) {
        let first = self.below(5);
        (25 * first, 25 * self.below(5 - first))
    }

    /// What changes results: formats of weights and cache.
    fn formats(&mut self) -> String {
        let weights = self.switch("compress-weight");
        let cache = ["--compress-cache 1", "--kv f16", "--kv f32"][self.below(3) as usize];
        format!("--compute fp32 {weights} {cache}")
    }

    /// What must not.
    fn placement(&mut self) -> String {
        let shares = [self.shares(), self.shares(), self.shares()];
        let percent = shares.map(|(gpu, cpu)| format!("{gpu} {cpu}")).join(" ");
        let shape = format!(
            "--gpu-batch-size {} --num-gpu-batches {}",
            1 + self.below(4),
            1 + self.below(3)
        );
        let switches = ["pin-weight", "overlap", "cpu-cache-compute"].map(|name| self.switch(name));
        let share = 50 * self.below(3);
        format!(
            "--percent {percent} {shape} {} --cpu-compute-share {share}",
            switches.join(" ")
        )
    }
}

#[test]
fn random_policies_give_the_hosts_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    let mut random = Random(3);
    let mut on_host: HashMap<String, Vec<String>> = HashMap::new();
    for round in 0..POLICIES {
        let formats = random.formats();
        let wanted = on_host.entry(formats.clone()).or_insert_with(|| {
            let plain = "--percent 100 0 100 0 100 0 --gpu-batch-size 5 --num-gpu-batches 1";
            gpu.tokens(HOST, &format!("{plain} {formats}"))
        });
        let words = format!("{} {formats}", random.placement());
        assert_eq!(&gpu.tokens("cuda:0", &words), wanted, "{round}: {words}");
    }
}
