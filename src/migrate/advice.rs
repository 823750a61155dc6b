//! What to do by hand where nothing more can be done from here: always the exact commands.

use super::places::Places;
use super::plan::Stuck;

impl Stuck {
    /// One line: what is, and what to do.
    pub fn advice(&self, places: &Places) -> String {
        let all: Vec<&str> = places.names().collect();
        let names = all.join(" ");
        let (from, to) = (&places.from, &places.to);
        let cont = |at| format!(r#"{{"execute":"cont"}} at {at}"#);
        let abort = all.iter().map(|name| format!("`blkferry abort {name}`")).collect::<Vec<_>>().join(", ");
        match self {
            Self::SourceLost(why) => format!(
                "{why}; the destination has not got all of the guest's memory, and the disks are still at the source: if the \
                 machine has ended there, start it again; end the destination's QEMU, and {abort}"
            ),
            Self::NobodyGives(why) => format!(
                "the disks were not given: {why}; the guest stands still, and the destination's QEMU has its memory: keep \
                 it. When the source's export can be reached again, run the same command again"
            ),
            Self::NotCalledOff(why) => format!(
                "{why}; the guest stands still at the source, and must not go on before each disk was given back: see to it \
                 that the source's export and the devices ({names}) run, then {abort}, then {}",
                cont(from)
            ),
            Self::SourceStands(why) => format!(
                "the disks are the source's, but the guest does not go on there: {why}; try {}, or start the machine there \
                 again",
                cont(from)
            ),
            Self::NotActive(why) => format!(
                "{why}; the source has given the disks: the guest can only go on at the destination, whose QEMU has its memory \
                 (keep it), and must never run at the source. See to it that each device ({names}) runs there (`blkferry \
                 list`), attach again what does not, and run the same command again; or by hand `blkferry activate {names}`, \
                 then {}",
                cont(to)
            ),
            Self::DestinationLost(why) => format!(
                "the disks ({names}) are active at the destination, but {why}, and the guest's memory with it: start the \
                 machine at the destination from these disks; never again at the source"
            ),
            Self::NotStarted(why) => format!(
                "the disks ({names}) are active at the destination, but the guest does not start there: {why}; start it with \
                 {}; never again at the source",
                cont(to)
            ),
            Self::ActiveTooEarly => format!(
                "the disks ({names}) are active at the destination, but the guest's memory is not there: start the machine \
                 at the destination from these disks; it can never again run at the source"
            ),
        }
    }
}
