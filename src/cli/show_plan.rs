//! A plan as a person reads it: flags, placement, estimate, ladder, what would change it. Returns
//! text; printing it, and everything that is decided, happens elsewhere.

use crate::cost::figures::{Figures, TierFigures};
use crate::plan::{Plan, PlanBudget, PlanPolicy, Rung};
use crate::policy::show_percent;
use crate::tier::{Lane, PerTier, Tier};
use crate::units::{show_bytes, show_seconds};
use comfy_table::{CellAlignment, Table, presets};

/// The whole plan; with `explain` also what would change it.
pub fn show_plan(plan: &Plan, explain: bool) -> String {
    let mut parts = vec![headline(plan)];
    match (&plan.policy, &plan.estimate) {
        (Some(policy), Some(estimate)) => {
            parts.extend(plan.explain.warning.iter().map(|w| format!("warning: {w}")));
            parts.push(format!("flags: {}", plan.flags));
            parts.push(placement_table(estimate, plan.budget.gpu_bytes.is_some()));
            parts.push(estimate_lines(plan, policy, estimate));
        }
        _ => parts.push(missing_lines(plan)),
    }
    let beside = plan.explain.beside_ladder.as_ref();
    parts.push(format!(
        "out-of-memory strategies:\n{}{}",
        ladder_table(&plan.ladder),
        beside.map_or(String::new(), |line| format!("\n{line}"))
    ));
    parts.extend(runners_up(plan));
    parts.extend(plan.explain.closed_form.clone().filter(|_| explain));
    parts.extend(what_if(plan).filter(|_| explain));
    parts.extend(plan.explain.four_bit.clone());
    parts.extend(plan.explain.exact.clone());
    if plan.feasible {
        parts.push(format!(
            "next: {}\ncheck: {}",
            plan.next_command, plan.check_command
        ));
    }
    parts.join("\n\n") + "\n"
}

fn headline(plan: &Plan) -> String {
    let work = &plan.workload;
    let quality = match (plan.feasible, plan.lossless) {
        (false, _) => "does not fit",
        (true, true) => "lossless",
        (true, false) => "NOT lossless",
    };
    format!(
        "{} on {} ({}{}): {} prompts, {} + {} tokens; plan {}, {quality}",
        plan.model.name,
        plan.device,
        plan.profile.name,
        changes(plan),
        work.prompts,
        work.prompt_tokens,
        work.gen_tokens,
        plan.id
    )
}

/// ", what if disk read at 7.00 GB/s".
fn changes(plan: &Plan) -> String {
    match plan.profile.changes.as_slice() {
        [] => String::new(),
        changes => format!(", what if {}", changes.join(", ")),
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    table
}

/// All columns but the first to the right.
fn numbers(mut table: Table) -> String {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// Bytes per tier: what lies there and what stays free.
fn placement_table(estimate: &Figures, gpu: bool) -> String {
    let mut rows = table(&[
        "tier",
        "weights",
        "cache",
        "activations",
        "buffers",
        "process",
        "free",
        "budget",
    ]);
    for tier in Tier::ALL.into_iter().filter(|&t| gpu || t != Tier::Gpu) {
        let t: &TierFigures = &estimate.tiers[tier];
        let mut row = vec![["GPU", "DRAM", "disk"][tier as usize].to_owned()];
        let bytes = [
            t.weights_bytes,
            t.cache_bytes,
            t.activations_bytes,
            t.buffers_bytes,
            t.process_bytes,
            t.free_bytes,
            t.total_bytes,
        ];
        row.extend(bytes.map(|b| {
            if b == 0 {
                "-".to_owned()
            } else {
                show_bytes(b)
            }
        }));
        rows.add_row(row);
    }
    numbers(rows)
}

fn estimate_lines(plan: &Plan, policy: &PlanPolicy, estimate: &Figures) -> String {
    let lanes = Lane::ALL
        .into_iter()
        .filter(|&lane| estimate.lanes[lane].busy_s() > 0.0)
        .map(|lane| {
            format!(
                "{} {}",
                lane.name(),
                show_seconds(estimate.lanes[lane].busy_s())
            )
        });
    let written = estimate.lanes.cpu_to_disk.bytes + store_to_write(plan);
    [
        format!(
            "{:.2} tok/s: prefill {} ({} binds), decode {} at {:.2} tok/s ({} binds)",
            estimate.throughput_tok_s,
            show_seconds(estimate.prefill_s),
            or_nothing(&estimate.binding.prefill),
            show_seconds(estimate.decode_s),
            estimate.decode_tok_s,
            or_nothing(&estimate.binding.decode),
        ),
        format!("busy: {}", lanes.collect::<Vec<_>>().join(", ")),
        format!(
            "blocks of {} x {} sequences; whole job {}, {} of it packing, {} loading; writes {}",
            policy.gpu_batch_size,
            policy.num_gpu_batches,
            show_seconds(estimate.total_s + plan.setup.pack_s + plan.setup.load_s),
            show_seconds(plan.setup.pack_s),
            show_seconds(plan.setup.load_s),
            show_bytes(written)
        ),
    ]
    .join("\n")
}

/// A store that is there already is not written again.
fn store_to_write(plan: &Plan) -> u64 {
    if plan.setup.pack_s > 0.0 {
        plan.setup.store_bytes
    } else {
        0
    }
}

fn or_nothing(binding: &str) -> &str {
    if binding.is_empty() {
        "nothing"
    } else {
        binding
    }
}

fn missing_lines(plan: &Plan) -> String {
    let mut lines = vec![format!("missing: {}", missing(&plan.missing_bytes))];
    if let Some(enough) = &plan.enough_bytes {
        lines.push(format!("enough would be: {}", budget_flags(enough)));
    }
    lines.join("\n")
}

/// Rounded up to whole MiB: what is said must be enough.
fn budget_flags(budget: &PlanBudget) -> String {
    let mib = |bytes: u64| format!("{}MiB", bytes.div_ceil(1 << 20));
    let mut words: Vec<String> = Vec::new();
    words.extend(budget.gpu_bytes.map(|b| format!("--gpu-mem {}", mib(b))));
    words.push(format!("--cpu-mem {}", mib(budget.cpu_bytes)));
    words.push(format!("--disk-space {}", mib(budget.disk_bytes)));
    words.join(" ")
}

/// "1.20 GiB DRAM, 3 GiB disk".
fn missing(bytes: &PerTier<Option<u64>>) -> String {
    let lacking = Tier::ALL.into_iter().filter_map(|tier| {
        let lack = bytes[tier].filter(|&b| b > 0)?;
        let name = ["GPU", "DRAM", "disk"][tier as usize];
        Some(format!("{} {name}", show_bytes(lack)))
    });
    let words: Vec<String> = lacking.collect();
    if words.is_empty() {
        return "nothing".to_owned();
    }
    words.join(", ")
}

fn ladder_table(ladder: &[Rung]) -> String {
    let mut rows = table(&[
        "strategy", "lossless", "fits", "tok/s", "percent", "GPU", "DRAM", "disk",
    ]);
    for rung in ladder {
        let fits = if rung.fits {
            "yes".to_owned()
        } else {
            format!("misses {}", missing(&rung.missing_bytes))
        };
        let percent = rung.policy.as_ref().map(|p| show_percent(p.percent));
        let bytes = |tier: Tier| rung.tier_bytes[tier].map_or("-".to_owned(), show_bytes);
        rows.add_row(vec![
            rung.name.clone(),
            if rung.lossless { "yes" } else { "no" }.to_owned(),
            fits,
            rung.throughput_tok_s
                .map_or("-".to_owned(), |t| format!("{t:.2}")),
            percent.unwrap_or_else(|| "-".to_owned()),
            bytes(Tier::Gpu),
            bytes(Tier::Cpu),
            bytes(Tier::Disk),
        ]);
    }
    let notes = ladder.iter().filter(|r| !r.note.is_empty());
    let notes: Vec<String> = notes.map(|r| format!("\n{}: {}", r.name, r.note)).collect();
    numbers(rows) + &notes.concat()
}

fn runners_up(plan: &Plan) -> Option<String> {
    if plan.runners_up.is_empty() {
        return None;
    }
    let line = |r: &crate::plan::RunnerUp| format!("  {:.2} tok/s  {}", r.throughput_tok_s, r.why);
    let lines: Vec<String> = plan.runners_up.iter().map(line).collect();
    Some(format!("runners-up:\n{}", lines.join("\n")))
}

fn what_if(plan: &Plan) -> Option<String> {
    if plan.explain.what_if.is_empty() {
        return None;
    }
    let words = plan.explain.what_if.iter().map(|w| {
        if w.gain_percent < 0.05 {
            return format!("{}: no gain", w.change);
        }
        format!("{}: {:+.1} %", w.change, w.gain_percent)
    });
    Some(format!("with {}", words.collect::<Vec<_>>().join("; ")))
}
