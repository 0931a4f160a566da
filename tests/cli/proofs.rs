//! The commands that prove the plan, in small: they draw, run, judge and write what they say.

use crate::harness::Home;

const SMALL: &str = "accuracy --seed 5 --rows 2 --runs 1 --max-row-seconds 0.5 --sizes opt-125m";

#[test]
fn accuracy_plans_first_measures_and_judges_again() {
    let home = Home::packed();
    let plans = home.run(&format!("{SMALL} --plan-only --out rows")).good();
    assert_eq!(
        plans.stdout.matches(".toml").count(),
        3,
        "profile and plans"
    );
    let table = home.run(&format!("{SMALL} --out rows --json")).good();
    let verdict: serde_json::Value = serde_json::from_str(&table.stdout).expect("one document");
    assert_eq!(verdict["schema"], "loadmaster.accuracy/1");
    assert_eq!(verdict["rows"].as_array().map(Vec::len), Some(2));
    assert_eq!(verdict["complete"], false, "one run is no median");
    for row in verdict["rows"].as_array().expect("rows") {
        assert!(row["error"]["throughput"].is_number(), "{row}");
        assert!(row["measured"]["total_s"].as_f64().is_some_and(|s| s > 0.0));
    }
    let again = home.run("accuracy --judge rows/rows.json --json").good();
    assert_eq!(again.stdout, table.stdout);
    let repriced = home.run("accuracy --judge rows/rows.json --reprice").good();
    assert!(
        repriced.stdout.contains("| throughput |"),
        "{}",
        repriced.stdout
    );
    let other = home.run("accuracy --seed 6 --rows 2 --out rows");
    assert!(
        other.stderr.contains("rows of another measurement"),
        "{}",
        other.stderr
    );
    let fitted = home.run("calibrate rows/rows.json --dry-run --json").good();
    let fitted: serde_json::Value = serde_json::from_str(&fitted.stdout).expect("one document");
    assert_eq!(fitted["jobs"], 2);
    assert!(fitted["written"].is_null());
    assert!(fitted["equations"].as_u64().is_some_and(|n| n >= 2));
    assert!(
        fitted["new"]["terms"]
            .as_object()
            .is_some_and(|t| !t.is_empty())
    );
}
