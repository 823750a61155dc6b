"""A device that is complete, on its unix socket, beside servers of the same bytes."""

import contextlib

from tools import child, cpu_s, export, ferried, fio, median, nbdkit, run, unix_uri, wait_for

SIZE_MIB, QUICK_SIZE_MIB = 512, 256
# Name, fio's rw, block size, depth.
WORKLOADS = (
    ("4K read QD1", "randread", "4k", 1), ("4K read QD32", "randread", "4k", 32),
    ("4K write QD1", "randwrite", "4k", 1), ("4K write QD32", "randwrite", "4k", 32),
    ("128K read QD8", "read", "128k", 8), ("128K write QD8", "write", "128k", 8),
)


@contextlib.contextmanager
def storage_daemon(bench, base):
    """A qcow2 overlay on a raw file, with copy-on-read, on a socket."""
    overlay, socket = bench.path("overlay"), bench.path("qsd.sock")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    with child(
        "qemu-storage-daemon",
        "--blockdev", f"file,node-name=file,filename={overlay}", "--blockdev", "qcow2,node-name=disk,file=file",
        "--blockdev", "copy-on-read,node-name=cor,file=disk", "--nbd-server", f"addr.type=unix,addr.path={socket}",
        "--export", "nbd,id=export,node-name=cor,name=cor,writable=on",
    ) as process:
        wait_for("qemu-storage-daemon to listen", socket.exists)
        yield unix_uri(socket, "cor"), process


def measure(bench, size_mib, uri, pid, workload):
    """Requests a second, and the server's CPU time for each, in µs."""
    _, rw, block, depth = workload
    before = cpu_s(pid)
    said = fio("--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}", f"--iodepth={depth}",
               f"--size={size_mib}m", "--norandommap", "--time_based", f"--runtime={2 if bench.quick else 4}")
    return said["iops"], (cpu_s(pid) - before) * 1e6 / said["total_ios"]


def tables(bench):
    size_mib = QUICK_SIZE_MIB if bench.quick else SIZE_MIB
    image = bench.noise(size_mib)
    with contextlib.ExitStack() as stack:
        address, _ = stack.enter_context(export(bench, image))
        device = stack.enter_context(ferried(bench, address))
        file, file_server = stack.enter_context(nbdkit(bench, "file", bench.copy(image, "file")))
        cow, cow_server = stack.enter_context(nbdkit(bench, "--filter=cow", "file", image, "cow-on-read=true"))
        qemu, qemu_server = stack.enter_context(storage_daemon(bench, bench.copy(image, "base")))
        device.complete_after_s()
        # What is read once is local from then on.
        for uri in (cow, qemu):
            run("nbdcopy", uri, "null:")
        servers = {
            "blkferry": (device.uri, device.pid), "nbdkit file": (file, file_server.pid),
            "nbdkit cow": (cow, cow_server.pid), "qemu COR": (qemu, qemu_server.pid),
        }
        rows = []
        for workload in WORKLOADS:
            runs = {name: [] for name in servers}
            for _ in range(bench.rounds):
                for name, (uri, pid) in servers.items():
                    runs[name].append(measure(bench, size_mib, uri, pid, workload))
            iops = {name: median([run[0] for run in figures]) for name, figures in runs.items()}
            row = {"": workload[0]}
            row.update({f"{name} IOPS": iops[name] for name in servers})
            row.update({f"÷ {name}": iops["blkferry"] / iops[name] for name in servers if name != "blkferry"})
            row.update({f"{name} µs CPU": median([run[1] for run in runs[name]]) for name in list(servers)[:2]})
            row["runs_iops"] = [{name: run[0] for name, run in zip(runs, each)} for each in zip(*runs.values())]
            rows.append(row)
    yield (
        f"fio's nbd engine on a unix socket, {size_mib} MiB in the page cache, everything local already; the server's CPU time "
        "for a request; wanted: reads ≥ 1 × nbdkit file, 4K writes QD32 ≥ 2 × nbdkit cow, ≥ 3 × qemu-storage-daemon with "
        "copy-on-read", rows,
    )
