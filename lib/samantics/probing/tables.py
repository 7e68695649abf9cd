"""The tables of notebook 01: encode once, then probe every encoder, layer, level and number of shots."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
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
from samantics.models.preprocessing import IMAGENET, OPENAI, Preprocessing
from samantics.models.registry import Readout
from samantics.probing.features import Column, FeatureStore, encode_images
from samantics.probing.linear import Data, Labels, ProbeResult, linear_probe, paper_probe
from samantics.probing.probes import attentive_probe, class_texts, knn_probe, zero_shot_probe
from samantics.probing.similarity import INSTRUMENTS, squares
from samantics.run import Run, on_all_cores

PROBES = 3  # of what is kept; raised when the same probe would give other numbers
ENCODED_AGAIN = 100_000  # images of a split, at most, that are encoded again with another input
FLOOR_IMAGES = 20_000  # of a split, at most, that instruments without training look at
QUICK_RATE, QUICK_EPOCHS = 0.1, 20  # where many layers are compared, and where few images leave nothing to choose on
EPOCHS, LONG = 10, 50  # the paper's, and what asks whether they were enough
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

    def data(self, task: Task, readout: Readout | None = None) -> Data:
        """What every probe takes first: train features and labels, test features and labels, number of classes."""
        return *self.features(task.train, readout), *self.features(task.test, readout), len(task.classes)


def encode_all(run: Run, data: ClassificationData, names: Sequence[str]) -> dict[str, Encoded]:
    """Features of every encoder within reach: all layers, pooled all ways, in one pass; from disk on a rerun."""
    encoders = [probed_encoder(run, name) for name in within_reach(names, run.scale.weights)]
    for encoder in encoders:
        run.record(f"weights:{encoder.name}", encoder.weights_hash)
    for split, value in data.hashes.items():
        run.record(f"data:{split}", value)

    def work(encoder: Encoder) -> Encoded:
        readouts = [(layer, "mean") for layer in encoder.layers]
        readouts += [(layer, "cls") for layer in encoder.layers if encoder.has_class_token(layer)]
        return encode(run, data, encoder, [*readouts, TOKENS] + [("final", "object")] * bool(data.masks))

    # the zoo's are so small that a core each beats all cores together; official ones take 2.5 GB at a time
    zoo = run.scale.weights.startswith("zoo")
    found = on_all_cores(work, [(encoder,) for encoder in encoders]) if zoo else map(work, encoders)
    return {one.name: one for one in found}


def probed_encoder(run: Run, name: str) -> Encoder:
    """An encoder of the run's scale; in bfloat16 on a GPU, the zoo's (trained in it) wherever that saves time."""
    half = has_fast_half(run.device) and (run.scale.weights.startswith("zoo") or run.device == "cuda")
    return load_encoder(name, run.scale.weights, run.device, half=half)


def encode(run: Run, data: ClassificationData, encoder: Encoder, readouts: Sequence[Readout]) -> Encoded:
    """One encoder's features of every split."""
    folder, share, stores = run.cache / "features", data.max_unreadable, {}
    for split, images in data.splits.items():
        given = data.hashes[split], data.masks.get(split), folder
        stores[split] = encode_images(encoder, images, readouts, *given, max_unreadable=share)
    return Encoded(encoder.name, encoder.headline, encoder.layers, stores)


METHODS: dict[str, Callable[[Data, Sequence[int], Labels | None], ProbeResult]] = {  # of data, seeds, held-out groups
    "linear": lambda data, seeds, groups: linear_probe(*data, seeds=seeds, groups=groups),
    "attentive": lambda data, seeds, _: attentive_probe(*data, seeds=seeds),
    "knn": lambda data, *_: knn_probe(*data),
    "quick": lambda data, seeds, _: linear_probe(*data, seeds, (QUICK_RATE,), max_epochs=QUICK_EPOCHS),
}


def probe(
    encoded: Encoded, tasks: Sequence[Task], kind: str = "linear", readout: Readout | None = None, seeds: int = 1
) -> dict[str, ProbeResult]:
    """One probe (`kind`: of `METHODS`), kept on disk, and its answers to every task; tasks share their train images."""
    readout = readout or encoded.headline
    tests = [encoded.features(task.test, readout) for task in tasks]

    def make() -> dict[str, Any]:
        x, y = encoded.features(tasks[0].train, readout)
        test_x = tests[0][0] if len(tests) == 1 else np.concatenate([np.asarray(part) for part, _ in tests])
        data = x, y, test_x, np.concatenate([labels for _, labels in tests]), len(tasks[0].classes)
        return METHODS[kind](data, range(seeds), tasks[-1].groups)._asdict()

    whole, start, answers = kept(_path([encoded], tasks, [kind, list(readout), seeds], "npz"), make), 0, {}
    for task, (_, labels) in zip(tasks, tests, strict=True):
        mine = slice(start, start := start + len(labels))
        answers[task.name] = ProbeResult._make(whole[name][:, mine] for name in ProbeResult._fields)
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


def row(encoded: Encoded, task: Task, kind: str, result: ProbeResult, readout: Readout | None = None) -> dict[str, Any]:
    """A probe's row in the tables of notebook 01: percent, 95 % intervals."""
    x, y = encoded.features(task.train, readout)
    what: dict[str, Any] = {"encoder": encoded.name, "labels": task.name, "kind": "all", "probe": kind}
    what |= {"layer": x.readout[0], "pooling": x.readout[1]} | percent("top1", result.top1)
    seeds, n_test = result.top5.shape
    what |= percent("top5", result.top5) | {"dim": x.shape[1], "n_train": len(y)}
    return what | {"n_test": n_test, "seeds": seeds}


def by_kind(
    encoded: Encoded, task: Task, kind: str, result: ProbeResult, readout: Readout | None = None
) -> list[dict[str, Any]]:
    """Its `row` for all pictures, and for each kind of them."""
    rows = [row(encoded, task, kind, result, readout)]
    if task.test.kinds is not None:
        kinds = task.test.kinds[encoded.stores[task.test.split].kept]
        for shown in np.unique(kinds).tolist():
            of_kind = ProbeResult._make(part[:, kinds == shown] for part in result)
            rows.append(row(encoded, task, kind, of_kind, readout) | {"kind": shown})
    return rows


def headline(features: Mapping[str, Encoded], tasks: Mapping[str, Task], seeds: int) -> tuple[pd.DataFrame, Answers]:
    """Three probes of every encoder at every level, and their answers."""

    def work(one: Encoded, kind: str) -> tuple[Answers, list[dict[str, Any]]]:
        readout = TOKENS if kind == "attentive" else one.headline
        results = probe(one, list(tasks.values()), kind, readout, seeds)
        rows = [by_kind(one, tasks[level], kind, result, readout) for level, result in results.items()]
        return {(one.name, level, kind): result for level, result in results.items()}, list(itertools.chain(*rows))

    jobs = [(one, kind) for kind in ("linear", "attentive", "knn") for one in features.values()]
    answers, table = zip(*on_all_cores(work, jobs), strict=True)
    return pd.DataFrame(itertools.chain(*table)), {key: result for part in answers for key, result in part.items()}


def zero_shot(run: Run, features: Mapping[str, Encoded], tasks: Mapping[str, Task]) -> tuple[pd.DataFrame, Answers]:
    """CLIP's answers by prompts, where it knows the words of the classes' names."""
    clip, answers, table = features["clip"], {}, []
    for level, task in tasks.items():
        if task.prompts:
            texts = class_texts(probed_encoder(run, "clip"), task.prompts)
            answers["clip", level, "zero_shot"] = result = zero_shot_probe(*clip.features(task.test), texts)
            table += by_kind(clip, task, "zero_shot", result)
    return pd.DataFrame(table), answers


def floor_rows(data: ClassificationData, features: Mapping[str, Encoded]) -> pd.DataFrame:
    """What instruments that learned nothing know: their nearest neighbours on the same images (some, of very many)."""
    first, rng = next(iter(features.values())), np.random.default_rng(0)
    few = {name: np.sort(rng.permutation(store.kept)[:FLOOR_IMAGES]) for name, store in first.stores.items()}

    def make() -> pd.DataFrame:
        pictures = {name: squares(images, few[name]) for name, images in data.splits.items()}

        def work(instrument: str) -> list[dict[str, Any]]:
            vectors, table = {split: INSTRUMENTS[instrument](images) for split, images in pictures.items()}, []
            for task in data.tasks.values():
                parts = [(vectors[part.split], part.labels[few[part.split]]) for part in (task.train, task.test)]
                hits = percent("top1", knn_probe(*parts[0], *parts[1], len(task.classes)).top1)
                table.append({"instrument": instrument, "labels": task.name, "probe": "knn", **hits})
            return table

        return pd.DataFrame(itertools.chain(*on_all_cores(work, [(name,) for name in INSTRUMENTS])))

    return kept(_path([first], list(data.tasks.values()), ["floors", FLOOR_IMAGES], "csv"), make)


def layer_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the spatial mean of every layer: where in the network is the class?"""
    jobs = [(one, task, (layer, "mean")) for one in features.values() for layer in one.layers]
    depth = [(one.layers.index(layer) + 1) / len(one.layers) for one, _, (layer, _) in jobs]
    return pd.DataFrame(on_all_cores(_quick_row, jobs)).assign(depth=depth)


def pooling_rows(features: Mapping[str, Encoded], task: Task) -> pd.DataFrame:
    """Quick probes of the output, of CLIP before its projection and of the trunk (`where`) under every pooling."""
    jobs, where = [], []
    for one in features.values():
        trunk = [layer for layer in one.layers if layer.startswith("block")][-1]
        names = {"final": "output", "before_projection": "before projection", trunk: "trunk"}
        stored = one.stores[task.train.split].dims
        chosen = [readout for readout in stored if readout[0] in names and readout != TOKENS]
        jobs += [(one, task, readout) for readout in chosen]
        where += [names[layer] for layer, _ in chosen]
    return pd.DataFrame(on_all_cores(_quick_row, jobs)).assign(where=where)


def _quick_row(one: Encoded, task: Task, readout: Readout) -> dict[str, Any]:
    return row(one, task, "quick", probe(one, [task], "quick", readout)[task.name], readout)


def few_shot(features: Mapping[str, Encoded], task: Task, shots: Sequence[int], seeds: int) -> pd.DataFrame:
    """Quick probes on 1, 2, 4 ... images of every class, as far as each has as many; each seed draws other images."""
    fewest = min(np.unique(one.features(task.train)[1], return_counts=True)[1].min() for one in features.values())
    possible = [count for count in shots if count <= fewest]

    def work(one: Encoded, count: int) -> dict[str, Any]:
        (x, y), test, hits = one.features(task.train), one.features(task.test), []
        members = [np.flatnonzero(y == label) for label in np.unique(y)]
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            few = np.sort(np.concatenate([rng.choice(rows, count, replace=False) for rows in members]))
            data = x.take(few), y[few], *test, len(task.classes)
            hits.append(METHODS["quick"](data, (seed,), None).top1[0])
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


def training_changes(data: Data, groups: Labels | None = None) -> dict[tuple[str, str], ProbeResult]:
    """The paper's probe, and what changes as its choices are given up one by one: results by question and setting."""
    course = paper_probe(*data, epochs=LONG)
    best = max(course[:EPOCHS], key=lambda result: float(result.top1.mean()))
    swept = linear_probe(*data, seeds=(0,), standardise=False, groups=groups)
    return {
        ("the paper's protocol", f"{EPOCHS} epochs, best on the reported split"): best,
        ("selection on the reported split", f"{EPOCHS} epochs, the last"): course[EPOCHS - 1],
        ("under-training", f"{LONG} epochs, the last"): course[-1],
        ("one learning rate for all", "swept, features as they are"): swept,
    }


def projected_probe(data: Data, width: int) -> ProbeResult:
    """The sound probe of features projected to `width` by a Gaussian matrix, which keeps lengths on average."""
    x, y, test_x, test_y, classes = data
    rng = np.random.default_rng([0, x.shape[1], width])
    matrix = (rng.normal(size=(x.shape[1], width)) / np.sqrt(width)).astype(np.float32)
    return linear_probe(x @ matrix, y, test_x @ matrix, test_y, classes, seeds=(0,))


def input_variants(name: str) -> dict[str, dict[str, Any]]:
    """What the paper's code does to an encoder's input, as changes of a zoo model's `Preprocessing`: by setting."""
    if name == "clip":
        return {"its own colour statistics": {}, "another's": dict(zip(("mean", "std"), OPENAI, strict=True))}
    shapes = {"pictures of 3:4, padded": {"fit": "pad"}, "pictures of 3:4, squashed": {"fit": "squash"}}
    return shapes if name in ("sam", "sam2") else {}


def paper_input(own: Preprocessing) -> Preprocessing:
    """The paper's input of an encoder: ImageNet's colour statistics for all, squashed where it would be padded."""
    return dataclasses.replace(own, mean=IMAGENET[0], std=IMAGENET[1], fit="squash" if own.fit == "pad" else own.fit)


def protocol_rows(
    run: Run, data: ClassificationData, features: Mapping[str, Encoded], task: Task, answers: Answers
) -> pd.DataFrame:
    """The paper's probing protocol with its choices given up one by one, for each of the paper's encoders.

    Each is also projected to the narrowest one's width, and given the paper's input, where either differs from its own.
    """
    own = [one for name, one in features.items() if name in PAPER_PROBE]
    width = min(one.features(task.train)[0].shape[1] for one in own)

    def work(one: Encoded, paper: Encoded | None) -> list[dict[str, Any]]:
        asked = one.data(task)
        found = training_changes(asked, task.groups)
        found["no normalisation", "swept, features standardised"] = answers[one.name, task.name, "linear"]
        if asked[0].shape[1] > width:
            found["unequal widths", f"random projection to {width}"] = projected_probe(asked, width)
        if paper is not None:
            of_paper = linear_probe(*paper.data(task), seeds=(0,), groups=task.groups)
            found["the encoder's input", "the paper's"] = of_paper
        rows = ({"question": question, "setting": setting} for question, setting in found)
        return [words | row(one, task, "linear", result) for words, result in zip(rows, found.values(), strict=True)]

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
        words = {"question": f"the encoder's input ({len(task.classes)} classes)", "setting": setting}
        return words | _quick_row(one, task, own.headline)

    jobs = [(name, *variant) for name in PAPER_PROBE for variant in input_variants(name).items()]
    return pd.DataFrame(on_all_cores(work, jobs))


def _paper_encoded(run: Run, data: ClassificationData, own: Encoded) -> Encoded | None:
    """The encoder's headline features of the paper's input; None where that is its own, or encoding takes days."""
    encoder = probed_encoder(run, own.name)
    changed = dataclasses.replace(encoder, preprocess=paper_input(encoder.preprocess))
    few = max(len(images) for images in data.splits.values()) <= ENCODED_AGAIN
    return encode(run, data, changed, [own.headline]) if few and changed != encoder else None
