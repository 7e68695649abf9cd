"""The tables of notebook 01: encode once, then probe every encoder, layer, label level and number of shots."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from samantics.cache import hash_value, kept
from samantics.data.classification import ClassificationData, Part, Task
from samantics.metrics.intervals import Interval, across_trainings, bootstrap_mean
from samantics.models.architectures import Readout
from samantics.models.encoder import Encoder, load_encoder, within_reach
from samantics.probing.features import Column, FeatureStore, encode_images
from samantics.probing.knn import knn_probe
from samantics.probing.linear import Features, Labels, ProbeResult, few_shot_rows, linear_probe
from samantics.probing.protocol import Data, input_variants, projected_probe, training_changes
from samantics.run import Run, available_cores

PROBES = 1  # of what is kept; raised when the same probe would give other numbers
ENCODED_AGAIN = 100_000  # images of a split, at most, that are encoded again with another input
FEW_SHOT_RATE, FEW_SHOT_EPOCHS = 0.3, 60  # one image per class leaves nothing to choose settings on


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Stored features of one encoder.

    Attributes:
        name: of the encoder.
        headline: layer and pooling of its row in the paper's table.
        layers: its layers from input to output.
        stores: by split.
    """

    name: str
    headline: Readout
    layers: tuple[str, ...]
    stores: Mapping[str, FeatureStore]

    def features(self, part: Part, readout: Readout | None = None) -> tuple[Features, Labels]:
        """Features, streamed, and labels of the readable images of a part."""
        store = self.stores[part.split]
        return store.column(readout or self.headline), part.labels[store.kept]

    def data(self, task: Task, readout: Readout | None = None) -> Data:
        """What every probe takes first: train features and labels, test features and labels, number of classes."""
        return *self.features(task.train, readout), *self.features(task.test, readout), len(task.classes)

    def dims(self, task: Task) -> dict[Readout, int]:
        """Width of every layer and pooling that is stored."""
        return self.stores[task.train.split].dims


def encode_all(run: Run, data: ClassificationData, names: Sequence[str]) -> dict[str, Encoded]:
    """Features of every encoder within reach: all layers, pooled all ways, in one pass; from disk on a rerun."""
    found = {}
    for name in within_reach(names, run.scale.weights):
        encoder = load_encoder(name, run.scale.weights, run.device)
        run.record(f"weights:{name}", encoder.weights_hash)
        readouts = [(layer, "mean") for layer in encoder.layers]
        readouts += [(layer, "cls") for layer in encoder.layers if encoder.has_class_token(layer)]
        found[name] = encode(run, data, encoder, readouts + [("final", "object")] * bool(data.masks))
    for split, value in data.hashes.items():
        run.record(f"data:{split}", value)
    return found


def encode(run: Run, data: ClassificationData, encoder: Encoder, readouts: Sequence[Readout]) -> Encoded:
    """One encoder's features of every split."""
    folder, stores = run.cache / "features", {}
    for split, images in data.splits.items():
        stores[split] = encode_images(encoder, images, readouts, data.hashes[split], data.masks.get(split), folder)
    return Encoded(encoder.name, encoder.headline, encoder.layers, stores)


def probe(
    encoded: Encoded, task: Task, kind: str = "linear", readout: Readout | None = None, seeds: int = 1
) -> ProbeResult:
    """One probe of one task: `linear` (its settings chosen on held-out train images) or `knn`; kept on disk."""

    def make() -> dict[str, Any]:
        data = encoded.data(task, readout)
        if kind == "knn":
            return knn_probe(*data, k=min(10, len(data[1])))._asdict()  # a reader's folder may have fewer images
        return linear_probe(*data, seeds=range(seeds), groups=task.groups)._asdict()

    what = [kind, list(readout or encoded.headline), seeds if kind == "linear" else 10]
    return ProbeResult(**kept(_path([encoded], task, what, "npz"), make))


def _path(features: Sequence[Encoded], task: Task, what: list[Any], kind: str) -> Path:
    """Where the outcome of probes is kept: its name says what it depends on."""
    digest = hashlib.sha256()
    for part in (task.train, task.test):
        digest.update(part.split.encode() + np.ascontiguousarray(part.labels).tobytes())
    digest.update(b"" if task.groups is None else np.ascontiguousarray(task.groups).tobytes())
    stores = [{split: store.folder.parts[-2:] for split, store in one.stores.items()} for one in features]
    key = hash_value([PROBES, stores, task.name, digest.hexdigest(), what])
    return features[0].stores[task.train.split].folder.parent / "probes" / f"{key}.{kind}"


def on_all_cores(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function` of every job, in order. A probe is too small for several cores: each core takes a job.

    Threads, because the work is in torch, which lets others run meanwhile; each computes on one core.
    """
    cores = available_cores()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda job: function(*job), jobs))
    finally:
        torch.set_num_threads(cores)


# --------------------------------------------------------------------------------------------------------- tables


def percent(name: str, hits: NDArray[np.bool_]) -> dict[str, float]:
    """`name`, `name_low`, `name_high`: the mean of `(seeds, n)` hits in percent with its 95 % interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), bootstrap_mean(100.0 * hits), strict=True))


def row(encoded: Encoded, task: Task, kind: str, result: ProbeResult, readout: Readout | None = None) -> dict[str, Any]:
    """A row of `01_probe_accuracy.csv`: percent, with 95 % intervals over test images and seeds."""
    layer, pooling = readout or encoded.headline
    what = {"encoder": encoded.name, "labels": task.name, "probe": kind, "layer": layer, "pooling": pooling}
    counts = {"n_train": len(task.train.labels), "n_test": result.top1.shape[1], "seeds": result.top1.shape[0]}
    accuracy = percent("top1", result.top1) | percent("top5", result.top5)
    return what | accuracy | {"dim": encoded.dims(task)[layer, pooling]} | counts


def headline(
    features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int
) -> tuple[pd.DataFrame, dict[tuple[str, str], ProbeResult]]:
    """Both probes of every encoder's output at every label level; the linear probes' answers by (encoder, level)."""
    jobs = [(e, t, kind, None, seeds) for t in tasks.values() for e in features.values() for kind in ("linear", "knn")]
    results = on_all_cores(probe, jobs)
    rows = [row(*job[:3], result) for job, result in zip(jobs, results, strict=True)]
    return pd.DataFrame(rows), {(e.name, t.name): r for (e, t, *_), r in zip(jobs[::2], results[::2], strict=True)}


def zoo_rows(table: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The linear probes of `headline` with the noise of training in their intervals: C1's table.

    Args:
        table: of `headline`.
        others: the same probes of models trained from other seeds (`controls.other_zoos`).

    Returns:
        `encoder, labels, probe, layer, top1, top1_low, top1_high` (the mean over trainings, within 0 and 100 percent;
        a model trained once keeps its row), the `lowest` and `highest` of `zoos` trainings, and `seeds` of the probe.
    """
    columns, rows = ["top1", "top1_low", "top1_high"], []
    for line in table[table["probe"] == "linear"].to_dict("records"):
        alike = others[(others["model"] == line["encoder"]) & (others["labels"] == line["labels"])]
        found = [Interval(*values) for values in [[line[name] for name in columns], *alike[columns].to_numpy(float)]]
        top1 = dict(zip(columns, across_trainings(found).within(0, 100), strict=True))
        span = {"lowest": min(found).value, "highest": max(found).value, "zoos": len(found), "seeds": line["seeds"]}
        rows.append({name: line[name] for name in ("encoder", "labels", "probe", "layer")} | top1 | span)
    return pd.DataFrame(rows)


def layer_rows(features: Mapping[str, Encoded], tasks: Mapping[str, Task]) -> pd.DataFrame:
    """Linear probes of the spatial mean of every layer: where in the network is the class?"""
    jobs = [(e, t, (layer, "mean")) for t in tasks.values() for e in features.values() for layer in e.layers]
    depth = [(e.layers.index(layer) + 1) / len(e.layers) for e, _, (layer, _) in jobs]
    return _linear_rows(jobs, 1).assign(depth=depth)


def pooling_rows(features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int) -> pd.DataFrame:
    """Linear probes of the final layer under every pooling it has: is the class absent, or only averaged away?"""
    pairs = [(e, t) for t in tasks.values() for e in features.values()]
    return _linear_rows([(e, t, readout) for e, t in pairs for readout in e.dims(t) if readout[0] == "final"], seeds)


def _linear_rows(jobs: Sequence[tuple[Encoded, Task, Readout]], seeds: int) -> pd.DataFrame:
    results = on_all_cores(probe, [(e, t, "linear", readout, seeds) for e, t, readout in jobs])
    return pd.DataFrame([row(e, t, "linear", r, readout) for (e, t, readout), r in zip(jobs, results, strict=True)])


def few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    """Linear probes on 1, 2, 4 ... images of every class, as far as each has as many; each seed draws other images."""
    fewest = int(np.bincount(task.train.labels, minlength=len(task.classes)).min())
    possible = [count for count in shots if count <= fewest]

    def make() -> pd.DataFrame:
        jobs = [(e, task, count, seeds) for e in features.values() for count in possible]
        found = zip(jobs, on_all_cores(_few_shot_hits, jobs), strict=True)
        what = [
            ({"encoder": e.name, "labels": task.name, "shots": n, "seeds": seeds}, hits) for (e, _, n, _), hits in found
        ]
        return pd.DataFrame([line | percent("top1", hits) for line, hits in what])

    return kept(_path(list(features.values()), task, ["few shot", possible, seeds], "csv"), make)


def _few_shot_hits(encoded: Encoded, task: Task, count: int, seeds: int) -> NDArray[np.bool_]:
    """`(seeds, n)`: is the test image's class found?"""
    x, y, test_x, test_y, classes = encoded.data(task)
    hits = []
    for seed in range(seeds):
        few = few_shot_rows(y, count, seed)
        few_x = x.take(few) if isinstance(x, Column) else x[few]
        fixed = linear_probe(
            few_x, y[few], test_x, test_y, classes, (seed,), (FEW_SHOT_RATE,), max_epochs=FEW_SHOT_EPOCHS
        )
        hits.append(fixed.top1[0])
    return np.stack(hits)


def class_rows(answers: Mapping[tuple[str, str], ProbeResult], task: Task, test_y: Labels) -> pd.DataFrame:
    """Top-1 of every class and encoder, percent, with intervals over its test images and the seeds."""
    rows = []
    for name, result in ((name, result) for (name, level), result in answers.items() if level == task.name):
        for label in np.unique(test_y):
            hits = result.top1[:, test_y == label]
            what = {"encoder": name, "class": task.classes[label], "n_test": hits.shape[1], "seeds": hits.shape[0]}
            rows.append(what | percent("top1", hits))
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------- the paper's protocol


def protocol_rows(
    run: Run, data: ClassificationData, features: Mapping[str, Encoded], task: Task, seeds: int
) -> pd.DataFrame:
    """The paper's probing protocol and one change of it at a time, for every encoder.

    Few encoders have the same width: each is also projected to the narrowest one's. Each is also given another input
    (`protocol.input_variants`), but not hundreds of thousands of images; where all pictures are square, squashing them
    changes nothing: no row for that.
    """
    width = min(one.dims(task)[one.headline] for one in features.values())

    def make() -> pd.DataFrame:
        jobs = [(one, _variants(run, data, one), task, width, range(seeds)) for one in features.values()]
        return pd.concat(on_all_cores(_protocol, jobs), ignore_index=True)

    return kept(_path(list(features.values()), task, ["protocol and input", seeds], "csv"), make)


def _variants(run: Run, data: ClassificationData, own: Encoded) -> dict[str, Encoded]:
    """The encoder's headline features, by what was changed of its input; none where encoding again takes days."""
    if max(len(images) for images in data.splits.values()) > ENCODED_AGAIN:
        return {}
    changed = input_variants(load_encoder(own.name, run.scale.weights, run.device))
    arrays = [images for images in data.splits.values() if isinstance(images, np.ndarray)]
    square = len(arrays) == len(data.splits) and all(array.shape[1] == array.shape[2] for array in arrays)
    names = list(changed)[1:2] if square else list(changed)[1:]  # the first is the encoder's own
    return {name: encode(run, data, changed[name], [own.headline]) for name in names}


def _protocol(
    own: Encoded, variants: Mapping[str, Encoded], task: Task, width: int, seeds: Sequence[int]
) -> pd.DataFrame:
    data, top = own.data(task), own.headline
    found = [(*words, top, result) for words, result in training_changes(data, seeds).items()]
    sound = found[-1][-1]
    found.append(("headline", "", top, sound))
    last = [layer for layer in own.layers if layer.startswith("block")][-1]
    questions = {"before_projection": "before the projection", last: "trunk instead of the last layer"}
    for layer, pooling in own.dims(task):
        if (layer, pooling) != top and (layer in ("final", "before_projection") or (layer, pooling) == (last, "mean")):
            result = linear_probe(*own.data(task, (layer, pooling)), seeds=seeds)
            found.append((questions.get(layer, "pooling"), "", (layer, pooling), result))
    narrow = projected_probe(data, width, seeds)
    found.append(("unequal widths", f"random projection to {width}", top, narrow))
    found.append(("the encoder's input", "own", top, sound))
    for name, variant in variants.items():
        found.append(("the encoder's input", name, top, linear_probe(*variant.data(task), seeds=seeds)))
    rows = [{"question": q, "setting": s} | row(own, task, "linear", r, readout) for q, s, readout, r in found]
    return pd.DataFrame([line | ({"dim": width} if line["question"] == "unequal widths" else {}) for line in rows])
