//! What a thread has allocated, and what a directory is used for.
#![allow(unsafe_code)] // An allocator cannot be had without; it adds counting to the system's, and nothing else.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// A case lives on one thread: what is allocated there and not given back is its own.
    static ALLOCATED: Cell<i64> = const { Cell::new(0) };
}

fn add(bytes: i64) {
    // A thread that is ending has no counter any more, and nobody looks at it.
    let _ = ALLOCATED.try_with(|allocated| allocated.set(allocated.get() + bytes));
}

// SAFETY: all of it is the system's allocator; counting touches a plain cell of the thread and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size() as i64);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        add(-(layout.size() as i64));
        // SAFETY: it came from the same allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size as i64 - layout.size() as i64);
        // SAFETY: it came from the same allocator, with this layout.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Bytes that this thread has allocated and not given back.
pub fn allocated_bytes() -> i64 {
    ALLOCATED.get()
}

/// Descriptors of this process that are open on something in a directory. Other tests run beside this one.
pub fn descriptors_in(dir: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").expect("proc is mounted");
    let targets = all.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter(|target| target.starts_with(dir)).count()
}

/// Files in a directory.
pub fn files_in(dir: &Path) -> usize {
    std::fs::read_dir(dir).expect("it is there").count()
}
