//! What the simulator finds wrong, as a value: the planted faults are *expected* to be found.

use std::fmt;

/// A rule of the engine that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The invariant, as the design names it.
    pub rule: &'static str,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} broken: {}", self.rule, self.what)
    }
}

/// The outcome of everything that can find a violation.
pub type Checked<T = ()> = Result<T, Violation>;

/// Goes on if the condition holds, else returns the violation.
#[allow(unused_macros)] // Each test uses its part.
macro_rules! ensure {
    ($holds:expr, $rule:literal, $($what:tt)+) => {
        if !$holds {
            return Err($crate::check::Violation { rule: $rule, what: format!($($what)+) });
        }
    };
}
#[allow(unused_imports)]
pub(crate) use ensure;
