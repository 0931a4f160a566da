//! The tables of `accuracy` in the form that docs/measurements.md takes (Markdown). Returns text.

use crate::compare::Errors;
use crate::proof::judge::{RowVerdict, Summary, Verdict};
use crate::proof::record::{RowRecord, Rows};
use crate::tier::{Lane, PerLane, Tier};
use crate::units::show_seconds;

/// What was written before anything ran: hashes of profile and plans.
pub fn show_plans(rows: &Rows) -> String {
    let mut text = format!("{}  profile.toml\n", rows.profile_sha256);
    for row in &rows.rows {
        let about = row.plan.estimate.as_ref().map_or(0.0, |e| e.total_s);
        text += &format!(
            "{}  {}.toml  {} ({})\n",
            row.plan_sha256,
            row.name,
            described(row),
            show_seconds(about)
        );
    }
    text
}

/// "8 x 1 of 12, 64 + 16, --percent 0 50 0 100 0 100, q4 weights".
fn described(row: &RowRecord) -> String {
    let (w, Some(p)) = (&row.plan.workload, &row.plan.policy) else {
        return String::new();
    };
    let percent: Vec<String> = p.percent.iter().map(|x| format!("{x:.0}")).collect();
    let mean = |tokens: u64| tokens / w.prompts.max(1);
    let mut text = format!(
        "{} x {} of {}, {} + {}, {}",
        p.gpu_batch_size,
        p.num_gpu_batches,
        w.prompts,
        mean(w.prompt_tokens),
        mean(w.gen_tokens),
        percent.join(" ")
    );
    for (is, what) in [
        (p.compress_weight, ", 4-bit weights"),
        (p.compress_cache, ", 4-bit cache"),
        (!p.overlap, ", no overlap"),
    ] {
        text += if is { what } else { "" };
    }
    text
}

/// One line a row, then means, medians and worst.
pub fn show_verdict(verdict: &Verdict) -> String {
    let mut text = format!(
        "seed {}, profile {} ({})\n\n",
        verdict.seed,
        verdict.profile,
        &verdict.profile_sha256[..12.min(verdict.profile_sha256.len())]
    );
    text += "| row | predicted tok/s | measured | error | raw error | spread | raw spread | slowdown | prefill | decode | disk busy | CPU busy | DRAM |\n";
    text += "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    for row in &verdict.rows {
        text += &row_line(row);
    }
    text += &format!(
        "\nErrors are 100 · (predicted − measured) ÷ measured, measured = the median of {} interleaved runs, each divided by what the bursts around it lost against the profile; raw = as measured; spread = largest less smallest throughput of a row's runs; slowdown = a burst's seconds ÷ the profile's. Excused by their own spread: {} of {}.\n\n",
        verdict.rows.iter().map(|r| r.runs).min().unwrap_or(0),
        verdict.excused,
        verdict.rows.len()
    );
    text += &summary_table(verdict);
    text
}

fn row_line(row: &RowVerdict) -> String {
    let e = &row.error;
    format!(
        "| {}{} | {:.2} | {:.2} | {} | {} | {:.1} % | {:.1} % | {:.2} | {} | {} | {} | {} | {} |\n",
        row.name,
        if row.excused { " (excused)" } else { "" },
        row.predicted.throughput_tok_s,
        row.measured.throughput_tok_s,
        signed(e.throughput),
        signed(row.raw_error.throughput),
        row.spread_pct,
        row.raw_spread_pct,
        row.slowdown,
        signed(e.prefill),
        signed(e.decode),
        signed(e.lanes[Lane::DiskToCpu]),
        signed(e.lanes[Lane::CpuCompute]),
        signed(e.bytes[Tier::Cpu]),
    )
}

fn signed(error: Option<f64>) -> String {
    error.map_or("-".to_owned(), |e| format!("{e:+.1} %"))
}

fn plain(error: Option<f64>) -> String {
    error.map_or("-".to_owned(), |e| format!("{e:.1} %"))
}

fn summary_table(verdict: &Verdict) -> String {
    let mut text =
        "| figure | mean | median | worst | mean, all rows | worst, all rows | raw mean | raw worst |\n|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    let mut line = |name: &str, of: &dyn Fn(&Errors) -> Option<f64>| {
        let (j, a, r) = (&verdict.judged, &verdict.all, &verdict.raw);
        let cells = [
            &j.mean, &j.median, &j.worst, &a.mean, &a.worst, &r.mean, &r.worst,
        ];
        let cells = cells.map(|e| plain(of(e)));
        if cells.iter().any(|c| c != "-") {
            text += &format!("| {name} | {} |\n", cells.join(" | "));
        }
    };
    line("throughput", &|e| e.throughput);
    line("prefill", &|e| e.prefill);
    line("decode", &|e| e.decode);
    for lane in Lane::ALL {
        line(&format!("{} busy", lane.name()), &|e| e.lanes[lane]);
    }
    for tier in Tier::ALL {
        line(&format!("{} bytes", tier.name()), &|e| e.bytes[tier]);
    }
    text + &work_lines(&verdict.all)
}

/// Work is bytes and FLOPs at profiled rates: there is nothing to normalise.
fn work_lines(all: &Summary) -> String {
    let line = |lane: Lane| {
        let of = |figures: &PerLane<Option<f64>>| plain(figures[lane]);
        let (mean, worst) = (of(&all.mean_work), of(&all.worst_work));
        let shown = all.mean_work[lane].is_some();
        shown.then(|| format!("| {} work | | | | {mean} | {worst} | | |\n", lane.name()))
    };
    Lane::ALL.into_iter().filter_map(line).collect()
}
