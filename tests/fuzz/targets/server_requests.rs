#![no_main]

use blkferry_fuzz::{offer_seeds, properties};

libfuzzer_sys::fuzz_target!(init: offer_seeds("server_requests"), |input: &[u8]| properties::server_requests::check(input));
