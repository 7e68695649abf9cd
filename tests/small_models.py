"""Each official model in small, as its file holds it: what is saved, how, and the encoder in it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from samantics.models import pocket

TRUNK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DINOV2 = hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16)
DINOV3 = hf.DINOv3ViTConfig(**TRUNK, image_size=64, num_register_tokens=4)
MAE = hf.ViTMAEConfig(
    **TRUNK, image_size=64, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=16,
)  # fmt: skip
HIERA = hf.HieraConfig(
    embed_dim=8, image_size=(64, 64), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), decoder_hidden_size=16,
    decoder_depth=1, decoder_num_heads=2,
)  # fmt: skip
SAM3 = hf.Sam3VisionConfig(
    backbone_config={
        **TRUNK, "image_size": 56, "pretrain_image_size": 56, "window_size": 2, "global_attn_indexes": [1],
        "model_type": "sam3_vit_model",
    }
)  # fmt: skip
SIGLIP = hf.SiglipConfig(
    vision_config={**TRUNK, "image_size": 64}, text_config={**TRUNK, "vocab_size": 50, "projection_size": 32}
)


def safetensors(model: Any, path: Path) -> None:
    """As the hub holds it: safetensors under the names of old."""
    model.save_pretrained(path.parent / "model")
    (path.parent / "model" / "model.safetensors").rename(path)


def prefixed(model: nn.Module, path: Path) -> None:
    """As SAM 3 has it: in a checkpoint that may hold more."""
    save_file({"detector_model.vision_encoder." + key: value for key, value in model.state_dict().items()}, path)


def torchscript(model: Any, path: Path) -> None:
    """As OpenAI has it: TorchScript in 16 bits with three sizes among the tensors."""
    model.half().register_buffer("input_resolution", torch.tensor(224))
    model.forward, model.attn_mask = (lambda x: x), None
    torch.jit.save(torch.jit.trace(model, torch.zeros(1)), path)


def hiera_encoder(whole: Any) -> nn.Module:
    """The encoder without the masking of pretraining."""
    model = hf.HieraModel(HIERA, add_pooling_layer=False).eval()
    model.load_state_dict(whole.hiera.state_dict())
    return model


@dataclasses.dataclass(frozen=True)
class Small:
    """A small model: what is saved, how, its input's side, the encoder in the whole."""

    whole: Callable[[], nn.Module]
    save: Callable[[Any, Path], None] = safetensors
    size: int = 64
    encoder: Callable[[Any], nn.Module] = lambda whole: whole

    def empty(self) -> nn.Module:
        """An encoder to fill."""
        return self.encoder(self.whole())


SIDE = pocket.DEFAULT.image_size
SMALL: dict[str, Small] = {
    "sam": Small(pocket.build_sam, lambda model, path: torch.save(model.state_dict(), path), SIDE),
    "sam2": Small(pocket.build_sam2, lambda model, path: torch.save({"model": model.state_dict()}, path), SIDE),
    "clip": Small(pocket.build_clip, torchscript, SIDE, encoder=lambda whole: whole.float()),
    "dinov2": Small(lambda: hf.Dinov2Model(DINOV2)),
    "mae": Small(lambda: hf.ViTMAEForPreTraining(MAE), encoder=lambda whole: whole.vit),
    "hiera": Small(lambda: hf.HieraForPreTraining(HIERA), encoder=hiera_encoder),
    "sam3": Small(lambda: hf.Sam3VisionModel(SAM3), prefixed, 56),
    "dinov3": Small(lambda: hf.DINOv3ViTModel(DINOV3)),
    "siglip2": Small(lambda: hf.SiglipModel(SIGLIP), encoder=lambda whole: whole.vision_model),
}
