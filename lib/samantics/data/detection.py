"""What objects are found in: reference and target images of a scale, or two COCO files of the user's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from samantics.data.coco import CocoDataset, ImageRecord, check_images, load_coco, per_image_files
from samantics.data.fetch import coco_subset
from samantics.data.folders import counted, image_size, listing, readable_endings, visible_files
from samantics.data.per_image import UNNAMED
from samantics.data.references import ReferenceRule, matched_categories, shared_images
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World
from samantics.run import Run


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
    """The COCO files where given (or labelme's or SA-1B's; targets may be images alone), else the scale's own data.

    At `pocket` that is MojiWorld scenes, at `lite` images of COCO val2017, which are fetched.

    Args:
        run: whose scale says what its own data is.
        references, targets, images: files, and the folder of the images that they name.
        target_images: the folder of the targets' images where it is another.
        skip_bad_images: leave out images that are missing, damaged or of another size than their entry says.
        min_area: of references in files, pixels of a COCO photograph.

    Raises:
        StudyError: only some of the three are given; none are, at a scale that has no data of its own; bad files.
    """
    settings = run.scale.pipeline
    rule = ReferenceRule(min_area=settings.min_reference_area, inset=settings.reference_inset)
    given = {"references": references, "targets": targets, "images": images}
    if any(given.values()):
        lacking = [name for name, value in given.items() if not value]
        if lacking:
            raise StudyError(f"own data needs --references, --targets and --images: --{lacking[0]} is missing")
        datasets = _own_files(references, targets, images, target_images or images, skip_bad_images)
        rule = ReferenceRule(min_area=min_area, relative=True)  # a photograph's pixels, at every scale
    elif settings.target_scenes:
        counts = {"references": settings.reference_scenes, "targets": settings.target_scenes}
        datasets = [scenes(run, *part) for part in counts.items()]
    elif run.scale.coco:
        datasets = list(coco_subset(run.scale.coco, rule))
    else:
        raise StudyError(f"scale {run.scale.name} needs COCO files: give --references, --targets and --images")
    matched, names, notes = matched_categories(*datasets)
    every_note = (*matched.notes, *datasets[1].notes, *notes, *shared_images(matched, datasets[1]))
    run.record("reference_data", matched.hash)
    run.record("target_data", datasets[1].hash)
    return Data(matched, datasets[1], rule, names, every_note)


def _own_files(references: str, targets: str, images: str, target_images: str, skip_bad: bool) -> list[CocoDataset]:
    """The reader's files; their targets may be a folder of images alone."""
    known = load_coco(references, images, skip_bad)
    if Path(targets).is_dir() and not per_image_files(Path(targets))[0]:
        asked = unannotated(Path(targets), skip_bad)
    else:
        asked = load_coco(targets, target_images, skip_bad)
    if UNNAMED not in known.categories.values():
        asked = _without_unnamed(asked)
    return [check_images(dataset, skip_bad) for dataset in (known, asked)]


def _without_unnamed(targets: CocoDataset) -> CocoDataset:
    """Targets whose masks have no names are predicted and not measured."""
    if {*targets.categories.values()} != {UNNAMED}:
        return targets
    notes = (*targets.notes, f"{targets.path.name}: SA-1B's masks have no names: the targets are not measured")
    return dataclasses.replace(targets, categories={}, instances=(), annotated=False, notes=notes)


def scenes(run: Run, stream: str, count: int) -> CocoDataset:
    """The first scenes of a stream of MojiWorld (see `STREAMS`), of the pocket models' size, written once."""
    world = World(pocket.DEFAULT.image_size, seed=run.seed)
    return load_coco(*write_scenes(world, STREAMS[stream], count, run.cache / "scenes"))


def unannotated(folder: Path, skip_bad_images: bool = False) -> CocoDataset:
    """The images of a folder and its sub-folders, as targets that can be predicted and not measured.

    Raises:
        StudyError: there is none, or one cannot be read and is not to be left out.
    """
    names = [str(p.relative_to(folder)) for p in visible_files(folder) if p.suffix.lower() in readable_endings()]
    records, bad = dict[int, ImageRecord](), list[str]()
    for number, name in enumerate(names, 1):
        try:
            records[number] = ImageRecord(number, name, *image_size(folder / name))
        except StudyError as error:
            if not skip_bad_images:
                raise StudyError(f"{error} (--skip-bad-images leaves it out)") from error
            bad.append(name)
    if not records:
        raise StudyError(f"{folder} has no images: name a folder with some, or a COCO file")
    notes = [f"{folder.name}: {counted(len(bad), 'image')} ({listing(bad)}): damaged: left out"] * bool(bad)
    return CocoDataset(folder, folder, records, {}, (), annotated=False, notes=tuple(notes))
