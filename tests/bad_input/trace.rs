//! Did a command that was refused leave a trace?

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::common::World;

/// What is in a directory, contents and all.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, String>);

impl Tree {
    pub fn of(dir: &Path) -> Self {
        let mut tree = Self(BTreeMap::new());
        tree.add(dir);
        tree
    }

    fn add(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let kind = meta.file_type();
            let what = match () {
                () if kind.is_dir() => {
                    self.add(&path);
                    "directory".to_owned()
                }
                () if kind.is_file() => {
                    let hash = blake3::hash(&fs::read(&path).unwrap());
                    format!("{} bytes, {hash}", meta.len())
                }
                () if kind.is_socket() => "socket".to_owned(),
                () => "something else".to_owned(),
            };
            self.0.insert(path, what);
        }
    }
}

/// The one clear line of a command that had to fail.
pub fn one_line(out: &Output) -> String {
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "it should have failed; it said {stderr:?}");
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "one clear line, not:\n{stderr}");
    assert!(lines[0].starts_with("blkferry: "), "{stderr}");
    assert!(out.stdout.is_empty(), "{}", String::from_utf8_lossy(&out.stdout));
    lines[0].to_owned()
}

pub fn assert_says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

/// `blkferry ARGS` fails with exit code 1 and one line that has all the words, and leaves everything as it was.
pub fn refused<S: AsRef<OsStr>>(world: &World, args: impl IntoIterator<Item = S>, words: &[&str]) -> String {
    let root = world.path("");
    let before = Tree::of(&root);
    let line = one_line(&world.blkferry(args));
    assert_says(&line, words);
    assert_eq!(before, Tree::of(&root), "a refused command left a trace; it said {line}");
    line
}

/// A command line that cannot be understood: what is wrong is in the first line, the exit code is 2.
pub fn misused<S: AsRef<OsStr>>(world: &World, args: impl IntoIterator<Item = S>, words: &[&str]) {
    let root = world.path("");
    let before = Tree::of(&root);
    let out = world.blkferry(args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert_says(stderr.lines().next().unwrap_or_default(), words);
    assert_eq!(before, Tree::of(&root));
}
