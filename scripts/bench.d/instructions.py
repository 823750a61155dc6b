"""How many instructions the engine's hot paths take, beside a committed baseline. Nothing is timed: the counts are the
same on a busy machine. By itself it is the check of scripts/test."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

BASELINE = "docs/bench/instructions.json"
# A hash map's keys are drawn anew in each process, which moves a count by a few tenths of a per cent.
TOLERANCE_PERCENT = 4
# As they are called in examples/hot_paths.rs.
NAMES = {
    "path_hit_4k": "hit look-up, 4 KiB", "path_hit_128k": "hit look-up, 128 KiB",
    "path_miss": "miss of 4 KiB, from request to answer and stored",
    "path_hydrated_mib": "hydration of 1 MiB (256 blocks), from plan to present",
    "path_write_absent": "write of 4 KiB to an absent block", "path_flush_clean": "flush with nothing to commit",
    "path_ahead_stream": "look ahead of a stream, and what it brings (64 KiB)", "path_ahead_anywhere": "look ahead of reads anywhere",
}


def output(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"instructions: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def count(programs):
    """Instructions of each path, for each time that it is done."""
    program = programs / "examples/hot_paths"
    counts = {}
    for line in output(program).splitlines():
        path, times = line.split()
        said = output("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect=*{path}*", program, path)
        counts[path] = int(re.search(r"Collected\s*:\s*(\d+)", said).group(1)) / int(times)
        if counts[path] < 1:
            raise SystemExit(f"instructions: {path} was not found in {program}")
    return counts


def compiler(repo):
    """The one that the repository is built with."""
    return subprocess.run(["rustc", "-V"], cwd=repo, capture_output=True, text=True, check=True).stdout.strip()


def compare(programs, repo, update=False):
    """A row for each path; whether all is well; what was not compared, if anything."""
    counts, rustc = count(programs), compiler(repo)
    path = repo / BASELINE
    if update:
        figures = {name: round(value, 1) for name, value in counts.items()}
        path.write_text(json.dumps({"rustc": rustc, "tolerance_percent": TOLERANCE_PERCENT, "instructions": figures}, indent=1) + "\n")
    before = json.loads(path.read_text()) if path.exists() else {"rustc": "no compiler", "instructions": {}}
    comparable = before["rustc"] == rustc
    skipped = None if comparable else f"NOTHING WAS COMPARED: the baseline is of {before['rustc']}, this is {rustc}; make a new one with --update"
    rows, well = [], True
    for name, value in counts.items():
        old = before["instructions"].get(name) if comparable else None
        change = 100 * (value / old - 1) if old else None
        within = change is None or change <= TOLERANCE_PERCENT
        if comparable and old is None:
            within, skipped = False, f"{name} is not in the baseline; --update puts it there"
        well = well and within
        rows.append({
            "path": NAMES.get(name, name), "instructions": value, "baseline": old,
            "change": "–" if change is None else f"{change:+.1f} %", "met": "yes" if within else "no",
        })
    return rows, well, skipped


def tables(bench):
    rows, well, skipped = compare(bench.programs, bench.repo, bench.update)
    yield (
        "instructions of the engine alone, by callgrind, for each time that a path is gone; wanted: at most "
        f"{TOLERANCE_PERCENT} % above {BASELINE}", rows,
    )
    if skipped:
        yield skipped, []
    if not well:
        bench.failed.append("instructions: more than the baseline")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", required=True, type=Path)
    parser.add_argument("--repo", required=True, type=Path)
    args = parser.parse_args()
    rows, well, skipped = compare(args.programs, args.repo)
    for row in rows:
        print(f"{row['path']:55} {row['instructions']:10.1f} {row['change']:>9}  {'' if row['met'] == 'yes' else 'TOO MANY'}")
    if skipped:
        print(f"instructions: {skipped}", file=sys.stderr)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
