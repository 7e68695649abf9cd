"""The whole way of notebook 03 at its smallest, on untrained models: tables, cache, own data, figures, explorer."""

from __future__ import annotations

import dataclasses
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from samantics.cache import write_json
from samantics.data import coco
from samantics.data.detection import load_data
from samantics.errors import StudyError
from samantics.run import start_run
from samantics.training_free import explorer, oracles
from samantics.training_free import pipeline as pipelines
from samantics.training_free.mask_features import encode_masks
from samantics.training_free.pipeline import Pipeline, Variant

COLUMNS = "proposals,source,merging,shots,iou_type,AP,AP50,AP75,APs,APm,APl,AR1,AR10,AR100,low,high,seeds"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    run, folder = start_run("pocket", "99_test", seed=3), tmp_path_factory.mktemp("run")
    settings = dataclasses.replace(
        run.scale.pipeline, sources=("dinov2", "clip", "sam2", "sam", "random"), reference_scenes=12, target_scenes=5,
        targets=4, points_per_side=2, predicted_iou=0.0, stability=0.0, shots=2, shot_curve=(1, 2), grids=(1, 2),
        grid_images=2, reference_seeds=2,
    )  # fmt: skip
    scale = dataclasses.replace(run.scale, pipeline=settings)
    run = dataclasses.replace(run, scale=scale, figures=folder / "figures", cache=folder / "cache")
    return pipelines.start(run, weights="zoo_random")


@pytest.fixture(autouse=True)
def _own_cache(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(small.run.cache))


def test_table_has_the_contract_and_is_kept(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [Variant(source=source, shots=2) for source in ("dinov2", "random")]
    table = pipelines.ap_table(small, variants)
    groups = [group for chosen in small.references.values() for group in chosen.values()]
    assert groups and not any(instance.split != "train" for group in groups for instance in group)
    assert list(table.columns) == [*COLUMNS.split(","), "scoring", "view"]
    assert table["seeds"].eq(2).all() and len(table) == 4
    assert ((table["low"] <= table["AP"] + 1e-9) & (table["AP"] <= table["high"] + 1e-9)).all()

    predicted = mock.Mock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(Pipeline, "predict", predicted)
    assert pipelines.ap_table(small, variants).equals(table) and not predicted.called
    with pytest.raises(ZeroDivisionError):
        pipelines.ap_table(small, [Variant(source="dinov2", shots=1)])


def test_the_annotation_scores_100_in_the_table_of_oracles(small: Pipeline) -> None:
    table = oracles.oracle_table(small, Variant(shots=2))
    assert list(table.columns) == ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    steps = ["none", "true_masks", "true_classes", "best_mask", "truth", "recall_ceiling"]
    assert table["oracle"].unique().tolist() == steps
    masks = table[table["iou_type"] == "segm"].set_index("oracle")
    assert masks.loc["truth", "AP"] == pytest.approx(100)
    assert masks.loc["best_mask", "AR100"] <= masks.loc["recall_ceiling", "AR100"] + 1e-9


def test_proposals_by_setting(small: Pipeline) -> None:
    base = small.proposal_settings
    settings = {"one": dataclasses.replace(base, points_per_side=1), "four": base}
    table = oracles.proposal_table(small, settings, "dinov2").set_index("setting")
    assert table.index.tolist() == ["one", "four"] and table["proposals"].is_monotonic_increasing
    assert np.allclose(table[["wholes", "parts", "others"]].sum(axis=1), table["proposals"])
    chosen = small.data.targets.first(2)
    found = {image_id: small.proposals("sam")[image_id] for image_id in chosen.images}
    assert table.loc["four", "recall"] == pytest.approx(oracles.recall(oracles.covered(chosen, found)).value)


def test_subsets_share_the_names_and_the_objects(small: Pipeline) -> None:
    every = oracles.subsets(small)
    assert list(every) == ["base", "novel", "test artists", "train artists"]
    objects = small.data.targets.instances
    assert sum(i.category_id in every["novel"][1] for i in objects) + sum(
        i.category_id in every["base"][1] for i in objects
    ) == len(objects)
    assert sum(not i.crowd for name in list(every)[2:] for i in every[name][0].instances) == len(objects)
    table = oracles.subset_table(small, [Variant(source="clip", shots=2)])
    assert table["subset"].tolist() == [*every, "base minus novel", "train artists minus test artists"]
    ap = table.set_index("subset")["AP"]
    assert ap["base minus novel"] == pytest.approx(ap["base"] - ap["novel"])


def test_a_difference_is_that_of_the_table(small: Pipeline) -> None:
    more, less = Variant(proposals="truth", shots=2), Variant(proposals="truth", shots=2, view="cut_out")
    found = pipelines.mask_ap_difference(small, more, less)
    table = pipelines.ap_table(small, [more, less], ["segm"])
    assert found.value == pytest.approx(table["AP"][0] - table["AP"][1])
    assert found.low <= found.value <= found.high


def test_features_are_those_of_the_proposals(small: Pipeline) -> None:
    """An image's masks of all proposers lie in one file; each proposer gets the features of its own."""
    image_id, encoders = max(small.data.targets.images), {"clip": small.models["clip"]}
    for proposer in pipelines.PROPOSERS:
        rles = {image_id: small.proposals(proposer)[image_id].rles}
        expected = encode_masks(encoders, small.data.targets, rles).of("clip", image_id)
        np.testing.assert_allclose(small.features(proposer, "clip", image_id), expected, atol=1e-5)
        assert small.features(proposer, "clip", image_id, "cut_out").shape == expected.shape


def test_the_head_to_head_is_on_the_same_targets(small: Pipeline) -> None:
    """Rows of notebook 02 stand there if it saw these targets; ours are of the images that 02 asked for all classes."""
    ways = {"ours": Variant(source="clip", shots=2)}
    alone = oracles.head_to_head(small, ways)
    assert alone["method"].tolist() == ["ours", "ours"] and (alone["images"] == 4).all()
    assert (alone["image_seconds"] > 0).all() and (alone["tuning_seconds"] == 0).all()
    head = {
        "variant": "all_classes",
        "artists": "all",
        "arm": "frozen SAM",
        "iou_type": "bbox",
        "AP": 1,
        "low": 0,
        "high": 2,
    }
    rows = [head | {"split": split, "shots": shots} for split in ("base", "novel") for shots in (1, 2)]
    rows.append(rows[-1] | {"variant": "class_oracle", "AP": 99})
    cost = {"arm": "frozen SAM", "tuning_seconds": 60, "image_seconds": 0.5, "images": 3}
    small.run.figures.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(small.run.figures / "02_icl_ap.csv")
    pd.DataFrame([cost]).to_csv(small.run.figures / "02_cost.csv")
    for targets, methods in (
        (small.run.facts["target_data"], ["in context, frozen SAM", "ours"]),
        ("others", ["ours"]),
    ):
        write_json(small.run.figures / "02_icl_ap.json", {"recorded": {"target_data": targets}})
        table = oracles.head_to_head(small, ways)
        assert table["method"].unique().tolist() == methods and len(table) == 2 * len(methods)
        assert (table["images"] == (3 if len(methods) == 2 else 4)).all()


def test_likeness(small: Pipeline) -> None:
    image = coco.read_image(small.data.targets, next(iter(small.data.targets.images)))
    heat = explorer.likeness_map(small.models["dinov2"], image, (68.0, 28.0))
    assert heat.shape == (image.height, image.width)
    assert heat.max() <= 1 + 1e-6 and heat[28, 68] > 0.9  # the middle of a token
    with pytest.raises(StudyError, match="lies outside the image"):
        explorer.likeness_map(small.models["sam"], image, (500.0, 30.0))
    assert len(explorer.likeness_figure(small.models, image, (68.0, 28.0)).axes) == 5
    plt.close("all")


def test_incomplete_own_data_and_scales_without_data(small: Pipeline) -> None:
    with pytest.raises(StudyError, match="own data needs --references, --targets and --images: --targets is missing"):
        load_data(small.run, references="x.json")
    with pytest.raises(StudyError, match="scale paper needs COCO files"):
        load_data(start_run("paper", "99_test"))
