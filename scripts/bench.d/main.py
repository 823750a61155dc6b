"""Runs components, prints their tables, writes the JSON. Started by scripts/bench."""

import argparse
import datetime
import json
import subprocess
from pathlib import Path

import back
import boot
import busy
import clone
import demand
import hostile
import hydrate
import instructions
import local
import loopback
import migrate
import plot
import size
import ublk
import writes
from machine import described, processors_awake, share, ticks
from tools import Bench, run

COMPONENTS = {
    module.__name__: module
    for module in (
        hydrate, loopback, demand, local, writes, busy, hostile, size, instructions, boot, ublk, clone, migrate
    )
} | {"return": back}


# What the figures are not made by.
WORDS = (":!docs", ":!*.md")


def code(repo):
    """The commit that the code was changed in last, and whether it has been changed since."""
    def git(*command):
        return run("git", "-C", repo, *command, "--", ".", *WORDS).strip()
    return git("log", "-1", "--format=%h") + ("-dirty" if git("status", "--porcelain") else "")


def peers():
    """Versions of what is compared with."""
    def first(*command):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[0] if done.returncode == 0 else None
    return {
        "fio": first("fio", "--version"),
        "nbdcopy": first("nbdcopy", "--version"),
        "nbdkit": first("nbdkit", "--version"),
        "qemu-storage-daemon": first("qemu-storage-daemon", "--version"),
    }


def shown(value):
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def print_table(rows):
    """Rows are dictionaries with the same keys; lists, the single figures, are for the JSON."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    lines = [columns] + [[shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def measured(bench, name, awake):
    """A component's tables, printed, and with how the machine was meanwhile."""
    tables, before, bench.repeated = [], ticks(), 0
    for title, rows in COMPONENTS[name].tables(bench):
        print(f"\n{name}: {title}\n", flush=True)
        if rows:
            print_table(rows)
            tables.append({"measured": title, "rounds": bench.rounds, "awake": awake, "rows": rows})
    stolen = share(before, ticks())
    for table in tables:
        table |= {"stolen": round(stolen, 3), "repeated": bench.repeated}
    print(f"\nof the processors' time, {stolen:.0%} went to other machines of this host", end="")
    print(f", for which {bench.repeated} measurements were made again" if bench.repeated else "")
    return tables


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--label")
    parser.add_argument("--update", action="store_true")
    for name in ("--work", "--disk", "--repo", "--programs", "--rublk"):
        parser.add_argument(name, required=True)
    parser.add_argument("components", nargs="+")
    args = parser.parse_args()
    bench = Bench(args)
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": code(bench.repo),
        "quick": args.quick,
        "machine": described() | {"files_on": run("stat", "-f", "-c", "%T", bench.work).strip()},
        "peers": peers(),
        "components": {},
    }
    out = bench.repo / "docs/bench" / f"{args.label or ('quick' if args.quick else 'latest')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        # Components that are not run now keep their figures, if they are of the same code. The machine is as it was before
        # the last one.
        before = json.loads(out.read_text())
        if before["commit"] == result["commit"] and not result["commit"].endswith("-dirty"):
            result["components"] = before["components"]
    with processors_awake() as awake:
        print(f"the processors {'stay awake' if awake else 'may sleep: what takes milliseconds is told better as root'}")
        for name in args.components:
            result["components"][name] = measured(bench, name, awake)
            out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten to {out.relative_to(bench.repo)}")
    picture = out.with_suffix(".svg")
    if plot.draw(result, picture):
        print(f"drawn in {picture.relative_to(bench.repo)}")
    if bench.failed:
        raise SystemExit(f"bench: {'; '.join(bench.failed)}")


main()
