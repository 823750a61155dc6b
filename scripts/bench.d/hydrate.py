"""Attach to complete over a slow link, beside nbdcopy to a file."""

from tools import GIB, MIB, cpu_s, export, ferried, median, relay, timed

# Megabits a second, MiB to move, the same with --quick.
LINKS = ((1000, 1024, 256), (100, 256, 32))
RTTS_MS, QUICK_RTTS_MS = (0, 20, 100, 150), (0, 20, 100)
# What is asked for: bytes / (this share of the rate), and so many round trips.
WANTED_SHARE, WANTED_RTTS = 0.97, 4


def ferry_it(bench, address):
    """Seconds from attach to complete, and of CPU time."""
    with ferried(bench, address) as device:
        took = device.complete_after_s()
        return took, cpu_s(device.pid)


def copy_it(bench, address):
    target = bench.path("copy")
    figures = timed("nbdcopy", "--flush", f"nbd://{address}/", target)
    target.unlink()
    return figures


def shaped(bench, mbit, mib, rtts_ms):
    size, rows = mib * MIB, []
    with export(bench, bench.noise(mib)) as (address, _):
        for rtt_ms in rtts_ms:
            ours, theirs = [], []
            for _ in range(bench.rounds):
                with relay(bench, address, mbit, rtt_ms) as link:
                    ours.append(bench.undisturbed(lambda: ferry_it(bench, link.address)))
                    theirs.append(bench.undisturbed(lambda: copy_it(bench, link.address)))
            our_s, their_s = median([took for took, _ in ours]), median([took for took, _ in theirs])
            our_cpu_s, their_cpu_s = (median([cpu for _, cpu in runs]) * GIB / size for runs in (ours, theirs))
            floor_s = size * 8 / (mbit * 1e6)
            wanted_s = floor_s / WANTED_SHARE + WANTED_RTTS * rtt_ms / 1000
            rows.append({
                "Mbit/s": mbit, "RTT ms": rtt_ms, "MiB": mib,
                "blkferry s": our_s, "of the link": f"{100 * floor_s / our_s:.1f} %",
                "wanted s": wanted_s, "met": "yes" if our_s <= wanted_s else "no",
                "nbdcopy s": their_s, "its share": f"{100 * floor_s / their_s:.1f} %",
                "blkferry / nbdcopy": our_s / their_s, "CPU s/GiB": our_cpu_s, "nbdcopy's": their_cpu_s,
                "blkferry_runs_s": [took for took, _ in ours], "nbdcopy_runs_s": [took for took, _ in theirs],
            })
    return rows


def tables(bench):
    rtts_ms = QUICK_RTTS_MS if bench.quick else RTTS_MS
    rows = []
    for mbit, mib, quick_mib in LINKS:
        rows += shaped(bench, mbit, quick_mib if bench.quick else mib, rtts_ms)
    yield (
        "from attach to complete (every block durable) through the relay, random data, beside nbdcopy --flush to a "
        f"file; CPU time of the receiving side; wanted: bytes / ({WANTED_SHARE} × rate) + {WANTED_RTTS} RTT", rows,
    )
