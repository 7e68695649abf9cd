"""One contract for every image encoder of the study, pocket or official: its input, layers, maps and vectors."""

import copy
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.cache import hash_file
from samantics.errors import StudyError
from samantics.models import pocket, registry
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import ENCODERS, Architecture, Layer, LayerOutput, Readout
from samantics.models.weights import OFFICIAL, filled, read_weights, weight_file

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
        """One `(B, C)` float32 vector per image for each (layer, pooling), all from one forward pass.

        `mean` is over space (with `seen`, `(B, H, W)`, over what shows the image and not padding), `cls` the class
        token, `object` over `masks`, `(B, H, W)` of any resolution in the input's frame, `tokens` 6x6 tokens in a row.
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
    name: str, weights: str | Path = "zoo", device: str | torch.device = "cpu", seed: int = 0, half: bool = False
) -> Encoder:
    """The encoder of that name, frozen, in evaluation mode, with its own preprocessing.

    Args:
        name: of the registry (`sam`, `sam2`, `clip`, `dinov2`, `mae` ...), or `random`, an untrained SAM.
        weights: `zoo` (the pocket models), `zoo_random` (the same, untrained), `official`, `random` (the
            official architecture, untrained) or the path of an official checkpoint.
        device: that it computes on.
        seed: of untrained weights.
        half: compute in bfloat16.

    Returns:
        The encoder; its `weights_hash` says which weights it has.

    Raises:
        StudyError: unknown name; weights that are missing, damaged or of another model.
    """
    if weights in ("zoo", "zoo_random"):
        trained = weights == "zoo" and name != "random"
        model = pocket.load(name) if trained else pocket.build(name, seed=seed)
        encoder = zoo_encoder(name, model, pocket.card(name)["sha256"][:16] if trained else hash_model(model))
    else:
        encoder = _encoder(name, *_official_model(name, weights, seed), ENCODERS[name].own)
    if not all(bool(values.isfinite().all()) for values in encoder.model.parameters()):
        raise StudyError(f"the weights of encoder {name} ({weights}) are not all finite numbers: use the official file")
    device = torch.device(device)
    if device.type == "cuda":
        registry.fuse_attention(encoder.model)
    return dataclasses.replace(encoder, model=encoder.model.to(device), device=device, half=half)


def zoo_encoder(name: str, model: Any, weights_hash: str) -> Encoder:
    """A model of the pocket architecture `name` as an encoder, wherever its weights come from."""
    if name == "mae":  # without what only its training needs: the decoder and hiding tokens
        model = copy.deepcopy(model.vit)
        model.config.mask_ratio = 0.0
    return _encoder(name, model, weights_hash, ZOO)


def _encoder(name: str, model: nn.Module, weights_hash: str, preprocess: Preprocessing) -> Encoder:
    model = model.cpu().eval().requires_grad_(False)
    return Encoder(name, weights_hash, model, preprocess, ENCODERS[name], torch.device("cpu"))


def has_fast_half(device: str | torch.device) -> bool:
    """Whether bfloat16 saves time: on GPUs, and on processors that multiply it natively (three times faster)."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.device(device).type == "cuda" or bool(native())


def within_reach(names: Sequence[str], weights: str) -> tuple[str, ...]:
    """Those that have such weights; official ones that are gated want a token, or their file (docs/weights.md)."""
    if weights in ("zoo", "zoo_random"):
        known = {*pocket.BUILDERS}
    else:
        known = {name for name, file in OFFICIAL.items() if weights != "official" or file.within_reach} | {"random"}
    return tuple(name for name in names if name in known)


def _official_model(name: str, weights: str | Path, seed: int) -> tuple[nn.Module, str]:
    """The model and the hash of its weights, which are official, of a file, or random."""
    if name not in (*OFFICIAL, "random"):
        raise StudyError(f"no official encoder is called {name!r}: choose from {', '.join(OFFICIAL)}, random")
    if "random" in (name, weights):
        found = None
    elif weights == "official":
        found = weight_file(OFFICIAL[name])
    elif os.path.isfile(weights):  # nor is a name that is too long
        found = Path(weights), hash_file(weights)
    else:
        known = f"choose zoo, official or random, or give the path of {OFFICIAL[name].file}"
        raise StudyError(f"{weights} is no file: {known}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ENCODERS[name].build()
    if found is None:
        return model, hash_model(model)
    path, sha256 = found
    return filled(model, read_weights(path, sha256), ENCODERS[name].prefix, name, path), sha256[:16]


def hash_model(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's weights: their names, shapes and values."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
