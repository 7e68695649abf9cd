"""Encoders against their packages' own forward and preprocessing, on the same random weights; the pocket zoo."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sam2.utils.transforms import SAM2Transforms
from segment_anything.modeling.image_encoder import Attention
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision import transforms
from transformers import DINOv3ViTImageProcessor, SiglipImageProcessorPil

from refusals import refused
from samantics.cache import hash_file
from samantics.models import pocket, weights
from samantics.models.encoder import Encoder, load_encoder, masked_mean
from samantics.models.preprocessing import MEAN, OPENAI, STD, Preprocessing
from samantics.models.registry import ENCODERS, fuse_attention, fused_attention
from samantics.models.weights import OFFICIAL
from samantics.mojiworld import catalogue
from samantics.mojiworld.world import World
from small_models import SMALL

SIDE, GRID, DIM = pocket.DEFAULT.image_size, pocket.DEFAULT.grid, pocket.DEFAULT.dim


@pytest.fixture(scope="module")
def models() -> dict[str, Encoder]:
    return {name: load_encoder(name, "zoo_random") for name in (*pocket.NAMES, "random")}


def pixels(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def close(ours: Tensor | None, theirs: Tensor) -> bool:
    return ours is not None and ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= 1e-5


# ---------------------------------------------------------------------------------------------- parity of forward

Expected = dict[str, Tensor]  # maps by layer; class tokens by "cls" and layer


def maps(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def sam(model: Any, x: Tensor) -> Expected:
    trunk, found = model.image_encoder, {"final": model.image_encoder(x)}
    hidden = trunk.patch_embed(x) + trunk.pos_embed
    for number, block in enumerate(trunk.blocks, 1):
        hidden = block(hidden)
        found[f"block_{number:02d}"] = hidden.permute(0, 3, 1, 2)
    return found


def sam2(model: Any, x: Tensor) -> Expected:
    trunk = model.image_encoder.trunk
    stages = {f"block_{end + 1:02d}": stage for end, stage in zip(trunk.stage_ends, trunk(x), strict=True)}
    return stages | {"final": model.forward_image(x)["vision_features"]}


def clip(model: Any, x: Tensor) -> Expected:
    theirs = model.visual.forward_intermediates(x, output_extra_tokens=True)
    found = {f"block_{n:02d}": dense for n, dense in enumerate(theirs["image_intermediates"], 1)}
    found |= {f"cls block_{n:02d}": t[:, 0] for n, t in enumerate(theirs["image_intermediates_prefix"], 1)}
    return found | {"cls final": model.encode_image(x)}


def dinov2(model: Any, x: Tensor) -> Expected:
    theirs = model(x, output_hidden_states=True)
    found = {f"block_{n:02d}": maps(hidden[:, 1:]) for n, hidden in enumerate(theirs.hidden_states) if n}
    return found | {"final": maps(theirs.last_hidden_state[:, 1:]), "cls final": theirs.pooler_output}


def mae(model: Any, x: Tensor) -> Expected:
    theirs = model(x)  # in a random order of the patches
    order = theirs.ids_restore[:, :, None].expand(-1, -1, theirs.last_hidden_state.shape[2])
    tokens = theirs.last_hidden_state[:, 1:].gather(1, order)
    return {"final": maps(tokens), "cls final": theirs.last_hidden_state[:, 0]}


def hiera(model: Any, x: Tensor) -> Expected:
    stages = model(x, output_hidden_states=True).reshaped_hidden_states[1:]
    blocks = zip(("block_01", "block_02", "block_04", "block_05", "final"), (*stages, stages[-1]), strict=True)
    return {name: stage.permute(0, 3, 1, 2) for name, stage in blocks}


def sam3(model: Any, x: Tensor) -> Expected:
    theirs = model(x)
    return {"final": theirs.fpn_hidden_states[2], "block_02": maps(theirs.last_hidden_state)}


def dinov3(model: Any, x: Tensor) -> Expected:
    theirs, trunk = model(x), model.model(model.embeddings(x), model.rope_embeddings(x)).last_hidden_state
    final = theirs.last_hidden_state[:, 5:]  # class token and four registers
    return {"final": maps(final), "cls final": theirs.pooler_output, "block_02": maps(trunk[:, 5:])}


def siglip2(model: Any, x: Tensor) -> Expected:
    theirs = model(x)
    return {"final": maps(theirs.last_hidden_state), "cls final": theirs.pooler_output}


@torch.no_grad()
@pytest.mark.parametrize("package", [sam, sam2, clip, dinov2, mae, hiera, sam3, dinov3, siglip2])
def test_features_are_the_packages_own(package: Any, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the package is saved as its authors have it, and the encoder loads that file."""
    name = package.__name__
    small, file = SMALL[name], OFFICIAL[name].place
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    whole, x = small.whole().eval(), pixels(small.size)
    small.save(whole, file)
    sha256, own = hash_file(file), Preprocessing(small.size, "squash")
    monkeypatch.setattr(weights, "OPENAI_CLIP", sha256)
    monkeypatch.setitem(OFFICIAL, name, dataclasses.replace(OFFICIAL[name], sha256=sha256))
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], build=small.empty, own=own))
    encoder = load_encoder(name, "official")
    outputs = encoder.encode(x, encoder.layers)
    for layer, expected in package(small.encoder(whole), x).items():
        output = outputs[layer.removeprefix("cls ")]
        assert close(output.cls if layer.startswith("cls") else output.dense, expected), layer
    assert all((output.cls is not None) == encoder.has_class_token(layer) for layer, output in outputs.items())
    assert encoder.weights_hash == sha256[:16]
    if name == "clip":
        assert close(outputs["final"].cls, outputs["before_projection"].cls @ whole.visual.proj)


@pytest.mark.parametrize("name", SMALL)
def test_the_wrong_checkpoint_for_the_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SMALL["mae" if name == "dinov2" else "dinov2"]
    other.save(other.whole(), tmp_path / "other.safetensors")
    monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], build=SMALL[name].empty))
    refused(f"not a checkpoint of the official {name}", load_encoder, name, tmp_path / "other.safetensors")


@torch.no_grad()
def test_fused_attention_is_sams_own() -> None:
    torch.manual_seed(0)
    for height, width in ((8, 8), (5, 7)):
        attention = Attention(32, num_heads=2, use_rel_pos=True, input_size=(height, width))
        for table in (attention.rel_pos_h, attention.rel_pos_w):
            torch.nn.init.normal_(table)
        x = torch.randn(3, height, width, 32)
        assert close(fused_attention(attention, x), attention(x))
        with torch.autocast("cpu", torch.bfloat16):
            rough = fused_attention(attention, x).float()
        assert torch.nn.functional.cosine_similarity(rough, attention(x), dim=-1).min() > 0.99
    encoder = load_encoder("sam", "zoo_random")
    before = encoder.encode(pixels(SIDE))["final"].dense
    fuse_attention(encoder.model)
    assert close(encoder.encode(pixels(SIDE))["final"].dense, before)


# ----------------------------------------------------------------------------------------- parity of preprocessing


def evaluation(image: Image.Image) -> Tensor:
    """As DINOv2's, MAE's and Hiera's own evaluation code has it, in torchvision's words."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)


def sam_input(image: Image.Image) -> Tensor:
    sam = pocket.build_sam()  # its statistics are the official ones; only its size is ours
    sam.image_encoder.img_size = 1024
    resized = ResizeLongestSide(1024).apply_image(np.asarray(image))
    return sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float())


def processed(processor: Any) -> Callable[[Image.Image], Tensor]:
    return lambda image: processor(image, return_tensors="pt").pixel_values[0]


UPSTREAM: dict[str, Callable[[Image.Image], Tensor]] = {
    "sam": sam_input,
    "sam2": SAM2Transforms(1024, 0.0),
    "clip": open_clip.image_transform(224, is_train=False, mean=OPENAI[0], std=OPENAI[1]),
    "dinov2": evaluation,
    "dinov3": processed(DINOv3ViTImageProcessor()),
    "siglip2": processed(SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=2)),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_preprocessing_equals_the_packages(name: str) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    for size in ((301, 227), (131, 517), (96, 96)):
        resized = picture.resize(size)
        assert close(ENCODERS[name].own(resized), UPSTREAM[name](resized)), size


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
    predicted = (spot + 0.5) * (geometry.scale_x, geometry.scale_y) + (geometry.left, geometry.top)
    assert np.abs(predicted - centre).max() < 0.6
    left, top, right, bottom = geometry.seen
    assert (right - left) * (bottom - top) == (96 * 96 if fit != "pad" else round(96 * min(shape) / max(shape)) * 96)


# ---------------------------------------------------------------------------------------------------- the contract


def test_pooled_vectors(models: dict[str, Encoder]) -> None:
    encoder, x, mask = models["clip"], pixels(SIDE), torch.zeros(2, GRID, GRID)
    mask[:, 2:4, 5:9] = 1
    outputs = encoder.encode(x, ["block_03", "final"])
    dense, expected = outputs["block_03"].dense, {("final", "cls"): outputs["final"].cls}
    expected |= {("block_03", "mean"): dense.mean((2, 3)), ("block_03", "object"): dense[..., 2:4, 5:9].mean((2, 3))}
    pooled = encoder.pooled(x, list(expected), masks=mask)
    assert all(close(pooled[readout], vectors) for readout, vectors in expected.items())


def test_a_mask_in_pixels_weighs_tokens_by_coverage() -> None:
    dense = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, :8, :10] = True  # the first token whole and a quarter of the second
    assert masked_mean(dense, mask).item() == pytest.approx((0 * 1 + 1 * 0.25) / 1.25)
    mask = torch.zeros(1, 2, 2)
    mask[0, 1, 1] = 1  # coarser than the tokens
    assert masked_mean(dense, mask).item() == pytest.approx((10 + 11 + 14 + 15) / 4)


REFUSALS: list[tuple[str, Callable[[Encoder], object]]] = [
    ("no layer 'block_99'", lambda encoder: encoder.encode(pixels(SIDE), ["block_99"])),
    ("no class token", lambda encoder: encoder.pooled(pixels(SIDE), [("final", "cls")])),
    ("needs masks", lambda encoder: encoder.pooled(pixels(SIDE), [("final", "object")])),
    ("empty", lambda encoder: encoder.pooled(pixels(SIDE), [("final", "object")], masks=torch.zeros(2, 12, 12))),
    ("choose from mae, sam, sam2, clip, dinov2, supervised, random", lambda _: load_encoder("resnet", "zoo_random")),
    ("no official encoder", lambda _: load_encoder("resnet", "official")),
    ("offical is no file: choose zoo, official or random, or give", lambda _: load_encoder("sam", "offical")),
    ("aaa is no file", lambda _: load_encoder("sam", "a" * 300)),
    ("nowhere/sam.pth is no file: .* the path of sam_vit", lambda _: load_encoder("sam", Path("nowhere/sam.pth"))),
    ("too narrow", lambda _: Preprocessing(96, "pad")(Image.new("RGB", (2000, 1)))),
]


@pytest.mark.parametrize(("message", "call"), REFUSALS)
def test_refusals(message: str, call: Callable[[Encoder], object], models: dict[str, Encoder]) -> None:
    refused(message, call, models["sam"])


def test_half_precision_is_close(models: dict[str, Encoder]) -> None:
    for name, whole in models.items():
        half, readout = load_encoder(name, "zoo_random", half=True), whole.headline
        rough, exact = (encoder.pooled(pixels(SIDE), [readout])[readout] for encoder in (half, whole))
        assert rough.dtype == torch.float32 and half.key != whole.key
        assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.99


# --------------------------------------------------------------------------------------------------- the pocket zoo


def test_every_pocket_encoder_is_of_equal_capacity_and_keeps_the_contract(models: dict[str, Encoder]) -> None:
    zoo = [models[name].model for name in pocket.NAMES]
    encoders = [getattr(model, "image_encoder", getattr(model, "visual", model)) for model in zoo]
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in encoders]
    assert min(sizes) >= 1.8e6 and max(sizes) <= 4e6 and max(sizes) / min(sizes) < 1.2
    by_class_token = {name for name, encoder in models.items() if encoder.headline == ("final", "cls")}
    assert by_class_token == {"clip", "dinov2"}
    for encoder in models.values():
        assert (encoder.layers[0], encoder.layers[-1]) == ("block_01", "final")
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
        x = encoder.inputs([Image.new("RGB", (50, 30))])
        assert x.shape == (1, 3, SIDE, SIDE) and encoder.encode(x)["final"].dense.shape == (1, DIM, GRID, GRID)
        (vector,) = encoder.pooled(x, [encoder.headline]).values()
        assert vector.shape == (1, DIM)


def test_initialisation_depends_on_the_seed_alone() -> None:
    found = []
    for state, seed in enumerate((3, 3, 4)):
        torch.manual_seed(state)
        found.append(load_encoder("dinov2", "zoo_random", seed=seed))
    first, again, other = (encoder.key for encoder in found)  # with the hash of its weights
    assert first == again != other


def test_mae_knows_where_every_square_lies() -> None:
    mae = pocket.build("mae")
    for table in (mae.vit.embeddings.position_embeddings[0, 1:], mae.decoder.decoder_pos_embed[0, 1:]):
        nearest = torch.cdist(table, table).fill_diagonal_(torch.inf).argmin(1)
        rows, columns = torch.arange(len(table)) // GRID, torch.arange(len(table)) % GRID
        away = (rows - rows[nearest]).abs() + (columns - columns[nearest]).abs()
        assert (away == 1).all()  # the most similar position is next to it


@pytest.mark.parametrize("name", pocket.NAMES)
def test_shipped_weights_load_and_agree_with_their_card(name: str) -> None:
    model, card = pocket.load(name), pocket.card(name)
    assert sum(p.numel() for p in model.parameters()) <= card["parameters"] * 1.001
    assert card["world"]["hash"] == World(**{k: v for k, v in card["world"].items() if k != "hash"}).hash
    assert {"recipe", "seconds", "machine", "licence"} <= card.keys()


def test_damaged_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    refused(r"clip\.safetensors is missing", pocket.load, "clip", tmp_path)
    for name in ("clip", "sam"):
        for ending in ("json", "safetensors"):
            shutil.copy(pocket.ASSETS / f"clip.{ending}", tmp_path / f"{name}.{ending}")
    refused("does not fit the pocket sam", pocket.load, "sam", tmp_path)
    whole = (tmp_path / "clip.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(r"clip\.safetensors is damaged .* git checkout", pocket.load, "clip", tmp_path)


def test_tokenizer_knows_every_word_of_the_world_and_no_other() -> None:
    tokenizer = pocket.WordTokenizer()
    for names in (catalogue.classes(), catalogue.superclasses()):
        tokens = tokenizer(names)
        assert tokens.shape == (len(names), tokenizer.context_length)
        assert len({tuple(row.tolist()) for row in tokens}) == len(names)
        # the end token is the highest: open_clip pools there
        assert (tokens.argmax(1) == (tokens != 0).sum(1) - 1).all()
    refused("does not know the word 'quark'", tokenizer, ["a picture of quark"])
    refused("46 is the limit", tokenizer, ["owl " * 47])
