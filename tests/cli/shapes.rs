//! Documents and result lines have every key that is promised, and stdout one document at most.

use crate::harness::{Ended, Home, RAGGED, assert_keys, keys};
use serde_json::Value;

const FIGURES: &str = "prompt_tokens generated_tokens prefill_s decode_s total_s throughput_tok_s \
    decode_tok_s lanes tiers binding";
const LANES: &str = "disk_to_cpu cpu_to_disk cpu_to_gpu gpu_to_cpu gpu_compute cpu_compute";
const LANE: &str = "prefill_s decode_s work_s bytes";
const TIERS: &str = "gpu cpu disk";
const TIER: &str = "total_bytes others_bytes free_bytes weights_bytes cache_bytes \
    activations_bytes buffers_bytes process_bytes unaccounted_bytes peak_bytes";
const POLICY: &str = "percent cpu_compute_share_percent gpu_batch_size num_gpu_batches pin_weight \
    compress_weight compress_cache cpu_cache_compute overlap compute kv threads";
const PLAN: &str = "schema id feasible lossless model workload device profile budget policy \
    placement estimate setup missing_bytes ladder runners_up flags next_command check_command";
const REPORT: &str =
    "schema plan outcome started_at finished_at lines host setup repriced measured";
const ERROR: &str = "throughput prefill decode lanes bytes";

fn assert_figures(figures: &Value) {
    assert_keys(figures, FIGURES);
    assert_keys(&figures["lanes"], LANES);
    LANES
        .split_whitespace()
        .for_each(|lane| assert_keys(&figures["lanes"][lane], LANE));
    assert_keys(&figures["tiers"], TIERS);
    TIERS
        .split_whitespace()
        .for_each(|tier| assert_keys(&figures["tiers"][tier], TIER));
    assert_keys(&figures["binding"], "prefill decode");
    let seconds = |key: &str| figures[key].as_f64().expect("seconds");
    assert!((seconds("prefill_s") + seconds("decode_s") - seconds("total_s")).abs() < 1e-9);
}

fn assert_plan(plan: &Value) {
    assert_eq!(plan["schema"], "loadmaster.plan/1");
    assert_keys(plan, PLAN);
    assert_keys(&plan["model"], "name fingerprint parameters weights_bytes");
    assert_keys(
        &plan["workload"],
        "prompts prompt_tokens prompt_tokens_max gen_tokens gen_tokens_max",
    );
    assert_keys(&plan["profile"], "name measured_at");
    assert_keys(&plan["budget"], "gpu_bytes cpu_bytes disk_bytes");
    assert_keys(&plan["setup"], "pack_s load_s store_bytes spill_bytes");
    assert_keys(&plan["missing_bytes"], TIERS);
    let rows = plan["ladder"].as_array().expect("a ladder");
    assert!(!rows.is_empty());
    for row in rows {
        assert_keys(
            row,
            "name lossless fits missing_bytes policy throughput_tok_s",
        );
    }
    for other in plan["runners_up"].as_array().expect("runners-up") {
        assert_keys(other, "policy throughput_tok_s why");
    }
}

fn assert_feasible(plan: &Value) {
    assert_plan(plan);
    assert_eq!(plan["feasible"], true);
    assert_keys(&plan["policy"], POLICY);
    assert_eq!(plan["policy"]["percent"].as_array().map(Vec::len), Some(6));
    assert_figures(&plan["estimate"]);
}

fn assert_report(report: &Value) {
    assert_eq!(report["schema"], "loadmaster.report/1");
    assert_keys(report, REPORT);
    assert_feasible(&report["plan"]);
    assert_keys(&report["lines"], "total ok failed");
    assert_keys(&report["host"], "cpu gpu kernel version");
    assert_keys(&report["setup"], "probe_s pack_s load_s written_bytes");
    assert_figures(&report["repriced"]);
    assert_figures(&report["measured"]);
}

fn assert_errors(errors: &Value) {
    assert_keys(errors, ERROR);
    assert_keys(&errors["lanes"], LANES);
    assert_keys(&errors["bytes"], TIERS);
}

fn assert_compare(compare: &Value) {
    assert_eq!(compare["schema"], "loadmaster.compare/1");
    assert_keys(
        compare,
        "schema runs mean_abs_error_percent worst_abs_error_percent",
    );
    assert_errors(&compare["mean_abs_error_percent"]);
    assert_errors(&compare["worst_abs_error_percent"]);
    for run in compare["runs"].as_array().expect("runs") {
        assert_keys(run, "report plan_id predicted measured error_percent");
        assert_errors(&run["error_percent"]);
        assert_figures(&run["predicted"]);
        assert_figures(&run["measured"]);
    }
}

#[test]
fn run_prints_plan_report_and_comparison() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let words = "run --model GOLDEN --input in.jsonl --json --output out.jsonl --report r.json";
    let document = home.run(words).good().document();
    assert_eq!(document["schema"], "loadmaster.run/1");
    assert_eq!(keys(&document).len(), 4);
    assert_feasible(&document["plan"]);
    assert_report(&document["report"]);
    assert_compare(&document["compare"]);
    assert_eq!(document["report"]["plan"], document["plan"]);
    assert_eq!(
        document["compare"]["runs"][0]["plan_id"],
        document["plan"]["id"]
    );
    assert_eq!(home.json("r.json"), document["report"]);
    assert_lines(&document["report"], &home.read("out.jsonl"));
}

/// Result lines, and that the report counts what they say.
fn assert_lines(report: &Value, results: &str) {
    let (mut prompt, mut generated) = (0, 0);
    for line in crate::harness::in_order(results) {
        assert_keys(&line, "index text token_ids finish_reason prompt_tokens");
        let reason = line["finish_reason"].as_str();
        assert!(matches!(reason, Some("stop" | "length")), "{line}");
        prompt += line["prompt_tokens"].as_u64().expect("a count");
        generated += line["token_ids"].as_array().expect("ids").len() as u64;
    }
    assert_eq!(report["measured"]["prompt_tokens"], prompt);
    assert_eq!(report["measured"]["generated_tokens"], generated);
}

#[test]
fn plan_and_exec_print_their_documents() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let plan = home
        .run("plan --model GOLDEN --input in.jsonl --json --explain -o plan.toml")
        .good();
    assert_feasible(&plan.document());
    let words = "exec plan.toml --input in.jsonl --json --output out.jsonl";
    let report = home.run(words).good().document();
    assert_report(&report);
    assert_eq!(report["plan"]["id"], plan.document()["id"]);
}

fn assert_failure(ended: &Ended, kind: &str) {
    let document = ended.document();
    assert_eq!(document["schema"], "loadmaster.error/1");
    assert_eq!(document["kind"], kind);
    let message = document["message"].as_str().expect("a message");
    assert!(ended.stderr.ends_with(&format!("error: {message}\n")));
}

#[test]
fn failures_are_one_document_too() {
    let home = Home::new();
    home.write("in.jsonl", RAGGED);
    let usage = home.run("plan --model GOLDEN --json --cpu-mem 16");
    usage.fails(2, &["16GiB"]);
    assert_failure(&usage, "usage");
    let failed = home.run("run --model ./nowhere --json --output out.jsonl");
    failed.fails(1, &["./nowhere"]);
    assert_failure(&failed, "failed");
    let infeasible = home.run("plan --model GOLDEN --input in.jsonl --json --cpu-mem 1MiB");
    infeasible.fails(1, &["--cpu-mem"]);
    let plan = infeasible.document();
    assert_plan(&plan);
    assert_eq!(plan["feasible"], false);
    assert!(plan["policy"].is_null() && plan["estimate"].is_null());
    assert!(plan["missing_bytes"]["cpu"].as_u64() > Some(0));
}

#[test]
fn a_bad_line_leaves_one_document() {
    let home = Home::new();
    home.write("in.jsonl", &format!("{RAGGED}{{\"prompt\": [\n"));
    let ended = home.run("run --model GOLDEN --input in.jsonl --json --output out.jsonl");
    ended.fails(1, &["line 6"]);
    let document = ended.document();
    assert_eq!(document["schema"], "loadmaster.run/1");
    assert_eq!(document["report"]["outcome"], "failed");
    assert_eq!(document["report"]["lines"]["failed"], 1);
}
