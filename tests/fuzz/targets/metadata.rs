#![no_main]

use blkferry_fuzz::{offer_seeds, properties};

libfuzzer_sys::fuzz_target!(init: offer_seeds("metadata"), |input: &[u8]| properties::metadata::check(input));
