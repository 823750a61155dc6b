//! What `ublk add -t ferry` runs, installed as `ublk.ferry` beside ublksrv's `ublk`.

use std::process::ExitCode;

fn main() -> ExitCode {
    blkferry::cli::run_target()
}
