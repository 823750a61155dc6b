"""Demand reads of a block device, beside dm-clone on the kernel's NBD client, in a machine that has both."""

import json
import subprocess

from tools import median

KERNEL = "7.2"
GUEST = "scripts/bench.d/clone-guest"
# On the way to the server and back; the loopback device has it twice.
DELAYS_MS = (0, 2)
TARGETS = ("blkferry", "dm-clone")
# Reads in flight, and how they follow each other: as fio calls it, and as we do.
PATTERNS = {"1-randread": (1, "random"), "32-randread": (32, "random"), "1-read": (1, "one after the other")}
# Of blocks that are here: dm-clone asks its source again for what was read before.
WANTED = 2


def measure(bench, delay_ms):
    """Reads a second: {(pattern, pass): {target: [of each round]}}."""
    share = bench.path("share")
    share.mkdir()
    command = [bench.repo / "scripts/vm", "--kernel", KERNEL, "--memory", "2048", "--timeout", "1500", "--share", share]
    for program in (bench.programs / "blkferry", bench.repo / GUEST):
        command += ["--add", program]
    command += ["--", "clone-guest", 2 if bench.quick else 4, bench.rounds, delay_ms]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: the machine with Linux {KERNEL} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    figures = {}
    for pattern in PATTERNS:
        for passed in ("first", "again"):
            for target in TARGETS:
                for number in range(bench.rounds):
                    job = json.loads((share / f"{target}-{pattern}-{passed}-{number}.json").read_text())["jobs"][0]
                    figures.setdefault((pattern, passed), {}).setdefault(target, []).append(job["read"]["iops"])
    return figures


def tables(bench):
    rows = []
    for delay_ms in DELAYS_MS:
        for (pattern, passed), runs in measure(bench, delay_ms).items():
            depth, order = PATTERNS[pattern]
            ours, theirs = (median(runs[target]) for target in TARGETS)
            is_here = passed == "again"
            rows.append({
                "RTT ms": 2 * delay_ms, "QD": depth, "reads": order, "blocks": "read before" if is_here else "not here",
                "blkferry IOPS": ours, "dm-clone IOPS": theirs, "blkferry ÷ dm-clone": ours / theirs,
                "met": "–" if not is_here else "yes" if ours >= WANTED * theirs else "no", "runs_iops": [runs],
            })
    yield (
        f"4 KiB reads, each block once and then the same again, direct, of /dev/ublkbN and of dm-clone over nbd.ko, both "
        f"from one blkferry export, hydration off, in an emulated machine with Linux {KERNEL}; dm-clone does not keep what is "
        f"read. Wanted of what was read before: ≥ {WANTED} ×", rows,
    )
