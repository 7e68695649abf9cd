"""The in-context model: SAM stays as it is, the parts equal the packages' own, and training is reproducible."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import ImageOps
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch.multiprocessing.spawn import spawn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from samantics.cache import Checkpoint
from samantics.data.coco import CocoDataset, load_coco, read_image, write_coco
from samantics.errors import StudyError
from samantics.incontext.adapters import Adapters, adapted
from samantics.incontext.model import (
    DetrOutput,
    InContextModel,
    build_model,
    matched_loss,
    own_class_only,
    spread_points,
    with_adapters,
)
from samantics.incontext.tokens import (
    Objects,
    SamData,
    SamMaps,
    box_masks,
    box_means,
    live_maps,
    mask_tokens,
    object_arrays,
    object_features,
    read_maps,
    sam_maps,
    stored_maps,
    trunk_blocks,
)
from samantics.incontext.training import (
    AdaptedSampler,
    BatchSampler,
    draw_references,
    split_categories,
    train,
)
from samantics.models import pocket
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, Stream, World
from samantics.scales import POCKET_INCONTEXT, POCKET_NOVEL, VOC

torch.set_num_threads(1)
SIZE, GRID = pocket.DEFAULT.image_size, pocket.DEFAULT.grid
WIDTH, DIM = pocket.DEFAULT.width, pocket.DEFAULT.dim
BOXES = torch.tensor([[10.0, 20.0, 70.0, 80.0], [40.0, 5.0, 90.0, 50.0]])
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, batch=4, epochs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def sam() -> Sam:
    return pocket.build("sam").requires_grad_(False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    stream = Stream("test scenes", "references", ("scene",), "novel")  # few classes, so that each is often shown
    return load_coco(*write_scenes(World(SIZE), stream, 24, tmp_path_factory.mktemp("scenes")))


@pytest.fixture(scope="module")
def wide(scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """One 90 x 54 image, so that SAM's input has padding below."""
    folder = tmp_path_factory.mktemp("wide")
    read_image(scenes, 1).crop((0, 0, 90, 54)).save(folder / "wide.png")
    record = dataclasses.replace(scenes.images[1], file="wide.png", width=90, height=54)
    write_coco(folder / "wide.json", [record], scenes.categories, [])
    return load_coco(folder / "wide.json", folder)


@pytest.fixture(scope="module")
def sampler(sam: Sam, scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> BatchSampler:
    folder = tmp_path_factory.mktemp("maps")
    objects, maps = object_arrays(scenes, SIZE), stored_maps(sam, scenes, TINY.trunk_maps, "random", folder)
    data = SamData(scenes, maps, objects, *object_features(sam, maps, objects, folder / "tokens.npz"))
    # with so few scenes only the common categories have references in several of them
    common = [c for c in scenes.categories if len(np.unique(objects.image[objects.categories == c])) > 2]
    return BatchSampler(data, tuple(common[:-1]), SIZE, TINY)


def untrained(sam: Sam, sampler: BatchSampler, seed: int = 0) -> InContextModel:
    return build_model(sampler.settings, sam, len(sampler.base), seed)


# ------------------------------------------------------------------------------------------------- the frozen SAM


@pytest.mark.parametrize("name", ["scenes", "wide"])
def test_maps_tokens_and_masks_are_the_predictors(name: str, sam: Sam, request: pytest.FixtureRequest) -> None:
    dataset: CocoDataset = request.getfixturevalue(name)
    predictor, record, image = SamPredictor(sam), dataset.images[1], read_image(dataset, 1)
    outputs: list[Any] = []
    keep = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in (sam.image_encoder.blocks[3], sam.mask_decoder.transformer)
    ]
    predictor.set_image(np.asarray(image))
    expected = predictor.predict_torch(None, None, BOXES, multimask_output=False)[0][:, 0].numpy()
    for handle in keep:
        handle.remove()
    assert trunk_blocks(sam, 3) == [1, 3, 5] and trunk_blocks(sam, 4) == [1, 2, 4, 5]
    maps = sam_maps(sam, [image], 3)
    torch.testing.assert_close(maps.neck, predictor.features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.trunk[:, 1], outputs[0].permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)
    rows = GRID if name == "scenes" else math.ceil(0.6 * GRID)
    assert maps.inside.sum() == rows * GRID
    assert maps.inside[0, :rows].all()
    tokens = mask_tokens(sam, maps.neck.expand(2, -1, -1, -1), BOXES)
    torch.testing.assert_close(tokens, outputs[1][0][:, 1:5], atol=1e-4, rtol=1e-3)
    masks = box_masks(sam, maps.neck, BOXES, record.width, record.height)
    assert masks.shape == (2, record.height, record.width)
    assert (masks == expected).mean() > 0.999


@pytest.mark.parametrize("box", [[50, 50, 50, 90], [90, 50, 50, 90], [200, 10, 240, 90], [-40, 10, -5, 90]])
def test_an_empty_or_outside_reference_box_is_refused(box: list[int], sam: Sam) -> None:
    with pytest.raises(StudyError, match="empty or outside"):
        mask_tokens(sam, torch.zeros(1, DIM, GRID, GRID), torch.tensor([box], dtype=torch.float32))


def test_stored_maps_are_the_live_ones_in_half_precision(sam: Sam, scenes: CocoDataset, tmp_path: Path) -> None:
    rows, stored = np.array([7, 3]), stored_maps(sam, scenes, 2, "x", tmp_path)
    for kept, live in zip(stored(rows), live_maps(sam, scenes, 2, rows), strict=True):
        torch.testing.assert_close(kept.float(), live.float(), atol=1e-3, rtol=2e-3)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    stored_maps(sam, scenes, 2, "x", tmp_path)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    stored_maps(sam, scenes, 2, "other weights", tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_object_features_are_of_each_objects_own_image_and_box(
    sam: Sam, scenes: CocoDataset, sampler: BatchSampler, tmp_path: Path
) -> None:
    objects, data = sampler.data.objects, sampler.data
    assert list(scenes.images)[objects.image[5]] == scenes.instances[5].image_id
    np.testing.assert_allclose(object_arrays(scenes, 2 * SIZE).boxes[5], np.array(scenes.instances[5].box) * 2)
    for row in (0, 17):
        maps = data.maps(objects.image[[row]])
        alone = mask_tokens(sam, maps.neck, torch.from_numpy(objects.boxes[[row]]))
        np.testing.assert_allclose(data.tokens[row], alone[0].numpy(), atol=5e-3)
    shuffled = np.random.default_rng(0).permutation(len(data.tokens))
    other = Objects(*(part[shuffled] for part in objects))
    tokens, contents = object_features(sam, data.maps, other, tmp_path / "tokens.npz")
    np.testing.assert_allclose(tokens, data.tokens[shuffled], atol=5e-3)
    np.testing.assert_allclose(contents, data.contents[shuffled], atol=5e-3)


def test_means_over_boxes_of_whole_cells() -> None:
    smooth = torch.tensor([0.0, 100.0])[:, None, None, None] + torch.arange(12.0)  # linear in x, as interpolation keeps
    boxes = torch.tensor([[3, 2, 9, 8], [6, 1, 9, 3]]) / 12
    found = box_means(smooth.expand(-1, 5, 12, -1).contiguous(), torch.tensor([1, 0]), boxes)
    torch.testing.assert_close(found, torch.tensor([[105.5] * 5, [7.0] * 5]))


# ------------------------------------------------------------------------------------------------------ the model


def test_anchors_cover_the_image() -> None:
    points = spread_points(36)
    assert points.min() > 0 and points.max() < 1
    counts = ((points * 3).long() @ torch.tensor([3, 1])).bincount(minlength=9)
    assert counts.min() >= 2 and counts.max() <= 5  # 4 in each if it were a grid


def test_padding_does_not_reach_the_answer(sam: Sam) -> None:
    model = build_model(dataclasses.replace(TINY, naming=0.0), sam, 3, 0).eval()
    inside = torch.zeros(1, GRID, GRID, dtype=torch.bool)
    inside[:, : GRID - 3] = True
    trunk = torch.randn(1, 2, WIDTH, GRID, GRID)
    # GroupNorm's statistics do see the padding, as in the published code; the attention must not
    model.projections = torch.nn.ModuleList(torch.nn.Conv2d(WIDTH, 32, 1) for _ in range(2))
    other = torch.where(inside[:, None, None], trunk, torch.randn_like(trunk))
    embedding, neck = torch.randn(1, 32), torch.zeros(1, DIM, GRID, GRID)
    with torch.no_grad():
        first, second = (model.decode(model.encode(SamMaps(t, neck, inside)), embedding[None]) for t in (trunk, other))
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.boxes, second.boxes)


@pytest.mark.parametrize("naming", [0.0, 1.0])
def test_every_question_is_answered_from_its_own_image_and_reference(
    naming: float, sam: Sam, sampler: BatchSampler
) -> None:
    model = build_model(dataclasses.replace(TINY, naming=naming), sam, 3, 0).eval()
    maps = sampler.data.maps(np.array([2, 5]))
    tokens = torch.randn(2, 3, 4, DIM) * 3
    with torch.no_grad():
        together = model(maps, tokens)[0]
        alone = model(SamMaps(*(part[1:] for part in maps)), tokens[1:, 2:])[0]
    torch.testing.assert_close(together.boxes[:, 1:, 2:], alone.boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logits[:, 1:, 2:], alone.logits, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together.logits[:, 1, 0], together.logits[:, 1, 2])


def test_queries_see_those_of_their_own_class() -> None:
    assert torch.equal(own_class_only(2, 3) == 0, torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool())


def test_agreement_is_how_much_likelier_than_by_chance_two_have_one_name(sam: Sam) -> None:
    model = build_model(TINY, sam, 4, 0)
    model.names.data = torch.eye(4, TINY.dim)
    first, second = torch.eye(4, TINY.dim)[:2]
    same, other, nothing = (
        float(model.agreement(one[None], first[None]).detach()) for one in (first, second, torch.zeros(TINY.dim))
    )
    assert same > np.log(3.9) and other < np.log(0.05) and nothing == pytest.approx(np.log(1.01), abs=1e-4)


def test_adapters_at_zero_change_nothing_and_only_they_and_the_model_are_tuned(
    sam: Sam, scenes: CocoDataset, sampler: BatchSampler
) -> None:
    rows, fuser = np.array([2, 5]), untrained(sam, sampler)
    model = with_adapters(fuser, sam, TINY.trunk_maps, width=8)
    adapters = model.adapters
    assert isinstance(adapters, Adapters) and fuser.adapters is None
    maps = live_maps(sam, scenes, TINY.trunk_maps, rows)
    for part, expected in zip(adapters(sam, maps), maps, strict=True):
        torch.testing.assert_close(part.float(), expected.float(), atol=1e-5, rtol=1e-4)
    fields = {field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler)}
    tuned = AdaptedSampler(**fields, sam=sam, adapters=adapters)
    mirrored, asked = tuned.questions(tuned.images[:3], 0)
    maps, tokens, naming = tuned.inputs(tuned.images[:3], mirrored, asked, 0)
    assert naming is not None
    contents, *_ = naming
    first = [references[0] for references in asked.references]
    images = [*tuned.images[:3], *sampler.data.objects.image[first]]
    members = np.flatnonzero(np.isin(sampler.data.objects.image, images) & sampler.labelled)
    np.testing.assert_allclose(contents.detach(), sampler.data.contents[members], atol=2e-2)
    np.testing.assert_allclose(tokens.detach().flatten(0, 1), sampler.data.tokens[first], atol=2e-2)
    output, loss = model(maps, tokens, naming)
    (output.logits.sum() + output.boxes.sum() + loss).backward()
    assert all(p.grad is not None for p in adapters.parameters()) and all(p.grad is None for p in sam.parameters())
    seen = adapted(sampler.data, sam, adapters, np.array([4, 9]))
    np.testing.assert_allclose(seen.tokens[[4, 9]], sampler.data.tokens[[4, 9]], atol=2e-2)
    assert not seen.tokens[0].any()


def test_loss_of_one_object_and_one_query_in_closed_form() -> None:
    logit, box, target = 0.7, [0.5, 0.5, 0.4, 0.2], [0.45, 0.55, 0.3, 0.3]
    output = DetrOutput(torch.tensor([[[[logit]]]]), torch.tensor([[[[box]]]]))
    boxes = [torch.tensor([target])]
    total, terms = matched_loss(output, boxes)
    focal = sigmoid_focal_loss(torch.tensor([logit]), torch.ones(1), alpha=0.25, gamma=2, reduction="sum")
    corners = [box_convert(torch.tensor([c]), "cxcywh", "xyxy") for c in (box, target)]
    expected = [float(focal), 0.05 + 0.05 + 0.1 + 0.1, float(generalized_box_iou_loss(*corners))]
    assert list(terms.values()) == pytest.approx(expected, abs=1e-5)
    assert float(total) == pytest.approx(2 * expected[0] + 5 * expected[1] + 2 * expected[2], abs=1e-4)
    assert torch.isfinite(matched_loss(output, [torch.empty(0, 4)])[0])  # an image without the class


# ---------------------------------------------------------------------------------------------- split and batches


def test_split_by_names(scenes: CocoDataset) -> None:
    names = list(scenes.categories.values())
    split = split_categories(scenes, names[5:])
    assert [scenes.categories[c] for c in split.base] == names[:5] and split.all == tuple(sorted(scenes.categories))
    assert sorted(names) == sorted(POCKET_NOVEL) and len(names) == 20
    for novel, message in ((["dragon"], "no category 'dragon'"), (names, "0 base")):
        with pytest.raises(StudyError, match=message):
            split_categories(scenes, novel)


def test_tuning_scenes_show_train_artists_and_base_classes_only(tmp_path: Path) -> None:
    tuning = load_coco(*write_scenes(World(SIZE), STREAMS["tuning"], 12, tmp_path))
    assert {i.split for i in tuning.instances} == {"train"}
    assert len(tuning.categories) == 60 and not set(tuning.categories.values()) & set(POCKET_NOVEL)


def test_training_never_labels_a_novel_object(sampler: BatchSampler) -> None:
    objects, corners = sampler.data.objects, torch.from_numpy(sampler.data.objects.boxes / SIZE)
    slots = TINY.classes_per_image + TINY.absent_classes
    for step in range(5):
        rows = sampler.rows(step)
        asked = sampler.questions(rows, step)[1]
        for number, (references, boxes) in enumerate(zip(asked.references, asked.boxes, strict=True)):
            category, image = objects.categories[references[0]], rows[number // slots]
            assert category in sampler.base and (objects.categories[references] == category).all()
            assert (objects.image[references] != image).all()
            here = (objects.image == image) & (objects.categories == category)
            assert len(boxes) == here.sum() and (here.any() or number % slots >= TINY.classes_per_image)
            exact, own = box_convert(boxes, "cxcywh", "xyxy"), corners[here]
            torch.testing.assert_close(exact, own, atol=1e-5, rtol=0)
        contents, labels, tokens, classes = sampler.naming(step)
        assert len(contents) == len(labels) and len(tokens) == len(classes)
        assert max(labels.max(), classes.max()) < len(sampler.base)
    per_epoch = len(sampler.images) // TINY.batch
    seen = np.concatenate([sampler.rows(step) for step in range(per_epoch)])
    assert len(set(seen.tolist())) == per_epoch * TINY.batch  # an epoch shows every image once


def test_every_image_is_asked_equally_often_where_classes_are_few(sampler: BatchSampler) -> None:
    few = dataclasses.replace(sampler, base=sampler.base[:2])
    references = few.questions(few.images[:3], 0)[1].references
    assert len(references) == 3 * (TINY.classes_per_image + TINY.absent_classes)


def test_mirrored_images_and_boxes_are_those_of_the_mirror_image(
    sam: Sam, wide: CocoDataset, sampler: BatchSampler
) -> None:
    maps = live_maps(sam, wide, 2, np.array([0]), np.array([True]))
    for part, expected in zip(maps, sam_maps(sam, [ImageOps.mirror(read_image(wide, 1))], 2), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)
    (flags, plain), (turned_flags, mirror) = (
        dataclasses.replace(sampler, settings=dataclasses.replace(TINY, flip=flip)).questions(sampler.images[:2], 0)
        for flip in (0.0, 1.0)
    )
    assert turned_flags.all() and not flags.any()
    for before, after in zip(plain.boxes, mirror.boxes, strict=True):
        torch.testing.assert_close(after, torch.cat([1 - before[:, :1], before[:, 1:]], dim=-1))
    with pytest.raises(StudyError, match="no mirror images"):
        sampler.data.maps(np.array([0]), np.array([True]))


def test_references_are_large_enough_of_distinct_images_and_nested(sampler: BatchSampler) -> None:
    category, draw = sampler.base[0], functools.partial(draw_references, sampler.data.objects, seed=1, min_area=256)
    rows = draw([category], 3)[0]
    assert len(set(sampler.data.objects.image[rows].tolist())) == 3
    assert (sampler.data.objects.categories[rows] == category).all()
    assert (sampler.data.objects.area[rows] >= 256).all()
    np.testing.assert_array_equal(rows[:2], draw([category], 2)[0])
    many = draw([category], 1000)[0]  # more than there are images: shown in turn
    count = len(set(many.tolist()))
    assert count < 1000 and len(set(sampler.data.objects.image[many[:count]].tolist())) == count
    np.testing.assert_array_equal(many[count:], many[:-count])
    with pytest.raises(StudyError, match=f"category {category} has no reference of 1000000 pixels"):
        draw([category], 1, min_area=1e6)
    lonely = int(sampler.data.objects.categories[0])
    keep = (sampler.data.objects.categories != lonely) | (np.arange(len(sampler.data.objects.image)) == 0)
    data = sampler.data._replace(objects=Objects(*(part[keep] for part in sampler.data.objects)))
    with pytest.raises(StudyError, match=f"category {lonely} has no reference"):
        dataclasses.replace(sampler, data=data, base=(lonely,)).questions(np.array([0]), 0)


# -------------------------------------------------------------------------------------------------------- training


def test_training_learns_a_few_scenes_and_leaves_sam_as_it_is(
    sam: Sam, scenes: CocoDataset, sampler: BatchSampler, tmp_path: Path
) -> None:
    weights = copy.deepcopy(sam.state_dict())
    few = dataclasses.replace(sampler, settings=dataclasses.replace(TINY, epochs=12, learning_rate=2e-3))
    live_data = sampler.data._replace(maps=functools.partial(live_maps, sam, scenes, TINY.trunk_maps))
    live = dataclasses.replace(sampler, data=live_data)
    path = tmp_path / "model.pt"
    _, curve = train(untrained(sam, sampler), few, Checkpoint(path, {"base": [1, 2]}))
    assert curve["loss"].iloc[-1] < 0.75 * curve["loss"].iloc[0]
    assert np.isfinite(curve.to_numpy()).all()
    model = untrained(sam, sampler)
    start = copy.deepcopy(model.state_dict())
    train(model, live, Checkpoint(tmp_path / "live.pt", {}))
    assert all(torch.equal(value, weights[name]) for name, value in sam.state_dict().items())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert {"fuser", "decoder"} <= {name.split(".")[0] for name in moved}
    with pytest.raises(StudyError, match="trained with another base"):
        train(model, sampler, Checkpoint(path, {"base": [1, 3]}))
    torch.nn.init.constant_(model.query_content.weight, float("nan"))
    with pytest.raises(StudyError, match="not finite at step 0"):
        train(model, sampler, Checkpoint(tmp_path / "nan.pt", {}))


def test_a_killed_training_resumes_to_the_same_weights(
    sam: Sam, sampler: BatchSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samantics.incontext.training.SAVE_EVERY", 2)
    settings = dataclasses.replace(TINY, dropout=0.1)
    with_dropout = dataclasses.replace(sampler, settings=settings)
    whole, expected = train(untrained(sam, with_dropout), with_dropout, Checkpoint(tmp_path / "whole.pt", {}))
    reads = iter(range(3))

    def killed_at_fourth(rows: np.ndarray, mirrored: np.ndarray | None = None) -> SamMaps:
        if next(reads, None) is None:
            raise KeyboardInterrupt
        return sampler.data.maps(rows, mirrored)

    killed = sampler.data._replace(maps=killed_at_fourth)
    halfway = Checkpoint(tmp_path / "half.pt", {})
    with pytest.raises(KeyboardInterrupt):
        train(untrained(sam, with_dropout), dataclasses.replace(with_dropout, data=killed), halfway)
    resumed, curve = train(untrained(sam, with_dropout, 99), with_dropout, halfway)
    np.testing.assert_allclose(curve.to_numpy(), expected.to_numpy(), rtol=2e-3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=2e-3, rtol=0)  # Adam scales rounding up


def _worker(rank: int, sampler: BatchSampler, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    _, curve = train(untrained(pocket.build("sam"), sampler), sampler, Checkpoint(folder / "two.pt", {}))
    if rank == 0:
        curve.to_json(folder / "curve.json", double_precision=10)
    dist.destroy_process_group()


def test_two_processes_train_as_one(
    sam: Sam, scenes: CocoDataset, sampler: BatchSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samantics.incontext.training.RECORD_EVERY", 1)
    _, expected = train(untrained(sam, sampler), sampler, Checkpoint(tmp_path / "one.pt", {}))
    parts = sampler.data.maps(np.arange(len(scenes.images)))  # memory maps do not travel to another process
    in_memory = functools.partial(read_maps, [part.numpy() for part in parts], torch.device("cpu"))
    kept = {name: np.array(getattr(sampler.data, name)) for name in ("tokens", "contents")}
    data = sampler.data._replace(maps=in_memory, **kept)
    spawn(_worker, (dataclasses.replace(sampler, data=data), tmp_path), nprocs=2)
    curve = {name: list(column.values()) for name, column in json.loads((tmp_path / "curve.json").read_text()).items()}
    recorded = expected[expected["step"].isin(curve["step"])]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_naming"):
        np.testing.assert_allclose(curve[name], recorded[name], rtol=2e-3)
    saved, alone = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("two.pt", "one.pt"))
    for name, value in alone.items():
        torch.testing.assert_close(saved[name], value, atol=2e-3, rtol=0)  # Adam scales rounding up


COCO100 = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco100"


@pytest.mark.skipif(not COCO100.is_dir(), reason="coco100 is not part of the project")
def test_training_on_photographs(sam: Sam, tmp_path: Path) -> None:
    photographs = load_coco(COCO100 / "instances_train2017.json", COCO100 / "train2017")
    split, objects = split_categories(photographs, VOC), object_arrays(photographs, SIZE)
    maps = functools.partial(live_maps, sam, photographs, 2)
    data = SamData(photographs, maps, objects, *object_features(sam, maps, objects, tmp_path / "tokens.npz"))
    common = tuple(c for c in split.base if len(np.unique(objects.image[objects.categories == c])) > 3)
    settings = dataclasses.replace(TINY, epochs=0.2, absent_classes=0, min_reference_area=0)
    sampler = BatchSampler(data, common, SIZE, settings)
    _, curve = train(untrained(sam, sampler), sampler, Checkpoint(tmp_path / "model.pt", {}))
    assert np.isfinite(curve.to_numpy()).all()
