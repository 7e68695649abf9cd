"""References: which instances may show a class to a model, which are drawn, and how two COCO files go together."""

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samantics.cache import hash_file
from samantics.data.coco import CocoDataset, ImageRecord, Instance, box_iou
from samantics.data.coco_files import only_crowds
from samantics.errors import StudyError, listing

PHOTO = 640 * 480  # pixels of a COCO photograph


@dataclasses.dataclass(frozen=True)
class ReferenceRule:
    """Which instances may serve as references: the paper's values (section 5), in pixels of a COCO photograph."""

    min_area: float = 32.0**2  # exclusive
    max_share: float = 0.5  # of the image's area, exclusive
    max_aspect: float = 5.0  # of the image, long side to short
    inset: float = 10.0  # that the box keeps from the frame
    max_overlap: float = 0.35  # box IoU with any other box of the image
    relative: bool = False  # `min_area` and `inset` shrink with images of fewer pixels than a COCO photograph

    def refusal(self, instance: Instance, neighbours: Sequence[Instance], image: ImageRecord) -> str:
        """Why an instance cannot be a reference, empty where it can; `neighbours` are all instances of its image."""
        x0, y0, x1, y1 = instance.box
        pixels = image.width * image.height
        scale = min(1.0, pixels / PHOTO) if self.relative else 1.0
        if instance.crowd or instance.split not in ("", "train"):
            return "crowds, or drawn by artists who are for tests"
        if not instance.area > self.min_area * scale:
            return "too small (min_area)"
        if not instance.area < self.max_share * pixels:
            return "too large (max_share)"
        if min(x0, y0, image.width - x1, image.height - y1) < self.inset * math.sqrt(scale):
            return "too near to the frame (inset)"
        if max(image.width, image.height) > self.max_aspect * min(image.width, image.height):
            return "in too narrow an image (max_aspect)"
        others = [neighbour.box for neighbour in neighbours if neighbour.id != instance.id]
        if others and box_iou([instance.box], others).max() > self.max_overlap:
            return "overlapped by another (max_overlap)"
        return ""


def eligible(dataset: CocoDataset, rule: ReferenceRule) -> list[Instance]:
    """The instances that the rule admits, image by image; StudyError counts the reasons where it admits none."""
    refused: Counter[str] = Counter()
    admitted = []
    for image_id, instances in dataset.by_image.items():
        for instance in instances:
            why = rule.refusal(instance, instances, dataset.images[image_id])
            refused[why] += 1
            admitted += [] if why else [instance]
    if admitted:
        return admitted
    if why := only_crowds(dataset.instances):
        raise StudyError(f"{dataset.path}: {why}")
    counts = ", ".join(f"{count} {why}" for why, count in refused.most_common()) or "it has no objects"
    raise StudyError(f"{dataset.path}: no instance can be a reference: {counts}: add some or relax the rule")


def choose_references(
    dataset: CocoDataset, shots: int, seed: int = 0, rule: ReferenceRule | None = None
) -> dict[int, tuple[Instance, ...]]:
    """Up to `shots` references for every category that has any, those of one category from distinct images.

    Seeded, and nested: the references of fewer shots are the first ones of more shots.
    """
    if shots < 1:
        raise StudyError(f"shots is {shots}: choose 1 or more")
    pools: dict[int, list[Instance]] = defaultdict(list)
    for instance in eligible(dataset, rule or ReferenceRule()):
        pools[instance.category_id].append(instance)
    chosen = {}
    for category, pool in sorted(pools.items()):
        one_of_image: dict[int, Instance] = {}
        for position in np.random.default_rng([seed, category % 2**64]).permutation(len(pool)):  # ids may be negative
            one_of_image.setdefault(pool[position].image_id, pool[position])
        chosen[category] = tuple(one_of_image.values())[:shots]
    return chosen


def matched_categories(
    references: CocoDataset, targets: CocoDataset
) -> tuple[CocoDataset, dict[int, str], tuple[str, ...]]:
    """The references with the targets' category ids (matched by name where they differ), the names by id, and notes."""
    first, second = ([(c, _key(name)) for c, name in d.categories.items()] for d in (references, targets))
    notes = []
    # an id stands for two names, or a name for two ids
    if first != second and any((c == d) != (one == other) for c, one in first for d, other in second):
        references = _renumbered(references, targets)
        notes.append("the two files number their categories differently: matched by name")
    names = dict(sorted({**targets.categories, **references.categories}.items()))
    known, asked = ({instance.category_id for instance in dataset.instances} for dataset in (references, targets))
    if targets.annotated:
        lacking = "has no reference: all its objects count as missed"
        spare = "shows in the references only: no AP of its own"
        notes += [f"category {c} ({names[c]}) {lacking}" for c in sorted(asked - known)]
        notes += [f"category {c} ({names[c]}) {spare}" for c in sorted(known - asked)]
    return references, names, tuple(notes)


def _key(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _renumbered(references: CocoDataset, targets: CocoDataset) -> CocoDataset:
    for dataset in (references, targets):
        twice = [name for name, count in Counter(map(_key, dataset.categories.values())).items() if count > 1]
        if twice:
            raise StudyError(f"{dataset.path} has two categories called {twice[0]!r}: give each a name of its own")
    ids = {_key(name): c for c, name in targets.categories.items()}
    if not ids.keys() & {_key(name) for name in references.categories.values()}:
        raise StudyError(f"{references.path} and {targets.path} share no category name: use one list in both")
    free = max([*ids.values(), *references.categories, 0]) + 1
    new = {c: ids.get(_key(name), free + n) for n, (c, name) in enumerate(references.categories.items())}
    categories = {new[c]: targets.categories.get(new[c], name) for c, name in references.categories.items()}
    instances = tuple(dataclasses.replace(i, category_id=new[i.category_id]) for i in references.instances)
    return dataclasses.replace(references, categories=categories, instances=instances)


def shared_images(references: CocoDataset, targets: CocoDataset) -> tuple[str, ...]:
    """A warning where images (the very file or a copy) are on both sides; none where they are not."""
    digest, by_size = functools.cache(hash_file), defaultdict[int, list[Path]](list)
    for record in references.images.values():
        path = references.folder / record.file
        by_size[path.stat().st_size].append(path)
    both = []
    for record in targets.images.values():
        path = targets.folder / record.file
        twins = by_size[path.stat().st_size]
        if path in twins or (twins and digest(path) in map(digest, twins)):
            both.append(record.file)
    if not both:
        return ()
    counts = f"{len(both)} of {len(targets.images)} target images ({listing(both)}) are among the references, too"
    return (f"{counts}: an object may be matched with itself, which makes the scores too good",)
