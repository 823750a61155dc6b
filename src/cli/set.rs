//! `blkferry set`

use std::process::ExitCode;

use crate::control::{Client, Request, RunDir, SETTINGS};
use crate::daemon::OnLoss;
use crate::device::Mode;
use crate::nbd::Address;

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
    #[arg(value_name = "KEY=VALUE", required = true, value_parser = setting)]
    settings: Vec<Setting>,
}

#[derive(Clone, Debug)]
struct Setting {
    key: String,
    value: String,
}

/// As the daemon would read it, so that nothing is changed if one of several cannot be.
fn setting(text: &str) -> Result<Setting, String> {
    let Some((key, value)) = text.split_once('=') else {
        return Err("write KEY=VALUE, such as hydrate=off".into());
    };
    match key {
        "hydrate" => value.parse::<Mode>().map(drop).map_err(|e| e.to_string())?,
        "on-source-loss" => value.parse::<OnLoss>().map(drop).map_err(|e| e.to_string())?,
        "export" if value == "off" => {}
        "export" => value.parse::<Address>().map(drop).map_err(|e| e.to_string())?,
        _ => return Err(format!("there is no setting {key:?}; use {SETTINGS}")),
    }
    Ok(Setting { key: key.into(), value: value.into() })
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&RunDir::find()?, &args.name)?;
    for Setting { key, value } in &args.settings {
        let request = Request::Set { key: key.clone(), value: value.clone() };
        let now: String = client.ask(&request, |_| {})?;
        outln!("{}: {key}={now}", args.name);
    }
    Ok(ExitCode::SUCCESS)
}
