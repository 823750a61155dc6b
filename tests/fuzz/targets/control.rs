#![no_main]

use blkferry_fuzz::{offer_seeds, properties};

libfuzzer_sys::fuzz_target!(init: offer_seeds("control"), |input: &[u8]| properties::control::check(input));
