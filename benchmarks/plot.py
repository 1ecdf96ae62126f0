"""Draws a report of `benchmarks.cuda`: microseconds a call against tokens, beside FlashMLA, plain XLA and the roofline.

    python -m benchmarks.plot                     # README's figure, from the committed report
    python -m benchmarks.plot report.json figure.svg

Needs matplotlib (`pip install -e ".[plot]"`). The same report gives the same file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.measure import new_file, run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
REPORT, FIGURE = ROOT / "benchmarks/results/hopper-h200-mixes.json", ROOT / "docs/hopper-h200.svg"
EXTRA = 512
TICKS = (1, 8, 64, 256)
LABEL_GAP = 1.85  # times the label below
# From below. Okabe and Ito's colours, which differ for colour-blind eyes too; markers differ as well.
LINES = {
    "roofline": dict(color="#767676", linestyle=(0, (4, 2)), linewidth=1.3),
    "jax-dsv4": dict(color="#000000", marker="o", markersize=5, linewidth=2.2),
    "FlashMLA": dict(color="#0072B2", marker="s", markersize=4.5, linewidth=1.4),
    "plain XLA": dict(color="#D55E00", marker="^", markersize=5, linewidth=1.4),
}
NAMES = {"jax-dsv4": "ours", "FlashMLA": "flashmla", "plain XLA": "xla"}  # in the report


def draw(axis: Any, rows: list[dict[str, Any]], labelled: bool) -> None:
    height = 0.0
    for label, style in LINES.items():
        times = [(r["tokens"], (r["us"] | {"roofline": r["floor_us"]}).get(NAMES.get(label, label))) for r in rows]
        points = [(tokens, us) for tokens, us in times if us is not None]
        if not points:
            continue
        axis.plot(*zip(*points), **style)
        height = max(points[-1][1], height * LABEL_GAP)
        if labelled:
            axis.annotate(label, (points[-1][0] * 1.25, height), color=style["color"], va="center", annotation_clip=False)
    title = f"{rows[0]['heads']} heads" + " (FlashMLA: 64)" * (rows[0]["heads"] < 64)
    axis.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylim=(0.12, 1500))
    axis.set_xticks(TICKS, labels=map(str, TICKS))
    axis.minorticks_off()
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", default=REPORT, help="what benchmarks.cuda --json wrote")
    parser.add_argument("figure", type=new_file, nargs="?", default=FIGURE, help="the file to draw")
    arguments = parser.parse_args(argv)
    try:
        report = json.loads(arguments.report.read_text())
        rows = [r for r in report["results"] if r["extra"] == EXTRA and not r.get("mix")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{arguments.report} is no report of benchmarks.cuda: {type(error).__name__}: {error}")
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "svg.hashsalt": "", "xtick.direction": "in", "ytick.direction": "in"})
    heads = sorted({r["heads"] for r in rows})
    figure, axes = plt.subplots(1, len(heads), figsize=(9.2, 3.7), sharey=True, layout="constrained", squeeze=False)
    for axis, n in zip(axes[0], heads):
        draw(axis, [r for r in rows if r["heads"] == n], labelled=n == heads[-1])
    axes[0, 0].set_ylabel("µs a call")
    axes[0, 0].set_yticks((1, 10, 100, 1000), labels=("1", "10", "100", "1000"))
    figure.suptitle(f"{report['device']}, 128+{EXTRA} keys, plan reused", fontsize=11, color="#444444")
    figure.savefig(arguments.figure, metadata={"Date": None})


if __name__ == "__main__":
    run(main)
