//! From an address to a listener.

use crate::nbd::Address;
use crate::uring::{BindError, Listener};

/// Listens there. Gives back where clients find it: an absolute path, or the port that was free if 0 was asked for, on this
/// host if it listens on all interfaces.
pub fn listen(address: &Address) -> Result<(Listener, Address), BindError> {
    match address {
        Address::Unix(path) => {
            let path = std::path::absolute(path).map_err(|e| BindError::Refused(path.display().to_string(), e))?;
            Ok((Listener::unix(&path)?, Address::Unix(path)))
        }
        Address::Tcp { host, port } => {
            let all = host.is_empty();
            let listener = Listener::tcp(if all { "::" } else { host }, *port)?;
            let port = listener.local().rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(*port);
            let host = if all { "localhost".to_owned() } else { host.clone() };
            Ok((listener, Address::Tcp { host, port }))
        }
    }
}
