//! What these tests stand on: host A with an image, host B with the file that becomes the disk there, and what can be
//! asked and seen of both.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::Client;
use crate::common::{Device, Export, World, make_image, noise};

/// Declared first, and so dropped last: what was given away was made immutable, and could not be removed.
pub struct Rig {
    pub world: World,
    /// At A.
    pub image: PathBuf,
    /// At B.
    pub cache: PathBuf,
}

impl Rig {
    /// An image of so many bytes of noise, [`contents`].
    pub fn new(size_bytes: u64) -> Self {
        Self::sparse(size_bytes, &[(0, size_bytes)])
    }

    /// The same, but noise only in these places: offset and length.
    pub fn sparse(size_bytes: u64, data: &[(u64, u64)]) -> Self {
        let world = World::new();
        let (image, cache) = (world.path("a.raw"), world.path("b.raw"));
        make_image(&image, size_bytes, data);
        Self { world, image, cache }
    }

    /// `blkferry export --handoff` of the image.
    pub fn hand_out(&self) -> Export {
        self.hand_out_other(&self.image)
    }

    pub fn hand_out_other(&self, image: &Path) -> Export {
        let number = std::fs::read_dir(self.world.path("")).unwrap().count();
        let socket = self.world.path(&format!("h{number}.sock"));
        self.world.export_with(image, &format!("unix:{}", socket.display()), &["--handoff"])
    }

    /// The same where it was before.
    pub fn hand_out_again(&self, uri: &str) -> Export {
        let socket = uri.split_once("socket=").unwrap().1;
        let export = self.world.export_with(&self.image, &format!("unix:{socket}"), &["--handoff"]);
        assert_eq!(export.uri, uri);
        export
    }

    /// A device on the file of its name: `a` on the image, `b` on the cache, and so on.
    pub fn attach(&self, source: &str, name: &str, more: &[&str]) -> Device<'_> {
        self.world.attach(source, &self.world.path(&format!("{name}.raw")), name, more)
    }

    /// An attach that must fail; the line that it fails with.
    pub fn refused(&self, source: &str, name: &str, more: &[&str]) -> String {
        let file = self.world.path(&format!("{name}.raw"));
        let words = ["attach", source, file.to_str().unwrap(), "--name", name];
        self.world.refused(words.iter().chain(more))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.world.path("")).unwrap() {
            loosen(&entry.unwrap().path());
        }
    }
}

/// As somebody who means it.
pub fn loosen(image: &Path) {
    let _ = Command::new("chattr").arg("-i").arg(image).output();
}

/// What an image of noise holds.
pub fn contents(size_bytes: u64) -> Vec<u8> {
    noise(0xfe44, size_bytes as usize)
}

/// Can a machine use it?
pub fn can_be_written(image: &Path) -> bool {
    // As QEMU does: opens it for writing, and locks it.
    let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(image).output().unwrap();
    out.status.success()
}

/// Writes blocks that hold nothing but this number.
pub fn write_blocks(client: &mut Client, wanted: &mut [u8], blocks: Range<u64>, with: u8) {
    for block in blocks {
        client.write(block * 4096, &[with; 4096]);
        wanted[block as usize * 4096..][..4096].fill(with);
    }
    client.flush();
}

/// Asks a daemon on its control socket; what it answers.
pub fn control(device: &Device<'_>, request: &Value) -> Result<Value, String> {
    let path = device.world.run_dir().join(format!("{}.ctl", device.name));
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let answer: Value = serde_json::from_str(&line).unwrap();
    match answer.get("error") {
        Some(error) => Err(error.as_str().unwrap().to_owned()),
        None => Ok(answer["ok"].clone()),
    }
}

pub fn take(device: &Device<'_>) -> Result<Value, String> {
    control(device, &json!({ "do": "take", "wait_ms": 0 }))
}

pub fn activate(device: &Device<'_>) -> Result<Value, String> {
    control(device, &json!({ "do": "activate", "wait_ms": 2000 }))
}

pub fn abort(device: &Device<'_>) -> Result<Value, String> {
    control(device, &json!({ "do": "abort" }))
}

/// Where a device is offered to the next host.
pub fn offer(device: &Device<'_>) -> String {
    device.set(&format!("export=unix:{}", device.world.path(&format!("{}.onward", device.name)).display()));
    device.status()["handoff"]["export"].as_str().unwrap().to_owned()
}

/// Bytes of the disk that have crossed to a device.
pub fn data_bytes(device: &Device<'_>) -> u64 {
    device.status()["wire"]["data_bytes"].as_u64().unwrap()
}

/// Waits until whoever has the disk now has all of it.
pub fn wait_released(device: &Device<'_>) -> Value {
    device.wait_for(|status| status["handoff"]["released"] == true)
}
