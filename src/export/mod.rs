//! The source side: serves an image, read-only, to whoever ferries it.
//!
//! Invariants: the image is never written; runs of zeros and holes leave as holes, whatever the reader
//! asked for; what the image is known by changes when its contents do; an image that was given to a destination is
//! written by nobody until it is given back.

mod disk;
mod doorbell;
mod fence;
mod giver;
mod home;
mod image;
mod record;

pub use disk::ExportDisk;
pub use doorbell::{bell_of, hear};
pub use giver::{Giver, GiverError, Reclaimed, reclaim};
pub use home::{Home, HomeError, become_image, check_home};
pub use image::{Image, ImageError, refuse_other_format};
pub use record::{Record, RecordError};
