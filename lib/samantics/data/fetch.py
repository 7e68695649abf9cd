"""What the scale `lite` fetches by itself: Imagenette, and of COCO val2017 the annotations and the images it needs.

A download goes on where it broke off, is checked by its hash, and appears whole or not at all; what is there is not
fetched again. `SAMANTICS_MIRROR` names another server that has the same paths.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pooch
from tqdm.auto import tqdm

from samantics.cache import alone, atomic_path, cache_dir, hash_value, reading, write_json
from samantics.data.coco import check_images, load_coco
from samantics.data.downloads import download
from samantics.data.folders import ImageFolder, image_folders, open_image
from samantics.data.instances import CocoDataset, ImageRecord, Instance, clipped
from samantics.data.references import ReferenceRule
from samantics.errors import StudyError
from samantics.scales import CocoSubset

TOGETHER = 8  # images fetched at once
COCO = "http://images.cocodataset.org"  # has no certificate of that name, so no https
ANNOTATIONS = f"{COCO}/annotations/annotations_trainval2017.zip"
ANNOTATIONS_MD5 = "f4bbac642086de4f52a3fdda2de5fa2c"  # docs/weights.md says where from
INSTANCES = "annotations/instances_val2017.json"  # in that archive


def _archive(url: str, md5: str, folder: Path) -> Path:
    """The verified archive in the folder: there already, or fetched."""
    place = folder / url.rsplit("/", 1)[-1]
    if not place.is_file():
        download(_address(url), place, md5, "md5")
    elif pooch.file_hash(str(place), "md5") != md5:
        raise StudyError(f"{place} is not {url} (another MD5): delete it to download it again")
    return place


def _address(url: str) -> str:
    mirror = os.environ.get("SAMANTICS_MIRROR", "").rstrip("/")
    if mirror and not mirror.startswith(("https://", "http://")):
        raise StudyError(f"SAMANTICS_MIRROR is {mirror!r}, which is no address: begin it with https://, or unset it")
    return mirror + urlsplit(url).path if mirror else url


# -------------------------------------------------------------------------------------------------------- Imagenette


def imagenette(root: Path | str) -> tuple[ImageFolder, ImageFolder]:
    """Train and validation images of Imagenette (320 px): ten classes of ImageNet, fetched and verified once."""
    from torchvision.datasets import Imagenette

    folder = Path(root) / "imagenette2-320"
    with alone(folder):
        if not folder.is_dir():
            source, md5 = Imagenette._ARCHIVES["320px"]
            archive = _archive(source, md5, folder.parent)
            try:
                # pooch's own unpacking would leave half of it when killed
                place = tempfile.TemporaryDirectory(prefix=".imagenette.", dir=root)
                with tarfile.open(archive) as packed, place as unpacked:
                    packed.extractall(unpacked, filter="data")
                    os.replace(Path(unpacked) / folder.name, folder)
            except (OSError, ValueError, EOFError, tarfile.TarError) as error:
                raise StudyError(f"cannot unpack {archive} ({error}): unpack {source} into {root} yourself") from error
    return image_folders(folder)


# -------------------------------------------------------------------------------------------------------------- COCO


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
                write_json(path, _only(content, {*chosen[part]}))
        entries = []
        for path in files.values():
            with reading(path):
                entries += json.loads(path.read_bytes())["images"]
        _fetch_images(entries, folder / "images")
    references, targets = (load_coco(path, folder / "images") for path in files.values())
    return references, check_images(targets)


def _official(folder: Path) -> Path:
    """The annotations of val2017, out of their archive (which also has those of train2017, twenty times as large)."""
    place = folder / Path(INSTANCES).name
    if not place.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        archive = _archive(ANNOTATIONS, ANNOTATIONS_MD5, folder)
        try:
            with zipfile.ZipFile(archive) as packed, atomic_path(place) as temporary:
                temporary.write_bytes(packed.read(INSTANCES))
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise StudyError(f"{archive} does not hold {INSTANCES}: delete it to download it again") from error
        archive.unlink()
    return place


def chosen_images(content: Mapping[str, Any], subset: CocoSubset, rule: ReferenceRule) -> dict[str, list[int]]:
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
    return {"references": sorted(chosen), "targets": sorted(order[: subset.targets])}


def _only(content: Mapping[str, Any], numbers: set[int]) -> dict[str, Any]:
    """The file with these images only; all categories stay."""
    images = [entry for entry in content["images"] if entry["id"] in numbers]
    return {**content, "images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in numbers]}


def _fetch_images(entries: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Fetch the images that are not there, several at once; the first that cannot be had stops all."""
    missing = [entry for entry in entries if not (folder / entry["file_name"]).is_file()]
    (folder.parent / "incoming").mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(TOGETHER) as pool:
        jobs = [pool.submit(_fetch_image, entry, folder) for entry in missing]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="COCO images", disable=None if jobs else True):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch_image(entry: Mapping[str, Any], folder: Path) -> None:
    """Fetch one image; it must open whole and have the size that the annotations say."""
    place, url = folder.parent / "incoming" / entry["file_name"], _address(f"{COCO}/val2017/{entry['file_name']}")
    try:
        download(url, place, algorithm="md5")
        size = open_image(place).size
    except StudyError as error:  # what the user is told to put somewhere belongs among the others
        raise StudyError(str(error).replace(str(place), str(folder / place.name))) from error
    wanted = (entry["width"], entry["height"])
    if size != wanted:
        raise StudyError(f"{url} is an image of {size} pixels and not of {wanted}: put the official one into {folder}")
    os.replace(place, folder / place.name)
