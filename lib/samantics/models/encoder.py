"""One contract for every image encoder of the study, pocket or official: its input, layers, maps and vectors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.models.architectures import CLIP, DINOV2, SAM, SAM2, Architecture, Layer, LayerOutput, Readout, listen
from samantics.models.preprocessing import Preprocessing

POOLINGS = ("mean", "cls", "object")
PIXELS_AT_ONCE = 2**20  # of a batch's input: one image of SAM's, whose attention takes 2.5 GB
ZOO: Mapping[str, Architecture] = {"sam": SAM, "sam2": SAM2, "clip": CLIP, "dinov2": DINOV2, "random": SAM}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen image encoder.

    Attributes:
        name: as given to :func:`load_encoder`.
        weights_hash: first 16 hexadecimal digits of the SHA-256 of its weights.
        layers: the names of what it can return, from input to output.
        headline: layer and pooling of its row in the paper's table.
        model: the package's own object (``Sam``, ``SAM2Base``, ``open_clip.CLIP``, ``Dinov2Model`` ...).
        preprocess: RGB image to ``(3, S, S)`` input.
        half: computes in bfloat16; outputs are float32 all the same.
    """

    name: str
    weights_hash: str
    layers: tuple[Layer, ...]
    headline: Readout
    model: Any
    preprocess: Preprocessing
    architecture: Architecture
    device: torch.device
    half: bool = False

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

    @torch.no_grad()
    def encode(self, pixels: Tensor, layers: Sequence[Layer] = ("final",)) -> dict[Layer, LayerOutput]:
        """Outputs of the named layers for ``(B, 3, S, S)`` inputs, all from one forward: float32, on its device.

        Raises:
            StudyError: no such layer.
        """
        self.check([(layer, "mean") for layer in layers])
        blocks = dict(zip(self.layers, self.architecture.blocks(self.model), strict=False))
        with (
            listen({name: blocks[name] for name in layers if name in blocks}) as heard,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.half),
        ):
            outputs = self.architecture.forward(self.model, pixels.to(self.device))
        outputs |= {name: self.architecture.read(self.model, raw) for name, raw in heard.items()}
        return {name: _as_float(outputs[name]) for name in layers}

    def pooled(
        self, pixels: Tensor, wanted: Sequence[Readout], masks: Tensor | None = None, seen: Tensor | None = None
    ) -> dict[Readout, Tensor]:
        """One ``(B, C)`` float32 vector per image for each (layer, pooling), all from one forward.

        Args:
            pixels: ``(B, 3, S, S)``.
            wanted: pairs of a layer and ``mean`` (over space), ``cls`` (class token) or ``object`` (over the mask).
            masks: ``(B, H, W)`` of the objects, in the input's frame, of any resolution (pixels or tokens); each token
                weighs as much as the mask covers of it.
            seen: ``(B, H, W)`` likewise, where the input shows the image: leaves padding out of ``mean``.

        Raises:
            StudyError: unknown layer or pooling, class token of a model without one, masks missing or empty.
        """
        self.check(wanted)
        if masks is None and any(pooling == "object" for _, pooling in wanted):
            raise StudyError("object pooling needs masks: give one (H, W) mask for each image")
        outputs = self.encode(pixels, list(dict.fromkeys(layer for layer, _ in wanted)))
        over = {"mean": seen, "object": masks}
        return {(layer, pooling): _pool(outputs[layer], pooling, over.get(pooling)) for layer, pooling in wanted}

    def check(self, wanted: Sequence[Readout]) -> None:
        """Refuse layers and poolings that the encoder does not have, before any time is spent.

        Raises:
            StudyError: names the first that it lacks.
        """
        for layer, pooling in wanted:
            if layer not in self.layers:
                raise StudyError(f"encoder {self.name} has no layer {layer!r}: choose from {', '.join(self.layers)}")
            if pooling not in POOLINGS:
                raise StudyError(f"no pooling is called {pooling!r}: choose from {', '.join(POOLINGS)}")
            if pooling == "cls" and not self.has_class_token(layer):
                raise StudyError(f"layer {layer} of encoder {self.name} has no class token: pool it by mean")

    def has_class_token(self, layer: Layer) -> bool:
        """Whether ``cls`` can be pooled from the layer."""
        kind = self.architecture.cls_in
        return kind == "all" or (kind == "final" and layer == "final")

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """``(B, 3, S, S)`` inputs of RGB images."""
        return torch.stack([self.preprocess(image) for image in images])


def _as_float(output: LayerOutput) -> LayerOutput:
    return LayerOutput(output.dense.float(), None if output.cls is None else output.cls.float())


def _pool(output: LayerOutput, pooling: str, over: Tensor | None) -> Tensor:
    if pooling == "cls":
        assert output.cls is not None
        return output.cls
    return output.dense.mean((2, 3)) if over is None else masked_mean(output.dense, over)


def masked_mean(dense: Tensor, masks: Tensor) -> Tensor:
    """``(B, C)`` mean of ``(B, C, h, w)`` over ``(B, H, W)`` masks of the same frame; tokens weigh as they are covered.

    Raises:
        StudyError: a mask is empty.
    """
    if not masks.flatten(1).any(dim=1).all():
        raise StudyError("a mask to pool over is empty: leave out objects without visible pixels")
    # averages where tokens are coarser than the mask, repeats where they are finer; never loses a small object
    cover = F.adaptive_avg_pool2d(masks[:, None].to(dense), (dense.shape[2], dense.shape[3]))
    return (dense * cover).sum((2, 3)) / cover.sum((2, 3))


# -------------------------------------------------------------------------------------------------------- loading


def load_encoder(
    name: str,
    weights: str | Path = "zoo",
    device: str | torch.device = "cpu",
    seed: int = 0,
    preprocessing: Literal["own", "paper"] = "own",
    image_size: int | None = None,
    half: bool = False,
) -> Encoder:
    """The encoder of that name, frozen, in evaluation mode.

    Args:
        name: ``sam``, ``sam2``, ``clip``, ``dinov2`` or ``random`` (an untrained SAM); of the official models also
            ``mae`` and ``hiera`` (the parents of SAM and SAM 2), ``sam3``, ``dinov3``, ``siglip2``.
        weights: ``zoo`` (the pocket models), ``zoo_random`` (the same, untrained), ``official``, ``random`` (the
            official architecture, untrained) or the path of an official checkpoint.
        seed: of untrained weights.
        preprocessing: the model's own, or the paper's for all; the pocket models have one only.
        image_size: another input side, for models that take any (``dinov2``, ``dinov3``).
        half: compute in bfloat16.

    Raises:
        StudyError: unknown name; weights that are missing, damaged or of another model; a size that it does not take.
    """
    if weights in ("zoo", "zoo_random"):
        architecture, model, weights_hash, preprocess = _from_zoo(name, str(weights), seed)
    else:
        architecture, model, weights_hash, preprocess = _from_official(name, weights, seed, preprocessing)
    if image_size is not None:
        if not architecture.any_size and image_size != preprocess.size:
            raise StudyError(f"encoder {name} takes {preprocess.size}-pixel images only: leave image_size out")
        preprocess = dataclasses.replace(preprocess, size=image_size, short=0)
    if not all(bool(values.isfinite().all()) for values in model.parameters()):
        raise StudyError(f"the weights of encoder {name} ({weights}) are not all finite numbers: use the official file")
    return _encoder(name, architecture, model, weights_hash, preprocess, device, half)


def zoo_encoder(name: str, model: nn.Module, weights_hash: str, image_size: int = pocket.DEFAULT.image_size) -> Encoder:
    """A model of the zoo's architecture ``name`` as an encoder, wherever its weights come from."""
    return _encoder(name, ZOO[name], model, weights_hash, Preprocessing(image_size, "squash"))


def _encoder(
    name: str,
    architecture: Architecture,
    model: nn.Module,
    weights_hash: str,
    preprocess: Preprocessing,
    device: str | torch.device = "cpu",
    half: bool = False,
) -> Encoder:
    model = model.to(device).eval().requires_grad_(False)
    blocks = tuple(f"block_{number:02d}" for number in range(1, len(architecture.blocks(model)) + 1))
    return Encoder(
        name=name,
        weights_hash=weights_hash,
        layers=blocks + architecture.after,
        headline=architecture.headline,
        model=model,
        preprocess=preprocess,
        architecture=architecture,
        device=torch.device(device),
        half=half,
    )


def _from_zoo(name: str, weights: str, seed: int) -> tuple[Architecture, nn.Module, str, Preprocessing]:
    if name not in ZOO:
        raise StudyError(f"no pocket encoder is called {name!r}: choose from {', '.join(ZOO)}")
    if name == "random" or weights == "zoo_random":
        model = pocket.build("sam" if name == "random" else name, seed=seed)
        weights_hash = hash_model(model)
    else:
        model, weights_hash = pocket.load(name), pocket.verify(name)[:16]
    return ZOO[name], model, weights_hash, Preprocessing(pocket.DEFAULT.image_size, "squash")


def _from_official(
    name: str, weights: str | Path, seed: int, preprocessing: Literal["own", "paper"]
) -> tuple[Architecture, nn.Module, str, Preprocessing]:
    from samantics.models import official  # imports every model package of transformers: seconds

    if name not in (*official.OFFICIAL, "random"):
        raise StudyError(f"no official encoder is called {name!r}: choose from {', '.join(official.OFFICIAL)}, random")
    known, source = ("sam", "random") if name == "random" else (name, weights)
    model, sha256 = official.official_model(known, source, seed)
    weights_hash = sha256[:16] if sha256 else hash_model(model)
    entry = official.OFFICIAL[known]
    return entry.architecture, model, weights_hash, entry.paper if preprocessing == "paper" else entry.own


def hash_model(model: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a model's weights: their names, shapes and values."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
