//! Giving an image away: carries out what the rules of [`crate::handoff`] decide.
//!
//! ```text
//!   Take:      lock (nobody writes) ─► sync ─► record ─► fence ─► "given"
//!   GiveBack:  record ─► fence down ─► unlock ─► "back"
//! ```

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use nix::fcntl::{Flock, FlockArg};

use super::fence::{self, Fence};
use super::image::{Image, ImageError};
use super::record::{Record, RecordError};
use crate::handoff::{Deed, Move};
use crate::nbd::{Ask, HANDOFF_VERSION, NbdError, Standing, Told};

/// How often writers are looked for while they are waited for.
const LOOK_PERIOD: Duration = Duration::from_millis(2);
/// Longest wait for them, whatever is asked: the destination takes a longer silence for a dead source.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Why an image cannot be offered, or taken back.
#[derive(Debug, thiserror::Error)]
pub enum GiverError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Another export or `reclaim`.
    #[error("image {0} is being served with --handoff by another process, or taken back; stop that first")]
    Busy(PathBuf),
    /// Written to while it was somebody else's.
    #[error(
        "image {image} was given to {to} in epoch {epoch}, and was written to since: it is not what was given away. \
         What was written here is on no other host; if it is to count, and what the other host has is not, use \
         `blkferry reclaim --force {image}`"
    )]
    Changed {
        /// The image.
        image: PathBuf,
        /// Who has the disk.
        to: String,
        /// In which epoch.
        epoch: u64,
    },
    /// Somebody else's.
    #[error(
        "image {image} was given to {to} in epoch {epoch}: the disk lives there. If that host is gone for good, or what \
         it has written may be lost, and its device will never be used again, take it back with --force"
    )]
    Away {
        /// The image.
        image: PathBuf,
        /// Who has the disk.
        to: String,
        /// In which epoch.
        epoch: u64,
    },
    /// The fence.
    #[error("image {0} cannot be made writable again: {1}")]
    Fence(PathBuf, #[source] io::Error),
}

/// An image that can change hands. Held for as long as it is served.
pub struct Giver {
    image: PathBuf,
    path: PathBuf,
    /// Nobody else hands this image over; its descriptor also holds the image locks.
    file: Flock<File>,
    /// Locked for moments only: whoever connects is told of it.
    record: Mutex<Record>,
    /// One step at a time.
    turn: Mutex<()>,
}

impl Giver {
    /// Opens an image with its handoff record; `wanted`: one is made if there is none.
    pub fn open(path: &Path, in_use: bool, wanted: bool) -> Result<(Image, Option<Arc<Self>>), GiverError> {
        let record_path = Record::path_of(path);
        let known = Record::read(&record_path)?;
        let is_away = known.as_ref().is_some_and(|record| !record.deed.is_here());
        if !wanted && !is_away {
            return Ok((Image::open(path, in_use)?, None));
        }
        // Here, it may be in use: that ends when it is given away. Away, nobody may write it.
        let image = Image::open(path, !is_away)?;
        let file = lock(&image, path)?;
        let fresh = known.is_none();
        let record = known.unwrap_or_else(Record::of_new_disk);
        if fresh {
            record.write(&record_path)?;
        }
        let giver =
            Self { image: path.into(), path: record_path, file, record: Mutex::new(record), turn: Mutex::default() };
        giver.settle(&image)?;
        Ok((image, Some(Arc::new(giver))))
    }

    /// Makes true what is on record: death may have come between the record and the fence.
    fn settle(&self, image: &Image) -> Result<(), GiverError> {
        let record = self.record();
        let Some(to) = record.deed.given_to else {
            return fence::lower(&self.file, record.mode).map_err(|e| GiverError::Fence(self.image.clone(), e));
        };
        let now =
            image.identity().map_err(|source| ImageError::Io { path: self.image.clone(), action: "read", source })?;
        if record.identity.as_ref() != Some(&now) {
            let (image, epoch) = (self.image.clone(), record.deed.epoch);
            return Err(GiverError::Changed { image, to: to.to_string(), epoch });
        }
        self.fence();
        Ok(())
    }

    fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who has the disk.
    pub(super) fn deed(&self) -> Deed {
        self.record().deed
    }

    /// How the disk stands.
    pub fn standing(&self) -> Standing {
        let Deed { disk, epoch, given_to } = self.record().deed;
        Standing { version: HANDOFF_VERSION, disk, epoch, given_to, base: None, complete: true }
    }

    /// Does what is asked, on a thread of its own: it may wait for writers and for the disk.
    pub async fn hand_off(self: Arc<Self>, image: Image, ask: Ask) -> Result<Told, NbdError> {
        let (answer, told) = oneshot::channel();
        let work = move || drop(answer.send(self.perform(&image, &ask)));
        std::thread::Builder::new().name("handoff".into()).spawn(work).map_err(|_| NbdError::NoMem)?;
        told.await.unwrap_or(Err(NbdError::Io))
    }

    fn perform(&self, image: &Image, ask: &Ask) -> Result<Told, NbdError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.record();
        let epoch = record.deed.epoch;
        match record.deed.on(ask) {
            Move::Say(told) => Ok(told),
            Move::Retire => {
                log::info!("image {}: the destination has everything; it is not needed any more", self.image.display());
                Ok(Told::Noted)
            }
            Move::Give(deed) => {
                if let Err(e) = keep_writers_out(image, ask) {
                    let later = matches!(e, ImageError::InUse(_));
                    return Ok(Told::No { why: e.to_string(), epoch, later });
                }
                self.give(image, record, deed)
            }
            Move::TakeBack(deed) => {
                let (mode, epoch) = (record.mode, deed.epoch);
                self.write(Record { deed, identity: None, ..record })?;
                fence::lower(&self.file, mode).map_err(|e| self.failed("the fence", &e))?;
                image.let_writers_in().map_err(|e| self.failed("its locks", &e))?;
                log::info!("image {}: called off, the disk is here in epoch {}", self.image.display(), epoch);
                Ok(Told::Back { epoch })
            }
        }
    }

    /// Writers are kept out.
    fn give(&self, image: &Image, record: Record, deed: Deed) -> Result<Told, NbdError> {
        self.file.sync_all().map_err(|e| self.failed("sync", &e))?;
        let identity = image.identity().map_err(|e| self.failed("its identity", &e))?;
        let mode = match record.mode {
            Some(mode) => Some(mode),
            None => fence::mode_of(&self.file).map_err(|e| self.failed("its permissions", &e))?,
        };
        let again = record.deed == deed;
        if again && record.identity.as_ref() != Some(&identity) {
            let why = "the image was written to since it was given away".to_owned();
            return Ok(Told::No { why, epoch: deed.epoch, later: false });
        }
        let epoch = deed.epoch;
        let to = deed.given_to.map(|to| to.to_string()).unwrap_or_default();
        self.write(Record { deed, identity: Some(identity.clone()), mode, ..record })?;
        self.fence();
        if !again {
            log::info!("image {}: given to {to} in epoch {epoch}", self.image.display());
        }
        Ok(Told::Given { epoch, identity })
    }

    fn write(&self, new: Record) -> Result<(), NbdError> {
        // If this fails it may be on disk or not. Writers stay out, nobody is told anything, and whoever asks again
        // writes it again.
        new.write(&self.path).map_err(|e| self.failed("its record", &e))?;
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    fn fence(&self) {
        match fence::raise(&self.file) {
            Ok(Fence::Immutable) => {}
            Ok(Fence::ReadOnly) => log::warn!(
                "image {} is read-only now, but could not be made immutable: root could still write it by mistake",
                self.image.display()
            ),
            Ok(Fence::None) => log::warn!(
                "image {} cannot be made read-only: keep this export running, or see to it that nobody uses the image",
                self.image.display()
            ),
            Err(e) => log::warn!("image {} cannot be made read-only: {e}", self.image.display()),
        }
    }

    fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> NbdError {
        log::error!("image {}: {what}: {error}", self.image.display());
        NbdError::Io
    }
}

/// What `reclaim` found or did.
#[derive(Debug, PartialEq, Eq)]
pub enum Reclaimed {
    /// It was here anyway.
    WasHere,
    /// It was taken back from this disk.
    From(String),
}

/// Takes an image back from whoever has the disk. Without `force` only if nobody has.
pub fn reclaim(path: &Path, force: bool) -> Result<Reclaimed, GiverError> {
    let record_path = Record::path_of(path);
    let image = Image::open(path, true)?;
    let file = lock(&image, path)?;
    let Some(record) = Record::read(&record_path)? else { return Ok(Reclaimed::WasHere) };
    let to = record.deed.given_to.map(|to| to.to_string());
    if let (Some(to), false) = (&to, force) {
        return Err(GiverError::Away { image: path.into(), to: to.clone(), epoch: record.deed.epoch });
    }
    if to.is_some() {
        Record { deed: record.deed.reclaimed(), identity: None, ..record.clone() }.write(&record_path)?;
    }
    fence::lower(&file, record.mode).map_err(|e| GiverError::Fence(path.into(), e))?;
    Ok(to.map_or(Reclaimed::WasHere, Reclaimed::From))
}

/// Nobody else hands the image over, or takes it back.
pub(super) fn lock(image: &Image, path: &Path) -> Result<Flock<File>, GiverError> {
    let file = image.duplicate().map_err(|source| ImageError::Io {
        path: path.into(),
        action: "duplicate the descriptor",
        source,
    })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| GiverError::Busy(path.into()))
}

fn keep_writers_out(image: &Image, ask: &Ask) -> Result<(), ImageError> {
    let wait_ms = if let Ask::Take { wait_ms, .. } = ask { *wait_ms } else { 0 };
    let deadline = Instant::now() + Duration::from_millis(wait_ms).min(MAX_WAIT);
    loop {
        match image.keep_writers_out() {
            Err(ImageError::InUse(_)) if Instant::now() < deadline => std::thread::sleep(LOOK_PERIOD),
            result => return result,
        }
    }
}
