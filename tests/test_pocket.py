"""The pocket zoo: equal capacity, the packages' own classes, and weights that are checked before they are used."""

from __future__ import annotations

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base
from segment_anything.modeling import Sam
from transformers import Dinov2Model, ViTMAEForPreTraining

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.models.encoder import load_encoder
from samantics.mojiworld import catalogue
from samantics.mojiworld.world import World

KINDS = [ViTMAEForPreTraining, Sam, SAM2Base, open_clip.CLIP, Dinov2Model, Dinov2Model]


def test_models_are_the_packages_own_with_image_encoders_of_equal_capacity() -> None:
    models = {name: pocket.build(name) for name in pocket.NAMES}
    assert [type(model) for model in models.values()] == KINDS
    encoders = [models["sam"].image_encoder, models["sam2"].image_encoder, models["clip"].visual]
    encoders += [models["mae"].vit, models["dinov2"], models["supervised"]]
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in encoders]
    assert min(sizes) >= 1.8e6 and max(sizes) <= 4e6 and max(sizes) / min(sizes) < 1.2


@pytest.mark.parametrize("name", [*pocket.NAMES, "random"])
def test_every_encoder_has_a_map_of_the_same_tokens_and_vectors_of_the_same_width(name: str) -> None:
    encoder, side = load_encoder(name, "zoo_random"), pocket.DEFAULT.image_size
    pixels = torch.zeros(1, 3, side, side)
    final = encoder.encode(pixels)["final"].dense
    assert final.shape == (1, pocket.DEFAULT.dim, pocket.DEFAULT.grid, pocket.DEFAULT.grid)
    assert encoder.pooled(pixels, [encoder.headline])[encoder.headline].shape == (1, pocket.DEFAULT.dim)


def test_mae_knows_where_every_square_lies() -> None:
    mae = pocket.build("mae")
    for table in (mae.vit.embeddings.position_embeddings[0, 1:], mae.decoder.decoder_pos_embed[0, 1:]):
        nearest = torch.cdist(table, table).fill_diagonal_(torch.inf).argmin(1)
        rows, columns = torch.arange(len(table)) // pocket.DEFAULT.grid, torch.arange(len(table)) % pocket.DEFAULT.grid
        away = (rows - rows[nearest]).abs() + (columns - columns[nearest]).abs()
        assert (away == 1).all()  # the most similar position is next to it


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = pocket.build("dinov2", seed=3).state_dict()
    torch.manual_seed(2)
    again, other = pocket.build("dinov2", seed=3).state_dict(), pocket.build("dinov2", seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)  # the same draws, nothing is summed
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", pocket.NAMES)
def test_shipped_weights_load_and_agree_with_their_card(name: str) -> None:
    model, card = pocket.load(name), pocket.card(name)
    assert pocket.verify(name) == card["sha256"]
    assert sum(p.numel() for p in model.parameters()) <= card["parameters"] * 1.001
    assert card["world"]["hash"] == World(**{k: v for k, v in card["world"].items() if k != "hash"}).hash
    assert {"recipe", "seconds", "machine", "licence"} <= card.keys()


def test_damaged_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"clip\.safetensors is missing"):
        pocket.load("clip", tmp_path)
    for name in ("clip", "sam"):
        for ending in ("json", "safetensors"):
            shutil.copy(pocket.ASSETS / f"clip.{ending}", tmp_path / f"{name}.{ending}")
    with pytest.raises(StudyError, match="does not fit the pocket sam"):
        pocket.load("sam", tmp_path)
    whole = (tmp_path / "clip.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StudyError, match=r"clip\.safetensors is damaged .* git checkout"):
        pocket.load("clip", tmp_path)
    with pytest.raises(StudyError, match="no pocket model is called 'sam9': choose from mae, sam"):
        pocket.build("sam9")


def test_tokenizer_knows_every_word_of_the_world_and_no_other() -> None:
    tokenizer = pocket.WordTokenizer()
    for names in (catalogue.classes(), catalogue.superclasses()):
        tokens = tokenizer(names)
        assert tokens.shape == (len(names), tokenizer.context_length)
        assert len({tuple(row.tolist()) for row in tokens}) == len(names)
        # the end token is the highest: open_clip pools there
        assert (tokens.argmax(1) == (tokens != 0).sum(1) - 1).all()
    with pytest.raises(StudyError, match="does not know the word 'quark'"):
        tokenizer(["a picture of quark"])
    with pytest.raises(StudyError, match="46 is the limit"):
        tokenizer(["owl " * 47])
