"""Cost of tuning the in-context model: seconds and memory per step.

    python tests/bench/bench_incontext.py pocket                   # the pocket step, stored features
    python tests/bench/bench_incontext.py official ANNOTATIONS IMAGES   # ViT-B at 1024 pixels, untrained, a few steps

The official run takes the first images that share base categories, so that it needs no weights and few images.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from pathlib import Path

import torch
from measuring import peak_gib

from samantics.cache import Checkpoint
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, load_coco
from samantics.data.first_world import write_mojiworld
from samantics.incontext.model import build_model
from samantics.incontext.tokens import live_maps, object_arrays, object_tokens, stored_maps
from samantics.incontext.training import BatchSampler, split_categories, train
from samantics.models.encoder import load_encoder
from samantics.run import available_cores
from samantics.scales import get_scale


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("pocket", "official"))
    parser.add_argument("annotations", nargs="?", default="")
    parser.add_argument("images", nargs="?", default="")
    parser.add_argument("--count", type=int, default=6, help="official: images used")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    with tempfile.TemporaryDirectory() as folder:
        if options.which == "pocket":
            measure(write_mojiworld(mojiworld.World(), "bench", 200, folder), "pocket", options.steps, Path(folder))
        else:
            photographs = first_images(load_coco(options.annotations, options.images), options.count)
            measure(photographs, "paper", options.steps, Path(folder))


def first_images(dataset: CocoDataset, count: int) -> CocoDataset:
    """The first images that show the data's most common base category, with all their objects."""
    split = split_categories(dataset, get_scale("paper").incontext.novel)
    shown = {
        c: [i for i, objects in dataset.by_image.items() if any(o.category_id == c for o in objects)]
        for c in split.base
    }
    kept = set(max(shown.values(), key=len)[:count])
    return dataclasses.replace(
        dataset,
        images={i: record for i, record in dataset.images.items() if i in kept},
        instances=tuple(instance for instance in dataset.instances if instance.image_id in kept),
    )


def measure(dataset: CocoDataset, scale: str, steps: int, folder: Path) -> None:
    """Train a few steps of a scale's setting on the data set, and say what a step costs."""
    settings = get_scale(scale).incontext
    encoder = load_encoder("sam", "zoo_random" if scale == "pocket" else "random")
    sam, objects = encoder.model, object_arrays(dataset, encoder.image_size)
    if settings.store_features:
        maps = stored_maps(sam, dataset, settings.trunk_maps, encoder.weights_hash, folder)
    else:
        maps = functools.partial(live_maps, sam, dataset, settings.trunk_maps)
        settings = dataclasses.replace(settings, batch=2)
    started = time.perf_counter()
    tokens = object_tokens(sam, maps, objects, folder / "tokens")
    tokens_seconds = time.perf_counter() - started
    images = {
        c: len(set(objects.image[objects.categories == c].tolist()))
        for c in split_categories(dataset, settings.novel).base
    }
    base = tuple(c for c, count in images.items() if count > 1)
    sampler = BatchSampler(maps, objects, tokens, base, encoder.image_size, settings)
    settings = dataclasses.replace(settings, epochs=steps * settings.batch / len(sampler.images))
    sampler = dataclasses.replace(sampler, settings=settings)
    model = build_model(settings, sam, 0)
    started = time.perf_counter()
    _, curve = train(model, sampler, Checkpoint(folder / "model.pt", {}))
    seconds = (time.perf_counter() - started) / sampler.steps
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    loss = curve["loss"].iloc[-1]
    print(f"{scale}: {millions:.1f} M trained parameters, batch {settings.batch}, last loss {loss:.2f}")
    print(f"{seconds:.2f} s per step; mask tokens {tokens_seconds / len(dataset.images):.2f} s per image")
    print(f"peak memory {peak_gib():.1f} GiB")


if __name__ == "__main__":
    main()
