"""Methods of the library against the plain loops that one would write first: same inputs, same results.

python tests/bench/bench_loops.py                     # all pairs, once each, by processor seconds
python tests/bench/bench_loops.py pooling ours        # one side of one pair, in this process: seconds, peak memory
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_probing import pictures
from measuring import forget_peak, peak_gib, timed
from numpy.typing import NDArray
from segment_anything.utils.amg import coco_encode_rle, mask_to_rle_pytorch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from samantics.data.coco import mask_of, rles_of
from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import Preprocessing
from samantics.probing import knn
from samantics.probing import linear as probe
from samantics.probing.features import encode_images
from samantics.training_free import matching

SIDES = ("ours", "plain")
HEIGHT, WIDTH = 480, 640  # of a usual photograph


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ways to one result.

    Attributes:
        ours, plain: without arguments; their results are compared by ``agreement``.
        agreement: 0-1, the share of the two results that is equal.
    """

    ours: Callable[[], Any]
    plain: Callable[[], Any]
    agreement: Callable[[Any, Any], float]


# --------------------------------------------------------------------------------------------------------- probes


def linear(size: int) -> Pair:
    """A sweep of learning rates, epochs doubled until that stops to help: side by side, or one training after another.

    Everything but the training is the same code, so both sides train the same epochs on the same batches.
    """
    data = pictures(size)
    encoder = load_encoder("dinov2")
    with tempfile.TemporaryDirectory() as folder:
        stored = encode_images(encoder, data.images, [encoder.headline], "bench", folder=Path(folder))
        vectors = stored.read(encoder.headline)
    x, y, cut = vectors, data.labels, data.cut
    ours = functools.partial(
        probe.linear_probe, x[:cut], y[:cut], x[cut:], y[cut:], classes=int(y.max()) + 1, seeds=(0,)
    )

    def plain() -> probe.ProbeResult:
        with mock.patch.object(probe, "_train", one_after_another):
            return ours()

    return Pair(ours, plain, lambda a, b: float((a.predictions == b.predictions).mean()))


def one_after_another(
    x: NDArray[Any],
    y: NDArray[Any],
    use: NDArray[np.bool_],
    rates: tuple[float, ...],
    epochs: int,
    seed: int,
    settings: Any,
) -> Any:
    """``probe._train`` by the usual means: for each rate a layer, autograd, ``torch.optim.SGD`` and a schedule."""
    mean, scale = probe._moments(x, use)
    inputs, labels = torch.from_numpy(((x - mean) * scale).astype(np.float32)), torch.from_numpy(y.astype(np.int64))
    steps = epochs * max(1, int(use.sum()) / settings.batch_size)
    trained = []
    for rate in rates:
        layer = nn.Linear(x.shape[1], settings.classes)
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        optimiser = torch.optim.SGD(layer.parameters(), rate, momentum=probe.MOMENTUM)
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + np.cos(np.pi * step / steps)))
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            order = torch.from_numpy(rng.permutation(np.flatnonzero(use)))
            for batch in order.split(settings.batch_size):
                optimiser.zero_grad()
                F.cross_entropy(layer(inputs[batch]), labels[batch]).backward()
                optimiser.step()
                decay.step()
        trained.append(torch.cat([layer.weight.T, layer.bias[None]]).detach())
    return probe._Heads(torch.stack(trained, dim=1), *(torch.from_numpy(v.astype(np.float32)) for v in (mean, scale)))


def votes(distances: NDArray[Any]) -> NDArray[Any]:
    """DINOv2's weights of neighbours."""
    return np.exp((1 - distances) / knn.TEMPERATURE)


def neighbours(size: int) -> Pair:
    """20 nearest neighbours by cosine among ``size`` features, as scikit-learn's brute force finds them."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 100, size)
    x = (rng.normal(size=(100, 384))[y] + 3 * rng.normal(size=(size, 384))).astype(np.float32)
    cut = size * 4 // 5

    def ours() -> NDArray[Any]:
        return knn.knn_probe(x[:cut], y[:cut], x[cut:], y[cut:], 100, k=20).predictions[0]

    def plain() -> NDArray[Any]:
        model = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute").fit(x[:cut], y[:cut])
        return model.predict(x[cut:])

    return Pair(ours, plain, lambda a, b: float((a == b).mean()))


# ---------------------------------------------------------------------------------------------------------- masks


def blobs(count: int) -> NDArray[np.bool_]:
    """``(count, HEIGHT, WIDTH)`` smooth masks of all sizes, some within others."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 1, 6, 8, generator=generator)
    smooth = F.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")[:, 0]
    share = torch.linspace(0.5, 0.95, count)[:, None, None]
    return (smooth > share * smooth.amax((1, 2), keepdim=True)).numpy()


def pooling(size: int) -> Pair:
    """Means of DINOv2's map of a photograph (384 x 37 x 37) over ``size`` masks, with and without resizing it."""
    dense = np.random.default_rng(0).normal(size=(384, 37, 37)).astype(np.float32)
    masks, geometry = blobs(size), Preprocessing(518, "squash").geometry(WIDTH, HEIGHT)

    def ours() -> NDArray[np.float32]:
        return matching.token_weights(masks, geometry, (37, 37)) @ dense.reshape(384, -1).T

    def plain() -> NDArray[np.float32]:
        resized = F.interpolate(torch.from_numpy(dense)[None], (HEIGHT, WIDTH), mode="bilinear")[0]
        return np.stack([resized[:, torch.from_numpy(mask)].mean(1).numpy() for mask in masks])

    return Pair(ours, plain, lambda a, b: float(np.isclose(a, b, atol=1e-4).mean()))


def encoding(size: int) -> Pair:
    """COCO's run lengths of ``size`` masks, by pycocotools and as ``segment_anything`` makes them in Python."""
    masks = blobs(size)
    return Pair(
        lambda: rles_of(masks),
        lambda: [coco_encode_rle(rle) for rle in mask_to_rle_pytorch(torch.from_numpy(masks))],
        lambda a, b: float(np.mean([one == other for one, other in zip(a, b, strict=True)])),
    )


def merging(size: int) -> Pair:
    """Semantic soft merging of ``size`` masks of four classes, on run lengths and on pixels, pair by pair."""
    rng = np.random.default_rng(0)
    rles, features = rles_of(blobs(size)), matching.unit(rng.normal(size=(size, 384)))
    categories, scores = rng.integers(0, 4, size), np.sort(rng.random(size))[::-1]

    def plain() -> NDArray[np.float64]:
        final, masks = scores.copy(), [mask_of(rle) for rle in rles]
        for i in range(size):
            shares = [
                (masks[i] & masks[j]).sum() / masks[i].sum() * max(0.0, features[i] @ features[j])
                for j in range(i)
                if categories[j] == categories[i]
            ]
            final[i] *= np.sqrt(1 - max(shares, default=0.0))
        return final

    ours = functools.partial(matching.merged_scores, rles, features, categories, scores, "semantic_soft")
    return Pair(ours, plain, lambda a, b: float(np.isclose(a, b, atol=1e-5).mean()))


PAIRS: dict[str, Callable[[int], Pair]] = {
    "linear": linear,
    "neighbours": neighbours,
    "pooling": pooling,
    "encoding": encoding,
    "merging": merging,
}
SIZES = {"linear": 3000, "neighbours": 20_000, "pooling": 60, "encoding": 200, "merging": 120}
QUICK = {"linear": 120, "neighbours": 1000, "pooling": 8, "encoding": 10, "merging": 20}


def one_side(name: str, side: str, size: int) -> dict[str, float]:
    """Wall and processor seconds and peak memory (GiB over the inputs), in a process of its own."""
    command = [sys.executable, __file__, name, side, "--size", str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    sample: dict[str, float] = json.loads(done.stdout)
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="?", choices=list(PAIRS))
    parser.add_argument("side", nargs="?", choices=SIDES)
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    if options.side:
        pair = PAIRS[options.pair](options.size or SIZES[options.pair])
        forget_peak()
        before = peak_gib()
        wall, cpu = timed(getattr(pair, options.side))
        print(json.dumps({"wall": wall, "processor": cpu, "memory": peak_gib() - before}))
        return
    for name in [options.pair] if options.pair else PAIRS:
        pair = PAIRS[name](options.size or SIZES[name])
        equal = pair.agreement(pair.ours(), pair.plain())
        seconds = [timed(getattr(pair, side))[1] for side in SIDES]
        print(f"{name}: {seconds[1] / seconds[0]:.1f} times less processor time, {equal:.1%} of the results equal")


if __name__ == "__main__":
    main()
