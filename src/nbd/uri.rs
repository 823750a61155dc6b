//! NBD URIs (spec: doc/uri.md) and listen addresses.
//!
//! ```text
//! nbd://host[:port]/export            nbd+unix:///export?socket=/run/x.sock
//! HOST:PORT   :PORT   unix:PATH       (--listen)
//! ```

use super::consts::{DEFAULT_PORT, MAX_NAME};
use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;

/// Longest path of a Unix socket, in bytes (Linux: 108 with the final NUL).
const MAX_SOCKET_PATH: usize = 107;

/// Where a server listens, or is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name, an IPv4 or an IPv6 address (without brackets). Empty, in a listen address only: all interfaces.
        host: String,
        /// The port. 0, in a listen address only: any free one.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// An NBD URI: a server and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The export; empty means the server's default one.
    pub export: String,
}

/// Why a text is no NBD URI or no address. Says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UriError {
    /// No `scheme://` at the start.
    #[error("{0:?} is no NBD URI; write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")]
    NoScheme(String),
    /// QEMU's older form, `nbd:host:port:exportname=…`.
    #[error("{0:?} is QEMU's old form; write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")]
    QemuForm(String),
    /// `nbds` or `nbds+unix`, or TLS parameters.
    #[error("TLS is not supported yet ({0}); use nbd:// or nbd+unix:// on a trusted network, or an SSH tunnel")]
    Tls(String),
    /// Another scheme.
    #[error("scheme {0:?} is not supported; use nbd or nbd+unix")]
    Scheme(String),
    /// `user@host`.
    #[error("a user name ({0:?}) belongs to TLS, which is not supported yet; leave it out")]
    UserInfo(String),
    /// A host that is neither a name nor an address.
    #[error("{0:?} is no host; write a name, an IPv4 address, or an IPv6 address in brackets as in [::1]")]
    Host(String),
    /// A port that is not a number of a port.
    #[error("{0:?} is no port; write a number from 1 to 65535")]
    Port(String),
    /// `%` without two hexadecimal digits.
    #[error("{0:?} has a % without two hexadecimal digits after it; write % itself as %25")]
    Percent(String),
    /// An export name that NBD cannot carry.
    #[error("the export name is not usable: it has to be UTF-8, without NUL, of at most 4096 bytes")]
    Export,
    /// A fragment.
    #[error("{0:?} has a #; write # itself as %23")]
    Fragment(String),
    /// `nbd+unix` with a host.
    #[error("nbd+unix takes no host ({0:?}); write three slashes: nbd+unix:///EXPORT?socket=PATH")]
    HostWithUnix(String),
    /// `nbd+unix` without a socket.
    #[error("nbd+unix needs the path of a socket; write nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    /// A path that no Unix socket can have.
    #[error("{0:?} cannot be the path of a Unix socket: it has to have 1 to 107 bytes, and no NUL")]
    SocketPath(PathBuf),
    /// A parameter given twice.
    #[error("parameter {0:?} is given twice")]
    Twice(String),
    /// A parameter that means nothing here.
    #[error("parameter {0:?} is not known here; nbd takes none, nbd+unix takes socket=PATH")]
    Parameter(String),
    /// A listen address without port.
    #[error("{0:?} is no address to listen on; write HOST:PORT, :PORT for all interfaces, or unix:PATH")]
    Listen(String),
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            let old = text.starts_with("nbd:");
            return Err(if old { UriError::QemuForm(text.into()) } else { UriError::NoScheme(text.into()) });
        };
        let scheme = scheme.to_ascii_lowercase();
        match scheme.as_str() {
            "nbd" | "nbd+unix" => {}
            "nbds" | "nbds+unix" => return Err(UriError::Tls(format!("{scheme}://"))),
            _ => return Err(UriError::Scheme(scheme)),
        }
        if text.contains('#') {
            return Err(UriError::Fragment(text.into()));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let socket = socket_of(query)?;
        let address = match (scheme.as_str(), socket) {
            ("nbd", None) => tcp_of(authority)?,
            ("nbd", Some(_)) => return Err(UriError::Parameter("socket".into())),
            (_, _) if !authority.is_empty() => {
                return Err(UriError::HostWithUnix(authority.into()));
            }
            (_, None) => return Err(UriError::NoSocket),
            (_, Some(path)) => unix_of(path)?,
        };
        Ok(Self { address, export: export_of(path)? })
    }
}

/// The `socket` parameter; every other one is refused.
fn socket_of(query: &str) -> Result<Option<Vec<u8>>, UriError> {
    let mut socket = None;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "socket" if socket.is_some() => return Err(UriError::Twice(key.into())),
            "socket" => socket = Some(percent_decode(value)?),
            key if key.starts_with("tls-") => {
                return Err(UriError::Tls(format!("parameter {key}")));
            }
            key => return Err(UriError::Parameter(key.into())),
        }
    }
    Ok(socket)
}

fn tcp_of(authority: &str) -> Result<Address, UriError> {
    if let Some((user, _)) = authority.rsplit_once('@') {
        return Err(UriError::UserInfo(user.into()));
    }
    let (host, port) = split_port(authority)?;
    let decoded = String::from_utf8(percent_decode(host)?).map_err(|_| UriError::Host(host.into()))?;
    let host = match decoded.as_str() {
        "" => "localhost".to_owned(),
        _ => host_of(&decoded)?,
    };
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port_of(port).filter(|port| *port != 0).ok_or_else(|| UriError::Port(port.into()))?,
    };
    Ok(Address::Tcp { host, port })
}

/// Splits `host`, `host:port`, `[v6]` or `[v6]:port`; the brackets stay.
fn split_port(text: &str) -> Result<(&str, Option<&str>), UriError> {
    let host_end = text.rfind(']').map_or(0, |at| at + 1);
    let Some((before, port)) = text[host_end..].split_once(':') else {
        return Ok((text, None));
    };
    if port.contains(':') {
        // An IPv6 address without brackets.
        return Err(UriError::Host(text.into()));
    }
    Ok((&text[..host_end + before.len()], Some(port)))
}

/// Checks a host, and takes the brackets off an IPv6 address.
fn host_of(text: &str) -> Result<String, UriError> {
    let wrong = || UriError::Host(text.into());
    if let Some(inner) = text.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or_else(wrong)?;
        let (ip, zone) = inner.split_once('%').unwrap_or((inner, "zone"));
        let sound = ip.parse::<Ipv6Addr>().is_ok() && is_name(zone);
        return if sound { Ok(inner.to_owned()) } else { Err(wrong()) };
    }
    if is_name(text) { Ok(text.to_owned()) } else { Err(wrong()) }
}

fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    !text.is_empty() && text.len() <= 253 && text.bytes().all(allowed)
}

/// Digits only: `u16::from_str` would take a plus sign, too.
fn port_of(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

fn unix_of(path: Vec<u8>) -> Result<Address, UriError> {
    let sound = !path.is_empty() && path.len() <= MAX_SOCKET_PATH && !path.contains(&0);
    let path = PathBuf::from(OsString::from_vec(path));
    if sound { Ok(Address::Unix(path)) } else { Err(UriError::SocketPath(path)) }
}

fn export_of(path: &str) -> Result<String, UriError> {
    let name = String::from_utf8(percent_decode(path)?).map_err(|_| UriError::Export)?;
    if name.len() > MAX_NAME || name.contains('\0') { Err(UriError::Export) } else { Ok(name) }
}

fn percent_decode(text: &str) -> Result<Vec<u8>, UriError> {
    let wrong = || UriError::Percent(text.into());
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or_else(wrong);
        let (high, low) = (digit()?, digit()?);
        out.push((high * 16 + low) as u8);
    }
    Ok(out)
}

/// Writes bytes as a URI may have them in a path or a parameter.
fn percent_encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:,".contains(&byte) {
            write!(f, "{}", char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp { host, port } => {
                f.write_str("nbd://")?;
                if host.contains(':') {
                    write!(f, "[{}]", host.replace('%', "%25"))?;
                } else {
                    f.write_str(host)?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                percent_encode(f, self.export.as_bytes())
            }
            Address::Unix(path) => {
                f.write_str("nbd+unix:///")?;
                percent_encode(f, self.export.as_bytes())?;
                f.write_str("?socket=")?;
                percent_encode(f, path.as_os_str().as_bytes())
            }
        }
    }
}

impl Address {
    /// The URI of an export at this address.
    pub fn uri(self, export: impl Into<String>) -> Uri {
        Uri { address: self, export: export.into() }
    }
}

/// Reads a listen address: `HOST:PORT` (an IPv6 address in brackets), `:PORT` for all interfaces, or `unix:PATH`.
/// Port 0 means any free port.
impl FromStr for Address {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return unix_of(Path::new(path).as_os_str().as_bytes().to_vec());
        }
        let (host, port) = split_port(text)?;
        let port = port.ok_or_else(|| UriError::Listen(text.into()))?;
        let port = port_of(port).ok_or_else(|| UriError::Port(port.into()))?;
        let host = if host.is_empty() { String::new() } else { host_of(host)? };
        Ok(Self::Tcp { host, port })
    }
}

/// As a listen address is written.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests;
