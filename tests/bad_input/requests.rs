//! Requests that a server has to refuse, each with the error that the NBD spec names, on the device and on an
//! export. The connection lives on, and is in step.

use blkferry::nbd::{Command, CommandFlags, NbdError, Wants};

use crate::client::Client;
use crate::common::{World, make_image};
use crate::manners::Manners;
use crate::source::Source;
use crate::target::Target;

const SIZE: u64 = 4 << 20;
const NONE: CommandFlags = CommandFlags::empty();

struct Case {
    command: Command,
    flags: CommandFlags,
    offset: u64,
    len: u32,
    /// On the device, and on an export.
    want: (NbdError, NbdError),
}

fn case(command: Command, flags: CommandFlags, offset: u64, len: u32, want: NbdError) -> Case {
    Case { command, flags, offset, len, want: (want, want) }
}

/// The same, but for a write to what is read-only.
fn change(command: Command, flags: CommandFlags, offset: u64, len: u32, want: NbdError) -> Case {
    Case { command, flags, offset, len, want: (want, NbdError::Perm) }
}

fn cases() -> Vec<Case> {
    use Command::{BlockStatus, Cache, FerryHash, Flush, Read, Trim, Unknown, Write, WriteZeroes};
    use NbdError::{Inval, NoSpc, Overflow};
    let unknown_flag = CommandFlags::from_bits_retain(1 << 9);
    vec![
        // Past the end: at it, across it, far away, and where the sum overflows.
        case(Read, NONE, SIZE, 512, Inval),
        case(Read, NONE, SIZE - 512, 1024, Inval),
        case(Read, NONE, 1 << 62, 512, Inval),
        case(Read, NONE, u64::MAX - 511, 512, Inval),
        case(Read, NONE, u64::MAX, 2, Inval),
        change(Write, NONE, SIZE, 512, NoSpc),
        change(Write, NONE, SIZE - 512, 1024, NoSpc),
        change(Write, NONE, u64::MAX - 511, 512, NoSpc),
        change(Write, NONE, u64::MAX, 4096, NoSpc),
        change(WriteZeroes, NONE, SIZE - 512, 1024, NoSpc),
        change(WriteZeroes, NONE, 0, u32::MAX, NoSpc),
        change(Trim, NONE, SIZE - 512, 1024, Inval),
        change(Trim, NONE, u64::MAX, u32::MAX, Inval),
        case(Cache, NONE, SIZE, 4096, Inval),
        case(Cache, NONE, 0, u32::MAX, Inval),
        case(BlockStatus, NONE, SIZE, 4096, Inval),
        // No length, and too much of it.
        case(Read, NONE, 0, 0, Inval),
        change(Write, NONE, 0, 0, Inval),
        change(Trim, NONE, 0, 0, Inval),
        change(WriteZeroes, NONE, 0, 0, Inval),
        case(Read, NONE, 0, u32::MAX, Overflow),
        case(Read, NONE, 0, (32 << 20) + 1, Overflow),
        change(Write, NONE, 0, (32 << 20) + 512, Inval),
        // Flags that do not belong there, or nowhere.
        case(Read, unknown_flag, 0, 512, Inval),
        case(Read, CommandFlags::REQ_ONE, 0, 512, Inval),
        change(Write, CommandFlags::DF, 0, 512, Inval),
        change(Trim, CommandFlags::NO_HOLE, 0, 4096, Inval),
        change(WriteZeroes, unknown_flag, 0, 4096, Inval),
        // Commands that were not agreed on, or do not exist.
        case(FerryHash, NONE, 0, 4096, Inval),
        case(Unknown(8), NONE, 0, 4096, Inval),
        case(Unknown(0xffff), NONE, u64::MAX, u32::MAX, Inval),
        case(Flush, NONE, 4096, 0, Inval),
        case(Flush, NONE, 0, 4096, Inval),
        // What is right on a disk that can be written to.
        Case { want: (Inval, NbdError::Perm), ..change(Write, unknown_flag, 0, 4096, Inval) },
    ]
}

fn are_refused(target: &Target<'_>, read_only: bool) {
    let mut client = Client::connect(target.uri);
    let check = |client: &mut Client, case: &Case, want| {
        let payload = if case.command == Command::Write { vec![0xee; case.len as usize] } else { Vec::new() };
        let cookie = client.ask(case.command, case.flags, case.offset, case.len, &payload);
        let got = client.wait(cookie);
        let Case { command, flags, offset, len, .. } = case;
        assert_eq!(got, Err(want), "{command:?} {flags:?} of {len} at {offset}");
        assert!(client.read(0, 4096) == target.expected[..4096], "the connection is out of step");
    };
    for case in &cases() {
        check(&mut client, case, if read_only { case.want.1 } else { case.want.0 });
    }
    // Without structured replies there is no "too long", no DF and no block status.
    let mut simple = Client::connect_wanting(target.uri, Wants::default());
    let inval = NbdError::Inval;
    for case in [
        case(Command::Read, NONE, 0, u32::MAX, inval),
        case(Command::Read, CommandFlags::DF, 0, 512, inval),
        case(Command::BlockStatus, NONE, 0, 4096, inval),
        case(Command::Read, NONE, SIZE - 1, 2, inval),
    ] {
        check(&mut simple, &case, inval);
    }
    if read_only {
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            check(&mut client, &case(command, NONE, 0, 4096, NbdError::Perm), NbdError::Perm);
        }
    }
    // The last bytes of the disk are there, and can be had in odd pieces.
    assert!(client.read(SIZE - 1, 1) == target.expected[SIZE as usize - 1..]);
    assert!(client.read(3, 5001) == target.expected[3..5004]);
    client.disconnect();
}

#[test]
fn a_device_refuses_what_the_spec_refuses() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let export = world.export(&world.path("image"));
    let expected = std::fs::read(world.path("image")).unwrap();
    let device = world.attach(&export.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    are_refused(&Target { uri: &device.uri, pid: device.pid, expected: &expected }, false);
    device.set("hydrate=auto");
    device.wait_complete();
    assert_eq!(device.status()["blocks"]["dirty"], 0, "what was refused has changed nothing");
    device.detach();
    assert!(std::fs::read(world.path("cache")).unwrap() == expected);
}

#[test]
fn an_export_refuses_what_the_spec_refuses_and_every_write() {
    let world = World::new();
    make_image(&world.path("image"), SIZE, &[(0, SIZE)]);
    let export = world.export(&world.path("image"));
    let expected = std::fs::read(world.path("image")).unwrap();
    are_refused(&Target { uri: &export.uri, pid: export.child.id() as i32, expected: &expected }, true);
    export.stop();
    assert!(std::fs::read(world.path("image")).unwrap() == expected);
}

/// Clients that give up while they wait for the source must not take the places of those to come, however long the
/// source takes.
#[test]
fn clients_that_hang_up_while_they_wait_for_the_source() {
    let world = World::new();
    let expected = vec![5; SIZE as usize];
    let source = Source::start(&world.path("source"), expected.clone(), Manners::default());
    let device = world.attach(&source.uri, &world.path("cache"), "disk", &["--hydrate", "off"]);
    Client::connect(&device.uri).read(0, 65536);
    source.hold_all();
    for _ in 0..300 {
        let mut impatient = Client::connect(&device.uri);
        impatient.start_read(1 << 20, 4096);
        impatient.start_write((1 << 20) + 5, &[6; 7]);
    }
    let mut client = Client::connect(&device.uri);
    assert!(client.read(0, 65536) == expected[..65536]);
    client.write(0, &[5; 4096]);
    client.flush();
    device.wait_for(|status| status["frontend"]["clients"] == 1);
    source.let_go();
    world.ok(["detach", "disk", "--incomplete"]);
}
