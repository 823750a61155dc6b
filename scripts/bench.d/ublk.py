"""Block devices, in machines that have the driver."""

import json
import subprocess

from tools import median

KERNELS = ("6.12", "7.2")
GUEST = "scripts/bench.d/ublk-guest"
# Short, so that those that are compared follow each other closely: what disturbs an emulated machine comes and goes within seconds.
JOB_S = 2
# As the guest's script names them.
WORKLOADS = ("randread-4k-1", "randread-4k-32", "randwrite-4k-1", "randwrite-4k-32", "read-128k-8", "write-128k-8")


def measure(bench, kernel):
    """Requests a second: {workload: {target: [of each round]}}."""
    rounds = bench.rounds
    share = bench.path("share")
    share.mkdir()
    programs = [bench.programs / name for name in ("blkferry", "ublk-passthrough")]
    targets = ["blkferry", "passthrough"]
    if bench.rublk.exists():
        programs.append(bench.rublk)
        targets.append("rublk")
    command = [bench.repo / "scripts/vm", "--kernel", kernel, "--memory", "2048", "--timeout", "1500", "--share", share]
    for program in programs + [bench.repo / GUEST]:
        command += ["--add", program]
    command += ["--", "ublk-guest", JOB_S, rounds, *targets]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench: the machine with Linux {kernel} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    figures = {}
    for workload in WORKLOADS:
        for target in targets:
            for number in range(rounds):
                job = json.loads((share / f"{workload}-{target}-{number}.json").read_text())["jobs"][0]
                direction = "read" if "read" in workload else "write"
                figures.setdefault(workload, {}).setdefault(target, []).append(job[direction]["iops"])
    return figures


def divided(ours, theirs):
    """Of what was measured one after the other."""
    return [our / their for our, their in zip(ours, theirs)]


def tables(bench):
    if not bench.rublk.exists():
        yield "rublk is not there: compared with the pass-through only", []
    for kernel in KERNELS:
        rows = []
        for workload, runs in measure(bench, kernel).items():
            iops = {target: median(each) for target, each in runs.items()}
            row = {"": workload}
            row.update({f"{target} IOPS": value for target, value in iops.items()})
            row.update({f"÷ {target}": median(divided(runs["blkferry"], each))
                        for target, each in runs.items() if target != "blkferry"})
            row["runs_iops"] = [runs]
            rows.append(row)
        yield (
            f"fio's io_uring engine, direct, on /dev/ublkbN in an emulated machine with Linux {kernel}, one queue, files on "
            "tmpfs, blkferry complete; medians, of IOPS and of the quotients of each round; wanted: ≥ 1 × rublk", rows,
        )
