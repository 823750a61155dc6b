//! What all targets share.

#[path = "../properties/mod.rs"]
pub mod properties;

/// Writes the seeds of a target into the directory that `BLKFERRY_FUZZ_SEEDS` names, if it does: libFuzzer asks for
/// this before it reads its corpus.
pub fn offer_seeds(name: &str) {
    let Some(dir) = std::env::var_os("BLKFERRY_FUZZ_SEEDS") else { return };
    let target = properties::TARGETS.iter().find(|target| target.name == name).expect("a target is in the table");
    for (index, seed) in (target.seeds)().iter().enumerate() {
        let path = std::path::Path::new(&dir).join(format!("seed-{index:02}"));
        std::fs::write(path, seed).expect("the directory of seeds is there");
    }
}
