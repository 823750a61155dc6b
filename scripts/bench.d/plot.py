#!/usr/bin/env python3
"""Draws the headline figures of a run as SVG: plain shapes, readable on light and on dark.

By itself: plot.py FILE.json draws FILE.svg anew."""

import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP = 400, 320, 24
# Inside a panel: where its axes are.
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 72, 48
OURS, PEERS = "#2f81f7", ("#d2822a", "#3fa45b", "#a371c9")
TEXT, LINES = "#7d8590", "#7d859055"


class Panel:
    """Axes with a scale from 0 to `top`, and what is drawn on them."""

    def __init__(self, title, subtitle, top):
        self.shapes, self.top = [], nice(top)
        self.width, self.height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        self.text(0, 16, title, size=15, weight="600")
        self.text(0, 34, subtitle, size=11)
        for part in range(5):
            value = self.top * part / 4
            self.shapes.append(f'<path d="M{LEFT} {self.y(value):.1f}h{self.width}" stroke="{LINES}"/>')
            self.text(LEFT - 6, self.y(value) + 4, f"{value:g}", anchor="end")

    def y(self, value):
        return TOP + self.height * (1 - value / self.top)

    def text(self, x, y, words, anchor="start", size=11, weight="400", fill=TEXT):
        self.shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill="{fill}">{escape(words)}</text>')

    def legend(self, names):
        x = 0
        for name, colour in names:
            self.shapes.append(f'<rect x="{x}" y="44" width="10" height="10" rx="2" fill="{colour}"/>')
            self.text(x + 14, 53, name)
            x += 14 + 6.2 * len(name) + 14

    def limit(self, value):
        """A line to compare with, across all of it."""
        self.shapes.append(f'<path d="M{LEFT} {self.y(value):.1f}h{self.width}" stroke="{TEXT}" stroke-dasharray="4 3"/>')

    def bars(self, groups):
        """[(name, [(value, colour)])], side by side."""
        step = self.width / len(groups)
        for number, (name, values) in enumerate(groups):
            each = min(22, step * 0.8 / len(values))
            start = LEFT + step * (number + 0.5) - each * len(values) / 2
            for place, (value, colour) in enumerate(values):
                x, y = start + each * place, self.y(min(value, self.top))
                self.shapes.append(f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{each - 2:.1f}" height="{self.y(0) - y:.1f}" '
                                   f'rx="1.5" fill="{colour}"/>')
                self.text(x + each / 2, y - 3, f"{value:.1f}" if value < 10 else f"{value:.0f}", anchor="middle", size=9)
            for line, words in enumerate(name.split("\n")):
                self.text(LEFT + step * (number + 0.5), TOP + self.height + 15 + 13 * line, words, anchor="middle", size=10)

    def line(self, points, most_x, colour, dashed=False):
        """[(x, y)], x from 0."""
        at = [(LEFT + self.width * x / most_x, self.y(y)) for x, y in points]
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in at)}" fill="none" stroke="{colour}" '
                           f'stroke-width="2"{dash}/>')
        if not dashed:
            self.shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in at]

    def ticks(self, values, most_x, words):
        for value in values:
            self.text(LEFT + self.width * value / most_x, TOP + self.height + 15, f"{value:g}", anchor="middle", size=10)
        self.text(LEFT + self.width / 2, TOP + self.height + 32, words, anchor="middle")


def nice(top):
    """A round number that is not below."""
    unit = 10 ** math.floor(math.log10(top))
    return next(step * unit for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * unit >= top)


def hydration(tables):
    rows = [row for row in tables[0]["rows"] if row["Mbit/s"] == 1000]
    series = [("blkferry", "blkferry s", OURS), ("nbdcopy", "nbdcopy s", PEERS[0])]
    floor = rows[0]["MiB"] * (1 << 20) * 8 / 1e9
    most_x = max(row["RTT ms"] for row in rows) or 1
    panel = Panel("Until the source may go", f"{rows[0]['MiB']} MiB over 1 Gbit/s, seconds; dashed: the link itself",
                  max(row[key] for row in rows for _, key, _ in series) * 1.05)
    panel.legend([(name, colour) for name, _, colour in series])
    panel.line([(0, floor), (most_x, floor)], most_x, TEXT, dashed=True)
    for _, key, colour in reversed(series):
        panel.line([(row["RTT ms"], row[key]) for row in rows], most_x, colour)
    panel.ticks([row["RTT ms"] for row in rows], most_x, "round trip, ms")
    return panel


def demand(tables):
    rows = [row for row in tables[0]["rows"] if row["in between"] != "nothing"]
    panel = Panel("A read of what is not here", "4 KiB at random over 1 Gbit/s, in round trips; dashed: one, the least",
                  max(row["p99 / RTT"] for row in rows) * 1.1)
    panel.legend([("median", OURS), ("99th percentile", PEERS[0])])
    panel.bars([
        (f"{row['RTT ms']} ms,\n{'hydrating' if 'hydrating' in row['in between'] else 'alone'}",
         [(row["p50 / RTT"], OURS), (row["p99 / RTT"], PEERS[0])]) for row in rows
    ])
    panel.limit(1)
    return panel


def local(tables):
    rows = tables[0]["rows"]
    peers = [key for key in rows[0] if key.startswith("÷ ")]
    panel = Panel("All is here", "requests a second on a unix socket, ÷ the other; dashed: 1",
                  max(row[key] for row in rows for key in peers) * 1.05)
    panel.legend([(key, colour) for key, colour in zip(peers, PEERS)])
    panel.bars([
        (row[""].replace(" QD", "\nQD").replace(" ", "\u00a0"), [(row[key], colour) for key, colour in zip(peers, PEERS)])
        for row in rows
    ])
    panel.limit(1)
    return panel


PANELS = {"hydrate": hydration, "demand": demand, "local": local}


def draw(result, path):
    """Draws what there is of it; nothing, if nothing is."""
    panels = [make(result["components"][name]) for name, make in PANELS.items() if result["components"].get(name)]
    if not panels:
        return False
    width = len(panels) * (WIDTH + GAP) - GAP + 16
    body = "".join(
        f'<g transform="translate({8 + number * (WIDTH + GAP)} 8)">{"".join(panel.shapes)}</g>\n'
        for number, panel in enumerate(panels))
    rounds = sorted({table["rounds"] for name in PANELS for table in result["components"].get(name, [])})
    rounds = " to ".join(str(number) for number in sorted({rounds[0], rounds[-1]}))
    note = f"{result['date']}, {result['commit']}, {result['machine']['cpus']} CPUs, rounds: {rounds}, medians"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 32}" width="{width}" '
        f'font-family="system-ui, sans-serif">\n{body}'
        f'<text x="8" y="{HEIGHT + 24}" font-size="10" fill="{TEXT}">{escape(note)}</text>\n</svg>\n')
    return True


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".svg"))
