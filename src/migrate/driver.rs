//! Carries the plan out.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::machine::Memory;
use super::plan::{Own, Step, Stuck, View, next};
use super::report::Moments;

/// How long a thing is tried again that has to succeed.
const INSIST: Duration = Duration::from_secs(15);
/// Pause between two attempts.
const PACE: Duration = Duration::from_millis(300);

/// Two QEMUs and the disks between them. Errors are one clear line.
pub trait World {
    /// How everything is.
    fn look(&mut self) -> View;
    /// What time it is.
    fn now(&self) -> Instant {
        Instant::now()
    }
    /// Waits until something happens, or so long.
    fn wait(&mut self, at_most: Duration);
    /// How far the memory is.
    fn memory(&self) -> Memory;
    /// Has the destination listen and the source send.
    fn start(&mut self) -> Result<(), String>;
    /// Lets the source send the last of it.
    fn go_on(&mut self) -> Result<(), String>;
    /// Cancels the migration at the source.
    fn cancel(&mut self) -> Result<(), String>;
    /// Takes all disks.
    fn take(&mut self) -> Result<(), String>;
    /// Activates all disks.
    fn activate(&mut self) -> Result<(), NotActive>;
    /// Gives back all disks that were taken, or may have been.
    fn call_off(&mut self) -> Result<(), String>;
    /// Ends the destination's QEMU; it may have ended by itself.
    fn quit_destination(&mut self);
    /// Lets the guest run at the source.
    fn run_source(&mut self) -> Result<(), String>;
    /// Lets the guest run at the destination.
    fn run_destination(&mut self) -> Result<(), String>;
    /// Sets the source's migration settings back.
    fn restore(&mut self);
}

/// Not all disks are active.
#[derive(Clone, Debug)]
pub struct NotActive {
    /// One clear line.
    pub why: String,
    /// Is it certain that none is?
    pub none: bool,
}

/// Is told what is about to be done. [`ControlFlow::Break`] ends the driver there, as if it had been killed.
pub trait Watcher {
    /// Before a step, and while one that waits goes on.
    fn before(&mut self, _step: &Step, _memory: Memory) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// After a step.
    fn after(&mut self, _step: &Step) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl Watcher for () {}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The memory; `None`: as long as it takes.
    pub memory: Option<Duration>,
    /// The memory without any of it being sent. QEMU itself waits for ever on a network that has fallen silent.
    pub stall: Duration,
    /// From the word to go on until the destination has everything, while the guest stands still.
    pub switchover: Duration,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest is at the destination.
    Moved,
    /// The guest is at the source; why.
    Stayed(String),
    /// Somebody has to see to it.
    Stuck(Stuck),
    /// The watcher ended it.
    Abandoned,
}

/// What a driver knows.
#[derive(Clone, Debug, Default)]
pub struct State {
    own: Own,
    moments: Moments,
    /// Since when the end of the switchover is waited for: the word to go on was given, or the source is out of reach and
    /// may be that far.
    switching: Option<Instant>,
    /// How much of the memory was sent, and since when it is no more.
    sent: Option<(u64, Instant)>,
    /// Since when it is tried to get back, or forward.
    insisting: Option<Instant>,
}

/// Moves a guest.
pub struct Driver<'a, W> {
    world: &'a mut W,
    limits: Limits,
    interrupted: Arc<AtomicBool>,
    state: State,
}

impl<'a, W: World> Driver<'a, W> {
    /// Before the first step. `is_to_run`: the guest runs at the end; `interrupted` is set by somebody who wants it to stay.
    pub fn new(world: &'a mut W, limits: Limits, is_to_run: bool, interrupted: Arc<AtomicBool>) -> Self {
        Self::resume(world, limits, is_to_run, interrupted, None)
    }

    /// Goes on with what another driver knew, if there is one; see [`Driver::into_state`].
    pub fn resume(
        world: &'a mut W,
        limits: Limits,
        is_to_run: bool,
        interrupted: Arc<AtomicBool>,
        state: Option<State>,
    ) -> Self {
        let fresh = || State { own: Own { is_to_run, ..Own::default() }, ..State::default() };
        Self { world, limits, interrupted, state: state.unwrap_or_else(fresh) }
    }

    /// What it knows, for a driver that goes on in its place: the world is free meanwhile.
    pub fn into_state(self) -> State {
        self.state
    }

    /// When each phase began.
    pub fn moments(&self) -> &Moments {
        &self.state.moments
    }

    /// Moves the guest, or sees to it that it stays.
    pub fn run(&mut self, watcher: &mut dyn Watcher) -> Outcome {
        loop {
            let view = self.world.look();
            self.mind_limits(&view);
            let step = next(&view, &self.state.own);
            self.state.moments.enter(&step, self.world.now());
            if watcher.before(&step, self.world.memory()).is_break() {
                return Outcome::Abandoned;
            }
            let outcome = self.perform(&step, &view);
            if watcher.after(&step).is_break() {
                return Outcome::Abandoned;
            }
            if let ControlFlow::Break(outcome) = outcome {
                self.state.moments.end(self.world.now());
                return outcome;
            }
        }
    }

    fn mind_limits(&mut self, view: &View) {
        if self.state.own.gave_up.is_some() || self.state.own.asked {
            return;
        }
        let now = self.world.now();
        let is_late = |since: Option<Instant>, limit: Duration| since.is_some_and(|since| now - since > limit);
        let seconds = |limit: Duration| limit.as_secs();
        let last_sent = self.last_sent(now);
        self.state.own.gave_up = match (self.state.switching, self.limits.memory) {
            _ if self.interrupted.load(Ordering::Relaxed) => Some("interrupted".into()),
            (Some(_), _) if is_late(self.state.switching, self.limits.switchover) => {
                // To see that may have taken all the time: a QEMU whose disk does not answer says nothing.
                let cause = view.obstacle().map_or_else(String::new, |why| format!(": {why}"));
                let limit = seconds(self.limits.switchover);
                Some(format!("the last of the guest's state did not arrive in {limit} s{cause}"))
            }
            (None, Some(limit)) if is_late(self.state.moments.memory(), limit) => {
                Some(format!("the guest's memory did not arrive in {} s", seconds(limit)))
            }
            (None, _) if is_late(last_sent, self.limits.stall) => Some(format!(
                "nothing of the guest's memory could be sent for {} s: the network between the two QEMUs has fallen silent",
                seconds(self.limits.stall)
            )),
            _ => None,
        };
    }

    /// When more of the memory was seen to have been sent, since it began to move.
    fn last_sent(&mut self, now: Instant) -> Option<Instant> {
        self.state.moments.memory()?;
        let bytes = self.world.memory().transferred_bytes;
        if self.state.sent.is_none_or(|(before, _)| before != bytes) {
            self.state.sent = Some((bytes, now));
        }
        self.state.sent.map(|(_, since)| since)
    }

    fn give_up(&mut self, why: String) -> ControlFlow<Outcome> {
        self.state.own.gave_up.get_or_insert(why);
        ControlFlow::Continue(())
    }

    fn perform(&mut self, step: &Step, view: &View) -> ControlFlow<Outcome> {
        match step {
            Step::Start => match self.world.start() {
                Ok(()) => self.state.own.started = true,
                Err(why) => return self.give_up(why),
            },
            Step::WaitMemory => {
                // The source is in reach again, and was not as far as that.
                if !self.state.own.continued {
                    self.state.switching = None;
                }
                self.world.wait(Duration::from_millis(200));
            }
            Step::WaitSwitchover => return self.wait_switchover(view),
            Step::WaitDisks(why) => {
                if let ControlFlow::Break(_) = self.insist(Stuck::NotActive(why.clone())) {
                    // What comes now, back or not, is given as long again.
                    self.state.insisting = None;
                    return self.give_up(why.clone());
                }
            }
            Step::Continue => {
                self.state.switching = Some(self.world.now());
                self.state.own.continued = true;
                if let Err(why) = self.world.go_on() {
                    return self.give_up(why);
                }
            }
            Step::Cancel(why) => {
                // It may have completed, or failed, in this moment: the next look tells.
                let refused = self.world.cancel().is_err();
                if refused {
                    self.world.wait(PACE);
                }
                return self.give_up(why.clone());
            }
            Step::Take => {
                self.state.own.asked = true;
                match self.world.take() {
                    Ok(()) => (self.state.own.taken, self.state.insisting) = (true, None),
                    Err(why) => return self.give_up(why),
                }
            }
            Step::Activate => return self.activate(),
            Step::StartGuest => {
                if let Err(why) = self.world.run_destination() {
                    return self.insist(Stuck::NotStarted(why));
                }
            }
            Step::Done => return ControlFlow::Break(Outcome::Moved),
            Step::Back(why) => return self.go_back(why, view),
            Step::Stuck(stuck) => return ControlFlow::Break(Outcome::Stuck(stuck.clone())),
        }
        ControlFlow::Continue(())
    }

    fn wait_switchover(&mut self, view: &View) -> ControlFlow<Outcome> {
        self.world.wait(Duration::from_millis(100));
        // A source that neither ends nor can be made to: cancelled and not gone, or sending to nobody.
        let since = *self.state.switching.get_or_insert(self.world.now());
        if self.world.now() - since > self.limits.switchover + INSIST {
            let stands = || Stuck::SourceStands("its migration neither ends nor can be cancelled".to_owned());
            let stuck = view.source.as_ref().map_or_else(|why| Stuck::SourceLost(why.clone()), |_| stands());
            return ControlFlow::Break(Outcome::Stuck(stuck));
        }
        ControlFlow::Continue(())
    }

    /// Tries again for a while.
    fn insist(&mut self, stuck: Stuck) -> ControlFlow<Outcome> {
        let since = *self.state.insisting.get_or_insert(self.world.now());
        if self.world.now() - since > INSIST {
            return ControlFlow::Break(Outcome::Stuck(stuck));
        }
        self.world.wait(PACE);
        ControlFlow::Continue(())
    }

    fn activate(&mut self) -> ControlFlow<Outcome> {
        let was_certain = self.state.own.activating;
        self.state.own.activating = true;
        match self.world.activate() {
            Ok(()) => {
                self.state.insisting = None;
                ControlFlow::Continue(())
            }
            // Nothing has happened, and nothing will: the guest can still stay.
            Err(NotActive { why, none: true }) if !was_certain && self.state.own.asked => {
                self.state.own.activating = false;
                self.give_up(why)
            }
            Err(NotActive { why, .. }) => self.insist(Stuck::NotActive(why)),
        }
    }

    /// The guest goes on at the source; only when every disk is certain to be the source's.
    fn go_back(&mut self, why: &str, view: &View) -> ControlFlow<Outcome> {
        self.state.own.gave_up.get_or_insert_with(|| why.into());
        let is_running = view.source.as_ref().is_ok_and(|source| source.run == super::plan::Run::Running);
        let may_be_taken = self.state.own.asked || !self.state.own.started;
        if may_be_taken
            && !is_running
            && let Err(why) = self.world.call_off()
        {
            return self.insist(Stuck::NotCalledOff(why));
        }
        // A migration that did not even begin leaves the destination waiting for the next attempt.
        if self.state.own.started || !is_running {
            self.world.quit_destination();
        }
        if self.state.own.is_to_run
            && let Err(why) = self.world.run_source()
        {
            return self.insist(Stuck::SourceStands(why));
        }
        self.world.restore();
        ControlFlow::Break(Outcome::Stayed(why.into()))
    }
}
