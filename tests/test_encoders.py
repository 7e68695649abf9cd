"""Encoders against their packages' own forward and preprocessing, on the same random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sam2.utils.transforms import SAM2Transforms
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision import transforms
from transformers import (
    BitImageProcessorPil,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    HieraConfig,
    HieraModel,
    Sam3VisionConfig,
    Sam3VisionModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from samantics.data.folders import open_image
from samantics.errors import StudyError
from samantics.models import architectures, pocket
from samantics.models.architectures import Architecture
from samantics.models.encoder import Encoder, load_encoder, masked_mean
from samantics.models.official import OFFICIAL
from samantics.models.preprocessing import OPENAI, Preprocessing

torch.set_num_threads(1)
POCKET = ("sam", "sam2", "clip", "dinov2")


@pytest.fixture(scope="module")
def models() -> dict[str, Encoder]:
    return {name: load_encoder(name, "zoo_random") for name in POCKET}


def pixels(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def close(ours: Tensor | None, theirs: Tensor) -> bool:
    return ours is not None and ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-5


# ---------------------------------------------------------------------------------------------- parity of forward


@torch.no_grad()
def test_sam_equals_segment_anything(models: dict[str, Encoder]) -> None:
    encoder, x = models["sam"], pixels(pocket.DEFAULT.image_size)
    outputs = encoder.encode(x, encoder.layers)
    trunk = encoder.model.image_encoder
    assert close(outputs["final"].dense, trunk(x))
    tokens = trunk.patch_embed(x) + trunk.pos_embed
    for name, block in zip(encoder.layers, trunk.blocks, strict=False):
        tokens = block(tokens)
        assert close(outputs[name].dense, tokens.permute(0, 3, 1, 2)), name


@torch.no_grad()
def test_sam2_equals_sam2(models: dict[str, Encoder]) -> None:
    encoder, x = models["sam2"], pixels(pocket.DEFAULT.image_size)
    outputs = encoder.encode(x, encoder.layers)
    assert close(outputs["final"].dense, encoder.model.forward_image(x)["vision_features"])
    trunk = encoder.model.image_encoder.trunk
    for end, stage in zip(trunk.stage_ends, trunk(x), strict=True):
        assert close(outputs[f"block_{end + 1:02d}"].dense, stage)


@torch.no_grad()
def test_clip_equals_open_clip(models: dict[str, Encoder]) -> None:
    encoder, x = models["clip"], pixels(pocket.DEFAULT.image_size)
    outputs = encoder.encode(x, encoder.layers)
    assert close(outputs["final"].cls, encoder.model.encode_image(x))
    theirs = encoder.model.visual.forward_intermediates(x, output_extra_tokens=True)
    for number, dense in enumerate(theirs["image_intermediates"]):
        assert close(outputs[f"block_{number + 1:02d}"].dense, dense)
        assert close(outputs[f"block_{number + 1:02d}"].cls, theirs["image_intermediates_prefix"][number][:, 0])
    before = outputs["before_projection"]
    assert before.cls is not None
    assert close(outputs["final"].cls, before.cls @ encoder.model.visual.proj)


@torch.no_grad()
def test_dinov2_equals_transformers(models: dict[str, Encoder]) -> None:
    encoder, x = models["dinov2"], pixels(pocket.DEFAULT.image_size)
    outputs = encoder.encode(x, encoder.layers)
    theirs = encoder.model(x, output_hidden_states=True)
    assert close(outputs["final"].cls, theirs.pooler_output)
    assert close(outputs["final"].dense.flatten(2).transpose(1, 2), theirs.last_hidden_state[:, 1:])
    for name, hidden in zip(encoder.layers, theirs.hidden_states[1:], strict=False):
        assert close(outputs[name].dense.flatten(2).transpose(1, 2), hidden[:, 1:]), name


def small(architecture: Architecture, model: Any, size: int) -> Encoder:
    layers = tuple(f"block_{n:02d}" for n in range(1, len(architecture.blocks(model)) + 1)) + architecture.after
    preprocess = Preprocessing(size, "squash")
    return Encoder(
        "small", "0", layers, architecture.headline, model.eval(), preprocess, architecture, torch.device("cpu")
    )


@torch.no_grad()
def test_mae_sees_every_patch_in_its_place() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTMAEModel(ViTMAEConfig(**sizes, image_size=64, patch_size=16, mask_ratio=0.0))
    encoder = small(architectures.MAE, model, 64)
    outputs = encoder.encode(pixels(64), encoder.layers)
    theirs = model(pixels(64))  # in a random order of the patches
    order = theirs.ids_restore[:, :, None].expand(-1, -1, 32)
    hidden = theirs.last_hidden_state
    assert close(outputs["final"].cls, hidden[:, 0])
    assert close(outputs["final"].dense.flatten(2).transpose(1, 2), hidden[:, 1:].gather(1, order))


@torch.no_grad()
def test_hiera_blocks_are_in_spatial_order() -> None:
    config = HieraConfig(
        embed_dim=8, image_size=(64, 64), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), masked_unit_size=(8, 8)
    )
    model = HieraModel(config, add_pooling_layer=False)
    encoder = small(architectures.HIERA, model, 64)
    outputs = encoder.encode(pixels(64), encoder.layers)
    stages = model.eval()(pixels(64), output_hidden_states=True).reshaped_hidden_states[1:]
    for block, stage in zip(("block_01", "block_02", "block_04", "block_05"), stages, strict=True):
        assert close(outputs[block].dense, stage.permute(0, 3, 1, 2)), block
    assert close(outputs["final"].dense, outputs["block_05"].dense)


@torch.no_grad()
def test_dinov3_leaves_its_registers_out() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=64, num_register_tokens=4))
    encoder = small(architectures.DINOV3, model, 64)
    outputs = encoder.encode(pixels(64), encoder.layers)
    theirs = model.eval()(pixels(64))
    assert close(outputs["final"].cls, theirs.pooler_output)
    assert close(outputs["final"].dense.flatten(2).transpose(1, 2), theirs.last_hidden_state[:, 5:])
    assert close(outputs["block_02"].dense, raw_tokens(model.model, pixels(64), model, 5))


def raw_tokens(module: Any, x: Tensor, model: Any, prefix: int) -> Tensor:
    """What the last trunk block hands on, before the model's last norm."""
    kept: list[Any] = []
    handle = module.register_forward_hook(lambda _m, _i, output: kept.append(output.last_hidden_state))
    model(x)
    handle.remove()
    return kept[0][:, prefix:].transpose(1, 2).unflatten(2, (4, 4))


@torch.no_grad()
def test_siglip2_pools_by_attention() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64))
    encoder = small(architectures.SIGLIP2, model, 64)
    outputs = encoder.encode(pixels(64), encoder.layers)
    theirs = model.eval()(pixels(64))
    assert close(outputs["final"].cls, theirs.pooler_output)
    assert close(outputs["final"].dense.flatten(2).transpose(1, 2), theirs.last_hidden_state)
    with pytest.raises(StudyError, match="no class token"):
        encoder.pooled(pixels(64), [("block_01", "cls")])


@torch.no_grad()
def test_sam3_takes_the_neck_at_the_trunks_resolution() -> None:
    trunk: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    trunk |= {"image_size": 56, "pretrain_image_size": 56, "window_size": 2, "global_attn_indexes": [1]}
    model = Sam3VisionModel(Sam3VisionConfig(backbone_config={**trunk, "model_type": "sam3_vit_model"}))
    encoder = small(architectures.SAM3, model, 56)
    outputs = encoder.encode(pixels(56), encoder.layers)
    theirs = model.eval()(pixels(56))
    assert close(outputs["final"].dense, theirs.fpn_hidden_states[2])
    assert outputs["final"].dense.shape == (2, 256, 4, 4)
    assert close(outputs["block_02"].dense.flatten(2).transpose(1, 2), theirs.last_hidden_state)


@pytest.mark.skipif("SAMANTICS_SLOW" not in os.environ, reason="full-size models: set SAMANTICS_SLOW=1")
@pytest.mark.parametrize("name", OFFICIAL)
def test_full_size_models_run(name: str) -> None:
    encoder = load_encoder(name, "random")
    outputs = encoder.encode(pixels(encoder.image_size, 1), encoder.layers)
    widths = {"sam": 256, "sam2": 256, "clip": 512, "dinov2": 384, "mae": 768, "hiera": 768, "sam3": 256, "dinov3": 384}
    assert outputs["final"].dense.shape[1] == widths.get(name, 768)


# ----------------------------------------------------------------------------------------- parity of preprocessing


def evaluation(image: Image.Image) -> Tensor:
    """As DINOv2's, MAE's and Hiera's own evaluation code has it, in torchvision's words."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(pocket.MEAN, pocket.STD)])(image)


def test_dinov2s_processor_in_transformers_agrees() -> None:
    """Where the margin is even: an odd one it cuts a pixel further left than torchvision and DINOv2's own code do."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8))
    size, crop = {"shortest_edge": 256}, {"height": 224, "width": 224}
    processor = BitImageProcessorPil(
        size=size, crop_size=crop, image_mean=list(pocket.MEAN), image_std=list(pocket.STD)
    )
    assert close(OFFICIAL["dinov2"].own(picture), processor(picture, return_tensors="pt").pixel_values[0])


def sam_input(image: Image.Image) -> Tensor:
    sam = pocket.build_sam()  # its statistics are the official ones; only its size is ours
    sam.image_encoder.img_size = 1024
    resized = ResizeLongestSide(1024).apply_image(np.asarray(image))
    return sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float())


def siglip(image: Image.Image) -> Tensor:
    return SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=2)(
        image, return_tensors="pt"
    ).pixel_values[0]


UPSTREAM: dict[str, Callable[[Image.Image], Tensor]] = {
    "sam": sam_input,
    "sam2": lambda image: SAM2Transforms(1024, 0.0)(image),
    "clip": open_clip.image_transform(224, is_train=False, mean=OPENAI[0], std=OPENAI[1]),
    "dinov2": evaluation,
    "hiera": evaluation,
    "dinov3": lambda image: DINOv3ViTImageProcessor()(image, return_tensors="pt").pixel_values[0],
    "siglip2": siglip,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Image.Image]]:
    """Odd files, each with the RGB picture that it should be."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)).resize((301, 227))
    exif = Image.Exif()
    exif[0x0112] = 8
    wanted: dict[str, tuple[Image.Image, Image.Image, dict[str, Any]]] = {
        "odd.png": (picture, picture, {}),
        "tall.png": (picture.resize((131, 517)), picture.resize((131, 517)), {}),
        "grey.png": (picture.convert("L"), picture.convert("L").convert("RGB"), {}),
        "rgba.png": (picture.convert("RGBA"), picture, {}),
        "cmyk.tif": (picture.convert("CMYK"), picture.convert("CMYK").convert("RGB"), {}),
        "exif.png": (picture.transpose(Image.Transpose.ROTATE_270), picture, {"exif": exif}),
    }
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    wanted["deep.png"] = (Image.fromarray(deep), picture.convert("L").convert("RGB"), {})
    for name, (stored, _, options) in wanted.items():
        stored.save(folder / name, **options)
    return {name: (folder / name, expected) for name, (_, expected, _) in wanted.items()}


@pytest.mark.parametrize("name", UPSTREAM)
def test_preprocessing_equals_the_packages(name: str, files: dict[str, tuple[Path, Image.Image]]) -> None:
    for path, expected in files.values():
        assert close(OFFICIAL[name].own(open_image(path)), UPSTREAM[name](expected)), path.name


def test_the_papers_preprocessing() -> None:
    for name in ("sam", "sam2"):
        assert (OFFICIAL[name].paper.size, OFFICIAL[name].paper.fit) == (1024, "squash")
    for name in ("clip", "dinov2"):
        assert (OFFICIAL[name].paper.size, OFFICIAL[name].paper.fit) == (224, "crop")
    assert {OFFICIAL[name].paper.mean for name in POCKET} == {pocket.MEAN}


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (61, 37)])
def test_geometry_follows_a_pixel(fit: Any, shape: tuple[int, int]) -> None:
    """A bright spot is found in the input where the geometry says."""
    width, height = shape
    image = np.zeros((height, width, 3), np.uint8)
    spot = np.array([25, 22])
    image[spot[1] - 1 : spot[1] + 2, spot[0] - 1 : spot[0] + 2] = 255
    preprocess = Preprocessing(96, fit, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    geometry = preprocess.geometry(width, height)
    heat = preprocess(Image.fromarray(image))[0].numpy().astype(np.float64)
    centre = np.array([(heat.sum(axis) * (np.arange(96) + 0.5)).sum() for axis in (0, 1)]) / heat.sum()
    predicted = geometry.to_tokens(spot + 0.5, 96)
    assert np.abs(predicted - centre).max() < 0.6
    assert np.allclose(geometry.to_pixels(geometry.to_tokens(spot, 12), 12), spot)
    left, top, right, bottom = geometry.seen
    assert (right - left) * (bottom - top) == (96 * 96 if fit != "pad" else round(96 * min(shape) / max(shape)) * 96)


def test_a_needle_of_an_image_is_refused() -> None:
    with pytest.raises(StudyError, match="too narrow"):
        Preprocessing(96, "pad")(Image.new("RGB", (2000, 1)))


# ---------------------------------------------------------------------------------------------------- the contract


def test_headline_rows_and_layers(models: dict[str, Encoder]) -> None:
    assert {name: models[name].headline for name in POCKET} == {
        "sam": ("final", "mean"),
        "sam2": ("final", "mean"),
        "clip": ("final", "cls"),
        "dinov2": ("final", "cls"),
    }
    for encoder in models.values():
        assert encoder.layers[0] == "block_01"
        assert encoder.layers[-1] == "final"
        assert encoder.inputs([Image.new("RGB", (50, 30))]).shape == (1, 3, encoder.image_size, encoder.image_size)
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_pooled_vectors(models: dict[str, Encoder]) -> None:
    encoder, x = models["clip"], pixels(pocket.DEFAULT.image_size)
    outputs = encoder.encode(x, ["block_03", "final"])
    grid = pocket.DEFAULT.grid
    mask = torch.zeros(2, grid, grid)
    mask[0, 2:4, 5:9] = 1
    mask[1, -1, -1] = 1
    pooled = encoder.pooled(x, [("block_03", "mean"), ("block_03", "object"), ("final", "cls")], masks=mask)
    assert close(pooled["block_03", "mean"], outputs["block_03"].dense.mean((2, 3)))
    assert close(pooled["block_03", "object"][0], outputs["block_03"].dense[0, :, 2:4, 5:9].mean((1, 2)))
    assert close(pooled["block_03", "object"][1], outputs["block_03"].dense[1, :, -1, -1])
    cls = outputs["final"].cls
    assert cls is not None
    assert close(pooled["final", "cls"], cls)


def test_a_mask_in_pixels_weighs_tokens_by_coverage() -> None:
    dense = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, :8, :8] = True  # the first token whole
    mask[0, :8, 8:10] = True  # a quarter of the second
    assert masked_mean(dense, mask).item() == pytest.approx((0 * 1 + 1 * 0.25) / 1.25)
    mask = torch.zeros(1, 2, 2)
    mask[0, 1, 1] = 1  # coarser than the tokens
    assert masked_mean(dense, mask).item() == pytest.approx((10 + 11 + 14 + 15) / 4)


def test_refusals(models: dict[str, Encoder]) -> None:
    x = pixels(pocket.DEFAULT.image_size)
    with pytest.raises(StudyError, match="no layer 'block_99'"):
        models["sam"].encode(x, ["block_99"])
    with pytest.raises(StudyError, match="no class token"):
        models["sam"].pooled(x, [("final", "cls")])
    with pytest.raises(StudyError, match="needs masks"):
        models["sam"].pooled(x, [("final", "object")])
    with pytest.raises(StudyError, match="empty"):
        models["sam"].pooled(x, [("final", "object")], masks=torch.zeros(2, 12, 12))
    with pytest.raises(StudyError, match="choose from sam, sam2, clip, dinov2, random"):
        load_encoder("resnet", "zoo_random")
    with pytest.raises(StudyError, match="no official encoder"):
        load_encoder("resnet", "official")
    with pytest.raises(StudyError, match="leave image_size out"):
        load_encoder("sam", "zoo_random", image_size=256)


def test_dinov2_takes_another_size() -> None:
    size = pocket.DEFAULT.image_size * 2
    encoder = load_encoder("dinov2", "zoo_random", image_size=size)
    dense = encoder.encode(encoder.inputs([Image.new("RGB", (50, 30))]))["final"].dense
    assert dense.shape[2:] == (2 * pocket.DEFAULT.grid, 2 * pocket.DEFAULT.grid)


def test_weights_hash_tells_seeds_apart() -> None:
    first, again, other = (load_encoder("random", "zoo_random", seed=seed) for seed in (0, 0, 1))
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert first.key == again.key != other.key


def test_half_precision_is_close(models: dict[str, Encoder]) -> None:
    x = pixels(pocket.DEFAULT.image_size)
    for name in POCKET:
        half = load_encoder(name, "zoo_random", half=True)
        whole = models[name].pooled(x, [models[name].headline])[models[name].headline]
        rough = half.pooled(x, [half.headline])[half.headline]
        assert rough.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(whole, rough).min() > 0.99
        assert half.key != models[name].key
