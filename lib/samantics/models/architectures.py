"""How each package's model is read: its trunk blocks, its own forward, its class token.

Layers are named ``block_01`` ... and ``final``: the neck of SAM, SAM 2 (``vision_features``) and SAM 3, the projected
embedding of CLIP (``before_projection`` is its normalised trunk), the normalised trunk of the others. The model's own
forward always runs whole; blocks are read by hooks, so what comes out is what the package computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Layer = str
Readout = tuple[Layer, str]  # layer and pooling


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """What one layer says of a batch.

    Attributes:
        dense: ``(B, C, h, w)``, one vector per token.
        cls: ``(B, C)`` class token (CLIP's ``final``: the projected embedding; SigLIP's: the attention pool), or None.
    """

    dense: Tensor
    cls: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to read one package's model.

    Attributes:
        blocks: its trunk blocks, in order.
        forward: runs it on ``(B, 3, S, S)`` pixels; outputs by layer name: those of ``after``.
        read: model and a block's raw output -> :class:`LayerOutput`.
        headline: layer and pooling as the paper (else the model's authors) pool it.
        cls_in: of which layers ``cls`` can be pooled.
        after: names of the layers behind the blocks.
        any_size: whether it takes other input sizes than its own.
    """

    blocks: Callable[[Any], Sequence[nn.Module]]
    forward: Callable[[Any, Tensor], dict[Layer, LayerOutput]]
    read: Callable[[Any, Any], LayerOutput]
    headline: Readout
    cls_in: Literal["none", "final", "all"]
    after: tuple[Layer, ...] = ("final",)
    any_size: bool = False


@contextlib.contextmanager
def listen(modules: Mapping[Layer, nn.Module]) -> Iterator[dict[Layer, Any]]:
    """Yield a dictionary that holds the raw output of each named module once the model has run inside the block."""
    heard: dict[Layer, Any] = {}

    def keep(name: Layer) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: heard.update({name: output})

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield heard


# ------------------------------------------------------------------------------------------------ reading outputs


def channels_last(_model: Any, output: Any) -> LayerOutput:
    """``(B, h, w, C)`` of the trunks of SAM, SAM 2 and SAM 3."""
    return LayerOutput(output.permute(0, 3, 1, 2))


def tokens(output: Any, prefix: int) -> LayerOutput:
    """``(B, prefix + h * w, C)`` of a square input; the first of the prefix is the class token."""
    sequence: Tensor = output[0] if isinstance(output, tuple) else output
    side = math.isqrt(sequence.shape[1] - prefix)
    dense = sequence[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return LayerOutput(dense, sequence[:, 0] if prefix else None)


def class_and_tokens(_model: Any, output: Any) -> LayerOutput:
    """``(B, 1 + h * w, C)``."""
    return tokens(output, prefix=1)


def _clip_forward(model: Any, pixels: Tensor) -> dict[Layer, LayerOutput]:
    with listen({"norm": model.visual.ln_post}) as heard:
        projected = model.visual(pixels)
    normal = tokens(heard["norm"], prefix=1)
    dense = (normal.dense.permute(0, 2, 3, 1) @ model.visual.proj).permute(0, 3, 1, 2)
    return {"before_projection": normal, "final": LayerOutput(dense, projected)}


# -------------------------------------------------------------------------------------- the study's four encoders

SAM = Architecture(
    blocks=lambda model: model.image_encoder.blocks,
    forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels))},
    read=channels_last,
    headline=("final", "mean"),
    cls_in="none",
)
SAM2 = Architecture(
    blocks=lambda model: model.image_encoder.trunk.blocks,
    forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels)["vision_features"])},
    read=channels_last,
    headline=("final", "mean"),
    cls_in="none",
)
CLIP = Architecture(
    blocks=lambda model: model.visual.transformer.resblocks,
    forward=_clip_forward,
    read=class_and_tokens,
    headline=("final", "cls"),
    cls_in="all",
    after=("before_projection", "final"),
)
DINOV2 = Architecture(
    blocks=lambda model: model.encoder.layer,
    forward=lambda model, pixels: {"final": tokens(model(pixels).last_hidden_state, prefix=1)},
    read=class_and_tokens,
    headline=("final", "cls"),
    cls_in="all",
    any_size=True,
)


# -------------------------------------------------------------------------------- parents, and models of today


def _mae_forward(model: Any, pixels: Tensor) -> dict[Layer, LayerOutput]:
    """Nothing masked, and the tokens in their order (``noise`` is what MAE sorts them by)."""
    count = model.embeddings.patch_embeddings.num_patches
    noise = torch.arange(count, device=pixels.device).expand(len(pixels), count)
    return {"final": tokens(model(pixels, noise=noise).last_hidden_state, prefix=1)}


def _hiera_block(model: Any, output: Any) -> LayerOutput:
    """Hiera's tokens lie window by window until its own ``reroll`` puts them in order."""
    sequence: Tensor = output[0]
    grids = [size[0] * size[1] for _, size in model.encoder.schedule.values()]
    return channels_last(model, model.encoder.reroll(sequence, grids.index(sequence.shape[1])))


def _sam3_forward(model: Any, pixels: Tensor) -> dict[Layer, LayerOutput]:
    """The neck's map at the trunk's own resolution."""
    return {"final": LayerOutput(model(pixels).fpn_hidden_states[model.config.scale_factors.index(1.0)])}


def _siglip_forward(model: Any, pixels: Tensor) -> dict[Layer, LayerOutput]:
    output = model(pixels)
    return {"final": LayerOutput(tokens(output.last_hidden_state, prefix=0).dense, output.pooler_output)}


def _dinov3_tokens(model: Any, output: Any) -> LayerOutput:
    return tokens(output, prefix=1 + model.config.num_register_tokens)


MAE = Architecture(
    blocks=lambda model: model.layers,
    forward=_mae_forward,
    read=class_and_tokens,
    headline=("final", "mean"),
    cls_in="all",
)
HIERA = Architecture(
    blocks=lambda model: [layer for stage in model.encoder.stages for layer in stage.layers],
    forward=lambda model, pixels: {"final": tokens(model(pixels).last_hidden_state, prefix=0)},
    read=_hiera_block,
    headline=("final", "mean"),
    cls_in="none",
)
SAM3 = Architecture(
    blocks=lambda model: model.backbone.layers,
    forward=_sam3_forward,
    read=channels_last,
    headline=("final", "mean"),
    cls_in="none",
)
DINOV3 = Architecture(
    blocks=lambda model: model.model.layer,
    forward=lambda model, pixels: {"final": _dinov3_tokens(model, model(pixels).last_hidden_state)},
    read=_dinov3_tokens,
    headline=("final", "cls"),
    cls_in="all",
    any_size=True,
)
SIGLIP2 = Architecture(
    blocks=lambda model: model.encoder.layers,
    forward=_siglip_forward,
    read=lambda _model, output: tokens(output, prefix=0),
    headline=("final", "cls"),
    cls_in="final",
)
