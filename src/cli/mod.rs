//! The command line, one file a verb.

/// `println!` whose failure is an error and not a panic.
macro_rules! outln {
    ($($words:tt)*) => { $crate::cli::say(format_args!($($words)*))? };
}

mod abort;
mod activate;
mod attach;
mod detach;
mod display;
mod export;
mod generate;
mod launch;
mod list;
mod log;
mod migrate;
mod reclaim;
mod recover;
mod set;
mod status;
mod target;
mod verify;

pub use target::run_target;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Live storage migration: a block device whose blocks follow the machine that uses it.
///
/// Serve an image where it is (`export`), attach it where the machine is going to run (`attach`), and use
/// the device at once: blocks are fetched when they are read, the rest follows in the background, and what
/// is written here stays here. When every block has come, the cache is a plain raw image and the source
/// can be switched off.
#[derive(Debug, Parser)]
#[command(name = "blkferry", version, max_term_width = 100)]
#[command(after_help = "Example:\n  host A:  blkferry export disk.raw --listen 0.0.0.0:10809\n  \
    host B:  blkferry attach nbd://hostA/ disk.raw --name web --frontend nbd\n           \
    qemu-system-x86_64 … -drive 'file=nbd+unix:///?socket=/run/blkferry/web.nbd,format=raw'\n           \
    blkferry status web --watch\n           blkferry detach web")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Say more on standard error (repeat for still more). BLKFERRY_LOG=debug does the same
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Export(export::Args),
    Attach(attach::Args),
    List(list::Args),
    Status(status::Args),
    Set(set::Args),
    Detach(detach::Args),
    Verify(verify::Args),
    Recover(recover::Args),
    Migrate(migrate::Args),
    Activate(activate::Args),
    Abort(abort::Args),
    Reclaim(reclaim::Args),
    #[command(hide = true)]
    Generate(generate::Args),
}

/// Parses the command line and does what it says.
pub fn run() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    log::init(cli.verbose);
    let result = match &cli.verb {
        Verb::Export(args) => export::run(args),
        Verb::Attach(args) => attach::run(args, cli.verbose),
        Verb::List(args) => list::run(args),
        Verb::Status(args) => status::run(args),
        Verb::Set(args) => set::run(args),
        Verb::Detach(args) => detach::run(args),
        Verb::Verify(args) => verify::run(args),
        Verb::Recover(args) => recover::run(args, cli.verbose),
        Verb::Migrate(args) => migrate::run(args),
        Verb::Activate(args) => activate::run(args),
        Verb::Abort(args) => abort::run(args),
        Verb::Reclaim(args) => reclaim::run(args),
        Verb::Generate(args) => generate::run(args),
    };
    log::conclude();
    result
}

/// An error and its causes in one line. Most of our errors quote their cause themselves; it is not said twice.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', " ")
}

/// As a service of systemd's with Type=notify: it is up. Anywhere else this does nothing.
fn tell_service_manager(status: &str) -> std::io::Result<()> {
    sd_notify::notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(status)])
}

/// A line on standard output.
fn say(words: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{words}")
}
