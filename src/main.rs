//! The program: read the command line, run the command, say how it ended.

use loadmaster::cli::args::Cli;
use loadmaster::cli::commands::dispatch;
use loadmaster::cli::failure::{Failure, is_request, stop_on_signals};
use loadmaster::machine::os;
use std::process::ExitCode;

fn main() -> ExitCode {
    os::keep_heap_small();
    let json = std::env::args_os().any(|word| word == "--json");
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) if is_request(&error) => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&Failure::from_clap(&error), json),
    };
    match stop_on_signals().and_then(|stop| dispatch(cli, &stop)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure, json),
    }
}

fn fail(failure: &Failure, json: bool) -> ExitCode {
    failure.tell(json);
    failure.exit_code()
}
