"""Floors that every number on MojiWorld stands beside: instruments that have learned nothing.

Nearest neighbours of small pictures, of colour histograms, and of the features of an untrained network.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from samantics.mojiworld.world import RGB

Vectors = NDArray[np.float32]  # (N, C), of length 1
GREY = 128


def small_pixels(images: RGB) -> Vectors:
    """`(N, 768)`: the pictures at 16x16 pixels, less their mean colour."""
    small = [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX), np.float32) for i in images]
    return _unit((np.stack(small) - np.mean(small, (1, 2), keepdims=True)).reshape(len(images), -1))


def colour_histograms(images: RGB) -> Vectors:
    """`(N, 216)`: square roots of the shares of 6x6x6 colours, so that cosines are Hellinger's."""
    steps = np.array([36, 6, 1], np.uint8)
    codes = [((image // 43) * steps).sum(-1, dtype=np.uint8).ravel() for image in images]
    return _unit(np.sqrt(np.stack([np.bincount(code, minlength=216) for code in codes])))


@torch.no_grad()
def untrained_maps(images: RGB) -> Tensor:
    """`(N, 128, S/16, S/16)`: the pictures after four random convolutions of stride 2."""
    generator, layers = torch.Generator().manual_seed(0), []
    for channels, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layer = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        layers += [layer, nn.GroupNorm(1, width), nn.GELU()]
    network, parts = nn.Sequential(*layers), np.array_split(images, -(-len(images) // 128))
    return torch.cat([network((torch.tensor(part).permute(0, 3, 1, 2).float() - GREY) / 64) for part in parts])


INSTRUMENTS = {
    "pixels": small_pixels,
    "colour histogram": colour_histograms,
    "untrained network": lambda images: _unit(untrained_maps(images).mean((2, 3)).numpy()),
}


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)).astype(np.float32)
