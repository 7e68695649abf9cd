"""The measures of the model cards, against closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samantics.models import pocket
from samantics.zoo import quality


def test_the_centre_is_the_pixel_farthest_from_the_border() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:13, 5:26] = True
    x, y = quality.centre_of(mask)
    assert y == 7 and 10 <= x <= 20
    mask[:] = False
    mask[0, 29] = True  # one pixel in a corner
    assert quality.centre_of(mask).tolist() == [29, 0]


def test_iou_equals_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 10, 10)))
    masks = rng.random((2, 10, 10)) > 0.5
    found = quality.iou_with(logits, masks)
    for i in range(2):
        for m in range(3):
            hard = logits[i, m].numpy() > 0
            assert found[i, m] == pytest.approx((hard & masks[i]).sum() / (hard | masks[i]).sum())


def test_coarse_masks_keep_what_fills_cells_and_lose_what_is_smaller() -> None:
    masks = np.zeros((3, 32, 32), bool)
    masks[0, :, :16] = True  # half of the image: cell by cell
    masks[1, 5, 5] = True  # one pixel of a cell of 16
    masks[2, 8:12, 8:11] = True  # three quarters of a cell
    coarse = quality.coarse_masks(masks, 8)
    covered = masks.reshape(3, 8, 4, 8, 4).mean((2, 4))
    assert (coarse.numpy()[:, 0] == covered - 0.5).all()
    assert quality.iou_with(coarse[:2], masks[:2])[:, 0].tolist() == [1, 0]


def test_effective_rank_counts_directions() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 400))[0][:, :8]
    spread = basis @ torch.eye(8) @ torch.randn(8, 8)
    assert quality.effective_rank(torch.outer(torch.randn(50), torch.randn(8))) == pytest.approx(1, abs=0.01)
    assert 1 < quality.effective_rank(spread) <= 8
    assert quality.effective_rank(torch.randn(5000, 8)) == pytest.approx(8, rel=0.01)


def test_an_untrained_zoo_is_measured_as_bad(monkeypatch) -> None:
    monkeypatch.setattr(quality, "probed", lambda *_: np.zeros(3))  # a linear probe: tested where it lives
    table = quality.quality_table({"clip": pocket.build("clip"), "sam": pocket.build("sam")}, scenes=2, views=1)
    assert {"encoder", "measure", "value", "low", "high", "n"} == set(table.columns)
    zero_shot = table[table["measure"].str.contains("zero-shot")]
    assert len(zero_shot) == 4 and (zero_shot["value"] < 25).all()
    ceiling = table["measure"].str.contains("true mask")
    assert (table.loc[(table["encoder"] == "sam") & ~ceiling, "value"] < 60).all()
    assert (table.loc[ceiling, "value"] > 60).all() and ceiling.sum() == 1
