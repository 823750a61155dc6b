//! Other people's NBD servers, as sources.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::bench::{free_port, poll, unique};
use crate::common::World;

/// A running server; killed when dropped, and by the kernel when the test is.
pub struct Server {
    child: Child,
    pub uri: String,
}

impl Server {
    /// Starts it and waits for the pid file, which both servers write when they listen. (To connect and see would
    /// be wrong: a server may take one client only.)
    fn start(program: &str, args: Vec<String>, pid_file: &Path, uri: String) -> Self {
        let mut command = Command::new("setpriv");
        // What it says about requests that were meant to fail is of no interest, unless it does not come up.
        let log = pid_file.with_extension("log");
        command.args(["--pdeathsig", "KILL", "--", program]).args(args);
        command.stdin(Stdio::null()).stderr(File::create(&log).unwrap());
        let mut child = command.spawn().expect("setpriv is there (util-linux)");
        poll(&format!("{program} to listen"), || {
            let ended = child.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "{program} ended: {ended:?} (127: `scripts/test` installs all that the tests need)"
            );
            std::fs::read(pid_file).is_ok_and(|text| text.ends_with(b"\n"))
        });
        Self { child, uri }
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self) {
        poll("the server to end by itself", || self.child.try_wait().unwrap().is_some());
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn names(world: &World, what: &str) -> (PathBuf, PathBuf) {
    let n = unique();
    (world.path(&format!("{what}-{n}.sock")), world.path(&format!("{what}-{n}.pid")))
}

fn unix_uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// `nbdkit ARGS` on a unix socket: options, plugin, parameters.
pub fn nbdkit(world: &World, args: &[&str]) -> Server {
    let (socket, pid_file) = names(world, "nbdkit");
    let mut all = vec!["--foreground".into(), "--unix".into(), socket.display().to_string()];
    all.extend(["--pidfile".into(), pid_file.display().to_string()]);
    all.extend(args.iter().map(|&a| a.to_owned()));
    Server::start("nbdkit", all, &pid_file, unix_uri(&socket))
}

/// `nbdkit ARGS` on a TCP port of this host.
pub fn nbdkit_tcp(world: &World, args: &[&str]) -> Server {
    let (_, pid_file) = names(world, "nbdkit");
    let port = free_port();
    let mut all: Vec<String> = ["--foreground", "--ipaddr", "127.0.0.1", "--port"].map(str::to_owned).into();
    all.extend([port.to_string(), "--pidfile".into(), pid_file.display().to_string()]);
    all.extend(args.iter().map(|&a| a.to_owned()));
    Server::start("nbdkit", all, &pid_file, format!("nbd://127.0.0.1:{port}"))
}

/// `qemu-nbd ARGS IMAGE`, read-only, on a unix socket.
pub fn qemu_nbd(world: &World, args: &[&str], image: &Path) -> Server {
    let (socket, pid_file) = names(world, "qemu-nbd");
    let mut all = vec!["--read-only".into(), format!("--socket={}", socket.display())];
    all.push(format!("--pid-file={}", pid_file.display()));
    all.extend(args.iter().map(|&a| a.to_owned()));
    all.push(image.display().to_string());
    Server::start("qemu-nbd", all, &pid_file, unix_uri(&socket))
}

/// The same on a TCP port of this host.
pub fn qemu_nbd_tcp(world: &World, args: &[&str], image: &Path) -> Server {
    let (_, pid_file) = names(world, "qemu-nbd");
    let port = free_port();
    let mut all = vec!["--read-only".into(), "--bind=127.0.0.1".into(), format!("--port={port}")];
    all.push(format!("--pid-file={}", pid_file.display()));
    all.extend(args.iter().map(|&a| a.to_owned()));
    all.push(image.display().to_string());
    Server::start("qemu-nbd", all, &pid_file, format!("nbd://127.0.0.1:{port}"))
}
