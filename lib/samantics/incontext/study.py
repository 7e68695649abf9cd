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
from samantics.incontext.evaluation import Draw, DrawDetections, class_embeddings, detect_draws
from samantics.incontext.model import InContextModel, build_model
from samantics.incontext.tokens import SamData, live_maps, object_arrays, object_tokens, planted_part, stored_maps
from samantics.incontext.training import BatchSampler, Split, draw_references, split_categories, train
from samantics.models.encoder import Encoder, load_encoder
from samantics.run import Run, own_data, start_run
from samantics.scales import InContextSettings
from samantics.training_free.mask_features import reference_features

FORMAT = 1  # of what is cached; raised when the same settings would give other numbers
PER_CATEGORY = 40  # reference objects of a category whose class structure is measured
WITHOUT_EFFECT = (  # settings that the trained weights do not depend on
    "test_scenes", "store_features", "top", "min_score", "shots", "reference_seeds", "control_epochs",
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

    def sampler(self) -> BatchSampler:
        """The training's batches."""
        part, size = self.tuning, self.encoder.image_size
        return BatchSampler(part.maps, part.objects, part.tokens, self.split.base, size, self.settings, self.run.seed)

    def checkpoint(self) -> Checkpoint:
        """Where the training is saved, and resumed from."""
        name = "control" if "control" in self.identity else "model"
        return Checkpoint(self._folder / f"{name}_{hash_value(self.identity)}.pt", self.identity)

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

    def evaluate(self, model: InContextModel, draws: Sequence[Draw] = ()) -> DrawDetections:
        """Ask every target for every class with the trained model: computed once, then read.

        Args:
            draws: (shots, seed) of the references; default: all shots and seeds of the settings.
        """
        draws = tuple(draws or itertools.product(self.settings.shots, range(self.settings.reference_seeds)))

        def compute() -> dict[str, NDArray[Any]]:
            tokens, (dataset, maps, *_) = self.references.tokens, self.targets
            embeddings = {draw: class_embeddings(model, tokens, self.reference_rows(*draw)) for draw in draws}
            found = detect_draws(model, self.encoder.model, dataset, maps, embeddings, self.split, self.settings)
            return {name: np.array(found[name], np.bytes_ if name == "mask" else None) for name in found}

        table = pd.DataFrame(kept(self._folder / f"detections_{hash_value([*self._key, draws])}.npz", compute))
        table["mask"] = table["mask"].str.decode("ascii")
        return DrawDetections(self.targets.dataset, self.split, self.encoder.image_size, draws, table)

    def reference_points(self) -> pd.DataFrame:
        """The reference objects whose class structure is measured: `row, category_id, group, split`.

        All that may be a reference, at most `PER_CATEGORY` of a category (the first). A group is a drawing, or an image
        where there are no drawings.
        """
        instances, objects = self.references.dataset.instances, self.references.objects
        rows = np.flatnonzero(objects.reference_candidates(self.settings.min_reference_area))
        table = pd.DataFrame({"row": rows, "category_id": objects.categories[rows]})
        table["group"] = [
            f"{one.category_id} by {one.artist}" if one.artist else f"image {one.image_id}"
            for one in (instances[row] for row in rows)
        ]
        table["split"] = np.where(table["category_id"].isin(self.split.base), "base", "novel")
        same = table.groupby("category_id")["row"]
        return table[(same.cumcount() < PER_CATEGORY) & (same.transform("size") > 1)].reset_index(drop=True)

    def object_features(self, rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """SAM's (`maps`) and DINOv2's (`dinov2`) last map, averaged over each reference object's mask: `(n, C)`."""
        encoders = {"maps": self.encoder, "dinov2": load_encoder("dinov2", self.run.scale.weights, self.run.device)}
        self.run.record("dinov2_weights", encoders["dinov2"].weights_hash)
        objects = [self.references.dataset.instances[row] for row in rows]
        found = reference_features(encoders, self.references.dataset, objects, self._folder / "mask_features")
        return {name: np.stack([vectors[i.id] for i in objects]) for name, vectors in found.items()}

    def planted(self) -> InContextStudy:
        """The positive control: the same study with a random code of its class added on every object and its tokens."""
        epochs, size = self.settings.control_epochs, self.encoder.image_size
        run = _with_settings(self.run, epochs=epochs, flip=0.0)
        parts = (self.tuning, self.references, self.targets)
        tuning, references, targets = (planted_part(part, self.split.all, size, run.seed) for part in parts)
        identity = {**self.identity, "control": epochs}
        return InContextStudy(run, self.encoder, self.split, tuning, references, targets, identity)


def _with_settings(run: Run, **settings: Any) -> Run:
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
    parts = _part(run, encoder, tuning), _part(run, encoder, data.references), _part(run, encoder, data.targets, False)
    return InContextStudy(run, encoder, split, *parts, identity)


def _part(run: Run, encoder: Encoder, dataset: CocoDataset, with_tokens: bool = True) -> SamData:
    settings, folder, sam = run.scale.incontext, run.cache / "incontext", encoder.model
    if settings.store_features:
        maps = stored_maps(sam, dataset, settings.trunk_maps, encoder.weights_hash, folder)
    else:
        maps = functools.partial(live_maps, sam, dataset, settings.trunk_maps)
    objects, key = object_arrays(dataset, encoder.image_size), hash_value([FORMAT, dataset.hash, encoder.weights_hash])
    if with_tokens:
        return SamData(dataset, maps, objects, object_tokens(sam, maps, objects, folder / f"tokens_{key}"))
    none = np.empty((0, sam.mask_decoder.num_mask_tokens, sam.mask_decoder.transformer_dim), np.float16)
    return SamData(dataset, maps, objects, none)


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
        run = _with_settings(start_run(scale, "02_in_context"), **(settings or {}))
        study = load_study(run, references, targets, images, weights)
        started = time.perf_counter()
        model = build_model(study.settings, study.encoder.model, run.seed)
        _, curve = train(model, study.sampler(), study.checkpoint())
        seconds, steps, loss = time.perf_counter() - started, int(curve["step"].max()) + 1, curve["loss"].iloc[-1]
        host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = torch.cuda.max_memory_allocated() if run.device == "cuda" else host
        line = f"{steps} steps, {seconds / steps:.2f} s each, peak memory {used / 2**30:.1f} GiB; loss {loss:.3f}\n"
        return "" if shared and dist.get_rank() > 0 else line
    finally:
        if shared:
            dist.destroy_process_group()
