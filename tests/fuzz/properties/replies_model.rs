//! What must come of a source's replies: a naive reading of the stream, one reply after the other.

use blkferry::nbd::{NbdError, Told};

/// What an answer that says nothing counts as.
const EIO: i32 = 5;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Question {
    Read {
        offset: u64,
        len: usize,
    },
    Extents,
    Hashes {
        len: u64,
    },
    /// A step of a handoff.
    HandOff,
    /// What was written there.
    Changed {
        len: u64,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The connection ended first.
    Lost,
    Refused(i32),
    Data(Vec<u8>),
    /// Length and "zero".
    Extents(Vec<(u64, bool)>),
    Hashes(Vec<[u8; 32]>),
    Told(Told),
    /// Length and "written".
    Changed(Vec<(u64, bool)>),
}

struct Pending {
    question: Question,
    data: Vec<Option<u8>>,
    extents: Vec<(u64, bool)>,
    hashes: Vec<[u8; 32]>,
    /// How far the hashes reach.
    hashed: u64,
    told: Option<Told>,
    error: Option<NbdError>,
}

/// The rules, one place for each number of the protocol that this needs.
struct Stream<'a>(&'a [u8]);

impl<'a> Stream<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        Some(self.take(len)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

/// The ids of contexts: that of the handshake, and our own, which has a number that never changes.
#[derive(Clone, Copy, Debug)]
pub struct Contexts {
    pub allocation: u32,
    pub changed: u32,
}

/// The outcome of each question; they have the cookies 1, 2, … None: it depends on when the pieces of the stream arrive,
/// since a short answer to what was written is followed by another question, with the next cookie.
pub fn outcomes(questions: &[Question], contexts: Contexts, max_payload: u64, stream: &[u8]) -> Option<Vec<Outcome>> {
    let pending = |&question| {
        let len = if let Question::Read { len, .. } = question { len } else { 0 };
        let data = vec![None; len];
        Some(Pending { question, data, extents: vec![], hashes: vec![], hashed: 0, told: None, error: None })
    };
    let mut waiting: Vec<Option<Pending>> = questions.iter().map(pending).collect();
    let mut outcomes = vec![Outcome::Lost; questions.len()];
    let mut stream = Stream(stream);
    let mut asks_again = false;
    loop {
        let cookie = stream.0.get(8..16).map(|cookie| u64::from_be_bytes(cookie.try_into().expect("eight bytes")));
        if asks_again && cookie == Some(questions.len() as u64 + 1) {
            return None;
        }
        let Some((index, outcome)) = one_reply(&mut stream, &mut waiting, contexts, max_payload) else { break };
        match outcome {
            // It is asked about the rest, and nobody answers that.
            Some(Outcome::Changed(told)) if questions[index] != (Question::Changed { len: sum(&told) }) => {
                asks_again = true;
            }
            Some(outcome) => outcomes[index] = outcome,
            None => {}
        }
    }
    Some(outcomes)
}

fn sum(told: &[(u64, bool)]) -> u64 {
    told.iter().map(|(len, _)| len).sum()
}

/// None: a rule was broken, or the stream ends.
fn one_reply(
    stream: &mut Stream<'_>,
    waiting: &mut [Option<Pending>],
    contexts: Contexts,
    max_payload: u64,
) -> Option<(usize, Option<Outcome>)> {
    let magic = stream.number(4)?;
    let (mut done, mut kind, mut simple_error) = (true, 0, 0);
    let structured = match magic {
        0x6744_6698 => {
            simple_error = stream.number(4)? as u32;
            false
        }
        0x668e_33ef => {
            done = stream.number(2)? & 1 != 0;
            kind = stream.number(2)? as u16;
            true
        }
        _ => return None,
    };
    let index = usize::try_from(stream.number(8)?.checked_sub(1)?).ok()?;
    let len = if structured { stream.number(4)? } else { 0 };
    let place = waiting.get_mut(index)?;
    let mut pending = place.take()?;
    if structured {
        let max = if kind == 1 { 8 + max_payload } else { 64 << 20 };
        if len > max {
            return None;
        }
        pending.chunk(kind, done, &mut Stream(stream.take(len as usize)?), contexts)?;
    } else {
        pending.error = NbdError::from_wire(simple_error);
        if let (None, Question::Read { offset, len }) = (pending.error, pending.question) {
            pending.put(offset, len as u64, stream.take(len)?.iter().map(|byte| Some(*byte)))?;
        }
    }
    if pending.error == Some(NbdError::Shutdown) {
        return None;
    }
    if !done {
        *place = Some(pending);
        return Some((index, None));
    }
    Some((index, Some(pending.outcome()?)))
}

impl Pending {
    /// Data or a hole: within what was asked for, and nowhere twice.
    fn put(&mut self, offset: u64, len: u64, bytes: impl Iterator<Item = Option<u8>>) -> Option<()> {
        let Question::Read { offset: start, .. } = self.question else { return None };
        let at = offset.checked_sub(start)?;
        if at.checked_add(len)? > self.data.len() as u64 {
            return None;
        }
        let target = &mut self.data[at as usize..(at + len) as usize];
        if target.iter().any(Option::is_some) {
            return None;
        }
        target.iter_mut().zip(bytes).for_each(|(target, byte)| *target = byte);
        Some(())
    }

    fn chunk(&mut self, kind: u16, done: bool, payload: &mut Stream<'_>, contexts: Contexts) -> Option<()> {
        match kind {
            0 => (done && payload.0.is_empty()).then_some(())?,
            1 => {
                let (offset, data) = (payload.number(8)?, payload.0);
                payload.0 = &[];
                (!data.is_empty()).then_some(())?;
                self.put(offset, data.len() as u64, data.iter().map(|byte| Some(*byte)))?;
            }
            2 => {
                let (offset, len) = (payload.number(8)?, payload.number(4)?);
                (len > 0).then_some(())?;
                self.put(offset, len, std::iter::repeat(Some(0)))?;
            }
            5 if matches!(self.question, Question::Extents | Question::Changed { .. }) => {
                let (context, bit) = match self.question {
                    Question::Extents => (contexts.allocation, 2),
                    _ => (contexts.changed, 1),
                };
                let id = payload.number(4)?;
                let mut extents = Vec::new();
                while !payload.0.is_empty() {
                    extents.push((payload.number(4)?, payload.number(4)? & bit != 0));
                }
                (!extents.is_empty() && extents.iter().all(|(len, _)| *len > 0)).then_some(())?;
                if id == u64::from(context) {
                    self.extents.is_empty().then_some(())?;
                    self.extents.extend(extents);
                }
            }
            0x6672 => {
                let Question::Hashes { len } = self.question else { return None };
                let (offset, piece) = (payload.number(8)?, payload.number(4)?);
                (piece >= 512 && offset == self.hashed && !payload.0.is_empty()).then_some(())?;
                while !payload.0.is_empty() {
                    (self.hashed < len).then_some(())?;
                    self.hashed = len.min(self.hashed + piece);
                    self.hashes.push(payload.take(32)?.try_into().ok()?);
                }
            }
            // Its JSON is the parser's business: here it is about whose answer it is, and when it counts.
            0x6673 if self.question == Question::HandOff => {
                (2..=16_384).contains(&payload.0.len()).then_some(())?;
                self.told = Some(Told::decode(payload.0).ok()?);
                payload.0 = &[];
            }
            kind if kind & 0x8000 != 0 => {
                self.error = Some(NbdError::from_wire(payload.number(4)? as u32)?);
                let text_len = payload.number(2)? as usize;
                (text_len <= 4096).then_some(())?;
                payload.take(text_len)?;
                if kind == 0x8002 {
                    payload.number(8)?;
                }
                (payload.0.len() <= 6000).then_some(())?;
                payload.0 = &[];
            }
            _ => return None,
        }
        payload.0.is_empty().then_some(())
    }

    fn outcome(self) -> Option<Outcome> {
        if let Some(error) = self.error {
            return Some(Outcome::Refused(error.to_errno()));
        }
        Some(match self.question {
            Question::Read { .. } => Outcome::Data(self.data.into_iter().collect::<Option<Vec<u8>>>()?),
            Question::Extents => Outcome::Extents(self.extents),
            Question::Hashes { .. } => Outcome::Hashes(self.hashes),
            // "Done" without a word.
            Question::HandOff => self.told.map_or(Outcome::Refused(EIO), Outcome::Told),
            Question::Changed { len } if (1..=len).contains(&sum(&self.extents)) => Outcome::Changed(self.extents),
            Question::Changed { .. } => Outcome::Refused(EIO),
        })
    }
}
