"""Every claim of speed, measured again: the study's code side by side with what it replaces.

    .venv/bin/python tests/bench/speed.py                   # about 12 minutes on two quiet cores
    .venv/bin/python tests/bench/speed.py --photo FILE      # proposals on your own photograph
    .venv/bin/python tests/bench/speed.py --quick           # a rehearsal of a minute; leaves its files in .cache/bench

The two sides of a comparison take turns (A B A B ...), and each turn gives one ratio. Leaves speed.csv, roofline.csv
and their figures in figures/bench.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import bench_loops
import bench_probing
import bench_proposals
import bench_roofline
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from measuring import bench_run, made_photo, timed
from PIL import Image

from samantics import plots as figures
from samantics.models.encoder import load_encoder

Sample = dict[str, float]  # of one turn of one side: seconds (wall, processor) and memory (GiB)
POINTS = 32  # along a photograph's side: the default of SAM's own generator
UNITS = {"wall": "s", "processor": "s", "memory": "GiB"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What we do and what it replaces.

    Attributes:
        name: of the work.
        case: which of several of one name.
        against: what the other side is.
        ours, other: one turn.
        turns: of each side.
        aims: least ratio, by quantity, where the project promised one.
    """

    name: str
    case: str
    against: str
    ours: Callable[[], Sample]
    other: Callable[[], Sample]
    turns: int = 3
    aims: dict[str, float] = dataclasses.field(default_factory=dict)


def clocked(work: Callable[..., Any], *arguments: Any) -> Callable[[], Sample]:
    """A turn in this process: seconds only, as the peak of memory never goes down again."""
    return lambda: dict(zip(("wall", "processor"), timed(work, *arguments), strict=True))


# ---------------------------------------------------------------------------------------------------- comparisons


def probing(quick: bool) -> Iterator[Comparison]:
    data, epochs = bench_probing.pictures(16 if quick else 320), 10
    for name in bench_probing.POCKET[: 1 if quick else None]:
        encoder = load_encoder(name, "zoo_random")
        encoder.encode(torch.zeros(8, 3, encoder.image_size, encoder.image_size))  # what is set up once
        ours = clocked(bench_probing.from_store, encoder, data, epochs)
        other = clocked(bench_probing.re_encoding, encoder, data, epochs)
        case = figures.LABELS[name]
        yield Comparison("probe, 10 epochs", case, "images encoded in every epoch", ours, other, aims={"wall": 8.0})


def proposals(quick: bool, photo: str | None) -> Iterator[Comparison]:
    """One comparison, whose samples tell the seconds without image encoding too."""
    picture = Image.open(photo).convert("RGB") if photo else made_photo()
    points, threads = 3 if quick else POINTS, torch.get_num_threads()
    limits = bench_proposals.thresholds(picture)
    masks: dict[str, int] = {}

    def turn(side: str) -> Sample:
        row = bench_proposals.one_side(side, photo, points, threads, limits)
        masks[side], sample = row["masks"], {"memory": row["peak_gib"]}
        for clock, name in enumerate(("wall", "processor")):
            sample[name] = row["whole"][clock]
            sample[f"{name}, masks only"] = row["whole"][clock] - row["encode"][clock]
        return sample

    ours, other = (functools.partial(turn, side) for side in bench_proposals.SIDES)
    against, aims = "SamAutomaticMaskGenerator", {"wall": 3.0, "memory": 1.0}
    yield Comparison("mask proposals", f"ViT-B, {points}² points", against, ours, other, 1 if quick else 3, aims)
    if max(masks.values()) - min(masks.values()) > max(1, 0.01 * masks["package"]):
        raise SystemExit(f"mask proposals: the sides found other numbers of masks, {masks}")


LOOPS = {
    "linear": ("linear probe, 6 rates", "one training for each rate"),
    "neighbours": ("nearest neighbours", "scikit-learn, brute force"),
    "pooling": ("features of masks", "map resized to the image"),
    "encoding": ("run lengths of masks", "segment_anything's, in Python"),
    "merging": ("soft merging of masks", "pixels, pair by pair"),
}
ISOLATED = ("pooling",)  # its memory is a claim too


def loops(quick: bool) -> Iterator[Comparison]:
    sizes = bench_loops.QUICK if quick else bench_loops.SIZES
    for name, (title, against) in LOOPS.items():
        isolated = name in ISOLATED
        pair = bench_loops.PAIRS[name](bench_loops.QUICK[name] if isolated else sizes[name])
        equal = pair.agreement(pair.ours(), pair.plain())  # which also sets up what is set up once
        if equal < 0.9:
            raise SystemExit(f"{title}: only {equal:.0%} of the results are equal, so a ratio means nothing")
        if isolated:
            sides = [functools.partial(bench_loops.one_side, name, side, sizes[name]) for side in bench_loops.SIDES]
        else:
            sides = [clocked(pair.ours), clocked(pair.plain)]
        yield Comparison(title, "", against, *sides, turns=2 if quick else 3 if name == "linear" else 5)


def table_of(comparison: Comparison) -> pd.DataFrame:
    """Measure: one row for each quantity, with the ratio of every turn summed up."""
    turns = [(comparison.ours(), comparison.other()) for _ in range(comparison.turns)]
    rows = []
    for quantity in turns[0][0]:
        ours, other = (np.array([turn[side][quantity] for turn in turns]) for side in (0, 1))
        ratio = other / ours
        kind, _, part = quantity.partition(", ")
        rows.append(
            {
                "comparison": comparison.name,
                "case": ", ".join(filter(None, (comparison.case, part))),
                "against": comparison.against,
                "quantity": kind,
                "unit": UNITS[kind],
                "ours": np.median(ours),
                "other": np.median(other),
                "ratio": np.median(ratio),
                "low": ratio.min(),
                "high": ratio.max(),
                "turns": comparison.turns,
                "aim": comparison.aims.get(quantity, np.nan),
            }
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ the figure

MARKS = {  # quantity: mark, colour, label
    "wall": ("o", "#0072B2", "time"),
    "processor": ("D", "#E69F00", "processor time"),
    "memory": ("s", "#009E73", "peak memory"),
}


def speed_figure(table: pd.DataFrame) -> Figure:
    """How many times less time and memory; bars reach from the least ratio of a turn to the greatest."""
    names = list(dict.fromkeys(zip(table["comparison"], table["case"], table["against"], strict=True)))
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.52 * len(names)))
    for row in table.to_dict("records"):
        mark, colour, _ = MARKS[row["quantity"]]
        place = names.index((row["comparison"], row["case"], row["against"]))
        place += 0.24 * (list(MARKS).index(row["quantity"]) - 1)
        spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        axis.errorbar(row["ratio"], place, xerr=spread, fmt=mark, color=colour, markersize=6)
        if row["quantity"] == "wall":
            number = f"  {row['ratio']:.0f}×" if row["ratio"] >= 10 else f"  {row['ratio']:.1f}×"
            axis.text(row["high"], place, number, va="center", fontsize=9, color=colour)
        if np.isfinite(row["aim"]):
            axis.plot(row["aim"], place, "|", color="#222222", markersize=13, markeredgewidth=2.5, zorder=5)
    _times_axis(axis)
    labels = [f"{name}{f' ({case})' if case else ''}\nagainst {against}" for name, case, against in names]
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.6)
    for mark, colour, label in MARKS.values():
        axis.plot([], [], mark, color=colour, label=label)
    axis.plot([], [], "|", color="#222222", markersize=13, markeredgewidth=2.5, label="promised at least")
    figure.legend(loc="outside lower center", ncols=4, fontsize=10)
    wall = table[table["quantity"] == "wall"]
    less = int((wall["low"] > 1).sum())
    figures.headline(
        figure, f"The study's code needs less time than what it replaces in {less} of {len(wall)} comparisons"
    )
    return figure


def _times_axis(axis: Axes) -> None:
    """Ratios on a logarithmic scale, with a line where both sides are equal."""
    axis.axvline(1, color=figures.COLOURS["chance"], linewidth=1.5)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, 1.3 * high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= 1.3 * high]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("how many times less the study's code needs: median, least and greatest of all turns")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", help="photograph for the proposals (default: a picture made for the purpose)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    run = bench_run("speed", options.quick, Image.open(options.photo).convert("RGB") if options.photo else made_photo())
    parts = []
    for comparisons in (
        probing(options.quick), proposals(options.quick, options.photo), loops(options.quick)
    ):  # fmt: skip
        for comparison in comparisons:
            parts.append(table_of(comparison))
            print(
                parts[-1].drop(columns=["unit", "against"]).to_string(index=False, header=len(parts) == 1), flush=True
            )
    table, limits = pd.concat(parts, ignore_index=True), bench_roofline.measure(options.quick)
    print(limits.iloc[:, :11].to_string(index=False))
    figures.style()
    caption = "How many times less time and memory the study's code needs than what it replaces, turn by turn."
    figures.save_figure(run, speed_figure(table), table, "speed", caption)
    caption = "Share of the machine's peak that each encoder reaches, and hours for ImageNet-1k on one GPU."
    figures.save_figure(run, bench_roofline.roofline_figure(limits), limits, "roofline", caption)
    print(run.figures / "speed.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
