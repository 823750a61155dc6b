use super::*;

const SIZE_BYTES: u64 = 1 << 20;

/// A session where everything was agreed on.
fn full() -> Limits {
    Limits {
        size_bytes: SIZE_BYTES,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        min_block: 512,
        max_payload: 1 << 16,
        structured: true,
        contexts: true,
        ferry: true,
        handoff: true,
    }
}

fn request(command: Command, offset: u64, len: u32) -> Request {
    Request { flags: CommandFlags::empty(), command, cookie: 1, offset, len }
}

fn with_flags(command: Command, flags: CommandFlags) -> Request {
    Request { flags, ..request(command, 0, 512) }
}

const RANGED: [Command; 7] = [
    Command::Read,
    Command::Write,
    Command::Trim,
    Command::Cache,
    Command::WriteZeroes,
    Command::BlockStatus,
    Command::FerryHash,
];

#[test]
fn everything_agreed_on_is_allowed() {
    for command in RANGED {
        assert_eq!(request(command, 0, 512).validate(&full()), Ok(()), "{command}");
        assert_eq!(request(command, SIZE_BYTES - 512, 512).validate(&full()), Ok(()), "{command}");
    }
    assert_eq!(request(Command::Flush, 0, 0).validate(&full()), Ok(()));
    assert_eq!(request(Command::Disc, 0, 0).validate(&full()), Ok(()));
}

#[test]
fn nothing_is_allowed_that_was_not_agreed_on() {
    let bare =
        Limits { flags: TransmissionFlags::HAS_FLAGS, structured: false, contexts: false, ferry: false, ..full() };
    for command in RANGED {
        let allowed = matches!(command, Command::Read | Command::Write);
        let want = if allowed { Ok(()) } else { Err(NbdError::Inval) };
        assert_eq!(request(command, 0, 512).validate(&bare), want, "{command}");
    }
    assert_eq!(request(Command::Flush, 0, 0).validate(&bare), Err(NbdError::Inval));
    assert_eq!(request(Command::Unknown(99), 0, 512).validate(&full()), Err(NbdError::Inval));
    // Both private and metadata replies are chunks.
    let simple = Limits { structured: false, ..full() };
    assert_eq!(request(Command::BlockStatus, 0, 512).validate(&simple), Err(NbdError::Inval));
    assert_eq!(request(Command::FerryHash, 0, 512).validate(&simple), Err(NbdError::Inval));
}

#[test]
fn read_only_refuses_writers_only() {
    let limits = Limits { flags: TransmissionFlags::all(), ..full() };
    for command in RANGED {
        let want = if command.writes() { Err(NbdError::Perm) } else { Ok(()) };
        assert_eq!(request(command, 0, 512).validate(&limits), want, "{command}");
    }
    // Also where trim is not even offered, and past the end.
    let limits = Limits { flags: TransmissionFlags::READ_ONLY, ..full() };
    assert_eq!(request(Command::Trim, SIZE_BYTES, 512).validate(&limits), Err(NbdError::Perm));
}

#[test]
fn past_the_end_is_told_apart() {
    for command in RANGED {
        let full_disk = matches!(command, Command::Write | Command::WriteZeroes);
        let want = if full_disk { Err(NbdError::NoSpc) } else { Err(NbdError::Inval) };
        for offset in [SIZE_BYTES - 512, SIZE_BYTES, u64::MAX - 511] {
            let got = request(command, offset, 1024).validate(&full());
            assert_eq!(got, want, "{command} at {offset}");
        }
    }
}

#[test]
fn flags_belong_to_commands() {
    use CommandFlags as F;
    let homes = [
        (F::NO_HOLE, Command::WriteZeroes),
        (F::FAST_ZERO, Command::WriteZeroes),
        (F::DF, Command::Read),
        (F::REQ_ONE, Command::BlockStatus),
    ];
    for (flag, home) in homes {
        for command in RANGED {
            let want = if command == home { Ok(()) } else { Err(NbdError::Inval) };
            assert_eq!(with_flags(command, flag).validate(&full()), want, "{flag:?} {command}");
        }
    }
    for command in RANGED {
        assert_eq!(with_flags(command, F::FUA).validate(&full()), Ok(()), "FUA {command}");
        let unknown = F::from_bits_retain(1 << 5);
        assert_eq!(with_flags(command, unknown).validate(&full()), Err(NbdError::Inval));
    }
}

#[test]
fn flags_have_to_be_offered() {
    use CommandFlags as F;
    let check = |command, flag, missing| {
        let limits = Limits { flags: full().flags - missing, ..full() };
        with_flags(command, flag).validate(&limits)
    };
    let inval = Err(NbdError::Inval);
    assert_eq!(check(Command::Write, F::FUA, TransmissionFlags::SEND_FUA), inval);
    assert_eq!(check(Command::Read, F::DF, TransmissionFlags::SEND_DF), inval);
    let fast = TransmissionFlags::SEND_FAST_ZERO;
    assert_eq!(check(Command::WriteZeroes, F::FAST_ZERO, fast), inval);
    assert_eq!(check(Command::WriteZeroes, F::NO_HOLE, fast), Ok(()));
    let simple = Limits { structured: false, ..full() };
    assert_eq!(with_flags(Command::Read, F::DF).validate(&simple), inval);
}

#[test]
fn long_payloads_are_refused_and_long_effects_are_not() {
    let limits = full();
    let simple = Limits { structured: false, ..full() };
    let len = limits.max_payload + 512;
    assert_eq!(request(Command::Read, 0, len).validate(&limits), Err(NbdError::Overflow));
    assert_eq!(request(Command::Read, 0, len).validate(&simple), Err(NbdError::Inval));
    assert_eq!(request(Command::Write, 0, len).validate(&limits), Err(NbdError::Inval));
    for command in &RANGED[2..] {
        assert_eq!(request(*command, 0, len).validate(&limits), Ok(()), "{command}");
    }
}

#[test]
fn alignment_and_empty_ranges() {
    for command in RANGED {
        for (offset, len) in [(1, 512), (0, 513), (0, 0), (256, 256)] {
            let got = request(command, offset, len).validate(&full());
            assert_eq!(got, Err(NbdError::Inval), "{command} {offset}+{len}");
        }
        let bytes = Limits { min_block: 1, ..full() };
        assert_eq!(request(command, 1, 1).validate(&bytes), Ok(()));
        let bytes = Limits { min_block: 0, ..full() };
        assert_eq!(request(command, 1, 1).validate(&bytes), Ok(()));
    }
    for (offset, len) in [(0, 512), (512, 0)] {
        let flush = request(Command::Flush, offset, len);
        assert_eq!(flush.validate(&full()), Err(NbdError::Inval));
    }
}

#[test]
fn only_writes_carry_data() {
    assert_eq!(request(Command::Write, 0, 512).payload_len(), 512);
    for command in [Command::Read, Command::WriteZeroes, Command::Trim, Command::Unknown(1000)] {
        assert_eq!(request(command, 0, 512).payload_len(), 0, "{command}");
    }
}

#[test]
fn another_magic_is_fatal() {
    let mut bytes = request(Command::Read, 0, 512).encode();
    bytes[3] ^= 1;
    let want = ProtocolError::BadRequestMagic { got: 0x2560_9512 };
    assert_eq!(Request::decode(&bytes), Err(want));
}
