//! The source side: serves an image, read-only, to whoever ferries it.
//!
//! Invariants: the image is never written; runs of zeros and holes leave as holes, whatever the reader
//! asked for; what the image is known by changes when its contents do.

mod disk;
mod image;

pub use disk::ExportDisk;
pub use image::{Image, ImageError};
