"""What objects are found in: reference and target images of a scale, or two COCO files of the user's."""

import dataclasses
import functools
import json
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from samantics.cache import alone, atomic_path, cache_dir, hash_value, reading, write_json
from samantics.data.coco import CocoDataset, ImageRecord, Instance, clipped
from samantics.data.coco_files import load_coco
from samantics.data.downloads import address, archive, download
from samantics.data.folders import open_image
from samantics.data.per_image import UNNAMED
from samantics.data.references import ReferenceRule, matched_categories, shared_images
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World
from samantics.run import Run
from samantics.scales import CocoSubset

TOGETHER = 8  # images fetched at once
COCO = "http://images.cocodataset.org"  # has no certificate of that name, so no https
ANNOTATIONS = f"{COCO}/annotations/annotations_trainval2017.zip"
ANNOTATIONS_MD5 = "f4bbac642086de4f52a3fdda2de5fa2c"  # docs/weights.md says where from
INSTANCES = "annotations/instances_val2017.json"  # in that archive


@dataclasses.dataclass(frozen=True)
class Data:
    """Reference and target images."""

    references: CocoDataset
    targets: CocoDataset
    rule: ReferenceRule  # which instances may be references
    names: dict[int, str]  # of categories, by id
    notes: tuple[str, ...]  # a line for each thing the reader should know of the files


def load_data(
    run: Run, references: str = "", targets: str = "", images: str = "", skip_bad_images: bool = False,
    min_area: float = ReferenceRule.min_area, target_images: str = "",
) -> Data:  # fmt: skip
    """The reader's files and folder of images where given (see `load_coco`), else the scale's own data.

    At `pocket` that is MojiWorld scenes, at `lite` images of COCO val2017, which are fetched. `target_images`: the
    folder of the targets' images where it is another; `min_area`: of references, pixels of a COCO photograph.
    """
    settings = run.scale.pipeline
    rule = ReferenceRule(min_area=settings.min_reference_area, inset=settings.reference_inset)
    given = {"references": references, "targets": targets, "images": images}
    if any(given.values()):
        lacking = [name for name, value in given.items() if not value]
        if lacking:
            raise StudyError(f"own data needs --references, --targets and --images: --{lacking[0]} is missing")
        known = load_coco(references, images, skip_bad_images)
        if not known.annotated:
            what = "has no annotations, which references need: give COCO JSON, or labelme's or SA-1B's files"
            raise StudyError(f"{known.path} {what}")
        asked = load_coco(targets, target_images or images, skip_bad_images)
        if {*asked.categories.values()} == {UNNAMED} and UNNAMED not in known.categories.values():
            notes = (*asked.notes, f"{asked.path.name}: SA-1B's masks have no names: the targets are not measured")
            asked = dataclasses.replace(asked, categories={}, instances=(), annotated=False, notes=notes)
        rule = ReferenceRule(min_area=min_area, relative=True)  # a photograph's pixels, at every scale
    elif settings.target_scenes:
        known = scenes(run, "references", settings.reference_scenes)
        asked = scenes(run, "targets", settings.target_scenes)
    elif run.scale.coco:
        known, asked = coco_subset(run.scale.coco, rule)
    else:
        raise StudyError(f"scale {run.scale.name} needs COCO files: give --references, --targets and --images")
    known, names, notes = matched_categories(known, asked)
    run.record("reference_data", known.hash)
    run.record("target_data", asked.hash)
    return Data(known, asked, rule, names, (*known.notes, *asked.notes, *notes, *shared_images(known, asked)))


def scenes(run: Run, stream: str, count: int) -> CocoDataset:
    """The first scenes of a stream of MojiWorld (see `STREAMS`), of the pocket models' size, written once."""
    world = World(pocket.DEFAULT.image_size, seed=run.seed)
    return write_scenes(world, STREAMS[stream], count, run.cache / "scenes")


def coco_subset(subset: CocoSubset, rule: ReferenceRule) -> tuple[CocoDataset, CocoDataset]:
    """References and targets out of COCO val2017, of disjoint images; what is missing of them is fetched.

    The official annotations of the chosen images stand in `references_*.json` and `targets_*.json` in the folder
    `datasets/coco_val2017` of the cache, the images beside them.
    """
    folder = cache_dir() / "datasets" / "coco_val2017"
    key = hash_value([dataclasses.asdict(subset), dataclasses.asdict(rule)])
    files = {part: folder / f"{part}_{key}.json" for part in ("references", "targets")}
    with alone(folder):
        if not all(path.is_file() for path in files.values()):
            official = _official(folder)
            with reading(official):
                content = json.loads(official.read_bytes())
                chosen = chosen_images(content, subset, rule)
            for part, path in files.items():
                images = [entry for entry in content["images"] if entry["id"] in chosen[part]]
                shown = [entry for entry in content["annotations"] if entry["image_id"] in chosen[part]]
                write_json(path, {**content, "images": images, "annotations": shown})
        entries = []
        for path in files.values():
            with reading(path):
                entries += json.loads(path.read_bytes())["images"]
        for place in (folder / "images", folder / "incoming"):
            place.mkdir(exist_ok=True)
        missing = [entry for entry in entries if not (folder / "images" / entry["file_name"]).is_file()]
        fetch, hidden = functools.partial(_fetch_image, folder / "images"), None if missing else True
        thread_map(fetch, missing, max_workers=TOGETHER, desc="COCO images", disable=hidden)
    references, targets = (load_coco(path, folder / "images") for path in files.values())
    return references, targets


def _official(folder: Path) -> Path:
    """The annotations of val2017, out of their archive (which also has those of train2017, twenty times as large)."""
    place = folder / Path(INSTANCES).name
    if not place.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        packed = archive(ANNOTATIONS, ANNOTATIONS_MD5, folder)
        try:
            with zipfile.ZipFile(packed) as content, atomic_path(place) as temporary:
                temporary.write_bytes(content.read(INSTANCES))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise StudyError(f"{packed} does not hold {INSTANCES}: delete it to download it again") from error
        packed.unlink()
    return place


def chosen_images(content: Mapping[str, Any], subset: CocoSubset, rule: ReferenceRule) -> dict[str, set[int]]:
    """Ids of the images of each part: any as targets, and of the others so many as the references of a class need.

    The rarest classes choose first; images that a rarer class has brought along count for the others, too.
    """
    images = {e["id"]: ImageRecord(e["id"], e["file_name"], e["width"], e["height"]) for e in content["images"]}
    shown: dict[int, list[Instance]] = defaultdict(list)
    for a in content["annotations"]:
        if box := clipped(a["bbox"], images[a["image_id"]]):
            crowd = bool(a["iscrowd"])
            shown[a["image_id"]].append(Instance(a["id"], a["image_id"], a["category_id"], box, a["area"], {}, crowd))
    order = np.random.default_rng(subset.seed).permutation(sorted(images)).tolist()
    pools: dict[int, dict[int, None]] = defaultdict(dict)  # of a category: images, in drawn order
    for number in order[subset.targets :]:
        for instance in shown[number]:
            if not rule.refusal(instance, shown[number], images[number]):
                pools[instance.category_id][number] = None
    chosen: set[int] = set()
    for category in sorted(pools, key=lambda c: (len(pools[c]), c)):
        lacking = max(0, subset.references - len(chosen & pools[category].keys()))
        chosen.update([number for number in pools[category] if number not in chosen][:lacking])
    return {"references": chosen, "targets": {*order[: subset.targets]}}


def _fetch_image(folder: Path, entry: Mapping[str, Any]) -> None:
    """Fetch one image; it must open whole and have the size that the annotations say."""
    place, url = folder.parent / "incoming" / entry["file_name"], address(f"{COCO}/val2017/{entry['file_name']}")
    try:
        download(url, place, algorithm="md5")
        size = open_image(place).size
    except StudyError as error:  # what the user is told to put somewhere belongs among the others
        raise StudyError(str(error).replace(str(place), str(folder / place.name))) from error
    wanted = (entry["width"], entry["height"])
    if size != wanted:
        raise StudyError(f"{url} is an image of {size} pixels and not of {wanted}: put the official one into {folder}")
    os.replace(place, folder / place.name)
