//! A device that is up: taking its disk over, its main loop, and its end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use super::handler::{self, DaemonHandler};
use super::hands::Hands;
use super::{DaemonError, DaemonOptions, Observer, is_image, ublk, ublksrv};
use crate::cache::discard;
use crate::control::{Claim, Detached, Entry, UblkEntry};
use crate::device::{CommitThread, Core, FetchThread, Phase};
use crate::frontend::Frontend;

/// How long a plain attach waits for those who still write to the source.
const TAKE_PATIENCE: Duration = Duration::from_secs(2);
/// Pace of the daemon's own housekeeping, and of progress displays.
const TICK: Duration = Duration::from_millis(500);

/// What the main loop is asked for.
pub(super) enum Wish {
    Stop,
    /// A setting was changed: whoever takes the device over is to know.
    WriteDown {
        answer: Sender<()>,
    },
    Detach {
        incomplete: bool,
        answer: Sender<Result<Detached, String>>,
        answered: Receiver<()>,
    },
    /// It was aborted: nothing is to stay.
    Vanish {
        answer: Sender<Result<(), String>>,
        answered: Receiver<()>,
    },
}

/// How a daemon came to its end.
pub(super) enum End {
    /// Nothing is left of the device but its cache.
    Gone,
    /// The block device is in use and waits for another daemon.
    Left,
}

/// A device that is up.
pub(super) struct Daemon {
    pub(super) core: Arc<Core>,
    pub(super) handler: Arc<DaemonHandler>,
    pub(super) frontend: Frontend,
    pub(super) fetch: FetchThread,
    pub(super) commit: CommitThread,
    pub(super) entry: Entry,
    pub(super) hands: Arc<Hands>,
    /// Nothing was there before.
    pub(super) is_fresh: bool,
    pub(super) metadata: PathBuf,
}

impl Daemon {
    /// Without standby the disk is taken over at once; on failure all is as it was.
    pub(super) fn take_over(self, options: &DaemonOptions) -> Result<Self, DaemonError> {
        if self.hands.is_ours() {
            return match self.hands.finish_homecoming() {
                Ok(()) => Ok(self),
                Err(why) => {
                    // It has users, who wait for the next attempt.
                    if !self.frontend.is_taken_over() {
                        self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                    }
                    Err(DaemonError::Kept(why))
                }
            };
        }
        if options.standby.is_some() {
            return Ok(self);
        }
        match self.hands.activate(TAKE_PATIENCE) {
            Ok(_) => Ok(self),
            Err(why) => {
                let undo = self.is_fresh.then(|| self.hands.abort());
                let (is_fresh, cache, metadata) = (self.is_fresh, self.entry.cache.clone(), self.metadata.clone());
                self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                if is_fresh && undo == Some(Ok(())) {
                    discard(&cache, &metadata, is_image(&cache))
                        .unwrap_or_else(|e| log::warn!("{}: {e}", metadata.display()));
                }
                Err(DaemonError::Kept(why))
            }
        }
    }

    /// Lets the guest in; on failure nothing stays but a device that was to be taken over.
    pub(super) fn go_live(mut self) -> Result<Self, DaemonError> {
        match self.frontend.go_live() {
            Ok(()) => Ok(self),
            Err(error) => {
                if !self.frontend.is_taken_over() {
                    self.stop().unwrap_or_else(|e| log::warn!("{e}"));
                }
                Err(error.into())
            }
        }
    }

    pub(super) fn main_loop(
        mut self,
        wished: &Receiver<Wish>,
        observer: &mut dyn Observer,
        claim: &mut Option<Claim>,
    ) -> Result<End, DaemonError> {
        loop {
            match wished.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) if self.frontend.notice_end() => {
                    log::info!("the block device was stopped by somebody else");
                    return self.stop().map(|()| End::Gone);
                }
                Ok(Wish::WriteDown { answer }) => {
                    if let Some(claim) = claim
                        && let Err(e) = self.publish(claim)
                    {
                        log::warn!("what was set will not survive the daemon: {e}");
                    }
                    // Whoever asked may have waited for long enough.
                    let _ = answer.send(());
                }
                Err(RecvTimeoutError::Timeout) => observer.tick(&self.handler.sample()),
                Err(RecvTimeoutError::Disconnected) | Ok(Wish::Stop) => match self.frontend.close() {
                    Ok(()) => return self.stop().map(|()| End::Gone),
                    Err(e) if self.frontend.survives_daemon() => {
                        log::warn!("{e}; requests wait until `blkferry recover {}`", self.entry.name);
                        return Ok(End::Left);
                    }
                    Err(e) => log::warn!("{e}"),
                },
                Ok(Wish::Vanish { answer, answered }) => {
                    if let Err(e) = self.frontend.close() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(e.to_string()));
                        continue;
                    }
                    let (cache, metadata) = (self.entry.cache.clone(), self.metadata.clone());
                    let result = self.stop();
                    let gone = result.as_ref().map_err(ToString::to_string).and_then(|()| {
                        let gone = discard(&cache, &metadata, is_image(&cache));
                        gone.map_err(|e| format!("{}: {e}", metadata.display()))
                    });
                    if let Some(claim) = claim.take() {
                        claim.release();
                    }
                    let _ = answer.send(gone);
                    let _ = answered.recv_timeout(Duration::from_secs(5));
                    return result.map(|()| End::Gone);
                }
                Ok(Wish::Detach { incomplete, answer, answered }) => {
                    if !incomplete && self.handler.is_needed() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(self.handler.why_not_detached()));
                        continue;
                    }
                    if let Err(e) = self.frontend.close() {
                        // Whoever asked waits for this.
                        let _ = answer.send(Err(e.to_string()));
                        continue;
                    }
                    let cache = self.handler.cache_path();
                    let core = self.core.clone();
                    let result = self.stop();
                    let absent_bytes = handler::absent_bytes(&core);
                    let complete = core.health.is_complete();
                    let given_away = core.gate.phase() == Phase::Away;
                    // Whoever has the answer may take the name at once.
                    if !matches!(result, Err(DaemonError::Frontend(_)))
                        && let Some(claim) = claim.take()
                    {
                        claim.release();
                    }
                    let said = match &result {
                        Ok(()) => Ok(Detached { complete, cache, absent_bytes, given_away }),
                        Err(e) => Err(e.to_string()),
                    };
                    let _ = answer.send(said);
                    // The process ends when this returns; the client should have its answer before.
                    let _ = answered.recv_timeout(Duration::from_secs(5));
                    return result.map(|()| End::Gone);
                }
            }
        }
    }

    /// Writes down what there is, and what another daemon would need.
    pub(super) fn publish(&mut self, claim: &mut Claim) -> io::Result<()> {
        if let Some(ublk) = &mut self.entry.ublk {
            self.handler.note_settings(ublk);
        }
        claim.publish(&self.entry)
    }

    pub(super) fn tell_ublksrv(&self) -> io::Result<()> {
        match (&self.frontend, &self.entry.ublk) {
            (Frontend::Ublk(ublk), Some(UblkEntry { ublksrv: true, .. })) => {
                ublksrv::write(ublk.device().info(), self.core.geometry().size_bytes())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn stop(self) -> Result<(), DaemonError> {
        self.handler.stop_export();
        // Queues that cannot be stopped may still write: then the cache is not called clean.
        self.frontend.stop()?;
        self.fetch.stop();
        let result = self.commit.stop(&self.core).map_err(DaemonError::Unclean);
        if let Some(ublk) = &self.entry.ublk {
            ublk::withdraw(ublk);
        }
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.entry.control);
        result
    }
}
