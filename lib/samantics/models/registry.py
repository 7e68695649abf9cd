"""The encoders of the study, one entry each: how a package builds its model, how it is read, preprocessing.

`sam`, `sam2`, `clip` and `dinov2` are the paper's; `mae` and `hiera` are what SAM and SAM 2 started from; `sam3`,
`dinov3` and `siglip2` are today's models. A new encoder is a new entry (docs/tour.md).

Layers are named `block_01` ... and `final`: the neck of SAM, SAM 2 (`vision_features`) and SAM 3, CLIP's projected
embedding (`before_projection` is its normalised trunk), the normalised trunk of the others. The model's own forward
always runs whole and hooks read its blocks, so features are what the package computes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module  # Meta's and OpenCLIP's packages take seconds: not before a model is built
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.models.preprocessing import HALVES, OPENAI, Preprocessing

Layer = str
Readout = tuple[Layer, str]  # layer and pooling


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """A layer's features of a batch."""

    dense: Tensor  # (B, C, h, w), one vector per token
    cls: Tensor | None = None  # (B, C) class token; CLIP's `final`: projected embedding; SigLIP's: attention pool


Outputs = dict[Layer, LayerOutput]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one package's model is built, fed and read; the pocket model of the same name is read alike."""

    build: Callable[[], nn.Module]  # at official size, with random weights
    own: Preprocessing  # as the package has it
    blocks: Callable[[Any], Sequence[nn.Module]]  # its trunk blocks, in order
    forward: Callable[[Any, Tensor], Outputs]  # of (B, 3, S, S) pixels: outputs of the layers `after`
    read: Callable[[Any, Any], LayerOutput]  # of the model and a block's raw output
    headline: Readout = ("final", "mean")  # as the paper (else the model's authors) pool it
    cls_in: Literal["none", "final", "all"] = "none"  # layers with a class token
    after: tuple[Layer, ...] = ("final",)  # layers that follow the blocks
    prefix: str = ""  # of the image encoder's names in a checkpoint that holds more


@contextlib.contextmanager
def capture(modules: Mapping[Layer, nn.Module]) -> Iterator[dict[Layer, Any]]:
    """Yield a dictionary that holds the raw output of each named module once the model has run inside the block."""
    captured: dict[Layer, Any] = {}

    def keep(name: Layer, _module: nn.Module, _inputs: Any, output: Any) -> None:
        captured[name] = output

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(functools.partial(keep, name)))
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


# ------------------------------------------------------------------------------------------ reading, by package


def channels_last(_model: Any, output: Tensor) -> LayerOutput:
    """`(B, h, w, C)`: the trunks of SAM, SAM 2 and SAM 3."""
    return LayerOutput(output.permute(0, 3, 1, 2))


def tokens(_model: Any, output: Any, prefix: int = 1) -> LayerOutput:
    """`(B, prefix + h * w, C)` of a square input; the first of the prefix is the class token."""
    sequence: Tensor = output[0] if isinstance(output, tuple) else output
    side = math.isqrt(sequence.shape[1] - prefix)
    dense = sequence[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return LayerOutput(dense, sequence[:, 0] if prefix else None)


def _last_tokens(model: Any, pixels: Tensor, prefix: int = 1) -> Outputs:
    return {"final": tokens(model, model(pixels).last_hidden_state, prefix)}


def _clip_forward(model: Any, pixels: Tensor) -> Outputs:
    with capture({"norm": model.visual.ln_post}) as captured:
        projected = model.visual(pixels)
    normal = tokens(model, captured["norm"])
    dense = (normal.dense.permute(0, 2, 3, 1) @ model.visual.proj).permute(0, 3, 1, 2)
    return {"before_projection": normal, "final": LayerOutput(dense, projected)}


def _mae_forward(model: Any, pixels: Tensor) -> Outputs:
    """Nothing masked, and the tokens in their order (`noise` is what MAE sorts them by)."""
    count = model.embeddings.patch_embeddings.num_patches
    noise = torch.arange(count, device=pixels.device).expand(len(pixels), count)
    return {"final": tokens(model, model(pixels, noise=noise).last_hidden_state)}


def _hiera_block(model: Any, output: Any) -> LayerOutput:
    """Hiera's tokens lie window by window until its own `reroll` puts them in order."""
    sequence: Tensor = output[0]
    grids = [size[0] * size[1] for _, size in model.encoder.schedule.values()]
    return channels_last(model, model.encoder.reroll(sequence, grids.index(sequence.shape[1])))


def _sam3_forward(model: Any, pixels: Tensor) -> Outputs:
    """The neck's map at the trunk's own resolution."""
    return {"final": LayerOutput(model(pixels).fpn_hidden_states[model.config.scale_factors.index(1.0)])}


def _siglip_forward(model: Any, pixels: Tensor) -> Outputs:
    output = model(pixels)
    return {"final": LayerOutput(tokens(model, output.last_hidden_state, 0).dense, output.pooler_output)}


# ------------------------------------------------------------------------------------------------------ the entries

EVALUATION = Preprocessing(224, "crop", short=256, bicubic=True)  # as DINOv2, MAE and Hiera evaluate on ImageNet
DINOV3_PREFIX = 5  # class token and four registers

ENCODERS: dict[str, Architecture] = {
    "sam": Architecture(
        build=lambda: import_module("segment_anything").sam_model_registry["vit_b"](),
        own=Preprocessing(1024, "pad"),
        blocks=lambda model: model.image_encoder.blocks,
        forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels))},
        read=channels_last,
    ),
    "sam2": Architecture(
        build=lambda: import_module("sam2.build_sam").build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu"),
        own=Preprocessing(1024, "squash", on_floats=True),
        blocks=lambda model: model.image_encoder.trunk.blocks,
        forward=lambda model, pixels: {"final": LayerOutput(model.image_encoder(pixels)["vision_features"])},
        read=channels_last,
    ),
    "clip": Architecture(
        build=lambda: (clip := import_module("open_clip")).CLIP(**clip.get_model_config("ViT-B-32-quickgelu")),
        own=Preprocessing(224, "crop", *OPENAI, bicubic=True),
        blocks=lambda model: model.visual.transformer.resblocks,
        forward=_clip_forward,
        read=tokens,
        headline=("final", "cls"),
        cls_in="all",
        after=("before_projection", "final"),
    ),
    "dinov2": Architecture(
        build=lambda: hf.Dinov2Model(
            hf.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
        ),
        own=EVALUATION,
        blocks=lambda model: model.encoder.layer,
        forward=_last_tokens,
        read=tokens,
        headline=("final", "cls"),
        cls_in="all",
    ),
    "mae": Architecture(
        build=lambda: hf.ViTMAEModel(hf.ViTMAEConfig(mask_ratio=0.0)),
        own=EVALUATION,
        blocks=lambda model: model.layers,
        forward=_mae_forward,
        read=tokens,
        cls_in="all",
    ),
    "hiera": Architecture(
        build=lambda: hf.HieraModel(hf.HieraConfig(depths=(1, 2, 7, 2)), add_pooling_layer=False),
        own=EVALUATION,
        blocks=lambda model: [layer for stage in model.encoder.stages for layer in stage.layers],
        forward=functools.partial(_last_tokens, prefix=0),
        read=_hiera_block,
    ),
    "sam3": Architecture(
        build=lambda: hf.Sam3VisionModel(hf.Sam3VisionConfig()),
        own=Preprocessing(1008, "squash", *HALVES),
        blocks=lambda model: model.backbone.layers,
        forward=_sam3_forward,
        read=channels_last,
        prefix="detector_model.vision_encoder.",
    ),
    "dinov3": Architecture(
        build=lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(num_register_tokens=DINOV3_PREFIX - 1)),
        own=Preprocessing(224, "squash", on_floats=True),
        blocks=lambda model: model.model.layer,
        forward=functools.partial(_last_tokens, prefix=DINOV3_PREFIX),
        read=functools.partial(tokens, prefix=DINOV3_PREFIX),
        headline=("final", "cls"),
        cls_in="all",
    ),
    "siglip2": Architecture(
        build=lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig()),
        own=Preprocessing(224, "squash", *HALVES),
        blocks=lambda model: model.encoder.layers,
        forward=_siglip_forward,
        read=functools.partial(tokens, prefix=0),
        headline=("final", "cls"),
        cls_in="final",
    ),
}
# the zoo alone has these, and reads them as other models: an untrained SAM; DINOv2's, taught by its mean token
ENCODERS["random"] = ENCODERS["sam"]
ENCODERS["supervised"] = dataclasses.replace(ENCODERS["dinov2"], headline=("final", "mean"))
