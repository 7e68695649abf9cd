"""The tables of notebook 01: encode once, then probe every encoder, layer, level and number of shots."""

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
from samantics.metrics.claims import PAPER_PROBE
from samantics.metrics.intervals import bootstrap_mean
from samantics.models.architectures import Readout
from samantics.models.encoder import Encoder, has_fast_half, load_encoder, within_reach
from samantics.mojiworld.floors import INSTRUMENTS
from samantics.probing.attentive import attentive_probe
from samantics.probing.features import Column, FeatureStore, encode_images
from samantics.probing.knn import knn_probe
from samantics.probing.linear import Features, Labels, ProbeResult, few_shot_rows, linear_probe
from samantics.probing.protocol import Data, paper_input, projected_probe, training_changes
from samantics.probing.similarity import squares
from samantics.probing.zero_shot import class_texts, zero_shot_probe
from samantics.run import Run, available_cores

PROBES = 2  # of what is kept; raised when the same probe would give other numbers
ENCODED_AGAIN = 100_000  # images of a split, at most, that are encoded again with another input
FLOOR_IMAGES = 20_000  # of a split, at most, that instruments without training look at
QUICK_RATE, QUICK_EPOCHS = 0.1, 20  # where many layers are compared, and where few images leave nothing to choose on
TOKENS = ("final", "tokens")
Answers = dict[tuple[str, str, str], ProbeResult]  # by encoder, level and probe


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

    def kinds(self, part: Part) -> NDArray[np.str_]:
        """`(N,)` kind of each readable image of a part; `all` where there is but one."""
        kept_rows = self.stores[part.split].kept
        return np.full(len(kept_rows), "all") if part.kinds is None else part.kinds[kept_rows]

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
        encoder = probed_encoder(run, name)
        run.record(f"weights:{name}", encoder.weights_hash)
        readouts = [(layer, "mean") for layer in encoder.layers]
        readouts += [(layer, "cls") for layer in encoder.layers if encoder.has_class_token(layer)]
        found[name] = encode(run, data, encoder, [*readouts, TOKENS] + [("final", "object")] * bool(data.masks))
    for split, value in data.hashes.items():
        run.record(f"data:{split}", value)
    return found


def probed_encoder(run: Run, name: str) -> Encoder:
    """An encoder of the run's scale; the zoo's compute in bfloat16, as they were trained, where that saves time."""
    half = run.scale.weights.startswith("zoo") and has_fast_half(run.device)
    return load_encoder(name, run.scale.weights, run.device, half=half)


def encode(run: Run, data: ClassificationData, encoder: Encoder, readouts: Sequence[Readout]) -> Encoded:
    """One encoder's features of every split."""
    folder, stores = run.cache / "features", {}
    for split, images in data.splits.items():
        stores[split] = encode_images(encoder, images, readouts, data.hashes[split], data.masks.get(split), folder)
    return Encoded(encoder.name, encoder.headline, encoder.layers, stores)


# ---------------------------------------------------------------------------------------------------- one probe


def _linear(data: Data, seeds: int, groups: Labels | None) -> ProbeResult:
    return linear_probe(*data, seeds=range(seeds), groups=groups)


def _quick(data: Data, seeds: int, _groups: Labels | None) -> ProbeResult:
    return linear_probe(*data, seeds=range(seeds), rates=(QUICK_RATE,), max_epochs=QUICK_EPOCHS)


def _attentive(data: Data, seeds: int, _groups: Labels | None) -> ProbeResult:
    return attentive_probe(*data, seeds=range(seeds))


def _knn(data: Data, _seeds: int, _groups: Labels | None) -> ProbeResult:
    return knn_probe(*data, k=min(10, len(data[1])))  # a reader's folder may have fewer images


METHODS: dict[str, Callable[[Data, int, Labels | None], ProbeResult]] = {
    "linear": _linear, "attentive": _attentive, "knn": _knn, "quick": _quick
}  # fmt: skip


def probe(
    encoded: Encoded, tasks: Sequence[Task], kind: str = "linear", readout: Readout | None = None, seeds: int = 1
) -> dict[str, ProbeResult]:
    """One probe, trained once and kept on disk, and its answers to each task's test images, by task.

    Args:
        encoded: the features.
        tasks: that share their train images.
        kind: of `METHODS`: `linear` (its settings chosen on held-out train images), `attentive`, `knn`, or `quick` (a
            linear layer at one fixed setting).
        readout: layer and pooling; None: the headline's, or the tokens for the attentive probe.
        seeds: probes, with seeds 0, 1, ...
    """
    readout = readout or (TOKENS if kind == "attentive" else encoded.headline)
    tests = [encoded.features(task.test, readout) for task in tasks]

    def make() -> dict[str, Any]:
        x, y = encoded.features(tasks[0].train, readout)
        test_x = tests[0][0] if len(tests) == 1 else np.concatenate([np.asarray(part) for part, _ in tests])
        data = x, y, test_x, np.concatenate([labels for _, labels in tests]), len(tasks[0].classes)
        return METHODS[kind](data, seeds, tasks[-1].groups)._asdict()

    whole, start, answers = kept(_path([encoded], tasks, [kind, list(readout), seeds], "npz"), make), 0, {}
    for task, (_, labels) in zip(tasks, tests, strict=True):
        mine = slice(start, start := start + len(labels))
        asked = {name: whole[name][:, mine] for name in ("predictions", "top1", "top5")}
        answers[task.name] = ProbeResult(**(whole | asked))
    return answers


def _path(features: Sequence[Encoded], tasks: Sequence[Task], what: list[Any], kind: str) -> Path:
    """Where the outcome of probes is kept: its name says what it depends on."""
    digest = hashlib.sha256()
    for task in tasks:
        for part in (task.train, task.test):
            digest.update(part.split.encode() + np.ascontiguousarray(part.labels).tobytes())
        digest.update(b"" if task.groups is None else np.ascontiguousarray(task.groups).tobytes())
    stores = [{split: store.folder.parts[-2:] for split, store in one.stores.items()} for one in features]
    key = hash_value([PROBES, stores, digest.hexdigest(), what])
    return features[0].stores[tasks[0].train.split].folder.parent / "probes" / f"{key}.{kind}"


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


def rows(
    encoded: Encoded, task: Task, kind: str, result: ProbeResult, readout: Readout | None = None
) -> list[dict[str, Any]]:
    """Rows of `01_probe_accuracy.csv`, for all pictures and for each kind: percent, 95 % intervals over both."""
    layer, pooling = readout or (TOKENS if kind == "attentive" else encoded.headline)
    found, kinds = [], encoded.kinds(task.test)
    for shown in dict.fromkeys(["all", *np.unique(kinds).tolist()]):
        chosen = np.ones(len(kinds), bool) if shown == "all" else kinds == shown
        top1, top5 = result.top1[:, chosen], result.top5[:, chosen]
        what = {"encoder": encoded.name, "labels": task.name, "kind": shown, "probe": kind}
        counts = {"n_train": len(task.train.labels), "n_test": top1.shape[1], "seeds": top1.shape[0]}
        where = {"layer": layer, "pooling": pooling}
        dim = {"dim": encoded.dims(task)[layer, pooling]}
        found.append(what | where | percent("top1", top1) | percent("top5", top5) | dim | counts)
    return found


def headline(features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int) -> tuple[pd.DataFrame, Answers]:
    """Three probes of every encoder at every level, and their answers."""
    every = list(tasks.values())
    jobs = [(one, every, kind, None, seeds) for kind in ("linear", "attentive", "knn") for one in features.values()]
    answers, table = {}, []
    for (one, _, kind, *_), by_level in zip(jobs, on_all_cores(probe, jobs), strict=True):
        for level, result in by_level.items():
            answers[one.name, level, kind] = result
            table += rows(one, tasks[level], kind, result)
    return pd.DataFrame(table), answers


def zero_shot(run: Run, features: Mapping[str, Encoded], tasks: Mapping[str, Task]) -> tuple[pd.DataFrame, Answers]:
    """CLIP's answers by prompts, where it knows the words of the classes' names."""
    answers, table = {}, []
    for level, task in tasks.items():
        if task.prompts and "clip" in features:
            texts = class_texts(probed_encoder(run, "clip"), task.prompts)
            result = zero_shot_probe(*features["clip"].features(task.test), texts)
            answers["clip", level, "zero_shot"] = result
            table += rows(features["clip"], task, "zero_shot", result)
    return pd.DataFrame(table), answers


def floor_rows(data: ClassificationData, features: Mapping[str, Encoded]) -> pd.DataFrame:
    """What instruments that learned nothing know: their nearest neighbours on the same images (some, of very many)."""
    stores, rng = next(iter(features.values())).stores, np.random.default_rng(0)
    rows = {name: np.sort(rng.permutation(store.kept)[:FLOOR_IMAGES]) for name, store in stores.items()}
    pictures, table = {name: squares(images, rows[name]) for name, images in data.splits.items()}, []
    for name, vectors_of in INSTRUMENTS.items():
        vectors = {split: vectors_of(images) for split, images in pictures.items()}
        for task in data.tasks.values():
            parts = [(vectors[part.split], part.labels[rows[part.split]]) for part in (task.train, task.test)]
            found = knn_probe(*parts[0], *parts[1], len(task.classes), k=min(10, len(parts[0][1])))
            table.append({"instrument": name, "labels": task.name, "probe": "knn", **percent("top1", found.top1)})
    return pd.DataFrame(table)


def layer_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the spatial mean of every layer: where in the network is the class?"""
    jobs = [(e, task, (layer, "mean")) for e in features.values() for layer in e.layers]
    depth = [(e.layers.index(layer) + 1) / len(e.layers) for e, _, (layer, _) in jobs]
    return _quick_rows(jobs).assign(depth=depth)


def pooling_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the output, of CLIP before its projection and of the trunk (`where`) under every pooling."""
    jobs, where = [], []
    for one in features.values():
        trunk = [layer for layer in one.layers if layer.startswith("block")][-1]
        names = {"final": "output", "before_projection": "before projection", trunk: "trunk"}
        chosen = [readout for readout in one.dims(task) if readout[0] in names and readout != TOKENS]
        jobs += [(one, task, readout) for readout in chosen]
        where += [names[layer] for layer, _ in chosen]
    return _quick_rows(jobs).assign(where=where)


def _quick_rows(jobs: Sequence[tuple[Encoded, Task, Readout]]) -> pd.DataFrame:
    results = on_all_cores(probe, [(e, [task], "quick", readout) for e, task, readout in jobs])
    found = zip(jobs, results, strict=True)
    return pd.DataFrame([rows(e, task, "quick", r[task.name], readout)[0] for (e, task, readout), r in found])


def few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    """Quick probes on 1, 2, 4 ... images of every class, as far as each has as many; each seed draws other images."""
    fewest = int(np.unique(task.train.labels, return_counts=True)[1].min())
    possible = [count for count in shots if count <= fewest]

    def make() -> pd.DataFrame:
        jobs = [(e, task, count, seeds) for e in features.values() for count in possible]
        found = zip(jobs, on_all_cores(_few_shot_hits, jobs), strict=True)
        what = [
            ({"encoder": e.name, "labels": task.name, "shots": n, "seeds": seeds}, hits) for (e, _, n, _), hits in found
        ]
        return pd.DataFrame([line | percent("top1", hits) for line, hits in what])

    return kept(_path(list(features.values()), [task], ["few shot", possible, seeds], "csv"), make)


def _few_shot_hits(encoded: Encoded, task: Task, count: int, seeds: int) -> NDArray[np.bool_]:
    """`(seeds, n)`: is the test image's class found?"""
    x, y, test_x, test_y, classes = encoded.data(task)
    hits = []
    for seed in range(seeds):
        few = few_shot_rows(y, count, seed)
        few_x = x.take(few) if isinstance(x, Column) else x[few]
        data = few_x, y[few], test_x, test_y, classes
        hits.append(linear_probe(*data, (seed,), (QUICK_RATE,), max_epochs=QUICK_EPOCHS).top1[0])
    return np.stack(hits)


def class_rows(answers: Answers, task: Task, test_y: Labels) -> pd.DataFrame:
    """The linear probes' top-1 of every class, percent: a column for each encoder, and how many test images."""
    linear = {name: its.top1 for (name, level, kind), its in answers.items() if (level, kind) == (task.name, "linear")}
    hits = pd.DataFrame({name: 100.0 * top1.mean(0) for name, top1 in linear.items()})
    by_class = hits.groupby(np.array(task.classes)[test_y], sort=False)
    return by_class.mean().assign(n_test=by_class.size()).rename_axis("class").reset_index()


# --------------------------------------------------------------------------------------------- the paper's protocol


def protocol_rows(
    run: Run, data: ClassificationData, features: Mapping[str, Encoded], task: Task, answers: Answers
) -> pd.DataFrame:
    """The paper's probing protocol with its choices given up one by one, for each of the paper's encoders.

    Each is also projected to the narrowest one's width, and given the paper's input, where either differs from its own;
    hundreds of thousands of images are not encoded again.
    """
    own = [one for name, one in features.items() if name in PAPER_PROBE]
    width = min(one.dims(task)[one.headline] for one in own)

    def make() -> pd.DataFrame:
        jobs = [
            (one, _paper_encoded(run, data, one), task, width, answers[one.name, task.name, "linear"]) for one in own
        ]
        return pd.DataFrame([row for rows_of in on_all_cores(_protocol, jobs) for row in rows_of])

    return kept(_path(own, [task], ["protocol"], "csv"), make)


def _paper_encoded(run: Run, data: ClassificationData, own: Encoded) -> Encoded | None:
    """The encoder's headline features of the paper's input; None where that is its own, or encoding takes days."""
    encoder = probed_encoder(run, own.name)
    changed = paper_input(encoder)
    few = max(len(images) for images in data.splits.values()) <= ENCODED_AGAIN
    return encode(run, data, changed, [own.headline]) if few and changed.preprocess != encoder.preprocess else None


def _protocol(own: Encoded, paper: Encoded | None, task: Task, width: int, sound: ProbeResult) -> list[dict[str, Any]]:
    data = own.data(task)
    found = training_changes(data, task.groups) | {("no normalisation", "swept, features standardised"): sound}
    if data[0].shape[1] > width:
        found["unequal widths", f"random projection to {width}"] = projected_probe(data, width, (0,))
    if paper is not None:
        result = linear_probe(*paper.data(task), seeds=(0,), groups=task.groups)
        found["the encoder's input", "the paper's"] = result
    words = ({"question": question, "setting": setting} for question, setting in found)
    return [word | rows(own, task, "linear", result)[0] for word, result in zip(words, found.values(), strict=True)]
