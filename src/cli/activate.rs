//! `blkferry activate`

use std::process::ExitCode;
use std::time::Duration;

use super::migrate::duration;
use crate::control::RunDir;
use crate::migrate::activate_all;

/// Take over the disk of a device in standby, so that a machine can use it here
///
/// The source keeps all writers out, syncs, and gives the disk away; from then on it can be written here and not there.
/// Several devices are taken over all together or not at all: give the names of all disks of a machine. A device that is
/// active already stays so.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The devices
    #[arg(required = true)]
    names: Vec<String>,
    /// How long to wait for somebody who still writes at the source, or for a source that does not answer
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "10s")]
    wait: Duration,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut names = Vec::new();
    for name in &args.names {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let taken = activate_all(&RunDir::find()?, &names, args.wait).map_err(anyhow::Error::msg)?;
    for (name, taken) in names.iter().zip(&taken) {
        let already = if taken.already { "already " } else { "" };
        outln!("{name}: {already}active, in epoch {}; the source must not be written any more", taken.epoch);
        if let Some(warning) = &taken.warning {
            log::warn!("{name}: {warning}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
