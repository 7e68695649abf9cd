"""AP of the in-context model for base and novel categories, with controls, and failures by rule."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import box_convert
from tqdm.auto import tqdm

from samantics.data.coco import CocoDataset, Instance, box_iou, rles_of, xywh
from samantics.incontext.model import InContextModel
from samantics.incontext.tokens import SamData, box_masks, input_scales
from samantics.incontext.training import Split
from samantics.metrics.coco_ap import Evaluation, Result, Terms, ap_difference, ap_interval, evaluate
from samantics.scales import InContextSettings

VARIANTS = (
    "class_oracle",  # an image is asked only for classes that it shows, as in the paper
    "all_classes",  # the first images are asked for every class, with the first draw of references
    "wrong_reference",  # as the oracle, with references of another class of the split that the image does not show
    "random_reference",  # as the oracle, with Gaussian noise of the mean and spread of real base embeddings, one draw
)
COMPARED = ("class_oracle", "wrong_reference")  # whose difference decides
FOR_ARMS = (*COMPARED, "all_classes")  # what a further arm is asked
ASKED_ALL = 100  # images that are asked for every class: they are most of the questions
FATES = ("found", "confused with base", "confused with novel", "missed")
CORNERS = ["x0", "y0", "x1", "y1"]
TOGETHER = 16  # classes that an image is asked for at a time
Draw = tuple[int, int]  # shots and seed of the references


@torch.no_grad()
def class_embeddings(model: InContextModel, tokens: NDArray[np.float16], references: NDArray[np.int64]) -> Tensor:
    """`(C, dim)` embeddings of `(C, shots)` rows of references: their mask tokens are averaged, then fused."""
    averaged = torch.from_numpy(tokens[references].astype(np.float32).mean(axis=1))
    return model.fuser(averaged.to(next(model.parameters()).device))


def random_embeddings(real: Tensor, count: int, seed: int) -> Tensor:
    """`(count, dim)` Gaussian vectors with the mean and spread, per dimension, of `(C, dim)` real ones."""
    noise = torch.randn(count, real.shape[1], generator=torch.Generator().manual_seed(seed)).to(real.device)
    return real.mean(0) + real.std(0) * noise


@torch.no_grad()
def detect(
    model: InContextModel, data: SamData, embeddings: Tensor, questions: pd.DataFrame, settings: InContextSettings
) -> pd.DataFrame:
    """The best answers to every question: rows of `questions_of`, whose column `embedding` is a row of `embeddings`.

    Columns: `question` (row), `score` 0-1, `x0, y0, x1, y1` as shares of the side of SAM's input.
    """
    tables, asked = [], questions["embedding"].to_numpy()
    for image, chosen in tqdm(questions.groupby("image").indices.items(), desc="detecting", unit="image", leave=False):
        memory = model.encode(data.maps(np.array([image])))
        for some in np.split(chosen, range(TOGETHER, len(chosen), TOGETHER)):
            output = model.decode(memory, embeddings[torch.from_numpy(asked[some]).to(embeddings.device)][None])
            scores, order = output.logits[-1, 0].sigmoid().topk(min(settings.top, output.logits.shape[-1]), dim=1)
            boxes = box_convert(output.boxes[-1, 0], "cxcywh", "xyxy").clamp(0, 1)
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
            kept = ((scores >= settings.min_score) & (boxes[..., 2:] > boxes[..., :2]).all(-1)).cpu()
            table = pd.DataFrame(boxes[kept].numpy(force=True), columns=CORNERS)
            table["question"] = torch.from_numpy(some)[:, None].expand_as(kept)[kept].numpy()
            tables.append(table.assign(score=scores[kept].numpy(force=True)))
    return pd.concat(tables, ignore_index=True)


def with_masks(sam: Sam, data: SamData, results: Sequence[Result]) -> list[Result]:
    """The results with SAM's mask of each box; boxes that agree to the input's pixel share one, as many do."""
    rows, side = {image_id: row for row, image_id in enumerate(data.dataset.images)}, sam.image_encoder.img_size
    scales, whole = input_scales(data.dataset, side), []
    by_image = itertools.groupby(sorted(results, key=lambda r: rows[r["image_id"]]), key=lambda r: r["image_id"])
    for image_id, group in tqdm(by_image, desc="SAM's masks", unit="image", leave=False):
        record, found = data.dataset.images[image_id], list(group)
        neck, boxes = data.maps(np.array([rows[image_id]])).neck, np.array([corners(r) for r in found])
        different, which = np.unique((boxes * scales[rows[image_id]]).round(), axis=0, return_inverse=True)
        parts = torch.from_numpy(different).float().to(neck).split(64)
        rles = [rle for part in parts for rle in rles_of(box_masks(sam, neck, part, record.width, record.height))]
        whole += [{**r, "segmentation": rles[n]} for r, n in zip(found, which.ravel(), strict=True)]
    return whole


def wrong_classes(shown: NDArray[np.bool_], split: Split, seed: int) -> NDArray[np.int64]:
    """For each class `(N, C)` that an image shows, the column of one of its split that it does not show; else -1."""
    rng = np.random.default_rng(seed)
    base = np.isin(split.all, split.base)
    wrong = np.full(shown.shape, -1)
    for row, column in np.argwhere(shown):
        absent = np.flatnonzero(~shown[row])
        alike = absent[base[absent] == base[column]]
        wrong[row, column] = rng.choice(alike if alike.size else absent)
    return wrong


def questions_of(dataset: CocoDataset, split: Split, variants: Sequence[str], draws: Sequence[Draw]) -> pd.DataFrame:
    """Which images are asked for what, in each variant: the oracle in all draws, its controls with the most shots.

    Columns `variant, shots, seed, image` (row), `category` (id that is meant), `embedding`: numbered draw by draw, each
    as in `split.all`, first the real ones, then the random ones.
    """
    present = {(i.image_id, i.category_id) for i in dataset.instances if not i.crowd}
    shown = np.array([[(image, category) in present for category in split.all] for image in dataset.images])
    every, most, tables = np.zeros_like(shown), max(shots for shots, _ in draws), []
    every[:ASKED_ALL] = True
    at_most = [draw for draw in draws if draw[0] == most]
    asked = {"class_oracle": draws, "wrong_reference": at_most}  # the others with the first draw
    for variant, draw in [(v, draw) for v in variants for draw in asked.get(v, at_most[:1])]:
        image, meant = np.argwhere(every if variant == "all_classes" else shown).T
        column = wrong_classes(shown, split, draw[1])[image, meant] if variant == "wrong_reference" else meant
        first = len(split.all) * (draws.index(draw) + len(draws) * (variant == "random_reference"))
        table = pd.DataFrame({"image": image, "category": np.array(split.all)[meant], "embedding": column + first})
        tables.append(table.assign(variant=variant, shots=draw[0], seed=draw[1]))
    return pd.concat(tables, ignore_index=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The model's answers in a test set."""

    dataset: CocoDataset
    split: Split
    input_size: int  # side of SAM's input, pixels
    questions: pd.DataFrame  # of `questions_of`
    detections: pd.DataFrame  # of `detect`

    @property
    def artists(self) -> tuple[str, ...]:
        """`test` and `train` where artists are known (MojiWorld), else nothing."""
        return tuple(sorted({i.split for i in self.dataset.instances} - {""}))

    def draws(self, variant: str, shots: int = 0) -> list[Draw]:
        """The draws of references with which a variant is asked, those of the most shots or of so many."""
        asked = self.questions[self.questions["variant"] == variant]
        asked = asked[asked["shots"] == (shots or asked["shots"].max())]
        return list(asked[["shots", "seed"]].drop_duplicates().itertuples(index=False, name=None))

    def results(self, variant: str, draw: Draw) -> list[Result]:
        """Boxes of a variant and a draw (shots, seed) in COCO's result format, in pixels of the image."""
        chosen = (self.questions[["variant", "shots", "seed"]] == [variant, *draw]).all(axis=1)
        found = self.detections.join(self.questions[chosen], on="question", how="inner")
        scales, ids = input_scales(self.dataset, self.input_size), np.array(list(self.dataset.images))[found["image"]]
        boxes = found[CORNERS].to_numpy(float) * self.input_size / scales[found["image"]]
        found = found.assign(image_id=ids, category_id=found["category"], bbox=[xywh(box) for box in boxes.tolist()])
        return found[["image_id", "category_id", "score", "bbox"]].to_dict("records")

    @functools.cache  # noqa: B019 - lives as long as the notebook
    def _matched(self, variant: str, draw: Draw, artists: str) -> Evaluation:
        images = self.dataset.first(ASKED_ALL) if variant == "all_classes" else self.dataset
        images = images if artists == "all" else images.by_artists(artists)
        return evaluate(images, self.results(variant, draw), "bbox", sizes=False).of(self.split.all)

    def evaluations(self, variant: str, side: str, artists: str = "all", shots: int = 0) -> list[Evaluation]:
        """Of boxes of the `base` or the `novel` categories, one of each draw; perhaps only objects by some artists."""
        draws = self.draws(variant, shots)
        return [self._matched(variant, draw, artists).of(getattr(self.split, side)) for draw in draws]

    def ap(self, artists: Sequence[str] = ()) -> pd.DataFrame:
        """Box AP of every variant, split and number of shots, percent; mean over draws.

        Columns `variant, split, shots, artists, iou_type, AP, AP50, AP75, AR100, low, high, seeds`; low and high are
        the 95 % bootstrap interval of AP over images and draws. By `artists` only what is compared.
        """
        rows = []
        for variant, questions in self.questions.groupby("variant", sort=False):
            shots = sorted(questions["shots"].unique().tolist())
            asked = [(count, "all") for count in shots]
            asked += [(shots[-1], who) for who in artists if variant in COMPARED]
            for side, (count, who) in itertools.product(("base", "novel"), asked):
                head = {"variant": variant, "split": side, "shots": count, "artists": who, "iou_type": "bbox"}
                rows.append(head | _means(self.evaluations(variant, side, who, count)))
        return pd.DataFrame(rows)

    def mask_ap(self, sam: Sam, data: SamData) -> pd.DataFrame:
        """As `ap`: of SAM's masks for the boxes of the oracle, with the most shots and their last draw."""
        draw = self.draws("class_oracle")[-1]
        found = evaluate(self.dataset, with_masks(sam, data, self.results("class_oracle", draw)), "segm", sizes=False)
        head = {"variant": "class_oracle", "shots": draw[0], "artists": "all", "iou_type": "segm"}
        sides = {"base": self.split.base, "novel": self.split.novel}
        return pd.DataFrame([{**head, "split": side} | _means([found.of(ids)]) for side, ids in sides.items()])

    def terms(self, artists: str = "all") -> dict[str, Terms]:
        """Right minus wrong reference, with the most shots, for `base`, for `novel`, and for `base - novel`.

        Both questions are put to the same images with the same draws of references, which are resampled together.
        """
        signs = dict(zip(COMPARED, (1, -1), strict=True))
        base, novel = (
            [(sign, self.evaluations(variant, side, artists)) for variant, sign in signs.items()]
            for side in ("base", "novel")
        )
        return {"base": base, "novel": novel, "base - novel": _minus(base, novel)}

    def effects(self) -> pd.DataFrame:
        """What the right reference adds, of all objects and by artists, in points of box AP50.

        Columns `split, artists, value, low, high, p`.
        """
        terms = {(side, who): own for who in ("all", *self.artists) for side, own in self.terms(who).items()}
        return _differences(terms, "split", "artists")


def arm_effects(arms: Mapping[str, Answers]) -> pd.DataFrame:
    """What the right reference adds in each arm, then in each how much more than in the first, on the same questions.

    Columns `arm, split, value, low, high, p`.
    """
    terms = {(arm, side): own for arm, found in arms.items() for side, own in found.terms().items()}
    first, *others = arms
    for arm, side in itertools.product(others, ("base", "novel", "base - novel")):
        terms[f"{arm} - {first}", side] = _minus(terms[arm, side], terms[first, side])
    return _differences(terms, "arm", "split")


def _minus(more: Terms, less: Terms) -> Terms:
    return [*more, *((-sign, runs) for sign, runs in less)]


def _differences(terms: Mapping[tuple[str, str], Terms], *names: str) -> pd.DataFrame:
    rows = [(*key, *ap_difference(own, iou=0.5)[:4]) for key, own in terms.items()]
    return pd.DataFrame(rows, columns=[*names, "value", "low", "high", "p"])


def _means(runs: Sequence[Evaluation]) -> dict[str, Any]:
    means = pd.DataFrame([run.metrics for run in runs])[["AP", "AP50", "AP75", "AR100"]].astype(float).mean()
    _, low, high = ap_interval(runs, samples=200)
    return {**means, "low": low, "high": high, "seeds": len(runs)}


def corners(result: Result) -> tuple[float, float, float, float]:
    """A result's box as `(x0, y0, x1, y1)`, pixels."""
    x, y, width, height = result["bbox"]
    return x, y, x + width, y + height


def best_detections(dataset: CocoDataset, results: Sequence[Result], target: Instance) -> list[Result]:
    """At most four detections of the target's class in its image, those with at least half the best score.

    Each has an `iou` too: the largest IoU of its box with an object of the class.
    """
    found = [r for r in results if (r["image_id"], r["category_id"]) == (target.image_id, target.category_id)]
    found = sorted(found, key=lambda r: -r["score"])[:4]
    truths = [o.box for o in dataset.by_image[target.image_id] if o.category_id == target.category_id]
    best = [r for r in found if r["score"] >= found[0]["score"] / 2]
    return [{**r, "iou": float(box_iou([corners(r)], truths).max())} for r in best]


def fates(dataset: CocoDataset, split: Split, results: Sequence[Result]) -> pd.DataFrame:
    """What became of every object when all classes were asked for, by one rule.

    Of the detections of any class whose box overlaps the object's with an IoU of 0.5 or more, the best-scored decides:
    none: `missed`; of its own class: `found`; of another: `confused with base` or `... novel`, whichever that class is.

    Returns:
        Columns `instance, image_id, category_id, artists, area, split, fate, decided_by, score`; `decided_by` is the
        position of the deciding detection in `results`, -1 for none.
    """
    by_image: dict[int, list[int]] = {image_id: [] for image_id in dataset.images}
    for position, result in enumerate(results):
        by_image[result["image_id"]].append(position)
    rows = []
    for one in [i for i in dataset.instances if not i.crowd]:
        side, positions = "base" if one.category_id in split.base else "novel", by_image[one.image_id]
        overlap = box_iou([corners(results[p]) for p in positions], [one.box])[:, 0]
        near = [p for p, iou in zip(positions, overlap, strict=True) if iou >= 0.5]
        best, fate, score = max(near, key=lambda p: results[p]["score"], default=-1), "missed", 0.0
        if near:
            named, score = results[best]["category_id"], results[best]["score"]
            wrong = "confused with base" if named in split.base else "confused with novel"
            fate = "found" if named == one.category_id else wrong
        rows.append((one.id, one.image_id, one.category_id, one.split, one.area, side, fate, best, score))
    columns = ["instance", "image_id", "category_id", "artists", "area", "split", "fate", "decided_by", "score"]
    return pd.DataFrame(rows, columns=columns)


def fate_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Columns `group, objects, fate, share`: percent of each fate, by split and, where they are known, by artists."""
    group = table["split"] + np.where(table["artists"] == "", "", ", " + table["artists"] + " artists")
    rows = []
    for name, objects in table.groupby(group):
        shares = 100 * objects["fate"].value_counts(normalize=True)
        rows += [{"group": name, "objects": len(objects), "fate": f, "share": shares.get(f, 0.0)} for f in FATES]
    return pd.DataFrame(rows)
