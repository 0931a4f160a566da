//! How a run of the program ends badly: kind, message, way out, exit code; and how a signal asks it to
//! end early. Never what went wrong in particular: that is said where it happens.

use serde::Serialize;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Names the document that `--json` prints for a failure.
pub const ERROR_SCHEMA: &str = "loadmaster.error/1";
/// What a failure exits with; the command line's own errors have 2.
const FAILED_CODE: u8 = 1;
const USAGE_CODE: u8 = 2;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureKind {
    /// The command line asks for something that cannot be.
    Usage,
    /// It could not be done.
    Failed,
}

/// Why the program ends with an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
    pub hint: Option<String>,
    /// stdout has its one document already.
    pub documented: bool,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    kind: FailureKind,
    message: &'a str,
    hint: Option<&'a str>,
}

impl Failure {
    pub fn usage(message: impl fmt::Display) -> Failure {
        Failure::new(FailureKind::Usage, message)
    }

    pub fn failed(message: impl fmt::Display) -> Failure {
        Failure::new(FailureKind::Failed, message)
    }

    fn new(kind: FailureKind, message: impl fmt::Display) -> Failure {
        Failure {
            kind,
            message: one_line(&message.to_string()),
            hint: None,
            documented: false,
        }
    }

    pub fn with_hint(mut self, hint: impl fmt::Display) -> Failure {
        self.hint = Some(one_line(&hint.to_string()));
        self
    }

    /// Whose failure it is, of several.
    pub fn of(mut self, whose: &str) -> Failure {
        self.message = format!("{whose}: {}", self.message);
        self
    }

    /// With `json`, a document on stdout tells of this failure already: no second one is printed.
    pub fn after_document(mut self, json: bool) -> Failure {
        self.documented = json;
        self
    }

    /// What clap refused. Requests for help or the version are no failure: see `is_request`.
    pub fn from_clap(error: &clap::Error) -> Failure {
        if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            let commands = "`loadmaster --help` and `loadmaster store --help` list the commands";
            return Failure::usage("the command is missing").with_hint(commands);
        }
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let (body, rest) = text.split_once("\n\nUsage:").unwrap_or((text, ""));
        let body = body
            .split("\n\nFor more information")
            .next()
            .unwrap_or(body);
        let mut parts = body.split("\n\n").map(one_line);
        let failure = Failure::usage(parts.next().unwrap_or_default());
        let tips = parts.map(|tip| tip.trim_start_matches("tip: ").to_owned());
        let usage = rest.lines().next().map(|usage| format!("usage:{usage}"));
        // Errors across flags know no command: their usage line would say nothing.
        let usage = usage.filter(|usage| !usage.ends_with("loadmaster <COMMAND>"));
        let hints: Vec<String> = tips.chain(usage).collect();
        if hints.is_empty() {
            let unknown = error.kind() == clap::error::ErrorKind::InvalidSubcommand;
            let commands = "`loadmaster --help` lists the commands";
            return if unknown {
                failure.with_hint(commands)
            } else {
                failure
            };
        }
        failure.with_hint(hints.join("; "))
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            FailureKind::Usage => USAGE_CODE,
            FailureKind::Failed => FAILED_CODE,
        })
    }

    /// The document of schema `loadmaster.error/1`.
    pub fn to_json(&self) -> String {
        let document = Document {
            schema: ERROR_SCHEMA,
            kind: self.kind,
            message: &self.message,
            hint: self.hint.as_deref(),
        };
        serde_json::to_string_pretty(&document).expect("a failure is plain text")
    }

    /// Lines for stderr: the hint, then the error as the last one.
    pub fn to_text(&self) -> String {
        let hint = self.hint.iter().map(|hint| format!("hint: {hint}\n"));
        hint.chain([format!("error: {}\n", self.message)]).collect()
    }

    /// Tells stderr, and with `--json` stdout too. Closed streams are no reason to fail again.
    pub fn tell(&self, json: bool) {
        if json && !self.documented {
            let _ = writeln!(std::io::stdout(), "{}", self.to_json());
        }
        let _ = std::io::stderr().write_all(self.to_text().as_bytes());
    }
}

/// True where clap's "error" is its answer to --help or --version.
pub fn is_request(error: &clap::Error) -> bool {
    error.exit_code() == 0
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<anyhow::Error> for Failure {
    /// A `Failure` on its way through anyhow stays what it is; causes that a message already holds
    /// are not said twice.
    fn from(error: anyhow::Error) -> Failure {
        let error = match error.downcast::<Failure>() {
            Ok(failure) => return failure,
            Err(other) => other,
        };
        let mut message = String::new();
        for cause in error.chain().map(|cause| cause.to_string()) {
            if message.is_empty() {
                message = cause;
            } else if !message.contains(&cause) {
                message = format!("{message}: {cause}");
            }
        }
        Failure::failed(message)
    }
}

/// A flag that Ctrl-C, SIGTERM and SIGHUP set. A second signal ends the process at once: result lines
/// are written whole, so nothing is left half.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let on_signal = move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(FAILED_CODE));
        }
        let _ = writeln!(
            std::io::stderr(),
            "stopping after this pass; once more to stop at once"
        );
    };
    let why = |e| {
        Failure::failed(format!(
            "signals cannot be caught ({e}): run it as the main program"
        ))
    };
    ctrlc::set_handler(on_signal).map_err(why)?;
    Ok(stop)
}

/// This test program again, to run one test in the role that `variable` asks for.
#[cfg(all(test, unix))]
pub fn run_this_test(name: &str, variable: &str) -> std::process::Child {
    use std::process::Stdio;
    std::process::Command::new(std::env::current_exe().expect("a test program"))
        .args([name, "--nocapture", "--test-threads=1"])
        .env(variable, "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::Cli;
    use anyhow::Context;
    #[cfg(unix)]
    use std::io::{BufRead, BufReader};

    fn from_clap(line: &str) -> Failure {
        let error = Cli::read(line.split(' ')).expect_err(line);
        assert!(!is_request(&error));
        Failure::from_clap(&error)
    }

    #[test]
    fn the_last_line_is_the_error() {
        let failure = Failure::failed("disk\nfull").with_hint("free\nsome");
        assert_eq!(failure.to_text(), "hint: free some\nerror: disk full\n");
        assert_eq!(Failure::usage("no").to_text(), "error: no\n");
    }

    #[test]
    fn refused_command_lines_are_usage_errors_in_one_line() {
        let failure = from_clap("loadmaster plan --model opt-1.3b --cpu-mem 16");
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(failure.message.contains("16GiB"), "{failure:?}");
        assert!(!failure.message.contains("For more"), "{failure:?}");
        let failure = from_clap("loadmaster plan --model opt-1.3b --cpu-memory 1GiB");
        let hint = failure.hint.clone().unwrap_or_default();
        assert!(
            hint.contains("--cpu-mem") && hint.contains("usage: loadmaster plan"),
            "{hint}"
        );
        assert!(
            failure
                .to_text()
                .trim_end()
                .lines()
                .last()
                .is_some_and(|l| l.starts_with("error: "))
        );
        let across = from_clap("loadmaster exec plan.toml --json");
        assert_eq!(across.hint, None);
        let help = Cli::read(["loadmaster", "--help"]).expect_err("help");
        assert!(is_request(&help));
    }

    #[test]
    fn the_document_has_its_keys_even_without_a_hint() {
        let document =
            |f: &Failure| serde_json::from_str::<serde_json::Value>(&f.to_json()).expect("JSON");
        let bare = document(&Failure::usage("\"no\""));
        let expected = serde_json::json!({
            "schema": "loadmaster.error/1", "kind": "usage", "message": "\"no\"", "hint": null
        });
        assert_eq!(bare, expected);
        let hinted = document(&Failure::failed("no").with_hint("yes"));
        assert_eq!(
            (hinted["kind"].as_str(), hinted["hint"].as_str()),
            (Some("failed"), Some("yes"))
        );
    }

    #[test]
    fn causes_are_said_once() {
        let io = || std::io::Error::other("disk full");
        let error = anyhow::Error::new(io())
            .context("p.toml: disk full")
            .context("plan");
        assert_eq!(Failure::from(error).message, "plan: p.toml: disk full");
        let error: Result<(), _> = Err(Failure::usage("bad").with_hint("good")).context("running");
        let failure = Failure::from(error.expect_err("an error"));
        assert_eq!(failure, Failure::usage("bad").with_hint("good"));
    }

    #[test]
    fn exit_codes_tell_usage_from_failure() {
        let code = |f: Failure| format!("{:?}", f.exit_code());
        assert_eq!(
            code(Failure::usage("x")),
            format!("{:?}", ExitCode::from(2))
        );
        assert_eq!(
            code(Failure::failed("x")),
            format!("{:?}", ExitCode::from(1))
        );
    }

    /// Runs itself again as the process that is signalled.
    #[cfg(unix)]
    #[test]
    fn the_first_signal_asks_and_the_second_ends() {
        const ROLE: &str = "LOADMASTER_TEST_SIGNALLED";
        if std::env::var_os(ROLE).is_some() {
            signalled_child();
        }
        for signal in ["INT", "TERM", "HUP"] {
            let mut child = run_this_test("failure::tests::the_first_signal", ROLE);
            let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
            let mut wait_for = |word: &str| {
                let found = lines.any(|line| line.is_ok_and(|l| l.contains(word)));
                assert!(found, "SIG{signal}: never said {word}");
            };
            wait_for("ready");
            send(signal, child.id());
            wait_for("asked");
            send(signal, child.id());
            assert_eq!(child.wait().expect("ended").code(), Some(1), "SIG{signal}");
        }
    }

    #[cfg(unix)]
    fn signalled_child() -> ! {
        let pause = || std::thread::sleep(std::time::Duration::from_millis(5));
        let say = |word: &str| writeln!(std::io::stdout(), "{word}").expect("heard");
        let stop = stop_on_signals().expect("the main program of its process");
        say("ready");
        (0..2000)
            .take_while(|_| !stop.load(Ordering::SeqCst))
            .for_each(|_| pause());
        say("asked");
        (0..2000).for_each(|_| pause());
        std::process::exit(3);
    }

    #[cfg(unix)]
    fn send(signal: &str, pid: u32) {
        let kill = format!("kill -{signal} {pid}");
        let status = std::process::Command::new("sh")
            .args(["-c", &kill])
            .status();
        assert!(status.expect("a shell").success());
    }
}
