//! The `blkferry` command: parse, call, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    match blkferry::cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("blkferry: {}", blkferry::cli::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
