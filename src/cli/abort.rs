//! `blkferry abort`

use std::process::ExitCode;

use crate::control::{Client, Request, RunDir};

/// Call a handoff off: end a device in standby for good
///
/// What was taken from the source and not used is given back, so that the machine can go on there. Refused once the device
/// is active: then the disk is here.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    Client::connect(&RunDir::find()?, &args.name)?.ask::<()>(&Request::Abort, |_| {})?;
    outln!("{}: called off; the disk is the source's", args.name);
    Ok(ExitCode::SUCCESS)
}
