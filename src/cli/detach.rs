//! `blkferry detach`

use std::process::ExitCode;

use super::display;
use crate::control::{Client, ControlError, Detached, Request, RunDir};
use crate::daemon;

/// End a device
///
/// Exits with 0 only if the source is no longer needed: all blocks are here and committed, and the cache is a
/// plain raw image; or the disk was given to the next host, and that one has all of it. With --incomplete it ends in any
/// case; attach the same cache again to go on.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Also if blocks are still at the source only
    #[arg(long)]
    incomplete: bool,
    /// Forget a device whose daemon was killed. Its cache stays as it is. With --json: {"forgotten": NAME}. A device
    /// whose daemon lives is detached as without --force
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let run = RunDir::find()?;
    let request = Request::Detach { incomplete: args.incomplete };
    let asked = Client::connect(&run, &args.name).and_then(|mut client| client.ask(&request, |_| {}));
    let detached: Detached = match asked {
        Err(ControlError::NotRunning(name)) if args.force => {
            if !daemon::forget(&run, &name)? {
                return Err(ControlError::NotRunning(name).into());
            }
            match args.json {
                true => outln!("{}", serde_json::json!({ "forgotten": name })),
                false => outln!("{name}: forgotten; its cache is as it was"),
            }
            return Ok(ExitCode::SUCCESS);
        }
        other => other?,
    };
    if args.json {
        outln!("{}", serde_json::to_string(&detached)?);
    } else if detached.given_away {
        let rest = if args.incomplete {
            "if that host still fetches from here, attach it again"
        } else {
            "which has all of it"
        };
        outln!(
            "{}: detached; the disk was given to the next host, {rest}: {} is not the disk any more",
            args.name,
            detached.cache
        );
    } else if detached.complete {
        outln!("{}: complete; the source is no longer needed, {} is a raw image", args.name, detached.cache);
    } else {
        let absent = display::bytes(detached.absent_bytes);
        outln!(
            "{}: detached, incomplete: {absent} are still at the source; attach {} again to go on",
            args.name,
            detached.cache
        );
    }
    Ok(ExitCode::SUCCESS)
}
