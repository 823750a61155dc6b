//! `blkferry set`

use std::process::ExitCode;

use anyhow::bail;

use crate::control::{Client, Request, RunDir};

/// Change a setting of a running device
///
/// hydrate=auto|off|RATE fetches in the background as fast as it goes, not at all, or at most RATE bytes a second.
/// on-source-loss=wait lets requests for absent blocks wait while the source is lost, fail-after:DURATION (30s) fails them
/// when that has lasted so long. export=HOST:PORT or export=unix:PATH offers the device to other hosts there, export=off no
/// more. Whoever takes over a block device whose daemon was killed (`blkferry recover`) goes on with what was set.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// What to change
    #[arg(value_name = "KEY=VALUE", required = true)]
    settings: Vec<String>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&RunDir::open()?, &args.name)?;
    for setting in &args.settings {
        let Some((key, value)) = setting.split_once('=') else {
            bail!("{setting:?} is no setting: write KEY=VALUE, such as hydrate=off");
        };
        let request = Request::Set { key: key.into(), value: value.into() };
        let now: String = client.ask(&request, |_| {})?;
        outln!("{}: {key}={now}", args.name);
    }
    Ok(ExitCode::SUCCESS)
}
