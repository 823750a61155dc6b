//! Offering the device to other hosts, or not any more, while it runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hands::Hands;
use crate::device::Core;
use crate::frontend::Onward;
use crate::nbd::Address;
use crate::uring::{FileIo, Listener};

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
    Running(Onward),
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
    pub(super) fn start(&self, address: &Address) -> Result<String, String> {
        let (listener, address) = listen(address)?;
        let mut state = self.lock();
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
        let uri = address.uri(&self.name).to_string();
        self.hands.set_export(Some(uri.clone()));
        Ok(uri)
    }

    /// Does not listen any more.
    pub(super) fn close(&self) {
        if let State::Running(onward) = &*self.lock() {
            onward.close();
            self.hands.set_export(None);
        }
    }

    /// Ends what was started.
    pub(super) fn stop(&self) {
        if let State::Running(onward) = std::mem::replace(&mut *self.lock(), State::Ended) {
            onward.stop();
        }
    }
}

/// The listener, and where it really listens: a port of 0 is any that is free.
fn listen(address: &Address) -> Result<(Listener, Address), String> {
    match address {
        Address::Unix(path) => {
            let path = std::path::absolute(path).map_err(|e| format!("socket {}: {e}", path.display()))?;
            let listener = Listener::unix(&path).map_err(|e| e.to_string())?;
            Ok((listener, Address::Unix(path)))
        }
        Address::Tcp { host, port } => {
            let all = host.is_empty();
            let listener = Listener::tcp(if all { "::" } else { host }, *port).map_err(|e| e.to_string())?;
            let port = listener.local().rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(*port);
            let host = if all { "localhost".to_owned() } else { host.clone() };
            Ok((listener, Address::Tcp { host, port }))
        }
    }
}
