"""One contract for every image encoder of the study, pocket or official: its input, layers, maps and vectors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.errors import StudyError
from samantics.models import pocket, registry
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import Architecture, Layer, LayerOutput, Readout, entry
from samantics.models.weights import filled, read_weights, weight_file

ZOO = Preprocessing(pocket.DEFAULT.image_size, "squash")
POOLINGS = ("mean", "cls", "object", "tokens")
TOKEN_GRID = 6  # tokens along a side that the pooling `tokens` keeps: as many for every encoder
PIXELS_AT_ONCE = 2**20  # of a batch's input: one image of SAM's, whose attention takes 2.5 GB
BYTES_PER_PIXEL = 2000  # of a GPU's memory for one of the input: SAM's largest layers, some times over (computed)
MOST_AT_ONCE = 256  # images on a GPU


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder. `dataclasses.replace(encoder, preprocess=...)` is the same one with another input."""

    name: str  # as given to load_encoder
    weights_hash: str  # first 16 hexadecimal digits of the SHA-256 of its weights
    model: Any  # the package's own object (`Sam`, `SAM2Base`, `open_clip.CLIP`, `Dinov2Model` ...)
    preprocess: Preprocessing  # RGB image to `(3, S, S)` input
    architecture: Architecture  # how the model is read
    device: torch.device
    half: bool = False  # computes in bfloat16; outputs are float32 all the same

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The names of what it can return, from input to output."""
        count = len(self.architecture.blocks(self.model))
        return (*(f"block_{number:02d}" for number in range(1, count + 1)), *self.architecture.after)

    @property
    def headline(self) -> Readout:
        """Layer and pooling of its row in the paper's table."""
        return self.architecture.headline

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self.preprocess.size

    @property
    def key(self) -> dict[str, Any]:
        """All that its features depend on: features of another key are other features."""
        return {
            "encoder": self.name,
            "weights": self.weights_hash,
            "preprocessing": dataclasses.asdict(self.preprocess),
            "half": self.half,
        }

    @property
    def images_at_once(self) -> int:
        """Images of a batch: by the size of the input, on a GPU also by its free memory."""
        pixels = self.image_size**2
        if self.device.type == "cuda":
            return max(1, min(MOST_AT_ONCE, torch.cuda.mem_get_info(self.device)[0] // (BYTES_PER_PIXEL * pixels)))
        return max(1, min(16, PIXELS_AT_ONCE // pixels))  # more of the zoo's outgrow the processor's cache

    def normalised(self, pixels: Tensor, seen: Tensor) -> Tensor:
        """Inputs on its device; `pixels` and `seen` are those of `Preprocessing.normalised`, moved as bytes."""
        if self.device.type == "cuda":
            pixels, seen = pixels.pin_memory(), seen.pin_memory()  # copied while the GPU computes
        moved = (part.to(self.device, non_blocking=True) for part in (pixels, seen))
        return self.preprocess.normalised(*moved)

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """`(B, 3, S, S)` inputs of RGB images."""
        return torch.stack([self.preprocess(image) for image in images])

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: Sequence[Layer] = ("final",)) -> dict[Layer, LayerOutput]:
        """Features of an input at several layers, all from one forward pass.

        Args:
            pixels: `(B, 3, S, S)`, as inputs returns them.
            layers: names from `self.layers`.

        Returns:
            By layer: maps `(B, C, h, w)` and, where there is one, class tokens `(B, C)`; float32, on its device.

        Raises:
            StudyError: no such layer.
        """
        self.check([(layer, "mean") for layer in layers])
        blocks = dict(zip(self.layers, self.architecture.blocks(self.model), strict=False))
        with (
            registry.capture({name: blocks[name] for name in layers if name in blocks}) as captured,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.half),
        ):
            outputs = self.architecture.forward(self.model, pixels.to(self.device))
        outputs |= {name: self.architecture.read(self.model, raw) for name, raw in captured.items()}
        chosen = {name: outputs[name] for name in layers}
        return {n: LayerOutput(o.dense.float(), None if o.cls is None else o.cls.float()) for n, o in chosen.items()}

    def pooled(
        self, pixels: Tensor, readouts: Sequence[Readout], masks: Tensor | None = None, seen: Tensor | None = None
    ) -> dict[Readout, Tensor]:
        """One vector per image for each (layer, pooling), all from one forward pass.

        Args:
            pixels: `(B, 3, S, S)`.
            readouts: pairs of a layer and `mean` (over space), `cls` (class token), `object` (over the mask) or
                `tokens` (the map averaged to 6x6 tokens, one after another).
            masks: `(B, H, W)` of the objects, in the input's frame, of any resolution (pixels or tokens); each token
                weighs as much as the mask covers of it.
            seen: `(B, H, W)` likewise, where the input shows the image: leaves padding out of `mean`.

        Returns:
            `(B, C)` float32 for each readout, of `tokens` `(B, 36 C)`.

        Raises:
            StudyError: unknown layer or pooling, class token of a model without one, masks missing or empty.
        """
        self.check(readouts)
        if masks is None and any(pooling == "object" for _, pooling in readouts):
            raise StudyError("object pooling needs masks: give one (H, W) mask for each image")
        outputs = self.encode(pixels, list(dict.fromkeys(layer for layer, _ in readouts)))
        over = {"mean": seen, "object": masks}
        return {(layer, pooling): _pool(outputs[layer], pooling, over.get(pooling)) for layer, pooling in readouts}

    def has_class_token(self, layer: Layer) -> bool:
        """Whether `cls` can be pooled from the layer."""
        return self.architecture.cls_in in ("all", layer)

    def check(self, readouts: Sequence[Readout]) -> None:
        """StudyError where the encoder lacks a layer or pooling: before any time is spent."""
        for layer, pooling in readouts:
            if layer not in self.layers:
                raise StudyError(f"encoder {self.name} has no layer {layer!r}: choose from {', '.join(self.layers)}")
            if pooling not in POOLINGS:
                raise StudyError(f"no pooling is called {pooling!r}: choose from {', '.join(POOLINGS)}")
            if pooling == "cls" and not self.has_class_token(layer):
                raise StudyError(f"layer {layer} of encoder {self.name} has no class token: pool it by mean")


def _pool(output: LayerOutput, pooling: str, over: Tensor | None) -> Tensor:
    if pooling == "cls":
        assert output.cls is not None
        return output.cls
    if pooling == "tokens":
        return F.adaptive_avg_pool2d(output.dense, TOKEN_GRID).flatten(2).mT.flatten(1)
    return output.dense.mean((2, 3)) if over is None else masked_mean(output.dense, over)


def masked_mean(dense: Tensor, masks: Tensor) -> Tensor:
    """`(B, C)` mean of `(B, C, h, w)` over `(B, H, W)` masks of the same frame; tokens weigh as they are covered."""
    if not masks.flatten(1).any(dim=1).all():
        raise StudyError("a mask to pool over is empty: leave out objects without visible pixels")
    # averages where tokens are coarser than the mask, repeats where they are finer; never loses a small object
    cover = F.adaptive_avg_pool2d(masks[:, None].to(dense), (dense.shape[2], dense.shape[3]))
    return (dense * cover).sum((2, 3)) / cover.sum((2, 3))


# -------------------------------------------------------------------------------------------------------- loading


def load_encoder(
    name: str, weights: str | Path = "zoo", device: str | torch.device = "cpu", seed: int = 0,
    image_size: int | None = None, half: bool = False,
) -> Encoder:  # fmt: skip
    """The encoder of that name, frozen, in evaluation mode, with its own preprocessing.

    Args:
        name: of the registry (`sam`, `sam2`, `clip`, `dinov2`, `mae` ...), or `random`, an untrained SAM.
        weights: `zoo` (the pocket models), `zoo_random` (the same, untrained), `official`, `random` (the
            official architecture, untrained) or the path of an official checkpoint.
        seed: of untrained weights.
        image_size: another input side, pixels, for models that take any (`dinov2`, `dinov3`).
        half: compute in bfloat16.

    Raises:
        StudyError: unknown name; weights that are missing, damaged or of another model; a size that it does not take.
    """
    if weights in ("zoo", "zoo_random"):
        model, weights_hash = _pocket_model(name, weights == "zoo", seed)
        preprocess = ZOO
    else:
        model, weights_hash = _official_model(name, weights, seed)
        preprocess = entry(name).own
    if image_size is not None:
        if not entry(name).architecture.any_size and image_size != preprocess.size:
            raise StudyError(f"encoder {name} takes {preprocess.size}-pixel images only: leave image_size out")
        preprocess = dataclasses.replace(preprocess, size=image_size, short=0)
    if not all(bool(values.isfinite().all()) for values in model.parameters()):
        raise StudyError(f"the weights of encoder {name} ({weights}) are not all finite numbers: use the official file")
    return _encoder(name, weights_hash, model, preprocess, device, half)


def zoo_encoder(name: str, model: nn.Module, weights_hash: str) -> Encoder:
    """A model of the pocket architecture `name` as an encoder, wherever its weights come from."""
    return _encoder(name, weights_hash, _image_encoder(name, model), ZOO)


def has_fast_half(device: str | torch.device) -> bool:
    """Whether bfloat16 saves time: on GPUs, and on processors that multiply it natively (three times faster)."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.device(device).type == "cuda" or bool(native())


def within_reach(names: Sequence[str], weights: str) -> tuple[str, ...]:
    """The encoders that can be loaded: official ones that are gated want a token, or their file (docs/weights.md)."""
    return tuple(name for name in names if weights != "official" or entry(name).weights.within_reach)


def _encoder(
    name: str, weights_hash: str, model: nn.Module, preprocess: Preprocessing, device: str | torch.device = "cpu",
    half: bool = False,
) -> Encoder:  # fmt: skip
    model = model.to(device).eval().requires_grad_(False)
    if torch.device(device).type == "cuda":
        registry.fuse_attention(model)
    return Encoder(name, weights_hash, model, preprocess, entry(name).architecture, torch.device(device), half)


def _pocket_model(name: str, trained: bool, seed: int) -> tuple[nn.Module, str]:
    """The model and the hash of its weights."""
    if name not in (*pocket.NAMES, "random"):
        raise StudyError(f"no pocket encoder is called {name!r}: choose from {', '.join(pocket.NAMES)}, random")
    if trained and name != "random":
        return _image_encoder(name, pocket.load(name)), pocket.card(name)["sha256"][:16]
    model = pocket.build("sam" if name == "random" else name, seed=seed)
    return _image_encoder(name, model), hash_model(model)


def _image_encoder(name: str, model: Any) -> nn.Module:
    """The pocket model without what only its training needs: MAE's decoder and its hiding of tokens."""
    if name != "mae":
        return model
    encoder = copy.deepcopy(model.vit)
    encoder.config.mask_ratio = 0.0
    return encoder


def _official_model(name: str, weights: str | Path, seed: int) -> tuple[nn.Module, str]:
    """The model and the hash of its weights, which are official, of a file, or random."""
    if name not in (*registry.ENCODERS, "random"):
        raise StudyError(f"no official encoder is called {name!r}: choose from {', '.join(registry.ENCODERS)}, random")
    own, path, sha256 = entry(name), None, ""
    if name != "random" and weights != "random":
        path, sha256 = weight_file(own.weights, None if weights == "official" else weights)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = own.build()
    if path is None:
        return model, hash_model(model)
    return filled(model, read_weights(path, sha256), own.prefix, name, path), sha256[:16]


def hash_model(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's weights: their names, shapes and values."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
