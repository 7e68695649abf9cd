"""Measures what probing costs; not part of the tests. Prints one JSON line for each part.

python tests/bench/bench_probing.py ratio      # ten epochs from the store against re-encoding in every epoch
python tests/bench/bench_probing.py speed      # encoder images per second, pocket and official
python tests/bench/bench_probing.py memory     # peak memory of an extraction of 1,000 and of 10,000 images
python tests/bench/bench_probing.py solver     # probe of a synthetic 1.28 M x 768 store: seconds, peak memory
python tests/bench/bench_probing.py gpu        # bfloat16 on a GPU against the float32 upstream loop, and the cosine
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import peak_gib, timed
from numpy.typing import NDArray
from PIL import Image

from samantics.data import first_world as mojiworld
from samantics.models.encoder import Encoder, load_encoder
from samantics.probing import features as store
from samantics.probing.features import FeatureStore, encode_images
from samantics.probing.linear import linear_probe
from samantics.probing.protocol import paper_probe

POCKET = ("sam", "sam2", "clip", "dinov2")
IMAGENET = 1_281_167  # train images


def say(part: str, **figures: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"part": part, "threads": torch.get_num_threads(), **rounded}), flush=True)


# ---------------------------------------------------------------------------------------------------------- ratio


@dataclasses.dataclass(frozen=True)
class Pictures:
    """MojiWorld's classification pictures with their category; those from ``cut`` on are for validation."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    cut: int


def pictures(count: int) -> Pictures:
    """``count`` of them, drawn at random from as many views of each drawing as that takes."""
    drawings = len(mojiworld.catalogue())
    views = -(-count // drawings)
    chosen = np.random.default_rng(0).permutation(views * drawings)[:count]
    make = functools.partial(mojiworld.classification_picture, mojiworld.World(), views)
    images = mojiworld.render(make, chosen.tolist()).images
    return Pictures(images, mojiworld.category_of_drawing()[chosen // views], count * 4 // 5)


def ratio(images: int, epochs: int = 10) -> None:
    """The published script encodes all images, train and validation, in every epoch; ours encodes them once."""
    data = pictures(images)
    for name in POCKET:
        encoder = load_encoder(name, "zoo_random")
        encoder.encode(torch.zeros(8, 3, encoder.image_size, encoder.image_size))
        again, again_cpu = timed(re_encoding, encoder, data, epochs)
        once, once_cpu = timed(from_store, encoder, data, epochs)
        figures = {"again": again, "once": once, "ratio": again / once, "cpu_ratio": again_cpu / once_cpu}
        say("ratio", encoder=name, images=images, epochs=epochs, **figures)


def re_encoding(encoder: Encoder, data: Pictures, epochs: int) -> None:
    """The published loop: per batch of 128 the frozen encoder, then a step of the linear layer; validation likewise.

    Two threads prepare the images ahead, as its data loader does and as the store does.
    """
    head: torch.nn.Module = torch.nn.LazyLinear(int(data.labels.max()) + 1)
    optimiser = None
    with ThreadPoolExecutor(2) as pool:
        for _ in range(epochs):
            order = np.random.default_rng(0).permutation(data.cut)
            rest = np.arange(data.cut, len(data.labels))
            ready = pool.map(lambda row: encoder.preprocess(Image.fromarray(data.images[row])), [*order, *rest])
            for rows in [*np.split(order, range(128, data.cut, 128)), *np.split(rest, range(128, len(rest), 128))]:
                pixels = torch.stack(list(itertools.islice(ready, len(rows))))
                vectors = encoder.pooled(pixels, [encoder.headline])[encoder.headline]
                loss = torch.nn.functional.cross_entropy(head(vectors), torch.from_numpy(data.labels[rows]))
                if rows[0] < data.cut:
                    optimiser = optimiser or torch.optim.Adam(head.parameters(), lr=1e-3)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()


def from_store(encoder: Encoder, data: Pictures, epochs: int) -> None:
    """The same probe as the study has it: everything is encoded once, then the layer is trained on the store."""
    x, cut, labels = data.images, data.cut, data.labels
    with tempfile.TemporaryDirectory() as folder:
        train, val = (
            encode_images(encoder, part, [encoder.headline], name, folder=Path(folder), batch_size=128)
            for name, part in (("train", x[:cut]), ("val", x[cut:]))
        )
        vectors = [features.read(encoder.headline) for features in (train, val)]
    paper_probe(vectors[0], labels[:cut], vectors[1], labels[cut:], int(labels.max()) + 1, epochs=epochs)


# ---------------------------------------------------------------------------------------------------------- speed


def speed(official: bool) -> None:
    for name in POCKET:
        encoder = load_encoder(name, "random" if official else "zoo_random")
        batch = (1 if encoder.image_size > 512 else 16) if official else 32
        pixels = torch.randn(batch, 3, encoder.image_size, encoder.image_size)
        encoder.pooled(pixels[:1], [encoder.headline])
        wall, cpu = timed(encoder.pooled, pixels, [encoder.headline])
        kind = "official" if official else "pocket"
        say("speed", encoder=name, weights=kind, images_per_s=batch / wall, images_per_cpu_s=batch / cpu)


# --------------------------------------------------------------------------------------------------------- memory


class Noise:
    """Images made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def extraction(images: int) -> None:
    encoder = load_encoder("dinov2", "zoo_random", image_size=32)  # a small input: many images in little time
    with tempfile.TemporaryDirectory() as folder:
        took, _ = timed(encode_images, encoder, Noise(images), [("final", "cls")], "noise", None, Path(folder))
    say("memory", images=images, seconds=took, peak_gib=peak_gib())


def memory() -> None:
    for images in (1_000, 10_000):  # each in a process of its own: a peak never goes down
        subprocess.run([sys.executable, __file__, "extraction", "--images", str(images)], check=True)


# --------------------------------------------------------------------------------------------------------- solver


def synthetic_store(folder: Path, labels: NDArray[Any], dim: int, shard_rows: int = 4096) -> FeatureStore:
    """A store as ``encode_images`` writes it, of Gaussian classes."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(int(labels.max()) + 1, dim)).astype(np.float32)
    folder.mkdir()
    for shard in range(-(-len(labels) // shard_rows)):
        rows = store._shard_rows(len(labels), shard_rows, shard)
        noise = rng.standard_normal((len(rows), dim), dtype=np.float32)
        block = (means[labels[rows]] + 4 * noise).astype(np.float16)
        np.save(store._shard_path(folder, shard), block.ravel())
        columns = [["final:mean", dim, zlib.crc32(block.data)]]
        note = {"format": store.FORMAT, "rows": len(rows), "columns": columns, "skipped": {}}
        store._note_path(folder, shard).write_text(json.dumps(note))
    return FeatureStore(folder, len(labels), shard_rows, {("final", "mean"): dim}, {})


def solver(images: int, epochs: int, device: str, folder: Path | None = None) -> None:
    labels = np.random.default_rng(1).integers(0, 1000, images)
    test_labels = np.random.default_rng(2).integers(0, 1000, 50_000)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        train, test = (synthetic_store(Path(home) / n, y, 768) for n, y in (("train", labels), ("test", test_labels)))
        before = peak_gib()
        data = (train.column(("final", "mean")), labels, test.column(("final", "mean")), test_labels, 1000)
        linear = functools.partial(linear_probe, seeds=(0,), rates=(0.1,), max_epochs=epochs, device=device)
        for name, probe in (
            ("linear", linear),
            ("paper", functools.partial(paper_probe, epochs=epochs, device=device)),
        ):
            wall, cpu = timed(probe, *data)
            figures = {"seconds": wall, "cpu_seconds": cpu, "before_gib": before, "peak_gib": peak_gib()}
            say("solver", probe=name, images=images, epochs=epochs, **figures)


# ------------------------------------------------------------------------------------------------------------ GPU


def gpu() -> None:
    """Official sizes, untrained weights: bfloat16 in large batches against the float32 loop in batches of 8."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    for name in POCKET:
        whole, half = (load_encoder(name, "random", "cuda", half=value) for value in (False, True))
        pixels = torch.randn(64, 3, whole.image_size, whole.image_size)

        cosine = float(torch.nn.functional.cosine_similarity(pool(whole, pixels, 8), pool(half, pixels, 16)).min())
        slow, fast = timed(pool, whole, pixels, 8)[0], timed(pool, half, pixels, 16)[0]
        say("gpu", encoder=name, fp32_per_s=64 / slow, bf16_per_s=64 / fast, ratio=slow / fast, cosine=cosine)


def pool(encoder: Encoder, pixels: torch.Tensor, batch: int) -> torch.Tensor:
    parts = [encoder.pooled(part, [encoder.headline])[encoder.headline] for part in pixels.split(batch)]
    torch.cuda.synchronize()
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ratio", "speed", "official", "memory", "extraction", "solver", "gpu"])
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, Callable[[], None]] = {
        "ratio": lambda: ratio(options.images or 640),
        "speed": lambda: speed(official=False),
        "official": lambda: speed(official=True),
        "memory": memory,
        "extraction": lambda: extraction(options.images or 1_000),
        "solver": lambda: solver(options.images or IMAGENET, options.epochs, options.device),
        "gpu": gpu,
    }
    parts[options.part]()


if __name__ == "__main__":
    main()
