//! Where a QEMU listens.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a QEMU listens for commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// Not an address.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no address of a QMP socket: use a path, unix:PATH, or HOST:PORT")]
pub struct ParseAddressError(String);

impl FromStr for Address {
    type Err = ParseAddressError;

    /// Reads what QEMU's own -qmp option takes, too: its settings (`,server=on`) say nothing about where.
    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let place = text.split(',').next().unwrap_or_default();
        if let Some(path) = place.strip_prefix("unix:") {
            return if path.is_empty() { Err(ParseAddressError(text.into())) } else { Ok(Self::Unix(path.into())) };
        }
        if place.contains('/') && !place.starts_with("tcp:") {
            return Ok(Self::Unix(place.into()));
        }
        let place = place.strip_prefix("tcp:").unwrap_or(place);
        match place.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(place.into())),
            _ => Err(ParseAddressError(text.into())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(place) => f.write_str(place),
        }
    }
}

impl Address {
    /// Do both lead to the same QEMU, as far as names tell?
    pub fn is_same(&self, other: &Self) -> bool {
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
        match (self, other) {
            (Self::Unix(a), Self::Unix(b)) => real(a) == real(b),
            _ => self == other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_writes_them() {
        for (text, shown) in [
            ("/run/a.qmp", "/run/a.qmp"),
            ("unix:a.qmp", "a.qmp"),
            ("unix:/run/a.qmp,server=on,wait=off", "/run/a.qmp"),
            ("tcp:localhost:4444", "localhost:4444"),
            ("[::1]:4444,server=on", "[::1]:4444"),
            ("./a.qmp", "./a.qmp"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        for text in ["", "a.qmp", "unix:", ":4444", "host:port", "tcp:4444", "host:70000"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_link_leads_to_the_same_socket() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "").unwrap();
        std::os::unix::fs::symlink(&a, &b).unwrap();
        assert!(Address::Unix(a.clone()).is_same(&Address::Unix(b)));
        assert!(!Address::Unix(a).is_same(&Address::Tcp("localhost:1".into())));
    }
}
