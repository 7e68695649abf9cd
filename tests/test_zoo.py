"""The pocket zoo: equal capacity, the packages' own classes, and weights that are checked before they are used."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from sam2.modeling.sam2_base import SAM2Base
from segment_anything.modeling import Sam
from transformers import Dinov2Model

from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket

ENCODERS = {"sam": lambda m: m.image_encoder, "sam2": lambda m: m.image_encoder, "clip": lambda m: m.visual}


def test_image_encoders_have_equal_capacity() -> None:
    sizes = []
    for name in pocket.NAMES:
        encoder = ENCODERS.get(name, lambda model: model)(pocket.build(name))
        sizes.append(sum(p.numel() for p in encoder.parameters()))
    assert min(sizes) >= 2e6 and max(sizes) <= 4e6
    assert max(sizes) / min(sizes) < 1.2


def test_models_are_the_packages_own() -> None:
    kinds = {"sam": Sam, "sam2": SAM2Base, "clip": open_clip.CLIP, "dinov2": Dinov2Model}
    assert all(isinstance(pocket.build(name), kind) for name, kind in kinds.items())


def test_initialisation_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = pocket.build("dinov2", seed=3).state_dict()
    torch.manual_seed(2)
    again, other = pocket.build("dinov2", seed=3).state_dict(), pocket.build("dinov2", seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", pocket.NAMES)
def test_shipped_weights_load_and_agree_with_their_card(name: str) -> None:
    model, card = pocket.load(name), pocket.card(name)
    assert pocket.verify(name) == card["sha256"]
    assert sum(p.numel() for p in model.parameters()) <= card["parameters"] * 1.001
    assert card["world"]["hash"] == mojiworld.World(**{k: v for k, v in card["world"].items() if k != "hash"}).hash
    assert {"recipe", "seconds", "machine", "licence"} <= card.keys()


def test_all_models_of_the_zoo_saw_equal_images() -> None:
    recipes = [pocket.card(name)["recipe"] for name in pocket.NAMES]
    assert all(recipe == recipes[0] for recipe in recipes)


def _copy_of_clip(folder):
    for ending in ("json", "safetensors"):
        (folder / f"clip.{ending}").write_bytes((pocket.ASSETS / f"clip.{ending}").read_bytes())
    return folder / "clip.safetensors"


def test_a_damaged_file_is_refused(tmp_path) -> None:
    path = _copy_of_clip(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"clip\.safetensors is damaged .* git checkout"):
        pocket.load("clip", tmp_path)


def test_a_missing_file_or_card_is_refused(tmp_path) -> None:
    with pytest.raises(StudyError, match=r"clip\.safetensors is missing"):
        pocket.load("clip", tmp_path)
    _copy_of_clip(tmp_path)
    (tmp_path / "clip.json").write_text("{")
    with pytest.raises(StudyError, match=r"clip\.json is missing or damaged"):
        pocket.load("clip", tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path) -> None:
    (tmp_path / "sam.safetensors").write_bytes((pocket.ASSETS / "clip.safetensors").read_bytes())
    (tmp_path / "sam.json").write_text(json.dumps({"sha256": pocket.card("clip")["sha256"]}))
    with pytest.raises(StudyError, match="does not fit the pocket sam"):
        pocket.load("sam", tmp_path)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(StudyError, match="no pocket model is called 'sam9': choose from sam"):
        pocket.build("sam9")


def test_tokenizer_knows_every_word_of_the_world_and_no_other() -> None:
    tokenizer = pocket.WordTokenizer()
    for names in (
        list(mojiworld.catalogue()["drawing"]),
        pocket.category_prompts(),
    ):  # a bird is a drawing of a bird, too
        tokens = tokenizer(names)
        assert tokens.shape == (len(names), tokenizer.context_length)
        assert len({tuple(row.tolist()) for row in tokens}) == len(set(names))
        # the end token is the highest: open_clip pools there
        assert (tokens.argmax(1) == (tokens != 0).sum(1) - 1).all()
    with pytest.raises(StudyError, match="does not know the word 'quark'"):
        tokenizer(["a picture of quark"])
    with pytest.raises(StudyError, match="46 is the limit"):
        tokenizer(["bird " * 47])
