//! Offering the device to other hosts, or not any more, while it runs.

use std::sync::{Arc, Mutex, PoisonError};

use super::hands::Hands;
use crate::device::Core;
use crate::frontend::Onward;
use crate::nbd::Address;
use crate::uring::{FileIo, Listener};

/// See the module's page.
pub(super) struct ExportSide {
    core: Arc<Core>,
    cache: FileIo,
    name: String,
    hands: Arc<Hands>,
    running: Mutex<Option<Onward>>,
}

impl ExportSide {
    pub(super) fn new(core: Arc<Core>, cache: FileIo, name: String, hands: Arc<Hands>) -> Self {
        Self { core, cache, name, hands, running: Mutex::default() }
    }

    /// Listens there, and nowhere else any more; says under which URI it is found.
    pub(super) fn start(&self, address: &Address) -> Result<String, String> {
        let (listener, address) = listen(address)?;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let onward = match running.take() {
            Some(onward) => onward,
            None => {
                let (core, hands) = (self.core.clone(), self.hands.clone());
                let onward = Onward::start(core, self.core.last_queue(), self.cache.clone(), self.name.clone(), hands);
                onward.map_err(|e| e.to_string())?
            }
        };
        onward.listen(listener);
        *running = Some(onward);
        let uri = address.uri(&self.name).to_string();
        self.hands.set_export(Some(uri.clone()));
        Ok(uri)
    }

    /// Does not listen any more.
    pub(super) fn close(&self) {
        if let Some(onward) = &*self.running.lock().unwrap_or_else(PoisonError::into_inner) {
            onward.close();
            self.hands.set_export(None);
        }
    }

    /// Ends what was started.
    pub(super) fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        running.into_iter().for_each(Onward::stop);
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
