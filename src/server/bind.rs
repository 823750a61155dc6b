//! From an address to a listener.

use std::net::IpAddr;

use nix::sys::utsname::uname;

use crate::nbd::Address;
use crate::uring::{BindError, Listener};

/// Listens there. Gives back where clients find it: an absolute path, or the port that was free if 0 was asked for, at
/// this host's name if it listens on all interfaces.
pub fn listen(address: &Address) -> Result<(Listener, Address), BindError> {
    match address {
        Address::Unix(path) => {
            let path = std::path::absolute(path).map_err(|e| BindError::Refused(path.display().to_string(), e))?;
            Ok((Listener::unix(&path)?, Address::Unix(path)))
        }
        Address::Tcp { host, port } => {
            let all = host.is_empty() || host.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified());
            let listener = Listener::tcp(if host.is_empty() { "::" } else { host }, *port)?;
            let port = listener.local().rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(*port);
            let host = if all { own_name() } else { host.clone() };
            Ok((listener, Address::Tcp { host, port }))
        }
    }
}

/// By which other hosts may find this one: no client can dial "all interfaces".
fn own_name() -> String {
    let name = uname().ok().and_then(|host| host.nodename().to_str().map(str::to_owned));
    name.filter(|name| !name.is_empty() && name != "(none)").unwrap_or_else(|| "localhost".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_interfaces_are_no_address_to_dial() {
        for asked in ["0.0.0.0:0", ":0"] {
            let (_, Address::Tcp { host, port }) = listen(&asked.parse().unwrap()).unwrap() else { panic!("{asked}") };
            assert_eq!((host, port != 0), (own_name(), true));
        }
        let (_, found) = listen(&"127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(matches!(found, Address::Tcp { host, .. } if host == "127.0.0.1"));
    }
}
