"""The encoders of the study, one entry each: weights, how it is built and read, preprocessing.

`sam`, `sam2`, `clip` and `dinov2` are the paper's; `mae` and `hiera` are what SAM and SAM 2 started
from; `sam3`, `dinov3` and `siglip2` are today's models. A new encoder is a new entry (docs/tour.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module  # packages of models take seconds to import: not before one is built
from typing import Any

import torch
from torch import Tensor, nn

from samantics.models.architectures import Architecture, LayerOutput, capture, channels_last, class_and_tokens, tokens
from samantics.models.preprocessing import HALVES, OPENAI, Preprocessing
from samantics.models.weights import OFFICIAL, WeightFile

Outputs = dict[str, LayerOutput]  # by layer
EVALUATION = Preprocessing(224, "crop", short=256, bicubic=True)  # as DINOv2, MAE and Hiera evaluate on ImageNet


@dataclasses.dataclass(frozen=True)
class Entry:
    """One encoder."""

    weights: WeightFile  # its official file
    build: Callable[[], nn.Module]  # its package's own model at official size, with random weights
    architecture: Architecture  # how it is read, and the pocket model of the same name
    own: Preprocessing  # as its package has it
    prefix: str = ""  # of the image encoder's names in a checkpoint that holds more


def _transformers(family: str, **sizes: Any) -> nn.Module:
    """The model of transformers with its default configuration but for these sizes."""
    package, options = import_module("transformers"), {"add_pooling_layer": False} if family == "Hiera" else {}
    return getattr(package, f"{family}Model")(getattr(package, f"{family}Config")(**sizes), **options)


# ------------------------------------------------------------------------------------------------ the paper's four


SAM = Entry(
    weights=OFFICIAL["sam"],
    build=lambda: import_module("segment_anything").sam_model_registry["vit_b"](),
    architecture=Architecture(
        blocks=lambda model: model.image_encoder.blocks,
        forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels))},
        read=channels_last,
    ),
    own=Preprocessing(1024, "pad"),
)


SAM2 = Entry(
    weights=OFFICIAL["sam2"],
    build=lambda: import_module("sam2.build_sam").build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu"),
    architecture=Architecture(
        blocks=lambda model: model.image_encoder.trunk.blocks,
        forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels)["vision_features"])},
        read=channels_last,
    ),
    own=Preprocessing(1024, "squash", on_floats=True),
)


def _clip_forward(model: Any, pixels: Tensor) -> Outputs:
    with capture({"norm": model.visual.ln_post}) as captured:
        projected = model.visual(pixels)
    normal = tokens(captured["norm"], prefix=1)
    dense = (normal.dense.permute(0, 2, 3, 1) @ model.visual.proj).permute(0, 3, 1, 2)
    return {"before_projection": normal, "final": LayerOutput(dense, projected)}


CLIP = Entry(
    weights=OFFICIAL["clip"],
    build=lambda: (clip := import_module("open_clip")).CLIP(**clip.get_model_config("ViT-B-32-quickgelu")),
    architecture=Architecture(
        blocks=lambda model: model.visual.transformer.resblocks,
        forward=_clip_forward,
        read=class_and_tokens,
        headline=("final", "cls"),
        cls_in="all",
        after=("before_projection", "final"),
    ),
    own=Preprocessing(224, "crop", *OPENAI, bicubic=True),
)
DINOV2 = Entry(
    weights=OFFICIAL["dinov2"],
    build=lambda: _transformers(
        "Dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    ),
    architecture=Architecture(
        blocks=lambda model: model.encoder.layer,
        forward=lambda model, pixels: {"final": tokens(model(pixels).last_hidden_state, prefix=1)},
        read=class_and_tokens,
        headline=("final", "cls"),
        cls_in="all",
        any_size=True,
    ),
    own=EVALUATION,
)

# ---------------------------------------------------------------------------------- parents of SAM and SAM 2


def _mae_forward(model: Any, pixels: Tensor) -> Outputs:
    """Nothing masked, and the tokens in their order (`noise` is what MAE sorts them by)."""
    count = model.embeddings.patch_embeddings.num_patches
    noise = torch.arange(count, device=pixels.device).expand(len(pixels), count)
    return {"final": tokens(model(pixels, noise=noise).last_hidden_state, prefix=1)}


MAE = Entry(
    weights=OFFICIAL["mae"],
    build=lambda: _transformers("ViTMAE", mask_ratio=0.0),
    architecture=Architecture(lambda model: model.layers, _mae_forward, class_and_tokens, cls_in="all"),
    own=EVALUATION,
)


def _hiera_block(model: Any, output: Any) -> LayerOutput:
    """Hiera's tokens lie window by window until its own `reroll` puts them in order."""
    sequence: Tensor = output[0]
    grids = [size[0] * size[1] for _, size in model.encoder.schedule.values()]
    return channels_last(model, model.encoder.reroll(sequence, grids.index(sequence.shape[1])))


HIERA = Entry(
    weights=OFFICIAL["hiera"],
    build=lambda: _transformers("Hiera", depths=(1, 2, 7, 2)),
    architecture=Architecture(
        blocks=lambda model: [layer for stage in model.encoder.stages for layer in stage.layers],
        forward=lambda model, pixels: {"final": tokens(model(pixels).last_hidden_state, prefix=0)},
        read=_hiera_block,
    ),
    own=EVALUATION,
)

# ------------------------------------------------------------------------------------------------- today's models


def _sam3_forward(model: Any, pixels: Tensor) -> Outputs:
    """The neck's map at the trunk's own resolution."""
    return {"final": LayerOutput(model(pixels).fpn_hidden_states[model.config.scale_factors.index(1.0)])}


SAM3 = Entry(
    weights=OFFICIAL["sam3"],
    build=lambda: _transformers("Sam3Vision"),
    architecture=Architecture(lambda model: model.backbone.layers, _sam3_forward, channels_last),
    own=Preprocessing(1008, "squash", *HALVES),
    prefix="detector_model.vision_encoder.",
)


def _dinov3_tokens(model: Any, output: Any) -> LayerOutput:
    return tokens(output, prefix=1 + model.config.num_register_tokens)


DINOV3 = Entry(
    weights=OFFICIAL["dinov3"],
    build=lambda: _transformers("DINOv3ViT", num_register_tokens=4),
    architecture=Architecture(
        blocks=lambda model: model.model.layer,
        forward=lambda model, pixels: {"final": _dinov3_tokens(model, model(pixels).last_hidden_state)},
        read=_dinov3_tokens,
        headline=("final", "cls"),
        cls_in="all",
        any_size=True,
    ),
    own=Preprocessing(224, "squash", on_floats=True),
)


def _siglip_forward(model: Any, pixels: Tensor) -> Outputs:
    output = model(pixels)
    return {"final": LayerOutput(tokens(output.last_hidden_state, prefix=0).dense, output.pooler_output)}


SIGLIP2 = Entry(
    weights=OFFICIAL["siglip2"],
    build=lambda: _transformers("SiglipVision"),
    architecture=Architecture(
        blocks=lambda model: model.encoder.layers,
        forward=_siglip_forward,
        read=lambda _model, output: tokens(output, prefix=0),
        headline=("final", "cls"),
        cls_in="final",
    ),
    own=Preprocessing(224, "squash", *HALVES),
)

ENCODERS: Mapping[str, Entry] = {
    "sam": SAM, "sam2": SAM2, "clip": CLIP, "dinov2": DINOV2,
    "mae": MAE, "hiera": HIERA, "sam3": SAM3, "dinov3": DINOV3, "siglip2": SIGLIP2,
}  # fmt: skip
