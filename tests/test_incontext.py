"""The in-context model: SAM stays as it is, the parts equal the packages' own, and training is reproducible."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import ImageOps
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch.multiprocessing.spawn import spawn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, load_coco, read_image, write_coco
from samantics.data.first_world import write_mojiworld
from samantics.errors import StudyError
from samantics.incontext.model import (
    Checkpoint,
    Detections,
    InContextModel,
    Lesson,
    build_model,
    draw_references,
    hint_loss,
    loss_of,
    refined,
    shaken,
    split_categories,
    spread_points,
    train,
)
from samantics.incontext.tokens import (
    LiveFeatures,
    Objects,
    PlantedFeatures,
    SamMaps,
    StoredFeatures,
    box_masks,
    class_codes,
    encode_images,
    mask_tokens,
    objects_of,
    planted_tokens,
    reference_tokens,
    stored_features,
    trunk_blocks,
)
from samantics.models import pocket
from samantics.scales import POCKET_INCONTEXT, POCKET_NOVEL, VOC

torch.set_num_threads(1)
SIZE, GRID = pocket.DEFAULT.image_size, pocket.DEFAULT.grid
WIDTH, DIM = pocket.DEFAULT.width, pocket.DEFAULT.dim
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, batch=4, epochs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def sam() -> Sam:
    return pocket.build("sam").requires_grad_(False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return write_mojiworld(mojiworld.World(), "test", 24, tmp_path_factory.mktemp("scenes"), 0.0)


@pytest.fixture(scope="module")
def wide(scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """One 100 x 60 image, so that SAM's input has padding below."""
    folder = tmp_path_factory.mktemp("wide")
    read_image(scenes, 1).crop((0, 0, 100, 60)).save(folder / "wide.png")
    record = dataclasses.replace(scenes.images[1], file="wide.png", width=100, height=60)
    write_coco(folder / "wide.json", [record], scenes.categories, [], {})
    return load_coco(folder / "wide.json", folder)


@pytest.fixture(scope="module")
def lesson(sam: Sam, scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    folder = tmp_path_factory.mktemp("maps")
    objects = objects_of(scenes, SIZE)
    source = stored_features(sam, scenes, TINY.trunk_maps, "random", folder)
    tokens = reference_tokens(sam, source, objects, folder / "tokens")
    # with so few scenes only the common categories have references in several of them
    common = [c for c in scenes.categories if len(np.unique(objects.image[objects.categories == c])) > 2]
    return Lesson(source, objects, tokens, tuple(common[:-1]), SIZE, TINY)


# ------------------------------------------------------------------------------------------------- the frozen SAM


def test_trunk_blocks_of_official_and_pocket_sam(sam: Sam) -> None:
    assert trunk_blocks(sam, 3) == [1, 3, 5]
    assert trunk_blocks(sam, 4) == [1, 2, 4, 5]


@pytest.mark.parametrize("name", ["scenes", "wide"])
def test_maps_equal_the_predictors(name: str, sam: Sam, request: pytest.FixtureRequest) -> None:
    dataset: CocoDataset = request.getfixturevalue(name)
    predictor = SamPredictor(sam)
    heard: list[torch.Tensor] = []
    handle = sam.image_encoder.blocks[3].register_forward_hook(lambda _m, _i, output: heard.append(output))
    predictor.set_image(np.asarray(read_image(dataset, 1)))
    handle.remove()
    maps = encode_images(sam, dataset, [1], 3)
    torch.testing.assert_close(maps.neck, predictor.features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.trunk[:, 1], heard[0].permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)
    rows = GRID if name == "scenes" else math.ceil(0.6 * GRID)
    assert maps.inside.sum() == rows * GRID
    assert maps.inside[0, :rows].all()


def test_mask_tokens_are_what_leaves_the_mask_decoders_transformer(sam: Sam, scenes: CocoDataset) -> None:
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(read_image(scenes, 1)))
    boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0], [50.0, 5.0, 120.0, 60.0]])
    heard: list[torch.Tensor] = []
    handle = sam.mask_decoder.transformer.register_forward_hook(lambda _m, _i, output: heard.append(output[0]))
    predictor.predict_torch(None, None, boxes)
    handle.remove()
    tokens = mask_tokens(sam, predictor.features.expand(2, -1, -1, -1), boxes)
    torch.testing.assert_close(tokens, heard[0][:, 1:5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("box", [[50, 50, 50, 90], [90, 50, 50, 90], [200, 10, 240, 90], [-40, 10, -5, 90]])
def test_an_empty_or_outside_reference_box_is_refused(box: list[int], sam: Sam) -> None:
    with pytest.raises(StudyError, match="empty or outside"):
        mask_tokens(sam, torch.zeros(1, DIM, GRID, GRID), torch.tensor([box], dtype=torch.float32))


@pytest.mark.parametrize("name", ["scenes", "wide"])
def test_masks_equal_the_predictors(name: str, sam: Sam, request: pytest.FixtureRequest) -> None:
    dataset: CocoDataset = request.getfixturevalue(name)
    record = dataset.images[1]
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(read_image(dataset, 1)))
    boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0], [50.0, 5.0, 120.0, 60.0]])
    expected = predictor.predict_torch(None, None, boxes, multimask_output=False)[0][:, 0].numpy()
    masks = box_masks(sam, encode_images(sam, dataset, [1], 1).neck, boxes, record.width, record.height)
    assert masks.shape == (2, record.height, record.width)
    assert (masks == expected).mean() > 0.9999


def test_objects_lie_in_sams_frame(scenes: CocoDataset) -> None:
    objects = objects_of(scenes, 2 * scenes.images[1].width)
    np.testing.assert_allclose(objects.boxes[5], np.array(scenes.instances[5].box) * 2, rtol=1e-6)
    assert list(scenes.images)[objects.image[5]] == scenes.instances[5].image_id


def test_stored_features_are_the_live_ones_in_half_precision(sam: Sam, scenes: CocoDataset, tmp_path: Path) -> None:
    stored = stored_features(sam, scenes, 2, "x", tmp_path)
    rows = np.array([7, 3])
    for kept, live in zip(stored.read(rows), LiveFeatures(sam, scenes, 2).read(rows), strict=True):
        torch.testing.assert_close(kept.float(), live.float(), atol=1e-3, rtol=2e-3)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    stored_features(sam, scenes, 2, "x", tmp_path)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    stored_features(sam, scenes, 2, "other weights", tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_reference_tokens_are_of_each_objects_own_image_and_box(sam: Sam, lesson: Lesson) -> None:
    for row in (0, 17):
        neck = lesson.source.read(lesson.objects.image[[row]]).neck
        alone = mask_tokens(sam, neck, torch.from_numpy(lesson.objects.boxes[[row]]))
        np.testing.assert_allclose(lesson.tokens[row], alone[0].numpy(), atol=5e-3)


def test_reference_tokens_in_shards_are_the_same(
    sam: Sam, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samantics.incontext.tokens.SHARD", 7)
    tokens = reference_tokens(sam, lesson.source, lesson.objects, tmp_path)
    np.testing.assert_allclose(tokens, lesson.tokens, atol=5e-3)
    (tmp_path / "0000007.npy").unlink()
    np.testing.assert_allclose(reference_tokens(sam, lesson.source, lesson.objects, tmp_path), tokens, atol=5e-3)


# ------------------------------------------------------------------------------------------------------ the model


def test_spread_points_cover_the_image_evenly() -> None:
    points = spread_points(36)
    assert points.min() > 0
    assert points.max() < 1
    cells = (points * 3).long() @ torch.tensor([3, 1])
    counts = cells.bincount(minlength=9)
    assert counts.min() >= 2  # 4 in each if it were a grid
    assert counts.max() <= 5


def test_refinement_moves_a_box_in_logit_space() -> None:
    start = torch.tensor([[0.3, 0.6, 0.2, 0.5]])
    assert torch.allclose(refined(torch.zeros(1, 4), start), start, atol=1e-5)
    moved = refined(torch.tensor([[0.0, 0.0, -2.0, 0.0]]), torch.full((1, 4), 0.5))
    assert torch.allclose(moved, torch.tensor([[0.5, 0.5, 0.1192, 0.5]]), atol=1e-4)


def test_padding_does_not_reach_the_answer(sam: Sam) -> None:
    model = build_model(TINY, sam, 0).eval()
    inside = torch.zeros(1, GRID, GRID, dtype=torch.bool)
    inside[:, : GRID - 3] = True
    trunk = torch.randn(1, 2, WIDTH, GRID, GRID)
    # GroupNorm's statistics do see the padding, as in the published code; the attention must not
    normalised = copy.deepcopy(model)
    normalised.projections = torch.nn.ModuleList(torch.nn.Conv2d(WIDTH, 32, 1) for _ in range(2))
    other = torch.where(inside[:, None, None], trunk, torch.randn_like(trunk))
    embedding, owner = torch.randn(1, 32), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        first, second = (
            normalised.detect(SamMaps(t, torch.zeros(1, DIM, GRID, GRID), inside), embedding, owner)
            for t in (trunk, other)
        )
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.boxes, second.boxes)


def test_every_question_is_answered_from_its_own_image_and_reference(sam: Sam, lesson: Lesson) -> None:
    model = build_model(TINY, sam, 0).eval()
    maps = lesson.source.read(np.array([2, 5]))
    embeddings = torch.randn(3, TINY.dim) * 3
    with torch.no_grad():
        together = model.detect(maps, embeddings, torch.tensor([1, 0, 1]))
        alone = model.detect(SamMaps(*(part[1:] for part in maps)), embeddings[2:], torch.tensor([0]))
    torch.testing.assert_close(together.boxes[:, 2:], alone.boxes, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together.logits[:, 0], together.logits[:, 2])


def test_loss_of_one_object_and_one_query_in_closed_form() -> None:
    logit, box, target = 0.7, [0.5, 0.5, 0.4, 0.2], [0.45, 0.55, 0.3, 0.3]
    found = Detections(torch.tensor([[[logit]]]), torch.tensor([[[box]]]))
    total, terms = loss_of(found, [torch.tensor([target])])
    focal = sigmoid_focal_loss(torch.tensor([logit]), torch.ones(1), alpha=0.25, gamma=2, reduction="sum")
    corners = [
        torch.tensor([[c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2]]) for c in (box, target)
    ]
    expected = [float(focal), 0.05 + 0.05 + 0.1 + 0.1, float(generalized_box_iou_loss(*corners))]
    assert list(terms.values()) == pytest.approx(expected, abs=1e-5)
    assert float(total) == pytest.approx(2 * expected[0] + 5 * expected[1] + 2 * expected[2], abs=1e-4)


def test_loss_without_any_object_is_finite() -> None:
    found = Detections(torch.zeros(2, 1, 3), torch.full((2, 1, 3, 4), 0.5))
    assert torch.isfinite(loss_of(found, [torch.empty(0, 4)])[0])


# -------------------------------------------------------------------------------------------------- base and novel


def test_pocket_split_is_every_third_category() -> None:
    assert mojiworld.categories()[2::3] == POCKET_NOVEL
    table = mojiworld.catalogue().drop_duplicates("category")
    assert table[table["category"].isin(POCKET_NOVEL)]["theme"].is_unique


def test_split_by_names(scenes: CocoDataset) -> None:
    split = split_categories(scenes, POCKET_NOVEL)
    assert len(split.base) == 15
    assert [scenes.categories[c] for c in split.novel] == list(POCKET_NOVEL)
    with pytest.raises(StudyError, match="no category 'dragon'"):
        split_categories(scenes, ["dragon"])
    with pytest.raises(StudyError, match="0 base"):
        split_categories(scenes, list(scenes.categories.values()))
    assert len(set(VOC)) == 20


def test_training_never_labels_a_novel_object(lesson: Lesson) -> None:
    boxes = torch.from_numpy(lesson.objects.boxes / SIZE)
    for step in range(5):
        asked = lesson.questions(lesson.rows_of(step), step)
        for position, rows in enumerate(asked.references):
            category = lesson.objects.categories[rows[0]]
            assert category in lesson.base
            assert (lesson.objects.categories[rows] == category).all()
            image = asked.rows[asked.owner[position]]
            assert (lesson.objects.image[rows] != image).all()
            here = (lesson.objects.image == image) & (lesson.objects.categories == category)
            assert len(asked.answers[position]) == here.sum()
            labelled = (lesson.objects.image == image) & np.isin(lesson.objects.categories, lesson.base)
            truths = box_convert(asked.truths[position], "cxcywh", "xyxy")
            assert torch.isclose(truths[:, None], boxes[labelled][None], atol=1e-5).all(-1).any(1).all()
            assert asked.same[position].sum() == here.sum() * TINY.hints


def test_hints_do_not_change_the_other_answers(sam: Sam, lesson: Lesson) -> None:
    model = build_model(TINY, sam, 0).eval()
    maps, owner = lesson.source.read(np.array([2, 5])), torch.tensor([1, 0])
    embeddings, hints = torch.randn(2, TINY.dim), torch.rand(2, 5, 4) * 0.5 + 0.2
    with torch.no_grad():
        without, beside = model.detect(maps, embeddings, owner), model.detect(maps, embeddings, owner, hints)
        fewer = model.detect(maps, embeddings, owner, hints[:, :2])
    torch.testing.assert_close(beside.logits[:, :, : TINY.queries], without.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(beside.boxes[:, :, : TINY.queries + 2], fewer.boxes, atol=1e-5, rtol=1e-4)


def test_hint_loss_is_the_matched_loss_where_there_is_one_object() -> None:
    found = Detections(torch.tensor([[[0.7]], [[0.2]]]), torch.tensor([[[[0.5, 0.5, 0.4, 0.2]]]] * 2))
    truth = torch.tensor([[0.45, 0.55, 0.3, 0.3]])
    torch.testing.assert_close(hint_loss(found, [truth], [torch.ones(1)]), loss_of(found, [truth])[0])
    padded = Detections(*(torch.cat([part, part], dim=2) for part in found))
    torch.testing.assert_close(hint_loss(padded, [truth], [torch.ones(1)]), loss_of(found, [truth])[0])


def test_shaken_boxes_stay_near() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.2]]).repeat(200, 1)
    moved = shaken(boxes, np.random.default_rng(0))
    assert ((moved[:, :2] - 0.5).abs() <= 0.2 * boxes[:, 2:] + 1e-6).all()
    assert ((moved[:, 2:] / boxes[:, 2:] - 1).abs() <= 0.4 + 1e-5).all()
    assert moved.std(0).min() > 0.01


def test_an_epoch_shows_every_image_once(lesson: Lesson) -> None:
    per_epoch = len(lesson.images) // TINY.batch
    seen = np.concatenate([lesson.rows_of(step) for step in range(per_epoch)])
    assert len(set(seen.tolist())) == per_epoch * TINY.batch


def test_mirrored_images_and_boxes_are_those_of_the_mirror_image(
    sam: Sam, wide: CocoDataset, lesson: Lesson, tmp_path: Path
) -> None:
    ImageOps.mirror(read_image(wide, 1)).save(tmp_path / wide.images[1].file)
    (tmp_path / "wide.json").write_bytes(wide.path.read_bytes())
    turned = load_coco(tmp_path / "wide.json", tmp_path)
    found = encode_images(sam, wide, [1], 2, np.array([True]))
    for part, expected in zip(found, encode_images(sam, turned, [1], 2), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)
    asked = {
        flip: dataclasses.replace(lesson, settings=dataclasses.replace(TINY, flip=flip)).questions(np.array([0, 1]), 0)
        for flip in (0.0, 1.0)
    }
    assert asked[1.0].mirrored.all() and not asked[0.0].mirrored.any()
    for plain, mirror in zip(asked[0.0].truths, asked[1.0].truths, strict=True):
        torch.testing.assert_close(mirror, torch.cat([1 - plain[:, :1], plain[:, 1:]], dim=1))
    with pytest.raises(StudyError, match="no mirror images"):
        lesson.source.read(np.array([0]), np.array([True]))


def test_planted_classes_stand_on_their_objects_alone(lesson: Lesson) -> None:
    codes = class_codes([3, 7], WIDTH, 0)
    assert codes.shape == (8, WIDTH)
    objects = Objects(
        image=np.array([1, 1]),
        boxes=np.array([[0, 0, SIZE / 2, SIZE / 4], [SIZE - 3, SIZE - 3, SIZE, SIZE]], np.float32),
        categories=np.array([3, 7]),
        crowd=np.zeros(2, bool),
        area=np.ones(2),
        right=np.full(2, SIZE, np.float32),
    )
    rows = np.array([0, 1])
    plain = lesson.source.read(rows)
    planted = PlantedFeatures(lesson.source, objects, SIZE, codes).read(rows)
    added = (planted.trunk - plain.trunk) / plain.trunk.std()
    assert torch.equal(planted.neck, plain.neck) and (added[0] == 0).all()
    expected = torch.zeros(added.shape[1:])
    expected[:, :, : GRID // 4, : GRID // 2] = codes[3, None, :, None, None]
    expected[:, :, -1, -1] = codes[7]
    torch.testing.assert_close(added[1], expected, atol=1e-4, rtol=1e-4)
    tokens = np.ones((2, 4, WIDTH), np.float16)
    tokens[:, ::2] = -1  # a standard deviation of 1
    np.testing.assert_allclose(planted_tokens(tokens, objects, codes)[1, 0], codes[7].numpy() - 1, atol=5e-3)


def test_a_category_without_a_reference_elsewhere_is_named(lesson: Lesson) -> None:
    lonely = int(lesson.objects.categories[0])
    keep = (lesson.objects.categories != lonely) | (np.arange(len(lesson.objects.image)) == 0)
    objects = Objects(*(getattr(lesson.objects, f.name)[keep] for f in dataclasses.fields(Objects)))
    few = dataclasses.replace(lesson, objects=objects, base=(lonely,))
    with pytest.raises(StudyError, match=f"category {lonely} has no reference"):
        few.questions(np.array([0]), 0)


def test_references_are_large_enough_of_distinct_images_and_nested(lesson: Lesson) -> None:
    category = lesson.base[0]
    rows = draw_references(lesson.objects, [category], 3, seed=1, min_area=256)[0]
    assert len(set(lesson.objects.image[rows].tolist())) == 3
    assert (lesson.objects.categories[rows] == category).all()
    assert (lesson.objects.area[rows] >= 256).all()
    np.testing.assert_array_equal(rows[:2], draw_references(lesson.objects, [category], 2, seed=1, min_area=256)[0])
    with pytest.raises(StudyError, match=f"category {category} has references in"):
        draw_references(lesson.objects, [category], 1000, seed=1, min_area=256)


# -------------------------------------------------------------------------------------------------------- training


def test_sam_is_frozen(sam: Sam, scenes: CocoDataset, lesson: Lesson, tmp_path: Path) -> None:
    weights = copy.deepcopy(sam.state_dict())
    boxes = torch.tensor([[10.0, 20.0, 90.0, 100.0]])
    before = encode_images(sam, scenes, [1], 2)
    masks = box_masks(sam, before.neck, boxes, SIZE, SIZE)
    model = build_model(TINY, sam, 0)
    start = copy.deepcopy(model.state_dict())
    live = dataclasses.replace(lesson, source=LiveFeatures(sam, scenes, TINY.trunk_maps))
    train(model, live, Checkpoint(tmp_path / "model.pt", {}))
    assert all(torch.equal(value, weights[name]) for name, value in sam.state_dict().items())
    after = encode_images(sam, scenes, [1], 2)
    torch.testing.assert_close(before.trunk, after.trunk, atol=1e-4, rtol=1e-4)
    assert (masks == box_masks(sam, after.neck, boxes, SIZE, SIZE)).mean() > 0.999
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert any(name.startswith("fuser") for name in moved)
    assert any(name.startswith("decoder") for name in moved)


def test_training_learns_a_few_scenes(sam: Sam, lesson: Lesson, tmp_path: Path) -> None:
    few = dataclasses.replace(lesson, settings=dataclasses.replace(TINY, epochs=12, learning_rate=2e-3))
    curve = train(build_model(TINY, sam, 0), few, Checkpoint(tmp_path / "model.pt", {}))
    assert curve["loss"].iloc[-1] < 0.75 * curve["loss"].iloc[0]
    assert np.isfinite(curve.to_numpy()).all()


def test_a_killed_training_resumes_to_the_same_weights(
    sam: Sam, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samantics.incontext.model.SAVE_EVERY", 2)
    with_dropout = dataclasses.replace(lesson, settings=dataclasses.replace(TINY, dropout=0.1))
    whole = build_model(with_dropout.settings, sam, 0)
    expected = train(whole, with_dropout, Checkpoint(tmp_path / "whole.pt", {}))

    class KilledError(Exception):
        pass

    reads = iter(range(3))

    class Mortal:
        def read(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> SamMaps:
            if next(reads, None) is None:
                raise KilledError
            return lesson.source.read(rows, mirrored)

    halfway = Checkpoint(tmp_path / "half.pt", {})
    with pytest.raises(KilledError):
        train(build_model(with_dropout.settings, sam, 0), dataclasses.replace(with_dropout, source=Mortal()), halfway)
    resumed = build_model(with_dropout.settings, sam, 99)
    curve = train(resumed, with_dropout, halfway)
    np.testing.assert_allclose(curve.to_numpy(), expected.to_numpy(), rtol=2e-3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=2e-3, rtol=0)  # Adam scales rounding up


def test_a_checkpoint_of_another_split_is_refused(sam: Sam, lesson: Lesson, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    train(build_model(TINY, sam, 0), lesson, Checkpoint(path, {"base": [1, 2]}))
    with pytest.raises(StudyError, match="trained with another base"):
        train(build_model(TINY, sam, 0), lesson, Checkpoint(path, {"base": [1, 3]}))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StudyError, match="damaged"):
        train(build_model(TINY, sam, 0), lesson, Checkpoint(path, {"base": [1, 2]}))


def _worker(rank: int, lesson: Lesson, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build_model(lesson.settings, pocket.build("sam"), 0)
    curve = train(model, lesson, Checkpoint(folder / "two.pt", {}))
    if rank == 0:
        curve.to_json(folder / "curve.json", double_precision=10)
    dist.destroy_process_group()


def test_two_processes_train_as_one(sam: Sam, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samantics.incontext.model.RECORD_EVERY", 1)
    expected = train(build_model(TINY, sam, 0), lesson, Checkpoint(tmp_path / "one.pt", {}))
    assert isinstance(lesson.source, StoredFeatures)
    source = lesson.source  # a memory map would be pickled as a copy, but without its file
    in_memory = StoredFeatures(np.array(source.trunk), np.array(source.neck), np.array(source.inside), source.device)
    spawn(_worker, (dataclasses.replace(lesson, source=in_memory), tmp_path), nprocs=2)
    curve = {name: list(column.values()) for name, column in json.loads((tmp_path / "curve.json").read_text()).items()}
    recorded = expected[expected["step"].isin(curve["step"])]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou"):
        np.testing.assert_allclose(curve[name], recorded[name], rtol=2e-3)
    saved = torch.load(tmp_path / "two.pt", weights_only=True)["model"]
    alone = torch.load(tmp_path / "one.pt", weights_only=True)["model"]
    for name, value in alone.items():
        torch.testing.assert_close(saved[name], value, atol=2e-3, rtol=0)  # Adam scales rounding up


def test_a_model_that_is_not_finite_stops_training(sam: Sam, lesson: Lesson, tmp_path: Path) -> None:
    model = build_model(TINY, sam, 0)
    torch.nn.init.constant_(model.query_content.weight, float("nan"))
    with pytest.raises(StudyError, match="not finite at step 0"):
        train(model, lesson, Checkpoint(tmp_path / "model.pt", {}))


def test_the_model_is_small() -> None:
    model = InContextModel(POCKET_INCONTEXT, WIDTH, (4, DIM))
    assert sum(p.numel() for p in model.parameters()) < 3e6


COCO100 = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco100"


@pytest.mark.skipif(not COCO100.is_dir(), reason="coco100 is not part of the project")
def test_training_on_photographs(sam: Sam, tmp_path: Path) -> None:
    photographs = load_coco(COCO100 / "instances_train2017.json", COCO100 / "train2017")
    split = split_categories(photographs, VOC)
    objects = objects_of(photographs, SIZE)
    source = LiveFeatures(sam, photographs, 2)
    tokens = reference_tokens(sam, source, objects, tmp_path / "tokens")
    common = tuple(c for c in split.base if len(np.unique(objects.image[objects.categories == c])) > 3)
    settings = dataclasses.replace(TINY, epochs=0.2, absent_classes=0, min_reference_area=0)
    lesson = Lesson(source, objects, tokens, common, SIZE, settings)
    curve = train(build_model(settings, sam, 0), lesson, Checkpoint(tmp_path / "model.pt", {}))
    assert np.isfinite(curve.to_numpy()).all()
