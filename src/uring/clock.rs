//! The two things that differ from run to run by themselves: the time, and chance. Whoever waits, backs off or gives up
//! asks here, so that a simulated world can have its own (feature `simulation`).

use std::time::Instant;
#[cfg(not(feature = "simulation"))]
use std::time::{SystemTime, UNIX_EPOCH};

/// The time.
#[cfg(not(feature = "simulation"))]
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// The time: that of the simulated world, where this is one.
#[cfg(feature = "simulation")]
pub fn now() -> Instant {
    super::simulation::now()
}

/// A number below `n` that nobody can tell beforehand; for spreading things out, not for secrets.
#[cfg(not(feature = "simulation"))]
pub fn lot(n: u32) -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.subsec_nanos() ^ std::process::id().wrapping_mul(0x9e37_79b9)) % n
}

/// A number below `n`, drawn by the simulated world.
#[cfg(feature = "simulation")]
pub fn lot(n: u32) -> u32 {
    super::simulation::lot(n)
}
