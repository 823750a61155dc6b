"""A guest that writes all the while its disk is on its way, beside QEMU's blockdev-mirror of the same disk."""

import contextlib
import json
import math
import signal
import socket
import time

from tools import MIB, child, export, ferried, median, nbdkit, relay, unix_uri, wait_for

MBIT, RTT_MS = 1000, 20
SIZE_MIB, QUICK_SIZE_MIB = 1024, 256
# Of the guest's writes, in MB a second; 0 is the idle transfer.
RATES = (0, 10, 60)
WANTED_TIME, WANTED_BYTES = 1.05, 1.01
# After so long the mirror is not waited for any more.
MIRROR_S, QUICK_MIRROR_S = 60, 20


class Writer:
    """fio, until it is told to stop; then it says what it wrote."""

    def __init__(self, log):
        self.log = log

    def mb_per_s(self):
        said = self.log.read_text()
        job = json.loads(said[said.index("{"):])["jobs"][0]["write"]
        return job["io_bytes"] / 1e6 / (job["runtime"] / 1000)


@contextlib.contextmanager
def writing(bench, uri, size_mib, rate):
    """Random writes of 4 to 64 KiB all over the disk at a rate."""
    log = bench.path("fio")
    command = ("fio", "--name=job", "--output-format=json", f"--output={log}", "--randrepeat=0", "--ioengine=nbd",
               f"--uri={uri}", "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=16", f"--size={size_mib}m",
               "--norandommap", "--time_based", "--runtime=600", f"--rate={rate * 1_000_000}")
    if rate == 0:
        yield None
        return
    with child(*command, stop=signal.SIGINT):
        yield Writer(log)


# ---- blkferry ----------------------------------------------------------------

def expected(size, seconds, bytes_per_s):
    """Bytes that are still needed if blocks are fetched in order, evenly, in that time, while writes go everywhere: a
    block that was written before its turn is not."""
    share = bytes_per_s * seconds / size
    return size * -math.expm1(-share) / share if share else size


def ferry(bench, address, size_mib, rate):
    """Seconds from the start of hydration to complete; bytes that crossed, and that were needed; MB/s written."""
    with relay(bench, address, MBIT, RTT_MS) as link, ferried(bench, link.address, "off") as device:
        with writing(bench, device.uri, size_mib, rate) as writer:
            if writer:
                wait_for("the first write", lambda: device.status()["frontend"]["written_bytes"] > 0)
            before = link.bytes_to_client()
            device.started = time.monotonic()
            bench.ferry("set", device.name, "hydrate=auto")
            took = device.complete_after_s()
            crossed = link.bytes_to_client() - before
        written = writer.mb_per_s() if writer else 0
    return took, crossed, expected(size_mib * MIB, took, written * 1e6), written


# ---- QEMU --------------------------------------------------------------------

class Qmp:
    """A monitor of QEMU's."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rw")
        self.seen = set()
        self.read()
        self.ask("qmp_capabilities")

    def read(self):
        message = json.loads(self.file.readline())
        if "event" in message:
            self.seen.add(message["event"])
        return message

    def ask(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = self.read()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise SystemExit(f"bench: QEMU refuses {command}: {answer['error']['desc']}")


@contextlib.contextmanager
def storage_daemon(bench, image):
    """The host that the disk leaves: serves it to the guest, and can be told to mirror it."""
    nbd, monitor = bench.path("qsd.sock"), bench.path("qmp.sock")
    with child(
        "qemu-storage-daemon", "--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off", "--monitor", "chardev=qmp",
        "--blockdev", f"file,node-name=file,filename={image}", "--blockdev", "raw,node-name=disk,file=file",
        "--nbd-server", f"addr.type=unix,addr.path={nbd}", "--export", "nbd,id=export,node-name=disk,name=disk,writable=on",
    ):
        wait_for("qemu-storage-daemon to listen", lambda: nbd.exists() and monitor.exists())
        yield unix_uri(nbd, "disk"), Qmp(monitor)


def mirror(bench, image, size_mib, rate):
    """Seconds until QEMU says that the target is up to date, None if it does not; bytes that crossed; MB/s written."""
    source, target = bench.copy(image, "source"), bench.path("target")
    target.touch()
    with open(target, "r+b") as file:
        file.truncate(size_mib * MIB)
    limit_s = QUICK_MIRROR_S if bench.quick else MIRROR_S
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(nbdkit(bench, "file", target, tcp=True))
        link = stack.enter_context(relay(bench, address, MBIT, RTT_MS))
        uri, qmp = stack.enter_context(storage_daemon(bench, source))
        with writing(bench, uri, size_mib, rate) as writer:
            host, port = link.address.split(":")
            qmp.ask("blockdev-add", driver="nbd", **{"node-name": "target"}, server={"type": "inet", "host": host, "port": port})
            if writer:
                time.sleep(0.5)
            before, started = link.bytes_to_server(), time.monotonic()
            qmp.ask("blockdev-mirror", **{"job-id": "mirror", "copy-mode": "background"}, device="disk", target="target", sync="full")
            while "BLOCK_JOB_READY" not in qmp.seen and time.monotonic() - started < limit_s:
                time.sleep(0.05)
                qmp.ask("query-jobs")
            took = time.monotonic() - started
            crossed = link.bytes_to_server() - before
            done = "BLOCK_JOB_READY" in qmp.seen
        written = writer.mb_per_s() if writer else 0
    source.unlink()
    target.unlink()
    return took if done else None, took, crossed, written


def tables(bench):
    size_mib = QUICK_SIZE_MIB if bench.quick else SIZE_MIB
    image = bench.noise(size_mib)
    ours = {rate: [] for rate in RATES}
    with export(bench, image) as (address, _):
        for _ in range(bench.rounds):
            for rate, runs in ours.items():
                runs.append(ferry(bench, address, size_mib, rate))
    # Once: it is asked whether it ends at all.
    theirs = {rate: mirror(bench, image, size_mib, rate) for rate in RATES}
    idle_s = median([run[0] for run in ours[0]])
    rows = []
    for rate in RATES:
        took, crossed, needed, written = (median(figures) for figures in zip(*ours[rate]))
        done_s, seen_s, sent, theirs_written = theirs[rate]
        met = took <= WANTED_TIME * idle_s and crossed <= WANTED_BYTES * needed
        rows.append({
            "writes MB/s": rate, "MiB": size_mib, "blkferry s": took, "÷ idle": took / idle_s, "crossed MiB": crossed / MIB,
            "needed MiB": needed / MIB, "÷ needed": crossed / needed, "met": "yes" if met else "no", "written MB/s": written,
            "mirror": f"done after {done_s:.1f} s" if done_s else f"not done after {seen_s:.0f} s",
            "mirror sent MiB": sent / MIB, "÷ the disk": sent / MIB / size_mib, "its guest's MB/s": theirs_written,
            "runs": [list(run) for run in ours[rate]],
        })
    yield (
        f"{size_mib} MiB of random data over {MBIT} Mbit/s, RTT {RTT_MS} ms, while a guest writes 4 to 64 KiB at random places "
        "from beginning to end; beside QEMU's blockdev-mirror (copy-mode=background) to an NBD server, once each. Needed is what "
        "the guest has not written before its turn came, if all writes are spread evenly. Wanted: "
        f"≤ {WANTED_TIME} × the idle transfer's time, ≤ {WANTED_BYTES} × the bytes needed", rows,
    )
