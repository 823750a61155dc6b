//! `blkferry attach`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;
use nix::unistd::User;

use super::launch::{Manner, launch};
use crate::control::{RunDir, check_name};
use crate::daemon::{self, DaemonOptions, OnLoss, Standby, UblkOptions};
use crate::device::Mode;
use crate::nbd::{Address, Uri};
use crate::size::parse_size;
use crate::ublk::{self, MAX_DEPTH, MAX_QUEUES};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Frontend {
    /// A block device if this host and this user can have one, else NBD.
    Auto,
    /// A block device of this host, /dev/ublkbN (Linux with ublk_drv, as root).
    Ublk,
    /// An NBD export on a unix socket.
    Nbd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Activate {
    /// When it is told to.
    Manual,
    /// With the guest's first write, which waits until the source has given the disk.
    OnWrite,
}

/// Attach a disk whose blocks are still elsewhere
///
/// SOURCE is an NBD URI: nbd://HOST[:PORT]/EXPORT or 'nbd+unix:///EXPORT?socket=PATH' (some shells want the quotes); a
/// blkferry export, or any other NBD server. CACHE is the file (made sparse if it is not there) or block device that
/// becomes the disk; its metadata is kept beside it in CACHE.ferry. Attach an existing cache again, and it goes on where
/// it was.
///
/// Returns as soon as the device can be used, and prints where: the path of a block device, or the URI under
/// which QEMU, fio and other NBD clients find it. The daemon goes on in the background.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where absent blocks come from
    source: Uri,
    /// What becomes the disk
    cache: PathBuf,
    /// Name of the device [default: the cache's file name without its extension, with - for what cannot be in a name]
    #[arg(long, value_parser = check_name)]
    name: Option<String>,
    /// How the guest reaches the device
    #[arg(long, value_enum, default_value_t = Frontend::Auto, env = "BLKFERRY_FRONTEND", hide_env_values = true)]
    frontend: Frontend,
    /// Path of the NBD socket [default: NAME.nbd in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// User to whom the NBD socket is given, such as QEMU's under libvirt: a name, or a number
    #[arg(long, value_name = "USER", value_parser = user)]
    socket_owner: Option<u32>,
    /// Hardware queues of the block device: at most one a CPU [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    queues: Option<u16>,
    /// Requests that each queue takes at a time [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_DEPTH as i64))]
    depth: Option<u16>,
    /// The N of /dev/ublkbN [default: the first that is free]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..1 << 20))]
    ublk_id: Option<u32>,
    /// Logical block size of the block device: 512 or 4096 [default: as the source has it]
    #[arg(long, value_name = "SIZE", value_parser = sector)]
    logical_block_size: Option<u64>,
    /// Fetch in the background: auto, off, or at most RATE bytes a second (50M). Can be changed live with `set`
    #[arg(long, value_name = "auto|off|RATE", default_value = "auto")]
    hydrate: Mode,
    /// While the source is lost, requests for absent blocks wait, or fail after DURATION (30s). Can be changed live
    #[arg(long, value_name = "wait|fail-after:DURATION", default_value = "wait")]
    on_source_loss: OnLoss,
    /// Block size of a new cache: a power of two from 4K to 1M [default: 4K]
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    block_size: Option<u64>,
    /// Where the metadata is [default: CACHE.ferry; under /var/lib/blkferry for a block device]
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Attach although a killed daemon's live map is gone: writes that were never flushed may be lost
    #[arg(long)]
    forget_unflushed: bool,
    /// Do without the source, for a cache that was given away: the disk has come home there, and what is not here is there.
    /// The host that has it fetches from here what was written here
    #[arg(long)]
    no_source: bool,
    /// If a block device of this name waits for its daemon, take it over, as `recover` does. For service managers
    #[arg(long)]
    recover: bool,
    /// Make a new cache of a block device although there is something on it, which is lost then
    #[arg(long)]
    overwrite: bool,
    /// Leave the disk with the source, which may go on writing to it, until `activate`: reads pass through, writes are
    /// refused, nothing is kept
    #[arg(long)]
    standby: bool,
    /// What ends standby: `blkferry activate`, or the guest's first write (for libvirt, which tells nobody)
    #[arg(long, value_enum, default_value_t = Activate::Manual, requires = "standby")]
    activate: Activate,
    /// Offer the device to the next host there. Can be changed live
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    export: Option<Address>,
    #[command(flatten)]
    manner: Manner,
}

fn block_size(text: &str) -> Result<u64, String> {
    match parse_size(text).map_err(|e| e.to_string())? {
        bytes if bytes.is_power_of_two() && (4 << 10..=1 << 20).contains(&bytes) => Ok(bytes),
        _ => Err("it is a power of two from 4K to 1M".into()),
    }
}

fn user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(uid);
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err("there is no such user here".into()),
        Err(e) => Err(format!("it cannot be looked up: {e}")),
    }
}

fn sector(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(bytes @ (512 | 4096)) => Ok(bytes),
        _ => Err("it is 512 or 4096".into()),
    }
}

pub(super) fn run(args: &Args, verbose: u8) -> anyhow::Result<ExitCode> {
    let names_socket = args.socket.is_some() || args.socket_owner.is_some();
    if args.frontend == Frontend::Ublk && names_socket {
        anyhow::bail!("--socket and --socket-owner are for NBD: leave them out, or use --frontend nbd");
    }
    let shapes =
        [args.queues.is_some(), args.depth.is_some(), args.ublk_id.is_some(), args.logical_block_size.is_some()];
    if (args.frontend == Frontend::Nbd || names_socket) && shapes.contains(&true) {
        let nbd = [
            (args.frontend == Frontend::Nbd).then_some("--frontend nbd"),
            args.socket.is_some().then_some("--socket"),
            args.socket_owner.is_some().then_some("--socket-owner"),
        ];
        let nbd: Vec<&str> = nbd.into_iter().flatten().collect();
        anyhow::bail!(
            "--queues, --depth, --ublk-id and --logical-block-size are for block devices, {} for NBD: leave out the one or \
             the other",
            nbd.join(" and ")
        );
    }
    launch(args.manner, verbose, || {
        let options = options(args);
        let run_dir = RunDir::open()?;
        if args.recover && daemon::waits_for_daemon(&run_dir, &options.name) {
            return Ok(daemon::recovery_of(&run_dir, &options.name)?);
        }
        Ok(options)
    })
}

fn options(args: &Args) -> DaemonOptions {
    let wants_ublk = match args.frontend {
        Frontend::Ublk => true,
        Frontend::Nbd => false,
        Frontend::Auto => args.socket.is_none() && args.socket_owner.is_none() && ublk::probe().is_ok(),
    };
    let ublk = UblkOptions {
        id: args.ublk_id,
        queues: args.queues.unwrap_or(1),
        depth: args.depth.unwrap_or(128),
        logical_bytes: args.logical_block_size,
        ublksrv: false,
        recover: None,
    };
    DaemonOptions {
        source: args.source.clone(),
        cache: args.cache.clone(),
        metadata: args.metadata.clone(),
        name: args.name.clone().unwrap_or_else(|| name_of(&args.cache)),
        socket: args.socket.clone(),
        socket_owner: args.socket_owner,
        hydrate: args.hydrate,
        on_source_loss: args.on_source_loss,
        block_bytes: args.block_size,
        forget_unflushed: args.forget_unflushed,
        no_source: args.no_source,
        ublk: wants_ublk.then_some(ublk),
        overwrite: args.overwrite,
        standby: args.standby.then_some(match args.activate {
            Activate::Manual => Standby::Manual,
            Activate::OnWrite => Standby::OnWrite,
        }),
        export: args.export.clone(),
    }
}

/// A name out of a path: what cannot stand in a name becomes a dash.
pub(super) fn name_of(cache: &std::path::Path) -> String {
    let stem = cache.file_stem().map_or_else(|| "disk".into(), |s| s.to_string_lossy().into_owned());
    let clean = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    stem.trim_start_matches(['.', '-']).chars().map(clean).take(48).collect()
}
