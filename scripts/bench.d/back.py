"""`return`: a disk goes out to another host and comes back, with a little of it written there."""

import contextlib
import json
import re
import socket
import subprocess
import time

from tools import MIB, child, fio, median, relay, wait_for

# Mbit/s and round trip time in ms.
LINKS = ((100, 20), (1000, 1), (1000, 20))
# What the way back cannot do without once the disk is to change hands: one to take it, one to fetch.
ROUND_TRIPS = 2
SIZE_MIB, QUICK_SIZE_MIB = 1024, 128
DIRTY_MIB = 10
WANTED_MIB, WANTED_RATIO = 11, 60
# How what is written at B lies on the disk.
PATTERNS = {"4 KiB here and there": "randwrite", "in one piece": "write"}


@contextlib.contextmanager
def handing_out(bench, image):
    """An export that gives its disk away; its address."""
    command = (bench.programs / "blkferry", "export", image, "--handoff", "--listen", "127.0.0.1:0")
    with child(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield re.search(r"nbd://([0-9.:]+)", process.stdout.readline()).group(1)


def status(bench, name):
    return json.loads(bench.ferry("status", name, "--json"))


def wait_complete(bench, name):
    """Until the source is not needed any more. Asks the daemon itself: to start a program for each look takes longer than
    what is to be measured."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(bench.work / "run" / f"{name}.ctl"))
        answers = control.makefile()
        while True:
            control.sendall(b'{"do":"status"}\n')
            if not json.loads(answers.readline())["ok"]["source_needed"]:
                return
            time.sleep(0.002)


def attach(bench, address, export, cache, name, *more):
    bench.ferry("attach", f"nbd://{address}/{export}", cache, "--name", name, "--frontend", "nbd", *more)


def out_and_back(bench, image, mbit, rtt_ms, pattern):
    """Figures of one round trip. A: the image; B: the device that has it in between."""
    a, b = f"bench-a{bench.number}", f"bench-b{bench.number}"
    cache = bench.path("cache")
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(relay(bench, stack.enter_context(handing_out(bench, image)), mbit, rtt_ms))
        began = time.monotonic()
        attach(bench, link.address, "", cache, b)
        wait_complete(bench, b)
        out_s, out_bytes = time.monotonic() - began, sum(link.bytes())
        written = fio("--ioengine=nbd", f"--uri={status(bench, b)['frontend']['uri']}", f"--rw={pattern}", "--bs=4k",
                      "--iodepth=16", f"--size={image.stat().st_size}", f"--io_size={DIRTY_MIB}m", "--end_fsync=1")
        assert written["io_bytes"] == DIRTY_MIB * MIB
        bench.ferry("set", b, "export=127.0.0.1:0")
        address = re.search(r"nbd://([0-9.:]+)", status(bench, b)["handoff"]["export"]).group(1)
    with relay(bench, address, mbit, rtt_ms) as link:
        began = time.monotonic()
        attach(bench, link.address, b, image, a, "--standby")
        taking = time.monotonic()
        bench.ferry("activate", a)
        active = time.monotonic()
        wait_complete(bench, a)
        done = time.monotonic()
        back_bytes = sum(link.bytes())
        wait_for("B to be told", lambda: status(bench, b)["handoff"]["released"])
    for name in (a, b):
        bench.ferry("detach", name)
    same = subprocess.run(["cmp", image, cache], check=False).returncode == 0
    for path in (cache, f"{cache}.ferry", f"{image}.ferry"):
        subprocess.run(["rm", "-f", path], check=True)
    if not same:
        raise SystemExit("bench: what came back is not what was at B")
    return {"out_s": out_s, "out_bytes": out_bytes, "back_s": done - began, "back_bytes": back_bytes,
            "from_activate_s": done - taking, "guest_waits_s": active - taking}


def tables(bench):
    size_mib = QUICK_SIZE_MIB if bench.quick else SIZE_MIB
    master = bench.noise(size_mib)
    rows = []
    for mbit, rtt_ms in LINKS:
        for words, pattern in PATTERNS.items():
            runs = []
            for _ in range(bench.rounds):
                image = bench.copy(master, "image")
                runs.append(out_and_back(bench, image, mbit, rtt_ms, pattern))
                image.unlink()
            middle = {key: median([run[key] for run in runs]) for key in runs[0]}
            rows.append({
                "Mbit/s": mbit, "ms": rtt_ms, "written at B": words, "out s": middle["out_s"],
                "out MiB": middle["out_bytes"] / MIB, "back s": middle["back_s"], "of that from activate s":
                middle["from_activate_s"], "nobody can write s": middle["guest_waits_s"], "back MiB":
                middle["back_bytes"] / MIB, "times faster": middle["out_s"] / middle["back_s"],
                "times faster from activate": middle["out_s"] / middle["from_activate_s"],
                "the link alone s": middle["back_bytes"] * 8 / mbit / 1e6 + ROUND_TRIPS * rtt_ms / 1e3, "runs": runs,
            })
            if middle["back_bytes"] > WANTED_MIB * MIB:
                bench.failed.append(f"return: {middle['back_bytes']} bytes came back, for {DIRTY_MIB} MiB that were written")
    yield (
        f"a disk of {size_mib} MiB of data goes out, {DIRTY_MIB} MiB of it are written there, and it comes back; from "
        f"attach until everything is there, both ways, and from activate, when the machine stands still. Wanted: at most "
        f"{WANTED_MIB} MiB back, and {WANTED_RATIO} times faster than out, where the link is what takes the time", rows,
    )
