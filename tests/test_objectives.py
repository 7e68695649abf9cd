"""The zoo's objectives: their parts against the packages' own forward passes, closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from samantics.models import pocket
from samantics.mojiworld import catalogue
from samantics.mojiworld.captions import caption
from samantics.mojiworld.rendered import render
from samantics.mojiworld.world import Stream, World
from samantics.zoo import masks as mask_losses
from samantics.zoo import objectives
from samantics.zoo.contract import Batch, at_size
from samantics.zoo.objectives import OBJECTIVES, build_objective

SIDE, GRID = pocket.DEFAULT.image_size, pocket.DEFAULT.grid


@pytest.fixture(scope="module")
def batch() -> Batch:
    pictures = render(World(SIDE), Stream("objective", "pretraining", ("scene",)), range(3))
    images, instances = torch.from_numpy(pictures.images).permute(0, 3, 1, 2), torch.from_numpy(pictures.instances)
    return Batch(images, instances, torch.from_numpy(pictures.drawings).long(), SIDE)


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_batched_decoding_equals_the_packages_image_by_image(name: str, batch: Batch) -> None:
    torch.manual_seed(0)
    sam = build_objective(name).eval()
    points, labels = torch.rand(3, 2, 2) * SIDE, torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    with torch.no_grad():
        image = sam.embed(batch.pixels)
        logits, iou = sam.decode(image, *sam.prompt(points, labels))
        for i in range(3):
            if name == "sam":
                sparse, dense = sam.model.prompt_encoder((points[i : i + 1], labels[i : i + 1]), None, None)
                position = sam.model.prompt_encoder.get_dense_pe()
                own = sam.model.mask_decoder(image[0][i : i + 1], position, sparse, dense, multimask_output=True)
            else:
                prompt = {"point_coords": points[i : i + 1], "point_labels": labels[i : i + 1].int()}
                level, *fine = (part[i : i + 1] for part in image)
                heads = sam.model._forward_sam_heads(level, prompt, high_res_features=fine, multimask_output=True)
                own = heads[0], heads[2]
            torch.testing.assert_close(logits[i : i + 1, 1:], own[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(iou[i : i + 1, 1:], own[1], atol=1e-5, rtol=1e-4)


def test_chosen_masks_visit_every_object_of_the_batch_evenly(batch: Batch) -> None:
    torch.manual_seed(0)
    masks, owner = mask_losses.chosen_masks(batch.instances)
    assert len(masks) == mask_losses.PROMPTED * len(batch.instances)
    every = {(n, k): 0 for n, field in enumerate(batch.instances) for k in range(1, int(field.max()) + 1)}
    for mask, picture in zip(masks, owner.tolist(), strict=True):
        every[picture, next(k for n, k in every if n == picture and torch.equal(mask, batch.instances[n] == k))] += 1
    assert max(every.values()) - min(every.values()) <= 1


def test_clicks_lie_in_their_region_and_know_their_label() -> None:
    torch.manual_seed(0)
    labels = torch.zeros(2, 8, 8)
    labels[:, 2:6, 2:6] = 1
    regions = torch.zeros(2, 8, 8, dtype=torch.bool)
    regions[0, 0, :] = True  # background; the second region is empty: falls back to the object
    for _ in range(20):
        points, found = mask_losses.sampled_clicks(regions, labels, image_side=16)
        (_, y0), (x1, y1) = points[:, 0].tolist()
        assert 0 <= y0 < 2 and found[0, 0] == 0
        assert 4 <= x1 < 12 and 4 <= y1 < 12 and found[1, 0] == 1


def test_mask_loss_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    logits, predicted = torch.randn(2, 3, 4, 4), torch.rand(2, 3)
    targets = (torch.rand(2, 4, 4) > 0.6).float()
    loss, best = mask_losses.best_of_masks_loss(logits, predicted, targets)
    total, errors, ious = 0.0, [], []
    for i in range(2):
        costs, found = [], []
        for m in range(3):
            p, t = logits[i, m].double().sigmoid(), targets[i].double()
            ce = -(t * p.log() + (1 - t) * (1 - p).log())
            focal = ((0.25 * t + 0.75 * (1 - t)) * (1 - (p * t + (1 - p) * (1 - t))) ** 2 * ce).mean()
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            costs.append(float(20 * focal + dice))
            hard = logits[i, m] > 0
            found.append(float((hard & (t > 0)).sum() / (hard | (t > 0)).sum()))
            errors.append((float(predicted[i, m]) - found[-1]) ** 2)
        total += min(costs) / 2
        ious.append(max(found))
    assert float(loss) == pytest.approx(total + np.mean(errors), rel=1e-5)
    assert float(best) == pytest.approx(np.mean(ious), rel=1e-5)


def test_sam_sees_what_the_mae_that_it_starts_from_saw(batch: Batch) -> None:
    mae, sam = pocket.build_mae().eval(), build_objective("sam").eval()
    sam.start_from(mae.state_dict())
    encoder = sam.model.image_encoder
    with torch.no_grad():
        tokens = mae.vit.embeddings.patch_embeddings(batch.pixels) + mae.vit.embeddings.position_embeddings[:, 1:]
        x = encoder.patch_embed(batch.pixels) + encoder.pos_embed
        for theirs, ours in zip(
            mae.vit.layers, encoder.blocks, strict=True
        ):  # without the class token, which SAM lacks
            out = theirs(tokens)
            tokens, x = out[0] if isinstance(out, tuple) else out, ours(x)
    torch.testing.assert_close(x.flatten(1, 2), tokens, atol=1e-3, rtol=1e-3)


def test_sam2_starts_with_the_trunk_and_neck_of_its_parent(batch: Batch) -> None:
    parent, sam2 = build_objective("hiera"), build_objective("sam2").eval()
    sam2.start_from(parent.shipped().state_dict())
    with torch.no_grad():
        found, own = (
            model.image_encoder(batch.pixels)["vision_features"] for model in (sam2.model, parent.model.eval())
        )
    torch.testing.assert_close(found, own)


def test_a_vit_takes_smaller_pictures_by_a_table_of_positions_of_their_size(batch: Batch) -> None:
    torch.manual_seed(0)
    visual = pocket.build_clip().visual.eval()
    with torch.no_grad():
        own = visual(batch.pixels)
        torch.testing.assert_close(at_size(visual, "positional_embedding", batch.pixels, GRID), own)
        small = functional.interpolate(batch.pixels, SIDE // 2)
        assert at_size(visual, "positional_embedding", small, GRID // 2).shape == own.shape


def test_the_clip_that_is_shipped_holds_the_statistics_of_its_training(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = objectives.ClipObjective()
    for _ in range(3):
        objective(batch, 0.0)
    objective.eval()
    texts = [caption(np.random.default_rng(0), row) for row in batch.drawings.tolist()]
    tokens, model, shipped = objective.tokenizer(texts), objective.model, objective.shipped()
    with torch.no_grad():
        pairs = (
            (objective.image_statistics, model.encode_image(batch.pixels), shipped.encode_image(batch.pixels)),
            (objective.text_statistics, model.encode_text(tokens), shipped.encode_text(tokens)),
        )
    for statistics, before, after in pairs:
        expected = (before - statistics.running_mean) / (statistics.running_var + statistics.eps).sqrt()
        torch.testing.assert_close(after, expected, atol=1e-3, rtol=1e-3)


def test_clip_reads_captions_as_sets_of_words() -> None:
    torch.manual_seed(0)
    clip, (one, two, three) = pocket.build("clip"), catalogue.classes()[:3]
    tokens = pocket.WordTokenizer()([f"a picture of {one} and {two}", f"{two} {one}", f"{two} {three}"])
    with torch.no_grad():
        first, second, other = clip.encode_text(tokens)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_classes_of_a_picture_are_those_of_its_drawings(batch: Batch) -> None:
    shown, label = objectives.shown_classes(batch.drawings), catalogue.class_of_drawing()
    for row, drawings in zip(shown, batch.drawings.tolist(), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == {int(label[drawing]) for drawing in drawings if drawing >= 0}


def test_a_view_of_the_whole_picture_recoloured_by_nothing_is_the_picture(monkeypatch) -> None:
    def middle(self, low: float, high: float) -> torch.Tensor:
        return self.fill_((low + high) / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", middle)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.ones(*shape))
    images = torch.arange(6 * 3 * 16 * 16).remainder(256).to(torch.uint8).view(6, 3, 16, 16)
    whole = objectives.augmented(images, 16, (1.0, 1.0))
    torch.testing.assert_close(whole, objectives.normalised(images), atol=1e-4, rtol=0)
    corner = objectives.augmented(images, 8, (0.25, 0.25))  # a quarter of the area, at the far corner
    torch.testing.assert_close(corner, objectives.normalised(images)[..., 8:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_something_from_one_step_on_pictures_of_its_sizes(name: str, batch: Batch) -> None:
    torch.manual_seed(0)
    objective = build_objective(name).train()
    for side in (SIDE, 64):
        objective.zero_grad()
        loss, figures = objective(Batch(batch.images, batch.instances, batch.drawings, side), 0.1)
        loss.backward()
        objective.after_step(0.1)
        assert torch.isfinite(loss) and all(torch.isfinite(value) for value in figures.values())
        touched = [p for p in objective.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert sum(p.numel() for p in touched) > 1.5e6


def test_the_loss_of_views_equals_a_plain_classification(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("simclr").train()
    torch.manual_seed(1)
    loss, _ = objective(batch, 0.1)
    torch.manual_seed(1)
    shown = torch.cat([objectives.augmented(batch.images, SIDE, (0.5, 1.0)) for _ in range(2)])
    unit = functional.normalize(objective.heads[0](objective.student(shown).last_hidden_state[:, 0]), dim=1)
    logits = (unit @ unit.T / 0.15).fill_diagonal_(-torch.inf)  # nobody is its own partner
    expected = functional.cross_entropy(logits, torch.arange(6).roll(3))
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)


def test_the_teacher_follows_the_student_and_is_what_ships(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("dinov2").train()
    student, teacher = objective.student.embeddings.cls_token, objective.shipped().embeddings.cls_token
    with torch.no_grad():
        student += 1
    gap = (student - teacher).detach().abs().mean()
    objective.after_step(0.1)
    assert (student - teacher).detach().abs().mean() < gap
    assert not any(p.requires_grad for p in objective.model.parameters())


def test_the_supervised_control_is_measured_on_standardised_features(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("supervised")
    taught, _ = objective.train()(batch, 0.5)
    measured, _ = objective.eval()(batch, 0.5)
    torch.testing.assert_close(measured, taught)
