//! Where an export is asked to leave: the disk of its image comes home, and from then on what is in the image is not what
//! was given away. A unix socket in the run directory; one line each way, and then the end of the process.
//!
//! ```text
//!   device ── leave DISK EPOCH ─► export        the deed that both have read
//!   device ◄─ leaving ──────────  export        or: staying
//!   device ◄─ end of the stream ─ export        its locks are gone
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::giver::Giver;
use crate::handoff::Deed;
use crate::uring::{BindError, bind_private};

/// Longest line that is listened to.
const MAX_LINE_BYTES: u64 = 256;
/// Whoever rings has something to say.
const LINE_PATIENCE: Duration = Duration::from_secs(2);

/// What became of the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It has ended.
    Left,
    /// It does not, or not in time.
    Stays,
    /// Nobody is there.
    Nobody,
}

/// Where the bell of an image's export is, in the run directory; the same for all names of the image.
pub fn bell_of(run_dir: &Path, image: &Path) -> io::Result<PathBuf> {
    let meta = std::fs::metadata(image)?;
    Ok(run_dir.join(format!("export-{:x}-{:x}.bell", meta.dev(), meta.ino())))
}

fn question(deed: &Deed) -> String {
    format!("leave {} {}", deed.disk, deed.epoch)
}

/// Hears those who ask, until one asks rightly: then `leave` is called, and the process has to end.
pub fn hear(bell: &Path, giver: Arc<Giver>, leave: impl FnOnce() + Send + 'static) -> Result<(), BindError> {
    let listener = bind_private(bell)?;
    let wait = move || {
        let asker = listener.incoming().filter_map(Result::ok).find_map(|asker| heard(asker, &giver));
        leave();
        // The end of the stream is the end of the process.
        std::mem::forget(asker);
        std::mem::forget(listener);
    };
    std::thread::Builder::new()
        .name("doorbell".into())
        .spawn(wait)
        .map(drop)
        .map_err(|e| BindError::Refused(bell.display().to_string(), e))
}

fn heard(mut asker: UnixStream, giver: &Giver) -> Option<UnixStream> {
    asker.set_read_timeout(Some(LINE_PATIENCE)).ok()?;
    let mut line = String::new();
    BufReader::new(asker.try_clone().ok()?.take(MAX_LINE_BYTES)).read_line(&mut line).ok()?;
    let deed = giver.deed();
    let leaves = !deed.is_here() && line.trim_end() == question(&deed);
    // Who does not hear it sees what comes of it.
    let _ = writeln!(asker, "{}", if leaves { "leaving" } else { "staying" });
    leaves.then_some(asker)
}

/// Asks the export that serves an image which was given away as this deed says.
pub(super) fn ask_to_leave(bell: &Path, deed: &Deed, patience: Duration) -> Answer {
    let Ok(mut export) = UnixStream::connect(bell) else { return Answer::Nobody };
    let ask = |export: &mut UnixStream| -> io::Result<bool> {
        export.set_read_timeout(Some(patience))?;
        writeln!(export, "{}", question(deed))?;
        let mut said = String::new();
        export.take(MAX_LINE_BYTES).read_to_string(&mut said)?;
        Ok(said == "leaving\n")
    };
    if ask(&mut export).unwrap_or(false) { Answer::Left } else { Answer::Stays }
}
