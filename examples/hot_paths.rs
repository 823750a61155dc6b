//! What the engine does most often, over and over, for a tool that counts instructions (`scripts/bench instructions`
//! runs it under callgrind). No I/O, no threads, the same steps each time.
//!
//! Each path is a function that is never inlined, so that the tool can count it alone; it does its work so many times,
//! and what had to be made before is made outside. Without an argument: the names and how often each is done. With a
//! name: that path.

use std::hint::black_box;

use blkferry::engine::{
    Action, BlockRun, ByteRange, Engine, EngineConfig, Event, FetchId, Geometry, IoId, Lane, Maps, OpId, OpKind,
};

const BLOCK_BYTES: u64 = 4096;
/// A disk of 16 GiB: small enough to be quick, with more than one word of page flags.
const DISK_BYTES: u64 = 16 << 30;
const FETCH_BYTES: u64 = 1 << 20;
/// Requests are so far from each other, so that none is a neighbour of another.
const STRIDE_BLOCKS: u64 = 37;
const TIMES: u64 = 2000;

fn new_engine() -> Engine {
    let geometry = Geometry::new(DISK_BYTES, BLOCK_BYTES).expect("a valid size");
    let config =
        EngineConfig { max_fetch_bytes: FETCH_BYTES, questions: None, compact: false, max_zero_bytes: u64::MAX };
    Engine::new(Maps::in_memory(geometry), config)
}

fn block(number: u64) -> ByteRange {
    ByteRange::new(number * STRIDE_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
}

/// Carries out what the engine wants and answers it, until it wants no more. Data is there at once.
fn carry_out(engine: &mut Engine, actions: &mut Vec<Action>) {
    while let Some(action) = actions.pop() {
        let event = match action {
            Action::ReadLocal { io, .. }
            | Action::WriteLocal { io, .. }
            | Action::ZeroLocal { io, .. }
            | Action::Deliver { io, .. } => local_done(io),
            Action::Fetch { fetch, .. } => Event::Fetched { fetch, result: Ok(()) },
            Action::Store { fetch, run } | Action::StoreZero { fetch, run } => stored(fetch, run),
            Action::Commit => {
                assert!(engine.maps().take_changed(0, usize::MAX).is_empty(), "there is nothing to commit");
                engine.maps().committed();
                Event::Committed { result: Ok(()) }
            }
            Action::Complete { result, .. } => {
                assert!(result.is_ok(), "nothing fails here");
                continue;
            }
            _ => continue,
        };
        engine.apply(event, actions);
    }
}

fn local_done(io: IoId) -> Event {
    Event::LocalDone { io, result: Ok(()) }
}

fn stored(fetch: FetchId, run: BlockRun) -> Event {
    Event::Stored { fetch, run, result: Ok(()) }
}

/// A read of 4 KiB: is it here?
#[inline(never)]
fn path_hit_4k(engine: &mut Engine) {
    let (maps, geometry) = (engine.maps(), engine.maps().geometry());
    for number in 0..TIMES {
        assert!(maps.all_present(geometry.covering(black_box(block(number)))), "all were made present");
    }
}

/// A read of 128 KiB: is it here?
#[inline(never)]
fn path_hit_128k(engine: &mut Engine) {
    let (maps, geometry) = (engine.maps(), engine.maps().geometry());
    for number in 0..TIMES {
        let range = ByteRange::new(number * (128 << 10), 128 << 10);
        assert!(maps.all_present(geometry.covering(black_box(range))), "all were made present");
    }
}

/// A read of 4 KiB that is not here: from the request to its answer, and to the block's being here.
#[inline(never)]
fn path_miss(engine: &mut Engine) {
    let mut actions = Vec::new();
    for number in 0..TIMES {
        engine.apply(Event::Submit { op: OpId(number), kind: OpKind::Read, range: block(number) }, &mut actions);
        carry_out(engine, &mut actions);
    }
}

/// A fetch of 1 MiB in the background: from the plan to its blocks' being here.
#[inline(never)]
fn path_hydrated_mib(engine: &mut Engine) {
    let mut actions = Vec::new();
    for _ in 0..TIMES {
        engine.apply(Event::Hydrate, &mut actions);
        assert!(matches!(actions[..], [Action::Fetch { lane: Lane::Bulk, .. }]), "there is more to fetch");
        carry_out(engine, &mut actions);
    }
}

/// A write of 4 KiB to a block that is not here.
#[inline(never)]
fn path_write_absent(engine: &mut Engine) {
    let mut actions = Vec::new();
    for number in 0..TIMES {
        let kind = OpKind::Write { fua: false };
        engine.apply(Event::Submit { op: OpId(number), kind, range: block(number) }, &mut actions);
        carry_out(engine, &mut actions);
    }
}

/// A flush, and nothing has changed.
#[inline(never)]
fn path_flush_clean(engine: &mut Engine) {
    let mut actions = Vec::new();
    for number in 0..TIMES {
        engine.apply(Event::Flush { op: OpId(number) }, &mut actions);
        carry_out(engine, &mut actions);
    }
}

/// A look ahead after each read of somebody who reads on, and what is asked for then.
#[inline(never)]
fn path_ahead_stream(engine: &mut Engine) {
    let mut actions = Vec::new();
    for number in 0..TIMES {
        engine.apply(Event::Ahead { range: ByteRange::new(number * (64 << 10), BLOCK_BYTES) }, &mut actions);
        carry_out(engine, &mut actions);
    }
}

/// The same after reads that lie anywhere, and next to nothing is asked for.
#[inline(never)]
fn path_ahead_anywhere(engine: &mut Engine) {
    let mut actions = Vec::new();
    for number in 0..TIMES {
        let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let block = (mixed ^ (mixed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20;
        let block = block % (DISK_BYTES / BLOCK_BYTES);
        engine.apply(Event::Ahead { range: ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES) }, &mut actions);
        carry_out(engine, &mut actions);
    }
}

type Path = (&'static str, fn(&mut Engine));
const PATHS: [Path; 8] = [
    ("path_hit_4k", path_hit_4k),
    ("path_hit_128k", path_hit_128k),
    ("path_miss", path_miss),
    ("path_hydrated_mib", path_hydrated_mib),
    ("path_write_absent", path_write_absent),
    ("path_flush_clean", path_flush_clean),
    ("path_ahead_stream", path_ahead_stream),
    ("path_ahead_anywhere", path_ahead_anywhere),
];

fn main() {
    let Some(wanted) = std::env::args().nth(1) else {
        PATHS.iter().for_each(|(name, _)| println!("{name} {TIMES}"));
        return;
    };
    let Some((_, path)) = PATHS.iter().find(|(name, _)| *name == wanted) else {
        eprintln!("hot_paths: no path {wanted}");
        std::process::exit(2);
    };
    let mut engine = new_engine();
    if wanted.starts_with("path_hit") {
        let mut actions = Vec::new();
        let all = ByteRange::new(0, DISK_BYTES);
        let kind = OpKind::Write { fua: false };
        engine.apply(Event::Submit { op: OpId(u64::MAX), kind, range: all }, &mut actions);
        carry_out(&mut engine, &mut actions);
    }
    path(&mut engine);
    // A path that did nothing would be fast.
    let here = engine.maps().present_count();
    let wanted_here = match wanted.as_str() {
        "path_flush_clean" => 0..=0,
        "path_hydrated_mib" => TIMES * FETCH_BYTES / BLOCK_BYTES..=TIMES * FETCH_BYTES / BLOCK_BYTES,
        "path_hit_4k" | "path_hit_128k" => DISK_BYTES / BLOCK_BYTES..=DISK_BYTES / BLOCK_BYTES,
        // To the end of its window; and some that lie near each other by chance.
        "path_ahead_stream" => TIMES * (64 << 10) / BLOCK_BYTES..=u64::MAX,
        "path_ahead_anywhere" => 0..=TIMES / 10,
        _ => TIMES..=TIMES,
    };
    assert!(wanted_here.contains(&here), "{wanted} did its work: {here}");
}
