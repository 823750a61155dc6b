//! What other threads ask of the source, past the engine.

use std::time::Duration;

use super::messages::FetchRequest;
use crate::nbd::{Ask, Told};
use crate::remote::{Changed, Expect, HandOffError};
use crate::uring::Mailbox;

/// The source, for other threads: blocking calls.
#[derive(Clone)]
pub struct SourceSide {
    mailbox: Mailbox<FetchRequest>,
}

impl SourceSide {
    pub(super) fn new(mailbox: Mailbox<FetchRequest>) -> Self {
        Self { mailbox }
    }

    /// A step of a handoff; waits for the answer at most for so long.
    pub fn hand_off(&self, ask: Ask, patience: Duration) -> Result<Told, HandOffError> {
        let (answer, told) = crossbeam::channel::bounded(1);
        self.mailbox.send(FetchRequest::HandOff { ask, answer });
        told.recv_timeout(patience).unwrap_or(Err(HandOffError::Lost))
    }

    /// The same, and what was written as it is after that; `None`: it has to be asked for itself.
    pub fn hand_off_and_tell(&self, ask: Ask, patience: Duration) -> Result<(Told, Option<Changed>), HandOffError> {
        let (answer, told) = crossbeam::channel::bounded(1);
        self.mailbox.send(FetchRequest::HandOffAndTell { ask, answer });
        told.recv_timeout(patience).unwrap_or(Err(HandOffError::Lost))
    }

    /// What a foreign server's contents are known by now.
    pub fn identify(&self, patience: Duration) -> Result<String, HandOffError> {
        let (answer, identity) = crossbeam::channel::bounded(1);
        self.mailbox.send(FetchRequest::Identify { answer });
        identity.recv_timeout(patience).unwrap_or(Err(HandOffError::Lost))
    }

    /// What was written since the source's disk was made from its base.
    pub fn changed(&self, patience: Duration) -> Result<Changed, HandOffError> {
        let (answer, changed) = crossbeam::channel::bounded(1);
        self.mailbox.send(FetchRequest::Changed { answer });
        changed.recv_timeout(patience).unwrap_or(Err(HandOffError::Lost))
    }

    /// What the source has to be from now on.
    pub fn expect(&self, expect: Expect, identity: String) {
        self.mailbox.send(FetchRequest::Expect { expect, identity });
    }
}
