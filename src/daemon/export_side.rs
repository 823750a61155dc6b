//! Offering the device to other hosts, or not any more, while it runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hands::Hands;
use crate::device::Core;
use crate::frontend::Onward;
use crate::nbd::Address;
use crate::server::listen;
use crate::uring::FileIo;

/// See the module's page.
pub(super) struct ExportSide {
    core: Arc<Core>,
    name: String,
    hands: Arc<Hands>,
    state: Mutex<State>,
}

enum State {
    /// Nobody has asked for it.
    Idle(FileIo),
    Running {
        onward: Onward,
        /// Where it listens, if it does.
        at: Option<Address>,
    },
    /// The cache is not open any more: whoever waits for that may go on.
    Ended,
}

impl ExportSide {
    pub(super) fn new(core: Arc<Core>, cache: FileIo, name: String, hands: Arc<Hands>) -> Self {
        Self { core, name, hands, state: Mutex::new(State::Idle(cache)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens there, and nowhere else any more; says under which URI it is found.
    pub(super) fn start(&self, asked: &Address) -> Result<String, String> {
        let (listener, address) = listen(asked).map_err(|e| e.to_string())?;
        let mut state = self.lock();
        if let State::Idle(cache) = &*state {
            let (core, hands) = (self.core.clone(), self.hands.clone());
            let onward = Onward::start(core, self.core.last_queue(), cache.clone(), self.name.clone(), hands);
            *state = State::Running { onward: onward.map_err(|e| e.to_string())?, at: None };
        }
        match &mut *state {
            State::Running { onward, at } => {
                onward.listen(listener);
                *at = Some(to_listen_again(asked, &address));
            }
            State::Idle(_) | State::Ended => return Err("the device is stopping".into()),
        }
        drop(state);
        let uri = address.uri(&self.name).to_string();
        self.hands.set_export(Some(uri.clone()));
        Ok(uri)
    }

    /// Where another daemon of this device would have to listen.
    pub(super) fn address(&self) -> Option<Address> {
        match &*self.lock() {
            State::Running { at, .. } => at.clone(),
            State::Idle(_) | State::Ended => None,
        }
    }

    /// Does not listen any more.
    pub(super) fn close(&self) {
        if let State::Running { onward, at } = &mut *self.lock() {
            onward.close();
            *at = None;
            self.hands.set_export(None);
        }
    }

    /// Ends what was started.
    pub(super) fn stop(&self) {
        if let State::Running { onward, .. } = std::mem::replace(&mut *self.lock(), State::Ended) {
            onward.stop();
        }
    }
}

/// As it was asked for, but for what was left open: the next host knows the port that was free then.
fn to_listen_again(asked: &Address, found: &Address) -> Address {
    match (asked, found) {
        (Address::Tcp { host, .. }, Address::Tcp { port, .. }) => Address::Tcp { host: host.clone(), port: *port },
        _ => found.clone(),
    }
}
