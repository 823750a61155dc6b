//! `blkferry recover`

use std::process::ExitCode;

use super::launch::{Manner, launch};
use crate::control::RunDir;
use crate::daemon;

/// Take over a block device whose daemon was killed
///
/// A ublk device outlives its daemon: its users wait. This starts another daemon for it, with the same cache and
/// the same source and what was set last, and what waited goes on. `blkferry list` shows such devices as dead.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    #[command(flatten)]
    manner: Manner,
}

pub(super) fn run(args: &Args, verbose: u8) -> anyhow::Result<ExitCode> {
    launch(args.manner, verbose, || Ok(daemon::recovery_of(&RunDir::find()?, &args.name)?))
}
