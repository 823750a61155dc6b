//! What to do next. Pure.

/// A QEMU, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Does the guest run?
    pub run: Run,
    /// How its migration stands.
    pub migration: Migration,
}

/// Does a guest run?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// It runs.
    Running,
    /// It waits for a migration to come.
    Incoming,
    /// It has been moved away.
    MovedAway,
    /// It stands still for a migration.
    Stopped,
    /// It stands still: somebody paused it, or it was never started.
    Paused,
    /// Something else, in QEMU's word.
    Other(String),
}

/// How a migration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Migration {
    /// There is none.
    None,
    /// Memory is on its way.
    Moving,
    /// The guest stands still, and the word to go on is awaited.
    PreSwitchover,
    /// The last of the state is on its way.
    Switching,
    /// Everything was sent, or has arrived.
    Completed,
    /// It ended without success, in QEMU's word.
    Failed(String),
    /// It is being cancelled.
    Cancelling,
}

/// A disk at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// In standby, and its source answers.
    Ready,
    /// In standby, but the disk cannot be had at the moment.
    Unready(String),
    /// It may be written here.
    Active,
    /// Its daemon does not answer.
    Gone(String),
}

/// Everything that is to be seen; `Err`: out of reach, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The QEMU that the guest comes from.
    pub source: Result<Machine, String>,
    /// The QEMU that it goes to.
    pub destination: Result<Machine, String>,
    /// All disks.
    pub disks: Vec<Disk>,
}

/// What this orchestrator did itself, and wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// It started the migration, so that nothing was taken before.
    pub started: bool,
    /// The guest is to run at the end. Not if somebody had paused it before.
    pub is_to_run: bool,
    /// The source was told to send the rest: it may have sent everything.
    pub continued: bool,
    /// The disks were asked for.
    pub asked: bool,
    /// All disks were taken.
    pub taken: bool,
    /// A disk may be active, whatever can be seen of it.
    pub activating: bool,
    /// The guest is to go on at the source, if it still can; why.
    pub gave_up: Option<String>,
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Have the source send its memory.
    Start,
    /// Wait for the memory.
    WaitMemory,
    /// Let the source send what is left, and let go of its images.
    Continue,
    /// Wait for that.
    WaitSwitchover,
    /// Wait for a disk that cannot be had at the moment, for a while; why.
    WaitDisks(String),
    /// End the migration; why.
    Cancel(String),
    /// Take all disks from the source.
    Take,
    /// Let all disks be written here: no way back from there.
    Activate,
    /// Let the guest run at the destination.
    StartGuest,
    /// It runs there.
    Done,
    /// Call the disks off, end the destination's QEMU, let the guest go on at the source; why.
    Back(String),
    /// Nothing more can be done from here.
    Stuck(Stuck),
}

/// Why nothing more can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// The source's QEMU is out of reach, and the destination has not got everything.
    SourceLost(String),
    /// Everything was sent, the disks were not given, and the source is out of reach.
    NobodyGives(String),
    /// A disk that may have been taken could not be given back.
    NotCalledOff(String),
    /// The source's QEMU does not let the guest go on.
    SourceStands(String),
    /// The disks, or some of them, are not active yet.
    NotActive(String),
    /// The disks are active, but the guest's memory is gone.
    DestinationLost(String),
    /// The disks are active, the memory is there, the guest does not start.
    NotStarted(String),
    /// A disk is active at the destination although the guest has not left the source.
    ActiveTooEarly,
}

/// It knows nothing of the migration that it had begun.
const STARTED_ANEW: &str = "the source's QEMU was started anew: end it, and do not start the machine there";

impl View {
    /// Has the destination all of the guest but its disks?
    pub fn is_loaded(&self) -> bool {
        matches!(&self.destination, Ok(Machine { run, migration: Migration::Completed }) if *run != Run::Incoming)
    }

    /// Has the destination some of the guest, and perhaps the rest in its sockets?
    fn is_loading(&self) -> bool {
        matches!(&self.destination, Ok(Machine { run: Run::Incoming, migration: Migration::Moving }))
    }

    /// Does the guest run at the destination?
    pub fn runs_at_destination(&self) -> bool {
        matches!(&self.destination, Ok(Machine { run: Run::Running, .. }))
    }

    /// Is a migration under way, or done and not used yet?
    pub fn is_midway(&self) -> bool {
        use Migration::{Cancelling, Moving, PreSwitchover, Switching};
        match &self.source {
            Ok(machine) => {
                // QEMU's migration is completed a moment before its guest counts as moved away.
                matches!(machine.run, Run::MovedAway | Run::Stopped)
                    || matches!(machine.migration, Moving | PreSwitchover | Switching | Cancelling)
            }
            Err(_) => self.is_loaded() || self.is_loading() || self.has_active(),
        }
    }

    fn has_active(&self) -> bool {
        self.disks.contains(&Disk::Active)
    }

    /// Are all disks active?
    pub fn all_active(&self) -> bool {
        self.disks.iter().all(|disk| *disk == Disk::Active)
    }

    /// Why a disk could not be had now.
    fn unready(&self) -> Option<&String> {
        self.disks.iter().find_map(|disk| match disk {
            Disk::Unready(why) | Disk::Gone(why) => Some(why),
            Disk::Ready | Disk::Active => None,
        })
    }

    /// Why the migration cannot go on although nothing has happened yet.
    pub(super) fn obstacle(&self) -> Option<&String> {
        // A QEMU that cannot read its disk does not answer, either.
        self.unready().or(self.destination.as_ref().err())
    }
}

/// What to do next.
pub fn next(view: &View, own: &Own) -> Step {
    if own.activating || view.has_active() {
        forward(view, own)
    } else if view.is_loaded() {
        take_over(view, own)
    } else {
        before(view, own)
    }
}

/// Nothing is active, and the destination does not have the guest yet.
fn before(view: &View, own: &Own) -> Step {
    let lost = match &view.source {
        Ok(source) if source.migration == Migration::None && own.continued => STARTED_ANEW,
        Ok(source) => return before_with(source, view, own),
        Err(why) => why,
    };
    // What it sent last may still be on the way into a destination that takes its time. If that is not all of it, the
    // destination's QEMU ends by itself.
    if view.is_loading() && (own.continued || !own.started) {
        return Step::WaitSwitchover;
    }
    Step::Stuck(Stuck::SourceLost(lost.into()))
}

fn before_with(source: &Machine, view: &View, own: &Own) -> Step {
    let obstacle = own.gave_up.as_ref().or_else(|| view.obstacle());
    match (&source.migration, obstacle) {
        (Migration::Cancelling, _) | (Migration::Switching, None) => Step::WaitSwitchover,
        (Migration::Moving | Migration::PreSwitchover | Migration::Switching, Some(why)) => Step::Cancel(why.clone()),
        (Migration::Moving, None) => Step::WaitMemory,
        (Migration::PreSwitchover, None) => Step::Continue,
        (Migration::Completed, obstacle) if matches!(source.run, Run::MovedAway | Run::Stopped) => {
            match (obstacle, &view.destination) {
                (Some(why), _) | (None, Err(why)) => Step::Back(why.clone()),
                (None, Ok(_)) => Step::WaitSwitchover,
            }
        }
        (_, Some(why)) => Step::Back(why.clone()),
        (Migration::None, None) if own.started => Step::WaitMemory,
        (Migration::None | Migration::Completed, None) => Step::Start,
        (Migration::Failed(word), None) if own.started => Step::Back(format!("QEMU's migration {word}")),
        (Migration::Failed(_), None) => Step::Start,
    }
}

/// Nothing is active, and the destination has the guest, but for its disks.
fn take_over(view: &View, own: &Own) -> Step {
    match &view.source {
        Ok(Machine { run: Run::Running, .. }) => {
            Step::Back("the source's QEMU let its guest go on, although it had sent everything".into())
        }
        Ok(Machine { migration: Migration::Failed(word), .. }) => {
            Step::Back(format!("QEMU's migration {word} at the source"))
        }
        Ok(Machine { migration: Migration::Completed, .. }) | Err(_) => {
            let started = "the guest was started at the destination before it had its disks".to_owned();
            let started = view.runs_at_destination().then_some(&started);
            match (own.gave_up.as_ref().or(started), view.unready(), &view.source) {
                (Some(why), _, Ok(_)) => Step::Back(why.clone()),
                (Some(why), _, Err(lost)) => Step::Stuck(Stuck::NobodyGives(format!("{why}; {lost}"))),
                (None, Some(why), _) => Step::WaitDisks(why.clone()),
                (None, None, _) if own.taken => Step::Activate,
                (None, None, _) => Step::Take,
            }
        }
        Ok(Machine { migration: Migration::None, .. }) => Step::Stuck(Stuck::NobodyGives(STARTED_ANEW.into())),
        Ok(_) => Step::WaitSwitchover,
    }
}

/// A disk is active, or may be: the guest can only run at the destination.
fn forward(view: &View, own: &Own) -> Step {
    let source_runs = matches!(&view.source, Ok(Machine { run: Run::Running, .. }));
    if source_runs && !own.activating && !view.is_loaded() {
        return Step::Stuck(Stuck::ActiveTooEarly);
    }
    if !view.all_active() {
        return Step::Activate;
    }
    let source_is_done = match &view.source {
        Ok(source) => !matches!(source.migration, Migration::None | Migration::Failed(_)) && !source_runs,
        Err(_) => false,
    };
    match &view.destination {
        Ok(Machine { run: Run::Running, .. }) => Step::Done,
        Ok(_) if view.is_loaded() && own.is_to_run => Step::StartGuest,
        Ok(_) if view.is_loaded() => Step::Done,
        Ok(_) if source_is_done => Step::WaitSwitchover,
        Ok(_) => Step::Stuck(Stuck::ActiveTooEarly),
        Err(why) => Step::Stuck(Stuck::DestinationLost(why.clone())),
    }
}
