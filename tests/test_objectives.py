"""The zoo's objectives: their parts against the packages' own forward passes, closed forms and plain loops."""

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
from samantics.zoo.contract import Batch
from samantics.zoo.objectives import OBJECTIVES, build_objective

SIDE = pocket.DEFAULT.image_size


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
        for one in (slice(i, i + 1) for i in range(3)):
            level, *fine = (part[one] for part in image)
            if name == "sam":
                sparse, dense = sam.model.prompt_encoder((points[one], labels[one]), None, None)
                position = sam.model.prompt_encoder.get_dense_pe()
                own = sam.model.mask_decoder(level, position, sparse, dense, multimask_output=True)
            else:
                prompt = {"point_coords": points[one], "point_labels": labels[one].int()}
                own = sam.model._forward_sam_heads(level, prompt, high_res_features=fine, multimask_output=True)[::2]
            torch.testing.assert_close(logits[one, 1:], own[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(iou[one, 1:], own[1], atol=1e-5, rtol=1e-4)


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
    labels, regions = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool)
    labels[:, 2:6, 2:6] = 1
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
        for theirs, ours in zip(mae.vit.layers, encoder.blocks, strict=True):  # without the class token, SAM lacks it
            out = theirs(tokens)
            tokens, x = out[0] if isinstance(out, tuple) else out, ours(x)
    torch.testing.assert_close(x.flatten(1, 2), tokens, atol=1e-3, rtol=1e-3)


def test_sam2_starts_with_the_trunk_and_neck_of_its_parent(batch: Batch) -> None:
    parent, sam2 = build_objective("hiera"), build_objective("sam2").eval()
    sam2.start_from(parent.shipped().state_dict())
    with torch.no_grad():
        both = [one.image_encoder(batch.pixels)["vision_features"] for one in (sam2.model, parent.model.eval())]
    torch.testing.assert_close(*both)


def test_clip_ships_with_the_statistics_of_its_training_and_reads_captions_as_sets_of_words(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = objectives.ClipObjective()
    for _ in range(3):
        objective(batch, 0.0)
    objective.eval()
    texts = [caption(np.random.default_rng(0), row) for row in batch.drawings.tolist()]
    tokens, model, shipped = objective.tokenizer(texts), objective.model, objective.shipped()
    for kind, statistics in (("image", objective.image_statistics), ("text", objective.text_statistics)):
        with torch.no_grad():
            given = {"image": batch.pixels, "text": tokens}[kind]
            before, after = (getattr(one, f"encode_{kind}")(given) for one in (model, shipped))
        expected = (before - statistics.running_mean) / (statistics.running_var + statistics.eps).sqrt()
        torch.testing.assert_close(after, expected, atol=1e-3, rtol=1e-3)
    one, two, three = catalogue.classes()[:3]
    tokens = objective.tokenizer([f"a picture of {one} and {two}", f"{two} {one}", f"{two} {three}"])
    first, second, other = model.encode_text(tokens)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_supervised_control_is_asked_for_the_classes_of_drawings_also_when_it_is_measured(batch: Batch) -> None:
    shown, label = objectives.shown_classes(batch.drawings), catalogue.class_of_drawing()
    for row, drawings in zip(shown, batch.drawings.tolist(), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == {int(label[drawing]) for drawing in drawings if drawing >= 0}
    objective = build_objective("supervised")
    torch.testing.assert_close(objective.eval()(batch, 0.5)[0], objective.train()(batch, 0.5)[0])


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


def test_the_loss_of_views_equals_a_plain_classification_and_what_ships_follows_the_student(batch: Batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("dinov2").train()
    torch.manual_seed(1)
    loss, _ = objective(batch, 0.1)
    torch.manual_seed(1)
    shown = torch.cat([objectives.augmented(batch.images, SIDE, (0.5, 1.0)) for _ in range(2)])
    tokens, losses = objective.student(shown).last_hidden_state, []
    for head, vectors in zip(objective.heads, (tokens[:, 0], tokens[:, 1:].mean(1)), strict=True):
        unit = functional.normalize(head(vectors), dim=1)
        logits = (unit @ unit.T / 0.15).fill_diagonal_(-torch.inf)  # nobody is its own partner
        losses.append(functional.cross_entropy(logits, torch.arange(6).roll(3)))
    torch.testing.assert_close(loss, sum(losses) / 2, atol=1e-3, rtol=1e-3)
    student, teacher = objective.student.embeddings.cls_token, objective.shipped().embeddings.cls_token
    with torch.no_grad():
        student += 1
    gap = (student - teacher).detach().abs().mean()
    objective.after_step(0.1)
    assert (student - teacher).detach().abs().mean() < gap
    assert not any(p.requires_grad for p in objective.model.parameters())
