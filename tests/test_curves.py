"""How the zoo learned: curves are read with their seeds, and convergence is judged against noise."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from samantics.models import pocket
from samantics.zoo import curves
from samantics.zoo.contract import Batch


def write_training(folder: Path, name: str, seed: int, probe: list[float]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"sha256": "", "recipe": {"seed": seed}}))
    steps = [{"step": n, "images": 100 * n, "seconds": n, "probe_top1": value} for n, value in enumerate(probe)]
    pd.DataFrame(steps).assign(knn_top1=1.0, held_out_loss=2.0).to_csv(folder / f"{name}.csv", index=False)


def test_curves_of_all_seeds_are_read_and_their_last_third_judged(tmp_path: Path) -> None:
    write_training(tmp_path / "own", "sam", 0, [0, 4, 7, 8])
    write_training(tmp_path / "seed_1", "sam", 1, [0, 4, 9, 11])
    write_training(tmp_path / "own", "clip", 0, [0, 10, 20, 40])
    found = curves.learning_curves([tmp_path / "own", tmp_path / "seed_1"])
    assert list(found) == curves.COLUMNS
    assert set(zip(found["encoder"], found["seed"], strict=True)) == {("sam", 0), ("sam", 1), ("clip", 0)}
    rest = curves.last_third(found).set_index("encoder")
    assert rest.loc["sam", "probe_change"] == pytest.approx(1.5)
    assert rest.loc["sam", "noise"] == pytest.approx(2 * 2.1213, rel=1e-3)  # standard deviation of 8 and 11
    assert rest.loc["clip", "probe_change"] == pytest.approx(20)
    assert rest["converged"].to_dict() == {"sam": True, "clip": False}
    (noise,) = curves.seed_noise(found).to_dict("records")
    assert (noise["encoder"], noise["images"], noise["seeds"]) == ("sam", 300, 2)
    assert noise["probe_top1_mean"] == 9.5 and noise["knn_top1_std"] == 0
    for seed in (1, 2):  # shorter ones tell the noise of the long one
        write_training(tmp_path / f"seed_{seed}", "clip", seed, [0, 6 + 2 * seed])
    folders = [tmp_path / name for name in ("own", "seed_1", "seed_2")]
    rest = curves.last_third(curves.learning_curves(folders)).set_index("encoder")
    assert rest.loc["clip", "probe_change"] == 20 and rest.loc["clip", "noise"] == pytest.approx(2 * 2**0.5)


def test_a_step_on_smaller_pictures_costs_less() -> None:
    side = pocket.DEFAULT.image_size
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    drawings = torch.tensor([[0, -1, -1, -1, -1, -1]] * 2)
    cost = {s: curves.gigaflops("supervised", Batch(images, images[:, 0], drawings, s)) for s in (side, side * 2 // 3)}
    tokens = pocket.DEFAULT.grid**2
    least = 3 * 2 * tokens * 12 * pocket.DEFAULT.depth * pocket.DEFAULT.width**2 / 1e9  # its matrices alone
    assert least < cost[side] < 2 * least
    assert 0.35 < cost[side * 2 // 3] / cost[side] < 0.5
