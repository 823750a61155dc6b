//! `blkferry export`

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::display;
use crate::control::RunDir;
use crate::daemon::{refuse_cache, wait_for_stop_signal};
use crate::export::{ExportDisk, Giver, bell_of, hear, refuse_other_format};
use crate::nbd::{Address, Standing};
use crate::server::{ServeStats, Server, listen};
use crate::uring::{Listener, Mailbox, Reactor, require_io_uring};

/// How long replies under way may take when the export stops.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// Serve an image, read-only, to whoever ferries it
///
/// IMAGE is a raw file or a block device. It is never written to. Any NBD client can read it: another
/// blkferry, qemu-img, nbdcopy. Runs until it is stopped (Ctrl-C, SIGTERM).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image: a raw file or a block device
    image: PathBuf,
    /// Where to listen: HOST:PORT, :PORT for all interfaces, or unix:PATH. May be given more than once
    #[arg(long, value_name = "HOST:PORT|unix:PATH", default_value = "127.0.0.1:10809")]
    listen: Vec<Address>,
    /// Name of the export. Clients that name none get it too
    #[arg(long, value_name = "EXPORT", default_value = "")]
    name: String,
    /// Let the disk change hosts: a machine may go on using the image, until a destination in standby takes the disk
    /// over; then nobody can write the image here. Who has it is kept in IMAGE.handoff
    #[arg(long, conflicts_with = "in_use")]
    handoff: bool,
    /// Serve the image although somebody may be writing to it (QEMU holds its lock)
    #[arg(long)]
    in_use: bool,
    /// Serve a file as it is although it looks like another format
    #[arg(long)]
    raw: bool,
    /// Print where it is served as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    require_io_uring()?;
    let stop = Mailbox::default();
    let ring_bell = stop.clone();
    wait_for_stop_signal(move || ring_bell.send(()))?;
    refuse_cache(&args.image)?;
    if !args.raw {
        refuse_other_format(&args.image)?;
    }
    let (image, giver) = Giver::open(&args.image, args.in_use, args.handoff)?;
    let size_bytes = image.size_bytes();
    let standing = giver.as_ref().map(|giver| giver.standing());
    let bell = giver.clone().map(|giver| hang_bell(args, giver, stop.clone())).transpose()?;
    let disk = ExportDisk::new(image, giver, args.name.clone())?;
    let listeners = args.listen.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
    let uri = |(_, address): &(Listener, Address)| address.clone().uri(&args.name).to_string();
    let uris: Vec<String> = listeners.iter().map(uri).collect();
    announce(args, size_bytes, &uris, standing.as_ref())?;
    super::tell_service_manager(&format!("serving {}", uris.join(" ")))?;
    let stats = ServeStats::default();
    let told = stats.clone();
    Reactor::new()?.block_on(async move {
        let disk = Rc::new(disk);
        let serve = |(listener, _)| Server::start(listener, disk.clone(), stats.clone());
        let servers: Vec<Server> = listeners.into_iter().map(serve).collect();
        stop.recv().await;
        for server in servers {
            server.stop(STOP_PATIENCE).await;
        }
    })?;
    if let Some(bell) = bell {
        // Gone already is as good.
        let _ = std::fs::remove_file(bell);
    }
    log::info!("{} sent", display::bytes(told.sent_bytes()));
    Ok(ExitCode::SUCCESS)
}

/// When the disk comes home, the device that it comes home to asks this export to leave.
fn hang_bell(args: &Args, giver: Arc<Giver>, stop: Mailbox<()>) -> anyhow::Result<PathBuf> {
    let bell = bell_of(RunDir::open()?.path(), &args.image)?;
    let image = args.image.clone();
    hear(&bell, giver, move || {
        log::info!("image {}: its disk comes home, this export ends", image.display());
        stop.send(());
    })?;
    Ok(bell)
}

fn announce(args: &Args, size_bytes: u64, uris: &[String], standing: Option<&Standing>) -> anyhow::Result<()> {
    if args.json {
        let handoff = standing.map(|s| serde_json::json!({ "disk": s.disk, "epoch": s.epoch, "given_to": s.given_to }));
        let said =
            serde_json::json!({ "image": args.image, "size_bytes": size_bytes, "uris": uris, "handoff": handoff });
        outln!("{said}");
        return Ok(());
    }
    if let Some(Standing { epoch, given_to: Some(to), .. }) = standing {
        outln!("{} was given to {to} in epoch {epoch}: it is read-only here", args.image.display());
    }
    for uri in uris {
        outln!("serving {} ({}) at {uri}", args.image.display(), display::bytes(size_bytes));
    }
    Ok(())
}
