//! What people see: sizes, durations, progress.

use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};

use crate::control::{HandoffStatus, State, Status};

/// Bytes for people: `1.50 GiB`.
pub(super) fn bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

/// A rate for people.
pub(super) fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", HumanBytes(bytes_per_s as u64))
}

/// A duration for people.
pub(super) fn seconds(s: f64) -> String {
    HumanDuration(Duration::from_secs_f64(s.clamp(0.0, 1e9))).to_string()
}

/// A bar on standard error if that is a terminal, and nothing otherwise.
pub(super) fn bar(total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} [{bar:32}] {percent:>3}% of {total_bytes}  {msg}");
    ProgressBar::new(total).with_style(style.expect("the template is a constant"))
}

/// Shows a status on a bar.
pub(super) fn show_on(bar: &ProgressBar, status: &Status) {
    bar.set_prefix(status.name.clone());
    bar.set_position(status.bytes.present);
    bar.set_message(headline(status));
}

/// How a device is, in a few words: with rate and ETA while blocks come.
pub(super) fn headline(status: &Status) -> String {
    if let Some(failure) = &status.failure {
        return format!("failed: {failure}");
    }
    let lost = status.source.lost_s.map(|lost_s| {
        let waiting = status.frontend.waiting_requests;
        format!("source lost for {}, {waiting} requests wait", seconds(lost_s))
    });
    // Whatever is here, it is not the disk any more.
    if status.state == State::Away {
        let lost = lost.map_or_else(String::new, |lost| format!("; {lost}"));
        return format!("{}{lost}", given(&status.handoff));
    }
    if let Some(lost) = lost {
        return lost;
    }
    match (status.hydrate.state.as_str(), status.hydrate.eta_s) {
        _ if status.state == State::Standby => "in standby: the disk is still the source's".into(),
        _ if !status.source_needed => "complete".into(),
        ("done", _) => "all here, not yet committed".into(),
        ("running", Some(eta)) => format!("{}, {} to go", rate(status.hydrate.rate_bytes_per_s), seconds(eta)),
        (state, _) => match &status.hydrate.reason {
            Some(reason) => format!("hydration {state}: {reason}"),
            None => format!("hydration {state}"),
        },
    }
}

/// Who has a disk that was given away, and whether the device may go.
fn given(handoff: &HandoffStatus) -> String {
    let to = handoff.given_to.as_deref().unwrap_or("another host");
    let rest = if handoff.released { "which has all of it" } else { "which still fetches from here" };
    format!("given to {to} in epoch {}, {rest}", handoff.epoch)
}
