//! `blkferry migrate`

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::display;
use crate::control::RunDir;
use crate::daemon::wait_for_stop_signal;
use crate::migrate::plan::Step;
use crate::migrate::{Driver, Limits, Memory, Moments, Outcome, Places, Prepared, Real, Report, Watcher};
use crate::qmp::Address;
use crate::size::{ParseDurationError, parse_duration};

/// Move a running QEMU guest to this host, with its disks
///
/// Run it on the destination, where a second QEMU with the same machine waits (-incoming defer -S) on devices in
/// standby (`blkferry attach --standby`). The guest's memory moves first; then the disks change hands, all together;
/// then the guest goes on here, and its blocks follow. If anything fails before that, the guest goes on at the source as
/// if nothing had been. Once the disks have changed hands it can only run here, and this says how if it could not start it.
///
/// If it was killed or gave up in the middle: run the same command again. It looks at everything and goes on from there, or
/// says what to do.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example, on host B; the source's QMP socket comes through ssh:\n  \
    ssh -fNL /run/a.qmp:/run/qemu/web.qmp hostA\n  \
    blkferry attach --standby nbd://hostA/ disk.raw --name web --frontend nbd\n  \
    qemu-system-x86_64 … -drive 'id=disk0,file=nbd+unix:///?socket=/run/blkferry/web.nbd,format=raw…' \\\n      \
    -qmp unix:/run/b.qmp,server=on,wait=off -incoming defer -S\n  \
    blkferry migrate --from /run/a.qmp --to /run/b.qmp --uri tcp:hostB:4444 --disk disk0=web")]
pub(super) struct Args {
    /// QMP socket of the source's QEMU: a path, unix:PATH, or HOST:PORT
    #[arg(long, value_name = "QMP")]
    from: Address,
    /// QMP socket of the destination's QEMU
    #[arg(long, value_name = "QMP")]
    to: Address,
    /// Where the source sends the guest's memory, in QEMU's words: tcp:HOST:PORT, unix:PATH, …
    #[arg(long, value_name = "MIGRATION_URI")]
    uri: Option<String>,
    /// Where the destination listens for it, if not at --uri
    #[arg(long, value_name = "MIGRATION_URI")]
    listen: Option<String>,
    /// A disk of the machine (its drive, block node or device), and the device in standby that takes it over. May be given
    /// more than once: each writable disk has to be named
    #[arg(long = "disk", value_name = "DRIVE=NAME", required = true, value_parser = pair)]
    disks: Vec<(String, String)>,
    /// A writable disk that needs no device: both hosts reach it, or its contents travel with the memory
    #[arg(long, value_name = "DRIVE")]
    leave: Vec<String>,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Give up if the memory has not arrived after so long (5m); the guest stays at the source [default: as long as it takes]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    /// Give up if nothing of the memory could be sent for so long, as over a network that has fallen silent; the guest stays
    /// at the source
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    stall_timeout: Duration,
    /// Give up if the last of it, for which the guest stands still, has not arrived after so long
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "60s")]
    switchover_timeout: Duration,
    /// Print what was done and how long it took as JSON
    #[arg(long)]
    json: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((drive, name)) if !drive.is_empty() && !name.is_empty() => Ok((drive.into(), name.into())),
        _ => Err("write DRIVE=NAME, such as disk0=web".into()),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, ParseDurationError> {
    parse_duration(text)
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let interrupt = interrupted.clone();
    wait_for_stop_signal(move || interrupt.store(true, Ordering::Relaxed))?;
    let places = Places {
        from: args.from.clone(),
        to: args.to.clone(),
        uri: args.uri.clone(),
        listen: args.listen.clone(),
        disks: args.disks.clone(),
        leave: args.leave.clone(),
    };
    let (mut real, prepared) = Real::prepare(RunDir::find()?, places.clone()).map_err(anyhow::Error::msg)?;
    judge(&prepared)?;
    let limits = Limits { memory: args.timeout, stall: args.stall_timeout, switchover: args.switchover_timeout };
    if args.dry_run {
        let report = real.report(None, None, &Moments::default());
        return if args.json { print_json(&report) } else { print_checked(&prepared) };
    }
    let mut driver = Driver::new(&mut real, limits, prepared.is_to_run, interrupted);
    let mut progress = Progress::new(places.disks.len());
    let outcome = driver.run(&mut progress);
    progress.bar.finish_and_clear();
    let moments = driver.moments().clone();
    let why = match &outcome {
        Outcome::Moved => None,
        Outcome::Stayed(why) => Some(format!("the guest stays at the source, with its disks: {why}")),
        Outcome::Stuck(stuck) => Some(stuck.advice(&places)),
        Outcome::Abandoned => Some("ended from outside".into()),
    };
    let report = real.report(Some(&outcome), why.clone(), &moments);
    if args.json {
        print_json(&report)?;
    } else if why.is_none() {
        print(&report, prepared.is_to_run)?;
    }
    for warning in report.disks.iter().filter_map(|disk| disk.warning.as_deref()) {
        log::warn!("{warning}");
    }
    why.map_or(Ok(ExitCode::SUCCESS), |why| Err(anyhow::Error::msg(why)))
}

/// All that does not fit in one line.
fn judge(prepared: &Prepared) -> anyhow::Result<()> {
    if prepared.problems.is_empty() {
        return Ok(());
    }
    bail!("{}", prepared.problems.join("; "));
}

fn print_json(report: &Report) -> anyhow::Result<ExitCode> {
    outln!("{}", serde_json::to_string(report)?);
    Ok(ExitCode::SUCCESS)
}

fn print_checked(prepared: &Prepared) -> anyhow::Result<ExitCode> {
    for line in &prepared.lines {
        outln!("{line}");
    }
    outln!("{}", if prepared.midway { "under way: the same command without --dry-run goes on" } else { "all fits" });
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Report, runs: bool) -> anyhow::Result<()> {
    let looks: Vec<_> = report.disks.iter().map(|disk| format!("blkferry status {} --watch", disk.name)).collect();
    let stood = report.downtime_ms.map_or_else(String::new, |ms| format!(", it stood still for {ms:.0} ms"));
    let is = if runs { "runs" } else { "is (paused, as it was)" };
    outln!("the guest {is} here{stood}; its blocks follow: {}", looks.join(", "));
    for phase in &report.phases {
        outln!("  {:<11}{:>9.0} ms", phase.phase, phase.ms);
    }
    outln!("  memory     {} sent", display::bytes(report.memory.transferred_bytes));
    Ok(())
}

/// What is going on, on a terminal.
struct Progress {
    bar: ProgressBar,
    disks: usize,
}

impl Progress {
    fn new(disks: usize) -> Self {
        let style = ProgressStyle::with_template("{prefix:>11} {msg}").expect("the template is a constant");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style);
        Self { bar, disks }
    }
}

impl Watcher for Progress {
    fn before(&mut self, step: &Step, memory: Memory) -> ControlFlow<()> {
        let disks = if self.disks == 1 { "the disk".to_owned() } else { format!("all {} disks", self.disks) };
        let sent = || {
            let (bytes, rate) = (display::bytes, display::rate(memory.rate_bytes_per_s));
            format!("{} sent, {} to go, {rate}", bytes(memory.transferred_bytes), bytes(memory.remaining_bytes))
        };
        let (phase, words) = match step {
            Step::Start => ("prepare", "the migration is started".to_owned()),
            Step::WaitMemory => ("memory", sent()),
            Step::Continue | Step::WaitSwitchover => ("switchover", "the guest stands still".to_owned()),
            Step::WaitDisks(why) => ("take", why.clone()),
            Step::Take => ("take", format!("{disks} from the source")),
            Step::Activate => ("activate", disks),
            Step::StartGuest | Step::Done => ("start", "the guest goes on here".to_owned()),
            Step::Cancel(why) | Step::Back(why) => ("back", why.clone()),
            Step::Stuck(_) => return ControlFlow::Continue(()),
        };
        self.bar.set_prefix(phase);
        self.bar.set_message(words);
        ControlFlow::Continue(())
    }
}
