//! Golden bytes of the sealed page, the superblock and the map page.
//!
//! The checksums were computed by another program from docs/FORMAT.md. If one of these tests fails, caches in
//! the field cannot be read any more.

use blkferry::cache::{CacheState, CopyState, PAYLOAD_BYTES, SealedPage, Superblock};
use blkferry::engine::PageImage;
use uuid::Uuid;

use crate::hex::{assert_bytes, seals, sparse};

pub const UUID: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";

/// Two map pages: the second one holds a single block.
pub const BLOCKS: u64 = 15_873;

pub fn uuid() -> Uuid {
    Uuid::parse_str(UUID).unwrap()
}

pub fn superblock() -> Superblock {
    Superblock {
        uuid: uuid(),
        epoch: 7,
        size_bytes: BLOCKS * 4096,
        block_bytes: 4096,
        source: "nbd://host/disk".into(),
        source_identity: "image:00112233445566778899aabbccddeeff".into(),
        state: CacheState::Active,
        dirty_exact: true,
        clean: false,
        boot_id: "11111111-2222-4333-8444-555555555555".into(),
        gift: None,
        floor: 0,
        given_to: None,
        released: false,
    }
}

/// The superblock above, sequence 1.
pub fn superblock_page() -> Vec<u8> {
    let mut pieces = vec![
        (0, "'BLKFERRY'"),
        (8, "01000000"),
        (12, "01000000"),
        (16, "0102030405060708090a0b0c0d0e0f10"),
        (32, "0700000000000000"),
        (40, "0000000000000000"),
        (48, "0100000000000000"),
        (64, r#"'{"uuid":"01020304-0506-0708-090a-0b0c0d0e0f10","epoch":7,"size_bytes":65015808,"block_bytes":4096,'"#),
        (162, r#"'"source":"nbd://host/disk","source_identity":"image:00112233445566778899aabbccddeeff",'"#),
        (248, r#"'"state":"active","dirty_exact":true,"clean":false,'"#),
        (298, r#"'"boot_id":"11111111-2222-4333-8444-555555555555"}'"#),
    ];
    pieces.extend(seals([
        "0100000010469dba",
        "01000000d52baa47",
        "010000002cdff685",
        "01000000d45e9938",
        "010000002f40a304",
        "01000000d7c1ccb9",
        "010000002e35907b",
        "01000000d6b4ffc6",
    ]));
    sparse(4096, &pieces)
}

/// The same cache, complete and left in order, sequence 2.
pub fn superblock_page_complete() -> Vec<u8> {
    let mut pieces = vec![
        (0, "'BLKFERRY' 01000000 01000000 0102030405060708090a0b0c0d0e0f10"),
        (32, "0700000000000000 0000000000000000 0200000000000000"),
        (64, r#"'{"uuid":"01020304-0506-0708-090a-0b0c0d0e0f10","epoch":7,"size_bytes":65015808,"block_bytes":4096,'"#),
        (162, r#"'"source":"nbd://host/disk","source_identity":"image:00112233445566778899aabbccddeeff",'"#),
        (248, r#"'"state":"complete","dirty_exact":true,"clean":true,'"#),
        (299, r#"'"boot_id":"11111111-2222-4333-8444-555555555555"}'"#),
    ];
    pieces.extend(seals([
        "020000005f391f4e",
        "02000000eca28825",
        "020000001556d4e7",
        "02000000edd7bb5a",
        "0200000016c98166",
        "02000000ee48eedb",
        "0200000017bcb219",
        "02000000ef3ddda4",
    ]));
    sparse(4096, &pieces)
}

/// Words at both sides of where a sector ends, and the first and last of either map.
pub fn map_image() -> PageImage {
    let mut image = PageImage::empty(0);
    image.present[0] = 0x0123_4567_89ab_cdef;
    image.present[54] = 0x8000_0000_0000_0001;
    image.present[55] = 0xff;
    image.present[247] = 0xfedc_ba98_7654_3210;
    image.dirty[0] = 0x1122_3344_5566_7788;
    image.dirty[247] = 1 << 63;
    image
}

/// The first map page, in either of its copies.
pub fn map_page(sequence: u8) -> Vec<u8> {
    let mut pieces = vec![
        (0, "'BLKFERRY'"),
        (8, "02000000 01000000"),
        (16, "0102030405060708090a0b0c0d0e0f10"),
        (32, "0700000000000000"),
        (40, "0000000000000000"),
        (48, if sequence == 1 { "0100000000000000" } else { "0200000000000000" }),
        (64, "efcdab8967452301"),
        (496, "0100000000000080"),
        (512, "ff00000000000000"),
        (2072, "1032547698badcfe"),
        (2080, "8877665544332211"),
        (4080, "0000000000000080"),
    ];
    pieces.extend(seals(if sequence == 1 {
        [
            "01000000bff26743",
            "01000000c61ed6c0",
            "010000002e7f1dd7",
            "01000000d6fe726a",
            "01000000b5b6d0fa",
            "01000000d56127eb",
            "010000002c957b29",
            "0100000088c1b6fa",
        ]
    } else {
        [
            "020000009f677823",
            "02000000ff97f4a2",
            "0200000017f63fb5",
            "02000000ef775008",
            "020000008c3ff298",
            "02000000ece80589",
            "02000000151c594b",
            "02000000b1489498",
        ]
    }));
    sparse(4096, &pieces)
}

/// The second map page: block 15872 is present.
pub fn second_map_page() -> Vec<u8> {
    let mut pieces = vec![
        (0, "'BLKFERRY' 02000000 01000000 0102030405060708090a0b0c0d0e0f10"),
        (32, "0700000000000000 0100000000000000 0100000000000000"),
        (64, "0100000000000000"),
    ];
    pieces.extend(seals([
        "01000000cae3ad4f",
        "01000000cbeec4e7",
        "01000000321a9825",
        "01000000ca9bf798",
        "010000003185cda4",
        "01000000c904a219",
        "0100000030f0fedb",
        "01000000c8719166",
    ]));
    sparse(4096, &pieces)
}

#[test]
fn a_sealed_page_is_what_the_document_says() {
    let text = serde_json::to_vec(&superblock()).unwrap();
    let page = SealedPage { kind: 1, version: 1, uuid: uuid(), epoch: 7, index: 0, sequence: 1, payload: text.clone() };
    assert_bytes(&page.encode(), &superblock_page());
    let mut padded = text;
    padded.resize(PAYLOAD_BYTES, 0);
    let whole = SealedPage { payload: padded, ..page };
    assert_eq!(SealedPage::decode(&superblock_page(), 1, 0), CopyState::Valid(whole));
    assert_eq!(PAYLOAD_BYTES, 440 + 7 * 504);
}

#[test]
fn sectors_name_the_low_half_of_a_long_sequence() {
    let sequence = (1 << 32) + 5;
    let page = SealedPage { kind: 2, version: 1, uuid: uuid(), epoch: 7, index: 0, sequence, payload: Vec::new() };
    let mut pieces = vec![
        (0, "'BLKFERRY' 02000000 01000000 0102030405060708090a0b0c0d0e0f10"),
        (32, "0700000000000000 0000000000000000 0500000001000000"),
    ];
    pieces.extend(seals([
        "050000007c2e2eb1",
        "0500000024ba636e",
        "05000000dd4e3fac",
        "0500000025cf5011",
        "05000000ded16a2d",
        "0500000026500590",
        "05000000dfa45952",
        "05000000272536ef",
    ]));
    assert_bytes(&page.encode(), &sparse(4096, &pieces));
    let CopyState::Valid(found) = SealedPage::decode(&page.encode(), 2, 0) else { panic!("it is valid") };
    assert_eq!(found.sequence, sequence);
}
