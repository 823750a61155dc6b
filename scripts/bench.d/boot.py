"""How long a machine takes from nothing to its login prompt, with its disk at the other end of a slow link."""

import os
import selectors
import subprocess
import time

from tools import MIB, export, ferried, median, relay, run

MBIT, RTT_MS = 100, 50
PROMPT = b"login:"
PATIENCE_S = 900
WANTED = 0.5
MEMORY_MIB = 512
# The less of it is emulation, the more is the disk's.
CPUS = 2


def boot_s(bench, drive, started):
    """Seconds from `started` until the prompt."""
    command = [
        "qemu-system-x86_64", "-nodefaults", "-machine", "pc", "-accel", "tcg", "-smp", CPUS, "-m", MEMORY_MIB, "-no-reboot",
        "-display", "none", "-vga", "none", "-serial", "stdio", "-drive", f"{drive},if=virtio,cache=writeback",
    ]
    errors = bench.path("qemu.log")
    with open(errors, "w") as log, subprocess.Popen(
        [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
    ) as machine, selectors.DefaultSelector() as selector:
        selector.register(machine.stdout, selectors.EVENT_READ)
        console = b""
        try:
            while PROMPT not in console:
                left_s = started + PATIENCE_S - time.monotonic()
                if left_s < 0 or not selector.select(left_s):
                    raise SystemExit(f"bench: no login prompt after {PATIENCE_S} s:\n{console.decode(errors='replace')}")
                new = os.read(machine.stdout.fileno(), 4096)
                if not new:
                    raise SystemExit(f"bench: the machine ended:\n{console.decode(errors='replace')}{errors.read_text()}")
                console += new
            return time.monotonic() - started
        finally:
            machine.kill()


def forget(image):
    """Drops an image from the page cache."""
    with open(image, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_at_the_source(bench, image):
    """What the source's page cache has of an image where the machine has run: what it used."""
    forget(image)
    boot_s(bench, f"file={image},format=raw,snapshot=on", time.monotonic())


# Each: a new disk, cold; seconds, and MiB that crossed until then.

def local(bench, image, _address):
    copy = bench.copy(image, "disk")
    took = boot_s(bench, f"file={copy},format=raw", time.monotonic())
    copy.unlink()
    return took, 0


def ferry(hydrate, hot=True):
    def one(bench, image, address):
        if not hot:
            forget(image)
        with relay(bench, address, MBIT, RTT_MS) as link, ferried(bench, link.address, hydrate) as device:
            took = boot_s(bench, f"file={device.uri},format=raw", device.started)
            return took, link.bytes_to_client() / MIB
    return one


def copy_on_read(bench, _image, address):
    with relay(bench, address, MBIT, RTT_MS) as link:
        started, overlay = time.monotonic(), bench.path("overlay")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"nbd://{link.address}/", "-F", "raw", overlay)
        took = boot_s(bench, f"file={overlay},format=qcow2,copy-on-read=on", started)
        overlay.unlink()
        return took, link.bytes_to_client() / MIB


WAYS = {
    "local file": local, "QEMU copy-on-read": copy_on_read, "blkferry": ferry("auto"),
    "blkferry, nothing hot": ferry("auto", hot=False), "blkferry, hydration off": ferry("off"),
}


def tables(bench):
    # On a disk: all of a tmpfs is in the page cache.
    image = bench.disk / "debian"
    run(bench.repo / "scripts/bench.d/boot-image", image)
    runs = {way: [] for way in WAYS}
    with export(bench, image) as (address, _):
        for _ in range(bench.rounds):
            for way, boot in WAYS.items():
                if "nothing hot" not in way:
                    run_at_the_source(bench, image)
                runs[way].append(boot(bench, image, address))
    image.unlink()
    seconds = {way: median([took for took, _ in each]) for way, each in runs.items()}
    here, theirs = seconds["local file"], seconds["QEMU copy-on-read"]
    rows = []
    for way, each in runs.items():
        took = seconds[way]
        # All of them emulate the same processor: what is above a local disk is what the link costs.
        rows.append({
            "disk": way, "s": took, "÷ copy-on-read": took / theirs, "s above local": took - here,
            "÷ copy-on-read's": (took - here) / (theirs - here), "met": "–" if way != "blkferry" else
            "yes" if took <= WANTED * theirs else "no", "crossed MiB": median([mib for _, mib in each]),
            "runs": [list(one) for one in each],
        })
    yield (
        f"from the start of attach or of QEMU to the login prompt of a Debian with systemd, in an emulated machine of {CPUS} processors, whose disk "
        f"(356 MiB of data) is behind {MBIT} Mbit/s, RTT {RTT_MS} ms, nothing cached; boot loader, kernel and all come from it; the machine has run at the source before, so that what it used is "
        f"in the page cache there (but for the row that says otherwise); "
        f"wanted: ≤ {WANTED} × QEMU's copy-on-read", rows,
    )
