"""What the size of a disk costs: time to attach, to resume and to say how it is, and to find out that it is empty; memory."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

from tools import GIB, MIB, child, export, ferried, fio, median, nbdkit, relay, run, unix_uri, wait_for

TIB = 1 << 40
SIZES = (GIB, TIB, 16 * TIB)
WANTED_ATTACH_S, WANTED_MIB = 1.0, 80
# A link on which questions one after the other would take long.
MBIT, RTTS_MS = 1000, (0, 20)
STATUS_CALLS, QUICK_STATUS_CALLS = 40, 10
# Random reads and writes over all of the disk, so that all of its maps are touched.
TRAFFIC_S, QUICK_TRAFFIC_S = 6, 3


@contextlib.contextmanager
def qemu_nbd(bench, image):
    socket = bench.path("qemu-nbd.sock")
    command = ("qemu-nbd", "--read-only", "--persistent", "--shared=8", "--format=raw", f"--socket={socket}", image)
    with child(*command) as process:
        wait_for("qemu-nbd to listen", socket.exists)
        yield unix_uri(socket), process


@contextlib.contextmanager
def exported(bench, image):
    with export(bench, image) as (address, process):
        yield f"nbd://{address}/", process


SOURCES = {
    "blkferry export": lambda bench, image, size: exported(bench, image),
    "nbdkit memory": lambda bench, image, size: nbdkit(bench, "-r", "memory", str(size)),
    "qemu-nbd": lambda bench, image, size: qemu_nbd(bench, image),
}


def memory_mib(pid):
    """Of a process: resident now, and at most so far; shared mappings included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"^{name}:\s*(\d+) kB", status, re.M).group(1)) / 1024 for name in ("VmRSS", "VmHWM"))


class Device:
    """A device whose metadata is on a disk, as it would be: reserving gigabytes of a tmpfs takes time of its own."""

    def __init__(self, bench, source):
        self.bench, self.source, self.name = bench, source, f"size{bench.number}"
        self.cache, self.metadata = bench.path("cache"), bench.on_disk(f"size{bench.number}.ferry")

    def attach_s(self):
        started = time.monotonic()
        self.bench.ferry("attach", self.source, self.cache, "--name", self.name, "--frontend", "nbd", "--hydrate", "off",
                         "--metadata", self.metadata)
        return time.monotonic() - started

    def status(self):
        return json.loads(self.bench.ferry("status", self.name, "--json"))

    def status_ms(self, calls):
        def once():
            started = time.monotonic()
            self.status()
            return (time.monotonic() - started) * 1000
        return median([once() for _ in range(calls)])

    def detach(self):
        self.bench.ferry("detach", self.name, "--incomplete")

    def remove(self):
        self.cache.unlink()
        self.metadata.unlink()


def attach(bench, size, name):
    """Figures of one round: new, with all the status calls, and resumed."""
    image = bench.path("sparse")
    run("truncate", "-s", size, image)
    with SOURCES[name](bench, image, size) as (source, _):
        device = Device(bench, source)
        new_s = device.attach_s()
        status_ms = device.status_ms(QUICK_STATUS_CALLS if bench.quick else STATUS_CALLS)
        resident_mib = memory_mib(device.status()["pid"])[0]
        device.detach()
        resumed_s = device.attach_s()
        device.detach()
        device.remove()
    image.unlink()
    return new_s, resumed_s, status_ms, resident_mib


def possible(bench, size):
    """Does the file system take files of that size? ext4 ends below 16 TiB."""
    path = bench.path("sparse")
    path.touch()
    try:
        os.truncate(path, size)
    except OSError:
        return False
    finally:
        path.unlink()
    return True


def attaching(bench):
    rows = []
    for name in SOURCES:
        for size in (size for size in SIZES if possible(bench, size)):
            runs = [attach(bench, size, name) for _ in range(bench.rounds)]
            new_s, resumed_s, status_ms, resident_mib = (median(figures) for figures in zip(*runs))
            met = size < 16 * TIB or new_s < WANTED_ATTACH_S
            rows.append({
                "source, all holes": name, "GiB": size // GIB, "attach s": new_s, "wanted s": WANTED_ATTACH_S,
                "met": "yes" if met else "no", "attach again s": resumed_s, "status --json ms": status_ms,
                "resident MiB": resident_mib, "runs": [list(figures) for figures in runs],
            })
    return rows


def traffic(bench, source):
    """Memory of a device of 1 TiB at each step of its life, each at most so far."""
    device = Device(bench, source)
    device.attach_s()
    status = device.status()
    uri, pid = status["frontend"]["uri"], status["pid"]
    peaks = [memory_mib(pid)[1]]
    seconds = QUICK_TRAFFIC_S if bench.quick else TRAFFIC_S
    fio("--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k", "--iodepth=32", f"--size={TIB // GIB}g", "--norandommap",
        "--time_based", f"--runtime={seconds}")
    peaks.append(memory_mib(pid)[1])
    bench.ferry("set", device.name, "hydrate=auto")
    wait_for("hydration to end", lambda: not device.status()["source_needed"], 0.2)
    peaks.append(memory_mib(pid)[1])
    blocks = device.status()["blocks"]
    device.detach()
    device.remove()
    return peaks, blocks["dirty"]


def memory(bench):
    image = bench.path("sparse")
    run("truncate", "-s", TIB, image)
    with exported(bench, image) as (source, _):
        runs = [traffic(bench, source) for _ in range(bench.rounds)]
    image.unlink()
    steps = ("attached", "and random 4K reads and writes over all of it", "and complete")
    rows = []
    for number, step in enumerate(steps):
        peak = median([peaks[number] for peaks, _ in runs])
        rows.append({
            "1 TiB, 4 KiB blocks": step, "resident at most MiB": peak, "wanted MiB": WANTED_MIB,
            "met": "yes" if peak <= WANTED_MIB else "no", "blocks written": median([dirty for _, dirty in runs]) if number else 0,
            "maps MiB": 2 * TIB / 4096 / 8 / MIB, "runs_mib": [peaks[number] for peaks, _ in runs],
        })
    return rows


def completing(bench):
    """Disks of holes, from attach to complete."""
    rows = []
    for size in (size for size in SIZES if possible(bench, size)):
        image = bench.path("sparse")
        run("truncate", "-s", size, image)
        with export(bench, image) as (address, _):
            for rtt_ms in RTTS_MS:
                runs, sent = [], 0
                for _ in range(bench.rounds):
                    with relay(bench, address, MBIT, rtt_ms) as link, ferried(bench, link.address) as device:
                        runs.append(device.complete_after_s())
                        sent = link.bytes_to_server()
                rows.append({
                    "all holes, GiB": size // GIB, "RTT ms": rtt_ms, "complete s": median(runs), "sent KiB": sent / 1024, "runs": runs,
                })
        image.unlink()
    return rows


def tables(bench):
    yield (
        "from attach to ready of a new cache, and of the same one again; `status --json` as a command; the daemon's resident "
        "memory, shared mappings included. Data and maps on tmpfs, metadata on a disk", attaching(bench),
    )
    yield f"from attach to complete, of a blkferry export behind a link of {MBIT} Mbit/s; sent: mostly questions", completing(bench)
    yield "the daemon's peak of resident memory, shared mappings included, hydration off until the last step", memory(bench)
