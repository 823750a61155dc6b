//! Zeros where a page or a sector was: a bad block that was mapped anew, a copy made by a tool that skips
//! what it cannot read. No power cut leaves zeros where something stood before.

use std::fs;
use std::ops::Range;

use blkferry::cache::MetadataFile;

use crate::case::Case;

fn opens_with(case: &Case, zeros: Range<usize>) -> Option<(Vec<blkferry::engine::PageImage>, Vec<String>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let mut bytes = case.good.1.clone();
    bytes[zeros].fill(0);
    fs::write(&path, bytes).unwrap();
    MetadataFile::open(&path).ok().map(|(_, recovered)| (recovered.pages, recovered.notes))
}

#[test]
#[ignore = "the format cannot tell yet: see \"What cannot be told\" in docs/FORMAT.md"]
fn zeros_in_the_place_of_a_committed_page_lose_no_bit() {
    let case = Case::new();
    let (_, want) = MetadataFile::open(&case.metadata).unwrap();
    let mut lost = Vec::new();
    for page in 2..4 {
        let start = page * 4096;
        let whole = std::iter::once((start..start + 4096, "the page"));
        let sectors = (0..8).map(|at| (start + at * 512..start + (at + 1) * 512, "a sector"));
        for (zeros, what) in whole.chain(sectors) {
            if opens_with(&case, zeros.clone()).is_some_and(|(pages, _)| pages != want.pages) {
                let newer = if case.is_newer(page) { "newer" } else { "older" };
                lost.push(format!("{what} at {} of the {newer} copy", zeros.start));
            }
        }
    }
    assert!(lost.is_empty(), "bits that were promised are gone without a word of refusal: {lost:#?}");
}
