"""The official models, built by their own packages, with official or untrained weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from sam2.build_sam import build_sam2
from segment_anything import sam_model_registry
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HieraConfig,
    HieraModel,
    Sam3VisionConfig,
    Sam3VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.utils import logging

from samantics.errors import StudyError
from samantics.models import architectures
from samantics.models.architectures import Architecture
from samantics.models.preprocessing import HALVES, OPENAI, Preprocessing
from samantics.models.weights import read_weights, weight_file


@dataclasses.dataclass(frozen=True)
class Official:
    """One official model.

    Attributes:
        build: the package's own model, its weights drawn at random.
        architecture: how it is read.
        own: preprocessing as its package has it.
        paper: preprocessing as the paper's code has it: ImageNet statistics for all, SAM's family squashed.
        prefix: of the image encoder's names in a checkpoint that holds more.
    """

    build: Callable[[], nn.Module]
    architecture: Architecture
    own: Preprocessing
    paper: Preprocessing
    prefix: str = ""


_PAPER_CROP = Preprocessing(224, "crop")
_EVALUATION = Preprocessing(224, "crop", short=256, bicubic=True)  # as DINOv2, MAE and Hiera evaluate on ImageNet

OFFICIAL: Mapping[str, Official] = {
    "sam": Official(
        lambda: sam_model_registry["vit_b"](),
        architectures.SAM,
        Preprocessing(1024, "pad"),
        Preprocessing(1024, "squash"),
    ),
    "sam2": Official(
        lambda: build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu"),
        architectures.SAM2,
        Preprocessing(1024, "squash", on_floats=True),
        Preprocessing(1024, "squash"),
    ),
    "clip": Official(
        lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")),
        architectures.CLIP,
        Preprocessing(224, "crop", *OPENAI, bicubic=True),
        _PAPER_CROP,
    ),
    "dinov2": Official(
        lambda: Dinov2Model(
            Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
        ),
        architectures.DINOV2,
        _EVALUATION,
        _PAPER_CROP,
    ),
    "mae": Official(lambda: ViTMAEModel(ViTMAEConfig(mask_ratio=0.0)), architectures.MAE, _EVALUATION, _PAPER_CROP),
    "hiera": Official(
        lambda: HieraModel(HieraConfig(depths=(1, 2, 7, 2)), add_pooling_layer=False),
        architectures.HIERA,
        _EVALUATION,
        _PAPER_CROP,
    ),
    "sam3": Official(
        lambda: Sam3VisionModel(Sam3VisionConfig()),
        architectures.SAM3,
        Preprocessing(1008, "squash", *HALVES),
        Preprocessing(1008, "squash"),
        prefix="detector_model.vision_encoder.",
    ),
    "dinov3": Official(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4)),
        architectures.DINOV3,
        Preprocessing(224, "squash", on_floats=True),
        _PAPER_CROP,
    ),
    "siglip2": Official(
        lambda: SiglipVisionModel(SiglipVisionConfig()),
        architectures.SIGLIP2,
        Preprocessing(224, "squash", *HALVES),
        _PAPER_CROP,
    ),
}


def official_model(name: str, weights: str | Path, seed: int) -> tuple[nn.Module, str | None]:
    """The model, and the SHA-256 of its weight file (None for untrained weights).

    Args:
        weights: ``official``, ``random`` or the path of a checkpoint file.
        seed: of untrained weights.

    Raises:
        StudyError: the file is missing, damaged, hostile or another model's.
    """
    entry = OFFICIAL[name]
    path, sha256 = None, None
    if weights != "random":
        path, sha256 = weight_file(name, None if weights == "official" else weights)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = entry.build()
    if path is None or sha256 is None:
        return model, None
    return fill(model, read_weights(path, sha256), entry.prefix, name, path), sha256


def fill(model: Any, weights: dict[str, Tensor], prefix: str, name: str, path: Path) -> nn.Module:
    """The model with these weights, all of its own filled.

    Raises:
        StudyError: some are lacking or have another shape: the file is of another model.
    """
    if prefix and any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if hasattr(model, "from_pretrained"):  # transformers renames what older checkpoints call differently
        model, report = _from_pretrained(model, weights)
        wrong = [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]
    else:
        own = model.state_dict()
        wrong = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
        wrong += [key for key in weights if key not in own]
        if not wrong:
            model.load_state_dict(weights)
    if wrong:
        raise StudyError(
            f"{path} is not a checkpoint of the official {name} ({sorted(wrong)[0]} differs): use its own file"
        )
    return model


def _from_pretrained(model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """The model filled by transformers, and its report; what it would print of the decoders left out is kept back."""
    options = {"add_pooling_layer": False} if isinstance(model, HieraModel) else {}
    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=weights,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused by the caller in a line of our own
            **options,
        )
    finally:
        logging.set_verbosity(loud)
