"""How each package's model is read: its trunk blocks, its own forward, its class token.

Layers are named ``block_01`` ... and ``final``: the neck of SAM, SAM 2 (``vision_features``) and SAM 3, the projected
embedding of CLIP (``before_projection`` is its normalised trunk), the normalised trunk of the others. The model's own
forward always runs whole; blocks are read by hooks, so what comes out is what the package computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

Layer = str
Wanted = tuple[Layer, str]  # layer and pooling


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
        read: a block's raw output as :class:`LayerOutput`.
        headline: layer and pooling as the paper (else the model's authors) pool it.
        cls_in: of which layers ``cls`` can be pooled.
        after: names of the layers behind the blocks.
        any_size: whether it takes other input sizes than its own.
    """

    blocks: Callable[[Any], Sequence[nn.Module]]
    forward: Callable[[Any, Tensor], dict[Layer, LayerOutput]]
    read: Callable[[Any], LayerOutput]
    headline: Wanted
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


def channels_last(output: Any) -> LayerOutput:
    """``(B, h, w, C)`` of the trunks of SAM, SAM 2 and SAM 3."""
    return LayerOutput(output.permute(0, 3, 1, 2))


def tokens(output: Any, prefix: int) -> LayerOutput:
    """``(B, prefix + h * w, C)`` of a square input; the first of the prefix is the class token."""
    sequence: Tensor = output[0] if isinstance(output, tuple) else output
    side = math.isqrt(sequence.shape[1] - prefix)
    dense = sequence[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return LayerOutput(dense, sequence[:, 0] if prefix else None)


class_and_tokens = functools.partial(tokens, prefix=1)


def _clip_forward(model: Any, pixels: Tensor) -> dict[Layer, LayerOutput]:
    with listen({"norm": model.visual.ln_post}) as heard:
        projected = model.visual(pixels)
    normal = class_and_tokens(heard["norm"])
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
    forward=lambda model, pixels: {"final": class_and_tokens(model(pixels).last_hidden_state)},
    read=class_and_tokens,
    headline=("final", "cls"),
    cls_in="all",
    any_size=True,
)
