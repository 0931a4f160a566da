//! Heads of 64 and 128 values, as OPT's sizes from 1.3b on have them: no golden checkpoint has any. Attention is
//! made to count for as much as the rest, so that tokens tell.

use crate::running::small_model;
use crate::stand_in::{self, Gpu, HOST};
use loadmaster::checkpoint::{SynthJob, write_synth};
use loadmaster::dtype::Dtype;
use loadmaster::model::ModelSpec;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

const SPLIT: &str =
    "--percent 30 30 40 30 50 50 --gpu-batch-size 2 --num-gpu-batches 2 --ignore-eos";
/// Of one part of attention, of several tiles of a prompt, and of two parts.
const PROMPTS: [usize; 4] = [1, 20, 70, 254];
const TOKENS: usize = 4;

/// A checkpoint whose heads are so large.
fn checkpoint(gpu: &Gpu, head_size: usize, dtype: Dtype) -> PathBuf {
    let dir = gpu
        .home
        .path(&format!("heads-{head_size}-{}", dtype.name()));
    let spec = ModelSpec {
        layers: 2,
        hidden: 256,
        embed_width: 256,
        heads: 256 / head_size,
        ffn: 320,
        positions: 300,
        ..small_model(dtype)
    };
    let job = SynthJob {
        spec,
        seed: 5,
        dir: &dir,
        shard_bytes: 1 << 30,
        progress: &mut |_, _| {},
        stop: &AtomicBool::new(false),
    };
    write_synth(job).expect("written");
    strengthen(&dir.join("model.safetensors"), dtype);
    dir
}

/// What leaves attention, times 16: random weights have little of it.
fn strengthen(path: &Path, dtype: Dtype) {
    let mut file = std::fs::read(path).expect("a file of tensors");
    let header_bytes = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = file[8..].split_at_mut(header_bytes);
    let header: serde_json::Value = serde_json::from_slice(header).expect("its header");
    let mut found = 0;
    for (_, tensor) in (header.as_object().expect("tensors").iter())
        .filter(|(name, _)| name.ends_with("out_proj.weight"))
    {
        let at = |i: usize| tensor["data_offsets"][i].as_u64().expect("a place") as usize;
        // The exponent is in the topmost two bytes of either format; normal numbers stay so.
        let (width, by) = match dtype {
            Dtype::F32 => (4, 4 << 7),
            _ => (2, 4 << 10),
        };
        for value in data[at(0)..at(1)].chunks_exact_mut(width) {
            let top: &mut [u8] = &mut value[width - 2..];
            let bits = u16::from_le_bytes([top[0], top[1]]);
            if bits & 0x7c00 != 0 {
                top.copy_from_slice(&(bits + by).to_le_bytes());
            }
        }
        found += 1;
    }
    assert_eq!(found, 2);
    std::fs::write(path, file).expect("written");
}

fn lines() -> String {
    let line = |&count: &usize| {
        let prompt: Vec<usize> = (0..count).map(|at| 4 + (31 * at + count) % 380).collect();
        format!("{{\"prompt\": {prompt:?}, \"max_tokens\": {TOKENS}}}\n")
    };
    PROMPTS.iter().map(line).collect()
}

/// Tokens on both machines, and whether the GPU launched each of these kernels.
fn both(gpu: &Gpu, model: &Path, (words, kernels): (&str, &[&str])) -> [Vec<String>; 2] {
    let words = format!("--model {} {SPLIT} {words}", model.display());
    let run = |gpu: &Gpu, device| {
        let ended = gpu.run_lines(&lines(), device, &words).good();
        stand_in::tokens(&ended)
    };
    let on_host = run(gpu, HOST);
    let log = gpu.home.path("log.txt").display().to_string();
    let on_gpu = run(&gpu.with(&[("FAKE_CUDA_LOG", &log)]), "cuda:0");
    let log = gpu.home.read("log.txt");
    for kernel in kernels {
        assert!(log.contains(&format!("launch {kernel} ")), "{words}: {log}");
    }
    [on_gpu, on_host]
}

#[test]
fn heads_of_64_and_128_give_the_hosts_tokens() {
    let Some(gpu) = Gpu::new() else { return };
    for head_size in [64, 128] {
        let model = checkpoint(&gpu, head_size, Dtype::F16);
        for (words, kernels) in [
            ("--kv f32", ["attend_prefill_f32", "attend_decode_f32"]),
            ("--kv f16", ["attend_prefill_f16", "attend_decode_f16"]),
            (
                "--compress-cache 1",
                ["attend_prefill_q4", "attend_decode_q4"],
            ),
        ] {
            let words = format!("{words} --compute fp32");
            let [ours, hosts] = both(&gpu, &model, (&words, &kernels));
            assert_eq!(ours, hosts, "{head_size} {words}");
        }
        let model = checkpoint(&gpu, head_size, Dtype::F32);
        let kernels = ["attend_prefill_f32", "attend_decode_f32"];
        let [ours, hosts] = both(&gpu, &model, ("", &kernels));
        assert_eq!(ours, hosts, "{head_size} fp32");
    }
}

/// Prompts' attention in fp16: one line of the four may differ from some token on.
#[test]
fn heads_of_64_and_128_on_tensor_cores_give_tokens_like_the_hosts() {
    let Some(gpu) = Gpu::new() else { return };
    for head_size in [64, 128] {
        let model = checkpoint(&gpu, head_size, Dtype::F16);
        for (words, format) in [("--kv f16", "f16"), ("--compress-cache 1", "q4")] {
            let kernel = format!("attend_prefill_mma_{format}_{head_size}");
            let [ours, hosts] = both(&gpu, &model, (words, &[&kernel]));
            let same = ours.iter().zip(&hosts).filter(|(a, b)| a == b).count();
            println!("{head_size} {words}: {same} of {}", hosts.len());
            assert!(same + 1 >= hosts.len(), "{words}: {ours:?} {hosts:?}");
        }
    }
}
