from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo import curves as zoo_study
from samantics.zoo.controls import KEYS, training_of
from samantics.zoo.objectives import Batch


def write_curve(folder: Path, name: str, objective: list[float], probe: list[float], seed: int = 4) -> None:
    images = [1000 * step for step in range(len(objective))]
    table = pd.DataFrame({"images": images, "held_out_loss": objective, "probe_top1": probe, "knn_top1": probe})
    table.to_csv(folder / f"{name}.csv", index=False)
    recipe = {"seed": seed, "theme_strength": 0.8, "images": images[-1]}
    card = {"sha256": "0" * 64, "recipe": recipe, "architecture": {"image_size": 128}}
    (folder / f"{name}.json").write_text(json.dumps(card))


def test_curves_are_read_with_their_seed(tmp_path: Path) -> None:
    write_curve(tmp_path, "sam", [2.0, 1.0], [1.0, 3.0])
    curves = zoo_study.training_curves(["sam"], tmp_path)
    assert curves.columns.tolist() == zoo_study.CURVES
    assert curves.to_dict("list")["objective"] == [2.0, 1.0] and set(curves["seed"]) == {4}
    with pytest.raises(StudyError, match=r"clip\.csv is missing"):
        zoo_study.training_curves(["sam", "clip"], tmp_path)


def test_rest_is_what_the_last_third_changed(tmp_path: Path) -> None:
    write_curve(tmp_path, "sam", [9.0, 5.0, 2.2, 2.0], [0.0, 1.0, 4.0, 5.0])
    write_curve(tmp_path, "dinov2", [6.0, 5.0, 4.0, 8.0, 7.0], [0.0, 9.0, 10.0, 20.0, 19.0])  # another loss from 3/4 on
    rest = zoo_study.rest_table(zoo_study.training_curves(["sam", "dinov2"], tmp_path)).set_index("encoder")
    assert rest.loc["sam"].tolist() == pytest.approx([-10.0, 1.0])
    assert rest.loc["dinov2"].tolist() == pytest.approx([-100 / 7, -1.0])
    figure = zoo_study.curves_figure(
        zoo_study.training_curves(["sam", "dinov2"], tmp_path), {"sam": 1e9, "dinov2": 2e9}
    )
    assert [len(axes.lines) for axes in figure.axes[:2]] == [3, 2]  # DINOv2's loss is drawn in two parts
    plt.close(figure)


def test_trainings_from_other_seeds_stand_beside_ours_and_count_alike() -> None:
    recipe = training_of("sam")
    more = pd.DataFrame(
        {"seen": [0, 60_000, 120_000], "objective": [9.0, 4.0, 2.0], "probe_top1": 1.0, "knn_top1": 2.0}
    )
    more = more.assign(model="sam", seed=7, **{key: recipe[key] for key in zoo_study.RECIPE})
    curves = zoo_study.zoo_curves(more)
    assert curves.columns.tolist() == zoo_study.CURVES
    assert curves[curves["seed"] == 7]["images"].tolist() == [0, 60_000, 120_000]
    alone = zoo_study.rest_table(zoo_study.training_curves()).set_index("encoder")["objective_change"]
    both = zoo_study.rest_table(curves).set_index("encoder")["objective_change"]
    assert both["sam"] == pytest.approx((alone["sam"] - 100) / 2)  # its last third begins at 60,000: 4 to 2
    assert both.drop("sam").equals(alone.drop("sam"))


def test_flops_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 7, bias=False)

        def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            return self.layer(torch.ones(len(batch.images), 10)).sum(), {}

    monkeypatch.setattr(zoo_study, "build_objective", lambda name: Plain())
    forward_and_weights = 2 * (2 * 10 * 7)  # the input needs no gradient
    assert zoo_study.training_flops("sam") == forward_and_weights


def test_sam_2_and_sam_cost_alike() -> None:
    flops = {name: zoo_study.training_flops(name, pictures=2) for name in pocket.NAMES}
    assert min(flops.values()) > 1e8 and max(flops.values()) < 4 * min(flops.values())


def test_ablations_come_from_notebook_01(tmp_path: Path) -> None:
    def row(encoder: str, layer: str, pooling: str, top1: float) -> dict[str, object]:
        head = {"encoder": encoder, "labels": "category", "layer": layer, "pooling": pooling, "seeds": 3}
        return head | {"top1": top1, "top1_low": top1 - 1, "top1_high": top1 + 1}

    probes = [row("sam", "final", "mean", 5), row("random", "final", "mean", 2)]
    layers = [
        row(e, layer, "mean", v) for e in ("sam", "sam2") for layer, v in (("block_1", 1), ("block_2", 8), ("final", 6))
    ]
    pooling = [row("clip", "final", kind, v) for kind, v in (("cls", 50), ("mean", 30), ("object", 40))]
    for name, rows in (("zoos", probes), ("layers", layers), ("pooling", pooling)):
        pd.DataFrame(rows).to_csv(tmp_path / f"01_{name}.csv", index=False)
    table = zoo_study.ablation_table(tmp_path, pd.DataFrame(columns=KEYS))
    assert table.columns.tolist() == zoo_study.ABLATION
    found = {(r.encoder, r.setting): r.top1 for r in table.itertuples()}
    assert found == {
        ("sam", "trained"): 5, ("sam", "untrained"): 2, ("sam", "last trunk block"): 8, ("sam", "neck"): 6,
        ("sam2", "last trunk block"): 8, ("sam2", "neck"): 6, ("clip", "image"): 30, ("clip", "object"): 40,
    }  # fmt: skip
    plt.close(zoo_study.ablation_figure(table))
    (tmp_path / "01_layers.csv").unlink()
    with pytest.raises(StudyError, match="run notebook 01 first"):
        zoo_study.ablation_table(tmp_path, pd.DataFrame(columns=KEYS))


def test_controls_stand_beside_the_encoder_that_they_differ_from_in_one_thing(tmp_path: Path) -> None:
    def row(encoder: str, top1: float) -> dict[str, object]:
        head = {"encoder": encoder, "labels": "drawing", "probe": "linear", "layer": "final", "pooling": "mean"}
        return head | {"seeds": 3, "top1": top1, "top1_low": top1 - 1, "top1_high": top1 + 1}

    probes = pd.DataFrame([row(name, value) for name, value in (("sam", 5), ("clip", 40), ("random", 1))])
    for name in ("zoos", "layers", "pooling"):
        probes[probes["encoder"] == "random" if name == "pooling" else slice(None)].to_csv(tmp_path / f"01_{name}.csv")
    images = pocket.card("sam")["recipe"]["images"]
    controls = pd.DataFrame(
        [
            row("", value)
            | {"model": model, "theme_strength": themes, "images": seen, "seed": seed, "image_size": side}
            for model, themes, seen, side, seed, value in (
                ("supervised", 0.8, images, 128, 0, 60),
                ("supervised", 0.0, images, 128, 0, 61),  # differs in two things
                ("clip", 0.0, images, 128, 0, 30),
                ("clip", 0.0, images, 128, 1, 32),  # of another seed: they count as one
                ("clip", 0.8, images, 128, 1, 41),  # another seed, but no other world
                ("clip", 0.8, 2 * images, 128, 0, 50),  # the longest counts
                ("clip", 0.8, 4 * images, 128, 0, 70),
                ("clip", 0.0, 8 * images, 128, 0, 71),  # differs in two things
                ("sam", 0.8, images, 256, 0, 9),
                ("simclr", 0.8, images // 2, 128, 0, 20),  # saw less than the zoo: no comparison
            )
        ]
    )
    table = zoo_study.ablation_table(tmp_path, controls)
    found = {(f, e): dict(zip(r["setting"], r["top1"], strict=True)) for f, e, r in zoo_study.ablation_pairs(table)}
    assert found["objective", "sam"] == {"masks": 5, "names of drawings": 60}
    assert found["world", "clip"] == {"themes": 40, "no themes": 31}
    assert found["pictures", "clip"] == {f"{images:,}": 40, f"{4 * images:,}": 70}
    assert found["tokens", "sam"] == {"8 x 8": 5, "16 x 16": 9}
    assert len(found) == 5  # and SAM untrained against trained
    assert ("last quarter", "dinov2") not in found


def test_longer_trainings_stand_beside_the_shipped_ones() -> None:
    ours = training_of("clip")
    longer = pd.DataFrame({"seen": [0, 512_000], "objective": [5.0, 1.0], "probe_top1": [1.0, 90.0], "knn_top1": 2.0})
    recipes = [
        ours | {"images": 512_000},
        ours | {"images": 640},
        ours | {"images": 513_000, "theme_strength": 0.0},
        ours | {"seed": 1},
    ]
    curves = zoo_study.longer_curves(pd.concat([longer.assign(**recipe) for recipe in recipes]))
    clip = curves[curves["encoder"] == "clip"]
    assert set(clip["in_all"]) == {512_000, ours["images"]} and set(curves["encoder"]) == set(pocket.NAMES)
    assert clip[clip["in_all"] == 512_000]["probe_top1"].tolist() == [1.0, 90.0]
    figure = zoo_study.longer_figure(curves)
    assert "CLIP +" in figure.get_suptitle() and "SAM" not in figure.get_suptitle()
    plt.close(figure)


def test_aims_are_compared_with_trainings_that_differ_in_one_thing() -> None:
    ours, box = training_of("sam"), "IoU (%), box"
    aims = pd.DataFrame([{"encoder": "sam", "measure": box, "value": 72.0, "aim": 85}])
    changes = ({"seed": 1}, {"seed": 2}, {"image_size": 256}, {"images": 10, "image_size": 256})
    rows = [ours | change | {"measure": box, "value": 70.0 + n} for n, change in enumerate(changes)]
    rows.append(rows[0] | {"measure": "another", "value": 5.0})
    found = zoo_study.aims_elsewhere(aims, pd.DataFrame(rows)).set_index("training")
    assert found["value"].to_dict() == {"shipped": 72.0, "other seeds": 70.5, "more tokens": 72.0}
    assert found.loc["other seeds", ["trainings", "lowest", "highest", "aim"]].tolist() == [2, 70.0, 71.0, 85]


def test_intervals_are_apart_when_a_gap_is_between_them() -> None:
    assert zoo_study.apart(pd.DataFrame({"low": [1.0, 4.0], "high": [3.0, 6.0]}))
    assert zoo_study.apart(pd.DataFrame({"low": [4.0, 1.0], "high": [6.0, 3.0]}))
    assert not zoo_study.apart(pd.DataFrame({"low": [1.0, 2.5], "high": [3.0, 6.0]}))
