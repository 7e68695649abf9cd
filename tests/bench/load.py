"""Does memory stay flat and time linear? Long workloads in processes of their own, watched from outside.

    .venv/bin/python tests/bench/load.py            # at most 15 minutes on two quiet cores
    .venv/bin/python tests/bench/load.py --quick    # a rehearsal of a minute; leaves its files in .cache/bench

Extraction of 10,000 images; 2,000 scenes through the training-free pipeline, as notebook 03 has it; probes of stores up
to ImageNet's size. Leaves load.csv (all samples), load_summary.csv and load.png in figures/bench.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import pandas as pd
import psutil
import seaborn
import typer
from measuring import IMAGENET, bench_run, peak_gib

from samantics import plots
from samantics.models.encoder import load_encoder
from samantics.probing import features as store
from samantics.probing.linear import linear_probe
from samantics.probing.protocol import paper_probe
from samantics.run import start_run
from samantics.training_free import matching, pipeline, proposals

EVERY = 0.2  # seconds between two looks
SAMPLES = 150  # of each stage, in the table and the figure
GRID = 4  # points along a scene's side: 16 prompts instead of 144, so that 2,000 scenes take minutes
SIZES = {"extraction": [10_000], "pipeline": [2_000], "probe": [IMAGENET // part for part in (10, 3, 1)]}
QUICK = {"extraction": [600], "pipeline": [40], "probe": [4_000, 8_000]}


def counted(work: Any, folder: Path, stage: str) -> Any:
    """The same function; whoever watches sees its calls in a file that grows by one byte for each."""
    file = (folder / f"{stage}.count").open("ab", buffering=0)

    @functools.wraps(work)
    def call(*arguments: Any, **options: Any) -> Any:
        result = work(*arguments, **options)
        file.write(b".")
        return result

    return call


class Noise:
    """Images made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def extraction(items: int, folder: Path) -> None:
    encoder = load_encoder("dinov2", "zoo_random", image_size=32)  # a small input: many images in little time
    with mock.patch.object(Noise, "__getitem__", counted(Noise.__getitem__, folder, "images")):
        store.encode_images(encoder, Noise(items), [("final", "cls")], "noise", folder=folder / "store")


def training_free(items: int, folder: Path) -> None:
    """Notebook 03's headline: proposals of all scenes, features of their masks, matching, COCO results."""
    run = start_run("pocket", "load")
    settings = dataclasses.replace(run.scale.pipeline, target_scenes=items, points_per_side=GRID)
    run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, pipeline=settings), cache=folder)
    job = pipeline.start(run)
    job.bank("dinov2", settings.shots)  # its features are references', not scenes'
    parts = ((proposals, "propose", "proposals"), (matching, "read_image", "features"), (pipeline, "match", "matching"))
    for module, name, stage in parts:  # this process does nothing else
        setattr(module, name, counted(getattr(module, name), folder, stage))
    (folder / "results.json").write_text(json.dumps(job.predict(pipeline.Variant())))


def probe(items: int, folder: Path) -> None:
    """The linear and the paper's probe, one epoch each, on synthetic stores; says the seconds of both."""
    labels, test_labels = (np.random.default_rng(seed).integers(0, 1000, n) for seed, n in ((1, items), (2, 50_000)))
    train, test = (synthetic(folder / name, y) for name, y in (("train", labels), ("test", test_labels)))
    data = (train.column(("final", "mean")), labels, test.column(("final", "mean")), test_labels, 1000)
    linear = functools.partial(linear_probe, seeds=(0,), rates=(0.1,), max_epochs=1)
    for name, work in (("linear", linear), ("paper", functools.partial(paper_probe, epochs=1))):
        started = time.perf_counter()
        work(*data)
        print(json.dumps({"stage": name, "seconds": time.perf_counter() - started}), flush=True)


def synthetic(folder: Path, labels: np.ndarray, dim: int = 768, shard_rows: int = 4096) -> store.FeatureStore:
    """A store as ``encode_images`` writes it, of Gaussian classes."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(1000, dim)).astype(np.float32)
    folder.mkdir()
    for shard in range(-(-len(labels) // shard_rows)):
        rows = store._shard_rows(len(labels), shard_rows, shard)
        block = (means[labels[rows]] + 4 * rng.standard_normal((len(rows), dim), dtype=np.float32)).astype(np.float16)
        np.save(store._shard_path(folder, shard), block.ravel())
        note = {"format": store.FORMAT, "rows": len(rows), "skipped": {}}
        note["columns"] = [["final:mean", dim, zlib.crc32(block.data)]]
        store._note_path(folder, shard).write_text(json.dumps(note))
    return store.FeatureStore(folder, len(labels), shard_rows, {("final", "mean"): dim}, {})


WORKS = {"extraction": extraction, "pipeline": training_free, "probe": probe}


def watched(name: str, items: int) -> pd.DataFrame:
    """Samples of one run: ``workload, stage, items, seconds, rss_gib, anonymous_gib, peak_gib``."""
    with tempfile.TemporaryDirectory(prefix="samantics_load_") as place:
        command = [sys.executable, __file__, "--work", f"{name} {items} {place}"]
        process, looks, started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), [], time.perf_counter()
        while process.poll() is None:
            try:
                memory, peak = psutil.Process(process.pid).memory_info(), peak_gib(process.pid)
            except (psutil.Error, OSError, ValueError, IndexError):  # it may end while it is looked at
                continue
            look = {"seconds": time.perf_counter() - started, "rss_gib": memory.rss / 2**30}
            look |= {"anonymous_gib": (memory.rss - memory.shared) / 2**30, "peak_gib": peak}
            looks.append(look | {path.stem: path.stat().st_size for path in sorted(Path(place).glob("*.count"))})
            time.sleep(EVERY)
        told = process.communicate()[0].splitlines()
    if process.returncode:
        raise SystemExit(f"{name} of {items} items failed")
    table = pd.DataFrame(looks)
    highest = table[["rss_gib", "anonymous_gib", "peak_gib"]].max().to_dict()
    rows = [{"workload": name, "items": items, **json.loads(line), **highest} for line in told if line[:1] == "{"]
    parts = [pd.DataFrame(rows)] if rows else []
    for stage in [column for column in table if column not in ("seconds", *highest)]:
        count = table[stage].fillna(0)
        part = table[(count > 0) & (count.shift(fill_value=0) < count.max())]  # until the first look that sees all
        part = part.iloc[np.unique(np.linspace(0, len(part) - 1, SAMPLES).astype(int))]
        part = part.assign(
            workload=name, stage=stage, items=part[stage], seconds=part["seconds"] - part["seconds"].iloc[0]
        )
        parts.append(part)
    columns = ["workload", "stage", "items", "seconds", "rss_gib", "anonymous_gib", "peak_gib"]
    return pd.concat(parts)[columns].astype({"items": int})


def summary(samples: pd.DataFrame) -> pd.DataFrame:
    """For every stage: a straight line through time, and growth of memory from a tenth of the items to all.

    Growth compares medians about a tenth of the items and near their end; ``peak`` is the highest until then.
    """
    rows = []
    for (name, stage), part in samples.groupby(["workload", "stage"], sort=False):
        slope, offset = np.polyfit(part["items"], part["seconds"], 1)
        away = (part["seconds"] - slope * part["items"] - offset).abs().max() / max(part["seconds"].max(), EVERY)
        row = {"workload": name, "stage": stage, "items": part["items"].max(), "seconds": part["seconds"].max()}
        row |= {"seconds_per_1000": 1000 * slope, "off_the_line": away}
        share = part["items"] / part["items"].max()
        early = share.between(0.05, 0.15) if share.between(0.05, 0.15).any() else share == share.min()
        for kind in ("rss", "anonymous", "peak"):
            values = part[f"{kind}_gib"]
            growth = values[share >= 0.9].median() / values[early].median() - 1
            row |= {f"{kind}_gib": values.max(), f"{kind}_growth": growth}
        rows.append(row)
    return pd.DataFrame(rows)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few items")] = False,
    work: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if work:
        name, items, place = work.split()
        WORKS[name](int(items), Path(place))
        return
    run, sizes = bench_run("load", quick), QUICK if quick else SIZES
    samples = pd.concat([watched(name, items) for name, counts in sizes.items() for items in counts])
    judged = summary(samples)
    print(judged.to_string(index=False))
    plots.style()
    figure = load_figure(samples, judged)
    run.save(figure, samples, "load", "Memory and time of long workloads against the number of items.")
    run.save(None, judged, "load_summary", "A straight line through time, and growth of memory.")


def load_figure(samples: pd.DataFrame, judged: pd.DataFrame) -> Any:
    """Memory and time against the share of the items, a panel for each workload."""
    shown = samples.assign(share=100 * samples["items"] / samples.groupby("workload")["items"].transform("max"))
    shown = shown.rename(columns={"rss_gib": "memory (GiB)", "seconds": "time (s)"})
    shown = shown.melt(["workload", "stage", "share"], ["memory (GiB)", "time (s)"], "of", "value")
    facets = {"row": "of", "col": "workload", "height": 2.6, "facet_kws": {"sharey": False, "margin_titles": True}}
    grid = seaborn.relplot(
        shown, x="share", y="value", hue="stage", kind="line", estimator=None, palette=plots.CYCLE[:6], **facets
    )
    grid.set(xlabel="share of the items (%)", ylabel="", ylim=(0, None)).set_titles(
        col_template="{col_name}", row_template="{row_name}"
    )
    figure = grid.figure
    worst, peak = judged[["rss_growth", "peak_growth"]].max(axis=None), judged["peak_gib"].max()
    plots.headline(
        figure, f"Memory grows by {worst:.1%} at most from a tenth of the items to all; at most {peak:.1f} GiB"
    )
    grid.tight_layout(rect=(0, 0, 0.86, 0.95))
    return figure


if __name__ == "__main__":
    typer.run(main)
