"""What notebook 02 computes once and keeps: data, maps and tokens, the training's batches, detections, tables.

Everything slow lies in the run's cache under a hash of all that it depends on. `tune` trains by itself, on one or more
processes (`python -m samantics tune`, under `torchrun` too); the notebook then finds the trained model.
"""

import copy
import dataclasses
import functools
import itertools
import os
import resource
import time
from collections.abc import Callable
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
from samantics.incontext import evaluation
from samantics.incontext.evaluation import VARIANTS, Answers, class_embeddings, questions_of, random_embeddings
from samantics.incontext.model import Adapters, InContextModel, adapted_data
from samantics.incontext.tokens import FORMAT, SamData, live_maps, sam_data
from samantics.incontext.training import BatchSampler, Split, draw_references, split_categories, train
from samantics.models.encoder import Encoder, load_encoder
from samantics.run import Run, own_data, start_run
from samantics.scales import BESIDE_SAM, InContextSettings
from samantics.training_free.mask_features import reference_features

APART = 0.6  # of the steps, the fuser is tuned alone; for the rest once with frozen SAM, once with adapters in it
PER_CATEGORY = 40  # reference objects of a category whose class structure is measured
# on the trained weights (but for rounding: stored maps have 16 bits)
WITHOUT_EFFECT = ("store_features", "top", "min_score", "shots", "reference_seeds")


@dataclasses.dataclass(frozen=True, eq=False)
class InContextStudy:
    """Data and frozen SAM of a run, and where its results are kept."""

    run: Run
    settings: InContextSettings  # of the run's scale
    folder: Path  # of what is kept
    encoder: Encoder  # SAM
    split: Split
    tuning: SamData  # what the model is trained on; only objects of base categories are labelled there
    references: SamData  # what references are drawn from in the test
    targets: SamData  # the test images
    identity: dict[str, Any]  # what the trained model depends on, by name

    def sampler(self, model: InContextModel) -> BatchSampler:
        """The training's batches, as the model sees them."""
        fields = (self.tuning, self.split.base, self.encoder.image_size, self.settings, self.run.seed)
        return BatchSampler(*fields, (self.encoder.model, model.adapters) if model.adapters else None)

    def halves(self, model: InContextModel) -> tuple[range, range]:
        """The training's steps before and after `APART`, where adapters may come in."""
        steps = self.sampler(model).steps
        return range(round(APART * steps)), range(round(APART * steps), steps)

    def untrained(self) -> InContextModel:
        """The model before tuning, its initialisation seeded."""
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            model = InContextModel(self.settings, self.encoder.model, len(self.split.base))
        return model.to(self.encoder.device)

    def tuned(self) -> tuple[InContextModel, pd.DataFrame]:
        """The trained model, and the loss curve of the last part of its training (see `train`)."""
        model = self.untrained()
        start, rest = self.halves(model)
        train(model, self.sampler(model), self.checkpoint("start"), start)
        return train(model, self.sampler(model), self.checkpoint("fuser"), rest)

    def adapted(self, model: InContextModel) -> InContextModel:
        """A copy of the model with adapters in SAM's trunk that do nothing yet, seeded."""
        model = copy.deepcopy(model)
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            model.adapters = Adapters(self.encoder.model, self.settings.trunk_maps, self.settings.adapters)
        return model.to(self.encoder.device)

    def checkpoint(self, part: str) -> Checkpoint:
        """Where a part of the training is saved, and resumed from: `start`, `fuser` or `adapters`."""
        return Checkpoint(self.folder / f"{part}_{hash_value(self.identity)}.pt", self.identity)

    def reference_rows(self, shots: int, seed: int = 0) -> NDArray[np.int64]:
        """`(C, shots)` rows of randomly drawn reference objects for the categories of `split.all`."""
        return draw_references(self.references, self.split.all, shots, seed)

    def kept(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table kept under that name for this study, else made and kept."""
        return kept(self.folder / f"{name}_{hash_value(self._key)}.csv", make)

    @property
    def _key(self) -> list[Any]:
        data = [part.dataset.hash for part in (self.references, self.targets)]
        return [self.identity, *data, dataclasses.asdict(self.settings)]

    def ask(self, model: InContextModel, variants: tuple[str, ...] = VARIANTS) -> Answers:
        """Ask the targets: computed once, then read.

        Args:
            model: trained.
            variants: all, with every number of shots of the settings; or some, with the most shots alone.
        """
        shots, dataset = sorted(self.settings.shots), self.targets.dataset
        shots = shots if variants == VARIANTS else shots[-1:]
        draws = list(itertools.product(shots, range(self.settings.reference_seeds)))
        questions = questions_of(dataset, self.split, variants, draws)

        def compute() -> dict[str, NDArray[Any]]:
            rows, known, targets = [self.reference_rows(*draw) for draw in draws], self.references, self.targets
            if model.adapters is not None:
                every = np.unique(np.concatenate([one.ravel() for one in rows]))
                known = adapted_data(known, self.encoder.model, model.adapters, every)
                targets = adapted_data(targets, self.encoder.model, model.adapters)
            real = [class_embeddings(model, known.tokens, one) for one in rows]
            base, seeds = np.isin(self.split.all, self.split.base), [1000 * count + seed for count, seed in draws]
            noise = [random_embeddings(one[base], len(base), seed) for one, seed in zip(real, seeds, strict=True)]
            found = evaluation.detect(model.eval(), targets, torch.cat([*real, *noise]), questions, self.settings)
            return {name: np.asarray(found[name]) for name in found}

        key = [self._key, variants, model.adapters is not None]
        found = pd.DataFrame(kept(self.folder / f"detections_{hash_value(key)}.npz", compute))
        return Answers(dataset, self.split, self.encoder.image_size, questions, found)

    def cost(self, model: InContextModel, seconds: float) -> dict[str, float]:
        """`tuning_seconds`, `image_seconds` (all classes, image read and encoded), `images` asked for all classes."""
        few, sam, draw = self.targets.dataset.first(5), self.encoder.model, (max(self.settings.shots), 0)
        data = self.targets._replace(dataset=few, maps=functools.partial(live_maps, sam, few, self.settings.trunk_maps))
        data = data if model.adapters is None else adapted_data(data, sam, model.adapters)
        embeddings = class_embeddings(model, self.references.tokens, self.reference_rows(*draw))
        questions = questions_of(few, self.split, ("all_classes",), [draw])
        started = time.perf_counter()
        evaluation.detect(model.eval(), data, embeddings, questions, self.settings)
        each = (time.perf_counter() - started) / len(few.images)
        asked = min(evaluation.ASKED_ALL, len(self.targets.dataset.images))
        return {"tuning_seconds": seconds, "image_seconds": each, "images": asked}

    def points(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The objects whose class structure is measured, of the references and of the targets.

        Columns `row, category_id, split, artists`; of the references at most `PER_CATEGORY` of a category (the first),
        of the targets those whose category has references.
        """
        tables = []
        for part in (self.references, self.targets):
            rows = np.flatnonzero(part.objects.large)
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
        encoders = {"maps": self.encoder}
        for name in BESIDE_SAM:
            encoders[name] = load_encoder(name, self.run.scale.weights, self.run.device)
            self.run.record(f"{name}_weights", encoders[name].weights_hash)
        sides, codes = [], None
        for part, table in zip((self.references, self.targets), self.points(), strict=True):
            tokens = part.tokens[table["row"]].astype(np.float32)
            before = tokens.reshape(len(tokens), -1)
            with torch.no_grad():
                after = model.fuser(torch.from_numpy(tokens).to(self.encoder.device)).numpy(force=True)
            if codes is None:  # as large as the references'
                rng, size = np.random.default_rng(self.run.seed), (len(self.split.all), before.shape[1])
                codes = rng.normal(scale=before.std(), size=size).astype(np.float32)
            planted = before + codes[np.searchsorted(self.split.all, table["category_id"])]
            objects = [part.dataset.instances[row] for row in table["row"]]
            pooled = reference_features(encoders, part.dataset, objects, self.folder / "mask_features")
            means = {name: np.stack([vectors[i.id] for i in objects]) for name, vectors in pooled.items()}
            sides.append({"before": before, "after": after, "planted": planted, **means})
        return {stage: (sides[0][stage], sides[1][stage]) for stage in sides[0]}


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
        StudyError: bad or missing files; data that `check_data` refuses; a novel category that the data does not have.
    """
    run = own_data(run) if references else run
    settings, encoder = run.scale.incontext, load_encoder("sam", weights or run.scale.weights, run.device, run.seed)
    run.record("sam_weights", encoder.weights_hash)
    data = load_data(run, references, targets, images)
    own = references or not settings.train_scenes
    tuning = data.references if own else scenes(run, "tuning", settings.train_scenes)
    run.record("tuning_data", tuning.hash)
    check_data(tuning, data.references, data.targets)
    split = split_categories(data.targets, settings.novel)
    of_tuning = {name: value for name, value in dataclasses.asdict(settings).items() if name not in WITHOUT_EFFECT}
    identity = {"format": FORMAT, "base": list(split.base), "data": tuning.hash, "sam": encoder.weights_hash}
    identity |= {"seed": run.seed, "settings": of_tuning}
    parts, folder = (tuning, data.references, data.targets), run.cache / "incontext"
    tuned, known, asked = (sam_data(encoder, part, settings, folder) for part in parts)
    return InContextStudy(run, settings, folder, encoder, split, tuned, known, asked, identity)


def check_data(tuning: CocoDataset, references: CocoDataset, targets: CocoDataset) -> None:
    """StudyError, before the training, for what would stop the notebook after it."""
    for part in (tuning, references, targets):
        if all(instance.crowd for instance in part.instances):
            raise StudyError(f"{part.path} has no objects (crowds apart): annotate some, or leave notebook 02 out")
    if not tuning.categories.items() <= targets.categories.items():
        raise StudyError(f"{tuning.path} and {targets.path} have different categories: use one list in both")
    for image_id, instances in targets.by_image.items():
        if targets.categories.keys() <= {instance.category_id for instance in instances if not instance.crowd}:
            image = f"{targets.images[image_id].file} of {targets.path}"
            raise StudyError(f"{image} shows every category, so that no reference is a wrong one: leave it out")


def tune(
    scale: str, references: str = "", targets: str = "", images: str = "", weights: str = "", **settings: Any
) -> str:
    """Train the model of notebook 02 by itself, on all processes of `torchrun`; a line of time and peak memory."""
    if shared := int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run = with_settings(start_run(scale, "02_in_context"), **settings)
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
