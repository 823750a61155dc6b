//! `blkferry reclaim`

use std::path::PathBuf;
use std::process::ExitCode;

use crate::daemon::refuse_cache;
use crate::export::{Reclaimed, reclaim};

/// Take an image back that was given to another host
///
/// An image that was given away is read-only and refuses to be served as one's own. Without --force this only clears up
/// after a handoff that was called off. With --force the image is made writable again as it was when it was given away:
/// what the other host has written since is not here, and its device is refused when it comes back for blocks. Be sure
/// that nobody uses it any more: two machines on one disk are two disks.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image: a raw file or a block device
    image: PathBuf,
    /// Also if another host has the disk, whose writes are lost then
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Whose disk a cache is, its device knows.
    refuse_cache(&args.image)?;
    let image = args.image.display();
    match reclaim(&args.image, args.force)? {
        Reclaimed::WasHere => outln!("{image} is here, and may be used"),
        Reclaimed::From(to) => outln!("{image} was taken back from {to}: it is as it was when it was given away"),
    }
    Ok(ExitCode::SUCCESS)
}
