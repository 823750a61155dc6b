"""What the components share: programs that run beside each other, and what they cost."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

from machine import undisturbed

PATIENCE_S = 60
MIB = 1 << 20
GIB = 1 << 30
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Bench:
    """Where everything is, and how much of it is wanted."""

    def __init__(self, args):
        self.work = Path(args.work)
        self.disk = Path(args.disk)
        self.repo = Path(args.repo)
        self.programs = Path(args.programs).resolve()
        self.rublk = Path(args.rublk)
        self.quick = args.quick
        self.rounds = args.rounds or (2 if args.quick else 5)
        os.environ["BLKFERRY_RUN_DIR"] = str(self.work / "run")
        # nbdkit's cow filter keeps what it copies there.
        os.environ["TMPDIR"] = str(self.work)
        self.number = 0
        self.update = args.update
        # What went beyond a committed limit, in words.
        self.failed = []
        # How often something was measured again because the machine was taken away meanwhile.
        self.repeated = 0

    def path(self, stem):
        """A new name in the work directory."""
        self.number += 1
        return self.work / f"{stem}{self.number}"

    def on_disk(self, name):
        """A name in a directory that is not in memory."""
        return self.disk / name

    def noise(self, mib):
        """A file of random bytes: nothing in it can be left out."""
        path = self.work / f"noise-{mib}.raw"
        if not path.exists():
            with open(path, "wb") as file:
                for _ in range(mib):
                    file.write(os.urandom(MIB))
        return path

    def copy(self, file, stem):
        """A copy of a file, to be written to."""
        path = self.path(stem)
        run("cp", file, path)
        return path

    def undisturbed(self, measure):
        """What `measure` returns, from a time in which the machine was ours."""
        result, repeated = undisturbed(measure)
        self.repeated += repeated
        return result

    def ferry(self, *args):
        """Runs blkferry; what it said."""
        return run(self.programs / "blkferry", *args)


def run(*command):
    """Runs a command that must succeed; what it said."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what, is_true, pace_s=0.01):
    """Waits until something has happened."""
    end = time.monotonic() + PATIENCE_S
    while not is_true():
        if time.monotonic() > end:
            raise SystemExit(f"bench: {what} never happened")
        time.sleep(pace_s)


def cpu_s(pid):
    """CPU time of a process so far, in user and kernel mode, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@contextlib.contextmanager
def child(*command, stop=signal.SIGTERM, **options):
    """A program that runs beside us."""
    process = subprocess.Popen([str(c) for c in command], text=True, **options)
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def export(bench, image):
    """A blkferry export; its address and its process."""
    command = (bench.programs / "blkferry", "export", image, "--listen", "127.0.0.1:0")
    with child(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        address = re.search(r"nbd://([0-9.:]+)", process.stdout.readline()).group(1)
        yield address, process


class Relay:
    """A slow link to a server; counts what crosses it."""

    def __init__(self, process):
        self.process = process
        self.address = process.stdout.readline().strip()

    def bytes_to_client(self):
        return self.bytes()[1]

    def bytes_to_server(self):
        return self.bytes()[0]

    def bytes(self):
        """What has gone to the server, and to the client."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [int(number) for number in self.process.stdout.readline().split()]


@contextlib.contextmanager
def relay(bench, to, mbit, rtt_ms):
    """The link of examples/relay.rs."""
    command = (bench.programs / "examples/relay", to, "--mbit", mbit, "--rtt-ms", rtt_ms)
    with child(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Relay(process)


class Ferried:
    """A device that blkferry serves on a unix socket."""

    def __init__(self, bench, source, hydrate):
        self.bench, self.cache, self.name = bench, bench.path("cache"), f"bench{bench.number}"
        self.started = time.monotonic()
        self.bench.ferry(
            "attach", f"nbd://{source}/", self.cache, "--name", self.name, "--frontend", "nbd", "--hydrate", hydrate
        )
        status = self.status()
        self.pid, self.uri = status["pid"], status["frontend"]["uri"]

    def status(self):
        return json.loads(self.bench.ferry("status", self.name, "--json"))

    def complete_after_s(self):
        """Waits until the source is no longer needed; seconds since attach began."""
        # One connection, as `status --watch` has it: a program for each look would want a CPU that others are measured on.
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(os.path.join(os.environ["BLKFERRY_RUN_DIR"], f"{self.name}.ctl"))
            lines = control.makefile("rw")
            while True:
                lines.write('{"do":"status"}\n')
                lines.flush()
                status = json.loads(lines.readline())["ok"]
                now = time.monotonic()
                if not status["source_needed"]:
                    return now - self.started
                time.sleep(min(0.1, max(0.01, (status["hydrate"]["eta_s"] or 0.04) / 8)))


@contextlib.contextmanager
def ferried(bench, source, hydrate="auto"):
    """Attached while it is used, and gone after that."""
    device = Ferried(bench, source, hydrate)
    try:
        yield device
    finally:
        bench.ferry("detach", device.name, "--incomplete")
        device.cache.unlink()
        Path(f"{device.cache}.ferry").unlink()


@contextlib.contextmanager
def nbdkit(bench, *args, tcp=False):
    """An nbdkit server: its URI (or address, for TCP) and its process."""
    path, pid_file = bench.path("nbdkit.sock"), bench.path("nbdkit.pid")
    where = ("-i", "127.0.0.1", "-p", "0") if tcp else ("-U", path)
    with child("nbdkit", "-f", "-P", pid_file, *where, *args, stderr=subprocess.DEVNULL) as process:
        wait_for("nbdkit to listen", lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
        yield f"127.0.0.1:{listening_port(process.pid)}" if tcp else unix_uri(path), process


def unix_uri(path, name=""):
    return f"nbd+unix:///{name}?socket={path}"


def listening_port(pid):
    """The TCP port that a process listens on."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(fd)))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            return int(fields[1].split(":")[1], 16)
    raise SystemExit(f"bench: process {pid} does not listen")


def timed(*command):
    """Runs a command; seconds that it took, and of CPU time."""
    started = time.monotonic()
    process = subprocess.Popen([str(c) for c in command])
    _, code, usage = os.wait4(process.pid, 0)
    took = time.monotonic() - started
    process.returncode = code
    if code != 0:
        raise SystemExit(f"bench: {' '.join(map(str, command))} failed ({code})")
    return took, usage.ru_utime + usage.ru_stime


def fio(*options):
    """Runs one job of fio; what it says about the direction that did something."""
    said = run("fio", "--name=job", "--output-format=json", "--randrepeat=0", "--group_reporting", *options)
    job = json.loads(said[said.index("{"):])["jobs"][0]
    return max((job[kind] for kind in ("read", "write")), key=lambda direction: direction["total_ios"])


def percentile(values, percent):
    """The smallest value that so many percent of them are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median(values):
    """The middle one, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
