"""A QEMU guest that writes changes hosts: with blkferry, and with QEMU's own blockdev-mirror.

Both QEMUs are emulated in software on this machine, and both ways share one: what counts is one beside the other.
"""

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import threading
import time

from tools import MIB, child, median, relay, run, wait_for

MBIT, RTT_MS = 1000, 20
MEMORY_MIB = 192
# Size of the guest's disk, of which 150 MiB are data, and MiB of noise behind it.
DISKS, QUICK_DISKS = (("1G", 0), ("64G", 0), ("1G", 1024)), (("1G", 0), ("1G", 256))
NAME = "bench-move"
# What a mirror of a machine that writes may take before it counts as without end.
MIRROR_PATIENCE_S = 300
BOOT_PATIENCE_S = 180


class Qmp:
    """QEMU's machine protocol."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        wait_for("QEMU's QMP socket", lambda: self.socket.connect_ex(str(path)) == 0)
        self.lines, self.rest, self.events = [], b"", []
        self.read(10)
        self.do("qmp_capabilities")

    def read(self, timeout_s):
        """The next line, or nothing if none comes."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self.rest:
            if not select.select([self.socket], [], [], max(0, end - time.monotonic()))[0]:
                return None
            got = self.socket.recv(1 << 16)
            if not got:
                raise SystemExit("bench: QEMU has ended")
            self.rest += got
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def do(self, command, **arguments):
        """Executes a command; its answer."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            said = self.read(30)
            if said is None or "error" in said:
                raise SystemExit(f"bench: QEMU refused {command}: {said}")
            if "return" in said:
                return said["return"]
            self.events.append(said)

    def wait(self, name, timeout_s, **data):
        """Waits for an event, and forgets those before it; when it was heard."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            said = self.events.pop(0) if self.events else self.read(end - time.monotonic())
            if said and said.get("event") == name and data.items() <= said.get("data", {}).items():
                return time.monotonic()
        raise SystemExit(f"bench: QEMU never said {name} {data}")


@contextlib.contextmanager
def qemu(bench, *drive, incoming=False):
    """A machine with its QMP and its console."""
    qmp, console = bench.path("qmp"), bench.path("console")
    command = ["qemu-system-x86_64", "-nodefaults", "-machine", "pc", "-accel", "tcg", "-m", MEMORY_MIB, "-no-reboot",
               "-display", "none", "-vga", "none", "-serial", f"file:{console}", "-qmp", f"unix:{qmp},server=on,wait=off",
               *drive, "-device", "virtio-blk-pci,drive=disk0,id=vda", *(("-incoming", "defer", "-S") if incoming else ())]
    with child(*command, stdin=subprocess.DEVNULL, stop=signal.SIGKILL):
        wait_for("QEMU's QMP socket", qmp.exists)
        yield qmp, console


def stamps(console):
    """How many stamps the guest has written."""
    return len(re.findall(r"^FERRY-STAMP \d+ \d+", console.read_text(errors="replace"), flags=re.M))


def wait_stamps(console, count):
    end = time.monotonic() + BOOT_PATIENCE_S
    while not console.exists() or stamps(console) < count:
        if time.monotonic() > end:
            raise SystemExit("bench: the guest does not write")
        time.sleep(0.05)


class Silence(threading.Thread):
    """Looks when the guest's console was written to last at the one host, and first at the other."""

    def __init__(self, there, here):
        super().__init__(daemon=True)
        self.there, self.here, self.ms = there, here, None
        self.start()

    def run(self):
        size, heard = self.there.stat().st_size, time.monotonic()
        while not self.here.exists() or self.here.stat().st_size == 0:
            now = self.there.stat().st_size
            if now != size:
                size, heard = now, time.monotonic()
            time.sleep(0.001)
        self.ms = (time.monotonic() - heard) * 1000


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def raw(image):
    return ("-blockdev", f"driver=raw,node-name=disk0,file.driver=file,file.filename={image}")


def capabilities(qmp, *names):
    each = [{"capability": name, "state": True} for name in ("events", *names)]
    qmp.do("migrate-set-capabilities", capabilities=each)


def move_ours(bench, image):
    """Figures of a move with blkferry."""
    port, memory_port, cache = free_port(), free_port(), bench.path("cache")
    serve = (bench.programs / "blkferry", "export", image, "--handoff", "--listen", f"127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        source, console = stack.enter_context(qemu(bench, *raw(image)))
        export = stack.enter_context(child(*serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        export.stdout.readline()
        link = stack.enter_context(relay(bench, f"127.0.0.1:{port}", MBIT, RTT_MS))
        memory = stack.enter_context(relay(bench, f"127.0.0.1:{memory_port}", MBIT, RTT_MS))
        bench.ferry("attach", "--standby", f"nbd://{link.address}/", cache, "--name", NAME, "--frontend", "nbd")
        stack.callback(bench.ferry, "detach", NAME, "--incomplete")
        uri = json.loads(bench.ferry("status", NAME, "--json"))["frontend"]["uri"]
        path = uri.split("socket=")[1]
        drive = ("-blockdev", f"driver=raw,node-name=disk0,file.driver=nbd,file.server.type=unix,file.server.path={path}")
        target, arrived = stack.enter_context(qemu(bench, *drive, incoming=True))
        wait_stamps(console, 20)
        silence = Silence(console, arrived)
        began = time.monotonic()
        report = json.loads(bench.ferry(
            "migrate", "--from", source, "--to", target, "--uri", f"tcp:{memory.address}", "--listen",
            f"tcp:127.0.0.1:{memory_port}", "--disk", f"disk0={NAME}", "--json"))
        free_s = time.monotonic() - began
        wait_for("all blocks", lambda: not json.loads(bench.ferry("status", NAME, "--json"))["source_needed"], 0.2)
        wait_stamps(arrived, 5)
        silence.join(60)
        figures = {"free_s": free_s, "gap_ms": report["downtime_ms"], "silence_ms": silence.ms,
                   "by_qemu_ms": report["downtime_by_qemu_ms"], "disk_bytes": link.bytes_to_client(),
                   "memory_s": sum(p["ms"] for p in report["phases"] if p["phase"] == "memory") / 1000,
                   "complete_s": time.monotonic() - began}
    bench.ferry("reclaim", "--force", image)
    cache.unlink()
    return figures


def move_theirs(bench, image):
    """Figures of a move with blockdev-mirror and QEMU's NBD server."""
    port, memory_port, copy = free_port(), free_port(), bench.path("mirror")
    run("truncate", "-s", image.stat().st_size, copy)
    with contextlib.ExitStack() as stack:
        at_source, console = stack.enter_context(qemu(bench, *raw(image)))
        at_target, arrived = stack.enter_context(qemu(bench, *raw(copy), incoming=True))
        source, target = Qmp(at_source), Qmp(at_target)
        target.do("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}})
        target.do("block-export-add", type="nbd", id="e", node_name="disk0", writable=True)
        link = stack.enter_context(relay(bench, f"127.0.0.1:{port}", MBIT, RTT_MS))
        memory = stack.enter_context(relay(bench, f"127.0.0.1:{memory_port}", MBIT, RTT_MS))
        wait_stamps(console, 20)
        silence = Silence(console, arrived)
        began = time.monotonic()
        host, _, number = link.address.rpartition(":")
        source.do("blockdev-add", node_name="far", driver="nbd", server={"type": "inet", "host": host, "port": number},
                  export="disk0")
        source.do("blockdev-mirror", job_id="m", device="disk0", target="far", sync="full")
        source.wait("BLOCK_JOB_READY", MIRROR_PATIENCE_S)
        capabilities(source, "pause-before-switchover")
        capabilities(target, "late-block-activate")
        target.do("migrate-incoming", uri=f"tcp:127.0.0.1:{memory_port}")
        memory_began = time.monotonic()
        source.do("migrate", uri=f"tcp:{memory.address}")
        stopped = source.wait("STOP", MIRROR_PATIENCE_S)
        source.wait("MIGRATION", 60, status="pre-switchover")
        memory_s = time.monotonic() - memory_began
        source.do("block-job-cancel", device="m")
        source.wait("BLOCK_JOB_COMPLETED", 60)
        source.do("migrate-continue", state="pre-switchover")
        target.wait("MIGRATION", 60, status="completed")
        target.do("nbd-server-stop")
        target.do("cont")
        resumed = target.wait("RESUME", 60)
        free_s = time.monotonic() - began
        wait_stamps(arrived, 5)
        silence.join(60)
        by_qemu = source.do("query-migrate")["downtime"]
        figures = {"free_s": free_s, "gap_ms": (resumed - stopped) * 1000, "silence_ms": silence.ms, "by_qemu_ms": by_qemu, "disk_bytes": link.bytes_to_server(),
                   "memory_s": memory_s, "complete_s": free_s}
    copy.unlink()
    return figures


WAYS = {"blkferry": move_ours, "QEMU blockdev-mirror": move_theirs}


def tables(bench):
    rows = []
    for size, noise_mib in QUICK_DISKS if bench.quick else DISKS:
        master = bench.path("guest")
        run(bench.repo / "scripts/guest-image", master, "--writer", "--size", size)
        if noise_mib:
            with open(master, "ab") as disk:
                disk.write(bench.noise(noise_mib).read_bytes())
        runs = {way: [] for way in WAYS}
        for _ in range(bench.rounds):
            for way, move in WAYS.items():
                image = bench.path("image")
                run("cp", "--sparse=always", master, image)
                runs[way].append(move(bench, image))
                image.unlink()
        for way, each in runs.items():
            middle = {key: median([figures[key] for figures in each]) for key in each[0]}
            rows.append({
                "disk": f"{size} + {noise_mib} MiB of data", "with": way, "source free s": middle["free_s"], "of that memory s": middle["memory_s"],
                "stood still ms": middle["gap_ms"], "of that QEMU's ms": middle["by_qemu_ms"],
                "no stamp for ms": middle["silence_ms"], "all there s": middle["complete_s"],
                "disk MiB on the wire": middle["disk_bytes"] / MIB, "runs": each,
            })
        master.unlink()
    yield (
        f"a guest with {MEMORY_MIB} MiB that writes stamps moves over {MBIT} Mbit/s and {RTT_MS} ms, memory and disk on a "
        "link each; from the first command until the guest runs at the destination; wanted: 2 s and the memory, whatever "
        "the disk", rows,
    )
