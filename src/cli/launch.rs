//! Bringing a daemon up, in the foreground or in the background: what `attach` and `recover` share.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use indicatif::ProgressBar;
use nix::sys::prctl;
use nix::sys::signal::Signal;

use super::display;
use crate::control::{RunDir, Status};
use crate::daemon::{self, DaemonOptions, Observer};
use crate::ublk;

/// What a daemon says instead of its status when it did not come up. Its end may be long in coming: a
/// thread of it may hang in the kernel.
const FAILED: &str = "failed";

/// How a daemon is to run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Manner {
    /// Stay in the foreground and show progress
    #[arg(long)]
    pub(super) foreground: bool,
    /// Print the device's status as JSON when it is ready
    #[arg(long)]
    pub(super) json: bool,
    /// This is the background process (internal)
    #[arg(long, hide = true)]
    as_daemon: bool,
}

/// Runs a device as asked for; `options` is called in the process that becomes the daemon.
pub(super) fn launch(
    manner: Manner,
    verbose: u8,
    options: impl FnOnce() -> anyhow::Result<DaemonOptions>,
) -> anyhow::Result<ExitCode> {
    if manner.foreground {
        daemon::run(&options()?, &mut Terminal { json: manner.json, bar: None })?;
        return Ok(ExitCode::SUCCESS);
    }
    if manner.as_daemon {
        let result = options().and_then(run_in_background);
        if let Err(error) = &result {
            eprintln!("blkferry: {}", super::one_line(error));
            // Whoever started it ends when it hears this, or is gone already.
            let _ = prctl::set_pdeathsig(None);
            let _ = writeln!(io::stdout(), "{FAILED}");
            return Ok(ExitCode::FAILURE);
        }
        return Ok(ExitCode::SUCCESS);
    }
    start_in_background(manner, verbose)
}

fn run_in_background(options: DaemonOptions) -> anyhow::Result<()> {
    // A session of its own: the terminal's signals and its end are none of the daemon's business.
    nix::unistd::setsid().map_err(io::Error::from).context("cannot start a session")?;
    // Until it is ready it is somebody's command, who may think better of it.
    prctl::set_pdeathsig(Signal::SIGTERM).map_err(io::Error::from).context("cannot follow who started this")?;
    let log = RunDir::open()?.log_file(&options.name);
    Ok(daemon::run(&options, &mut Background { log })?)
}

/// Starts this program again as the daemon, and waits until it has said that the device is ready.
fn start_in_background(manner: Manner, verbose: u8) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    // Behind `--` there are no options.
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    args.insert(end, "--as-daemon".into());
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped());
    if verbose == 0 && std::env::var_os("BLKFERRY_LOG").is_none() {
        // The daemon's errors come through; what it does on the way up is of interest in its log only.
        command.env("BLKFERRY_LOG", "info");
    }
    ublk::keep_descriptors();
    let mut child = command.spawn().context("cannot start the daemon")?;
    let mut line = String::new();
    let said = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
    // It has said on standard error what is wrong.
    if line.trim_end() == FAILED {
        return Ok(ExitCode::FAILURE);
    }
    if line.is_empty() || said.is_none_or(|result| result.is_err()) {
        let code = child.wait().context("cannot wait for the daemon")?.code();
        return Ok(ExitCode::from(code.and_then(|c| u8::try_from(c).ok()).filter(|&c| c > 0).unwrap_or(1)));
    }
    let status: Status = serde_json::from_str(&line).context("the daemon's first words cannot be read")?;
    say_ready(&status, manner.json)?;
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
        prctl::set_pdeathsig(None)?;
        let mut out = io::stdout();
        writeln!(out, "{}", serde_json::to_string(status)?)?;
        out.flush()?;
        std::env::set_current_dir("/")?;
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.log)?;
        nix::unistd::dup2_stderr(&log)?;
        super::log::with_time();
        nix::unistd::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
        Ok(())
    }

    fn tick(&mut self, _status: &Status) {}
}
