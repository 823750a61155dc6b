//! An image whose disk comes home: what it holds is what the other host began with, so that only what was written there
//! has to come back.
//!
//! ```text
//!   of ─► (standby) ─► claim ─► on record: ours ─► bits of what is kept, durable ─► lower the fence ─► clear
//! ```
//! The record beside the image goes last: as long as it is there, whoever finds it does the steps before it again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use uuid::Uuid;

use super::doorbell::{Answer, ask_to_leave};
use super::fence;
use super::giver::{GiverError, lock};
use super::image::{Image, ImageError};
use super::record::{Record, RecordError};
use crate::beside::sync_dir_of;
use crate::handoff::{Deed, Doubt};
use crate::nbd::{Base, Standing};

/// How long an export that was asked to leave may take.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);
/// Pause before its lock is tried again.
const LOOK_PERIOD: Duration = Duration::from_millis(2);

/// See the module's page.
pub struct Home {
    image: Option<Image>,
    path: PathBuf,
    record_path: PathBuf,
    record: Record,
    /// Where an export of this image can be asked to leave.
    bell: PathBuf,
    /// Held once nobody else serves the image or hands it over.
    file: Option<Flock<File>>,
}

/// Why a disk cannot come home to an image.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The image or its record.
    #[error(transparent)]
    Giver(#[from] GiverError),
    /// Another disk, or one that does not say what it was made from.
    #[error(
        "image {image} was given to {to} in epoch {epoch}, and the source is {other}: what is in the image is no part of \
         that. Use another file as the cache: everything has to cross then"
    )]
    Stranger {
        /// The image.
        image: PathBuf,
        /// Who has its disk.
        to: String,
        /// In which epoch.
        epoch: u64,
        /// What the source has.
        other: String,
    },
    /// It is the right disk, but what was written there is not known.
    #[error(
        "image {0} was given to the source, which does not know any more what was written there since: it must not have \
         lost power while it was written to. Use another file as the cache: everything has to cross then"
    )]
    Unknown(PathBuf),
    /// A cache that is to be an image again, and that its successor still needs.
    #[error(
        "cache {0} was given to the source, which still needs what is here: wait until it is complete (`blkferry status` \
         there)"
    )]
    Needed(PathBuf),
    /// A cache that was given away before everything was in it.
    #[error(
        "cache {0} was given away before it was complete: it cannot be what the disk comes home to. Use another file as \
         the cache: everything has to cross then"
    )]
    Partial(PathBuf),
    /// An export that stays.
    #[error("image {0} is served by an export that cannot be asked to leave; stop it, and try again")]
    Served(PathBuf),
    /// Taken back, or written to.
    #[error("image {0} is not what it was when this device was attached: it was taken back, or written to")]
    Moved(PathBuf),
}

impl From<ImageError> for HomeError {
    fn from(e: ImageError) -> Self {
        Self::Giver(e.into())
    }
}

impl From<RecordError> for HomeError {
    fn from(e: RecordError) -> Self {
        Self::Giver(e.into())
    }
}

/// May a disk come home to an image (or to a cache that is to be one) with this deed?
pub fn check_home(path: &Path, deed: &Deed, source: Option<&Standing>) -> Result<(), HomeError> {
    deed.is_base_of(source).map_err(|doubt| match doubt {
        Doubt::Stranger => HomeError::Stranger {
            image: path.into(),
            to: deed.given_to.map(|to| to.to_string()).unwrap_or_default(),
            epoch: deed.epoch,
            other: source.map_or("a disk without a name".into(), |source| source.disk.to_string()),
        },
        Doubt::Unknown => HomeError::Unknown(path.into()),
    })
}

/// Writes down that a file is an image whose disk was given away: a cache that is whole becomes one. The caller holds the
/// cache, and forgets it after this.
pub fn become_image(path: &Path, deed: Deed) -> Result<(), HomeError> {
    let record_path = Record::path_of(path);
    match Record::read(&record_path)? {
        // Death came between this and what the caller does next. What the contents were known by then still holds.
        Some(record) if record.deed == deed => return Ok(()),
        // A later word than the cache's.
        Some(record) if record.deed.disk == deed.disk => return Err(HomeError::Moved(path.into())),
        // Of an image that was at this place before.
        _ => {}
    }
    let image = Image::open(path, true)?;
    let io = |action| move |source| ImageError::Io { path: path.into(), action, source };
    let mode = fence::mode_of(&image.duplicate().map_err(io("duplicate the descriptor"))?).map_err(io("stat"))?;
    let identity = Some(image.identity().map_err(io("read"))?);
    Ok(Record { deed, identity, mode, ..Record::of_new_disk() }.write(&record_path)?)
}

impl Home {
    /// The image at `path`, if it was given away; `None`: it was not. An error if the disk did not go to this source.
    pub fn of(path: &Path, source: Option<&Standing>, bell: PathBuf) -> Result<Option<Self>, HomeError> {
        let Some(home) = Self::away(path, bell)? else { return Ok(None) };
        check_home(path, &home.record.deed, source)?;
        home.check_contents()?;
        home.fence()?;
        Ok(Some(home))
    }

    /// Death may have come between the record and the fence.
    fn fence(&self) -> Result<(), HomeError> {
        let Some(image) = &self.image else { return Ok(()) };
        let io = |source| ImageError::Io { path: self.path.clone(), action: "duplicate the descriptor", source };
        if let Err(e) = fence::raise(&image.duplicate().map_err(io)?) {
            log::warn!("image {} cannot be made read-only: {e}", self.path.display());
        }
        Ok(())
    }

    /// An image whose disk had come home from `from`, when death came before that was cleared up; `None`: it is cleared up.
    pub fn left_behind(path: &Path, from: Option<Uuid>, bell: PathBuf) -> Result<Option<Self>, HomeError> {
        let Some(home) = Self::away(path, bell)? else { return Ok(None) };
        let Deed { epoch, given_to, .. } = home.record.deed;
        if from != given_to {
            let to = given_to.map(|to| to.to_string()).unwrap_or_default();
            return Err(GiverError::Away { image: path.into(), to, epoch }.into());
        }
        Ok(Some(home))
    }

    fn away(path: &Path, bell: PathBuf) -> Result<Option<Self>, HomeError> {
        let record_path = Record::path_of(path);
        let Some(record) = Record::read(&record_path)? else { return Ok(None) };
        if record.deed.is_here() {
            return Ok(None);
        }
        let image = Image::open(path, false)?;
        Ok(Some(Self { image: Some(image), path: path.into(), record_path, record, bell, file: None }))
    }

    fn check_contents(&self) -> Result<(), HomeError> {
        let Some(image) = &self.image else { return Ok(()) };
        let io = |source| ImageError::Io { path: self.path.clone(), action: "read", source };
        if self.record.identity.as_ref() == Some(&image.identity().map_err(io)?) {
            return Ok(());
        }
        let Deed { epoch, given_to, .. } = self.record.deed;
        let to = given_to.map(|to| to.to_string()).unwrap_or_default();
        Err(GiverError::Changed { image: self.path.clone(), to, epoch }.into())
    }

    /// Sees to it that nobody else serves the image or hands it over from now on: the host that has the disk may have
    /// been fetching from here until this moment. Nothing has changed for an image if this fails.
    pub fn claim(&mut self) -> Result<(), HomeError> {
        if self.file.is_some() {
            return Ok(());
        }
        let Some(image) = &self.image else { return Ok(()) };
        let mut held = lock(image, &self.path);
        if matches!(held, Err(GiverError::Busy(_))) {
            match ask_to_leave(&self.bell, &self.record.deed, LEAVE_PATIENCE) {
                Answer::Left | Answer::Nobody => {}
                Answer::Stays => return Err(HomeError::Served(self.path.clone())),
            }
            // Its locks go with its process.
            let deadline = Instant::now() + LOOK_PERIOD * 500;
            held = lock(image, &self.path);
            while matches!(held, Err(GiverError::Busy(_))) && Instant::now() < deadline {
                std::thread::sleep(LOOK_PERIOD);
                held = lock(image, &self.path);
            }
        }
        let file = match held {
            Err(GiverError::Busy(path)) => return Err(HomeError::Served(path)),
            held => held?,
        };
        if Record::read(&self.record_path)?.as_ref() != Some(&self.record) {
            return Err(HomeError::Moved(self.path.clone()));
        }
        self.file = Some(file);
        Ok(())
    }

    /// Is the image still what was given away, and does the source still know what was written since? Asked once nobody
    /// else can have it, and before anything relies on it.
    pub fn confirm(&self, base: Option<Base>) -> Result<(), HomeError> {
        if base != Some(self.record.deed.as_base()) {
            return Err(HomeError::Unknown(self.path.clone()));
        }
        self.check_contents().map_err(|_| HomeError::Moved(self.path.clone()))
    }

    /// Opens the way for writers; the disk is here again, and that is on record elsewhere.
    pub fn lower(&mut self) -> Result<(), HomeError> {
        self.claim()?;
        if let Some(file) = &self.file {
            fence::lower(file, self.record.mode).map_err(|e| GiverError::Fence(self.path.clone(), e))?;
        }
        // Who writes takes others.
        if let Some(image) = self.image.take() {
            let unlocked = image.let_writers_in();
            unlocked.map_err(|source| ImageError::Io { path: self.path.clone(), action: "unlock", source })?;
        }
        Ok(())
    }

    /// Removes the record: all that it stood for is done, durably.
    pub fn clear(self) -> Result<(), HomeError> {
        let io = |action| {
            let path = self.record_path.clone();
            move |source| RecordError::Io { path, action, source }
        };
        fs::remove_file(&self.record_path).map_err(io("remove"))?;
        Ok(sync_dir_of(&self.record_path).map_err(io("sync the directory"))?)
    }
}
