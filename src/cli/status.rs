//! `blkferry status`

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use super::display;
use crate::control::{Client, Request, RunDir, Status};

/// Show how a device is
///
/// The line "source" says whether the source may be switched off.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Print JSON
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Show progress until the device is complete
    #[arg(long)]
    watch: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&RunDir::find()?, &args.name)?;
    let status: Status = client.ask(&Request::Status, |_| {})?;
    if args.json {
        outln!("{}", serde_json::to_string(&status)?);
    } else if args.watch {
        watch(&mut client, status)?;
    } else {
        print(&status)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn watch(client: &mut Client, mut status: Status) -> anyhow::Result<()> {
    let bar = display::bar(status.bytes.total);
    let plain = !std::io::stderr().is_terminal();
    while status.source_needed && status.failure.is_none() {
        if plain {
            let (present, total) = (display::bytes(status.bytes.present), display::bytes(status.bytes.total));
            outln!("{}: {present} of {total}, {}", status.name, display::headline(&status));
        } else {
            display::show_on(&bar, &status);
        }
        std::thread::sleep(if plain { Duration::from_secs(1) } else { Duration::from_millis(250) });
        status = client.ask(&Request::Status, |_| {})?;
    }
    bar.finish_and_clear();
    print(&status)
}

fn print(s: &Status) -> anyhow::Result<()> {
    let bytes = display::bytes;
    outln!("{}: {}", s.name, display::headline(s));
    let users = match s.frontend.kind.as_str() {
        "ublk" => format!("{} queues of {}, {}", s.frontend.queues, s.frontend.depth, s.frontend.features.join(" ")),
        _ => format!("{} clients", s.frontend.clients),
    };
    outln!("  device    {} ({}, {users})", s.frontend.uri, bytes(s.bytes.total));
    outln!("  cache     {}", s.cache.path);
    outln!("  here      {} ({} written here)", bytes(s.bytes.present), bytes(s.blocks.dirty * s.blocks.size_bytes));
    outln!("  absent    {}", bytes(s.bytes.absent));
    outln!("  hydrate   {} ({})", s.hydrate.state, s.hydrate.mode);
    outln!("  received  {} ({} of it data)", bytes(s.wire.received_bytes), bytes(s.wire.data_bytes));
    outln!("  reads     {} from the cache, {} from the source", s.frontend.read_hits, s.frontend.read_misses);
    let needed = if s.source_needed { "still needed" } else { "no longer needed: it may be switched off" };
    outln!("  source    {} {needed}", s.source.uri);
    if let Some(reason) = &s.source.lost_reason {
        outln!("            lost: {reason}");
    }
    Ok(())
}
