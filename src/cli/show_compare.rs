//! The text of a comparison: predicted beside measured, with the error of each row.

use crate::compare::{ComparedRun, Comparison, roofline};
use crate::cost::figures::{Figures, LaneFigures};
use crate::report::RunOutcome;
use crate::tier::{Lane, Tier};
use crate::units::{show_bytes, show_seconds};
use comfy_table::{CellAlignment, Table, presets};

/// All runs, and the mean and worst error where there are several.
pub fn show(comparison: &Comparison) -> String {
    let mut text: String = comparison.runs.iter().map(show_run).collect();
    if comparison.runs.len() > 1 {
        let figure = |e: Option<f64>| e.map_or("-".to_owned(), |e| format!("{e:.1} %"));
        let (mean, worst) = (
            &comparison.mean_abs_error_percent,
            &comparison.worst_abs_error_percent,
        );
        let cut_short = |run: &&ComparedRun| run.outcome == RunOutcome::Interrupted;
        let without = match comparison.runs.iter().filter(cut_short).count() {
            0 => String::new(),
            count => format!(", {count} that were interrupted left out"),
        };
        text += &format!(
            "{} runs{without}: mean error of throughput {}, worst {}\n",
            comparison.runs.len(),
            figure(mean.throughput),
            figure(worst.throughput)
        );
    }
    text
}

fn show_run(run: &ComparedRun) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "predicted", "measured", "error"]);
    let (p, m, e) = (&run.predicted, &run.measured, &run.error_percent);
    let mut row = |name: &str, predicted: String, measured: String, error: Option<f64>| {
        let error = error.map_or("-".to_owned(), |e| format!("{e:+.1} %"));
        table.add_row([name.to_owned(), predicted, measured, error]);
    };
    let rate = |f: &Figures| format!("{:.2} tok/s", f.throughput_tok_s);
    row("throughput", rate(p), rate(m), e.throughput);
    row(
        "prefill",
        show_seconds(p.prefill_s),
        show_seconds(m.prefill_s),
        e.prefill,
    );
    row(
        "decode",
        show_seconds(p.decode_s),
        show_seconds(m.decode_s),
        e.decode,
    );
    for lane in Lane::ALL {
        let (a, b) = (&p.lanes[lane], &m.lanes[lane]);
        if a.busy_s() > 0.0 || b.busy_s() > 0.0 {
            row(
                &format!("{} busy", lane.name()),
                lane_text(a),
                lane_text(b),
                e.lanes[lane],
            );
        }
    }
    for tier in Tier::ALL {
        let (a, b) = (p.tiers[tier].peak_bytes, m.tiers[tier].peak_bytes);
        if a > 0 || b > 0 {
            row(
                &format!("{} bytes", tier.name()),
                show_bytes(a),
                show_bytes(b),
                e.bytes[tier],
            );
        }
    }
    for column in 1..4 {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let binding = format!(
        "binding: prefill {}, decode {}",
        m.binding.prefill, m.binding.decode
    );
    let part = roofline(m).map_or(String::new(), |(lane, part)| {
        format!("; {part:.2} of the roofline of {}", lane.name())
    });
    let how = how_it_ended(run);
    format!(
        "Predicted against measured ({}, plan {}{how})\n{table}\n{binding}{part}\n",
        run.report, run.plan_id
    )
}

/// Of a run that did not do all its lines, how many it did.
fn how_it_ended(run: &ComparedRun) -> String {
    let word = match run.outcome {
        RunOutcome::Done => return String::new(),
        RunOutcome::Interrupted => "interrupted",
        RunOutcome::Failed => "failed",
    };
    let (done, all) = (run.lines.ok, run.lines.total);
    format!("; {word}: {done} of {all} lines done")
}

fn lane_text(lane: &LaneFigures) -> String {
    match lane.bytes {
        0 => show_seconds(lane.busy_s()),
        bytes => format!("{} ({})", show_seconds(lane.busy_s()), show_bytes(bytes)),
    }
}
