//! How much one fetch asks for, and how much of them all may be under way.

/// Most bytes that one fetch asks for.
pub const MAX_FETCH_BYTES: u64 = 1 << 20;
/// What a fetch counts for at least: of small ones there are so many more under way, but not without end.
pub(super) const SMALL_FETCH_BYTES: u64 = 32 << 10;
/// Bytes that hydration may have in flight, on the wire or on their way into the cache.
pub(super) const BULK_WINDOW_BYTES: usize = 24 << 20;
/// The same where demand shares the only connection: what is ahead of it there is what it waits for.
pub(super) const BULK_WINDOW_SHARED_BYTES: usize = 4 << 20;
/// With less than this free, hydration makes room in the cache before it asks the source: what cannot be stored
/// would cross the wire again (I6).
pub(super) const SCARCE_BYTES: u64 = 4 * BULK_WINDOW_BYTES as u64;
/// Bytes that demand may have in flight.
pub(super) const DEMAND_WINDOW_BYTES: usize = 64 << 20;
