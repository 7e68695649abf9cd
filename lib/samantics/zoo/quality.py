"""How the zoo's models learned, and whether each is good at its own job, asked with drawings that none has seen."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import masks_to_boxes

from samantics.cache import write_text
from samantics.errors import StudyError
from samantics.metrics.intervals import paired_difference
from samantics.models import pocket
from samantics.models.encoder import Encoder, load_encoder
from samantics.mojiworld import captions, catalogue
from samantics.mojiworld.rendered import Pictures, stored_pictures
from samantics.mojiworld.world import STREAMS, Stream, World, visible_drawings
from samantics.probing.linear import linear_probe
from samantics.probing.probes import class_texts, knn_probe, zero_shot_probe
from samantics.training_free.mask_features import token_weights, unit
from samantics.zoo.contract import Batch, batches, pooled
from samantics.zoo.masks import Sam2Objective, SamObjective
from samantics.zoo.objectives import OBJECTIVES, build_objective

LEARNED = ["objective", "probe_top1", "knn_top1"]  # what curves show
LAST_PART = 1 / 3  # of the training: where it changes the probe by no more than noise, the training has converged
Measures = dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]  # outcome of every item, and the item's cluster
SHIPPED = pocket.ASSETS / "quality.csv"
SCENES = Stream("test scenes", "test", ("scene",))  # of all classes
SHOTS = 10  # references of a class, as in the pipeline
AIMS = {  # written down before the zoo was trained
    ("sam", "iou_click"): 0.82, ("sam2", "iou_click"): 0.82, ("sam", "iou_box"): 0.88, ("sam2", "iou_box"): 0.88,
    ("sam", "iou_ceiling"): 0.92, ("sam2", "iou_ceiling"): 0.92, ("clip", "zero_shot"): 40.0,
    ("clip", "mask_name"): 30.0, ("dinov2", "linear"): 20.0, ("dinov2", "mask_name"): 20.0,
}  # fmt: skip
THREE_TIMES = {("dinov2", "linear"): "sam", ("dinov2", "mask_name"): "random"}  # whose value it is to reach three times


# ------------------------------------------------------------------------------------------------ how they learned


def learning_curves(folders: Sequence[Path] = ()) -> pd.DataFrame:
    """What trainings wrote down, a row for each point of measurement.

    Args:
        folders: of curves and cards; by default the zoo's own, and those of other seeds (whose weights do not ship).

    Returns:
        `encoder, seed, images` (seen so far), `seconds`, `objective` (the loss on pictures never trained on),
        `probe_top1, knn_top1` (percent of the validation artist's drawings whose class is named).

    Raises:
        StudyError: a curve lacks its card.
    """
    parts = []
    for folder in folders or [pocket.ASSETS, *sorted(pocket.ASSETS.glob("seed_*"))]:
        for name in [name for name in OBJECTIVES if (folder / f"{name}.csv").is_file()]:
            curve = pd.read_csv(folder / f"{name}.csv").rename(columns={"held_out_loss": "objective"})
            parts.append(curve.assign(encoder=name, seed=pocket.card(name, folder)["recipe"]["seed"]))
    return pd.concat(parts, ignore_index=True)[["encoder", "seed", "images", "seconds", *LEARNED]]


def gigaflops(name: str, batch: Batch) -> float:
    """Operations (in thousand millions) of one training step, forward and backward, for one picture."""
    with FlopCounterMode(display=False) as counter:
        build_objective(name).train()(batch, 0.5)[0].backward()
    return counter.get_total_flops() / len(batch.images) / 1e9


def seed_noise(curves: pd.DataFrame) -> pd.DataFrame:
    """How far trainings end apart that differ in their seed alone, given their `learning_curves`.

    Returns:
        For each model that was trained repeatedly at one length: `encoder, images, seeds`, then mean and standard
        deviation over seeds of `objective`, `probe_top1` and `knn_top1` at the end.
    """
    ends = curves.loc[curves.groupby(["encoder", "seed"], sort=False)["images"].idxmax()]
    same = ends.groupby(["encoder", "images"], sort=False)
    table = same[LEARNED].agg(["mean", "std"])
    table.columns = ["_".join(names) for names in table.columns]
    table.insert(0, "seeds", same.size())
    return table[table["seeds"] > 1].reset_index()


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """What the last third of each model's longest training still changed, given `learning_curves`: has it converged?

    Returns:
        `encoder, probe_change` (points, counted from the measuring point nearest to the third's begin, mean over
        seeds), `noise` (two standard deviations of the final probe over seeds, or where there is one seed two standard
        errors of the drawings that it was tested on), `converged` (the change is within the noise).
    """
    drawings, rows = sum(map(len, visible_drawings(STREAMS["choice"].role))), []
    spread = seed_noise(curves).groupby("encoder")["probe_top1_std"].max()
    for name, runs in curves.groupby("encoder", sort=False):
        length = runs["images"].max()
        longest = runs[runs.groupby("seed")["images"].transform("max") == length]
        begins = (longest["images"] - (1 - LAST_PART) * length).abs().groupby(longest["seed"]).idxmin()
        end = float(longest.loc[longest["images"] == length, "probe_top1"].mean())
        change = end - float(longest.loc[begins, "probe_top1"].mean())
        noise = 2 * (spread[name] if name in spread else float(np.sqrt(end * (100 - end) / drawings)))
        rows.append((name, change, noise, abs(change) <= noise))
    return pd.DataFrame(rows, columns=["encoder", "probe_change", "noise", "converged"])


# ------------------------------------------------------------------------------------------------- how good they are


def quality_rows(encoder: Encoder, share: float = 1.0) -> pd.DataFrame:
    """What a pocket model does with the test artists' drawings: `encoder, measure, value, low, high`.

    IoU as a share, all else in percent, with 95 % intervals that draw whole scenes or classes.
    """
    own: dict[str, list[Callable[[Encoder, float], Measures]]] = {"sam": [masks], "sam2": [masks], "clip": [words]}
    rows = []
    for measure in (*own.get(encoder.name, []), class_probes, mask_names):
        for key, (values, clusters) in measure(encoder, share).items():
            rows.append((encoder.name, key, *paired_difference(values, 0 * values, clusters)[:3]))
    return pd.DataFrame(rows, columns=["encoder", "measure", "value", "low", "high"])


def zoo_quality() -> pd.DataFrame:
    """What each model of the shipped zoo does with the drawings of test artists, as `write_quality` measured it.

    Returns:
        `encoder, measure, value, low, high` (see `quality_rows`), `aim` (NaN where none was set).

    Raises:
        StudyError: a model's weights are not those that were measured.
    """
    table = pd.read_csv(SHIPPED)
    for name in pocket.NAMES:
        if set(table.loc[table["encoder"] == name, "weights"]) != {pocket.card(name)["sha256"][:16]}:
            raise StudyError(f"{SHIPPED} does not fit the weights of {name}: run python -m samantics quality")
    return table.drop(columns="weights")


def write_quality() -> pd.DataFrame:
    """Measure the shipped zoo (minutes) and write the table beside its weights: `python -m samantics quality`."""
    encoders, aims = [load_encoder(name) for name in (*pocket.NAMES, "random")], dict(AIMS)
    table = pd.concat([quality_rows(encoder).assign(weights=encoder.weights_hash) for encoder in encoders])
    value = table.set_index(["encoder", "measure"])["value"]
    for (name, measure), other in THREE_TIMES.items():
        aims[name, measure] = max(AIMS[name, measure], 3 * value[other, measure])
    table.insert(5, "aim", [aims.get(key, np.nan) for key in value.index])
    write_text(SHIPPED, table.to_csv(index=False, float_format="%.5g"))
    return table


def pictures_of(encoder: Encoder, stream: Stream, share: float, count: int = 0) -> Pictures:
    """A share of so many pictures of a stream, of the encoder's size; by default each drawing in both kinds."""
    count = count or 2 * sum(map(len, visible_drawings(stream.role)))
    return stored_pictures(World(encoder.image_size), stream, round(share * count))


def class_probes(encoder: Encoder, share: float) -> Measures:
    """Class by 20 neighbours and by a linear probe (percent), from two labelled pictures of every training drawing."""
    known, asked = (pictures_of(encoder, stream, share) for stream in (STREAMS["labels"], STREAMS["test"]))
    artist = pd.factorize(catalogue.catalogue()["artist"])[0][known.drawings[:, 0]]  # held out to choose settings
    train, test = ((pooled(encoder, part.images).cpu().numpy(), part.labels) for part in (known, asked))
    data = (*train, *test, len(catalogue.classes()))
    found = {"knn20": knn_probe(*data, k=20), "linear": linear_probe(*data, seeds=(0,), groups=artist)}
    return {measure: (100.0 * probe.top1[0], asked.labels) for measure, probe in found.items()}


def mask_names(encoder: Encoder, share: float) -> Measures:
    """Class of 80 of the object under a true mask, by the nearest prototype, as in the pipeline (percent)."""
    known = pictures_of(encoder, STREAMS["references"], share, 600)
    labels = catalogue.class_of_drawing()[known.drawings[known.drawings >= 0]]
    features = pd.DataFrame(object_features(encoder, known)).groupby(labels).head(SHOTS)
    prototypes = features.groupby(labels[features.index]).mean()
    asked = pictures_of(encoder, STREAMS["targets"], share, 300)
    scene, drawing = np.nonzero(asked.drawings >= 0)[0], asked.drawings[asked.drawings >= 0]
    true, unseen = catalogue.class_of_drawing()[drawing], visible_drawings(STREAMS["test"].role)[0]
    shown = np.isin(drawing, unseen) & np.isin(true, prototypes.index)
    scores = object_features(encoder, asked)[shown] @ unit(prototypes.to_numpy()).T
    named = prototypes.index.to_numpy()[scores.argmax(1)]
    return {"mask_name": (100.0 * (named == true[shown]), scene[shown])}


def object_features(encoder: Encoder, scenes: Pictures) -> NDArray[np.float32]:
    """`(objects, C)` unit vectors: the mean of the encoder's map inside each true mask."""
    maps = np.concatenate([encoder.encode(pixels)["final"].dense.cpu().numpy() for pixels in batches(scenes.images)])
    geometry = encoder.preprocess.geometry(encoder.image_size, encoder.image_size)
    weights = [token_weights(object_masks(field), geometry, maps.shape[2:]) for field in scenes.instances]
    tokens = maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2)
    return unit(np.concatenate([weight @ its for weight, its in zip(weights, tokens, strict=True)]))


@torch.no_grad()
def masks(encoder: Encoder, share: float) -> Measures:
    """IoU of every object of unseen scenes: the best of three masks of a click at its centre, the mask of its box.

    Beside them `iou_ceiling`, what the decoder's cells allow: the IoU of the true mask, averaged to them.
    """
    sam = (SamObjective if encoder.name == "sam" else Sam2Objective)(model=encoder.model).eval()
    scenes, found = pictures_of(encoder, SCENES, share, 150), []
    for field, pixels in zip(scenes.instances, batches(scenes.images, 1), strict=True):
        true = object_masks(field)
        image = tuple(level.expand(len(true), -1, -1, -1) for level in sam.embed(pixels.to(encoder.device)))
        points = torch.from_numpy(np.stack([centre_of(mask) for mask in true])).to(image[0])[:, None]
        clicked, _ = sam.decode(image, *sam.prompt(points, torch.ones(len(true), 1).to(points)))
        boxed, _ = sam.decode(image, *sam.prompt(boxes=masks_to_boxes(torch.from_numpy(true)).to(points)))
        coarse = functional.adaptive_avg_pool2d(torch.from_numpy(true).float()[:, None], boxed.shape[-1]) - 0.5
        found.append([iou_with(logits.cpu(), true).max(1) for logits in (clicked[:, 1:], boxed[:, :1], coarse)])
    scene = np.repeat(np.arange(len(found)), [len(iou[0]) for iou in found])
    columns = zip(("iou_click", "iou_box", "iou_ceiling"), np.concatenate(found, axis=1), strict=True)
    return {measure: (iou, scene) for measure, iou in columns}


def object_masks(field: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`(N, S, S)` bool: the visible pixels of each object of a picture, from its `instances`."""
    return field == np.arange(1, field.max() + 1)[:, None, None]


def centre_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """x, y of the pixel farthest from the mask's border: SAM's own evaluation clicks there (its section 7.1)."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array(np.unravel_index(depth.argmax(), mask.shape)[::-1])


def iou_with(logits: Tensor, true: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(B, M)` IoU of M masks (logits of any resolution) with each of `(B, H, W)` true ones, at full resolution."""
    found = functional.interpolate(logits, true.shape[1:], mode="bilinear", align_corners=False).numpy() > 0
    overlap = (found & true[:, None]).sum((2, 3))
    return overlap / (found | true[:, None]).sum((2, 3)).clip(min=1)


def words(encoder: Encoder, share: float) -> Measures:
    """Class by prompt, and whose caption is nearest to a scene (percent)."""
    pictures, scenes = pictures_of(encoder, STREAMS["test"], share), pictures_of(encoder, SCENES, share, 600)
    rng = np.random.default_rng(0)
    own = [[captions.caption(rng, drawings)] for drawings in scenes.drawings.tolist()]
    asked = {
        "zero_shot": (pictures, pictures.labels, captions.class_prompts()),
        "retrieval": (scenes, np.arange(len(scenes)), own),
    }
    found = {}
    for measure, (shown, labels, texts) in asked.items():
        vectors = pooled(encoder, shown.images).cpu().numpy()
        found[measure] = 100.0 * zero_shot_probe(vectors, labels, class_texts(encoder, texts)).top1[0], labels
    return found
