"""The in-context model: SAM stays as it is, the parts equal the packages' own, and training is reproducible."""

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
from torch.multiprocessing.spawn import spawn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from refusals import refused
from samantics.cache import Checkpoint
from samantics.data.coco import CocoDataset, read_image
from samantics.data.coco_files import write_coco
from samantics.incontext import tokens
from samantics.incontext.model import Adapters, DetrOutput, InContextModel, adapted_data, matched_loss
from samantics.incontext.study import check_data, load_study
from samantics.incontext.tokens import SamMaps, live_maps, mask_tokens, sam_data, sam_maps, stored_maps
from samantics.incontext.training import BatchSampler, draw_references, split_categories, train
from samantics.models import pocket
from samantics.models.encoder import zoo_encoder
from samantics.models.registry import capture
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import Stream, World
from samantics.run import Run
from samantics.scales import POCKET_INCONTEXT, POCKET_NOVEL

torch.set_num_threads(1)  # also in the processes that are spawned
SIZE, GRID, WIDTH, DIM = (getattr(pocket.DEFAULT, name) for name in ("image_size", "grid", "width", "dim"))
ENCODER = zoo_encoder("sam", pocket.build("sam"), "random")
SAM = ENCODER.model
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, batch=4, epochs=1, top=4,
    min_score=0.0,
)  # fmt: skip
BOXES = torch.tensor([[10.0, 20.0, 70.0, 80.0], [40.0, 5.0, 90.0, 50.0]])


def untrained(classes: int = 20, seed: int = 0, **settings: Any) -> InContextModel:
    torch.manual_seed(seed)
    return InContextModel(dataclasses.replace(TINY, **settings), SAM, classes)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    stream = Stream("test scenes", "references", ("scene",), "novel")  # few classes, so that each is often shown
    return write_scenes(World(SIZE), stream, 24, tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def wide(scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """One 90 x 54 image, so that SAM's input has padding below."""
    folder = tmp_path_factory.mktemp("wide")
    read_image(scenes, 1).crop((0, 0, 90, 54)).save(folder / "wide.png")
    record = dataclasses.replace(scenes.images[1], file="wide.png", width=90, height=54)
    return dataclasses.replace(scenes, folder=folder, images={1: record}, instances=())


def make_sampler(scenes: CocoDataset, folder: Path) -> BatchSampler:
    data = sam_data(ENCODER, scenes, TINY, folder)
    # with so few scenes only the common categories have references in several of them
    common = [c for c in scenes.categories if len(np.unique(data.objects.image[data.objects.categories == c])) > 2]
    return BatchSampler(data, tuple(common[:-1]), SIZE, TINY)


@pytest.fixture(scope="module")
def sampler(scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> BatchSampler:
    return make_sampler(scenes, tmp_path_factory.mktemp("maps"))


@pytest.mark.parametrize("name", ["scenes", "wide"])
def test_maps_tokens_and_masks_are_the_predictors(name: str, request: pytest.FixtureRequest) -> None:
    dataset: CocoDataset = request.getfixturevalue(name)
    predictor, record, image = SamPredictor(SAM), dataset.images[1], read_image(dataset, 1)
    with capture({"trunk": SAM.image_encoder.blocks[3], "decoder": SAM.mask_decoder.transformer}) as outputs:
        predictor.set_image(np.asarray(image))
        expected = predictor.predict_torch(None, None, BOXES, multimask_output=False)[0][:, 0].numpy()
    assert tokens.trunk_blocks(SAM, 3) == [1, 3, 5] and tokens.trunk_blocks(SAM, 4) == [1, 2, 4, 5]
    maps = sam_maps(SAM, [image], 3)
    torch.testing.assert_close(maps.neck, predictor.features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.trunk[:, 1], outputs["trunk"].permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)
    rows = GRID if name == "scenes" else math.ceil(0.6 * GRID)
    assert maps.inside.sum() == rows * GRID and maps.inside[0, :rows].all()
    found = mask_tokens(SAM, maps.neck.expand(2, -1, -1, -1), BOXES)
    torch.testing.assert_close(found, outputs["decoder"][0][:, 1:5], atol=1e-4, rtol=1e-3)
    masks = tokens.box_masks(SAM, maps.neck, BOXES, record.width, record.height)
    assert masks.shape == (2, record.height, record.width) and (masks == expected).mean() > 0.999


def test_stored_maps_are_the_live_ones_in_half_precision(scenes: CocoDataset, tmp_path: Path) -> None:
    rows, stored = np.array([7, 3]), stored_maps(SAM, scenes, 2, "x", tmp_path)
    for kept, live in zip(stored(rows), live_maps(SAM, scenes, 2, rows), strict=True):
        torch.testing.assert_close(kept.float(), live.float(), atol=1e-3, rtol=2e-3)
    refused("no mirror images", stored, rows, np.array([False, True]))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    stored_maps(SAM, scenes, 2, "x", tmp_path)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    stored_maps(SAM, scenes, 2, "other weights", tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_object_features_are_of_each_objects_own_image_and_box(
    scenes: CocoDataset, sampler: BatchSampler, tmp_path: Path
) -> None:
    objects, data = sampler.data.objects, sampler.data
    assert list(scenes.images)[objects.image[5]] == scenes.instances[5].image_id
    np.testing.assert_allclose(tokens.object_arrays(scenes, 2 * SIZE).boxes[5], np.array(scenes.instances[5].box) * 2)
    for row in (0, 17):
        alone = mask_tokens(SAM, data.maps(objects.image[[row]]).neck, torch.from_numpy(objects.boxes[[row]]))
        np.testing.assert_allclose(data.tokens[row], alone[0].numpy(), atol=5e-3)
    shuffled = np.random.default_rng(0).permutation(len(data.tokens))
    other = dataclasses.replace(scenes, instances=tuple(scenes.instances[row] for row in shuffled))
    found = sam_data(ENCODER, other, TINY, tmp_path)
    np.testing.assert_allclose(found.tokens, data.tokens[shuffled], atol=5e-3)
    np.testing.assert_allclose(found.contents, data.contents[shuffled], atol=5e-3)
    unnamed = sam_data(ENCODER, other, dataclasses.replace(TINY, naming=0.0), tmp_path)
    assert not unnamed.contents.size and unnamed.tokens.shape == found.tokens.shape


def test_means_over_boxes_of_whole_cells() -> None:
    smooth = torch.tensor([0.0, 100.0])[:, None, None, None] + torch.arange(12.0)  # linear in x, as interpolation keeps
    boxes = torch.tensor([[3, 2, 9, 8], [6, 1, 9, 3]]) / 12
    found = tokens.box_means(smooth.expand(-1, 5, 12, -1).contiguous(), torch.tensor([1, 0]), boxes)
    torch.testing.assert_close(found, torch.tensor([[105.5] * 5, [7.0] * 5]))


def test_padding_does_not_reach_the_answer() -> None:
    model = untrained(naming=0.0).eval()
    inside = torch.zeros(1, GRID, GRID, dtype=torch.bool)
    inside[:, : GRID - 3] = True
    trunk = torch.randn(1, 2, WIDTH, GRID, GRID)
    # GroupNorm's statistics do see the padding, as in the published code; the attention must not
    model.projections = torch.nn.ModuleList(torch.nn.Conv2d(WIDTH, 32, 1) for _ in range(2))
    other = torch.where(inside[:, None, None], trunk, torch.randn_like(trunk))
    embedding, neck = torch.randn(1, 32), torch.zeros(1, DIM, GRID, GRID)
    with torch.no_grad():
        answers = [model.decode(model.encode(SamMaps(t, neck, inside)), embedding[None]) for t in (trunk, other)]
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("naming", [0.0, 1.0])
def test_every_question_is_answered_from_its_own_image_and_reference(naming: float, sampler: BatchSampler) -> None:
    model, maps = untrained(naming=naming).eval(), sampler.data.maps(np.array([2, 5]))
    asked = torch.randn(2, 3, 4, DIM) * 3
    with torch.no_grad():
        together = model(maps, asked)[0]
        alone = model(SamMaps(*(part[1:] for part in maps)), asked[1:, 2:])[0]
    torch.testing.assert_close(together.boxes[:, 1:, 2:], alone.boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.logits[:, 1:, 2:], alone.logits, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together.logits[:, 1, 0], together.logits[:, 1, 2])


def test_agreement_is_how_much_likelier_than_by_chance_two_have_one_name() -> None:
    model = untrained(classes=4)
    model.names.data = torch.eye(4, TINY.dim)
    first, second = torch.eye(4, TINY.dim)[:2]
    others = torch.stack([first, second, torch.zeros(TINY.dim)])
    same, other, nothing = model.agreement(others, first.expand(3, -1)).tolist()
    assert same > np.log(3.9) and other < np.log(0.05) and nothing == pytest.approx(np.log(1.01), abs=1e-4)


def test_adapters_at_zero_change_nothing_and_only_they_and_the_model_are_tuned(
    scenes: CocoDataset, sampler: BatchSampler
) -> None:
    model, adapters, maps = untrained(), Adapters(SAM, 2, width=8), live_maps(SAM, scenes, 2, np.array([2, 5]))
    model.adapters = adapters
    torch.testing.assert_close(adapters(SAM, maps), maps, atol=1e-5, rtol=1e-4)
    tuned, data = dataclasses.replace(sampler, adapted=(SAM, adapters)), sampler.data
    images = tuned.images[:3]
    mirrored, references, _ = tuned.questions(images, 0)
    maps, asked, naming = tuned.inputs(images, mirrored, references, 0)
    assert naming is not None
    first = [some[0] for some in references]
    seen = np.isin(data.objects.image, [*images, *data.objects.image[first]])
    np.testing.assert_allclose(naming[0].detach(), data.contents[seen & sampler.labelled], atol=2e-2)
    np.testing.assert_allclose(asked.detach().flatten(0, 1), data.tokens[first], atol=2e-2)
    output, loss = model(maps, asked, naming)
    (output.logits.sum() + output.boxes.sum() + loss).backward()
    assert all(p.grad is not None for p in adapters.parameters()) and all(p.grad is None for p in SAM.parameters())
    found = adapted_data(data, SAM, adapters, np.array([4, 9])).tokens
    np.testing.assert_allclose(found[[4, 9]], data.tokens[[4, 9]], atol=2e-2)
    assert not found[0].any()
    refused("set flip .* to 0", dataclasses.replace, sampler, settings=dataclasses.replace(TINY, flip=0.5))


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


def test_split_by_names(scenes: CocoDataset) -> None:
    names = list(scenes.categories.values())
    split = split_categories(scenes, names[5:])
    assert [scenes.categories[c] for c in split.base] == names[:5] and split.all == tuple(sorted(scenes.categories))
    assert sorted(names) == sorted(POCKET_NOVEL) and len(names) == 20
    for novel, message in ((["dragon"], "no category 'dragon'"), (names, "0 base")):
        refused(message, split_categories, scenes, novel)


def test_data_that_would_stop_the_notebook_late_are_refused(scenes: CocoDataset, pocket_run: Run) -> None:
    files = {name: pocket_run.cache / f"{name}.json" for name in ("references", "targets")}
    for path, instances in zip(files.values(), (scenes.instances, ()), strict=True):
        write_coco(path, list(scenes.images.values()), scenes.categories, instances)
    for targets in (files["targets"], scenes.folder):  # a JSON file without annotations, a plain folder
        run = dataclasses.replace(pocket_run, facts={})
        given = str(files["references"]), str(targets), str(scenes.folder)
        refused(f"{targets} has no objects", load_study, run, *given)
    shown = {instance.category_id for instance in scenes.by_image[1]}
    few = dataclasses.replace(scenes, categories={c: scenes.categories[c] for c in shown})
    refused(f"{scenes.images[1].file} of .* shows every category", check_data, few, few, few)


def test_training_never_labels_a_novel_object(sampler: BatchSampler) -> None:
    objects, corners = sampler.data.objects, torch.from_numpy(sampler.data.objects.boxes / SIZE)
    slots = TINY.classes_per_image + TINY.absent_classes
    for step in range(5):
        rows = sampler.rows(step)
        _, asked, found = sampler.questions(rows, step)
        for number, (references, boxes) in enumerate(zip(asked, found, strict=True)):
            category, image = objects.categories[references[0]], rows[number // slots]
            assert category in sampler.base and (objects.categories[references] == category).all()
            assert (objects.image[references] != image).all()
            here = (objects.image == image) & (objects.categories == category)
            assert len(boxes) == here.sum() and (here.any() or number % slots >= TINY.classes_per_image)
            torch.testing.assert_close(box_convert(boxes, "cxcywh", "xyxy"), corners[here], atol=1e-5, rtol=0)
        contents, labels, known, classes = sampler.naming(step)
        assert len(contents) == len(labels) and len(known) == len(classes)
        assert max(labels.max(), classes.max()) < len(sampler.base)
    per_epoch = len(sampler.images) // TINY.batch
    seen = np.concatenate([sampler.rows(step) for step in range(per_epoch)])
    assert len(set(seen.tolist())) == per_epoch * TINY.batch  # an epoch shows every image once
    few = dataclasses.replace(sampler, base=sampler.base[:2])
    assert len(few.questions(few.images[:3], 0)[1]) == 3 * slots  # as many questions where classes are few


def test_mirrored_images_and_boxes_are_those_of_the_mirror_image(wide: CocoDataset, sampler: BatchSampler) -> None:
    maps = live_maps(SAM, wide, 2, np.array([0]), np.array([True]))
    torch.testing.assert_close(maps, sam_maps(SAM, [ImageOps.mirror(read_image(wide, 1))], 2), atol=1e-4, rtol=1e-4)
    images = sampler.images[:2]
    (flags, _, plain), (turned_flags, _, mirror) = (
        dataclasses.replace(sampler, settings=dataclasses.replace(TINY, adapters=0, flip=flip)).questions(images, 0)
        for flip in (0.0, 1.0)
    )
    assert turned_flags.all() and not flags.any()
    for before, after in zip(plain, mirror, strict=True):
        torch.testing.assert_close(after, torch.cat([1 - before[:, :1], before[:, 1:]], dim=-1))


def test_references_are_large_enough_of_distinct_images_and_nested(scenes: CocoDataset, sampler: BatchSampler) -> None:
    category, objects = sampler.base[0], sampler.data.objects
    draw = functools.partial(draw_references, sampler.data, [category], seed=1)
    rows = draw(3)[0]
    assert len(set(objects.image[rows].tolist())) == 3 and (objects.categories[rows] == category).all()
    many = draw(1000)[0]  # more than there are images: shown in turn
    count = len(set(many.tolist()))
    assert count < 1000 and len(set(objects.image[many[:count]].tolist())) == count
    assert min(scenes.instances[row].area for row in many) >= TINY.min_reference_area
    np.testing.assert_array_equal(rows[:2], draw(2)[0])
    np.testing.assert_array_equal(many[count:], many[:-count])
    small = sampler.data._replace(objects=tokens.object_arrays(scenes, SIZE, min_area=1e6))
    says = f"has no {scenes.categories[category]!r} large enough"
    refused(says, draw_references, small, [category], 1, seed=1)
    of_one_image = objects._replace(image=np.zeros_like(objects.image))
    alone = dataclasses.replace(sampler, data=sampler.data._replace(objects=of_one_image))
    says = f"has no reference of .* outside {scenes.images[1].file}: add images"
    refused(says, alone.questions, np.array([0]), 0)


def test_training_learns_a_few_scenes_and_leaves_sam_as_it_is(
    scenes: CocoDataset, sampler: BatchSampler, tmp_path: Path
) -> None:
    weights, path = copy.deepcopy(SAM.state_dict()), tmp_path / "model.pt"
    few = dataclasses.replace(sampler, settings=dataclasses.replace(TINY, epochs=12, learning_rate=2e-3))
    _, curve = train(untrained(), few, Checkpoint(path, {"base": [1, 2]}))
    assert curve["loss"].iloc[-1] < 0.75 * curve["loss"].iloc[0] and np.isfinite(curve.to_numpy()).all()
    model, live = untrained(), functools.partial(live_maps, SAM, scenes, TINY.trunk_maps)
    start = copy.deepcopy(model.state_dict())
    train(model, dataclasses.replace(sampler, data=sampler.data._replace(maps=live)), Checkpoint(tmp_path / "2.pt", {}))
    assert all(torch.equal(value, weights[name]) for name, value in SAM.state_dict().items())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert {"fuser", "decoder"} <= {name.split(".")[0] for name in moved}
    refused("trained with another base", train, model, sampler, Checkpoint(path, {"base": [1, 3]}))
    torch.nn.init.constant_(model.query_content.weight, float("nan"))
    refused("not finite at step 0", train, model, sampler, Checkpoint(tmp_path / "nan.pt", {}))


def assert_same_weights(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-3, rtol=0)  # Adam scales rounding up


def test_a_killed_training_resumes_to_the_same_weights(
    sampler: BatchSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samantics.incontext.training.SAVE_EVERY", 2)
    whole, expected = train(untrained(dropout=0.1), sampler, Checkpoint(tmp_path / "whole.pt", {}))
    reads = iter(range(3))

    def killed_at_fourth(rows: np.ndarray, mirrored: np.ndarray | None = None) -> SamMaps:
        if next(reads, None) is None:
            raise KeyboardInterrupt
        return sampler.data.maps(rows, mirrored)

    killed = sampler.data._replace(maps=killed_at_fourth)
    halfway = Checkpoint(tmp_path / "half.pt", {})
    with pytest.raises(KeyboardInterrupt):
        train(untrained(dropout=0.1), dataclasses.replace(sampler, data=killed), halfway)
    resumed, curve = train(untrained(seed=99, dropout=0.1), sampler, halfway)
    np.testing.assert_allclose(curve.to_numpy(), expected.to_numpy(), rtol=2e-3)
    assert_same_weights(whole.state_dict(), resumed.state_dict())


def _worker(rank: int, scenes: CocoDataset, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sampler = make_sampler(scenes, folder)
    _, curve = train(untrained(), sampler, Checkpoint(folder / "two.pt", {}))
    if rank == 0:
        curve.to_json(folder / "curve.json", double_precision=10)
    dist.destroy_process_group()


def test_two_processes_train_as_one(scenes: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samantics.incontext.training.RECORD_EVERY", 1)
    sampler = make_sampler(scenes, tmp_path)
    _, expected = train(untrained(), sampler, Checkpoint(tmp_path / "one.pt", {}))
    spawn(_worker, (scenes, tmp_path), nprocs=2)
    curve = {name: list(column.values()) for name, column in json.loads((tmp_path / "curve.json").read_text()).items()}
    recorded = expected[expected["step"].isin(curve["step"])]
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_naming"):
        np.testing.assert_allclose(curve[name], recorded[name], rtol=2e-3)
    assert_same_weights(*(torch.load(tmp_path / name, weights_only=True)["model"] for name in ("one.pt", "two.pt")))
