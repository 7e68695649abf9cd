"""Every claim of speed, measured again: the study's code side by side with what it replaces.

    .venv/bin/python tests/bench/speed.py                   # about 15 minutes on two quiet cores
    .venv/bin/python tests/bench/speed.py --photo FILE      # proposals on your own photograph
    .venv/bin/python tests/bench/speed.py --quick           # a rehearsal of a minute; leaves its files in .cache/bench

The two sides of a comparison take turns (A B A B ...), where memory is a claim in processes of their own, and each turn
gives one ratio.
Leaves speed.csv and its figure in figures/bench.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
import typer
from measuring import bench_run, forget_peak, made_photo, peak_gib, pictures, timed
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything.utils.amg import coco_encode_rle, mask_to_rle_pytorch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from samantics import plots
from samantics.data.coco import mask_of, rles_of
from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import Preprocessing
from samantics.probing.features import encode_images
from samantics.probing.knn import TEMPERATURE, knn_probe
from samantics.probing.linear import RATES, linear_probe
from samantics.probing.protocol import paper_probe
from samantics.training_free import matching
from samantics.training_free.decoder import encode_image
from samantics.training_free.proposals import ProposalSettings, propose_encoded

HEIGHT, WIDTH = 480, 640  # of a usual photograph
Agreement = Callable[[Any, Any], float]  # 0-1: the share of the two results that is equal


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ways to one result, on inputs that are there already."""

    ours: Callable[[], Any]
    other: Callable[[], Any]
    agreement: Agreement | None = lambda a, b: float(np.mean(np.asarray(a) == np.asarray(b)))


# --------------------------------------------------------------------------------------------------------- probes


def probing(images: int, name: str) -> Pair:
    """Ten epochs of the published probe: encoded once into a store, or anew in every epoch, validation included."""
    (x, y, cut), encoder, epochs = pictures(images), load_encoder(name, "zoo_random"), 10
    encoder.encode(torch.zeros(8, 3, encoder.image_size, encoder.image_size))  # what is set up once

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            encode = functools.partial(encode_images, folder=Path(folder), batch_size=128)
            stores = [encode(encoder, part, [encoder.headline], str(len(part))) for part in (x[:cut], x[cut:])]
            train, val = (store.read(encoder.headline) for store in stores)
        paper_probe(train, y[:cut], val, y[cut:], int(y.max()) + 1, epochs=epochs)

    def other() -> None:  # two threads prepare images ahead, as its data loader does and as the store does
        head, optimiser = torch.nn.LazyLinear(int(y.max()) + 1), None
        with ThreadPoolExecutor(2) as pool:
            for _ in range(epochs):
                train, val = np.random.default_rng(0).permutation(cut), np.arange(cut, len(y))
                ready = pool.map(lambda row: encoder.preprocess(Image.fromarray(x[row])), [*train, *val])
                parts = [np.split(rows, range(128, len(rows), 128)) for rows in (train, val)]
                for rows in itertools.chain(*parts):
                    pixels = torch.stack(list(itertools.islice(ready, len(rows))))
                    vectors = encoder.pooled(pixels, [encoder.headline])[encoder.headline]
                    loss = F.cross_entropy(head(vectors), torch.from_numpy(y[rows]))
                    if rows[0] < cut:
                        optimiser = optimiser or torch.optim.Adam(head.parameters(), lr=1e-3)
                        optimiser.zero_grad()
                        loss.backward()
                        optimiser.step()

    return Pair(ours, other, None)


def linear(size: int) -> Pair:
    """Six learning rates for 30 epochs: side by side, or one training after another with autograd."""
    (images, y, cut), encoder, epochs = pictures(size), load_encoder("dinov2"), 30
    with tempfile.TemporaryDirectory() as folder:
        x = encode_images(encoder, images, [encoder.headline], "bench", folder=Path(folder)).read(encoder.headline)
    classes = int(y.max()) + 1
    data = (x[:cut], y[:cut], x[cut:], y[cut:], classes)

    def trained(rows: np.ndarray, rate: float) -> torch.nn.Linear:
        layer, rng = torch.nn.Linear(x.shape[1], classes), np.random.default_rng(0)
        optimiser = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-len(rows) // 128))
        for _ in range(epochs):
            for batch in torch.from_numpy(rng.permutation(rows)).split(128):
                optimiser.zero_grad()
                F.cross_entropy(layer(inputs[batch]), labels[batch]).backward()
                optimiser.step()
                decay.step()
        return layer

    inputs = torch.from_numpy(((x - x[:cut].mean(0)) / x[:cut].std(0)).astype(np.float32))
    labels = torch.from_numpy(y.astype(np.int64))

    def other() -> np.ndarray:
        kept, held = np.arange(cut * 4 // 5), np.arange(cut * 4 // 5, cut)
        scores = [(trained(kept, rate)(inputs[held]).argmax(1) == labels[held]).sum().item() for rate in RATES]
        return trained(np.arange(cut), RATES[int(np.argmax(scores))])(inputs[cut:]).argmax(1).numpy()

    ours = functools.partial(linear_probe, *data, seeds=(0,), epochs=epochs, max_epochs=epochs)
    right = y[cut:]  # they choose a rate each by itself: alike is how often they are right
    return Pair(lambda: ours().predictions[0], other, lambda a, b: 1 - abs(np.mean(a == right) - np.mean(b == right)))


def neighbours(size: int) -> Pair:
    """20 nearest neighbours by cosine among ``size`` features, as scikit-learn's brute force finds them."""
    rng = np.random.default_rng(0)
    y, cut = rng.integers(0, 100, size), size * 4 // 5
    x = (rng.normal(size=(100, 384))[y] + 3 * rng.normal(size=(size, 384))).astype(np.float32)
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda far: np.exp(-far / TEMPERATURE))
    return Pair(
        lambda: knn_probe(x[:cut], y[:cut], x[cut:], y[cut:], 100, k=20).predictions[0],
        lambda: model.fit(x[:cut], y[:cut]).predict(x[cut:]),
    )


# ---------------------------------------------------------------------------------------------------------- masks


def blobs(count: int) -> np.ndarray:
    """``(count, HEIGHT, WIDTH)`` smooth masks of all sizes, some within others."""
    noise = torch.rand(count, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")[:, 0]
    share = torch.linspace(0.5, 0.95, count)[:, None, None]
    return (smooth > share * smooth.amax((1, 2), keepdim=True)).numpy()


def pooling(size: int) -> Pair:
    """Means of DINOv2's map of a photograph (384 x 37 x 37) over ``size`` masks, with and without resizing it."""
    dense = np.random.default_rng(0).normal(size=(384, 37, 37)).astype(np.float32)
    masks, geometry = blobs(size), Preprocessing(518, "squash").geometry(WIDTH, HEIGHT)

    def other() -> np.ndarray:
        resized = F.interpolate(torch.from_numpy(dense)[None], (HEIGHT, WIDTH), mode="bilinear")[0]
        return np.stack([resized[:, torch.from_numpy(mask)].mean(1).numpy() for mask in masks])

    ours = lambda: matching.token_weights(masks, geometry, (37, 37)) @ dense.reshape(384, -1).T  # noqa: E731
    return Pair(ours, other, lambda a, b: float(np.isclose(a, b, atol=1e-4).mean()))


def encoding(size: int) -> Pair:
    """COCO's run lengths of ``size`` masks, by pycocotools and as ``segment_anything`` makes them in Python."""
    masks = blobs(size)
    return Pair(
        lambda: [rle["counts"] for rle in rles_of(masks)],
        lambda: [coco_encode_rle(rle)["counts"] for rle in mask_to_rle_pytorch(torch.from_numpy(masks))],
    )


def merging(size: int) -> Pair:
    """Semantic soft merging of ``size`` masks of four classes, on run lengths and on pixels, pair by pair."""
    rng = np.random.default_rng(0)
    rles, features = rles_of(blobs(size)), matching.unit(rng.normal(size=(size, 384)))
    categories, scores = rng.integers(0, 4, size), np.sort(rng.random(size))[::-1]

    def other() -> np.ndarray:
        final, masks = scores.copy(), [mask_of(rle) for rle in rles]
        for i in range(size):
            alike = [j for j in range(i) if categories[j] == categories[i]]
            inside = [(masks[i] & masks[j]).sum() / masks[i].sum() * max(0, features[i] @ features[j]) for j in alike]
            final[i] *= np.sqrt(1 - max(inside, default=0))
        return final

    ours = functools.partial(matching.merged_scores, rles, features, categories, scores, "semantic_soft")
    return Pair(ours, other, lambda a, b: float(np.isclose(a, b, atol=1e-5).mean()))


def proposals(points: int, whole: bool, photo: str = "") -> Pair:
    """The official ViT-B at random weights: our proposals and SAM's own generator, with and without encoding.

    Its masks are noise, which is slow to encode: thresholds from a coarse grid let half of the masks pass by predicted
    IoU and one in fifty of those by stability. That takes from the package's worst part; with real weights more pass.
    """
    image = Image.open(photo).convert("RGB") if photo else made_photo()
    torch.manual_seed(0)
    model, offset = sam_model_registry["vit_b"]().eval(), 0.02  # logits of random weights are of the order of 0.1
    encoded = encode_image(model, image)
    found = propose_encoded(encoded, ProposalSettings(6, 0.0, 0.0, offset, box_nms=1.0))
    iou = float(np.median(found.predicted_iou))
    stability = float(np.quantile(found.stability[found.predicted_iou > iou], 0.98))
    generator = SamAutomaticMaskGenerator(
        model, points, pred_iou_thresh=iou, stability_score_thresh=stability, stability_score_offset=offset,
        box_nms_thresh=1.0, output_mode="coco_rle",
    )  # fmt: skip
    settings, pixels = ProposalSettings(points, iou, stability, offset, box_nms=1.0), np.asarray(image)
    generator.predictor.set_image(pixels)

    def other() -> int:
        stays = mock.DEFAULT if whole else (lambda *_: None)
        if whole:
            return len(generator.generate(pixels))
        with mock.patch.multiple(SamPredictor, set_image=stays, reset_image=stays):
            return len(generator.generate(pixels))

    ours = lambda: len(propose_encoded(encode_image(model, image) if whole else encoded, settings))  # noqa: E731
    return Pair(ours, other, lambda a, b: 1 - abs(a - b) / max(a, b, 1))


# ---------------------------------------------------------------------------------------------------- comparisons


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is measured: inputs of a size, what the other side is, and the least ratios that the project promised."""

    name: str
    case: str
    against: str
    make: Callable[..., Pair]
    size: int
    quick: int
    turns: int = 3
    memory: bool = False  # whether it is a claim too
    aims: dict[str, float] = dataclasses.field(default_factory=dict)


COMPARISONS = [
    *(
        Comparison("probe, 10 epochs", plots.LABELS[name], "images encoded in every epoch",
                   functools.partial(probing, name=name), 320, 16, aims={"wall": 8.0})
        for name in ("sam", "sam2", "clip", "dinov2")
    ),
    *(
        Comparison("mask proposals", case, "SamAutomaticMaskGenerator", functools.partial(proposals, whole=whole),
                   32, 3, memory=whole, aims={"wall": 3.0, "memory": 1.0} if whole else {})
        for case, whole in (("ViT-B, 32² points", True), ("ViT-B, 32² points, masks only", False))
    ),
    Comparison("linear probe, 6 rates", "", "one training for each rate", linear, 3000, 120),
    Comparison("nearest neighbours", "", "scikit-learn, brute force", neighbours, 20_000, 1000),
    Comparison("features of masks", "", "map resized to the image", pooling, 60, 8, memory=True),
    Comparison("run lengths of masks", "", "segment_anything's, in Python", encoding, 200, 10),
    Comparison("soft merging of masks", "", "pixels, pair by pair", merging, 120, 20),
]  # fmt: skip
UNITS = {"wall": "s", "processor": "s", "memory": "GiB"}
NAMES = {"wall": "time", "processor": "processor time", "memory": "peak memory"}


def pair_of(comparison: Comparison, size: int, photo: str) -> Pair:
    return comparison.make(size, **({"photo": photo} if comparison.name == "mask proposals" else {}))


def one_side(number: int, side: str, size: int, photo: str) -> dict[str, float]:
    """Wall and processor seconds and peak memory (GiB over the inputs), in this process."""
    work = getattr(pair_of(COMPARISONS[number], size, photo), side)
    forget_peak()
    before = peak_gib()
    return dict(zip(("wall", "processor"), timed(work), strict=True)) | {"memory": peak_gib() - before}


def table_of(number: int, quick: bool, photo: str) -> pd.DataFrame:
    """Measure: one row for each quantity, with the ratio of every turn summed up."""
    comparison = COMPARISONS[number]
    small = pair_of(comparison, comparison.quick, photo)
    if small.agreement and (equal := small.agreement(small.ours(), small.other())) < 0.9:
        raise SystemExit(f"{comparison.name}: only {equal:.0%} of the results are equal, so a ratio means nothing")
    size, turns, samples = comparison.quick if quick else comparison.size, 1 if quick else comparison.turns, []
    pair = small if comparison.memory or size == comparison.quick else pair_of(comparison, size, photo)
    for _, side in itertools.product(range(turns), ("ours", "other")):
        if comparison.memory:
            command = [sys.executable, __file__, "--side", f"{number} {side} {size}", "--photo", photo]
            samples.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        else:
            samples.append(dict(zip(("wall", "processor"), timed(getattr(pair, side)), strict=True)))
    rows = []
    for quantity in ("wall", "processor", "memory")[: 3 if comparison.memory else 2]:
        ours, other = (np.array([sample[quantity] for sample in samples[side::2]]) for side in (0, 1))
        ratio = other / ours
        row = {"comparison": comparison.name, "case": comparison.case, "against": comparison.against}
        row |= {"quantity": quantity, "unit": UNITS[quantity], "ours": np.median(ours), "other": np.median(other)}
        row |= {"ratio": np.median(ratio), "low": ratio.min(), "high": ratio.max(), "turns": turns}
        rows.append(row | {"aim": comparison.aims.get(quantity, np.nan)})
    return pd.DataFrame(rows)


def speed_figure(table: pd.DataFrame) -> Any:
    """How many times less time and memory; bars reach from the least ratio of a turn to the greatest."""
    shown = table.assign(quantity=table["quantity"].map(NAMES))
    cases = shown["case"].fillna("").map(lambda case: f" ({case})" if case else "")
    shown = shown.assign(work=shown["comparison"] + cases + "\nagainst " + shown["against"])
    figure = plots.dots(shown, "ratio", "work", hue="quantity", low="low", high="high", size=(8.5, 7.5),
                        xlabel="times less than the other side: median, least and greatest turn")  # fmt: skip
    axis, places = figure.axes[0], list(dict.fromkeys(shown["work"]))
    for row in shown[shown["aim"].notna()].to_dict("records"):
        axis.plot(row["aim"], places.index(row["work"]), "|", color="#222222", ms=16, mew=2.5)
    axis.axvline(1, color=plots.COLOURS["chance"], lw=1.5)
    axis.set_xscale("log")
    axis.set_xticks(*zip(*((t, f"{t:g}×") for t in (0.5, 1, 2, 5, 10, 20, 50, 100)), strict=True))
    wall = table[table["quantity"] == "wall"]
    less = int((wall["low"] > 1).sum())
    plots.headline(figure, f"The study's code needs less time in {less} of {len(wall)} comparisons (black: promised)")
    return figure


def main(
    photo: Annotated[str, typer.Option(help="photograph for the proposals (default: a made picture)")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, to see that it runs")] = False,
    side: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if side:
        number, name, size = side.split()
        print(json.dumps(one_side(int(number), name, int(size), photo)))
        return
    plots.style()
    run, parts = bench_run("speed", quick), []
    for number in range(len(COMPARISONS)):
        parts.append(table_of(number, quick, photo))
        print(parts[-1].drop(columns=["unit", "against"]).to_string(index=False, header=number == 0), flush=True)
    table = pd.concat(parts, ignore_index=True)
    run.save(speed_figure(table), table, "speed", "How many times less time and memory than what it replaces.")


if __name__ == "__main__":
    typer.run(main)
