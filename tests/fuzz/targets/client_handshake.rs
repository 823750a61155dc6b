#![no_main]

use blkferry_fuzz::{offer_seeds, properties};

libfuzzer_sys::fuzz_target!(init: offer_seeds("client_handshake"), |input: &[u8]| properties::client_handshake::check(input));
