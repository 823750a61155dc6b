//! `blkferry reclaim`

use std::path::PathBuf;
use std::process::ExitCode;

use crate::daemon::{Back, reclaim};

/// Take a disk back that was given to another host
///
/// An image that was given away is read-only and refuses to be served as one's own. Without --force this only clears up
/// after a handoff that was called off. With --force the image is made writable again as it was when it was given away:
/// what the other host has written since is not here, and its device is refused when it comes back for blocks. Be sure
/// that nobody uses it any more: two machines on one disk are two disks.
///
/// The same for the cache of a device that gave its disk away (detach the device before; --force only): attached again, it
/// is the disk as it was.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image, or the cache: a raw file or a block device
    image: PathBuf,
    /// Where a cache's metadata is [default: CACHE.ferry; under /var/lib/blkferry for a block device]
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Also if another host has the disk, whose writes are lost then
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let image = args.image.display();
    match reclaim(&args.image, args.metadata.as_deref(), args.force)? {
        Back::Never => outln!(
            "{image} was never given away, as far as it is known here: nothing beside it says so (of a cache, name its \
             --metadata if that is elsewhere)"
        ),
        Back::Here => outln!("{image} is here, and may be used"),
        Back::Image(to) => outln!("{image} was taken back from {to}: it is as it was when it was given away"),
        Back::Cache(to) => outln!(
            "{image} was taken back from {to}: attach it again, and it is the disk as it was when it was given away"
        ),
    }
    Ok(ExitCode::SUCCESS)
}
