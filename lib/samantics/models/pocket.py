"""The pocket zoo: small models of the official packages' own classes, trained on MojiWorld (`zoo.training`).

All of them share one capacity so that only the objective differs: the ViTs are six blocks of width 160 (a little
under ViT-Tiny's width, at half its depth) on 12x12 tokens of a 96-pixel image, the Hiera has about as many parameters.
A stem of stride-2 convolutions stands in for the patch embedding: early convolutions make small-budget training
work (Xiao et al. 2021, arXiv 2106.14881). Change a setting here and retrain; nothing else needs to change.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from samantics import cache
from samantics.errors import StudyError
from samantics.models.preprocessing import MEAN, STD
from samantics.mojiworld import captions

ASSETS = cache.ASSETS / "zoo"


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """Sizes of every model of the zoo."""

    image_size: int = 96  # input side, pixels: that of MojiWorld's pictures
    patch_size: int = 8  # pixels of a token's side; the stem halves the image log2(patch_size) times
    width: int = 160  # of the ViT trunks, as depth and heads
    depth: int = 6
    heads: int = 5
    dim: int = 160  # of SAM's and SAM 2's neck and CLIP's joint space: DINOv2's width, so that all probes see as much
    hiera_width: int = 40  # of SAM 2's trunk, as its stages: as many parameters as the ViTs have
    hiera_stages: tuple[int, ...] = (1, 2, 3, 1)
    text_width: int = 128
    text_layers: int = 1  # CLIP's text tower: with three, the image tower learned a quarter as much in 24,000 pictures

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch_size


DEFAULT = ZooConfig()


class ConvStem(nn.Sequential):
    """`(B, 3, H, W)` to `(B, width, H / patch, W / patch)` by stride-2 3x3 convolutions that double the width."""

    def __init__(self, width: int, patch_size: int) -> None:
        halvings = patch_size.bit_length() - 1
        # multiples of 8, or GPUs fall back to slow convolutions
        widths = [3, *(-(-(width >> (halvings - 1 - step)) // 8) * 8 for step in range(halvings))]
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(width, width, 1))

    weight = property(lambda self: self[-1].weight)  # `Dinov2Model` asks its patch embedding for a dtype by this name


# ---------------------------------------------------------------- builders; each imports its package: all take seconds


def build_sam(config: ZooConfig = DEFAULT) -> Any:
    """An untrained pocket SAM: `segment_anything`'s `Sam`."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    size, grid, dim = config.image_size, config.grid, config.dim
    encoder = ImageEncoderViT(
        img_size=size, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth, num_heads=config.heads,
        out_chans=dim, qkv_bias=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    encoder.patch_embed.proj = ConvStem(config.width, config.patch_size)
    prompts = PromptEncoder(
        embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=512)
    decoder = MaskDecoder(transformer_dim=dim, transformer=transformer, num_multimask_outputs=3)
    return Sam(encoder, prompts, decoder, pixel_mean=[255 * m for m in MEAN], pixel_std=[255 * s for s in STD])


def build_sam2(config: ZooConfig = DEFAULT) -> Any:
    """An untrained pocket SAM 2 for images: `sam2`'s `SAM2Base` without memory, which only videos need."""
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.backbones.utils import PatchEmbed
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import TwoWayTransformer
    from sam2.modeling.sam2_base import SAM2Base

    width, dim, stages, stride = config.hiera_width, config.dim, config.hiera_stages, config.patch_size // 4
    # blocks of the third stage see the whole image, but for its first, which halves the map window by window
    whole = tuple(range(sum(stages[:2]) + 1, sum(stages[:3])))
    trunk = Hiera(
        embed_dim=width, num_heads=1, stages=stages, window_spec=(8, 4, 4, 4), global_att_blocks=whole,
        window_pos_embed_bkg_spatial_size=(8, 8),
    )  # fmt: skip
    trunk.patch_embed = PatchEmbed((7, 7), (stride, stride), (3, 3), embed_dim=width)  # its own suits tokens of 16
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(num_pos_feats=dim, normalize=True), d_model=dim,
        backbone_channel_list=trunk.channel_list, fpn_top_down_levels=[2, 3], fpn_interp_model="nearest",
    )  # fmt: skip
    model = SAM2Base(
        image_encoder=ImageEncoder(trunk, neck, scalp=1), memory_attention=None, memory_encoder=None, num_maskmem=0,
        image_size=config.image_size, backbone_stride=config.patch_size, directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True, multimask_output_in_sam=True, iou_prediction_use_sigmoid=True,
    )  # fmt: skip
    model.sam_mask_decoder.transformer = TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=512)
    return model


def build_clip(config: ZooConfig = DEFAULT) -> Any:
    """An untrained pocket CLIP: `open_clip`'s `CLIP`; its words are MojiWorld's (see WordTokenizer)."""
    import open_clip

    tokenizer = WordTokenizer()
    image = open_clip.CLIPVisionCfg(
        layers=config.depth, width=config.width, head_width=config.width // config.heads, patch_size=config.patch_size,
        image_size=config.image_size,
    )  # fmt: skip
    text = open_clip.CLIPTextCfg(
        context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size, width=config.text_width,
        heads=config.text_width // 32, layers=config.text_layers,
    )  # fmt: skip
    model = open_clip.CLIP(embed_dim=config.dim, vision_cfg=image, text_cfg=text)
    model.visual.conv1 = ConvStem(config.width, config.patch_size)
    # a caption's order says nothing; with places the end token knows its length, which was learned before any word
    model.positional_embedding.data.zero_()
    model.positional_embedding.requires_grad_(False)
    return model


def build_dinov2(config: ZooConfig = DEFAULT) -> Any:
    """An untrained pocket DINOv2: `transformers`' `Dinov2Model`."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = Dinov2Config(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        image_size=config.image_size, patch_size=config.patch_size, layerscale_value=1.0,
    )  # fmt: skip
    model = Dinov2Model(sizes)
    model.embeddings.patch_embeddings.projection = ConvStem(config.width, config.patch_size)
    return model


def build_mae(config: ZooConfig = DEFAULT) -> Any:
    """An untrained pocket MAE: `transformers`' `ViTMAEForPreTraining` with a light decoder of half the width."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = ViTMAEConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=4 * config.width, image_size=config.image_size, patch_size=config.patch_size,
        decoder_hidden_size=config.width // 2, decoder_num_hidden_layers=2, decoder_num_attention_heads=config.heads,
        decoder_intermediate_size=2 * config.width,
    )  # fmt: skip
    model = ViTMAEForPreTraining(sizes)
    model.vit.embeddings.patch_embeddings.projection = ConvStem(config.width, config.patch_size)
    # transformers 5 leaves all positions at zero here: such a MAE learns a picture's mean colour and no more
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(config.grid**2)
    return model


BUILDERS = {
    "mae": build_mae, "sam": build_sam, "sam2": build_sam2, "clip": build_clip, "dinov2": build_dinov2,
    "supervised": build_dinov2, "random": build_sam,
}  # fmt: skip
NAMES = tuple(BUILDERS)[:-1]  # of the trained ones


# -------------------------------------------------------------------------------------------------------- weights


def build(name: str, config: ZooConfig = DEFAULT, seed: int = 0) -> nn.Module:
    """An untrained model of the zoo, its initialisation seeded, in evaluation mode."""
    if name not in BUILDERS:
        raise StudyError(f"no pocket model is called {name!r}: choose from {', '.join(BUILDERS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILDERS[name](config).eval()


def load(name: str, folder: Path = ASSETS) -> nn.Module:
    """The trained model of that name, float32, in evaluation mode, verified against the hash in its card.

    Args:
        name: of `NAMES`.
        folder: of its file and card.

    Returns:
        A model of the package that the architecture is of.

    Raises:
        StudyError: no such model; its file or card is missing, damaged or of another architecture.
    """
    model, path = build(name), folder / f"{name}.safetensors"
    if not path.is_file():
        raise StudyError(
            f"{path} is missing: restore it with git checkout, or train it with python -m samantics train {name}"
        )
    found, expected = cache.hash_file(path), card(name, folder)["sha256"]
    if found != expected:
        raise StudyError(
            f"{path} is damaged (SHA-256 {found[:12]}, its card says {expected[:12]}): restore it with git checkout"
        )
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{path} does not fit the pocket {name} ({reason}): restore it with git checkout") from error
    return model


def card(name: str, folder: Path = ASSETS) -> dict[str, Any]:
    """What is known of a trained model: data, images seen, seconds, machine, losses, measurements, licence."""
    path = folder / f"{name}.json"
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(content.get("sha256"), str):
            raise ValueError("no hash of the weights")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StudyError(f"{path} is missing or damaged: restore it with git checkout") from error


# ---------------------------------------------------------------------------------------------------------- words

STOP_WORDS = {"a", "an", "the", "of", "and", "with", "beside", "picture", "here", "is", "one", "sees", "this", "shows"}


class WordTokenizer:
    """Words of MojiWorld's captions as token ids; the end token is the highest, as `open_clip`'s pooling expects.

    Words that any caption may have are left out: they thin out the words that tell captions apart.
    """

    context_length = 48  # six objects of the longest names

    def __init__(self) -> None:
        words = [word for word in captions.caption_words() if word not in STOP_WORDS]
        self.ids = {word: number for number, word in enumerate(words, start=2)}  # 0 pads, 1 begins
        self.end = len(self.ids) + 2
        self.vocab_size = self.end + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`(B, context_length)` int64 ids; StudyError where a word is not MojiWorld's or there are too many."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = [word for word in captions.split_words(text) if word not in STOP_WORDS]
            unknown = next((word for word in words if word not in self.ids), None)
            if unknown:
                raise StudyError(f"the pocket CLIP does not know the word {unknown!r} in {text!r}: use MojiWorld's")
            if len(words) > self.context_length - 2:
                most = self.context_length - 2
                raise StudyError(f"the caption {text[:40]!r}... has {len(words)} words: {most} is the limit")
            row[: len(words) + 2] = torch.tensor([1, *(self.ids[word] for word in words), self.end])
        return tokens
