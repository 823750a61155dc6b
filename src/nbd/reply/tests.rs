use super::*;
use crate::nbd::chunk::{BlockStatus, ErrorChunk, Extent, FerryHashes, Hole, put_block_status_chunk, put_error_chunk};
use crate::nbd::consts::{MAX_EXTENTS, MAX_NAME, StateFlags};

fn chunk(kind: ChunkKind, len: u32) -> ReplyHeader {
    ReplyHeader::Chunk { flags: ReplyFlags::DONE, kind, cookie: 0, len }
}

#[test]
fn chunk_lengths_are_bounded_by_kind() {
    let max_payload = 4096;
    let kinds = [
        // kind, shortest, longest, one in between that is wrong
        (ChunkKind::None, 0, 0, None),
        (ChunkKind::OffsetData, 9, 8 + 4096, None),
        (ChunkKind::OffsetHole, 12, 12, None),
        (ChunkKind::BlockStatus, 12, 4 + 8 * (1 << 20), Some(13)),
        (ChunkKind::FerryHashes, 44, 12 + 32 * (1 << 20), Some(45)),
        (ChunkKind::Error, 6, 6 + 4096 + 1024, None),
        (ChunkKind::ErrorOffset, 14, 6 + 4096 + 1024, None),
        (ChunkKind::Unknown(0x8077), 6, 6 + 4096 + 1024, None),
    ];
    for (kind, min, max, wrong) in kinds {
        assert_eq!(chunk(kind, min).check(max_payload), Ok(()), "{kind}");
        assert_eq!(chunk(kind, max).check(max_payload), Ok(()), "{kind}");
        for wrong in [min.checked_sub(1), wrong].into_iter().flatten() {
            let error = chunk(kind, wrong).check(max_payload).unwrap_err();
            let want = ProtocolError::MalformedChunk { kind, defect: Defect::WrongLength };
            assert_eq!(error, want);
        }
        for long in [max + 1, u32::MAX] {
            let error = chunk(kind, long).check(max_payload).unwrap_err();
            let want = ProtocolError::ChunkTooLong { kind, len_bytes: long, max_bytes: max };
            assert_eq!(error, want);
        }
    }
}

#[test]
fn unknown_chunks_end_the_connection_unless_they_are_errors() {
    let kind = ChunkKind::Unknown(6);
    assert_eq!(chunk(kind, 20).check(4096), Err(ProtocolError::UnexpectedChunk { kind }));
    assert!(!kind.is_error());
    assert!(ChunkKind::Unknown(0x8006).is_error());
}

#[test]
fn a_none_chunk_is_the_last() {
    let flags = ReplyFlags::empty();
    let header = ReplyHeader::Chunk { flags, kind: ChunkKind::None, cookie: 0, len: 0 };
    assert!(!header.is_last());
    assert!(header.check(4096).is_err());
}

#[test]
fn another_magic_is_fatal_and_asks_for_nothing_more() {
    let common = *b"HTTP/1.1 400 Bad";
    assert_eq!(ReplyHeader::needs_more(&common), 0);
    let want = ProtocolError::BadReplyMagic { got: 0x4854_5450 };
    assert_eq!(ReplyHeader::decode(&common, [0; 4]), Err(want));
}

#[test]
fn unknown_reply_flags_are_ignored() {
    let mut out = Vec::new();
    put_chunk_header(&mut out, 9, ReplyFlags::from_bits_retain(0xffff), ChunkKind::None, 0);
    let header = ReplyHeader::decode(out[..16].try_into().unwrap(), [0; 4]).unwrap();
    assert_eq!(header, ReplyHeader::Chunk { flags: ReplyFlags::DONE, kind: ChunkKind::None, cookie: 9, len: 0 });
}

#[test]
fn payloads_that_contradict_themselves_are_malformed() {
    let defect = |error: ProtocolError| match error {
        ProtocolError::MalformedChunk { defect, .. } => defect,
        other => panic!("{other}"),
    };
    let hole = |bytes: &[u8]| defect(Hole::decode(bytes).unwrap_err());
    assert_eq!(hole(&[0; 12]), Defect::Zero);
    assert_eq!(hole(&[1; 11]), Defect::TooShort);
    assert_eq!(hole(&[1; 13]), Defect::TrailingBytes);

    let status = |bytes: &[u8]| defect(BlockStatus::decode(bytes).unwrap_err());
    assert_eq!(status(&[0; 4]), Defect::WrongLength, "no extent");
    assert_eq!(status(&[1; 13]), Defect::WrongLength);
    assert_eq!(status(&[0; 12]), Defect::Zero, "an extent of no length");

    let hashes = |bytes: &[u8]| defect(FerryHashes::decode(bytes).unwrap_err());
    assert_eq!(hashes(&[0; 44]), Defect::Zero, "pieces of no length");
    assert_eq!(hashes(&[1; 12]), Defect::WrongLength, "no hash");
    assert_eq!(hashes(&[1; 43]), Defect::WrongLength);

    let error = |bytes: &[u8]| defect(ErrorChunk::decode(ChunkKind::ErrorOffset, bytes).unwrap_err());
    assert_eq!(error(&[0; 14]), Defect::Zero, "no error");
    assert_eq!(error(b"\0\0\0\x05\0\x09short"), Defect::TooShort);
    assert_eq!(error(b"\0\0\0\x05\0\x04text1234567"), Defect::TooShort, "half an offset");
    assert_eq!(error(b"\0\0\0\x05\x10\x01"), Defect::StringTooLong);
}

#[test]
fn errors_of_unknown_kind_still_tell_what_they_share() {
    let kind = ChunkKind::Unknown(0x8009);
    let chunk = ErrorChunk::decode(kind, b"\0\0\0\x63\0\x04no\x1b!\x01\x02\x03").unwrap();
    // 0x63 is no number of the spec, so it counts as EINVAL; the escape is made harmless.
    let want = ErrorChunk { error: NbdError::Inval, message: "no !".into(), offset: None };
    assert_eq!(chunk, want);
}

#[test]
fn long_messages_are_cut_between_characters() {
    let mut out = Vec::new();
    let message = "ä".repeat(MAX_NAME);
    put_error_chunk(&mut out, 1, ReplyFlags::DONE, NbdError::Io, &message, Some(3));
    let chunk = ErrorChunk::decode(ChunkKind::ErrorOffset, &out[20..]).unwrap();
    assert_eq!(chunk.message.len(), MAX_NAME);
    assert_eq!(chunk.offset, Some(3));
}

#[test]
fn the_longest_block_status_survives() {
    let extents = vec![Extent { len: 1, flags: StateFlags::from_bits_retain(0x8000_0001) }; MAX_EXTENTS];
    let mut out = Vec::new();
    put_block_status_chunk(&mut out, 1, ReplyFlags::DONE, 9, &extents);
    let (head, payload) = out.split_at(20);
    let header = ReplyHeader::decode(head[..16].try_into().unwrap(), head[16..].try_into().unwrap()).unwrap();
    assert_eq!(header.check(512), Ok(()));
    assert_eq!(BlockStatus::decode(payload).unwrap().extents, extents);
}
