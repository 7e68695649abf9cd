"""Notebook 02's way from data to tables: what is tuned on, the tuned model, its answers, and the space of references.

Everything slow is kept in the run's cache under a hash of all that it depends on. Tuning can run by itself, on one or
more processes; the notebook then finds the tuned model:

    python -m samantics tune --scale paper --references TRAIN.json --targets VAL.json --images FOLDER
    torchrun --nproc-per-node 8 -m samantics tune --scale paper ...      # one process per GPU
"""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm.auto import tqdm

from samantics.cache import atomic_path, hash_value, reading
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset
from samantics.data.first_world import write_mojiworld
from samantics.errors import StudyError
from samantics.incontext.evaluation import (
    Trial,
    ap_table,
    class_embeddings,
    fates,
    load_trials,
    run_trials,
    save_trials,
)
from samantics.incontext.model import (
    Checkpoint,
    InContextModel,
    Lesson,
    Split,
    build_model,
    draw_references,
    split_categories,
    train,
    usable,
)
from samantics.incontext.separability import separability, tsne_map
from samantics.incontext.tokens import (
    FeatureSource,
    LiveFeatures,
    Objects,
    PlantedFeatures,
    class_codes,
    objects_of,
    planted_tokens,
    reference_tokens,
    stored_features,
)
from samantics.models.encoder import Encoder, load_encoder
from samantics.run import Run, start_run
from samantics.scales import InContextSettings
from samantics.training_free.matching import reference_features
from samantics.training_free.pipeline import load_data

FORMAT = 1  # of what is cached; raised when the same settings would give other numbers
MAPS = ((10, 0), (30, 0), (30, 1))  # perplexity and seed of the t-SNE maps; the second is the main one
MAIN_MAP = (30, 0)
STAGES = ("before", "after", "maps", "dinov2")  # of the space of references
PER_CATEGORY = 40  # reference objects of a category whose space is looked at


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set as SAM sees it. Rows of ``objects`` and ``tokens`` agree with ``dataset.instances``."""

    dataset: CocoDataset
    source: FeatureSource
    objects: Objects


@dataclasses.dataclass(frozen=True, eq=False)
class InContextStudy:
    """Everything of a run that is computed once.

    Attributes:
        run: whose cache and settings are used.
        encoder: SAM, frozen.
        split: base and novel categories.
        tuning: what the model is trained on; only objects of base categories answer or ask there.
        references: what references are drawn from when the model is tested; tuning saw none of these images at pocket
            scale.
        targets: what is asked in the test.
    """

    run: Run
    encoder: Encoder
    split: Split
    tuning: Part
    references: Part
    targets: Part

    @property
    def settings(self) -> InContextSettings:
        """Of the run's scale."""
        return self.run.scale.incontext

    @property
    def folder(self) -> Path:
        """Of what this notebook keeps."""
        return self.run.cache / "incontext"

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the tuned model depends on, by name."""
        return {
            "format": FORMAT,
            "base": list(self.split.base),
            "data": self.tuning.dataset.hash,
            "sam": self.encoder.weights_hash,
            "seed": self.run.seed,
            "settings": {name: value for name, value in dataclasses.asdict(self.settings).items() if name in TUNING},
        }

    @functools.cached_property
    def model(self) -> InContextModel:
        """The tuned model: trained now, or resumed or read from the cache."""
        self.curve  # noqa: B018  (computes both)
        return self._model

    @functools.cached_property
    def _model(self) -> InContextModel:
        return build_model(self.settings, self.encoder.model, self.run.seed).eval()

    @functools.cached_property
    def curve(self) -> pd.DataFrame:
        """The loss curve of the tuning."""
        lesson = Lesson(
            self.tuning.source,
            self.tuning.objects,
            self.tokens("tuning"),
            self.split.base,
            self.encoder.image_size,
            self.settings,
            self.run.seed,
        )
        path = self.folder / f"model_{hash_value(self.identity)}.pt"
        return train(self._model, lesson, Checkpoint(path, self.identity))

    def tokens(self, part: str) -> NDArray[np.float16]:
        """``(R, T, D)`` mask tokens of all objects of ``tuning`` or ``references``."""
        data = self._parts[part]
        folder = self.folder / f"tokens_{hash_value([FORMAT, data.dataset.hash, self.encoder.weights_hash])}"
        return reference_tokens(self.encoder.model, data.source, data.objects, folder)

    # ------------------------------------------------------------------------------------------------- answers

    def references_of(self, shots: int, seed: int) -> NDArray[np.int64]:
        """``(C, shots)`` rows of the reference objects of a draw, for the categories of ``split.all``."""
        area = self.settings.min_reference_area
        return draw_references(self.references.objects, self.split.all, shots, seed, area)

    @functools.cached_property
    def trials(self) -> list[Trial]:
        """What was found with each draw of references."""
        settings = self.settings
        key = [self.identity, self.references.dataset.hash, self.targets.dataset.hash, dataclasses.asdict(settings)]
        path = self.folder / f"trials_{hash_value(key)}.npz"
        if not path.is_file():
            tokens = self.tokens("references")
            draws = [(shots, seed) for shots in settings.shots for seed in range(settings.reference_seeds)]
            embeddings = {d: class_embeddings(self.model, tokens, self.references_of(*d)) for d in draws}
            target = (self.targets.dataset, self.targets.source)
            save_trials(run_trials(self.model, self.encoder.model, target, embeddings, self.split, settings), path)
        return load_trials(path)

    def trial(self, shots: int, seed: int = 0) -> Trial:
        """The trial of one draw."""
        return next(t for t in self.trials if (t.shots, t.seed) == (shots, seed))

    @functools.cached_property
    def answers(self) -> list[dict[str, Any]]:
        """All classes asked with most shots and the first draw, in COCO's result format."""
        trial = self.trial(max(self.settings.shots))
        return trial.results("all_classes", self.targets.dataset, self.split, self.encoder.image_size)

    @functools.cached_property
    def ap(self) -> pd.DataFrame:
        """See :func:`samantics.incontext.evaluation.ap_table`."""
        return self._table(
            "ap", lambda: ap_table(self.targets.dataset, self.split, self.encoder.image_size, self.trials)
        )

    @functools.cached_property
    def fates(self) -> pd.DataFrame:
        """See :func:`samantics.incontext.evaluation.fates`; of :attr:`answers`."""
        return self._table("fates", lambda: fates(self.targets.dataset, self.split, self.answers))

    @functools.cached_property
    def control(self) -> pd.DataFrame:
        """The positive control as in :func:`evaluation.ap_table`: most shots, one draw, class planted."""
        return self._table("control", self._control)

    def _control(self) -> pd.DataFrame:
        settings = dataclasses.replace(self.settings, epochs=self.settings.control_epochs, flip=0.0)
        sam, size = self.encoder.model, self.encoder.image_size
        codes = class_codes(self.split.all, sam.image_encoder.neck[0].in_channels, self.run.seed)
        token_codes = class_codes(self.split.all, sam.mask_decoder.transformer_dim, self.run.seed + 1)
        sources = {n: PlantedFeatures(p.source, p.objects, size, codes) for n, p in self._parts.items()}
        tokens = {
            n: planted_tokens(self.tokens(n), self._parts[n].objects, token_codes) for n in ("tuning", "references")
        }
        objects, base = self.tuning.objects, self.split.base
        lesson = Lesson(sources["tuning"], objects, tokens["tuning"], base, size, settings, self.run.seed)
        identity = self.identity | {"control": settings.epochs}
        model = build_model(settings, sam, self.run.seed)
        train(model, lesson, Checkpoint(self.folder / f"control_{hash_value(identity)}.pt", identity))
        most = max(settings.shots)
        embeddings = {(most, 0): class_embeddings(model, tokens["references"], self.references_of(most, 0))}
        target = (self.targets.dataset, sources["targets"])
        return ap_table(
            self.targets.dataset, self.split, size, run_trials(model, sam, target, embeddings, self.split, settings)
        )

    @property
    def _parts(self) -> dict[str, Part]:
        return {"tuning": self.tuning, "references": self.references, "targets": self.targets}

    # ---------------------------------------------------------------------------------------- space of references

    @functools.cached_property
    def points(self) -> pd.DataFrame:
        """The reference objects that are looked at, one row each: ``row, category_id, split, group``.

        All usable ones, at most :data:`PER_CATEGORY` of a category (the first). A group is a drawing, or an image where
        there are no drawings.
        """
        instances = self.references.dataset.instances
        rows = np.flatnonzero(usable(self.references.objects, self.settings.min_reference_area))
        groups = [instances[row].drawing or f"image {instances[row].image_id}" for row in rows]
        table = pd.DataFrame(
            {"row": rows, "category_id": [instances[row].category_id for row in rows], "group": groups}
        )
        table["split"] = np.where(table["category_id"].isin(self.split.base), "base", "novel")
        kept = table[table.groupby("category_id").cumcount() < PER_CATEGORY]
        counts = kept.groupby("category_id")["row"].transform("size")
        return kept[counts >= 2].reset_index(drop=True)

    @functools.cached_property
    def spaces(self) -> dict[str, NDArray[np.float32]]:
        """Features of :attr:`points` by :data:`STAGES`.

        ``before`` are mask tokens and ``after`` class embeddings; ``maps`` and ``dinov2`` are SAM's and DINOv2's last
        map, averaged over each object's mask: what could be read from either at this place.
        """
        rows = self.points["row"].to_numpy()
        tokens = self.tokens("references")
        before = tokens[rows].astype(np.float32).reshape(len(rows), -1)
        after = class_embeddings(self.model, tokens, rows[:, None]).numpy(force=True)
        return {"before": before, "after": after, **self._pooled(rows)}

    def _pooled(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        encoders = {
            "maps": self.encoder,
            "dinov2": load_encoder("dinov2", self.run.scale.weights, self.run.device),
        }
        self.run.record("dinov2_weights", encoders["dinov2"].weights_hash)
        dataset, folder = self.references.dataset, self.folder / "mask_features"
        objects = [dataset.instances[row] for row in rows.tolist()]
        found = reference_features(encoders, dataset, objects, folder)
        return {name: np.stack([vectors[i.id] for i in objects]) for name, vectors in found.items()}

    @functools.cached_property
    def separability(self) -> pd.DataFrame:
        """``stage, split, metric, value, low, high, shuffled`` for all :data:`STAGES`."""
        return self._table("separability", self._separability)

    def _separability(self) -> pd.DataFrame:
        tables = []
        for stage, features in self.spaces.items():
            for name, group in self.points.groupby("split"):
                labels, members = group["category_id"].to_numpy(), pd.factorize(group["group"])[0]
                table = separability(features[group.index], labels, members, self.run.seed)
                tables.append(table.assign(stage=stage, split=name))
        columns = ["stage", "split", "metric", "value", "low", "high", "shuffled"]
        return pd.concat(tables, ignore_index=True)[columns]

    @functools.cached_property
    def maps(self) -> pd.DataFrame:
        """t-SNE maps: ``stage, perplexity, seed, x, y, category_id, split``, for each of :data:`MAPS`."""
        return self._table("tsne", self._maps)

    def _maps(self) -> pd.DataFrame:
        wanted = [(stage, *setting) for stage in ("before", "after") for setting in MAPS]
        parts = []
        for stage, perplexity, seed in tqdm(wanted, desc="t-SNE", unit="map"):
            placed = tsne_map(self.spaces[stage], perplexity, seed)
            head = {"stage": stage, "perplexity": perplexity, "seed": seed, "x": placed[:, 0], "y": placed[:, 1]}
            parts.append(pd.DataFrame(head).join(self.points[["category_id", "split"]]))
        return pd.concat(parts, ignore_index=True)

    def _table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table kept under that name for this study, else made and kept."""
        key = [
            self.identity,
            self.references.dataset.hash,
            self.targets.dataset.hash,
            dataclasses.asdict(self.settings),
        ]
        path = self.folder / f"{name}_{hash_value(key)}.csv"
        if not path.is_file():
            with atomic_path(path) as temporary:
                make().to_csv(temporary, index=False)
        with reading(path):
            return pd.read_csv(path, float_precision="round_trip")


TUNING = (
    "novel", "train_scenes", "trunk_maps", "dim", "heads", "ffn_width", "encoder_layers", "decoder_layers", "queries",
    "dropout", "fuser_width", "epochs", "batch", "learning_rate", "weight_decay", "clip", "flip", "classes_per_image",
    "absent_classes", "references_per_question", "hints", "min_reference_area",
)  # fmt: skip
"""The settings that the tuned weights depend on; the others are of the test."""


def load_study(
    run: Run, references: str = "", targets: str = "", images: str = "", weights: str = ""
) -> InContextStudy:
    """Data and SAM of a run: MojiWorld's scenes, or COCO files, whose references are then also what is tuned on.

    Args:
        weights: of SAM, others than the scale's (see :func:`samantics.models.encoder.load_encoder`).

    Raises:
        StudyError: bad or missing files; a novel category that the data does not have.
    """
    settings, encoder = run.scale.incontext, load_encoder("sam", weights or run.scale.weights, run.device, run.seed)
    run.record("sam_weights", encoder.weights_hash)
    data = load_data(run, references, targets, images)
    tuning = data.references
    if settings.train_scenes and not references:
        world = mojiworld.World(seed=run.seed)
        tuning = write_mojiworld(world, "tuning", settings.train_scenes, run.cache / "scenes", held_out_share=0.0)
    run.record("tuning_data", tuning.hash)
    if tuning.categories != data.targets.categories:
        raise StudyError(f"{tuning.path} and {data.targets.path} have different categories: use one list in both")
    parts = [_part(run, encoder, dataset) for dataset in (tuning, data.references, data.targets)]
    return InContextStudy(run, encoder, split_categories(tuning, settings.novel), *parts)


def _part(run: Run, encoder: Encoder, dataset: CocoDataset) -> Part:
    settings, folder = run.scale.incontext, run.cache / "incontext"
    source: FeatureSource = LiveFeatures(encoder.model, dataset, settings.trunk_maps)
    if settings.store_features:
        source = stored_features(encoder.model, dataset, settings.trunk_maps, encoder.weights_hash, folder)
    return Part(dataset, source, objects_of(dataset, encoder.image_size))


# ------------------------------------------------------------------------------------------------- tuning by itself


def tune(
    scale: str,
    references: str = "",
    targets: str = "",
    images: str = "",
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Tune the in-context model, under ``torchrun`` on all its processes; a line of time per step and peak memory.

    Args:
        settings: values of :class:`InContextSettings` other than the scale's.

    Raises:
        StudyError: as :func:`load_study`.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        run = start_run(scale, "02_in_context")
        incontext = dataclasses.replace(run.scale.incontext, **(settings or {}))
        run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, incontext=incontext))
        study = load_study(run, references, targets, images, weights)
        study.tokens("tuning")
        started = time.perf_counter()
        curve = study.curve
        if dist.is_initialized() and dist.get_rank() != 0:
            return ""
        steps, seconds = int(curve["step"].max()) + 1, time.perf_counter() - started
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = torch.cuda.max_memory_allocated() if run.device == "cuda" else 1024 * kib
        loss = curve["loss"].iloc[-1]
        return f"{steps} steps, {seconds / steps:.2f} s each, peak memory {used / 2**30:.1f} GiB; loss {loss:.3f}\n"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
