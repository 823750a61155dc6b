//! `blkferry verify`

use std::process::ExitCode;

use super::display;
use crate::control::{Client, Request, RunDir};
use crate::device::{VerifyProgress, VerifyReport};

/// Compare a device with its source, block for block
///
/// By hash if the source is a blkferry export, by reading it if not. Blocks that were written here, and blocks
/// that are not here yet, are left out and counted. Exits with 0 if nothing differs.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The device
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&RunDir::find()?, &args.name)?;
    let bar = display::bar(1).with_prefix("verify");
    let report: VerifyReport = client.ask(&Request::Verify, |value| {
        if let Ok(progress) = serde_json::from_value::<VerifyProgress>(value) {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
            bar.set_message(format!(
                "{}, {} to go",
                display::rate(bar.per_sec()),
                display::seconds(bar.eta().as_secs_f64())
            ));
        }
    })?;
    bar.finish_and_clear();
    let same = report.different_bytes == 0;
    if args.json {
        outln!("{}", serde_json::to_string(&report)?);
    } else {
        let bytes = display::bytes;
        let verdict = match (same, report.same_bytes) {
            (true, 0) => format!("nothing could be compared: {}", why_nothing(&report)),
            (true, _) => format!("nothing differs (compared by {})", report.method),
            (false, _) => format!("DIFFERENT (compared by {})", report.method),
        };
        outln!("{}: {verdict}", args.name);
        outln!("  same       {}", bytes(report.same_bytes));
        outln!("  different  {}", bytes(report.different_bytes));
        outln!("  left out   {} written here, {} not here yet", bytes(report.dirty_bytes), bytes(report.absent_bytes));
        outln!("  received   {}", bytes(report.received_bytes));
        for offset in &report.first_differences {
            outln!("  differs at {offset}");
        }
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn why_nothing(report: &VerifyReport) -> &'static str {
    match (report.dirty_bytes, report.absent_bytes) {
        (0, _) => "no block is here yet",
        (_, 0) => "all blocks were written here",
        _ => "each block was written here, or is not here yet",
    }
}
