"""What notebook 02 computes once and keeps: data, maps and tokens, the training's batches, detections, tables.

Everything slow lies in the run's cache under a hash of all that it depends on. `tune` trains by itself, on one or more
processes (`python -m samantics tune`, under `torchrun` too); the notebook then finds the trained model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from samantics.cache import Checkpoint, hash_value, kept
from samantics.data.coco import CocoDataset
from samantics.data.detection import load_data, scenes
from samantics.errors import StudyError
from samantics.incontext.adapters import adapted
from samantics.incontext.evaluation import (
    ASKED_ALL,
    COMPARED,
    VARIANTS,
    Answers,
    answered,
    class_embeddings,
    questions_of,
)
from samantics.incontext.model import InContextModel, build_model, with_adapters
from samantics.incontext.tokens import SamData, live_maps, object_arrays, object_features, stored_maps
from samantics.incontext.training import AdaptedSampler, BatchSampler, Split, draw_references, split_categories, train
from samantics.models.encoder import Encoder, load_encoder
from samantics.run import Run, own_data, start_run
from samantics.scales import InContextSettings
from samantics.training_free.mask_features import reference_features

FORMAT = 4  # of what is cached; raised when the same settings would give other numbers
APART = 0.6  # of the steps, the fuser is tuned alone; for the rest once with frozen SAM, once with adapters in it
OTHERS = ("dinov2", "clip")  # whose features are measured at the same place
PER_CATEGORY = 40  # reference objects of a category whose class structure is measured
WITHOUT_EFFECT = (  # settings that the trained weights do not depend on
    "store_features", "top", "min_score", "shots", "reference_seeds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class InContextStudy:
    """Data and frozen SAM of a run, and where its results are kept."""

    run: Run
    encoder: Encoder  # SAM
    split: Split
    tuning: SamData  # what the model is trained on; only objects of base categories are labelled there
    references: SamData  # what references are drawn from in the test
    targets: SamData  # the test images
    identity: dict[str, Any]  # what the trained model depends on, by name

    @property
    def settings(self) -> InContextSettings:
        """Of the run's scale."""
        return self.run.scale.incontext

    def sampler(self, model: InContextModel) -> BatchSampler:
        """The training's batches, as the model sees them."""
        fields = (self.tuning, self.split.base, self.encoder.image_size, self.settings, self.run.seed)
        if model.adapters is None:
            return BatchSampler(*fields)
        return AdaptedSampler(*fields, sam=self.encoder.model, adapters=model.adapters)

    def halves(self, model: InContextModel) -> tuple[range, range]:
        """The training's steps before and after `APART`, where adapters may come in."""
        steps = self.sampler(model).steps
        return range(round(APART * steps)), range(round(APART * steps), steps)

    def untrained(self) -> InContextModel:
        """The model before tuning."""
        return build_model(self.settings, self.encoder.model, len(self.split.base), self.run.seed)

    def tuned(self) -> tuple[InContextModel, pd.DataFrame]:
        """The trained model, and the loss curve of the last part of its training (see `train`)."""
        model = self.untrained()
        start, rest = self.halves(model)
        train(model, self.sampler(model), self.checkpoint("start"), start)
        return train(model, self.sampler(model), self.checkpoint("fuser"), rest)

    def adapted(self, model: InContextModel) -> InContextModel:
        """A copy of the model with adapters in SAM's trunk that do nothing yet."""
        settings, sam = self.settings, self.encoder.model
        return with_adapters(model, sam, settings.trunk_maps, settings.adapters, self.run.seed)

    def checkpoint(self, part: str) -> Checkpoint:
        """Where a part of the training is saved, and resumed from: `start`, `fuser` or `adapters`."""
        return Checkpoint(self._folder / f"{part}_{hash_value(self.identity)}.pt", self.identity)

    def reference_rows(self, shots: int, seed: int = 0) -> NDArray[np.int64]:
        """`(C, shots)` rows of randomly drawn reference objects for the categories of `split.all`."""
        return draw_references(self.references.objects, self.split.all, shots, seed, self.settings.min_reference_area)

    def kept(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table kept under that name for this study, else made and kept."""
        return kept(self._folder / f"{name}_{hash_value(self._key)}.csv", make)

    @property
    def _folder(self) -> Path:
        return self.run.cache / "incontext"

    @property
    def _key(self) -> list[Any]:
        data = [part.dataset.hash for part in (self.references, self.targets)]
        return [self.identity, *data, dataclasses.asdict(self.settings)]

    def evaluate(self, model: InContextModel) -> Answers:
        """Ask the targets in every way, for all shots and seeds of the settings: computed once, then read."""
        return self._asked(model, VARIANTS, self.settings.shots)

    def compare(self, model: InContextModel) -> Answers:
        """Ask the targets with right and wrong references, with the most shots: computed once, then read."""
        return self._asked(model, (*COMPARED, "all_classes"), (max(self.settings.shots),))

    def cost(self, model: InContextModel, seconds: float) -> dict[str, float]:
        """What a trained model costs: `tuning_seconds`, `image_seconds` (all classes, with encoding), `images`.

        `images` are those that are asked for all classes.
        """
        few, sam, draw = self.targets.dataset.first(5), self.encoder.model, (max(self.settings.shots), 0)
        data = self.targets._replace(dataset=few, maps=functools.partial(live_maps, sam, few, self.settings.trunk_maps))
        data = data if model.adapters is None else adapted(data, sam, model.adapters)
        embeddings = {draw: class_embeddings(model, self.references.tokens, self.reference_rows(*draw))}
        started = time.perf_counter()
        answered(model, data, embeddings, self.split, ("all_classes",), self.settings)
        each = (time.perf_counter() - started) / len(few.images)
        asked = len(self.targets.dataset.first(ASKED_ALL).images)
        return {"tuning_seconds": seconds, "image_seconds": each, "images": asked}

    def _asked(self, model: InContextModel, variants: tuple[str, ...], shots: Sequence[int]) -> Answers:
        draws, sam = list(itertools.product(sorted(shots), range(self.settings.reference_seeds))), self.encoder.model

        def compute() -> dict[str, NDArray[Any]]:
            rows, known, targets = {draw: self.reference_rows(*draw) for draw in draws}, self.references, self.targets
            if model.adapters is not None:
                known = adapted(known, sam, model.adapters, np.unique(list(rows.values())))
                targets = adapted(targets, sam, model.adapters)
            embeddings = {draw: class_embeddings(model, known.tokens, rows[draw]) for draw in draws}
            found = answered(model, targets, embeddings, self.split, variants, self.settings)
            return {name: np.asarray(found[name]) for name in found}

        key = [self._key, variants, model.adapters is not None]
        found = pd.DataFrame(kept(self._folder / f"detections_{hash_value(key)}.npz", compute))
        asked = questions_of(self.targets.dataset, self.split, variants, draws)
        return Answers(self.targets.dataset, self.split, self.encoder.image_size, asked, found)

    def points(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The objects whose class structure is measured, of the references and of the targets.

        Columns `row, category_id, split, artists`; of the references at most `PER_CATEGORY` of a category (the first),
        of the targets those whose category has references.
        """
        tables = []
        for part in (self.references, self.targets):
            rows = np.flatnonzero(part.objects.reference_candidates(self.settings.min_reference_area))
            table = pd.DataFrame({"row": rows, "category_id": part.objects.categories[rows]})
            table["split"] = np.where(table["category_id"].isin(self.split.base), "base", "novel")
            tables.append(table.assign(artists=[part.dataset.instances[row].split or "all" for row in rows]))
        references, targets = tables
        references = references[references.groupby("category_id").cumcount() < PER_CATEGORY]
        targets = targets[targets["category_id"].isin(references["category_id"])]
        return references.reset_index(drop=True), targets.reset_index(drop=True)

    def spaces(self, model: InContextModel) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """By stage the features of the objects of `points`: of the references, and of the targets.

        `before` and `after` the MLP; `planted`: before it, with a random code of its class added to every object, as
        large as the tokens' own spread; `maps`, `dinov2`, `clip`: an encoder's last map, averaged over its mask.
        """
        parts, points = (self.references, self.targets), self.points()
        tokens = [part.tokens[table["row"]].astype(np.float32) for part, table in zip(parts, points, strict=True)]
        device, rng = self.encoder.device, np.random.default_rng(self.run.seed)
        with torch.no_grad():
            after = [model.fuser(torch.from_numpy(one).to(device)).numpy(force=True) for one in tokens]
        before = [one.reshape(len(one), -1) for one in tokens]
        codes = rng.normal(scale=before[0].std(), size=(len(self.split.all), before[0].shape[1])).astype(np.float32)
        planted = [
            one + codes[np.searchsorted(self.split.all, table["category_id"])]
            for one, table in zip(before, points, strict=True)
        ]
        found = {"before": before, "after": after, "planted": planted} | self._mean_features(points)
        return {stage: (known, asked) for stage, (known, asked) in found.items()}

    def _mean_features(self, points: Sequence[pd.DataFrame]) -> dict[str, list[NDArray[np.float32]]]:
        others = {name: load_encoder(name, self.run.scale.weights, self.run.device) for name in OTHERS}
        for name, encoder in others.items():
            self.run.record(f"{name}_weights", encoder.weights_hash)
        found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in ("maps", *OTHERS)}
        for part, table in zip((self.references, self.targets), points, strict=True):
            objects = [part.dataset.instances[row] for row in table["row"]]
            vectors = reference_features(
                {"maps": self.encoder, **others}, part.dataset, objects, self._folder / "mask_features"
            )
            for name in found:
                found[name].append(np.stack([vectors[name][i.id] for i in objects]))
        return found


def with_settings(run: Run, **settings: Any) -> Run:
    """The same run with other values of `InContextSettings`."""
    incontext = dataclasses.replace(run.scale.incontext, **settings)
    return dataclasses.replace(run, scale=dataclasses.replace(run.scale, incontext=incontext))


def load_study(
    run: Run, references: str = "", targets: str = "", images: str = "", weights: str = ""
) -> InContextStudy:
    """Data and SAM of a run, with SAM's maps and mask tokens, which are computed now if they are not kept.

    Args:
        references, targets, images: COCO files and their images instead of MojiWorld's scenes; the references are then
            also what is tuned on.
        weights: of SAM, others than the scale's (see `load_encoder`).

    Raises:
        StudyError: bad or missing files; a novel category that the data does not have.
    """
    run = own_data(run) if references else run
    settings, encoder = run.scale.incontext, load_encoder("sam", weights or run.scale.weights, run.device, run.seed)
    run.record("sam_weights", encoder.weights_hash)
    data = load_data(run, references, targets, images)
    tuning = data.references
    if settings.train_scenes and not references:
        tuning = scenes(run, "tuning", settings.train_scenes)
    run.record("tuning_data", tuning.hash)
    if not tuning.categories.items() <= data.targets.categories.items():
        raise StudyError(f"{tuning.path} and {data.targets.path} have different categories: use one list in both")
    split = split_categories(data.targets, settings.novel)
    of_tuning = {name: value for name, value in dataclasses.asdict(settings).items() if name not in WITHOUT_EFFECT}
    identity = {
        "format": FORMAT,
        "base": list(split.base),
        "data": tuning.hash,
        "sam": encoder.weights_hash,
        "seed": run.seed,
        "settings": of_tuning,
    }
    tuned, known, asked = (sam_data(run, encoder, part) for part in (tuning, data.references, data.targets))
    return InContextStudy(run, encoder, split, tuned, known, asked, identity)


def sam_data(run: Run, encoder: Encoder, dataset: CocoDataset) -> SamData:
    """A data set as SAM sees it: maps, and mask tokens of its objects, computed now if they are not kept."""
    settings, folder, sam = run.scale.incontext, run.cache / "incontext", encoder.model
    if settings.store_features:
        maps = stored_maps(sam, dataset, settings.trunk_maps, encoder.weights_hash, folder)
    else:
        maps = functools.partial(live_maps, sam, dataset, settings.trunk_maps)
    objects = object_arrays(dataset, encoder.image_size)
    key = hash_value([FORMAT, dataset.hash, encoder.weights_hash, settings.trunk_maps])
    return SamData(dataset, maps, objects, *object_features(sam, maps, objects, folder / f"tokens_{key}.npz"))


def tune(
    scale: str, references: str = "", targets: str = "", images: str = "", weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Train the model of notebook 02 by itself, under `torchrun` on all its processes; a line of time and peak memory.

    Arguments as of `load_study`; `settings` are values of `InContextSettings` other than the scale's.
    """
    if shared := int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run = with_settings(start_run(scale, "02_in_context"), **(settings or {}))
        study = load_study(run, references, targets, images, weights)
        started = time.perf_counter()
        _, curve = study.tuned()
        seconds, steps, loss = time.perf_counter() - started, int(curve["step"].max()) + 1, curve["loss"].iloc[-1]
        host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = torch.cuda.max_memory_allocated() if run.device == "cuda" else host
        line = f"{steps} steps, {seconds / steps:.2f} s each, peak memory {used / 2**30:.1f} GiB; loss {loss:.3f}\n"
        return "" if shared and dist.get_rank() > 0 else line
    finally:
        if shared:
            dist.destroy_process_group()
