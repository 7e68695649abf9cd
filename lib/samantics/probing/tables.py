"""The tables of notebook 01: encode once, then probe every encoder, layer, level and number of shots."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samantics.cache import hash_value, kept
from samantics.data.classification import ClassificationData, Part, Task, some_classes
from samantics.metrics.claims import PAPER_PROBE
from samantics.metrics.intervals import bootstrap_mean
from samantics.models.encoder import Encoder, has_fast_half, load_encoder, within_reach
from samantics.models.registry import Readout
from samantics.mojiworld.floors import INSTRUMENTS
from samantics.probing.attentive import attentive_probe
from samantics.probing.features import Column, FeatureStore, encode_images
from samantics.probing.knn import knn_probe
from samantics.probing.linear import Labels, ProbeResult, few_shot_rows, linear_probe
from samantics.probing.protocol import Data, input_variants, paper_input, projected_probe, training_changes
from samantics.probing.similarity import squares
from samantics.probing.zero_shot import class_texts, zero_shot_probe
from samantics.run import Run, on_all_cores

PROBES = 3  # of what is kept; raised when the same probe would give other numbers
ENCODED_AGAIN = 100_000  # images of a split, at most, that are encoded again with another input
FLOOR_IMAGES = 20_000  # of a split, at most, that instruments without training look at
QUICK_RATE, QUICK_EPOCHS = 0.1, 20  # where many layers are compared, and where few images leave nothing to choose on
TOKENS = ("final", "tokens")
Answers = dict[tuple[str, str, str], ProbeResult]  # by encoder, level and probe


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Stored features of one encoder."""

    name: str
    headline: Readout  # layer and pooling of its row in the paper's table
    layers: tuple[str, ...]  # from input to output
    stores: Mapping[str, FeatureStore]  # by split

    def features(self, part: Part, readout: Readout | None = None) -> tuple[Column, Labels]:
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
    encoders = [probed_encoder(run, name) for name in within_reach(names, run.scale.weights)]
    for encoder in encoders:
        run.record(f"weights:{encoder.name}", encoder.weights_hash)
    for split, value in data.hashes.items():
        run.record(f"data:{split}", value)
    # the zoo's are so small that a core each beats all cores together; official ones take 2.5 GB at a time
    each = on_all_cores if run.scale.weights.startswith("zoo") else lambda work, jobs: [work(*job) for job in jobs]
    return {one.name: one for one in each(_encode_all_ways, [(run, data, encoder) for encoder in encoders])}


def _encode_all_ways(run: Run, data: ClassificationData, encoder: Encoder) -> Encoded:
    readouts = [(layer, "mean") for layer in encoder.layers]
    readouts += [(layer, "cls") for layer in encoder.layers if encoder.has_class_token(layer)]
    return encode(run, data, encoder, [*readouts, TOKENS] + [("final", "object")] * bool(data.masks))


def probed_encoder(run: Run, name: str) -> Encoder:
    """An encoder of the run's scale; in bfloat16 on a GPU, the zoo's (trained in it) wherever that saves time."""
    half = has_fast_half(run.device) and (run.scale.weights.startswith("zoo") or run.device == "cuda")
    return load_encoder(name, run.scale.weights, run.device, half=half)


def encode(run: Run, data: ClassificationData, encoder: Encoder, readouts: Sequence[Readout]) -> Encoded:
    """One encoder's features of every split."""
    folder, stores = run.cache / "features", {}
    for split, images in data.splits.items():
        stores[split] = encode_images(
            encoder, images, readouts, data.hashes[split], data.masks.get(split), folder,
            max_unreadable=data.max_unreadable,
        )  # fmt: skip
    return Encoded(encoder.name, encoder.headline, encoder.layers, stores)


# ---------------------------------------------------------------------------------------------------- one probe


METHODS: dict[str, Callable[[Data, int, Labels | None], ProbeResult]] = {  # of data, seeds and what is held out
    "linear": lambda data, seeds, groups: linear_probe(*data, seeds=range(seeds), groups=groups),
    "attentive": lambda data, seeds, _: attentive_probe(*data, seeds=range(seeds)),
    "knn": lambda data, _seeds, _groups: knn_probe(*data, k=min(10, len(data[1]))),  # a reader's folder may have fewer
    "quick": lambda data, seeds, _: linear_probe(
        *data, seeds=range(seeds), rates=(QUICK_RATE,), max_epochs=QUICK_EPOCHS
    ),
}


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


# --------------------------------------------------------------------------------------------------------- tables


def percent(name: str, hits: NDArray[np.bool_]) -> dict[str, float]:
    """`name`, `name_low`, `name_high`: the mean of `(seeds, n)` hits in percent with its 95 % interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), bootstrap_mean(100.0 * hits), strict=True))


def row(
    encoded: Encoded, task: Task, kind: str, result: ProbeResult, readout: Readout | None = None, shown: str = "all"
) -> dict[str, Any]:
    """A probe's row in the tables of notebook 01, for one kind of picture: percent, 95 % intervals."""
    layer, pooling = readout or (TOKENS if kind == "attentive" else encoded.headline)
    chosen = (encoded.kinds(task.test) == shown) | (shown == "all")
    top1, top5 = result.top1[:, chosen], result.top5[:, chosen]
    what: dict[str, Any] = {"encoder": encoded.name, "labels": task.name, "kind": shown, "probe": kind}
    what |= {"layer": layer, "pooling": pooling} | percent("top1", top1) | percent("top5", top5)
    what |= {"dim": encoded.dims(task)[layer, pooling], "n_train": len(task.train.labels)}
    return what | {"n_test": top1.shape[1], "seeds": top1.shape[0]}


def by_kind(encoded: Encoded, task: Task, kind: str, result: ProbeResult) -> list[dict[str, Any]]:
    """Its `row` for all pictures, and for each kind of them."""
    kinds = dict.fromkeys(["all", *np.unique(encoded.kinds(task.test)).tolist()])
    return [row(encoded, task, kind, result, shown=shown) for shown in kinds]


def headline(features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int) -> tuple[pd.DataFrame, Answers]:
    """Three probes of every encoder at every level, and their answers."""

    def work(one: Encoded, kind: str) -> tuple[Answers, list[dict[str, Any]]]:
        results = probe(one, list(tasks.values()), kind, None, seeds)
        answers = {(one.name, level, kind): result for level, result in results.items()}
        return answers, [line for name, result in results.items() for line in by_kind(one, tasks[name], kind, result)]

    jobs = [(one, kind) for kind in ("linear", "attentive", "knn") for one in features.values()]
    answers, table = zip(*on_all_cores(work, jobs), strict=True)
    return pd.DataFrame(itertools.chain(*table)), {key: result for part in answers for key, result in part.items()}


def zero_shot(run: Run, features: Mapping[str, Encoded], tasks: Mapping[str, Task]) -> tuple[pd.DataFrame, Answers]:
    """CLIP's answers by prompts, where it knows the words of the classes' names."""
    answers, table = {}, []
    for level, task in tasks.items():
        if task.prompts and "clip" in features:
            texts = class_texts(probed_encoder(run, "clip"), task.prompts)
            result = zero_shot_probe(*features["clip"].features(task.test), texts)
            answers["clip", level, "zero_shot"] = result
            table += by_kind(features["clip"], task, "zero_shot", result)
    return pd.DataFrame(table), answers


def floor_rows(data: ClassificationData, features: Mapping[str, Encoded]) -> pd.DataFrame:
    """What instruments that learned nothing know: their nearest neighbours on the same images (some, of very many)."""
    first, rng = next(iter(features.values())), np.random.default_rng(0)
    few = {name: np.sort(rng.permutation(store.kept)[:FLOOR_IMAGES]) for name, store in first.stores.items()}

    def make() -> pd.DataFrame:
        pictures = {name: squares(images, few[name]) for name, images in data.splits.items()}
        found = on_all_cores(functools.partial(_floor, data.tasks.values(), pictures, few), [(n,) for n in INSTRUMENTS])
        return pd.DataFrame(itertools.chain(*found))

    return kept(_path([first], list(data.tasks.values()), ["floors", FLOOR_IMAGES], "csv"), make)


def _floor(
    tasks: Iterable[Task], pictures: Mapping[str, Any], few: Mapping[str, NDArray[np.int64]], name: str
) -> list[dict[str, Any]]:
    vectors, table = {split: INSTRUMENTS[name](images) for split, images in pictures.items()}, []
    for task in tasks:
        parts = [(vectors[part.split], part.labels[few[part.split]]) for part in (task.train, task.test)]
        found = knn_probe(*parts[0], *parts[1], len(task.classes), k=min(10, len(parts[0][1])))
        table.append({"instrument": name, "labels": task.name, "probe": "knn", **percent("top1", found.top1)})
    return table


def layer_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the spatial mean of every layer: where in the network is the class?"""
    jobs = [(e, (layer, "mean")) for e in features.values() for layer in e.layers]
    depth = [(e.layers.index(layer) + 1) / len(e.layers) for e, (layer, _) in jobs]
    return _quick_rows(jobs, task).assign(depth=depth)


def pooling_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the output, of CLIP before its projection and of the trunk (`where`) under every pooling."""
    jobs, where = [], []
    for one in features.values():
        trunk = [layer for layer in one.layers if layer.startswith("block")][-1]
        names = {"final": "output", "before_projection": "before projection", trunk: "trunk"}
        chosen = [readout for readout in one.dims(task) if readout[0] in names and readout != TOKENS]
        jobs += [(one, readout) for readout in chosen]
        where += [names[layer] for layer, _ in chosen]
    return _quick_rows(jobs, task).assign(where=where)


def _quick_rows(jobs: Sequence[tuple[Encoded, Readout]], task: Task) -> pd.DataFrame:
    def work(one: Encoded, readout: Readout) -> dict[str, Any]:
        return row(one, task, "quick", probe(one, [task], "quick", readout)[task.name], readout)

    return pd.DataFrame(on_all_cores(work, jobs))


def few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    """Quick probes on 1, 2, 4 ... images of every class, as far as each has as many; each seed draws other images."""
    fewest = int(np.unique(task.train.labels, return_counts=True)[1].min())
    possible = [count for count in shots if count <= fewest]

    def work(one: Encoded, count: int) -> dict[str, Any]:
        (x, y), test, hits = one.features(task.train), one.features(task.test), []
        for seed in range(seeds):
            few = few_shot_rows(y, count, seed)
            data = x.take(few), y[few], *test, len(task.classes)
            hits.append(linear_probe(*data, (seed,), (QUICK_RATE,), max_epochs=QUICK_EPOCHS).top1[0])
        what = {"encoder": one.name, "labels": task.name, "shots": count, "seeds": seeds}
        return what | percent("top1", np.stack(hits))

    jobs = [(one, count) for one in features.values() for count in possible]
    path = _path(list(features.values()), [task], ["few shot", possible, seeds], "csv")
    return kept(path, lambda: pd.DataFrame(on_all_cores(work, jobs)))


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

    def work(one: Encoded, paper: Encoded | None) -> list[dict[str, Any]]:
        found = training_changes(one.data(task), task.groups)
        found["no normalisation", "swept, features standardised"] = answers[one.name, task.name, "linear"]
        if one.dims(task)[one.headline] > width:
            found["unequal widths", f"random projection to {width}"] = projected_probe(one.data(task), width)
        if paper is not None:
            result = linear_probe(*paper.data(task), seeds=(0,), groups=task.groups)
            found["the encoder's input", "the paper's"] = result
        words = ({"question": question, "setting": setting} for question, setting in found)
        return [word | row(one, task, "linear", result) for word, result in zip(words, found.values(), strict=True)]

    def make() -> pd.DataFrame:
        jobs = [(one, _paper_encoded(run, data, one)) for one in own]
        return pd.DataFrame(itertools.chain(*on_all_cores(work, jobs)))

    return kept(_path(own, [task], ["protocol"], "csv"), make)


def input_rows(run: Run, data: ClassificationData, step: int = 8) -> pd.DataFrame:
    """Rows like `protocol_rows`', of the zoo with the inputs of `input_variants`: quick probes, every `step`-th class.

    MojiWorld's pictures are square, so that nothing of them is squashed: their middle three quarters are taken there.
    """
    side = np.asarray(next(iter(data.splits.values()))[0]).shape[1]
    few = {width: some_classes(data, step, width) for width in (side, side * 3 // 4)}

    def work(name: str, setting: str, change: dict[str, Any]) -> dict[str, Any]:
        own, asked = probed_encoder(run, name), few[side * 3 // 4 if "fit" in change else side]
        changed = dataclasses.replace(own, preprocess=dataclasses.replace(own.preprocess, **change))
        (task,) = asked.tasks.values()
        one = encode(run, asked, changed, [own.headline])
        found = row(one, task, "quick", probe(one, [task], "quick")[task.name])
        return {"question": f"the encoder's input ({len(task.classes)} classes)", "setting": setting} | found

    jobs = [(name, *variant) for name in PAPER_PROBE for variant in input_variants(name).items()]
    return pd.DataFrame(on_all_cores(work, jobs))


def _paper_encoded(run: Run, data: ClassificationData, own: Encoded) -> Encoded | None:
    """The encoder's headline features of the paper's input; None where that is its own, or encoding takes days."""
    encoder = probed_encoder(run, own.name)
    changed = paper_input(encoder)
    few = max(len(images) for images in data.splits.values()) <= ENCODED_AGAIN
    return encode(run, data, changed, [own.headline]) if few and changed.preprocess != encoder.preprocess else None
