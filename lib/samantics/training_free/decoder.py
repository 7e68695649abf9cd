"""SAM's and SAM 2's mask decoders for many single-point prompts on one image: the packages' weights, less work.

The results are the packages' up to rounding. Three identities save most of the work (C channels, N image tokens, T
prompt tokens, a dozen at most; `x` are image tokens, `q, k, v` the projections of an attention):

- before the first layer all prompts see the same image tokens: their projections are made once;
- `q . (W x + b) = (W^T q) . x + q . b`: where few tokens meet many, the few are projected instead of the many, and
  `sum_i a_i (W x_i + b) = W (sum_i a_i x_i) + b` likewise;
- a transposed convolution of kernel 2 and stride 2 is a matrix product, and in channels-last order nothing is moved.

Predicted IoUs come before the masks, so masks that will be dropped for theirs are never made.
"""

import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor
from torch.nn import functional as F

from samantics.errors import StudyError

MASK_THRESHOLD = 0.0  # of logits, in both packages
LOGITS_AT_ONCE = 2**21  # of attention: 8 MB
_resized = functools.partial(F.interpolate, mode="linear", align_corners=False)


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image as SAM's decoder sees it."""

    model: Any  # the Sam or SAM2Base that encoded it
    embedding: Tensor  # (C, h, w)
    high_res: tuple[Tensor, ...]  # SAM 2's finer maps (C / 8, 4h, 4w) and (C / 4, 2h, 2w); empty for SAM
    size: tuple[int, int]  # height and width of the image, pixels
    frame: tuple[int, int]  # height and width that it takes of the model's input (the rest is padding), pixels

    @functools.cached_property
    def upscaling(self) -> tuple[Tensor, Tensor]:
        """`(height, 4h)` and `(width, 4w)`: the packages' resizing of mask logits to the image, as two matrices."""
        identity = torch.eye(4 * self.embedding.shape[1], device=self.embedding.device)[None]
        sides = [identity, identity]
        if isinstance(self.model, Sam):  # SAM resizes to its input, cuts the padding off, and resizes to the image
            sides = [_resized(identity, self.model.image_encoder.img_size)[..., :used] for used in self.frame]
        rows, columns = (_resized(side, whole)[0].T for side, whole in zip(sides, self.size, strict=True))
        return rows.contiguous(), columns.contiguous()

    def full_logits(self, low: Tensor) -> Tensor:
        """`(M, height, width)`: logits `(M, 4h, 4w)` at the image's resolution, stored by columns like run lengths."""
        rows, columns = self.upscaling
        return (columns @ (low.transpose(1, 2) @ rows.T)).transpose(1, 2)


@torch.inference_mode()
def encode_image(model: Any, image: Image.Image) -> EncodedImage:
    """Encode an RGB image as the package's own predictor does.

    Raises:
        StudyError: the model is neither a `Sam` nor a `SAM2Base`, or the image is too narrow for it.
    """
    size = (image.height, image.width)
    if isinstance(model, Sam):
        if min(size) * model.image_encoder.img_size / max(size) < 0.5:
            raise StudyError(
                f"an image of {image.width}x{image.height} pixels is too narrow for SAM: remove or crop it"
            )
        resized = SamPredictor(model).transform.apply_image(np.asarray(image))
        pixels = torch.as_tensor(resized, device=model.device).permute(2, 0, 1)[None]
        return EncodedImage(model, _embedding(model, pixels)[0], (), size, resized.shape[:2])
    if isinstance(model, SAM2Base):
        predictor = sam2_predictor(model)
        predictor.set_image(np.array(image))  # a copy: torch warns of arrays that it may not write to
        maps, frame = predictor._features, (model.image_size, model.image_size)
        high_res = tuple(level[0] for level in maps["high_res_feats"])
        return EncodedImage(model, maps["image_embed"][0], high_res, size, frame)
    raise StudyError(f"{type(model).__name__} has no mask decoder: propose masks with sam or sam2")


def sam2_predictor(model: SAM2Base) -> SAM2ImagePredictor:
    """The package's predictor, also for input sizes other than 1024, for which it assumes the shapes of its maps."""
    with warnings.catch_warnings():  # it scripts its resizing, in a way that torch is about to give up
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        predictor = SAM2ImagePredictor(model)
    side = model.image_size // model.backbone_stride
    predictor._bb_feat_sizes = [(4 * side, 4 * side), (2 * side, 2 * side), (side, side)]
    return predictor


def _embedding(model: Sam, pixels: Tensor) -> Tensor:
    """`(1, C, h, w)`: SAM's image encoder with its attention computed in parts that fit a processor's cache."""
    blocks = () if pixels.is_cuda else model.image_encoder.blocks  # a GPU's is fused already
    attentions = [block.attn for block in blocks if block.attn.use_rel_pos]  # not the small pocket models'
    try:
        for attention in attentions:
            attention.forward = functools.partial(_attended, attention)
        return model.image_encoder(model.preprocess(pixels))
    finally:
        for attention in attentions:
            del attention.forward


def _attended(attention: Any, x: Tensor) -> Tensor:
    """`(B, h, w, C)` after SAM's attention with decomposed relative positions: the package's sums, in small parts."""
    batch, height, width, _ = x.shape
    tokens, heads = height * width, attention.num_heads
    query, key, value = attention.qkv(x).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
    seen, grid = torch.empty_like(query), query.unflatten(1, (height, width))
    by_row = torch.einsum("bhwc,hkc->bhwk", grid, get_rel_pos(height, height, attention.rel_pos_h)).flatten(1, 2)
    by_column = torch.einsum("bhwc,wkc->bhwk", grid, get_rel_pos(width, width, attention.rel_pos_w)).flatten(1, 2)
    some, few = max(1, LOGITS_AT_ONCE // tokens**2), max(1, LOGITS_AT_ONCE // tokens)
    for i in range(0, len(query), some):
        for j in range(0, tokens, few):
            part = (slice(i, i + some), slice(j, j + few))
            logits = (query[part] * attention.scale) @ key[part[0]].transpose(1, 2)
            logits = logits.unflatten(2, (height, width)).add_(by_row[part][..., None])
            seen[part] = logits.add_(by_column[part][..., None, :]).flatten(2).softmax(-1) @ value[part[0]]
    seen = seen.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4).flatten(3)
    return attention.proj(seen)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Prompts after the decoder's transformer, before any mask is made."""

    predicted_iou: Tensor  # (P, 3)
    kernels: Tensor  # (P, 3, C / 8), the output of the mask tokens' MLPs
    image_tokens: Tensor  # (P, N, C)


class PointDecoder:
    """The mask decoder bound to one encoded image; see the module's text for what it saves."""

    def __init__(self, image: EncodedImage) -> None:
        self.image = image
        sam2 = isinstance(image.model, SAM2Base)
        self.prompts = image.model.sam_prompt_encoder if sam2 else image.model.prompt_encoder
        self.decoder = image.model.sam_mask_decoder if sam2 else image.model.mask_decoder
        self.has_object_score = bool(getattr(self.decoder, "pred_obj_scores", False))  # SAM 2.1: a token more in front
        self.tokens = (image.embedding + self.prompts.no_mask_embed.weight[0][:, None, None]).flatten(1).T.contiguous()
        self.positions = self.prompts.get_dense_pe()[0].flatten(1).T.contiguous()
        first, placed = self.decoder.transformer.layers[0], self.tokens + self.positions
        reading, writing = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        # keys and values of the first layer's reading, queries of its writing, each (heads, N, C / heads / 2)
        shared = (reading.k_proj(placed), reading.v_proj(self.tokens), writing.q_proj(placed))
        self.shared = tuple(part.unflatten(1, (reading.num_heads, -1)).transpose(0, 1) for part in shared)

    def decode(self, points: NDArray[Any]) -> Decoded:
        """Three masks' worth of tokens for each of `(P, 2)` points (x, y) in pixels of the image."""
        prompt = self._prompt_tokens(points)
        transformer = self.decoder.transformer
        first, second = transformer.layers
        whole = self.tokens.expand(len(points), -1, -1)
        queries, tokens = self._layer(first, prompt, prompt, whole, self.shared)
        queries, tokens = self._layer(second, queries, prompt, tokens, None)
        final = transformer.final_attn_token_to_image
        read = _read(final, queries + prompt, tokens, tokens + self.positions)
        queries = transformer.norm_final_attn(queries + read)
        start, heads = 1 + self.has_object_score, self.decoder.output_hypernetworks_mlps
        kernels = torch.stack([heads[n](queries[:, start + n]) for n in range(1, len(heads))], dim=1)
        return Decoded(self.decoder.iou_prediction_head(queries[:, start - 1])[:, 1:], kernels, tokens)

    def low_logits(self, decoded: Decoded, keep: Tensor) -> Tensor:
        """`(M, 4h, 4w)` mask logits of the masks that `keep` `(P, 3)` marks, in its order."""
        rows = keep.any(1)
        height, width = self.image.embedding.shape[1:]
        if not rows.any():
            return decoded.kernels.new_empty(0, 4 * height, 4 * width)
        coarse, norm, _, fine, _ = self.decoder.output_upscaling  # both activations are GELU, done in place here
        x, levels = _doubled(decoded.image_tokens[rows], coarse), self._finer_maps
        x = x + levels[1] if levels else x
        x = torch.ops.aten.gelu_(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = _doubled(x, fine)
        x = torch.ops.aten.gelu_(x.add_(levels[0]) if levels else x)
        pixels = x.flatten(1, -2) @ decoded.kernels[rows].transpose(1, 2)
        pixels = pixels.view(-1, height, width, 2, 2, 2, 2, pixels.shape[-1]).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return pixels.reshape(len(pixels), -1, 4 * height, 4 * width)[keep[rows]]

    def _prompt_tokens(self, points: NDArray[Any]) -> Tensor:
        """`(P, T, C)`: the decoder's own tokens, then the point and the padding point."""
        (height, width), frame = self.image.size, self.image.frame
        scaled = points * np.array([frame[1] / width, frame[0] / height])
        at = torch.as_tensor(scaled, dtype=torch.float32, device=self.positions.device)[:, None]
        labels = torch.ones(at.shape[:2], dtype=torch.int, device=at.device)
        sparse, _ = self.prompts(points=(at, labels), boxes=None, masks=None)
        own = [self.decoder.iou_token.weight, self.decoder.mask_tokens.weight]
        if self.has_object_score:
            own.insert(0, self.decoder.obj_score_token.weight)
        return torch.cat([torch.cat(own).expand(len(points), -1, -1), sparse], dim=1)

    def _layer(
        self, layer: Any, queries: Tensor, prompt: Tensor, tokens: Tensor, shared: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """One two-way block: prompt tokens read one another and the image, think, and write to the image."""
        reading, writing = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        if layer.skip_first_layer_pe:
            queries = layer.norm1(layer.self_attn(q=queries, k=queries, v=queries))
        else:
            asked = queries + prompt
            queries = layer.norm1(queries + layer.self_attn(q=asked, k=asked, v=queries))
        placed, asked = tokens if shared else tokens + self.positions, queries + prompt
        read = _read_shared(reading, asked, *shared[:2]) if shared else _read(reading, asked, tokens, placed)
        queries = layer.norm2(queries + read)
        queries = layer.norm3(queries + layer.mlp(queries))
        heads, keys = writing.num_heads, _heads(writing.k_proj(queries + prompt), writing)
        keys = keys * keys.shape[-1] ** -0.5
        if shared:
            logits = keys @ shared[2].transpose(1, 2)
        else:
            few = (keys @ writing.q_proj.weight.unflatten(0, (heads, -1))).flatten(1, 2)  # (P, heads * T, C)
            constant = (keys @ writing.q_proj.bias.view(heads, -1, 1)).flatten(1, 2)
            logits = torch.baddbmm(constant, few, placed.transpose(1, 2)).unflatten(1, (heads, -1))
        weights = logits.softmax(dim=2).flatten(1, 2)  # over the T tokens that an image token may read
        outward = writing.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
        values = (_heads(writing.v_proj(queries), writing) @ outward).flatten(1, 2)
        written = torch.baddbmm(writing.out_proj.bias, weights.transpose(1, 2), values)
        return queries, layer.norm4(written.add_(tokens))

    @functools.cached_property
    def _finer_maps(self) -> tuple[Tensor, ...]:
        """SAM 2's finer maps in the order of `_doubled`: `(N, 2, 2, 2, 2, C / 8)` and `(N, 2, 2, C / 4)`."""
        if not self.image.high_res:
            return ()
        finest, finer = self.image.high_res
        height, width = self.image.embedding.shape[1:]
        finest = finest.reshape(-1, height, 2, 2, width, 2, 2).permute(1, 4, 2, 5, 3, 6, 0).flatten(0, 1)
        finer = finer.reshape(-1, height, 2, width, 2).permute(1, 3, 2, 4, 0).flatten(0, 1)
        return finest.contiguous(), finer.contiguous()


def _heads(x: Tensor, attention: Any) -> Tensor:
    """`(P, T, C)` to `(P, heads, T, C / heads)`."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _read_shared(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Prompt tokens `(P, T, C)` attend to image tokens that are the same for all prompts."""
    prompts, tokens = queries.shape[:2]
    asked = attention.q_proj(queries).flatten(0, 1).unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
    found = F.scaled_dot_product_attention(asked[None], keys[None], values[None])[0]
    return attention.out_proj(found.transpose(0, 1).reshape(prompts, tokens, -1))


def _read(attention: Any, queries: Tensor, tokens: Tensor, placed: Tensor) -> Tensor:
    """Prompt tokens `(P, T, C)` attend to image tokens `(P, N, C)`, `placed` with their positions added.

    The bias of the keys is left out: it is the same for all image tokens, so it cancels in the softmax.
    """
    heads = attention.num_heads
    asked = _heads(attention.q_proj(queries), attention)
    few = (asked * asked.shape[-1] ** -0.5 @ attention.k_proj.weight.unflatten(0, (heads, -1))).flatten(1, 2)
    weights = (few @ placed.transpose(1, 2)).softmax(dim=-1)
    seen = (weights @ tokens).unflatten(1, (heads, -1))
    found = seen @ attention.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return attention.out_proj(found.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _doubled(x: Tensor, convolution: Any) -> Tensor:
    """`(P, ..., c)` to `(P, ..., 2, 2, C)`: a transposed convolution of kernel and stride 2, channels last."""
    weight = convolution.weight.permute(0, 2, 3, 1)
    out = torch.addmm(convolution.bias.repeat(4), x.flatten(0, -2), weight.flatten(1))
    return out.view(*x.shape[:-1], *weight.shape[1:])
