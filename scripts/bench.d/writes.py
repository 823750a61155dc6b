"""Writes of whole blocks that are not here: does the distance of the source matter?"""

from tools import export, ferried, fio, median, relay

SIZE_MIB = 1024
MBIT = 1000
FAR_MS = 100
DEPTHS = (1, 32)


def one(bench, address, rtt_ms, depth):
    seconds = 2 if bench.quick else 4
    with relay(bench, address, MBIT, rtt_ms) as link, ferried(bench, link.address, "off") as device:
        said = fio("--ioengine=nbd", f"--uri={device.uri}", "--rw=randwrite", "--bs=4k", f"--iodepth={depth}",
                   f"--size={SIZE_MIB}m", "--time_based", f"--runtime={seconds}")
        percentiles = said["clat_ns"]["percentile"]
        return said["iops"], said["lat_ns"]["mean"] / 1000, percentiles["99.000000"] / 1000


def tables(bench):
    rows = []
    with export(bench, bench.noise(SIZE_MIB)) as (address, _):
        for depth in DEPTHS:
            near, far = [], []
            for _ in range(bench.rounds):
                near.append(one(bench, address, 0, depth))
                far.append(one(bench, address, FAR_MS, depth))
            mean = {which: median([run[1] for run in runs]) for which, runs in (("near", near), ("far", far))}
            rows.append({
                "QD": depth,
                "IOPS, RTT 0": median([run[0] for run in near]), f"IOPS, RTT {FAR_MS}": median([run[0] for run in far]),
                "mean µs, RTT 0": mean["near"], f"mean µs, RTT {FAR_MS}": mean["far"], "far / near": mean["far"] / mean["near"],
                "p99 µs, RTT 0": median([run[2] for run in near]), f"p99 µs, RTT {FAR_MS}": median([run[2] for run in far]),
                "near_runs": [list(run) for run in near], "far_runs": [list(run) for run in far],
            })
    yield f"4 KiB random writes of absent blocks, hydration off; wanted: within 10 % of RTT 0 at {FAR_MS} ms", rows
