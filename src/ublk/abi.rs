//! The kernel's interface (`linux/ublk_cmd.h`) as types and codecs: bytes in native order, nothing else.

use bitflags::bitflags;

/// Bytes of a sector in everything that the driver counts in sectors.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The driver's own limit on the depth of a queue; it lays the queues' descriptors out by it.
const MAX_QUEUE_DEPTH: u64 = 4096;
/// Size of an I/O descriptor.
pub(super) const DESC_BYTES: usize = 24;
/// Size of a control command within its submission entry.
pub(super) const COMMAND_BYTES: usize = 80;
/// Size of what the driver says about a device.
pub(super) const INFO_BYTES: usize = 64;
/// Size of the feature word.
pub(super) const FEATURES_BYTES: usize = 8;
/// "Not for one queue", in a control command.
const NO_QUEUE: u16 = u16::MAX;
/// "Any id that is free", in ADD_DEV.
pub(super) const ANY_ID: u32 = u32::MAX;

const IOC_WRITE: u32 = 1;
const IOC_READ: u32 = 2;

const fn ioctl_code(direction: u32, number: u32, size_bytes: u32) -> u32 {
    direction << 30 | size_bytes << 16 | (b'u' as u32) << 8 | number
}

bitflags! {
    /// What a device or the driver can do. The driver clears what it does not know.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Requests are handed over in the queue thread's own context.
        const URING_CMD_COMP_IN_TASK = 1 << 1;
        /// The daemon may die and another one take over.
        const USER_RECOVERY = 1 << 3;
        /// Requests that the dead daemon had not answered go to the new one.
        const USER_RECOVERY_REISSUE = 1 << 4;
        /// Made by somebody without CAP_SYS_ADMIN.
        const UNPRIVILEGED_DEV = 1 << 5;
        /// Commands are numbered as ioctls are.
        const CMD_IOCTL_ENCODE = 1 << 6;
        /// Requests may be failed while there is no daemon.
        const USER_RECOVERY_FAIL_IO = 1 << 9;
        /// Each tag may have a thread of its own.
        const PER_IO_DAEMON = 1 << 13;
        /// A device can be stopped on the condition that nobody has it open.
        const SAFE_STOP_DEV = 1 << 17;
    }

    /// How a request is to be done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RequestFlags: u32 {
        /// Durable when it is answered.
        const FUA = 1 << 13;
        /// Zeros that stay allocated.
        const NOUNMAP = 1 << 15;
    }
}

impl Features {
    /// Names for people and scripts, in lower case.
    pub fn names(self) -> Vec<String> {
        self.iter_names().map(|(name, _)| name.to_lowercase()).collect()
    }
}

/// What /dev/ublk-control is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    GetInfo,
    Add,
    Delete,
    Start,
    Stop,
    SetParams,
    GetParams,
    StartRecovery,
    EndRecovery,
    GetFeatures,
    TryStop,
}

impl Command {
    /// The command's number in the submission entry.
    pub(super) const fn code(self) -> u32 {
        let (direction, number) = match self {
            Self::GetInfo => (IOC_READ, 0x02),
            Self::Add => (IOC_READ | IOC_WRITE, 0x04),
            Self::Delete => (IOC_READ | IOC_WRITE, 0x05),
            Self::Start => (IOC_READ | IOC_WRITE, 0x06),
            Self::Stop => (IOC_READ | IOC_WRITE, 0x07),
            Self::SetParams => (IOC_READ | IOC_WRITE, 0x08),
            Self::GetParams => (IOC_READ, 0x09),
            Self::StartRecovery => (IOC_READ | IOC_WRITE, 0x10),
            Self::EndRecovery => (IOC_READ | IOC_WRITE, 0x11),
            Self::GetFeatures => (IOC_READ, 0x13),
            Self::TryStop => (IOC_READ | IOC_WRITE, 0x17),
        };
        ioctl_code(direction, number, 32)
    }

    /// The name in the kernel's documentation.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::GetInfo => "GET_DEV_INFO",
            Self::Add => "ADD_DEV",
            Self::Delete => "DEL_DEV",
            Self::Start => "START_DEV",
            Self::Stop => "STOP_DEV",
            Self::SetParams => "SET_PARAMS",
            Self::GetParams => "GET_PARAMS",
            Self::StartRecovery => "START_USER_RECOVERY",
            Self::EndRecovery => "END_USER_RECOVERY",
            Self::GetFeatures => "GET_FEATURES",
            Self::TryStop => "TRY_STOP_DEV",
        }
    }

    /// The entry's payload. `buffer` is the address and length of what the driver reads or writes.
    pub(super) fn payload(device: u32, buffer: (u64, u16), data: u64) -> [u8; COMMAND_BYTES] {
        let mut bytes = [0; COMMAND_BYTES];
        put(&mut bytes, 0, &device.to_ne_bytes());
        put(&mut bytes, 4, &NO_QUEUE.to_ne_bytes());
        put(&mut bytes, 6, &buffer.1.to_ne_bytes());
        put(&mut bytes, 8, &buffer.0.to_ne_bytes());
        put(&mut bytes, 16, &data.to_ne_bytes());
        bytes
    }
}

/// The daemon's word to the driver about one tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TagCommand {
    /// The tag is free for a request.
    Fetch,
    /// The tag's request is done; the tag is free for another.
    CommitAndFetch {
        /// Bytes done, or a negative error number.
        result: i32,
    },
}

impl TagCommand {
    pub(super) const fn code(self) -> u32 {
        let number = match self {
            Self::Fetch => 0x20,
            Self::CommitAndFetch { .. } => 0x21,
        };
        ioctl_code(IOC_READ | IOC_WRITE, number, 16)
    }

    pub(super) fn payload(self, queue: u16, tag: u16, buffer: u64) -> [u8; 16] {
        let result = match self {
            Self::Fetch => 0,
            Self::CommitAndFetch { result } => result,
        };
        let mut bytes = [0; 16];
        put(&mut bytes, 0, &queue.to_ne_bytes());
        put(&mut bytes, 2, &tag.to_ne_bytes());
        put(&mut bytes, 4, &result.to_ne_bytes());
        put(&mut bytes, 8, &buffer.to_ne_bytes());
        bytes
    }
}

/// How a device is, as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, or stopped.
    Dead,
    /// In use.
    Live,
    /// Its daemon is gone; requests wait for another one.
    Quiesced,
    /// Its daemon is gone; requests fail.
    FailIo,
    /// Something newer than this program.
    Unknown(u16),
}

impl From<u16> for DeviceState {
    fn from(state: u16) -> Self {
        match state {
            0 => Self::Dead,
            1 => Self::Live,
            2 => Self::Quiesced,
            3 => Self::FailIo,
            other => Self::Unknown(other),
        }
    }
}

/// What the driver knows of a device besides its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The N of /dev/ublkbN.
    pub id: u32,
    /// Hardware queues.
    pub queues: u16,
    /// Tags of a queue.
    pub depth: u16,
    /// How it is.
    pub state: DeviceState,
    /// Largest read or write, in bytes.
    pub max_io_bytes: u32,
    /// Process id of its daemon.
    pub daemon_pid: i32,
    /// What was asked for and is not cleared.
    pub features: Features,
    /// A word of ours that the driver keeps.
    pub mark: u64,
}

impl DeviceInfo {
    pub(super) fn encode(&self) -> [u8; INFO_BYTES] {
        let mut bytes = [0; INFO_BYTES];
        put(&mut bytes, 0, &self.queues.to_ne_bytes());
        put(&mut bytes, 2, &self.depth.to_ne_bytes());
        put(&mut bytes, 8, &self.max_io_bytes.to_ne_bytes());
        put(&mut bytes, 12, &self.id.to_ne_bytes());
        put(&mut bytes, 16, &self.daemon_pid.to_ne_bytes());
        put(&mut bytes, 24, &self.features.bits().to_ne_bytes());
        put(&mut bytes, 32, &self.mark.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; INFO_BYTES]) -> Self {
        Self {
            queues: u16::from_ne_bytes(take(bytes, 0)),
            depth: u16::from_ne_bytes(take(bytes, 2)),
            state: u16::from_ne_bytes(take(bytes, 4)).into(),
            max_io_bytes: u32::from_ne_bytes(take(bytes, 8)),
            id: u32::from_ne_bytes(take(bytes, 12)),
            daemon_pid: i32::from_ne_bytes(take(bytes, 16)),
            features: Features::from_bits_retain(u64::from_ne_bytes(take(bytes, 24))),
            mark: u64::from_ne_bytes(take(bytes, 32)),
        }
    }
}

/// What the kernel wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the tag's buffer.
    Read,
    /// Store the tag's buffer.
    Write,
    /// Make all that was answered durable.
    Flush,
    /// The range's contents are no longer wanted.
    Discard,
    /// Make the range read as zeros.
    WriteZeroes,
    /// Something that was never offered.
    Unknown(u8),
}

/// A request of the kernel's block layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub operation: Operation,
    /// How.
    pub flags: RequestFlags,
    /// From where, in bytes.
    pub offset_bytes: u64,
    /// How much, in bytes.
    pub len_bytes: u64,
}

impl Request {
    pub(super) fn decode(bytes: &[u8; DESC_BYTES]) -> Self {
        let op_flags = u32::from_ne_bytes(take(bytes, 0));
        let operation = match op_flags as u8 {
            0 => Operation::Read,
            1 => Operation::Write,
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes,
            other => Operation::Unknown(other),
        };
        let (sector, sectors) = match operation {
            // A flush is of the whole device; the kernel leaves anything in these words.
            Operation::Flush => (0, 0),
            _ => (u64::from_ne_bytes(take(bytes, 8)), u32::from_ne_bytes(take(bytes, 4))),
        };
        Self {
            operation,
            flags: RequestFlags::from_bits_retain(op_flags & !0xff),
            // No device ends where adding a length could overflow.
            offset_bytes: sector.saturating_mul(SECTOR_BYTES).min(i64::MAX as u64),
            len_bytes: u64::from(sectors) * SECTOR_BYTES,
        }
    }
}

/// Where a queue's descriptors are in the character device, and how many bytes to map.
pub(super) fn descriptor_area(queue: u16, depth: u16, page_bytes: u64) -> (u64, usize) {
    let step = (MAX_QUEUE_DEPTH * DESC_BYTES as u64).next_multiple_of(page_bytes);
    let len = (u64::from(depth) * DESC_BYTES as u64).next_multiple_of(page_bytes);
    (u64::from(queue) * step, len as usize)
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

pub(super) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_header_file() {
        // As `gcc` prints them from linux/ublk_cmd.h.
        assert_eq!(Command::GetInfo.code(), 0x8020_7502);
        assert_eq!(Command::Add.code(), 0xc020_7504);
        assert_eq!(Command::EndRecovery.code(), 0xc020_7511);
        assert_eq!(Command::GetFeatures.code(), 0x8020_7513);
        assert_eq!(TagCommand::Fetch.code(), 0xc010_7520);
        assert_eq!(TagCommand::CommitAndFetch { result: 0 }.code(), 0xc010_7521);
    }

    #[test]
    fn a_control_command_is_laid_out_as_the_driver_reads_it() {
        let bytes = Command::payload(7, (0x1122_3344_5566_7788, 64), 42);
        assert_eq!(bytes[..4], 7u32.to_ne_bytes());
        assert_eq!(bytes[4..6], [0xff, 0xff]);
        assert_eq!(bytes[6..8], 64u16.to_ne_bytes());
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 42u64.to_ne_bytes());
        assert!(bytes[24..].iter().all(|&b| b == 0));
    }

    #[test]
    fn device_info_goes_there_and_back() {
        let info = DeviceInfo {
            id: 3,
            queues: 4,
            depth: 128,
            state: DeviceState::Dead,
            max_io_bytes: 1 << 19,
            daemon_pid: 77,
            features: Features::USER_RECOVERY | Features::CMD_IOCTL_ENCODE,
            mark: 0xabcd << 32,
        };
        let mut bytes = info.encode();
        assert_eq!(DeviceInfo::decode(&bytes), info);
        bytes[4..6].copy_from_slice(&2u16.to_ne_bytes());
        assert_eq!(DeviceInfo::decode(&bytes).state, DeviceState::Quiesced);
        assert_eq!(info.features.names(), ["user_recovery", "cmd_ioctl_encode"]);
    }

    #[test]
    fn descriptors_become_requests() {
        let mut bytes = [0; DESC_BYTES];
        put(&mut bytes, 0, &(1u32 | 1 << 13 | 1 << 8).to_ne_bytes());
        put(&mut bytes, 4, &8u32.to_ne_bytes());
        put(&mut bytes, 8, &100u64.to_ne_bytes());
        let request = Request::decode(&bytes);
        assert_eq!(request.operation, Operation::Write);
        assert!(request.flags.contains(RequestFlags::FUA) && !request.flags.contains(RequestFlags::NOUNMAP));
        assert_eq!((request.offset_bytes, request.len_bytes), (51_200, 4096));
        bytes[0] = 2;
        put(&mut bytes, 8, &u64::MAX.to_ne_bytes());
        let flush = Request::decode(&bytes);
        assert_eq!((flush.operation, flush.offset_bytes, flush.len_bytes), (Operation::Flush, 0, 0));
        bytes[0] = 15;
        assert_eq!(Request::decode(&bytes).operation, Operation::Unknown(15));
    }

    #[test]
    fn queues_have_their_descriptors_where_the_driver_has_them() {
        assert_eq!(descriptor_area(0, 128, 4096), (0, 4096));
        assert_eq!(descriptor_area(2, 256, 4096), (2 * 98_304, 8192));
        assert_eq!(descriptor_area(1, 64, 65_536), (131_072, 65_536));
    }

    #[test]
    fn a_tag_command_is_laid_out_as_the_driver_reads_it() {
        let bytes = TagCommand::CommitAndFetch { result: -5 }.payload(1, 9, 0x1000);
        assert_eq!(bytes[..2], 1u16.to_ne_bytes());
        assert_eq!(bytes[2..4], 9u16.to_ne_bytes());
        assert_eq!(bytes[4..8], (-5i32).to_ne_bytes());
        assert_eq!(bytes[8..], 0x1000u64.to_ne_bytes());
    }
}
