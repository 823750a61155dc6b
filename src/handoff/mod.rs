//! Who a disk belongs to, and how it changes hands. Pure: what is to be recorded and said follows from what is on
//! record and what is asked; carrying it out is the business of those who have files and sockets.
//!
//! ```text
//!   destination                                source
//!   standby ──────── Take {to, epoch n+1} ───► here, epoch n
//!      │                                          │ 1. writers are kept out, all is synced
//!      │                                          │ 2. on record: given to `to`, epoch n+1
//!      │ ◄────── Given {epoch n+1, identity} ──── 3. answer
//!      │ on record: active, epoch n+1
//!      ▼
//!   the guest may write
//! ```
//! Each side has one durable record, and acts on it alone. A message may be lost, repeated or late, and either side may
//! be killed at any step: whoever comes back reads its record and asks, or is asked, again.
//!
//! A destination that calls the handoff off records first that it will never act upon that epoch, and then sends
//! GiveBack, which ends the epoch at the source, whether it was given or not. What was still on its way comes too late.
//!
//! Invariants: at no time may both sides write; a source that has said *given* never writes again, unless the
//! destination has said that it never will, or a person says so by force; each epoch is given to one destination only.
//! `tests/interleave` walks through every interleaving of two sides that run this very code.

mod deed;
mod home;
mod taker;

pub use deed::{Deed, Move};
pub use home::{Doubt, differs_from_base};
pub use taker::{Right, Step, Taker};
