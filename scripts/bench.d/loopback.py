"""Attach to complete with nothing in between, beside nbdcopy to a file."""

from hydrate import copy_it, ferry_it
from tools import GIB, MIB, cpu_s, export, median, nbdkit

SIZE_MIB, QUICK_SIZE_MIB = 2048, 1024


def loopback(bench):
    mib = QUICK_SIZE_MIB if bench.quick else SIZE_MIB
    image = bench.noise(mib)
    runs = {}
    with export(bench, image) as (ours, server), nbdkit(bench, "-r", "file", image, tcp=True) as (theirs, kit):
        ways = {
            "blkferry ← blkferry export": (ferry_it, ours, server), "nbdcopy ← blkferry export": (copy_it, ours, server),
            "blkferry ← nbdkit file": (ferry_it, theirs, kit), "nbdcopy ← nbdkit file": (copy_it, theirs, kit),
        }
        # The first one is not counted: memory that a virtual machine has never used costs its first user dearly. And who
        # comes after whom changes: what one gives back is the next one's, or the host's.
        order = list(ways.items())
        for number in range(1 + bench.rounds):
            order = order[1:] + order[:1] if number % 2 else order[::-1]
            for name, (move, address, serving) in order:
                before = cpu_s(serving.pid)
                took, used = move(bench, address)
                if number > 0:
                    runs.setdefault(name, []).append((took, used, cpu_s(serving.pid) - before))
    per_gib = mib * MIB / GIB
    rows = []
    for name, figures in runs.items():
        seconds = median([f[0] for f in figures])
        rows.append({
            "": name, "MiB": mib, "s": seconds, "MiB/s": mib / seconds,
            "CPU s/GiB": median([f[1] for f in figures]) / per_gib,
            "server's CPU s/GiB": median([f[2] for f in figures]) / per_gib,
            "runs_s": [f[0] for f in figures],
        })
    return rows


def tables(bench):
    yield (
        "from attach to complete over loopback, random data, and CPU time, beside nbdcopy --flush to a file; wanted: as "
        "fast as nbdcopy, with no more CPU time", loopback(bench),
    )
