//! `blkferry attach`

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use clap::ValueEnum;
use indicatif::ProgressBar;

use super::display;
use crate::control::{RunDir, Status};
use crate::daemon::{self, DaemonOptions, Observer, OnLoss};
use crate::device::Mode;
use crate::nbd::Uri;
use crate::size::{ParseSizeError, parse_size};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Frontend {
    /// The best there is: NBD.
    Auto,
    /// An NBD export on a unix socket.
    Nbd,
}

/// Attach a disk whose blocks are still elsewhere
///
/// SOURCE is an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; a blkferry export, or any
/// other NBD server. CACHE is the file (made sparse if it is not there) or block device that becomes the disk;
/// its metadata is kept beside it in CACHE.ferry. Attach an existing cache again, and it goes on where it was.
///
/// Returns as soon as the device can be used, and prints the URI under which QEMU, fio and other NBD clients
/// find it; the daemon goes on in the background.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where absent blocks come from
    source: Uri,
    /// What becomes the disk
    cache: PathBuf,
    /// Name of the device [default: the cache's file name without its extension]
    #[arg(long)]
    name: Option<String>,
    /// How the guest reaches the device
    #[arg(long, value_enum, default_value_t = Frontend::Auto)]
    frontend: Frontend,
    /// Path of the NBD socket [default: NAME.nbd in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Fetch in the background: auto, off, or at most RATE bytes a second (50M). Can be changed live with `set`
    #[arg(long, value_name = "auto|off|RATE", default_value = "auto")]
    hydrate: Mode,
    /// While the source is lost, requests for absent blocks wait, or fail after DURATION (30s). Can be changed live
    #[arg(long, value_name = "wait|fail-after:DURATION", default_value = "wait")]
    on_source_loss: OnLoss,
    /// Block size of a new cache: a power of two from 4K to 1M [default: 4K]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    block_size: Option<u64>,
    /// Where the metadata is [default: CACHE.ferry; under /var/lib/blkferry for a block device]
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Attach although a killed daemon's live map is gone: writes that were never flushed may be lost
    #[arg(long)]
    forget_unflushed: bool,
    /// Make a new cache of a block device although there is something on it, which is lost then
    #[arg(long)]
    overwrite: bool,
    /// Stay in the foreground and show progress
    #[arg(long)]
    foreground: bool,
    /// Print the device's status as JSON when it is ready
    #[arg(long)]
    json: bool,
    /// This is the background process (internal)
    #[arg(long, hide = true)]
    as_daemon: bool,
}

fn size(text: &str) -> Result<u64, ParseSizeError> {
    parse_size(text)
}

pub(super) fn run(args: &Args, verbose: u8) -> anyhow::Result<ExitCode> {
    let name = args.name.clone().unwrap_or_else(|| name_of(&args.cache));
    if args.foreground {
        let mut observer = Terminal { json: args.json, bar: None };
        daemon::run(&options(args, name), &mut observer)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.as_daemon {
        // A session of its own: the terminal's signals and its end are none of the daemon's business.
        nix::unistd::setsid().map_err(io::Error::from).context("cannot start a session")?;
        let log = RunDir::open()?.log_file(&name);
        daemon::run(&options(args, name), &mut Background { log })?;
        return Ok(ExitCode::SUCCESS);
    }
    start_in_background(args, verbose)
}

fn options(args: &Args, name: String) -> DaemonOptions {
    DaemonOptions {
        source: args.source.clone(),
        cache: args.cache.clone(),
        metadata: args.metadata.clone(),
        name,
        socket: args.socket.clone(),
        hydrate: args.hydrate,
        on_source_loss: args.on_source_loss,
        block_bytes: args.block_size,
        forget_unflushed: args.forget_unflushed,
        overwrite: args.overwrite,
    }
}

/// A name out of a path: what cannot stand in a name becomes a dash.
fn name_of(cache: &std::path::Path) -> String {
    let stem = cache.file_stem().map_or_else(|| "disk".into(), |s| s.to_string_lossy().into_owned());
    let clean = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    stem.trim_start_matches(['.', '-']).chars().map(clean).take(48).collect()
}

/// Starts this program again as the daemon, and waits until it has said that the device is ready.
fn start_in_background(args: &Args, verbose: u8) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).arg("--as-daemon").stdin(Stdio::null()).stdout(Stdio::piped());
    if verbose == 0 && std::env::var_os("BLKFERRY_LOG").is_none() {
        // The daemon's errors come through; what it does on the way up is of interest in its log only.
        command.env("BLKFERRY_LOG", "info");
    }
    let mut child = command.spawn().context("cannot start the daemon")?;
    let mut line = String::new();
    let said = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
    if line.is_empty() || said.is_none_or(|result| result.is_err()) {
        // It has said on standard error what is wrong.
        let code = child.wait().context("cannot wait for the daemon")?.code();
        return Ok(ExitCode::from(code.and_then(|c| u8::try_from(c).ok()).filter(|&c| c > 0).unwrap_or(1)));
    }
    let status: Status = serde_json::from_str(&line).context("the daemon's first words cannot be read")?;
    say_ready(&status, args.json)?;
    Ok(ExitCode::SUCCESS)
}

fn say_ready(status: &Status, json: bool) -> io::Result<()> {
    let mut out = io::stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(status)?)?;
    } else {
        let (present, total) = (display::bytes(status.bytes.present), display::bytes(status.bytes.total));
        writeln!(out, "{}: ready at {} ({present} of {total} are here)", status.name, status.frontend.uri)?;
    }
    out.flush()
}

/// In the foreground: a line, then a bar.
struct Terminal {
    json: bool,
    bar: Option<ProgressBar>,
}

impl Observer for Terminal {
    fn ready(&mut self, status: &Status) -> io::Result<()> {
        self.bar = Some(display::bar(status.bytes.total));
        say_ready(status, self.json)?;
        super::tell_service_manager(&format!("serving {}", status.frontend.uri))
    }

    fn tick(&mut self, status: &Status) {
        if let Some(bar) = self.bar.as_ref().filter(|bar| !bar.is_finished()) {
            display::show_on(bar, status);
            if !status.source_needed {
                bar.finish();
            }
        }
    }
}

/// In the background: the first words go to the parent, everything after them into the log.
struct Background {
    log: PathBuf,
}

impl Observer for Background {
    fn ready(&mut self, status: &Status) -> io::Result<()> {
        let mut out = io::stdout();
        writeln!(out, "{}", serde_json::to_string(status)?)?;
        out.flush()?;
        std::env::set_current_dir("/")?;
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.log)?;
        nix::unistd::dup2_stderr(&log)?;
        super::log_with_time();
        nix::unistd::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
        Ok(())
    }

    fn tick(&mut self, _status: &Status) {}
}
