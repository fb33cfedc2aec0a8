"""The exam over the steps of training: a panel a sweep, a line a strategy, mean and range of seeds.

    python tests/curves.py runs/curves.svg runs/plain runs/strategies

Reads the sweeps' results and, beside each of their models, its log.jsonl. Draws curves.svg and
writes the points to curves.json, which draws the same picture without the models: `python
tests/curves.py runs/curves.svg runs/curves.json`. Prints when each strategy left the plateau: the
step of the first exam at least three points above what guessing by frequency alone has right.
"""
import argparse
import html
import json
import sys
from pathlib import Path

import numpy as np

RISE = 0.03  # above frequency alone: the plateau is left
COLOURS = ("#818b98", "#218bff", "#fa4549", "#2da44e", "#e85aad", "#bf8700", "#1b9aaa", "#a475f9",
           "#e16f24", "#6fdd8b", "#b08800", "#54aeff")  # the first is for `random`
WIDTH, HEIGHT = 380, 300  # of a panel's axes, in pixels
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" \
viewBox="0 0 {0} {1}" role="img">
<title>Accuracy of the held-out exam over the steps of training</title>
<style>
svg {{ --page: #fff; --ink: #1f2328; --grid: #d1d9e0 }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #0d1117; --ink: #e6edf3; --grid: #30363d }} }}
text {{ font: 12px sans-serif; fill: var(--ink) }} .title {{ font-weight: bold; font-size: 13px }}
.right {{ text-anchor: end }} .middle {{ text-anchor: middle }} .grid {{ stroke: var(--grid) }}
.frequency {{ stroke: var(--ink); stroke-dasharray: 4 3 }} .mean {{ fill: none; stroke-width: 2 }}
.range {{ opacity: 0.16 }}
</style>
<rect width="100%" height="100%" style="fill: var(--page)"/>"""


def read_panel(path: Path) -> dict:
    """{"frequency": accuracy, "curves": {strategy: {seed: [[step, accuracy], ...]}}} of a sweep."""
    curves, frequency = {}, 0.0
    for file in sorted(path.glob("mlm--*.json")):
        run = json.loads(file.read_text())
        frequency = run["baseline"]["accuracy"]
        log = Path(run["model"], "log.jsonl").read_text().splitlines()
        points = {line["step"]: line["exam"]["accuracy"] for line in map(json.loads, log)
                  if "exam" in line}
        points[run["args"]["steps"]] = run["last"]["accuracy"]
        curves.setdefault(run["strategy"], {})[run["seed"]] = sorted(points.items())
    if not curves:
        sys.exit(f"curves.py: {path} holds no exams: python stats.py sweep --tasks mlm makes them")
    return {"frequency": frequency, "curves": curves}


def left_plateau(points: list, frequency: float) -> int | None:
    """The step of the first exam that is RISE above frequency alone."""
    return next((step for step, accuracy in points if accuracy >= frequency + RISE), None)


def draw(panels: dict[str, dict]) -> str:
    """The panels side by side, on one scale."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel["curves"]))
    names.sort(key=lambda name: name != "random")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    every = [point for panel in panels.values() for seeds in panel["curves"].values()
             for points in seeds.values() for point in points]
    last, top = (max(column) for column in zip(*every))
    drawn, left = [], 56

    def text(x, y, kind, words, colour=""):
        style = f' style="fill: {colour}"' if colour else ""
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{style}>{html.escape(words)}'
                     "</text>")

    def line(x, y, to_x, to_y, kind):
        drawn.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" '
                     f'class="{kind}"/>')

    for title, panel in panels.items():
        def pixels(steps, accuracies):
            return [f"{left + WIDTH * step / last:.1f},{40 + HEIGHT * (1 - accuracy / top):.1f}"
                    for step, accuracy in zip(steps, accuracies)]

        text(left, 24, "title", f"{title}: share of hidden tokens guessed, by step")
        unit = 0.05 if top > 0.12 else 0.02
        for i in range(int(top / unit) + 1):
            y = 40 + HEIGHT * (1 - i * unit / top)
            line(left, y, left + WIDTH, y, "grid")
            text(left - 8, y + 4, "right", f"{i * unit:.0%}")
        for i in range(0, 5):
            text(left + WIDTH * i / 4, 58 + HEIGHT, "middle", f"{last * i / 4:,.0f}")
        y = 40 + HEIGHT * (1 - panel["frequency"] / top)
        line(left, y, left + WIDTH, y, "frequency")
        text(left + WIDTH - 4, y + 14, "right", "frequency alone")
        ends = []
        for name, seeds in panel["curves"].items():
            steps = sorted(set.intersection(*(set(dict(points)) for points in seeds.values())))
            table = np.array([[dict(points)[step] for step in steps] for points in seeds.values()])
            low, high, mean = table.min(0), table.max(0), table.mean(0)
            around = pixels(steps, high) + pixels(steps, low)[::-1]
            drawn.append(f'<polygon points="{" ".join(around)}" class="range" '
                         f'style="fill: {colours[name]}"/>')
            drawn.append(f'<polyline points="{" ".join(pixels(steps, mean))}" class="mean" '
                         f'style="stroke: {colours[name]}"/>')
            ends.append((40 + HEIGHT * (1 - mean[-1] / top), name))
        y = 56.0 + HEIGHT
        for end, name in sorted(ends, reverse=True):  # at its line's end, or above the one below
            y = min(end + 4, y - 15)
            text(left + WIDTH + 8, y, "", name, colours[name])
        left += WIDTH + 170
    return "\n".join([HEAD.format(left - 56, HEIGHT + 90), *drawn, "</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description="Draw the exam over the steps of training.")
    parser.add_argument("picture", type=Path, help="the .svg to write; the points go beside it")
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of results, or one .json")
    args = parser.parse_args()
    if args.sweeps[0].suffix == ".json":
        panels = json.loads(args.sweeps[0].read_text())
    else:
        panels = {path.name: read_panel(path) for path in args.sweeps}
        if len(panels) < len(args.sweeps):
            sys.exit("curves.py: a folder's name is its panel's title: give each another name")
        args.picture.with_suffix(".json").write_text(json.dumps(panels) + "\n")
    args.picture.write_text(draw(panels))
    for title, panel in panels.items():
        print(f"{title}: frequency alone {panel['frequency']:.2%}; plateau left at step")
        for name, seeds in panel["curves"].items():
            found = [left_plateau(points, panel["frequency"]) for points in seeds.values()]
            print(f"  {name:14}", *("never" if step is None else f"{step:,}" for step in found))


if __name__ == "__main__":
    main()
