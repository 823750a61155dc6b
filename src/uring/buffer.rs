//! Buffers that are used again.
//!
//! A mebibyte that is fresh from the allocator is fresh from the kernel: each of its pages is a fault, and all of it is
//! made zero before what it is for is written over that. This was a seventh of what a hydrated block cost the processor. So
//! a large buffer that is let go of is kept by the thread that did, as it is, and the next one of about its size is that.
//! What is in it is what was in it: whoever takes one fills what he gives on.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Smaller ones the allocator is quick with.
const LEAST_KEPT_BYTES: usize = 32 << 10;
/// What a thread keeps: as much of the largest fetches as comes back at once. With half of it many were made anew.
const MOST_KEPT_BYTES: usize = 8 << 20;
/// What is larger by more than this part of what is wanted is left for others: what is under way is counted by its length.
const LARGER_PART: usize = 4;
/// What nobody has filled must not be taken for anything. Where this is looked for, it is this, and not zeros.
const UNFILLED: u8 = if cfg!(any(debug_assertions, feature = "simulation")) { 0xd5 } else { 0 };

thread_local! {
    static KEPT: RefCell<Kept> = RefCell::default();
}

/// Bytes of a known number, on the heap.
#[derive(Default)]
pub struct Buffer {
    /// Longer than `len` if it was made for more.
    bytes: Vec<u8>,
    len: usize,
}

impl Buffer {
    /// So many bytes, whatever they are: whoever takes them fills them.
    pub fn to_fill(len: usize) -> Self {
        let kept = (len >= LEAST_KEPT_BYTES).then(|| KEPT.with_borrow_mut(|kept| kept.take(len))).flatten();
        Self { bytes: kept.unwrap_or_else(|| vec![UNFILLED; len]), len }
    }

    /// Gives back what this thread keeps: no more large ones are wanted for now.
    pub fn forget_kept() {
        KEPT.take();
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        Self { bytes, len }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() >= LEAST_KEPT_BYTES {
            let bytes = std::mem::take(&mut self.bytes);
            // A thread that ends keeps nothing.
            let _ = KEPT.try_with(|kept| kept.borrow_mut().put(bytes));
        }
    }
}

/// What a thread has let go of, the oldest first.
#[derive(Default)]
struct Kept {
    spare: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Kept {
    /// The newest one that is large enough, and not too large.
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let fits = |spare: &Vec<u8>| (len..=len + len / LARGER_PART).contains(&spare.len());
        let found = self.spare.iter().rposition(fits).and_then(|at| self.spare.remove(at))?;
        self.bytes -= found.len();
        Some(found)
    }

    /// The oldest make room.
    fn put(&mut self, mut spare: Vec<u8>) {
        // One that grew by and by may have room for twice as much.
        if spare.len() > MOST_KEPT_BYTES || spare.capacity() > spare.len() + spare.len() / LARGER_PART {
            return;
        }
        if UNFILLED != 0 {
            spare.fill(UNFILLED);
        }
        self.bytes += spare.len();
        self.spare.push_back(spare);
        while self.bytes > MOST_KEPT_BYTES {
            let oldest = self.spare.pop_front().expect("bytes are counted for what is there");
            self.bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(buffer: &Buffer) -> *const u8 {
        buffer.as_ptr()
    }

    #[test]
    fn a_large_one_is_used_again_for_what_is_about_as_large() {
        let mut first = Buffer::to_fill(1 << 20);
        first.fill(7);
        let was = address(&first);
        drop(first);
        let small = Buffer::to_fill(256 << 10);
        assert_ne!(address(&small), was, "too large");
        let larger = Buffer::to_fill((1 << 20) + 1);
        assert_ne!(address(&larger), was);
        let again = Buffer::to_fill(900 << 10);
        assert_eq!((address(&again), again.len()), (was, 900 << 10));
        assert!(
            again.iter().all(|byte| *byte == if UNFILLED == 0 { 7 } else { UNFILLED }),
            "tests look for what nobody filled"
        );
        drop(again);
        // It is as large as it was.
        assert_eq!(address(&Buffer::to_fill(1 << 20)), was);
    }

    #[test]
    fn a_thread_keeps_a_bounded_amount_and_the_newest() {
        let many: Vec<Buffer> = (0..200).map(|n| Buffer::to_fill((64 << 10) + n)).collect();
        let newest = address(many.last().unwrap());
        drop(many);
        let kept = KEPT.with_borrow(|kept| (kept.bytes, kept.spare.iter().map(Vec::len).sum::<usize>()));
        assert_eq!(kept.0, kept.1);
        assert!((MOST_KEPT_BYTES - (65 << 10)..=MOST_KEPT_BYTES).contains(&kept.0), "{kept:?}");
        assert_eq!(address(&Buffer::to_fill(64 << 10)), newest);
        drop(Buffer::from(vec![0; MOST_KEPT_BYTES + 1]));
        drop(Buffer::from(vec![0; LEAST_KEPT_BYTES - 1]));
        let mut roomy = Vec::with_capacity(200 << 10);
        roomy.resize(100 << 10, 0);
        drop(Buffer::from(roomy));
        assert!(KEPT.with_borrow(|kept| kept.spare.iter().all(|spare| spare.len() < 65 << 10)));
        Buffer::forget_kept();
        assert_eq!(KEPT.with_borrow(|kept| (kept.bytes, kept.spare.len())), (0, 0));
    }

    #[test]
    fn what_is_new_is_as_long_as_was_asked_and_what_was_made_of_a_vector_is_that() {
        assert_eq!(*Buffer::to_fill(100), [UNFILLED; 100]);
        assert_eq!(*Buffer::from(vec![1, 2, 3]), [1, 2, 3]);
        assert_eq!(*Buffer::from(vec![1, 2, 3]).clone(), [1, 2, 3]);
        assert!(Buffer::default().is_empty());
    }
}
