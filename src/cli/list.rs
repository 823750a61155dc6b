//! `blkferry list`

use std::process::ExitCode;

use anyhow::Context;
use serde_json::json;

use super::display;
use crate::control::{Client, Request, RunDir, Status};

/// List the devices of this host
///
/// A device whose daemon was killed is listed as dead: attach its cache again, or forget it with `detach --force`.
/// A block device (ublk) that is dead waits for another daemon: `recover` starts one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let run = RunDir::find()?;
    let entries = run.entries().with_context(|| format!("cannot read {}", run.path().display()))?;
    let mut rows = Vec::new();
    for (entry, alive) in entries {
        let status: Option<Status> = alive
            .then(|| Client::connect(&run, &entry.name).and_then(|mut c| c.ask(&Request::Status, |_| {})).ok())
            .flatten();
        rows.push((entry, status));
    }
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(entry, status)| {
                let state = status.as_ref().map_or(json!("dead"), |s| json!(s.state));
                json!({ "name": entry.name, "state": state, "pid": entry.pid, "cache": entry.cache, "uri": entry.uri,
                        "device": entry.ublk.as_ref().map(|_| &entry.uri),
                        "bytes": status.as_ref().map(|s| &s.bytes) })
            })
            .collect();
        outln!("{}", serde_json::to_string(&rows)?);
        return Ok(ExitCode::SUCCESS);
    }
    if rows.is_empty() {
        outln!("no devices");
    }
    for (entry, status) in rows {
        match status {
            Some(s) => {
                let here = 100.0 * s.bytes.present as f64 / s.bytes.total as f64;
                outln!("{}  {}  {here:.0}% here  {}", s.name, display::bytes(s.bytes.total), display::headline(&s));
                outln!("    {}  cache {}", s.frontend.uri, s.cache.path);
            }
            None if entry.ublk.is_some() => {
                outln!(
                    "{0}  dead (its daemon was killed): {1} waits for `blkferry recover {0}`",
                    entry.name,
                    entry.uri
                );
                outln!("    cache {}", entry.cache.display());
            }
            None => outln!("{}  dead (its daemon was killed)  cache {}", entry.name, entry.cache.display()),
        }
    }
    Ok(ExitCode::SUCCESS)
}
