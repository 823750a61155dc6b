//! Two hosts between which a disk goes to and fro, each time with an older copy of it on the host that it comes to: is
//! every block of it, at every moment, somewhere where it can be had, and does nobody take an older one for it? A change
//! of hands is done with the product's own rules; power goes at any moment. What goes on between the two sides while
//! messages are lost is the other model's business: here an answer comes or does not.

use super::explore::Model;
use blkferry::handoff::{Deed, Move, Right, Step, Taker, differs_from_base};
use blkferry::nbd::{Ask, Base, HANDOFF_VERSION, Standing, Told};
use uuid::Uuid;

pub const BLOCKS: usize = 2;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    pub writes: u8,
    /// No disk is taken beyond this epoch.
    pub epoch: u64,
}

/// Mistakes, each of which has to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// What is kept is counted as present before it is on record that the disk is here.
    AdoptEarly,
    /// The record beside the image goes before it is durably known what is kept.
    ClearEarly,
    /// The source's word is taken for what it had from somebody else, or in another epoch.
    AnyBase,
    /// A cache is a home although not all of the disk was in it.
    PartialHome,
    /// What the source knows is asked when the device is attached, and not when the disk is taken.
    AskedOnce,
    /// What was written there is believed also if it was told before the disk was given.
    ToldEarly,
    /// A write that came to nothing counts as written.
    DirtyIsWritten,
}

impl Flaw {
    pub const ALL: [Self; 7] = [
        Self::AdoptEarly,
        Self::ClearEarly,
        Self::AnyBase,
        Self::PartialHome,
        Self::AskedOnce,
        Self::ToldEarly,
        Self::DirtyIsWritten,
    ];
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    Writes(usize, usize),
    WriteComesToNothing(usize, usize),
    Fetches(usize, usize),
    Attaches(usize),
    Takes(usize),
    TakesAndIsTold(usize),
    CallsOff(usize),
    Claims(usize),
    RecordsActive(usize),
    Adopts(usize),
    Commits(usize),
    Clears(usize),
    PowerGoes(usize),
    PowerIsBack(usize),
    BecomesImage(usize),
}

/// Both maps, as far as they go.
type Bits = [bool; BLOCKS];

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Cache {
    // On disk.
    me: Uuid,
    right: Right,
    floor: u64,
    deed: Deed,
    gift: Base,
    present: Bits,
    dirty: Bits,
    /// As of the last commit: what is dirty beside that is forgotten in a power cut, and its data may be there.
    durably_dirty: Bits,
    exact: bool,
    // In memory.
    live: Bits,
    given: Option<u64>,
    /// What was written at the source and what since, told in one breath with the disk.
    told: Option<(Bits, Option<Base>)>,
    changed: Option<Bits>,
    adopted: bool,
    open: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host {
    data: [u8; BLOCKS],
    /// Beside the image.
    record: Option<Deed>,
    cache: Option<Cache>,
    up: bool,
    /// An export serves the image as it was given away.
    exports: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Laps {
    flaw: Option<Flaw>,
    bounds: Bounds,
    hosts: [Host; 2],
    /// What was acknowledged last.
    truth: [u8; BLOCKS],
    writes: u8,
    names: u8,
}

fn other(host: usize) -> usize {
    1 - host
}

impl Cache {
    fn may_write(&self) -> bool {
        self.right == Right::Active && self.deed.is_here() && self.open
    }

    fn taker(&self, source: &Deed) -> Taker {
        let taker = Taker { me: self.me, disk: self.gift.disk, right: self.right, floor: self.floor, epoch: 0 };
        taker.seen(&standing_of(source, None, false))
    }

    fn standing(&self) -> Standing {
        let base = Some(self.gift).filter(|gift| gift.epoch > 0 && self.exact);
        standing_of(&self.deed, base, self.present.iter().all(|bit| *bit))
    }
}

fn standing_of(deed: &Deed, base: Option<Base>, complete: bool) -> Standing {
    let Deed { disk, epoch, given_to } = *deed;
    Standing { version: HANDOFF_VERSION, disk, epoch, given_to, base, complete }
}

impl Laps {
    /// A: an image in use, on offer. B: nothing.
    pub fn new(flaw: Option<Flaw>, bounds: Bounds) -> Self {
        let deed = Deed::new(Uuid::from_u128(0xd));
        let a = Host { data: [1; BLOCKS], record: Some(deed), cache: None, up: true, exports: true };
        let b = Host { data: [0; BLOCKS], record: None, cache: None, up: true, exports: false };
        Self { flaw, bounds, hosts: [a, b], truth: [1; BLOCKS], writes: 0, names: 0 }
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    /// Who decides about the disk at a host, as its successor sees it.
    fn source(&self, host: usize) -> Option<Standing> {
        let Host { record, cache, .. } = &self.hosts[host];
        match cache {
            Some(cache) if cache.right == Right::Active => Some(cache.standing()),
            Some(_) if record.is_none() => None,
            _ => record.as_ref().map(|deed| standing_of(deed, None, true)),
        }
    }

    /// What a read of a block at a host finds; nothing: it waits for a source that does not come.
    fn read(&self, host: usize, block: usize, patience: u8) -> Option<u8> {
        let Host { data, record, cache, exports, .. } = &self.hosts[host];
        match cache {
            Some(cache) if cache.right == Right::Active => {
                if cache.live[block] {
                    return Some(data[block]);
                }
                let there = other(host);
                let gift = self.source(there).filter(|source| {
                    source.disk == cache.gift.disk
                        && source.given_to == Some(cache.me)
                        && source.epoch == cache.gift.epoch
                });
                gift.filter(|_| patience > 0).and_then(|_| self.read(there, block, patience - 1))
            }
            // An export can be started again as long as there is a record.
            _ => (record.is_some() || *exports).then_some(data[block]),
        }
    }

    fn step(&self, label: Label, steps: &mut Vec<(Label, Self)>, change: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        change(&mut world);
        steps.push((label, world));
    }

    fn cache(&mut self, host: usize) -> &mut Cache {
        self.hosts[host].cache.as_mut().unwrap()
    }

    fn guest_steps(&self, host: usize, steps: &mut Vec<(Label, Self)>) {
        let Some(cache) = &self.hosts[host].cache else { return };
        for block in 0..BLOCKS {
            if cache.may_write() && self.writes < self.bounds.writes {
                self.step(Label::Writes(host, block), steps, |w| {
                    w.writes += 1;
                    w.truth[block] = 1 + w.writes;
                    w.hosts[host].data[block] = w.truth[block];
                    let cache = w.cache(host);
                    (cache.dirty[block], cache.live[block], cache.present[block]) = (true, true, true);
                });
                if !cache.dirty[block] {
                    self.step(Label::WriteComesToNothing(host, block), steps, |w| w.cache(host).dirty[block] = true);
                }
            }
            if cache.right == Right::Active && cache.open && !cache.live[block] {
                let there = self.hosts[other(host)].up.then(|| self.read(host, block, 2)).flatten();
                if let Some(found) = there {
                    self.step(Label::Fetches(host, block), steps, |w| {
                        w.hosts[host].data[block] = found;
                        let cache = w.cache(host);
                        (cache.live[block], cache.present[block]) = (true, true);
                    });
                }
            }
        }
    }

    /// A cache for the disk of the other host: a new file, or the copy that is here.
    fn attach_steps(&self, host: usize, steps: &mut Vec<(Label, Self)>) {
        let here = &self.hosts[host];
        let Some(source) = self.source(other(host)).filter(|source| source.given_to.is_none()) else { return };
        if source.epoch >= self.bounds.epoch {
            return;
        }
        match &here.cache {
            None => {
                let home = here.record.as_ref().filter(|deed| !deed.is_here());
                let is_home = home.is_none_or(|deed| self.has(Flaw::AnyBase) || deed.is_base_of(Some(&source)).is_ok());
                // In doubt another file. This copy stays where it is for as long as somebody fetches from it.
                if !is_home && !source.complete {
                    return;
                }
                self.step(Label::Attaches(host), steps, |w| {
                    w.names += 1;
                    let me = Uuid::from_u128(0xa0 + u128::from(w.names));
                    let gift = Base { disk: source.disk, epoch: 0 };
                    let told = w.has(Flaw::ToldEarly).then(|| (w.changed(other(host)), source.base));
                    if !is_home {
                        (w.hosts[host].record, w.hosts[host].exports) = (None, false);
                        w.hosts[host].data = [0; BLOCKS];
                    }
                    w.hosts[host].cache = Some(Cache {
                        me,
                        right: Right::Standby,
                        floor: 0,
                        deed: Deed { disk: me, epoch: 0, given_to: None },
                        gift,
                        present: [false; BLOCKS],
                        dirty: [false; BLOCKS],
                        durably_dirty: [false; BLOCKS],
                        exact: true,
                        live: [false; BLOCKS],
                        given: None,
                        told,
                        changed: None,
                        adopted: false,
                        open: false,
                    });
                });
            }
            // The way back of a cache: it becomes an image again.
            Some(cache) if cache.right == Right::Active && !cache.deed.is_here() => {
                let whole = cache.present.iter().all(|bit| *bit) || self.has(Flaw::PartialHome);
                let is_base = cache.deed.is_base_of(Some(&source)).is_ok();
                if whole && is_base && source.complete {
                    self.step(Label::BecomesImage(host), steps, |w| {
                        let deed = w.cache(host).deed.clone();
                        (w.hosts[host].record, w.hosts[host].cache) = (Some(deed), None);
                    });
                }
            }
            Some(_) => {}
        }
    }

    fn taking_steps(&self, host: usize, steps: &mut Vec<(Label, Self)>) {
        let here = &self.hosts[host];
        let Some(cache) = here.cache.as_ref().filter(|cache| cache.right == Right::Standby) else { return };
        let there = other(host);
        let Some(source) = self.source(there).filter(|_| self.hosts[there].up) else { return };
        if source.given_to != Some(cache.me) && source.epoch >= self.bounds.epoch {
            return;
        }
        let deed = Deed { disk: source.disk, epoch: source.epoch, given_to: source.given_to };
        let taker = cache.taker(&deed);
        if let (None, Some(ask)) = (cache.given, taker.take(0)) {
            self.step(Label::Takes(host), steps, |w| w.take(host, &deed, &taker, &ask));
            if here.record.is_some() && cache.told.is_none() {
                self.step(Label::TakesAndIsTold(host), steps, |w| {
                    w.take(host, &deed, &taker, &ask);
                    let base = w.source(there).and_then(|source| source.base);
                    w.cache(host).told = Some((w.changed(there), base));
                });
            }
        }
        self.step(Label::CallsOff(host), steps, |w| {
            let me = w.cache(host);
            (me.given, me.told, me.changed, me.floor) = (None, None, None, taker.called_off().floor);
            let ask = taker.called_off().give_back();
            if let Some(Move::TakeBack(deed)) = ask.map(|ask| deed.on(&ask)) {
                w.on_record(there, deed);
            }
        });
        if cache.given.is_some() && (here.record.is_none() || cache.changed.is_some()) && !here.exports {
            self.step(Label::RecordsActive(host), steps, |w| {
                let has_home = w.hosts[host].record.is_some();
                let me = w.cache(host);
                let epoch = me.given.take().unwrap();
                (me.right, me.gift.epoch, me.deed.epoch) = (Right::Active, epoch, epoch);
                me.open = !has_home;
            });
        }
        // The source is frozen: what it says now, or said when it gave the disk, stays true.
        let (changed, base) = cache.told.unwrap_or_else(|| (self.changed(there), source.base));
        let is_base = here.record.as_ref().is_none_or(|deed| base == Some(deed.as_base()));
        let is_base = is_base || self.has(Flaw::AskedOnce) || self.has(Flaw::AnyBase);
        if here.record.is_some() && cache.given.is_some() && is_base && (here.exports || cache.changed.is_none()) {
            self.step(Label::Claims(host), steps, |w| {
                w.hosts[host].exports = false;
                let early = w.has(Flaw::AdoptEarly);
                let me = w.cache(host);
                me.changed = Some(changed);
                if early {
                    me.present = std::array::from_fn(|block| me.present[block] || !changed[block]);
                    me.live = me.present;
                }
            });
        }
    }

    fn changed(&self, source: usize) -> Bits {
        let Some(cache) = &self.hosts[source].cache else { return [true; BLOCKS] };
        let all_dirty = self.has(Flaw::DirtyIsWritten);
        std::array::from_fn(|block| differs_from_base(all_dirty || cache.live[block], cache.dirty[block]))
    }

    fn take(&mut self, host: usize, deed: &Deed, taker: &Taker, ask: &Ask) {
        let Move::Give(given) = deed.on(ask) else { return };
        let epoch = given.epoch;
        self.on_record(other(host), given);
        let told = Told::Given { epoch, identity: String::new() };
        if let Step::Activate { epoch, .. } = taker.on_told(told) {
            self.cache(host).given = Some(epoch);
        }
    }

    fn on_record(&mut self, host: usize, deed: Deed) {
        match &mut self.hosts[host] {
            Host { cache: Some(cache), .. } if cache.right == Right::Active => {
                (cache.deed, cache.durably_dirty, cache.present) = (deed, cache.dirty, cache.live);
            }
            Host { record, .. } => *record = Some(deed),
        }
    }

    /// From the record that the disk is here to the guest.
    fn landing_steps(&self, host: usize, steps: &mut Vec<(Label, Self)>) {
        let here = &self.hosts[host];
        let Some(cache) = here.cache.as_ref().filter(|c| c.right == Right::Active && !c.open) else { return };
        let there = other(host);
        if !cache.adopted && self.hosts[there].up {
            let changed = self.changed(there);
            self.step(Label::Adopts(host), steps, |w| {
                let me = w.cache(host);
                me.live = std::array::from_fn(|block| me.live[block] || !changed[block]);
                me.adopted = true;
            });
        }
        if cache.adopted && cache.present != cache.live {
            self.step(Label::Commits(host), steps, |w| w.cache(host).present = w.cache(host).live);
        }
        if cache.adopted && (cache.present == cache.live || self.has(Flaw::ClearEarly)) {
            self.step(Label::Clears(host), steps, |w| {
                w.hosts[host].record = None;
                w.cache(host).open = true;
            });
        }
    }

    fn power_steps(&self, host: usize, steps: &mut Vec<(Label, Self)>) {
        if self.hosts[host].up {
            self.step(Label::PowerGoes(host), steps, |w| {
                w.hosts[host].up = false;
                if let Some(cache) = &mut w.hosts[host].cache {
                    let is_here = cache.right == Right::Active && cache.deed.is_here();
                    cache.exact &= !is_here;
                    cache.dirty = cache.durably_dirty;
                    (cache.live, cache.given, cache.told, cache.changed) = (cache.present, None, None, None);
                    (cache.adopted, cache.open) = (false, false);
                }
            });
        } else {
            self.step(Label::PowerIsBack(host), steps, |w| {
                w.hosts[host].up = true;
                let no_record = w.hosts[host].record.is_none();
                let away = w.hosts[host].record.as_ref().is_some_and(|deed| !deed.is_here());
                w.hosts[host].exports = away && w.hosts[host].cache.as_ref().is_none_or(|c| c.right != Right::Active);
                if let Some(cache) = &mut w.hosts[host].cache {
                    cache.open = cache.right == Right::Active && no_record;
                }
            });
        }
    }
}

impl Model for Laps {
    type Label = Label;

    fn next(&self) -> Vec<(Label, Self)> {
        let mut steps = Vec::new();
        for host in [0, 1] {
            if self.hosts[host].up {
                self.guest_steps(host, &mut steps);
                self.attach_steps(host, &mut steps);
                self.taking_steps(host, &mut steps);
                self.landing_steps(host, &mut steps);
            }
            self.power_steps(host, &mut steps);
        }
        steps
    }

    fn violation(&self) -> Option<String> {
        let owners: Vec<usize> = (0..2)
            .filter(|host| match &self.hosts[*host] {
                Host { cache: Some(cache), .. } if cache.right == Right::Active => cache.deed.is_here(),
                Host { record, .. } => record.as_ref().is_some_and(Deed::is_here),
            })
            .collect();
        if owners.len() > 1 {
            return Some("both hosts have the disk".into());
        }
        let &host = owners.first()?;
        let cache = self.hosts[host].cache.as_ref().filter(|cache| cache.right == Right::Active);
        // Before it has all come home nobody reads there.
        if cache.is_some_and(|cache| !cache.open) {
            return None;
        }
        (0..BLOCKS).find_map(|block| match self.read(host, block, 3) {
            Some(found) if found == self.truth[block] => None,
            Some(found) => Some(format!("block {block} reads {found}, and {} was written", self.truth[block])),
            None => Some(format!("block {block} is nowhere any more")),
        })
    }

    fn is_settled(&self) -> bool {
        let at_image = |host: &Host| host.cache.is_none() && host.record.as_ref().is_some_and(Deed::is_here);
        self.hosts.iter().any(|host| at_image(host) || host.cache.as_ref().is_some_and(Cache::may_write))
    }
}
