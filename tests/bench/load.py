"""Does memory stay flat and time linear? Long workloads in processes of their own, watched from outside.

    .venv/bin/python tests/bench/load.py            # at most 15 minutes on two quiet cores
    .venv/bin/python tests/bench/load.py --quick    # a rehearsal of a minute; leaves its files in .cache/bench

Extraction of 10,000 images; 2,000 scenes through the training-free pipeline, as notebook 03 has it; probes of stores up
to ImageNet's size. Leaves load.csv (all samples), load_summary.csv and load.png in figures/bench.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
from bench_probing import IMAGENET, Noise, extraction, solver
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from measuring import bench_run, peak_gib

from samantics import plots as figures
from samantics.cache import write_json
from samantics.run import start_run
from samantics.training_free import matching, pipeline, proposals

EVERY = 0.2  # seconds between two looks
GRID = 4  # points along a scene's side: 16 prompts instead of 144, so that 2,000 scenes take minutes on busy cores too
SAMPLES = 150  # of each workload's, in the table and the figure
GROWTH = ["rss_growth", "peak_growth"]
PROBE_GIB = 3.0  # limit for a store of ImageNet's size


# ------------------------------------------------------------------------------------------------- the workloads


@dataclasses.dataclass
class Counter:
    """Items done, told to whoever watches: a file that grows by one byte for each."""

    path: Path

    def __post_init__(self) -> None:
        self.file = self.path.open("ab", buffering=0)

    def after(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        @functools.wraps(work)
        def counted(*arguments: Any, **options: Any) -> Any:
            result = work(*arguments, **options)
            self.file.write(b".")
            return result

        return counted


def extract(items: int, folder: Path) -> None:
    with mock.patch.object(Noise, "__getitem__", Counter(folder / "images.count").after(Noise.__getitem__)):
        extraction(items)


def training_free(items: int, folder: Path) -> None:
    """Notebook 03's headline: proposals of all scenes, features of their masks, matching, a COCO result file."""
    run = start_run("pocket", "load")
    settings = dataclasses.replace(run.scale.pipeline, target_scenes=items, points_per_side=GRID)
    run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, pipeline=settings), cache=folder)
    job = pipeline.start(run)
    job.bank("dinov2", settings.shots)  # its features are references', not scenes'
    with contextlib.ExitStack() as stack:
        for module, name, stage in (
            (proposals, "propose", "proposals"),
            (matching, "read_image", "features"),
            (pipeline, "match", "matching"),
        ):
            counted = Counter(folder / f"{stage}.count").after(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, counted))
        write_json(folder / "results.json", job.predict(pipeline.Variant()))


def probe(items: int, folder: Path) -> None:
    solver(items, epochs=1, device="cpu", folder=folder)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is watched.

    Attributes:
        items: of each run; a run of several sizes is drawn as points, of one size as a course.
        stages: names of its counters.
        quick: items in a rehearsal.
    """

    name: str
    title: str
    unit: str
    work: Callable[[int, Path], None]
    items: tuple[int, ...]
    quick: tuple[int, ...]
    stages: tuple[str, ...]


WORKLOADS = (
    Workload("extraction", "extraction of features", "images", extract, (10_000,), (600,), ("images",)),
    Workload(
        "pipeline",
        "training-free pipeline",
        "scenes",
        training_free,
        (2_000,),
        (40,),
        ("proposals", "features", "matching"),
    ),
    Workload(
        "probe",
        "probes of stores, 768 wide",
        "images",
        probe,
        tuple(IMAGENET // part for part in (10, 3, 1)),
        (4_000, 8_000, 16_000),
        (),
    ),
)


# ------------------------------------------------------------------------------------------------------ watching


def watched(workload: Workload, items: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """``seconds, rss, anonymous`` (GiB) and the count of every stage, over the time of one run; what it printed."""
    with tempfile.TemporaryDirectory(prefix="samantics_load_") as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--work", workload.name, "--items", str(items), "--folder", name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        rows = list(_looks(process, workload, folder))
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{workload.name} of {items} {workload.unit} failed")
    return pd.DataFrame(rows), [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def _looks(process: subprocess.Popen[str], workload: Workload, folder: Path) -> Iterator[dict[str, float]]:
    started, watched_process = time.perf_counter(), psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError, ValueError, IndexError):  # it may end while it is looked at
            memory = watched_process.memory_info()
            counts = {stage: _size(folder / f"{stage}.count") for stage in workload.stages}
            yield {
                "seconds": time.perf_counter() - started,
                "rss": memory.rss / 2**30,
                "anonymous": (memory.rss - memory.shared) / 2**30,
                "peak": peak_gib(process.pid),
                **counts,
            }
        time.sleep(EVERY)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def stage_rows(workload: Workload, looks: pd.DataFrame, stage: str) -> pd.DataFrame:
    """The samples of one stage: its items, seconds since it began, memory."""
    count = looks[stage].to_numpy()
    during = (count > 0) & (np.concatenate([[0], count[:-1]]) < count.max())  # until the first look that sees all
    chosen = looks[during].iloc[:: max(1, int(during.sum()) // SAMPLES)]
    last = looks[during].iloc[[-1]]
    chosen = pd.concat([chosen, last]).drop_duplicates("seconds")
    table = pd.DataFrame({"workload": workload.name, "stage": stage, "items": chosen[stage]})
    table["seconds"] = chosen["seconds"] - float(chosen["seconds"].iloc[0])
    return table.assign(rss_gib=chosen["rss"], anonymous_gib=chosen["anonymous"], peak_gib=chosen["peak"])


def course(workload: Workload, items: int) -> pd.DataFrame:
    """All samples of a run that is counted from outside, stage by stage."""
    looks, _ = watched(workload, items)
    return pd.concat([stage_rows(workload, looks, stage) for stage in workload.stages])


def sizes(workload: Workload, items: tuple[int, ...]) -> pd.DataFrame:
    """One row for each size and each part that the run itself tells the seconds of."""
    rows = []
    for count in items:
        looks, said = watched(workload, count)
        for part in said:
            memory = {f"{kind}_gib": looks[kind].max() for kind in ("rss", "anonymous", "peak")}
            rows.append({"workload": workload.name, "stage": part["probe"], "items": count, **memory})
            rows[-1]["seconds"] = part["seconds"]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ judging


def straight(rows: pd.DataFrame) -> tuple[float, float]:
    """Slope and offset of the line through seconds against items; flat where there are too few samples."""
    if rows["items"].nunique() < 2:
        return 0.0, float(rows["seconds"].max())
    slope, offset = np.polyfit(rows["items"], rows["seconds"], 1)
    return float(slope), float(offset)


def summary(samples: pd.DataFrame) -> pd.DataFrame:
    """For every stage: a straight line through time, and growth of memory from a tenth of the items to all.

    Growth compares medians about a tenth of the items and near their end; ``peak`` is the highest until then.
    """
    rows = []
    for (name, stage), part in samples.groupby(["workload", "stage"], sort=False):
        slope, offset = straight(part)
        away = (part["seconds"] - slope * part["items"] - offset).abs().max() / max(part["seconds"].max(), EVERY)
        row = {"workload": name, "stage": stage, "items": part["items"].max(), "seconds": part["seconds"].max()}
        row |= {"seconds_per_1000": 1000 * slope, "off_the_line": away}
        share = part["items"] / part["items"].max()
        early, late = share.between(0.05, 0.15), share >= 0.9
        early = early if early.any() else share == share.min()
        for kind in ("rss", "anonymous", "peak"):
            values = part[f"{kind}_gib"]
            row |= {f"{kind}_gib": values.max(), f"{kind}_growth": values[late].median() / values[early].median() - 1}
        rows.append(row)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------ the figure

STYLES = (("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", ":", "D"))  # told apart without colour too


def load_figure(samples: pd.DataFrame, judged: pd.DataFrame) -> Figure:
    """Memory (above) and time (below) against items, a column for each workload."""
    figure, axes = plt.subplots(2, len(WORKLOADS), figsize=(12, 6.4), sharex="col")
    for column, workload in enumerate(WORKLOADS):
        part = samples[samples["workload"] == workload.name]
        _memory(axes[0, column], part, judged.loc[judged["workload"] == workload.name, GROWTH].max(axis=None))
        _time(axes[1, column], part)
        axes[0, column].set_title(workload.title)
        axes[1, column].set_xlabel(workload.unit)
        axes[1, column].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes[1, column].xaxis.set_major_locator(MaxNLocator(4))
    axes[0, -1].axhline(PROBE_GIB, color=figures.COLOURS["chance"], linestyle=":")
    axes[0, -1].text(0, PROBE_GIB, "promised at most ", va="bottom", fontsize=9, color=figures.COLOURS["chance"])
    axes[0, -1].set_ylim(0, 1.15 * PROBE_GIB)
    axes[0, 0].set_ylabel("memory (GiB)")
    axes[1, 0].set_ylabel("time (seconds)")
    axes[0, 0].plot([], [], color="#444444", label="all resident memory")
    axes[0, 0].plot([], [], color="#444444", linewidth=1, alpha=0.6, label="of it anonymous")
    axes[0, 0].legend(loc="upper right", fontsize=9)
    worst = judged[GROWTH].max(axis=None)
    peak = judged.loc[judged["workload"] == "probe", "peak_gib"].max()
    flat = f"Memory grows by {100 * worst:.1f} % at most from a tenth of the items to all"
    figures.headline(figure, f"{flat}; the largest probe needs {peak:.1f} of {PROBE_GIB:.0f} GiB")
    return figure


def _memory(axis: Axes, part: pd.DataFrame, growth: float) -> None:
    mark = "o" if (part["workload"] == "probe").all() else ""
    for (_, rows), (colour, line, _) in zip(part.groupby("stage", sort=False), STYLES, strict=False):
        axis.plot(rows["items"], rows["rss_gib"], line, color=colour, marker=mark)
        axis.plot(rows["items"], rows["anonymous_gib"], line, color=colour, marker=mark, linewidth=1, alpha=0.6)
    axis.set_ylim(0, 1.4 * part["rss_gib"].max())
    first = part["items"].min() / part["items"].max()
    since = "a tenth" if first < 0.1 else f"{100 * first:.0f} %"
    axis.text(
        0.02, 0.04, f"{100 * growth:+.1f} % from {since} of the items to all", transform=axis.transAxes, fontsize=9
    )


def _time(axis: Axes, part: pd.DataFrame) -> None:
    for (stage, rows), (colour, line, mark) in zip(part.groupby("stage", sort=False), STYLES, strict=False):
        slope, offset = straight(rows)
        ends = np.array([0, rows["items"].max()])
        axis.plot(rows["items"], rows["seconds"], mark, color=colour, markersize=3.5)
        axis.plot(ends, slope * ends + offset, line, color=colour, linewidth=1.2, label=stage)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9, loc="upper left", title="measured, and a straight line", title_fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few items")
    parser.add_argument("--only", nargs="+", choices=[workload.name for workload in WORKLOADS], help="print, draw none")
    parser.add_argument("--items", type=int, help="with --only: that many")
    parser.add_argument("--work", help="internal: do the work, in this process")
    parser.add_argument("--folder", type=Path, help="internal")
    options = parser.parse_args()
    if options.work:
        next(w for w in WORKLOADS if w.name == options.work).work(options.items, options.folder)
        return 0
    run = bench_run("load", options.quick)
    parts = []
    for workload in WORKLOADS:
        if options.only and workload.name not in options.only:
            continue
        items = (options.items,) if options.items else workload.quick if options.quick else workload.items
        parts.append(course(workload, items[0]) if workload.stages else sizes(workload, items))
        print(summary(parts[-1]).to_string(index=False), flush=True)
    if options.only:
        return 0
    samples = pd.concat(parts)
    judged = summary(samples)
    figures.style()
    caption = "Memory and time of long workloads against the number of items, watched from outside."
    figures.save_figure(run, load_figure(samples, judged), samples, "load", caption)
    figures.save_table(run, judged, "load_summary", "A straight line through time, and growth of peak memory.")
    print(run.figures / "load.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
