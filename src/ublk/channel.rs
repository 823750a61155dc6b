//! Requests and answers, by /dev/ublkcN. No knowledge of what is done with them.
//!
//! ```text
//!   Tag ──fetch──► kernel ──► (Tag, Request) ──work──► Tag ──commit_and_fetch──► kernel ──► …
//! ```
//! Invariant: a tag is either here, as a value, or with the kernel, as an operation in the ring that owns
//! it. So whoever holds a [`Tag`] is alone with its buffer and its descriptor.

use std::fs::OpenOptions;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::UblkError;
use super::abi::{DESC_BYTES, DeviceInfo, Request, TagCommand, descriptor_area};
use crate::uring::{PAGE_BYTES, command};

/// The character device of a ublk device; this process alone has it open.
#[derive(Clone)]
pub struct Channel {
    fd: Arc<OwnedFd>,
    info: DeviceInfo,
}

impl Channel {
    /// Opens it.
    pub fn open(info: &DeviceInfo) -> Result<Self, UblkError> {
        let path = format!("/dev/ublkc{}", info.id);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => UblkError::NoNode(path.into()),
            _ => UblkError::Open { path: path.into(), source: e },
        })?;
        Ok(Self { fd: Arc::new(file.into()), info: *info })
    }

    /// The tags of a queue, for the thread that calls: it must be the one to fetch and commit them all.
    pub fn tags(&self, queue: u16) -> Result<Vec<Tag>, UblkError> {
        let area = Area::map(&self.fd, &self.info, queue).map_err(|source| UblkError::Queue { queue, source })?;
        let area = Rc::new(area);
        let tag = |tag| Tag { fd: self.fd.clone(), area: area.clone(), queue, tag };
        Ok((0..self.info.depth).map(tag).collect())
    }
}

/// A mapping that goes away with its value.
struct Mapping {
    start: NonNull<u8>,
    len_bytes: NonZeroUsize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what was mapped; tags and operations, which use it, hold its area.
        let _ = unsafe { munmap(self.start.cast(), self.len_bytes.get()) };
    }
}

/// The memory of a queue: its descriptors, which the kernel writes, and a buffer a tag.
struct Area {
    descriptors: Mapping,
    buffers: Mapping,
    buffer_bytes: usize,
}

impl Area {
    fn map(fd: &OwnedFd, info: &DeviceInfo, queue: u16) -> io::Result<Self> {
        let no_size = || io::Error::from(io::ErrorKind::InvalidInput);
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|n| u64::try_from(n).ok()).unwrap_or(PAGE_BYTES as u64);
        let (offset, len) = descriptor_area(queue, info.depth, page);
        let len_bytes = NonZeroUsize::new(len).ok_or_else(no_size)?;
        let shared = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, to be read only; the driver checks
        // offset and length.
        let start = unsafe { mmap(None, len_bytes, ProtFlags::PROT_READ, shared, fd, offset as i64) }?;
        let descriptors = Mapping { start: start.cast(), len_bytes };
        let buffer_bytes = info.max_io_bytes as usize;
        let len_bytes = NonZeroUsize::new(buffer_bytes * usize::from(info.depth)).ok_or_else(no_size)?;
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Pages come when they are first used.
        let private = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping of zeros at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, len_bytes, both, private) }?;
        Ok(Self { descriptors, buffers: Mapping { start: start.cast(), len_bytes }, buffer_bytes })
    }

    fn buffer(&self, tag: u16) -> NonNull<u8> {
        let at = usize::from(tag) * self.buffer_bytes;
        assert!(at + self.buffer_bytes <= self.buffers.len_bytes.get(), "a tag is below the depth");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.buffers.start.add(at) }
    }

    fn descriptor(&self, tag: u16) -> [u8; DESC_BYTES] {
        let at = usize::from(tag) * DESC_BYTES;
        assert!(at + DESC_BYTES <= self.descriptors.len_bytes.get(), "a tag is below the depth");
        // SAFETY: within the mapping; the kernel wrote it before it completed the fetch and writes it again
        // only after the tag was given back. Volatile, because it changes behind the compiler's back.
        unsafe { self.descriptors.start.add(at).cast::<[u8; DESC_BYTES]>().read_volatile() }
    }
}

/// A place for one request; see the module's page.
pub struct Tag {
    fd: Arc<OwnedFd>,
    area: Rc<Area>,
    queue: u16,
    tag: u16,
}

/// What comes after a fetch.
pub enum Next {
    /// Work. The tag must be committed.
    Request(Tag, Request),
    /// The device is being stopped: the tag is at its end.
    Stopped,
    /// The driver takes the tag no more.
    Failed(io::Error),
}

impl Tag {
    /// Offers the tag for a first request, and waits for it.
    pub async fn fetch(self) -> Next {
        self.send(TagCommand::Fetch).await
    }

    /// Answers the request, with bytes done or an error number, and waits for the next.
    pub async fn commit_and_fetch(self, result: Result<u32, i32>) -> Next {
        let result = result.map_or_else(|errno| -errno.abs(), |done| done as i32);
        self.send(TagCommand::CommitAndFetch { result }).await
    }

    async fn send(self, word: TagCommand) -> Next {
        let payload = word.payload(self.queue, self.tag, self.area.buffer(self.tag).as_ptr() as u64);
        // SAFETY: the driver reads and writes this tag's buffer and descriptor only; both are in the area
        // that the tag holds, and the tag is the operation's resource.
        let (result, tag) = unsafe { command(self.fd.clone(), word.code(), payload, self) }.await;
        match result {
            Ok(0) => {
                let request = Request::decode(&tag.area.descriptor(tag.tag));
                Next::Request(tag, request)
            }
            Ok(other) => {
                Next::Failed(io::Error::other(format!("the driver answered {other}, which was not asked for")))
            }
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Next::Stopped,
            Err(e) => Next::Failed(e),
        }
    }

    /// Bytes of the buffer.
    pub fn capacity(&self) -> usize {
        self.area.buffer_bytes
    }

    /// The first bytes: what a write brought.
    pub fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.capacity(), "a request is not larger than a buffer");
        let start = self.area.buffer(self.tag);
        // SAFETY: within this tag's buffer, as just checked; the kernel does not write to it while the tag is
        // here, and the borrow of `self` keeps `room` away.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }
    }

    /// Room for what a read is answered with.
    pub fn room(&mut self) -> &mut [u8] {
        let start = self.area.buffer(self.tag);
        // SAFETY: exactly this tag's buffer, which no other tag's touches; the kernel does not use it while
        // the tag is here, and the borrow is as long as that of `self`.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.area.buffer_bytes) }
    }
}

impl AsRef<[u8]> for Tag {
    fn as_ref(&self) -> &[u8] {
        self.bytes(self.capacity())
    }
}

impl AsMut<[u8]> for Tag {
    fn as_mut(&mut self) -> &mut [u8] {
        self.room()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Operation;
    use super::*;

    #[test]
    fn a_tag_is_alone_with_its_buffer() {
        let mut tag = loose_tag(8192);
        assert_eq!(tag.capacity(), 8192);
        tag.room().fill(7);
        assert_eq!(tag.bytes(8192), [7; 8192]);
        let other = Tag { fd: tag.fd.clone(), area: tag.area.clone(), queue: 0, tag: 0 };
        assert_eq!(other.bytes(8192), [0; 8192]);
        // A descriptor of zeros is a read of nothing.
        assert_eq!(Request::decode(&tag.area.descriptor(1)).operation, Operation::Read);
    }

    /// A tag without a driver, for tests of what is done with requests.
    fn loose_tag(buffer_bytes: usize) -> Tag {
        let file = std::fs::File::open("/dev/zero").expect("there is a /dev/zero");
        let info = DeviceInfo {
            id: 0,
            queues: 1,
            depth: 2,
            state: super::super::abi::DeviceState::Dead,
            max_io_bytes: buffer_bytes as u32,
            daemon_pid: 0,
            features: super::super::abi::Features::empty(),
            mark: 0,
        };
        let fd: OwnedFd = file.into();
        let area = Rc::new(Area::map(&fd, &info, 0).expect("/dev/zero can be mapped"));
        Tag { fd: Arc::new(fd), area, queue: 0, tag: 1 }
    }
}
