"""The machine that it is measured on: what it is, and whether it was there meanwhile."""

import contextlib
import os
import platform
import re
import struct
from pathlib import Path

# Of the processors' time, what a host may give to others during a measurement before it is made again, and how often at
# most. A host takes a processor away for milliseconds at a time: at half a percent of two processors that is one such
# gap a second, and a reader who waits for a round trip after the other meets few of them.
MAX_STOLEN = 0.005
TRIES = 6


def described():
    """What the figures depend on."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), flags=re.M)
    return {
        "cpus": os.cpu_count(),
        "model": model.group(1) if model else platform.machine(),
        "memory_mib": int(memory.group(1)) >> 10,
        "kernel": platform.release().split("-")[0],
        "load_before": round(os.getloadavg()[0], 1),
    }


def ticks():
    """The processors' time so far: what the host gave to others while there was work here, and all of it."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return fields[7], sum(fields)


def share(before, after):
    """Of the processors' time between two calls of ticks(), the share that the host gave to others."""
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


def undisturbed(measure):
    """Measures until the host left the processors alone meanwhile, and says how often it was done again. What decides is
    what the kernel counts, and never the result; if no time was quiet, the quietest counts. On a machine of one's own
    nothing is ever done again."""
    quietest = None
    for repeated in range(TRIES):
        before = ticks()
        result = measure()
        stolen = share(before, ticks())
        if quietest is None or stolen < quietest[0]:
            quietest = (stolen, result)
        if stolen <= MAX_STOLEN:
            break
    return quietest[1], repeated


@contextlib.contextmanager
def processors_awake():
    """Keeps processors from sleeping while there is nothing to do, as cyclictest does; says whether that is so (it takes
    root). One that sleeps in a virtual machine is somebody else's until the host gives it back: milliseconds, now and then,
    which say nothing about what is measured here."""
    with contextlib.ExitStack() as opened:
        awake = False
        with contextlib.suppress(OSError):
            # The PM QoS interface (Documentation/power/pm_qos_interface.rst): microseconds, for as long as it is open.
            file = opened.enter_context(open("/dev/cpu_dma_latency", "wb", buffering=0))
            awake = file.write(struct.pack("i", 0)) > 0
        yield awake
