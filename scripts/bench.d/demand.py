"""How long a read waits for a block that is not here: alone, and beside hydration."""

import time

from tools import MIB, export, ferried, fio, median, percentile, relay

MBIT = 1000
RTTS_MS = (20, 100)
SIZE_MIB = 1024
# Reads go to the second half, which hydration reaches after this many seconds at the earliest: 4.3.
WARM_UP_S, SECONDS = 0.8, 3
# Each with one read at a time.
READERS = 4


def latencies_ms(prefix):
    """Every single read that fio made."""
    for log in prefix.parent.glob(f"{prefix.name}_lat.*.log"):
        yield from (int(line.split(",")[1]) / 1e6 for line in log.read_text().splitlines())
        log.unlink()


def read(bench, uri):
    prefix = bench.path("lat")
    started = time.monotonic()
    fio("--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k", "--iodepth=1", f"--numjobs={READERS}",
        f"--size={SIZE_MIB // 2}m", f"--offset={SIZE_MIB // 2}m", "--norandommap", "--time_based", f"--runtime={SECONDS}",
        f"--write_lat_log={prefix}", "--disable_clat=1", "--disable_slat=1")
    return list(latencies_ms(prefix)), time.monotonic() - started


# What stands between reader and source, and does hydration run beside it? The first one is the control: what it shows
# above a round trip is the machine's own doing.
SETTINGS = {"nothing": None, "blkferry": "off", "blkferry, hydrating": "auto"}


def one(bench, address, rtt_ms, hydrate):
    """Latencies of a round, and the share of the link that was used."""
    with relay(bench, address, MBIT, rtt_ms) as link:
        if hydrate is None:
            return read(bench, f"nbd://{link.address}/")[0], 0
        with ferried(bench, link.address, hydrate) as device:
            if hydrate == "auto":
                time.sleep(WARM_UP_S + 4 * rtt_ms / 1000)
            before = link.bytes_to_client()
            found, took = read(bench, device.uri)
            share = (link.bytes_to_client() - before) * 8 / (MBIT * 1e6 * took)
            if hydrate == "auto" and not device.status()["source_needed"]:
                raise SystemExit("bench: hydration ended before the reads did: the disk is too small")
            return found, share


def tables(bench):
    rows = []
    with export(bench, bench.noise(SIZE_MIB)) as (address, _):
        for rtt_ms in RTTS_MS:
            runs = {setting: [] for setting in SETTINGS}
            for _ in range(bench.rounds):
                for setting, hydrate in SETTINGS.items():
                    runs[setting].append(bench.undisturbed(lambda: one(bench, address, rtt_ms, hydrate)))
            for setting, rounds in runs.items():
                # Less than a round trip: the block was here already.
                misses = [[ms for ms in latencies if ms > rtt_ms * 0.9] for latencies, _ in rounds]
                rows.append({
                    "RTT ms": rtt_ms, "in between": setting, "reads": sum(len(latencies) for latencies, _ in rounds),
                    "misses": sum(map(len, misses)),
                    **{f"p{n} / RTT": median([percentile(of_round, n) for of_round in misses if of_round]) / rtt_ms for n in (50, 90, 99)},
                    "wanted p50, p99": {None: "–", "off": "–, 1.1", "auto": "1.2, 1.6"}[SETTINGS[setting]],
                    "of the link": f"{100 * median([share for _, share in rounds]):.0f} %" if SETTINGS[setting] == "auto" else "–",
                    "misses_ms": [[round(ms, 3) for ms in sorted(of_round)] for of_round in misses],
                })
    yield (
        f"4 KiB random reads of absent blocks at {MBIT} Mbit/s, {READERS} readers with one read at a time; in round trip "
        "times: of each round the percentile, and of these the median; hydration's share is wanted at 85 % or more", rows,
    )
