//! Offering the device to other hosts, or not any more, while it runs.

use std::sync::{Arc, Mutex};

use super::hands::Hands;
use super::lock;
use crate::device::Core;
use crate::frontend::Onward;
use crate::nbd::Address;
use crate::server::listen;
use crate::uring::{FileIo, Listener};

/// See the module's page.
pub(super) struct ExportSide {
    core: Arc<Core>,
    name: String,
    hands: Arc<Hands>,
    state: Mutex<State>,
    wanted: Mutex<Option<Address>>,
}

enum State {
    /// Nobody has asked for it.
    Idle(FileIo),
    Running(Onward),
    /// The cache is not open any more: whoever waits for that may go on.
    Ended,
}

impl ExportSide {
    pub(super) fn new(core: Arc<Core>, cache: FileIo, name: String, hands: Arc<Hands>) -> Self {
        Self { core, name, hands, state: Mutex::new(State::Idle(cache)), wanted: Mutex::default() }
    }

    /// Listens there, and nowhere else any more; says under which URI it is found.
    pub(super) fn start(&self, asked: &Address) -> Result<String, String> {
        self.start_on(asked, listen(asked).map_err(|e| e.to_string())?)
    }

    /// The same with what was found there before.
    pub(super) fn start_on(&self, asked: &Address, (listener, address): (Listener, Address)) -> Result<String, String> {
        let mut state = lock(&self.state);
        if let State::Idle(cache) = &*state {
            let (core, hands) = (self.core.clone(), self.hands.clone());
            let onward = Onward::start(core, self.core.last_queue(), cache.clone(), self.name.clone(), hands);
            *state = State::Running(onward.map_err(|e| e.to_string())?);
        }
        match &*state {
            State::Running(onward) => onward.listen(listener),
            State::Idle(_) | State::Ended => return Err("the device is stopping".into()),
        }
        drop(state);
        self.want(Some(to_listen_again(asked, &address)));
        let uri = address.uri(&self.name).to_string();
        self.hands.set_export(Some(uri.clone()));
        Ok(uri)
    }

    /// Where another daemon of this device would have to listen: also if this one could not.
    pub(super) fn wanted(&self) -> Option<Address> {
        lock(&self.wanted).clone()
    }

    pub(super) fn want(&self, address: Option<Address>) {
        *lock(&self.wanted) = address;
    }

    /// Does not listen any more.
    pub(super) fn close(&self) {
        self.want(None);
        if let State::Running(onward) = &*lock(&self.state) {
            onward.close();
            self.hands.set_export(None);
        }
    }

    /// Ends what was started.
    pub(super) fn stop(&self) {
        if let State::Running(onward) = std::mem::replace(&mut *lock(&self.state), State::Ended) {
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
