"""The five claims in one figure: four small pictures, each with the numbers that its verdict stands on."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samantics.metrics.claims import findings, lift, pipeline_setting
from samantics.metrics.intervals import Interval
from samantics.plots import COLOURS, LABELS

PANELS = {  # claims of a panel: its question, unit and table
    "C1": ("Do features tell\nclasses apart?", "linear probe, top-1 %", "01_zoos.csv"),
    "C2": ("Can SAM be taught\na class by example?", "box AP", "02_icl_ap.csv"),
    "C3, C4": ("Where is class structure,\nand for whom?", "kNN over shuffled, points", "02_separability.csv"),
    "C5": ("Can another model\nlend its meaning?", "mask AP, no training", "03_pipeline_ap.csv"),
}
REFERENCES = {"wrong_reference": "wrong\nclass", "random_reference": "random"}


def summary_table(figures: Path) -> pd.DataFrame:
    """What the figure shows: ``claims,bar,value,low,high,colour``, for the tables that the run has."""
    parts = {"C1": _probes, "C2": _incontext, "C3, C4": _stages, "C5": _sources}
    rows = []
    for claims, (_, _, table) in PANELS.items():
        if (figures / table).is_file():
            bars = parts[claims](pd.read_csv(figures / table))
            rows += [{"claims": claims, "bar": bar, **value._asdict(), "colour": colour} for bar, value, colour in bars]
    return pd.DataFrame(rows, columns=["claims", "bar", "value", "low", "high", "colour"])


def summary_figure(figures: Path) -> tuple[Figure, pd.DataFrame]:
    """The figure and its numbers; a panel without its table says so."""
    table, verdicts = summary_table(figures), findings(figures).set_index("claim")["verdict"]
    fig, panels = plt.subplots(1, len(PANELS), figsize=(11.0, 3.9), width_ratios=[1.3, 1, 1, 1.3])
    for axes, (claims, (question, unit, _)) in zip(panels, PANELS.items(), strict=True):
        _draw(axes, table[table["claims"] == claims], unit)
        said = "\n".join(f"{name}: {verdicts[name]}" for name in claims.split(", "))
        axes.set_title(question, fontsize=11)
        axes.text(0, -0.2, said, transform=axes.transAxes, fontsize=10, va="top", fontweight="bold")
    return fig, table


def _draw(axes: Axes, bars: pd.DataFrame, unit: str) -> None:
    axes.set_ylabel(unit, fontsize=10)
    axes.grid(visible=False, axis="x")
    if bars.empty:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#5A5A5A")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    middle = bars["value"].to_numpy(float)
    ends = np.abs(bars[["low", "high"]].to_numpy(float).T - middle)
    places = np.arange(len(bars))
    axes.bar(places, middle, color=bars["colour"], width=0.7, yerr=ends, ecolor="#333333", error_kw={"elinewidth": 1.2})
    for place, value, high in zip(places, middle, bars["high"], strict=True):
        said = f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"
        axes.annotate(said, (place, max(high, 0)), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(places, bars["bar"].tolist(), fontsize=8)
    axes.margins(y=0.14)


Bars = list[tuple[str, Interval, str]]


def _probes(table: pd.DataFrame) -> Bars:
    rows = table[(table["labels"] == "drawing") & (table["probe"] == "linear") & (table["layer"] == "final")]
    return [
        (LABELS[row["encoder"]], Interval(row["top1"], row["top1_low"], row["top1_high"]), COLOURS[row["encoder"]])
        for row in rows.drop_duplicates("encoder").to_dict("records")
        if row["encoder"] in COLOURS
    ]


def _incontext(table: pd.DataFrame) -> Bars:
    rows = table[(table["shots"] == table["shots"].max()) & (table["iou_type"] == "bbox")]
    bars: Bars = []
    for row in rows.to_dict("records"):
        value = Interval(row["AP"], row["low"], row["high"])
        if row["variant"] == "class_oracle":
            bars.append((row["split"], value, COLOURS[row["split"]]))
        elif row["variant"] in REFERENCES and row["split"] == "base":
            bars.append((REFERENCES[row["variant"]], value, COLOURS["random"]))
    return bars


def _stages(table: pd.DataFrame) -> Bars:
    return [
        (f"{split}\n{stage}", lift(table, stage, split, "knn").times(100), COLOURS[split])
        for split in ("base", "novel")
        for stage in ("before", "after")
    ]


def _sources(table: pd.DataFrame) -> Bars:
    rows, _ = pipeline_setting(table)
    by_name = {row["source"]: row for row in rows.to_dict("records")}
    return [
        (LABELS[name], Interval(by_name[name]["AP"], by_name[name]["low"], by_name[name]["high"]), COLOURS[name])
        for name in ("sam", "sam2", "clip", "dinov2", "random")
        if name in by_name
    ]
