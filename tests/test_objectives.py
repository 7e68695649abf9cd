"""The zoo's objectives: their parts against the packages' own forward passes, closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from samantics.data import first_world as mojiworld
from samantics.models import pocket
from samantics.zoo import masks as mask_losses
from samantics.zoo import views, words
from samantics.zoo.contract import Batch, normalised
from samantics.zoo.objectives import build_objective


@pytest.fixture(scope="module")
def batch() -> Batch:
    pictures = mojiworld.render(lambda i: mojiworld.scene(mojiworld.World(), "objective", i), range(3))
    return Batch(
        torch.from_numpy(pictures.images).permute(0, 3, 1, 2),
        torch.from_numpy(pictures.instances),
        torch.from_numpy(pictures.drawings).long(),
    )


def test_batched_sam_decoding_equals_the_packages_decoder_image_by_image(batch) -> None:
    torch.manual_seed(0)
    sam = mask_losses.SamObjective().eval()
    points, labels = torch.rand(3, 2, 2) * 100, torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    with torch.no_grad():
        image = sam.embed(normalised(batch.images))
        logits, iou = sam.decode(image, points, labels)
        for i in range(3):
            sparse, dense = sam.model.prompt_encoder((points[i : i + 1], labels[i : i + 1]), None, None)
            position = sam.model.prompt_encoder.get_dense_pe()
            masks, quality = sam.model.mask_decoder(image[0][i : i + 1], position, sparse, dense, multimask_output=True)
            torch.testing.assert_close(logits[i : i + 1, 1:], masks, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(iou[i : i + 1, 1:], quality, atol=1e-5, rtol=1e-4)


def test_batched_sam2_decoding_equals_the_packages_heads(batch) -> None:
    torch.manual_seed(0)
    sam = mask_losses.Sam2Objective().eval()
    points, labels = torch.rand(3, 1, 2) * 100, torch.ones(3, 1)
    with torch.no_grad():
        embedding, *fine = sam.embed(normalised(batch.images))
        logits, iou = sam.decode((embedding, *fine), points, labels)
        prompt = {"point_coords": points, "point_labels": labels.int()}
        low, _, quality, *_ = sam.model._forward_sam_heads(
            embedding, prompt, high_res_features=fine, multimask_output=True
        )
    torch.testing.assert_close(logits[:, 1:], low, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou[:, 1:], quality, atol=1e-5, rtol=1e-4)


def test_chosen_masks_are_objects_of_their_image(batch) -> None:
    torch.manual_seed(0)
    counts = (batch.drawings >= 0).sum(1)
    masks = mask_losses.chosen_masks(batch.instances, counts)
    for picture, pair, drawings in zip(batch.instances, masks, batch.drawings, strict=True):
        objects = [picture == number + 1 for number in range(int((drawings >= 0).sum()))]
        assert all(any(torch.equal(mask, known) for known in objects) for mask in pair)
        assert len(objects) == 1 or not torch.equal(pair[0], pair[1])


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
    targets = (torch.rand(2, 8, 8) > 0.6).float()
    loss, best = mask_losses.best_of_masks_loss(logits, predicted, targets)
    total, errors, ious = 0.0, [], []
    for i in range(2):
        costs, found = [], []
        for m in range(3):
            large = functional.interpolate(logits[i : i + 1, m : m + 1], (8, 8), mode="bilinear")[0, 0].double()
            p, t = large.sigmoid(), targets[i].double()
            ce = -(t * p.log() + (1 - t) * (1 - p).log())
            focal = ((0.25 * t + 0.75 * (1 - t)) * (1 - (p * t + (1 - p) * (1 - t))) ** 2 * ce).mean()
            dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            costs.append(float(20 * focal + dice))
            hard = large > 0
            found.append(float((hard & (t > 0)).sum() / (hard | (t > 0)).sum()))
            errors.append((float(predicted[i, m]) - found[-1]) ** 2)
        total += min(costs) / 2
        ious.append(max(found))
    assert float(loss) == pytest.approx(total + np.mean(errors), rel=1e-5)
    assert float(best) == pytest.approx(np.mean(ious), rel=1e-5)


def test_a_caption_names_every_object_by_its_words() -> None:
    table = mojiworld.catalogue()
    rng = np.random.default_rng(0)
    for _ in range(30):
        text = words.caption(rng, [5, 300, -1])
        for drawing in (5, 300):
            assert table["drawing"][drawing] in text or table["category"][drawing] in text
        pocket.WordTokenizer()([text])


def test_the_clip_that_is_shipped_holds_the_statistics_of_its_training(batch) -> None:
    torch.manual_seed(0)
    objective = words.ClipObjective()
    for _ in range(3):
        objective(batch, 0.0)
    objective.eval()
    pixels, tokens = normalised(batch.images), objective.tokenizer(["dog and tool", "tool", "bird"])
    model, shipped = objective.model, objective.shipped()
    with torch.no_grad():
        pairs = (
            (objective.image_statistics, model.encode_image(pixels), shipped.encode_image(pixels)),
            (objective.text_statistics, model.encode_text(tokens), shipped.encode_text(tokens)),
        )
    for statistics, before, after in pairs:
        expected = (before - statistics.running_mean) / (statistics.running_var + statistics.eps).sqrt()
        torch.testing.assert_close(after, expected, atol=1e-3, rtol=1e-3)


def test_clip_reads_captions_as_sets_of_words() -> None:
    torch.manual_seed(0)
    clip, tokenizer = pocket.build("clip"), pocket.WordTokenizer()
    same = tokenizer(["a picture of dog a mammal and tool", "tool dog mammal", "tool dog bird"])
    with torch.no_grad():
        first, second, other = clip.encode_text(same)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, other, atol=1e-2)


def test_block_masks_cover_a_share_of_half_of_the_images() -> None:
    torch.manual_seed(0)
    masks = views.block_masks(400, 12, torch.device("cpu"))
    share = masks.float().mean((1, 2))
    assert 0.4 < (share > 0).float().mean() < 0.6
    assert share[share > 0].min() >= 0.04 and share.max() <= 0.65


def test_a_view_of_the_whole_picture_recoloured_by_nothing_is_the_picture(monkeypatch) -> None:
    def middle(self, low: float, high: float) -> torch.Tensor:
        return self.fill_((low + high) / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", middle)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.ones(*shape))
    images = torch.arange(6 * 3 * 16 * 16).remainder(256).to(torch.uint8).view(6, 3, 16, 16)
    whole = views.augmented(images, 16, (1.0, 1.0))
    torch.testing.assert_close(whole, normalised(images), atol=1e-4, rtol=0)
    left = views.augmented(images, 8, (0.25, 0.25))  # a quarter of the area, at the far corner
    torch.testing.assert_close(left, normalised(images)[..., 8:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sam", "sam2", "clip", "simclr", "supervised"])
def test_every_objective_learns_something_from_one_step(name: str, batch) -> None:
    torch.manual_seed(0)
    objective = build_objective(name).train()
    loss, figures = objective(batch, 0.1)
    loss.backward()
    objective.after_step(0.1)
    assert torch.isfinite(loss) and all(torch.isfinite(value) for value in figures.values())
    touched = [p for p in objective.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert sum(p.numel() for p in touched) > 1.5e6


def test_self_distillation_moves_the_teacher_towards_the_student(batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("dinov2").train()
    loss, figures = objective(batch, 0.9)
    assert torch.isfinite(loss) and {"dino", "ibot", "koleo"} <= figures.keys()
    student, teacher = objective.student.embeddings.cls_token, objective.model.embeddings.cls_token
    with torch.no_grad():
        student += 1
    gap = (student - teacher).detach().abs().mean()
    objective.after_step(0.9)
    assert (student - teacher).detach().abs().mean() < gap
    assert not any(p.requires_grad for p in objective.model.parameters())


def test_balanced_targets_use_every_prototype_and_keep_each_pictures_preferences() -> None:
    torch.manual_seed(0)
    logits = 0.1 * torch.randn(64, 16)
    logits[:, 3] += 1  # a prototype that everyone prefers: a plain softmax has no other answer
    temperature = views.TEACHER_TEMPERATURE
    plain = (logits / temperature).softmax(1)
    assert plain[:, 3].min() > 0.99
    shares = (views.balanced(logits) / temperature).softmax(1)
    torch.testing.assert_close(shares.sum(0), torch.full((16,), 4.0), atol=1, rtol=0)
    # Sinkhorn-Knopp only scales rows and columns: ratios between two pictures' ratios stay
    cross = (shares[0, 1] * shares[5, 2] / (shares[0, 2] * shares[5, 1])).log()
    wanted = (logits[0, 1] + logits[5, 2] - logits[0, 2] - logits[5, 1]) / temperature
    torch.testing.assert_close(cross, wanted, atol=1e-3, rtol=0)


def test_the_supervised_control_is_measured_on_standardised_features(batch) -> None:
    torch.manual_seed(0)
    objective = build_objective("supervised")
    torch.manual_seed(1)
    taught, _ = objective.train()(batch, 0.5)
    measured, _ = objective.eval()(batch, 0.5)
    torch.testing.assert_close(measured, taught)
