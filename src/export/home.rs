//! An image whose disk comes home: what it holds is what the other host began with, so that only what was written there
//! has to come back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use uuid::Uuid;

use super::fence;
use super::giver::{GiverError, lock};
use super::image::{Image, ImageError};
use super::record::{Record, RecordError};
use crate::beside::sync_dir_of;
use crate::nbd::{Base, Standing};

/// See the module's page. Nobody else writes the image or hands it over while this is held.
pub struct Home {
    image: Option<Image>,
    path: PathBuf,
    record_path: PathBuf,
    record: Record,
    file: Flock<File>,
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
    /// It is the right disk, but what was written there is not known, or not all is there.
    #[error(
        "image {0} was given to the source, which cannot tell yet what was written there since: it has to be complete \
         first (`blkferry status` there), and must not have lost power. Or use another file as the cache: everything \
         has to cross then"
    )]
    Unknown(PathBuf),
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

impl Home {
    /// The image at `path`, if it was given away; `None`: it was not. An error if the disk did not go to this source.
    pub fn of(path: &Path, source: Option<&Standing>) -> Result<Option<Self>, HomeError> {
        let record_path = Record::path_of(path);
        let Some(record) = Record::read(&record_path)? else { return Ok(None) };
        let Some(to) = record.deed.given_to else { return Ok(None) };
        let epoch = record.deed.epoch;
        let Some(source) = source.filter(|source| source.disk == to) else {
            let other = source.map_or("a disk without a name".into(), |source| source.disk.to_string());
            return Err(HomeError::Stranger { image: path.into(), to: to.to_string(), epoch, other });
        };
        if source.base != Some(Base { disk: record.deed.disk, epoch }) {
            return Err(HomeError::Unknown(path.into()));
        }
        let image = Image::open(path, false)?;
        let file = lock(&image, path)?;
        let now = image.identity().map_err(|source| ImageError::Io { path: path.into(), action: "read", source })?;
        if record.identity.as_ref() != Some(&now) {
            return Err(GiverError::Changed { image: path.into(), to: to.to_string(), epoch }.into());
        }
        Ok(Some(Self { image: Some(image), path: path.into(), record_path, record, file }))
    }

    /// An image whose disk had come home from `from`, when death came before that was cleared up; `None`: it is cleared up.
    pub fn left_behind(path: &Path, from: Option<Uuid>) -> Result<Option<Self>, HomeError> {
        let record_path = Record::path_of(path);
        let Some(record) = Record::read(&record_path)? else { return Ok(None) };
        let Some(to) = record.deed.given_to else { return Ok(None) };
        if from != Some(to) {
            let epoch = record.deed.epoch;
            return Err(GiverError::Away { image: path.into(), to: to.to_string(), epoch }.into());
        }
        let image = Image::open(path, false)?;
        let file = lock(&image, path)?;
        Ok(Some(Self { image: Some(image), path: path.into(), record_path, record, file }))
    }

    /// Opens the way for writers; the disk is here again, and that is on record elsewhere.
    pub fn open(&mut self) -> Result<(), HomeError> {
        fence::lower(&self.file, self.record.mode).map_err(|e| GiverError::Fence(self.path.clone(), e))?;
        // Who writes takes others.
        if let Some(image) = self.image.take() {
            let unlocked = image.let_writers_in();
            unlocked.map_err(|source| ImageError::Io { path: self.path.clone(), action: "unlock", source })?;
        }
        let io = |action| {
            let path = self.record_path.clone();
            move |source| RecordError::Io { path, action, source }
        };
        fs::remove_file(&self.record_path).map_err(io("remove"))?;
        Ok(sync_dir_of(&self.record_path).map_err(io("sync the directory"))?)
    }
}
