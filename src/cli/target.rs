//! `ublk add -t ferry`: the device behind the command line of ublksrv.
//!
//! `ublk` starts this program in the background, with nothing open but a descriptor, and waits until the
//! device's id comes through that. So whatever is to be said goes into the log.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use super::attach::name_of;
use crate::control::{RunDir, Status, check_name};
use crate::daemon::{self, DaemonOptions, Observer, OnLoss, UblkOptions};
use crate::device::Mode;
use crate::nbd::Uri;
use crate::ublk::{self, MAX_DEPTH, MAX_QUEUES};

/// A disk whose blocks are still elsewhere, as a target of ublksrv's `ublk`.
#[derive(Debug, Parser)]
#[command(name = "ublk", version, max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a device
    Add(Add),
    /// Take over a device whose daemon died
    Recover(Recover),
    /// Show how a device is made
    Help(Help),
}

#[derive(Debug, clap::Args)]
struct Add {
    /// The target: ferry
    #[arg(short = 't', long = "type", value_name = "ferry", value_parser = ["ferry"])]
    _kind: String,
    /// What becomes the disk: a file, made if it is not there, or a block device
    #[arg(short, long, value_name = "CACHE")]
    file: PathBuf,
    /// Where absent blocks come from: an NBD URI
    #[arg(long, value_name = "URI")]
    source: Uri,
    /// Name for `blkferry status` and others [default: the cache's file name without its extension, with - for what
    /// cannot be in a name]
    #[arg(long, value_parser = check_name)]
    name: Option<String>,
    /// Fetch in the background: auto, off, or at most RATE bytes a second
    #[arg(long, value_name = "auto|off|RATE", default_value = "auto")]
    hydrate: Mode,
    /// While the source is lost, requests for absent blocks wait, or fail after DURATION (30s)
    #[arg(long, value_name = "wait|fail-after:DURATION", default_value = "wait")]
    on_source_loss: OnLoss,
    /// The N of /dev/ublkbN [default: the first that is free]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    number: Option<i64>,
    /// Hardware queues
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    queues: u16,
    /// Requests that each queue takes at a time
    #[arg(short, long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=MAX_DEPTH as i64))]
    depth: u16,
    /// As ublksrv has it; a ferried disk can always be recovered
    #[arg(short = 'r', long = "user_recovery", value_name = "0|1", num_args = 0..=1)]
    _recovery: Option<Option<u8>>,
    /// As ublksrv has it; a ferried disk always issues requests again
    #[arg(short = 'i', long = "user_recovery_reissue", value_name = "0|1", num_args = 0..=1)]
    _reissue: Option<Option<u8>>,
    /// Descriptor for the device's id (ublk gives it)
    #[arg(long, value_name = "FD")]
    eventfd: Option<i32>,
}

#[derive(Debug, clap::Args)]
struct Recover {
    /// The N of /dev/ublkbN
    #[arg(short, long, value_name = "N")]
    number: u32,
    /// The target: ferry
    #[arg(short = 't', long = "type", value_name = "ferry", value_parser = ["ferry"])]
    _kind: Option<String>,
    /// Descriptor for the device's id (ublk gives it)
    #[arg(long, value_name = "FD")]
    eventfd: Option<i32>,
}

#[derive(Debug, clap::Args)]
struct Help {
    /// The target: ferry
    #[arg(short = 't', long = "type", value_name = "ferry")]
    _kind: Option<String>,
}

/// Parses ublksrv's command line and does what it says.
pub fn run_target() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // The help goes to standard output, and neither can be helped if it is closed.
            let _ = e.print();
            return ExitCode::from(e.exit_code().clamp(0, 255) as u8);
        }
    };
    super::log::init(0);
    let result = match cli.verb {
        Verb::Add(add) => serve(add.eventfd, || Ok(add_options(&add))),
        Verb::Recover(recover) => serve(recover.eventfd, || recover_options(recover.number)),
        Verb::Help(_) => help(),
    };
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{}", super::one_line(&error));
            ExitCode::FAILURE
        }
    };
    super::log::conclude();
    code
}

fn help() -> anyhow::Result<()> {
    use clap::CommandFactory;
    let mut cli = Cli::command();
    cli.build();
    let add = cli.find_subcommand_mut("add").context("there is no verb add")?;
    Ok(add.print_help()?)
}

fn add_options(add: &Add) -> DaemonOptions {
    DaemonOptions {
        standby: None,
        export: None,
        source: add.source.clone(),
        cache: add.file.clone(),
        metadata: None,
        name: add.name.clone().unwrap_or_else(|| name_of(&add.file)),
        socket: None,
        socket_owner: None,
        hydrate: add.hydrate,
        on_source_loss: add.on_source_loss,
        block_bytes: None,
        forget_unflushed: false,
        no_source: false,
        overwrite: false,
        ublk: Some(UblkOptions {
            // ublksrv says -1 for any.
            id: add.number.and_then(|n| u32::try_from(n).ok()),
            queues: add.queues,
            depth: add.depth,
            logical_bytes: None,
            ublksrv: true,
            recover: None,
        }),
    }
}

fn recover_options(id: u32) -> anyhow::Result<DaemonOptions> {
    let run = RunDir::find()?;
    let entries = run.entries().context("the run directory cannot be read")?;
    let entry = entries.into_iter().map(|(entry, _)| entry).find(|e| e.ublk.as_ref().is_some_and(|u| u.id == id));
    let name = entry.with_context(|| format!("/dev/ublkb{id} is none of blkferry's devices"))?.name;
    Ok(daemon::recovery_of(&run, &name)?)
}

fn serve(eventfd: Option<i32>, options: impl FnOnce() -> anyhow::Result<DaemonOptions>) -> anyhow::Result<()> {
    let listener = eventfd.map(ublk::inherited).transpose().context("--eventfd")?;
    let options = options()?;
    if listener.is_some() {
        let log = RunDir::open()?.log_file(&options.name);
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(log)?;
        nix::unistd::dup2_stderr(&log)?;
        super::log::with_time();
    }
    Ok(daemon::run(&options, &mut Target { listener })?)
}

/// Whoever runs `ublk add` waits for the id.
struct Target {
    listener: Option<File>,
}

impl Observer for Target {
    fn ready(&mut self, status: &Status) -> io::Result<()> {
        let Some(mut listener) = self.listener.take() else {
            super::say(format_args!("{}: ready at {}", status.name, status.frontend.uri))?;
            return super::tell_service_manager(&format!("serving {}", status.frontend.uri));
        };
        std::env::set_current_dir("/")?;
        let id = status.frontend.uri.trim_start_matches("/dev/ublkb").parse::<u64>().map_err(io::Error::other)?;
        listener.write_all(&(id + 1).to_ne_bytes())
    }

    fn tick(&mut self, _status: &Status) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_ublksrvs() {
        let line = "ublk.ferry add -t ferry -f c.raw --source nbd://h/x -n -1 -q 2 -d 64 -r 1 --eventfd 7";
        let Verb::Add(add) = parse(line).unwrap().verb else { panic!("add") };
        assert_eq!(add.eventfd, Some(7));
        let options = add_options(&add);
        let ublk = options.ublk.unwrap();
        assert_eq!((ublk.id, ublk.queues, ublk.depth), (None, 2, 64));
        assert_eq!(options.name, "c");
        let recover = parse("ublk.ferry recover -n 3 --eventfd 5").unwrap().verb;
        assert!(matches!(recover, Verb::Recover(Recover { number: 3, eventfd: Some(5), .. })));
        assert!(matches!(parse("ublk.ferry help -t ferry").unwrap().verb, Verb::Help(_)));
        assert!(parse("ublk.ferry add -t loop -f c.raw --source nbd://h/x").is_err());
    }
}
