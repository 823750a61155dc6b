//! The error numbers of the transmission phase (spec: "Error values").

use thiserror::Error;

/// Why a request failed, as the wire says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum NbdError {
    /// `NBD_EPERM` (1): a write to a read-only export.
    #[error("operation not permitted (NBD_EPERM)")]
    Perm,
    /// `NBD_EIO` (5): the storage failed.
    #[error("input/output error (NBD_EIO)")]
    Io,
    /// `NBD_ENOMEM` (12): the server has no memory for this now.
    #[error("cannot allocate memory (NBD_ENOMEM)")]
    NoMem,
    /// `NBD_EINVAL` (22): a request that is wrong in itself.
    #[error("invalid argument (NBD_EINVAL)")]
    Inval,
    /// `NBD_ENOSPC` (28): no space, or a write past the end.
    #[error("no space left on device (NBD_ENOSPC)")]
    NoSpc,
    /// `NBD_EOVERFLOW` (75): longer than the server does at once; shorter requests may succeed.
    #[error("value too large (NBD_EOVERFLOW)")]
    Overflow,
    /// `NBD_ENOTSUP` (95): a fast zero that would not be fast.
    #[error("operation not supported (NBD_ENOTSUP)")]
    NotSup,
    /// `NBD_ESHUTDOWN` (108): the server is going away; the client has to disconnect.
    #[error("server is shutting down (NBD_ESHUTDOWN)")]
    Shutdown,
}

impl NbdError {
    /// The number on the wire.
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// The error behind a number from the wire; `None` for 0, which is success. A number that the spec does not
    /// list counts as `NBD_EINVAL`, as the spec asks of clients.
    pub const fn from_wire(value: u32) -> Option<Self> {
        Some(match value {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        })
    }

    /// What to tell a client when the operating system said `errno` (Linux numbers). What has no counterpart becomes
    /// `NBD_EIO`: the request was sound, the storage was not.
    pub const fn from_errno(errno: i32) -> Self {
        const EPERM: i32 = 1;
        const ENOMEM: i32 = 12;
        const EACCES: i32 = 13;
        const EINVAL: i32 = 22;
        const EFBIG: i32 = 27;
        const ENOSPC: i32 = 28;
        const EROFS: i32 = 30;
        const EOVERFLOW: i32 = 75;
        const EOPNOTSUPP: i32 = 95;
        const ESHUTDOWN: i32 = 108;
        const EDQUOT: i32 = 122;
        match errno {
            EPERM | EACCES | EROFS => Self::Perm,
            ENOMEM => Self::NoMem,
            EINVAL => Self::Inval,
            ENOSPC | EDQUOT | EFBIG => Self::NoSpc,
            EOVERFLOW => Self::Overflow,
            EOPNOTSUPP => Self::NotSup,
            ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// The Linux errno of the same name.
    pub const fn to_errno(self) -> i32 {
        // The wire numbers were chosen to be Linux's own.
        self.to_wire() as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_number_survives_and_no_other_does() {
        for value in 0..200 {
            match NbdError::from_wire(value) {
                None => assert_eq!(value, 0),
                Some(NbdError::Inval) => assert!(![1, 5, 12, 28, 75, 95, 108].contains(&value)),
                Some(error) => assert_eq!(error.to_wire(), value),
            }
        }
    }

    #[test]
    fn errno_maps_as_the_spec_asks() {
        assert_eq!(NbdError::from_errno(122), NbdError::NoSpc, "EDQUOT");
        assert_eq!(NbdError::from_errno(27), NbdError::NoSpc, "EFBIG");
        assert_eq!(NbdError::from_errno(30), NbdError::Perm, "EROFS");
        assert_eq!(NbdError::from_errno(110), NbdError::Io, "ETIMEDOUT");
        for error in [NbdError::Perm, NbdError::Io, NbdError::NoSpc, NbdError::Shutdown] {
            assert_eq!(NbdError::from_errno(error.to_errno()), error);
        }
    }
}
