//! A file or block device as /dev/ublkbN, and nothing more: what the driver's adapter, the ring and the file cost
//! where nobody decides about blocks. `scripts/bench ublk` compares with it.
//!
//! It has no memory of its own: what is flushed is as durable as FILE makes it, and a killed one is gone.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use blkferry::daemon::wait_for_stop_signal;
use blkferry::ublk::{Channel, Device, MAX_DEPTH, MAX_QUEUES, Next, Operation, Params, Request, RequestFlags, Tag};
use blkferry::ublk::{UblkError, Wanted, keep_descriptors, prepare_process};
use blkferry::uring::{FileIo, Reactor, ZeroMode, spawn};
use clap::Parser;
use crossbeam::channel::{Sender, bounded, unbounded};
use futures_util::future::join_all;

const SECTOR_BYTES: u64 = 512;
const BLOCK_BYTES: u64 = 4096;
/// As large as the ferry target's preferred request, and its largest range to give up or to zero.
const OPTIMAL_IO_BYTES: u64 = 64 << 10;
const MAX_ZEROES_BYTES: u64 = 16 << 20;
/// What the kernel makes an I/O error of.
const EIO: i32 = 5;

/// Serve FILE as a block device, /dev/ublkbN, until SIGTERM or SIGINT
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A raw file or a block device; a multiple of 512 bytes
    file: PathBuf,
    /// Hardware queues, a thread each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    queues: u16,
    /// Requests that each queue takes at a time
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=MAX_DEPTH as i64))]
    depth: u16,
    /// The N of /dev/ublkbN [default: the first that is free]
    #[arg(long, value_name = "N")]
    ublk_id: Option<u32>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    keep_descriptors();
    prepare_process(&[]).iter().for_each(|warning| log::warn!("{warning}"));
    let (stop, stopped) = bounded(1);
    let stop = move || {
        let _ = stop.send(());
    };
    wait_for_stop_signal(stop)?;
    let (file, size_bytes) = open(&args.file)?;
    let mut device = Device::add(&Wanted { id: args.ublk_id, queues: args.queues, depth: args.depth, mark: 0 })?;
    device.set_params(&params(size_bytes, device.info().max_io_bytes))?;
    let channel = Channel::open(device.info())?;
    let (broken, errors) = unbounded();
    let queue = |index| {
        let (channel, file, broken) = (channel.clone(), file.clone(), broken.clone());
        std::thread::Builder::new().name(format!("queue{index}")).spawn(move || run(&channel, index, &file, &broken))
    };
    let queues = (0..device.info().queues).map(queue).collect::<io::Result<Vec<_>>>()?;
    drop((channel, broken));
    device.start(&errors)?;
    println!("{}", device.path().display());
    crossbeam::select! {
        recv(stopped) -> _ => {}
        // All queues ended: somebody else has stopped it.
        recv(errors) -> error => error.map_or(Ok(()), Err)?,
    }
    device.stop(|| ())?;
    for queue in queues {
        queue.join().expect("a panic ends the process");
    }
    Ok(device.delete()?)
}

fn open(path: &Path) -> anyhow::Result<(FileIo, u64)> {
    let mut file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let size_bytes = file.seek(SeekFrom::End(0))?;
    anyhow::ensure!(size_bytes > 0 && size_bytes.is_multiple_of(SECTOR_BYTES), "{} bytes: no sectors", size_bytes);
    Ok((file.into(), size_bytes))
}

fn params(size_bytes: u64, max_io_bytes: u32) -> Params {
    Params {
        size_bytes,
        logical_bytes: SECTOR_BYTES,
        physical_bytes: BLOCK_BYTES,
        optimal_bytes: OPTIMAL_IO_BYTES,
        max_io_bytes: max_io_bytes.into(),
        discard_granularity_bytes: BLOCK_BYTES,
        max_discard_bytes: MAX_ZEROES_BYTES,
        max_zeroes_bytes: MAX_ZEROES_BYTES,
    }
}

fn run(channel: &Channel, index: u16, file: &FileIo, broken: &Sender<UblkError>) {
    let (channel, file) = (channel.clone(), file.clone());
    let serve = async move {
        let tags = channel.tags(index)?;
        let tasks: Vec<_> = tags.into_iter().map(|tag| spawn(serve_tag(file.clone(), tag))).collect();
        let ends = join_all(tasks).await;
        ends.into_iter().collect::<io::Result<()>>().map_err(|source| UblkError::Queue { queue: index, source })
    };
    let served = Reactor::watchful().map_err(UblkError::from).and_then(|reactor| {
        reactor.block_on(serve).unwrap_or_else(|source| Err(UblkError::Queue { queue: index, source }))
    });
    if let Err(e) = served {
        // Nobody listens any more when the device is being stopped.
        let _ = broken.send(e);
    }
}

async fn serve_tag(file: FileIo, tag: Tag) -> io::Result<()> {
    let mut next = tag.fetch().await;
    loop {
        let (tag, request) = match next {
            Next::Request(tag, request) => (tag, request),
            Next::Stopped => return Ok(()),
            Next::Failed(e) => return Err(e),
        };
        let (result, tag) = perform(&file, tag, &request).await;
        next = tag.commit_and_fetch(result.map_err(|e| e.raw_os_error().unwrap_or(EIO))).await;
    }
}

async fn perform(file: &FileIo, tag: Tag, request: &Request) -> (io::Result<u32>, Tag) {
    let (at, len) = (request.offset_bytes, request.len_bytes as usize);
    let fua = request.flags.contains(RequestFlags::FUA);
    let result = match request.operation {
        Operation::Read => {
            let (result, tag) = file.read_exact_at(tag, 0..len, at).await;
            return (result.map(|()| len as u32), tag);
        }
        Operation::Write => {
            let (result, tag) = file.write_from(tag, len, at, fua).await;
            return (result.map(|()| len as u32), tag);
        }
        // This blocks the queue, and its other requests with it.
        Operation::Flush => nix::unistd::fdatasync(file.fd()).map(|()| 0).map_err(io::Error::from),
        Operation::Discard => file.zero_at(at, request.len_bytes, ZeroMode::Punch, false).await.map(|()| 0),
        Operation::WriteZeroes => file.zero_at(at, request.len_bytes, ZeroMode::KeepAllocated, false).await.map(|()| 0),
        Operation::Unknown(_) => Err(io::ErrorKind::Unsupported.into()),
    };
    (result, tag)
}
