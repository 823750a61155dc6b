//! A queue into a thread.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use crossbeam::queue::SegQueue;
use futures_util::task::AtomicWaker;

/// A queue into a thread: any thread sends, one task at a time receives. Clones are the same queue.
///
/// Who sends rings while it holds nothing: whoever is woken on the same processor runs at once, and would wait for it.
pub struct Mailbox<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    items: SegQueue<T>,
    receiver: AtomicWaker,
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { inner: Arc::new(Inner { items: SegQueue::new(), receiver: AtomicWaker::new() }) }
    }
}

impl<T> Mailbox<T> {
    /// Puts an item in. Never waits: the senders' own limits (requests in flight) bound the queue.
    pub fn send(&self, item: T) {
        self.inner.items.push(item);
        self.inner.receiver.wake();
    }

    /// The next item, at once or never.
    pub fn try_recv(&self) -> Option<T> {
        self.inner.items.pop()
    }

    /// The next item, in the order sent.
    pub async fn recv(&self) -> T {
        poll_fn(|context| {
            if let Some(item) = self.try_recv() {
                return Poll::Ready(item);
            }
            self.inner.receiver.register(context.waker());
            // One that was sent before that has woken nobody.
            self.try_recv().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
