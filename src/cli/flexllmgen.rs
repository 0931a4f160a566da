//! `flexllmgen`: its published results against its runtime priced on a profile, and what loadmaster would
//! do there; and `plan --emit flexllmgen`. The knowledge itself is planner/flexllmgen.rs.

use super::failure::Failure;
use super::settle::named_profile;
use super::solve::{ScheduleRepricer, Solved};
use crate::cost::footprint::HostBytes;
use crate::cost::rates::Rates;
use crate::dtype::Dtype;
use crate::model::families::named_size;
use crate::plan::PlanBudget;
use crate::planner::changes::Changes;
use crate::planner::flexllmgen::{Flags, Lengths, Setup};
use crate::planner::flexllmgen_rows::{GENERATED, Published, published};
use crate::planner::flexllmgen_search::best_flags;
use crate::planner::{CompressMode, Fixed, Job, PlanRequest, plan, speed};
use crate::policy::{DeviceKind, show_percent};
use crate::profile::HardwareProfile;
use crate::tier::PerTier;
use crate::units::{GIB, MIB};
use comfy_table::{CellAlignment, Table, presets};
use std::path::Path;

/// One row of the table.
struct Compared {
    row: Published,
    realised: PerTier<f64>,
    ours: f64,
    its_own: Option<f64>,
    plan: Option<f64>,
}

/// The table and its errors.
pub fn table(profile: &str, offload_dir: &Path) -> Result<String, Failure> {
    let profile = named_profile(profile, offload_dir)?;
    let threads = profile.machine.threads;
    let rates = Rates::new(&profile, DeviceKind::Cuda, threads).map_err(Failure::failed)?;
    let rows: Result<Vec<Compared>, Failure> = published()
        .map(|row| compared(row, &rates, &profile))
        .collect();
    Ok(show(&rows?, &profile.machine.name))
}

fn compared(row: Published, rates: &Rates, profile: &HardwareProfile) -> Result<Compared, Failure> {
    let unknown = || Failure::failed(format!("{} is not a known size", row.size));
    let model = named_size(row.size).ok_or_else(unknown)?;
    let setup = Setup {
        model: &model,
        rates,
        flags: row.flags(),
        lengths: row.lengths(),
    };
    let budget = PlanBudget {
        gpu_bytes: profile
            .gpu
            .as_ref()
            .map(|g| g.total_bytes.saturating_sub(512 * MIB)),
        cpu_bytes: profile.memory.cpu_total_bytes * 9 / 10,
        disk_bytes: 1500 * GIB,
    };
    let request = PlanRequest {
        model: &model,
        fingerprint: None,
        job: Job::BestBlock {
            prompt_tokens: row.prompt as u32,
            gen_tokens: GENERATED as u32,
        },
        device: DeviceKind::Cuda,
        device_name: "cuda:0",
        profile,
        calibrated: true,
        explain: false,
        changes: &Changes::default(),
        budget,
        fixed: Fixed::default(),
        compress: match (row.compress_weight, row.compress_cache) {
            (false, false) => CompressMode::Never,
            (false, true) => CompressMode::Cache,
            _ => CompressMode::Both,
        },
        kv: Dtype::F16,
        threads: profile.machine.threads,
        host: HostBytes {
            process_bytes: 512 * MIB,
            gpu_context_bytes: profile.gpu.as_ref().map_or(0, |g| g.context_bytes),
            unpacked: false,
        },
        stored_bytes: [0, 0],
        repricer: Some(&ScheduleRepricer),
    };
    let made = plan(&request).map_err(Failure::failed)?;
    Ok(Compared {
        row,
        realised: setup.realised_percent(),
        ours: setup.throughput(),
        its_own: row.its_model(&model),
        plan: made.estimate.as_ref().map(speed),
    })
}

fn off_percent(predicted: f64, measured: f64) -> f64 {
    100.0 * (predicted / measured - 1.0)
}

fn show(rows: &[Compared], profile: &str) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "model",
        "prompt",
        "format",
        "batches",
        "percent asked",
        "weights realised",
        "published",
        "priced here",
        "error",
        "its own model",
        "error",
        "loadmaster's plan",
    ]);
    for c in rows {
        let r = &c.row;
        let error =
            |predicted: f64| format!("{:+.1} %", off_percent(predicted, r.throughput_tok_s));
        let dash = || "-".to_owned();
        table.add_row([
            r.size.to_owned(),
            r.prompt.to_string(),
            r.format().to_owned(),
            format!("{}x{}", r.gpu_batch_size, r.num_gpu_batches),
            show_percent(r.percent),
            format!(
                "{:.1} {:.1} {:.1}",
                c.realised.gpu, c.realised.cpu, c.realised.disk
            ),
            format!("{:.2}", r.throughput_tok_s),
            format!("{:.2}", c.ours),
            error(c.ours),
            c.its_own.map_or_else(dash, |t| format!("{t:.2}")),
            c.its_own.map_or_else(dash, error),
            c.plan
                .map_or_else(|| "nothing fits".to_owned(), |t| format!("{t:.2}")),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let ours = rows
        .iter()
        .map(|c| off_percent(c.ours, c.row.throughput_tok_s));
    let lossless = rows.iter().filter_map(|c| Some((c, c.its_own?)));
    let its = lossless
        .clone()
        .map(|(c, own)| off_percent(own, c.row.throughput_tok_s));
    let same = lossless.map(|(c, _)| off_percent(c.ours, c.row.throughput_tok_s));
    format!(
        "FlexLLMGen on one T4, tok/s at {GENERATED} generated tokens; its runtime priced on profile {profile}, nothing fitted to these rows\n{}\npriced here, all rows:  {}\npriced here, fp16 rows: {}\nits own model, fp16 rows (constants fitted to that machine): {}\nloadmaster's plan: its own block, cache and activations placed freely on 1500 GiB of disk, same format; predicted, not run\n",
        table.trim_fmt(),
        summary(ours.collect()),
        summary(same.collect()),
        summary(its.collect()),
    )
}

/// "mean 12.0 %, median 10.1 %, worst 30.2 %" of absolute errors.
fn summary(errors: Vec<f64>) -> String {
    let mut sizes: Vec<f64> = errors.into_iter().map(f64::abs).collect();
    sizes.sort_by(f64::total_cmp);
    let count = sizes.len().max(1);
    let mean = sizes.iter().sum::<f64>() / count as f64;
    let at = |index: usize| sizes.get(index).copied().unwrap_or(0.0);
    format!(
        "mean {mean:.1} %, median {:.1} %, worst {:.1} %",
        at(count / 2),
        at(count - 1)
    )
}

/// A command line of FlexLLMGen that fits the plan's budget, in the plan's formats.
pub fn emit(solved: &Solved) -> Result<String, Failure> {
    let refuse = |why: &str| Failure::usage(format!("--emit flexllmgen: {why}"));
    let (plan, target) = (&solved.plan, &solved.target);
    if target.device != DeviceKind::Cuda {
        return Err(refuse("FlexLLMGen needs a GPU, and none takes part here"));
    }
    let spec = &solved.model.spec;
    if !spec.pre_norm || spec.embed_width != spec.hidden {
        return Err(refuse(
            "FlexLLMGen does not have this architecture (norms after the sums, or projections)",
        ));
    }
    let rates =
        Rates::new(&target.profile, target.device, target.threads).map_err(Failure::failed)?;
    let (policy, w) = (plan.policy.as_ref(), &plan.workload);
    let formats = Flags {
        percent: [0.0; 6],
        gpu_batch_size: 1,
        num_gpu_batches: 1,
        pin_weight: true,
        compress_weight: policy.is_some_and(|p| p.compress_weight),
        compress_cache: policy.is_some_and(|p| p.compress_cache),
        cpu_cache_compute: false,
    };
    let setup = Setup {
        model: spec,
        rates: &rates,
        flags: formats,
        lengths: Lengths {
            prompt: w.prompt_tokens_max as usize,
            generated: w.gen_tokens_max.max(1) as usize,
            projected: false,
        },
    };
    let context = target.profile.gpu.as_ref().map_or(0, |g| g.context_bytes);
    let budget = PerTier {
        gpu: target.budget.gpu_bytes.unwrap_or(0).saturating_sub(context),
        cpu: target.budget.cpu_bytes,
        disk: target.budget.disk_bytes,
    };
    let most = match solved.lines {
        Some(_) => w.prompts as usize,
        None => usize::MAX,
    };
    let nothing = || {
        Failure::failed("no command line of FlexLLMGen fits into this budget")
            .with_hint("give it more memory, or 4-bit weights and cache with --compress both")
    };
    let flags = best_flags(&setup, &budget, most.max(1)).ok_or_else(nothing)?;
    let setup = Setup { flags, ..setup };
    let (realised, bytes) = (setup.realised_percent(), setup.footprint());
    let gib = |bytes: u64| bytes as f64 / GIB as f64;
    Ok(format!(
        "# weights realised in whole tensors: {:.1} % GPU, {:.1} % DRAM, {:.1} % disk\n# holds {:.1} GiB GPU, {:.1} GiB DRAM (relays and pinned rounding included), {:.1} GiB disk\n# predicted {:.2} tok/s; loadmaster's own plan {}\n{}\n",
        realised.gpu,
        realised.cpu,
        realised.disk,
        gib(bytes.gpu + context),
        gib(bytes.cpu),
        gib(bytes.disk),
        setup.throughput(),
        plan.estimate
            .as_ref()
            .map_or("does not fit".to_owned(), |e| format!(
                "{:.2} tok/s",
                speed(e)
            )),
        setup.command()
    ))
}
