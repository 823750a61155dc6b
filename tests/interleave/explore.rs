//! A breadth-first walk through all states of a model, and a look back: from where can it not come to rest?

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::{Debug, Write};
use std::hash::{Hash, Hasher};

/// More states than this are a mistake in the bounds, and would take all memory.
const MAX_STATES: usize = 6_000_000;

#[derive(Debug)]
pub struct Explored {
    pub states: usize,
    pub steps: usize,
}

/// A model: where it begins, what it can do, and what is asked of it.
pub trait Model: Clone + Hash + Debug {
    type Label: Debug;
    /// All that can happen next.
    fn next(&self) -> Vec<(Self::Label, Self)>;
    /// What must never be, in words.
    fn violation(&self) -> Option<String>;
    /// Has it come to rest in a way that is of use?
    fn is_settled(&self) -> bool;
}

/// Stands for a state: 128 bits, so that two states with one print are not to be expected.
fn print_of(state: &impl Hash) -> (u64, u64) {
    let print = |salt: u64| {
        let mut hasher = DefaultHasher::new();
        (salt, state).hash(&mut hasher);
        hasher.finish()
    };
    (print(1), print(2))
}

/// Walks from `start` through everything that can follow. Fails with the shortest way to a violation, or to a state from
/// which the model cannot settle.
pub fn explore<M: Model>(start: M) -> Result<Explored, String> {
    let mut known = HashMap::from([(print_of(&start), 0u32)]);
    let mut states = vec![start];
    let mut came_from = vec![0u32];
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let mut at = 0;
    while at < states.len() {
        if let Some(what) = states[at].violation() {
            return Err(trace(&what, at, &states, &came_from));
        }
        for (_, state) in states[at].next() {
            let fresh = states.len() as u32;
            let index = *known.entry(print_of(&state)).or_insert(fresh);
            if index == fresh {
                states.push(state);
                came_from.push(at as u32);
                assert!(states.len() < MAX_STATES, "more than {MAX_STATES} states: bring the bounds down");
            }
            edges.push((index, at as u32));
        }
        at += 1;
    }
    drop(known);
    match cannot_settle(&states, &mut edges) {
        Some(stuck) => Err(trace("from here the disk can be used nowhere", stuck, &states, &came_from)),
        None => Ok(Explored { states: states.len(), steps: edges.len() }),
    }
}

/// The first state from which no settled one can be reached. `edges` lead backwards.
fn cannot_settle<M: Model>(states: &[M], edges: &mut [(u32, u32)]) -> Option<usize> {
    edges.sort_unstable();
    let mut can_settle: Vec<bool> = states.iter().map(Model::is_settled).collect();
    let mut open: Vec<u32> = (0..states.len() as u32).filter(|i| can_settle[*i as usize]).collect();
    while let Some(index) = open.pop() {
        let first = edges.partition_point(|(to, _)| *to < index);
        for &(_, from) in edges[first..].iter().take_while(|(to, _)| *to == index) {
            if !std::mem::replace(&mut can_settle[from as usize], true) {
                open.push(from);
            }
        }
    }
    can_settle.iter().position(|can| !can)
}

fn trace<M: Model>(what: &str, end: usize, states: &[M], came_from: &[u32]) -> String {
    let mut way = vec![end];
    while let Some(&at) = way.last().filter(|at| **at != 0) {
        way.push(came_from[at] as usize);
    }
    way.reverse();
    let mut text = format!("{what}, after {} steps:\n", way.len() - 1);
    for pair in way.windows(2) {
        let print = print_of(&states[pair[1]]);
        let (label, _) = states[pair[0]].next().into_iter().find(|(_, next)| print_of(next) == print).unwrap();
        writeln!(text, "  {label:?}").unwrap();
    }
    write!(text, "{:?}", states[end]).unwrap();
    text
}
