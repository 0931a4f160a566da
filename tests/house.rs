//! The house rules as a test: floors, sizes of functions and files, where `unsafe` and printing may
//! be. Each rule is a function from a source text to its breaches, tried below on small bad texts.

#[path = "house/source.rs"]
mod source;

use source::{Function, Source};
use std::path::{Path, PathBuf};

const MOST_FUNCTION_LINES: usize = 70;
const MOST_MEDIAN_LINES: usize = 10;
const MOST_FILE_LINES: usize = 500;
const MOST_PARAMETERS: usize = 5;
/// Lines above an `unsafe` in which its reason must stand.
const SAFETY_REACH_LINES: usize = 8;

/// Who stands where; a module may use its own floor and lower ones.
const FLOORS: [&[&str]; 8] = [
    &["units", "tier", "dtype"],
    &["profile", "model", "workload"],
    &["policy", "placement", "cost"],
    &["planner", "plan"],
    &["machine"],
    &["checkpoint", "store", "tokenizer", "engine", "probe"],
    &["report", "compare", "measured", "proof"],
    &["cli", "lib", "main"],
];

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// "cli" of src/cli/args.rs, "units" of src/units.rs.
fn module_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap_or(path);
    let first = inside.split('/').next().unwrap_or(inside);
    first.strip_suffix(".rs").unwrap_or(first)
}

fn floor_breaches(source: &Source) -> Vec<String> {
    let module = module_of(&source.path);
    let Some(own) = floor_of(module) else {
        return vec![format!(
            "{}: module {module} stands on no floor",
            source.path
        )];
    };
    let mut breaches = Vec::new();
    for (line, used) in source.crate_uses() {
        match floor_of(&used) {
            Some(other) if other <= own => {}
            Some(other) => breaches.push(format!(
                "{}:{line}: floor {own} uses {used} of floor {other}",
                source.path
            )),
            // Names at the crate's root are re-exports or macros: there are none here.
            None => breaches.push(format!("{}:{line}: {used} stands on no floor", source.path)),
        }
    }
    breaches
}

fn length_breaches(source: &Source) -> Vec<String> {
    let long = |f: &Function| f.lines > MOST_FUNCTION_LINES;
    let wide = |f: &Function| f.parameters > MOST_PARAMETERS;
    let at = |f: &Function| format!("{}:{}: fn {}", source.path, f.line, f.name);
    let functions = source.functions();
    let long = functions.iter().filter(|f| long(f));
    let mut breaches: Vec<String> = long
        .map(|f| {
            format!(
                "{} has {} lines, at most {MOST_FUNCTION_LINES}",
                at(f),
                f.lines
            )
        })
        .collect();
    let wide = functions.iter().filter(|f| wide(f));
    breaches.extend(wide.map(|f| {
        format!(
            "{} has {} parameters, at most {MOST_PARAMETERS}",
            at(f),
            f.parameters
        )
    }));
    breaches
}

fn size_breaches(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    if lines <= MOST_FILE_LINES {
        return Vec::new();
    }
    vec![format!(
        "{}: {lines} lines, at most {MOST_FILE_LINES}",
        source.path
    )]
}

fn opening_breaches(source: &Source) -> Vec<String> {
    if source.text.starts_with("//!") {
        return Vec::new();
    }
    vec![format!(
        "{}: does not open with //! saying what lives there",
        source.path
    )]
}

/// Blocks and impls need a reason; an `unsafe fn` only hands its duties to the caller's block.
fn unsafe_breaches(source: &Source) -> Vec<String> {
    let inside = source.path.starts_with("src/machine/");
    let mut breaches = Vec::new();
    for (line, what) in source.followers_of("unsafe") {
        let reasoned = || source.comment_near(line, SAFETY_REACH_LINES, "SAFETY:");
        if !inside {
            breaches.push(format!(
                "{}:{line}: unsafe outside src/machine",
                source.path
            ));
        } else if ["{", "impl"].contains(&what.as_str()) && !reasoned() {
            breaches.push(format!(
                "{}:{line}: unsafe without a SAFETY: reason",
                source.path
            ));
        }
    }
    breaches
}

fn printing_breaches(source: &Source) -> Vec<String> {
    let mut words = vec!["dbg!"];
    if !source.path.starts_with("src/cli/") && source.path != "src/main.rs" {
        words.extend(["println!", "eprintln!", "print!", "eprint!"]);
    }
    found(source, &words, "prints")
}

fn unfinished_breaches(source: &Source) -> Vec<String> {
    let mut breaches = found(source, &["todo!", "unimplemented!"], "is unfinished");
    for (index, line) in source.text.lines().enumerate() {
        for word in ["FIXME", "TODO", "XXX"] {
            if line.contains(word) {
                breaches.push(format!("{}:{}: {word}", source.path, index + 1));
            }
        }
    }
    breaches
}

fn found(source: &Source, words: &[&str], what: &str) -> Vec<String> {
    let places = |word: &&str| {
        let lines = source.lines_with_word(word);
        let tell = |line| format!("{}:{line}: {word} {what}", source.path);
        lines.into_iter().map(tell).collect::<Vec<_>>()
    };
    words.iter().flat_map(places).collect()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a directory of the repository");
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn sources_in(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root).expect("inside").to_string_lossy();
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        Source::new(&name.replace('\\', "/"), &text)
    };
    rust_files(&root.join(folder))
        .into_iter()
        .map(read)
        .collect()
}

fn program() -> Vec<Source> {
    let sources = sources_in("src");
    assert!(
        sources.len() > 20,
        "the house has moved: {} files",
        sources.len()
    );
    sources
}

fn program_and_tests() -> Vec<Source> {
    let mut sources = program();
    sources.extend(sources_in("tests"));
    sources
}

fn assert_none(sources: &[Source], breaches: impl FnMut(&Source) -> Vec<String>) {
    let all: Vec<String> = sources.iter().flat_map(breaches).collect();
    assert!(
        all.is_empty(),
        "{} breaches:\n{}",
        all.len(),
        all.join("\n")
    );
}

#[test]
fn modules_use_lower_floors_only() {
    assert_none(&program(), floor_breaches);
}

#[test]
fn functions_stay_short_and_narrow() {
    assert_none(&program(), length_breaches);
}

#[test]
fn files_stay_short() {
    assert_none(&program_and_tests(), size_breaches);
}

#[test]
fn the_median_function_is_short() {
    let sources = program();
    let mut lines: Vec<usize> = sources
        .iter()
        .flat_map(|s| s.functions())
        .map(|f| f.lines)
        .collect();
    lines.sort_unstable();
    let median = lines[lines.len() / 2];
    assert!(
        median <= MOST_MEDIAN_LINES,
        "{median} lines over {} functions",
        lines.len()
    );
}

#[test]
fn files_open_by_saying_what_lives_there() {
    assert_none(&program_and_tests(), opening_breaches);
}

#[test]
fn unsafe_lives_in_the_machine_with_its_reason() {
    assert_none(&program(), unsafe_breaches);
}

#[test]
fn only_the_door_prints() {
    assert_none(&program(), printing_breaches);
}

#[test]
fn nothing_is_left_unfinished() {
    assert_none(&program(), unfinished_breaches);
}

// The rules themselves, tried on small texts.

fn text(path: &str, lines: &[&str]) -> Source {
    Source::new(path, &lines.join("\n"))
}

#[test]
fn a_use_of_a_higher_floor_is_seen_in_every_spelling() {
    for bad in [
        "use crate::planner::lp;",
        "pub use crate::engine::Engine;",
        "use crate::{units::GIB, machine::Machine};",
        "use crate::{\n    units::{GIB, MIB},\n    report,\n};",
        "fn f() { crate::cli::args::read() }",
        "use crate::nowhere::x;",
    ] {
        assert_eq!(
            floor_breaches(&text("src/policy.rs", &[bad])).len(),
            1,
            "{bad}"
        );
    }
    for good in [
        "use crate::units::GIB;",
        "use crate::cost::terms;",
        "use crate::{units::{GIB, MIB}, model::families::named_size};",
        "// use crate::planner::lp;",
        "fn f() -> &'static str { \"crate::engine::x\" }",
        "#[cfg(test)]\nmod tests {\n    use crate::engine::Engine;\n}",
    ] {
        assert_eq!(
            floor_breaches(&text("src/policy.rs", &[good])),
            [""; 0],
            "{good}"
        );
    }
    assert_eq!(floor_breaches(&text("src/novel.rs", &[""])).len(), 1);
}

#[test]
fn long_functions_and_files_are_seen() {
    let body = vec!["    work();"; 69];
    let long = [&["fn long() {"], body.as_slice(), &["}"]].concat();
    assert_eq!(length_breaches(&text("src/a.rs", &long)).len(), 1);
    assert_eq!(
        length_breaches(&text("src/a.rs", &[&long[..69], &["}"]].concat())),
        [""; 0]
    );
    let in_tests = [&["#[cfg(test)]", "mod tests {"], long.as_slice(), &["}"]].concat();
    assert_eq!(length_breaches(&text("src/a.rs", &in_tests)), [""; 0]);
    assert_eq!(size_breaches(&text("src/a.rs", &["//"; 501])).len(), 1);
    assert_eq!(size_breaches(&text("src/a.rs", &["//"; 500])), [""; 0]);
    let wide = "fn wide<T: Fn(u8, u8)>(a: (u8, u8), b: [u8; 2], c: T, d: u8, e: u8, f: u8) {}";
    assert_eq!(length_breaches(&text("src/a.rs", &[wide])).len(), 1);
    let five = "fn five(&self, a: (u8, u8), b: [u8; 2], c: Vec<(u8, u8)>, d: impl Fn(u8) -> u8, e: u8,) {}";
    assert_eq!(length_breaches(&text("src/a.rs", &[five])), [""; 0]);
}

#[test]
fn unsafe_and_printing_are_seen_where_they_must_not_be() {
    let bare = text("src/machine/x.rs", &["fn f() {", "    unsafe { g() }", "}"]);
    assert_eq!(unsafe_breaches(&bare).len(), 1);
    let reasoned = [
        "fn f() {",
        "    // SAFETY: g has no rules.",
        "    unsafe { g() }",
        "}",
    ];
    assert_eq!(
        unsafe_breaches(&text("src/machine/x.rs", &reasoned)),
        [""; 0]
    );
    assert_eq!(
        unsafe_breaches(&text("src/engine/x.rs", &reasoned)).len(),
        1
    );
    let talk = [
        "// unsafe",
        "const A: &str = \"unsafe\";",
        "fn not_unsafe_code() {}",
    ];
    assert_eq!(unsafe_breaches(&text("src/engine/x.rs", &talk)), [""; 0]);
    let passed_on = text(
        "src/machine/x.rs",
        &["unsafe fn f();", "pub unsafe trait T {}"],
    );
    assert_eq!(unsafe_breaches(&passed_on), [""; 0]);
    let promised = text("src/machine/x.rs", &["unsafe impl Send for X {}"]);
    assert_eq!(unsafe_breaches(&promised).len(), 1);
    let print = ["fn f() { println!(\"x\"); eprint!(\"y\"); dbg!(1); }"];
    assert_eq!(printing_breaches(&text("src/plan.rs", &print)).len(), 3);
    assert_eq!(printing_breaches(&text("src/cli/plan.rs", &print)).len(), 1);
}

#[test]
fn bad_openings_and_unfinished_work_are_seen() {
    assert_eq!(
        opening_breaches(&text("src/a.rs", &["// A", "fn f() {}"])).len(),
        1
    );
    assert_eq!(opening_breaches(&text("src/a.rs", &["//! A"])), [""; 0]);
    let unfinished = [
        "fn f() { todo!() }",
        "// FIXME",
        "fn g() { unimplemented!(\"x\") }",
    ];
    assert_eq!(unfinished_breaches(&text("src/a.rs", &unfinished)).len(), 3);
    assert_eq!(
        unfinished_breaches(&text("src/a.rs", &["fn todo() {}"])),
        [""; 0]
    );
}
