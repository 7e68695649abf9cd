"""The tables of appendix A1: which training is compared with which, and what the last third changed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval, across_trainings
from samantics.models import pocket
from samantics.zoo import controls, curves

SAM, CLIP = controls.training_of("sam"), controls.training_of("clip")
IMAGES = SAM["images"]


def probes(*rows: dict[str, object], labels: str = "drawing") -> pd.DataFrame:
    """Rows of `controls.csv` or of notebook 01's tables, with an interval of one point on either side."""
    table = pd.DataFrame(rows).assign(labels=labels, seeds=3)
    return table.assign(top1_low=table["top1"] - 1, top1_high=table["top1"] + 1)


def test_trainings_are_told_apart_by_the_one_thing_that_differs() -> None:
    trainings = {
        "shipped": SAM,
        "other seeds": SAM | {"seed": 1},
        "no themes": SAM | {"theme_strength": 0.0, "seed": 2},
        "more pictures": SAM | {"images": 4 * IMAGES},
        "more tokens": SAM | {"image_size": 256},
        "control": SAM | {"model": "supervised", "seed": 1},
        "of two things": SAM | {"image_size": 256, "images": 2 * IMAGES},
        "not the longest": SAM | {"images": 2 * IMAGES},
        "of less": SAM | {"images": IMAGES // 2},
        "control of less": SAM | {"model": "simclr", "images": IMAGES // 2},
    }
    table = controls.with_training(pd.DataFrame(trainings.values()).assign(expected=list(trainings)))
    assert table["training"].tolist() == table["expected"].tolist() == list(trainings)[:6]


def test_the_zoos_curves_stand_beside_all_others() -> None:
    table = curves.zoo_curves()
    assert table.columns.tolist() == curves.CURVES
    shipped = table[table["training"] == "shipped"]
    assert tuple(shipped["encoder"].unique()) == pocket.NAMES
    ends = shipped.groupby("encoder")["images"].max()
    assert (ends == ends.index.map(lambda name: pocket.card(name)["recipe"]["images"])).all()
    longer = table[table["training"] == "more pictures"].groupby("encoder")
    assert (longer["images"].max() == longer["in_all"].max()).all() and len(longer) == 4


def test_convergence_is_what_the_last_third_changed() -> None:
    def curve(name: str, seed: int, objective: list[float], probe: list[float]) -> pd.DataFrame:
        images = [1000 * step for step in range(len(objective))]
        return pd.DataFrame(
            {"images": images, "objective": objective, "probe_top1": probe, "encoder": name, "seed": seed}
        )

    sam = curve("sam", 0, [9.0, 5.0, 2.2, 2.0], [0.0, 1.0, 4.0, 5.0])
    other = curve("sam", 1, [9.0, 5.0, 4.0, 2.0], [0.0, 1.0, 4.0, 7.0])
    dinov2 = curve("dinov2", 0, [6.0, 5.0, 4.0, 8.0, 7.0], [0.0, 9.0, 10.0, 20.0, 19.0])  # another loss from 3/4 on
    assert curves.in_second_objective(dinov2).tolist() == [False, False, False, True, True]
    assert not curves.in_second_objective(sam).any()
    found = curves.last_third(pd.concat([sam, other, dinov2])).set_index("encoder")
    assert found.loc["sam"].tolist() == pytest.approx([(-10 - 100) / 2, (1 + 3) / 2])
    assert found.loc["dinov2"].tolist() == pytest.approx([-100 / 7, -1.0])


def test_trainings_that_differ_in_the_seed_become_one_row() -> None:
    found = [Interval(10.0, 9.0, 11.0), Interval(14.0, 13.0, 15.0)]
    rows = [SAM | {"seed": n, "top1": one.value} for n, one in enumerate(found)]
    longer = SAM | {"images": 2 * IMAGES, "top1": 99.0}
    table = curves.over_seeds(probes(*rows, longer).assign(training="any"))
    value, low, high = across_trainings(found)
    assert table[["images", "trainings", "top1"]].values.tolist() == [[IMAGES, 2, value], [2 * IMAGES, 1, 99.0]]
    assert table.iloc[0][["top1_low", "top1_high"]].tolist() == [max(low, 0.0), high]
    assert low < 0  # of two trainings the interval leaves the percents


def test_ablations_set_every_control_against_what_it_differs_from_in_one_thing(tmp_path: Path) -> None:
    layers = [("sam", "block_1", 1), ("sam", "block_2", 8), ("sam", "final", 6), ("clip", "final", 50)]
    pooling = [("clip", "cls", 50), ("clip", "mean", 30), ("clip", "object", 40)]
    tables = {
        "zoos": probes(*[{"encoder": name, "top1": v} for name, v in (("sam", 5), ("clip", 40), ("random", 2))]),
        "layers": probes(*[{"encoder": name, "layer": layer, "top1": v} for name, layer, v in layers]),
        "pooling": probes(*[{"encoder": name, "pooling": kind, "top1": v} for name, kind, v in pooling]),
    }
    for name, table in tables.items():
        table.to_csv(tmp_path / f"01_{name}.csv", index=False)
    trained = probes(
        SAM | {"model": "supervised", "top1": 60},
        SAM | {"model": "supervised", "theme_strength": 0.0, "top1": 61},  # differs in two things
        CLIP | {"theme_strength": 0.0, "top1": 30},
        CLIP | {"theme_strength": 0.0, "seed": 1, "top1": 32},  # of another seed: they count as one
        CLIP | {"images": 2 * IMAGES, "top1": 50},
        CLIP | {"images": 4 * IMAGES, "top1": 70},  # the longest counts
        SAM | {"image_size": 256, "top1": 9},
    )
    table = curves.ablation_table(tmp_path, trained)
    assert table.columns.tolist() == curves.ABLATION
    found = {
        key: dict(zip(rows["setting"], rows["top1"], strict=True)) for key, rows in table.groupby(["factor", "encoder"])
    }
    assert found == {
        ("training", "sam"): {"untrained": 2, "trained": 5},
        ("objective", "sam"): {"masks": 5, "names of drawings": 60},
        ("world", "clip"): {"themes": 40, "no themes": 31},
        ("pictures", "clip"): {f"{IMAGES:,}": 40, f"{4 * IMAGES:,}": 70},
        ("tokens", "sam"): {"8 x 8": 5, "16 x 16": 9},
        ("layer", "sam"): {"last trunk block": 8, "neck": 6},
        ("pooling", "clip"): {"image": 30, "object": 40},
    }
    (tmp_path / "01_layers.csv").unlink()
    with pytest.raises(StudyError, match="run notebook 01 first"):
        curves.ablation_table(tmp_path, trained)
