//! One direction of a connection: bytes in order, each with the time at which they arrive.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use event_listener::Event;

/// Bytes that may be under way before the sender waits: what the buffers of two kernels hold.
const WINDOW_BYTES: usize = 256 << 10;

struct Packet {
    at: Duration,
    bytes: Vec<u8>,
    read: usize,
}

/// What a reader finds.
pub(super) enum Found {
    /// So many bytes.
    Bytes(usize),
    /// The end.
    End,
    /// Nothing before then, or before somebody sends.
    NotBefore(Option<Duration>),
}

/// See the module's page.
#[derive(Default)]
pub(super) struct Pipe {
    packets: RefCell<VecDeque<Packet>>,
    bytes: Cell<usize>,
    /// The sender has closed; the end arrives then.
    end_at: Cell<Option<Duration>>,
    /// Nothing that is sent arrives any more.
    mute: Cell<bool>,
    /// Nobody reads any more.
    deaf: Cell<bool>,
    pub(super) changed: Event,
}

impl Pipe {
    /// Bytes that may be sent now.
    pub(super) fn room(&self) -> usize {
        WINDOW_BYTES.saturating_sub(self.bytes.get())
    }

    pub(super) fn is_mute(&self) -> bool {
        self.mute.get()
    }

    /// What is sent from now on vanishes.
    pub(super) fn fall_silent(&self) {
        self.mute.set(true);
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.get()
    }

    /// Nobody will read what is under way.
    pub(super) fn stop_reading(&self, now: Duration) {
        self.deaf.set(true);
        let mut packets = self.packets.borrow_mut();
        packets.retain(|packet| packet.at <= now);
        self.bytes.set(packets.iter().map(|packet| packet.bytes.len() - packet.read).sum());
        drop(packets);
        self.changed.notify(usize::MAX);
    }

    pub(super) fn put(&self, at: Duration, bytes: Vec<u8>) {
        let mut packets = self.packets.borrow_mut();
        let at = packets.back().map_or(at, |last| last.at.max(at));
        self.bytes.set(self.bytes.get() + bytes.len());
        packets.push_back(Packet { at, bytes, read: 0 });
        drop(packets);
        self.changed.notify(usize::MAX);
    }

    /// No more will be sent; that it is so is known at the earliest then.
    pub(super) fn close(&self, at: Duration) {
        if self.mute.get() || self.end_at.get().is_some() {
            return;
        }
        let at = self.packets.borrow().back().map_or(at, |last| last.at.max(at));
        self.end_at.set(Some(at));
        self.changed.notify(usize::MAX);
    }

    /// Takes what has arrived, as far as it fits.
    pub(super) fn take(&self, now: Duration, target: &mut [u8]) -> Found {
        let mut packets = self.packets.borrow_mut();
        let mut done = 0;
        while let Some(packet) = packets.front_mut().filter(|packet| packet.at <= now) {
            let len = (packet.bytes.len() - packet.read).min(target.len() - done);
            target[done..done + len].copy_from_slice(&packet.bytes[packet.read..packet.read + len]);
            done += len;
            packet.read += len;
            if packet.read < packet.bytes.len() {
                break;
            }
            packets.pop_front();
        }
        let next = packets.front().map(|packet| packet.at);
        drop(packets);
        if done > 0 {
            self.bytes.set(self.bytes.get() - done);
            self.changed.notify(usize::MAX);
            return Found::Bytes(done);
        }
        match (next, self.end_at.get()) {
            _ if self.deaf.get() => Found::End,
            (Some(at), _) => Found::NotBefore(Some(at)),
            (None, Some(at)) if at <= now => Found::End,
            (None, at) => Found::NotBefore(at),
        }
    }

    pub(super) fn under_way(&self) -> usize {
        self.bytes.get()
    }

    pub(super) fn clear(&self) {
        self.packets.borrow_mut().clear();
        self.bytes.set(0);
    }
}
