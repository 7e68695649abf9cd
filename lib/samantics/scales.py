"""Settings of the three scales, and of a quick look at the first. Notebooks are the same at each; only these differ.

One nested dataclass per notebook. A setting that is the same at every scale has a default; a scale names the others.
"""

import dataclasses
from typing import Any

import pandas as pd

from samantics.cache import ASSETS
from samantics.errors import StudyError

NAMING = ASSETS / "naming_choice.csv"  # how notebook 02's weight of naming was chosen
FILTERS = ASSETS / "proposal_choice.csv"  # how notebook 03's filters of proposals were chosen


@dataclasses.dataclass(frozen=True)
class ProbingSettings:
    """Notebook 01."""

    probe_seeds: int = 3  # probes trained for each row, with seeds 0, 1, ...
    image_size: int = 96  # side of MojiWorld's pictures, pixels: what the zoo takes
    labels: float = 2  # MojiWorld pictures of each drawing to train on; below 1, of this share of the classes
    views: float = 1  # likewise, other views of these drawings
    view_step: int = 3  # of which every so many are asked: they stand beside the headline
    test: float = 2  # likewise, of test artists' drawings
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # train images per class of the few-shot curve, if there are as many
    scenes: tuple[int, int] = (300, 150)  # MojiWorld scenes that the dense readouts learn from and are asked


VOC = (  # the 20 COCO categories that PASCAL VOC has too: novel in the usual 60/20 split
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat",
    "dog", "horse", "sheep", "cow", "bottle", "chair", "couch", "potted plant", "dining table", "tv",
)  # fmt: skip
BESIDE_SAM = ("dinov2", "clip")  # whose features of objects notebook 02 measures beside SAM's


@dataclasses.dataclass(frozen=True)
class InContextSettings:
    """Notebook 02. The defaults are the paper's (study, section 4)."""

    novel: tuple[str, ...] = VOC  # categories that never carry a label in tuning; all others are base
    train_scenes: int = 0  # MojiWorld scenes to tune on, where the data is MojiWorld
    store_features: bool = False  # encode every training image once and keep SAM's maps (for COCO they would take 4 TB)
    trunk_maps: int = 4  # of SAM's trunk blocks, which the DETR sees
    dim: int = 256  # of the DETR, as the next six
    heads: int = 8
    ffn_width: int = 1024
    encoder_layers: int = 1
    decoder_layers: int = 6
    queries: int = 300
    dropout: float = 0.1
    fuser_width: int = 1024  # of the MLP between mask tokens and class embedding, inside
    epochs: float = 50
    batch: int = 16
    learning_rate: float = 2e-4  # of AdamW, as weight decay and clip; a tenth of it after four fifths
    weight_decay: float = 1e-4
    clip: float = 0.1
    flip: float = 0.5  # share of training images that are mirrored; 0 where features are stored, or adapters tuned
    classes_per_image: int = 4  # so many of an image's base categories are asked for in a step
    absent_classes: int = 0  # base categories that the image does not show, asked for beside them
    references_per_question: int = 1  # in tuning, the tokens of one to so many references are averaged
    # weight of naming objects and references among the base classes, in tuning; above 0 the score of a query also says
    # how well what lies in its box agrees with the class embedding; the paper has neither
    naming: float = 0.0
    adapters: int = 0  # channels of the bottlenecks in SAM's trunk of a second arm; 0: no such arm
    min_reference_area: float = 32.0**2  # pixels of a mask; smaller objects are no references
    top: int = 100  # detections kept per image and class
    min_score: float = 0.0  # detections below are left out
    shots: tuple[int, ...] = (1, 5, 10)  # references per class at which AP is reported
    reference_seeds: int = 3  # draws of the references, with seeds 0, 1, ...


def chosen_naming() -> float:
    """The weight with which right references exceed wrong ones most: `python -m samantics choose-naming`."""
    table = pd.read_csv(NAMING)
    return float(table["naming"][table["difference"].idxmax()])


# one of each superclass
POCKET_NOVEL = tuple(pd.read_csv(ASSETS / "instance_classes.csv").query("part == 'novel'")["class"])
POCKET_INCONTEXT = InContextSettings(
    novel=POCKET_NOVEL, train_scenes=3000, store_features=True,
    trunk_maps=2, dim=160, heads=5, ffn_width=320, decoder_layers=2, queries=24, dropout=0.0, fuser_width=512,
    epochs=4 / 3, batch=8, learning_rate=1e-3, clip=1.0, flip=0.0,
    classes_per_image=2, absent_classes=2, references_per_question=10,
    naming=chosen_naming(), adapters=32,
    min_reference_area=10.0**2, top=10, min_score=0.05, shots=(1, 10),
)  # fmt: skip


# the parents of SAM and SAM 2, and today's models: official weights only
MORE_ENCODERS = ("mae", "hiera", "sam3", "dinov3", "siglip2")


@dataclasses.dataclass(frozen=True)
class PipelineSettings:
    """Notebook 03. The defaults are the paper's (study, section 5)."""

    # sources of meaning, in the order of tables and figures; encoders whose gated weights are out of reach are left out
    sources: tuple[str, ...] = ("dinov2", "clip", "sam2", "sam", *MORE_ENCODERS, "random")
    reference_scenes: int = 0  # MojiWorld scenes that are written, where the data is MojiWorld
    target_scenes: int = 0
    targets: int = 0  # of MojiWorld's, the first so many are used (notebook 02 uses all)
    min_reference_area: float = 32.0**2  # pixels; smaller objects are no references
    reference_inset: float = 10.0  # pixels; objects nearer to the frame are no references
    points_per_side: int = 32  # of the proposals, as the next three
    predicted_iou: float = 0.4
    stability: float = 0.0
    box_nms: float = 0.95  # the paper keeps all; of nearly equal boxes only one can survive the NMS of its class
    semantic_size: int = 518  # side of DINOv2's input, pixels; 0 for its own
    shots: int = 10  # references per class of the headline row
    shot_curve: tuple[int, ...] = (1, 2, 5, 10)
    grids: tuple[int, ...] = (8, 16, 32)  # points per side of the curve over grid density
    grid_images: int = 200  # targets on which that curve is measured
    reference_seeds: int = 3  # draws of the references, with seeds 0, 1, ...


def chosen_filters() -> dict[str, Any]:
    """The filters with the highest AP on the validation artist's scenes: `python -m samantics choose-filters`."""
    table = pd.read_csv(FILTERS, usecols=["predicted_iou", "stability", "box_nms"])
    return {str(name): float(value) for name, value in table.iloc[0].items()}


# 96 pixels instead of some 640: objects take 20-60 % of the side; smaller ones are mostly covered by others
POCKET_PIPELINE = PipelineSettings(
    sources=("dinov2", "clip", "mae", "supervised", "sam2", "sam", "random"),
    reference_scenes=800, target_scenes=400, targets=100, min_reference_area=12.0**2, reference_inset=2.0,
    points_per_side=8, **chosen_filters(), semantic_size=0, grids=(3, 4, 6, 8, 12), grid_images=24,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AppendixSettings:
    """Notebooks A1 and A2."""

    pictures: int = 128  # that each model of A1's tiny training sees
    strengths: tuple[float, ...] = (0, 1, 2, 3, 4, 6, 8)  # of the class signals that A2 plants
    repetitions: int = 5  # of each, with other noise


@dataclasses.dataclass(frozen=True)
class CocoSubset:
    """The images of COCO val2017 that are fetched where no COCO files are given."""

    targets: int = 500  # images drawn as targets, with any number of objects
    references: int = 20  # other images with a reference, for each category: twice the shots, so that seeds differ
    seed: int = 0  # of that choice, the same in every run


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a run is made of."""

    name: str  # `pocket`, `quick`, `lite` or `paper`
    weights: str  # of encoders: `zoo` (shipped with the project) or `official` (downloaded, verified)
    # compared, in the order of tables and figures; those whose gated weights are out of reach are left out
    encoders: tuple[str, ...] = ("sam", "sam2", "clip", "dinov2", "random")
    probing: ProbingSettings = ProbingSettings()
    incontext: InContextSettings = InContextSettings()
    pipeline: PipelineSettings = PipelineSettings()
    appendix: AppendixSettings = AppendixSettings()
    coco: CocoSubset | None = None  # what is fetched of COCO for 02 and 03
    notebooks: tuple[str, ...] = ()  # numbers of those that run when none are named; none: all
    mark: str = ""  # written on every figure and into every result's record, where results are not to be believed


OFFICIAL_ENCODERS = ("sam", "sam2", "clip", "dinov2", *MORE_ENCODERS, "random")
STUDY = ("01", "02", "03", "04")  # what needs data and weights that do not come with the project
POCKET = Scale(
    "pocket", "zoo", ("sam", "sam2", "mae", "clip", "dinov2", "supervised", "random"), ProbingSettings(probe_seeds=2),
    POCKET_INCONTEXT, POCKET_PIPELINE,
)  # fmt: skip
# every cell and figure of pocket in some four minutes, from too little data to conclude anything
QUICK = dataclasses.replace(
    POCKET,
    name="quick",
    encoders=("sam", "sam2", "clip", "dinov2", "random"),
    probing=ProbingSettings(probe_seeds=1, labels=0.15, views=0.15, test=0.15, shots=(1, 2), scenes=(100, 40)),
    incontext=dataclasses.replace(POCKET_INCONTEXT, train_scenes=200, reference_seeds=2),
    pipeline=dataclasses.replace(
        POCKET_PIPELINE, sources=("dinov2", "clip", "sam2", "sam", "random"),
        reference_scenes=400, target_scenes=40, targets=20,
        shots=5, shot_curve=(1, 5), grids=(4, 8), grid_images=10, reference_seeds=1,
    ),
    appendix=AppendixSettings(pictures=32, strengths=(0, 2, 4, 8), repetitions=2),
    mark="quick run: small samples, for a first look only",
)  # fmt: skip
LITE = Scale("lite", "official", OFFICIAL_ENCODERS, coco=CocoSubset(), notebooks=STUDY)
PAPER = Scale("paper", "official", OFFICIAL_ENCODERS, notebooks=STUDY)
SCALES = {scale.name: scale for scale in (POCKET, QUICK, LITE, PAPER)}


def get_scale(name: str) -> Scale:
    """The settings of that name; StudyError where there are none."""
    if name not in SCALES:
        raise StudyError(f"no scale is called {name!r}: choose from {', '.join(SCALES)}")
    return SCALES[name]
