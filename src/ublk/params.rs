//! What the block layer is told about a device before it goes live.

use super::abi::{SECTOR_BYTES, put, take};

/// Length of the parameters that we set: the header, "basic" and "discard".
pub(super) const PARAMS_BYTES: usize = 8 + 32 + 20;
const TYPE_BASIC: u32 = 1 << 0;
const TYPE_DISCARD: u32 = 1 << 1;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const ATTR_FUA: u32 = 1 << 3;
/// Where things are.
const AT_BASIC: usize = 8;
const AT_SECTORS: usize = AT_BASIC + 16;
const AT_DISCARD: usize = AT_BASIC + 32;

/// Sizes and limits of a device. Powers of two where the kernel wants them so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Size of the device; a multiple of `logical_bytes`.
    pub size_bytes: u64,
    /// Smallest request: 512 to 4096.
    pub logical_bytes: u64,
    /// What is written without reading first; at least `logical_bytes`.
    pub physical_bytes: u64,
    /// Preferred size of a request.
    pub optimal_bytes: u64,
    /// Largest read or write.
    pub max_io_bytes: u64,
    /// Unit in which ranges can be given up.
    pub discard_granularity_bytes: u64,
    /// Most that is given up at once.
    pub max_discard_bytes: u64,
    /// Most that is zeroed at once.
    pub max_zeroes_bytes: u64,
}

impl Params {
    /// As the driver wants them. No rotation, a volatile cache with FUA, one range a discard.
    pub(super) fn encode(&self) -> [u8; PARAMS_BYTES] {
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
        let shift = |bytes: u64| bytes.trailing_zeros() as u8;
        let mut bytes = [0; PARAMS_BYTES];
        put(&mut bytes, 0, &(PARAMS_BYTES as u32).to_ne_bytes());
        put(&mut bytes, 4, &(TYPE_BASIC | TYPE_DISCARD).to_ne_bytes());
        put(&mut bytes, AT_BASIC, &(ATTR_VOLATILE_CACHE | ATTR_FUA).to_ne_bytes());
        let shifts = [self.logical_bytes, self.physical_bytes, self.optimal_bytes, self.physical_bytes].map(shift);
        put(&mut bytes, AT_BASIC + 4, &shifts);
        put(&mut bytes, AT_BASIC + 8, &sectors(self.max_io_bytes).to_ne_bytes());
        put(&mut bytes, AT_SECTORS, &(self.size_bytes / SECTOR_BYTES).to_ne_bytes());
        // Aligned with the start of the device, hence zero for the first word.
        put(&mut bytes, AT_DISCARD + 4, &(self.discard_granularity_bytes as u32).to_ne_bytes());
        put(&mut bytes, AT_DISCARD + 8, &sectors(self.max_discard_bytes).to_ne_bytes());
        put(&mut bytes, AT_DISCARD + 12, &sectors(self.max_zeroes_bytes).to_ne_bytes());
        put(&mut bytes, AT_DISCARD + 16, &1u16.to_ne_bytes());
        bytes
    }

    /// The request for parameters: how much of them we want.
    pub(super) fn question() -> [u8; PARAMS_BYTES] {
        let mut bytes = [0; PARAMS_BYTES];
        put(&mut bytes, 0, &(PARAMS_BYTES as u32).to_ne_bytes());
        bytes
    }

    /// Size of the device in bytes and of its logical blocks, out of the driver's answer.
    pub(super) fn sizes(answer: &[u8; PARAMS_BYTES]) -> (u64, u64) {
        let sectors = u64::from_ne_bytes(take(answer, AT_SECTORS));
        (sectors.saturating_mul(SECTOR_BYTES), 1 << answer[AT_BASIC + 4].min(31))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_laid_out_as_the_driver_reads_them() {
        let params = Params {
            size_bytes: 10 << 30,
            logical_bytes: 512,
            physical_bytes: 4096,
            optimal_bytes: 1 << 16,
            max_io_bytes: 1 << 19,
            discard_granularity_bytes: 4096,
            max_discard_bytes: 1 << 30,
            max_zeroes_bytes: 1 << 24,
        };
        let bytes = params.encode();
        let word = |at: usize| u32::from_ne_bytes(take(&bytes, at));
        assert_eq!((word(0), word(4)), (60, 3));
        assert_eq!(word(8), 0b1100);
        assert_eq!(bytes[12..16], [9, 12, 16, 12]);
        assert_eq!((word(16), word(20)), (1024, 0));
        assert_eq!(u64::from_ne_bytes(take(&bytes, 24)), 20 << 20);
        assert_eq!(u64::from_ne_bytes(take(&bytes, 32)), 0);
        assert_eq!((word(40), word(44), word(48), word(52)), (0, 4096, 1 << 21, 1 << 15));
        assert_eq!(bytes[56..], [1u16.to_ne_bytes(), [0; 2]].concat());
        assert_eq!(Params::sizes(&bytes), (10 << 30, 512));
    }
}
