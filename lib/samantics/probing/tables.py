"""The rows of notebook 01: encode once, then probe every encoder, layer, label level and number of shots."""

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

from samantics.cache import atomic_path, hash_value, reading
from samantics.data.classification import ClassificationData, Part, Task
from samantics.metrics.intervals import Interval, across_trainings, bootstrap_mean
from samantics.models.architectures import Readout
from samantics.models.encoder import load_encoder, within_reach
from samantics.plots import LABELS
from samantics.probing import protocol as ablation
from samantics.probing.features import Column, FeatureStore, Images, encode_images
from samantics.probing.linear import Features, ProbeResult, few_shot_rows, knn_probe, linear_probe
from samantics.run import Run, available_cores

PROBES = 1  # of what is kept; raised when the same probe would give other numbers
KNN = 10  # neighbours of the headline; 20 to 200 change no order (notebook 01 prints them)
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

    def features(self, part: Part, wanted: Readout | None = None) -> tuple[Features, NDArray[np.int64]]:
        """Features and labels of the readable images of a part: streamed where it is a whole split."""
        store = self.stores[part.split]
        column = store.column(wanted or self.headline)
        if part.rows is None:
            return column, part.labels[store.kept]
        readable = np.isin(part.rows, store.kept)
        positions = np.searchsorted(store.kept, part.rows[readable])
        return gathered(column, positions), part.labels[readable]


def gathered(column: Column, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """``(n, C)`` features at these positions of a column, read shard by shard."""
    out = np.empty((len(positions), column.shape[1]), np.float32)
    place = np.full(len(column), -1)
    place[positions] = np.arange(len(positions))
    for shard in range(column.store.shards):
        members, vectors = column.block(shard)
        chosen = place[members] >= 0
        out[place[members[chosen]]] = vectors[chosen]
    return out


def encode_all(run: Run, data: ClassificationData, names: Sequence[str]) -> dict[str, Encoded]:
    """Every encoder's features of every split: all layers, pooled all ways, in one pass each; from disk on a rerun."""
    return {name: _encode(run, data, name) for name in within_reach(names, run.scale.weights)}


def _encode(run: Run, data: ClassificationData, name: str) -> Encoded:
    encoder = load_encoder(name, run.scale.weights, run.device)
    run.record(f"weights:{name}", encoder.weights_hash)
    wanted = [(layer, "mean") for layer in encoder.layers]
    wanted += [(layer, "cls") for layer in encoder.layers if encoder.has_class_token(layer)]
    if data.masks:
        wanted.append(("final", "object"))
    stores = {
        split: encode_images(
            encoder, images, wanted, data.hashes[split], data.masks.get(split), folder=run.cache / "features"
        )
        for split, images in data.splits.items()
    }
    for split, value in data.hashes.items():
        run.record(f"data:{split}", value)
    return Encoded(name, encoder.headline, encoder.layers, stores)


def images_and_labels(data: ClassificationData, part: Part) -> tuple[Images, NDArray[np.int64]]:
    """The images of a part, by position, and their labels: to show some of them."""
    images = data.splits[part.split]
    return (images if part.rows is None else _Chosen(images, part.rows)), part.labels


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some images of a split."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.images[int(self.rows[index])]


# --------------------------------------------------------------------------------------------------------- tables


def probe(
    encoded: Encoded, task: Task, kind: str = "linear", wanted: Readout | None = None, seeds: int = 1, k: int = KNN
) -> ProbeResult:
    """One probe of one task: ``linear`` (its settings chosen on held-out train images) or ``knn``; kept on disk."""

    def make() -> ProbeResult:
        train_x, train_y = encoded.features(task.train, wanted)
        test_x, test_y = encoded.features(task.test, wanted)
        if kind == "knn":
            voters = min(k, len(train_y))  # a reader's folder may have fewer images
            return knn_probe(train_x, train_y, test_x, test_y, len(task.classes), (voters,))[voters]
        return linear_probe(
            train_x, train_y, test_x, test_y, len(task.classes), seeds=tuple(range(seeds)), groups=task.groups
        )

    path = _kept_path([encoded], task, [kind, list(wanted or encoded.headline), k if kind == "knn" else seeds], "npz")
    if not path.is_file():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **dataclasses.asdict(make()))
    with reading(path), np.load(path) as arrays:
        found: dict[str, Any] = {
            name: arrays[name] if arrays[name].ndim > 1 else tuple(arrays[name].tolist()) for name in arrays.files
        }
    return ProbeResult(**found)


def _kept_path(encoded: Sequence[Encoded], task: Task, what: list[Any], kind: str) -> Path:
    """Where the outcome of probes is kept: its name says what it depends on."""
    digest = hashlib.sha256()
    for part in (task.train, task.test):
        for values in (part.labels, part.rows):
            digest.update(b"all" if values is None else np.ascontiguousarray(values).tobytes())
    digest.update(b"" if task.groups is None else np.ascontiguousarray(task.groups).tobytes())
    stores = [{split: store.folder.parts[-2:] for split, store in e.stores.items()} for e in encoded]
    key = hash_value([PROBES, stores, task.name, digest.hexdigest(), what])
    return encoded[0].stores[task.train.split].folder.parent / "probes" / f"{key}.{kind}"


def _kept_table(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in that file, made and written first where it is not there."""
    if not path.is_file():
        with atomic_path(path) as temporary:
            make().to_csv(temporary, index=False)
    with reading(path):
        return pd.read_csv(path, float_precision="round_trip", keep_default_na=False)


def row(encoded: Encoded, task: Task, kind: str, result: ProbeResult, wanted: Readout | None = None) -> dict[str, Any]:
    """A line of ``01_probe_accuracy.csv``: percent, with 95 % intervals over test images and seeds."""
    layer, pooling = wanted or encoded.headline
    top1, top5 = (bootstrap_mean(100.0 * hits) for hits in (result.top1, result.top5))
    return {
        "encoder": encoded.name,
        "labels": task.name,
        "probe": kind,
        "layer": layer,
        "pooling": pooling,
        "top1": top1.value,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5": top5.value,
        "top5_low": top5.low,
        "top5_high": top5.high,
        "dim": encoded.stores[task.train.split].dims[(layer, pooling)],
        "n_train": len(task.train.labels),
        "n_test": result.top1.shape[1],
        "seeds": result.top1.shape[0],
    }


def headline(
    features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int
) -> tuple[pd.DataFrame, dict[tuple[str, str], ProbeResult]]:
    """Both probes of every encoder's output at every label level; the linear probes' answers by (encoder, level)."""
    jobs = [(e, t, kind) for t in tasks.values() for e in features.values() for kind in ("linear", "knn")]
    results = on_all_cores(lambda job: probe(job[0], job[1], job[2], seeds=seeds), jobs)
    rows = [row(*job, result) for job, result in zip(jobs, results, strict=True)]
    answers = {(e.name, t.name): r for (e, t, kind), r in zip(jobs, results, strict=True) if kind == "linear"}
    return pd.DataFrame(rows), answers


def zoo_rows(table: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The linear probes of :func:`headline` with the noise of training in their intervals: C1's table.

    Args:
        others: the same probes of zoos trained from other seeds (:func:`controls.other_zoos`); encoders and label
            levels without any keep their value and interval.

    Returns:
        ``encoder, labels, probe, layer, top1, top1_low, top1_high`` (the mean over zoos, within 0 and 100 percent),
        ``lowest`` and ``highest`` zoo, ``zoos``, and ``seeds`` of the probe.
    """
    columns = ["top1", "top1_low", "top1_high"]
    rows = []
    for line in table[table["probe"] == "linear"].to_dict("records"):
        alike = others[(others["model"] == line["encoder"]) & (others["labels"] == line["labels"])]
        found = [Interval(*values) for values in [[line[name] for name in columns], *alike[columns].to_numpy(float)]]
        top1 = [one.value for one in found]
        rows.append(
            {name: line[name] for name in ("encoder", "labels", "probe", "layer")}
            | dict(zip(columns, across_trainings(found).within(0, 100), strict=True))
            | {"lowest": min(top1), "highest": max(top1), "zoos": len(found), "seeds": line["seeds"]}
        )
    return pd.DataFrame(rows)


def layer_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Linear probes of the spatial mean of every layer: where in the network is the meaning?"""
    jobs = [(e, (layer, "mean")) for e in features.values() for layer in e.layers]
    rows = _linear_rows(jobs, task, seeds=1)
    depth = [(place + 1) / len(e.layers) for e in features.values() for place in range(len(e.layers))]
    return rows.assign(depth=depth)


def pooling_rows(features: Mapping[str, Encoded], task: Task, seeds: int) -> pd.DataFrame:
    """Linear probes of the final layer under every pooling it has: is meaning absent, or only averaged away?"""
    jobs = [(e, pair) for e in features.values() for pair in e.stores[task.train.split].dims if pair[0] == "final"]
    return _linear_rows(jobs, task, seeds)


def _linear_rows(jobs: Sequence[tuple[Encoded, Readout]], task: Task, seeds: int) -> pd.DataFrame:
    results = on_all_cores(lambda job: probe(job[0], task, wanted=job[1], seeds=seeds), jobs)
    return pd.DataFrame([row(e, task, "linear", r, pair) for (e, pair), r in zip(jobs, results, strict=True)])


def on_all_cores(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """``function`` of every job, in order. A probe is too small for several cores: each core takes a job.

    Threads, because the work is in torch, which lets others run meanwhile; each computes on one core.
    """
    cores = available_cores()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, jobs))
    finally:
        torch.set_num_threads(cores)


def possible_shots(task: Task, shots: Sequence[int]) -> tuple[int, ...]:
    """Those of the wanted numbers of images per class that every class has."""
    fewest = int(np.bincount(task.train.labels, minlength=len(task.classes)).min())
    return tuple(count for count in shots if count <= fewest)


def few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    """Linear probes on 1, 2, 4 ... images of every class; each seed draws other images."""
    path = _kept_path(list(features.values()), task, ["few shot", list(shots), seeds], "csv")
    return _kept_table(path, lambda: _few_shot(features, task, shots, seeds))


def _few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    jobs = [(e, count) for e in features.values() for count in shots]
    results = on_all_cores(lambda job: _few_shot_hits(job[0], job[1], task, seeds), jobs)
    rows = []
    for (encoded, count), hits in zip(jobs, results, strict=True):
        top1 = bootstrap_mean(100.0 * hits)
        line = {"encoder": encoded.name, "labels": task.name, "shots": count, "seeds": seeds}
        rows.append(line | {"top1": top1.value, "top1_low": top1.low, "top1_high": top1.high})
    return pd.DataFrame(rows)


def _few_shot_hits(encoded: Encoded, count: int, task: Task, seeds: int) -> NDArray[np.bool_]:
    """``(seeds, n)``: is the test image's class found?"""
    train_x, train_y = encoded.features(task.train)
    test_x, test_y = encoded.features(task.test)
    hits = []
    for seed in range(seeds):
        chosen = few_shot_rows(train_y, count, seed)
        few_x = gathered(train_x, chosen) if isinstance(train_x, Column) else train_x[chosen]
        labels, classes = train_y[chosen], len(task.classes)
        fixed = linear_probe(
            few_x, labels, test_x, test_y, classes, (seed,), rates=(FEW_SHOT_RATE,), max_epochs=FEW_SHOT_EPOCHS
        )
        hits.append(fixed.top1[0])
    return np.stack(hits)


def class_rows(answers: Mapping[tuple[str, str], ProbeResult], task: Task, test_y: NDArray[np.int64]) -> pd.DataFrame:
    """Top-1 of every class and encoder, percent, with intervals over its test images and the seeds."""
    rows = []
    for (name, level), result in answers.items():
        if level != task.name:
            continue
        for label, text in enumerate(task.classes):
            hits = result.top1[:, test_y == label]
            if not hits.size:
                continue
            top1 = bootstrap_mean(100.0 * hits)
            line = {"encoder": name, "class": text, "n_test": hits.shape[1], "seeds": hits.shape[0]}
            rows.append(line | {"top1": top1.value, "top1_low": top1.low, "top1_high": top1.high})
    return pd.DataFrame(rows)


def test_labels(encoded: Encoded, task: Task) -> NDArray[np.int64]:
    """``(n,)`` true labels of the test images that a probe's answers belong to."""
    return encoded.features(task.test)[1]


def protocol_rows(features: Mapping[str, Encoded], task: Task, seeds: int) -> pd.DataFrame:
    """The paper's probing protocol and one change of it at a time, for every encoder (see ``ablation``).

    Few encoders have the same width: each is also projected to the narrowest one's.
    """
    path = _kept_path(list(features.values()), task, ["protocol", seeds], "csv")
    return _kept_table(path, lambda: _protocol(features, task, seeds))


def _protocol(features: Mapping[str, Encoded], task: Task, seeds: int) -> pd.DataFrame:
    narrowest = min(e.stores[task.train.split].dims[e.headline] for e in features.values())
    parts = on_all_cores(lambda e: _protocol_lines(e, task, narrowest, tuple(range(seeds))), list(features.values()))
    rows = []
    for encoded, lines in zip(features.values(), parts, strict=True):
        for line in lines:
            entry = row(encoded, task, "linear", line.result, (line.layer, line.pooling))
            rows.append({"question": line.question, "setting": line.setting} | entry | {"dim": line.dim})
    return pd.DataFrame(rows)


def _protocol_lines(encoded: Encoded, task: Task, width: int, seeds: tuple[int, ...]) -> list[ablation.Line]:
    train_y, test_y = (encoded.features(part)[1] for part in (task.train, task.test))
    wanted = [encoded.headline, *_other_outputs(encoded, task)]
    arrays = {pair: (_array(encoded, task.train, pair), _array(encoded, task.test, pair)) for pair in wanted}
    shared = (encoded.headline, train_y, test_y, len(task.classes))
    lines = ablation.protocol_lines(arrays, *shared, seeds=seeds)
    return lines + ablation.feature_lines(arrays, *shared, width=width, seeds=seeds)


def _other_outputs(encoded: Encoded, task: Task) -> list[Readout]:
    """What the headline is compared with: other poolings of its layer, CLIP before its projection, the last block."""
    dims = encoded.stores[task.train.split].dims
    last = [layer for layer in encoded.layers if layer.startswith("block")][-1]
    return [
        pair
        for pair in dims
        if pair != encoded.headline and (pair[0] in ("final", "before_projection") or pair == (last, "mean"))
    ]


def _array(encoded: Encoded, part: Part, wanted: Readout) -> NDArray[np.float32]:
    found = encoded.features(part, wanted)[0]
    return gathered(found, np.arange(len(found))) if isinstance(found, Column) else found


def order_sentences(table: pd.DataFrame) -> list[str]:
    """What the headline table says, for each label level: the order of the encoders, and SAM beside its floor."""
    sentences = []
    for level, rows in table[table["probe"] == "linear"].groupby("labels", sort=False):
        ranked = rows.sort_values("top1", ascending=False)
        order = " > ".join(
            f"{LABELS[r.encoder]} {r.top1:.1f} [{r.top1_low:.1f}, {r.top1_high:.1f}]" for r in ranked.itertuples()
        )
        sentences.append(f"{level}: {order} (top-1 %)")
        by_name = rows.set_index("encoder")
        if {"sam", "clip", "dinov2"} <= set(by_name.index):
            weaker = by_name.loc[["clip", "dinov2"], "top1"].idxmin()
            ratio = by_name.loc[weaker, "top1"] / max(by_name.loc["sam", "top1"], 1e-9)
            apart = by_name.loc["sam", "top1_high"] < by_name.loc[weaker, "top1_low"]
            sentences.append(
                f"{level}: SAM is {'below' if apart else 'not clearly below'} both CLIP and DINOv2; "
                f"{LABELS[weaker]}, the weaker of them, has {ratio:.1f} times its top-1"
            )
    return sentences


def confusion(result: ProbeResult, task: Task, test_y: NDArray[np.int64]) -> pd.DataFrame:
    """``(classes, classes)`` share (percent) of each true class (row) that is called each class (column)."""
    counts = np.zeros((len(task.classes), len(task.classes)))
    for predictions in result.predictions:
        np.add.at(counts, (test_y, predictions), 1)
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    return pd.DataFrame(shares, index=list(task.classes), columns=list(task.classes))


def only_right(answers: Mapping[tuple[str, str], ProbeResult], level: str, name: str) -> NDArray[np.int64]:
    """Test images that this encoder gets right under every seed and no other under any, in their order.

    The untrained encoder is not asked: what it gets right beside the others is chance.
    """
    others = [r.top1.any(0) for (other, task), r in answers.items() if task == level and other not in (name, "random")]
    return np.flatnonzero(answers[name, level].top1.all(0) & ~np.any(others, axis=0))
