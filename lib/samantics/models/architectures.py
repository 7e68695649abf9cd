"""How a model is read: its trunk blocks, its own forward pass, its class token. `registry` has one for each encoder.

Layers are named `block_01` ... and `final`: the neck of SAM, SAM 2 (`vision_features`) and SAM 3, CLIP's projected
embedding (`before_projection` is its normalised trunk), the normalised trunk of the others. The model's own forward
always runs whole and hooks read its blocks, so features are what the package computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = str
Readout = tuple[Layer, str]  # layer and pooling


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """A layer's features of a batch."""

    dense: Tensor  # (B, C, h, w), one vector per token
    cls: Tensor | None = None  # (B, C) class token; CLIP's `final`: projected embedding; SigLIP's: attention pool


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to read one package's model."""

    blocks: Callable[[Any], Sequence[nn.Module]]  # its trunk blocks, in order
    forward: Callable[[Any, Tensor], dict[Layer, LayerOutput]]  # of (B, 3, S, S) pixels: outputs of the layers `after`
    read: Callable[[Any, Any], LayerOutput]  # of the model and a block's raw output
    headline: Readout = ("final", "mean")  # as the paper (else the model's authors) pool it
    cls_in: Literal["none", "final", "all"] = "none"  # layers with a class token
    after: tuple[Layer, ...] = ("final",)  # layers that follow the blocks
    any_size: bool = False  # takes other input sizes than its own


@contextlib.contextmanager
def capture(modules: Mapping[Layer, nn.Module]) -> Iterator[dict[Layer, Any]]:
    """Yield a dictionary that holds the raw output of each named module once the model has run inside the block."""
    captured: dict[Layer, Any] = {}

    def keep(name: Layer) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: captured.update({name: output})

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield captured


def fuse_attention(model: nn.Module) -> None:
    """Have SAM's image encoder attend by PyTorch's fused kernel, which never writes the attention out."""
    for module in model.modules():
        if hasattr(module, "rel_pos_h"):
            module.forward = functools.partial(fused_attention, module)


def fused_attention(attention: Any, x: Tensor) -> Tensor:
    """`(B, h, w, C)` after SAM's attention.

    A relative position adds `row(i, y) + column(i, x)` to the logit of token i and the token at (x, y): a scalar
    product, if i's rows and columns are appended to its query, and one-hot y and x to the other's key.
    """
    from segment_anything.modeling.image_encoder import get_rel_pos

    batch, height, width, _ = x.shape
    query, key, value = attention.qkv(x).view(batch, height * width, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    grid, channels = query.unflatten(2, (height, width)), query.shape[-1]
    by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(height, height, attention.rel_pos_h))
    by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(width, width, attention.rel_pos_w))
    rows = torch.eye(height, device=x.device, dtype=query.dtype).repeat_interleave(width, 0)
    columns = torch.eye(width, device=x.device, dtype=query.dtype).repeat(height, 1)
    places = torch.cat([rows, columns], -1).expand(*key.shape[:2], -1, -1)
    query = torch.cat([query * attention.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
    key, room = torch.cat([key, places], -1), -query.shape[-1] % 8  # kernels want multiples of 8, and one width for all
    query, key = F.pad(query, (0, room)), F.pad(key, (0, room))
    value = F.pad(value, (0, query.shape[-1] - channels))
    seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]
    return attention.proj(seen.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4).flatten(3))


def channels_last(_model: Any, output: Tensor) -> LayerOutput:
    """`(B, h, w, C)`: the trunks of SAM, SAM 2 and SAM 3."""
    return LayerOutput(output.permute(0, 3, 1, 2))


def tokens(output: Any, prefix: int) -> LayerOutput:
    """`(B, prefix + h * w, C)` of a square input; the first of the prefix is the class token."""
    sequence: Tensor = output[0] if isinstance(output, tuple) else output
    side = math.isqrt(sequence.shape[1] - prefix)
    dense = sequence[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return LayerOutput(dense, sequence[:, 0] if prefix else None)


def class_and_tokens(_model: Any, output: Any) -> LayerOutput:
    """`(B, 1 + h * w, C)`: CLIP, DINOv2, MAE."""
    return tokens(output, prefix=1)
