"""The whole way of notebook 03 at its smallest, on untrained models; oracles and errors on a scene judged by hand."""

import dataclasses
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from boxes import box_dataset, box_masks, box_object, box_proposals, box_result
from refusals import refused
from samantics.cache import write_json
from samantics.data import coco
from samantics.data.detection import load_data
from samantics.metrics.coco_ap import Result, evaluate
from samantics.run import start_run
from samantics.training_free import diagnosis, explorer
from samantics.training_free import pipeline as pipelines
from samantics.training_free.mask_features import encode_masks
from samantics.training_free.pipeline import Pipeline, Variant
from samantics.training_free.proposals import objects_of, true_masks

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


def test_table_has_the_contract_and_is_kept(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [Variant(source=source, shots=2) for source in ("dinov2", "random")]
    table = pipelines.ap_table(small, variants)
    chosen = [i for groups in small.references.values() for group in groups.values() for i in group]
    assert {instance.split for instance in chosen} == {"train"}
    assert list(table.columns) == [*COLUMNS.split(","), "scoring", "view"]
    assert table["seeds"].eq(2).all() and len(table) == 4
    assert ((table["low"] <= table["AP"] + 1e-9) & (table["AP"] <= table["high"] + 1e-9)).all()

    predicted = mock.Mock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(Pipeline, "predict", predicted)
    assert pipelines.ap_table(small, variants).equals(table) and not predicted.called
    with pytest.raises(ZeroDivisionError):
        pipelines.ap_table(small, [Variant(source="dinov2", shots=1)])


def test_the_annotation_scores_100_in_the_table_of_oracles(small: Pipeline) -> None:
    table = diagnosis.oracle_table(small, Variant(shots=2))
    assert list(table.columns) == ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    steps = ["none", "true_masks", "true_classes", "best_mask", "truth", "recall_ceiling"]
    assert table["oracle"].tolist() == steps and table["iou_type"].eq("segm").all()
    table = table.set_index("oracle")
    assert table.loc["truth", "AP"] == pytest.approx(100)
    assert table.loc["best_mask", "AR100"] <= table.loc["recall_ceiling", "AR100"] + 1e-9


def test_proposals_by_setting(small: Pipeline) -> None:
    base = small.proposal_settings
    settings = {"one": dataclasses.replace(base, points_per_side=1), "four": base}
    table = diagnosis.proposal_table(small, settings, "dinov2").set_index("setting")
    assert table.index.tolist() == ["one", "four"] and table["proposals"].is_monotonic_increasing
    assert np.allclose(table[["wholes", "parts", "others"]].sum(axis=1), table["proposals"])
    chosen = small.data.targets.first(2)
    found = {image_id: small.proposals("sam")[image_id] for image_id in chosen.images}
    assert table.loc["four", "recall"] == pytest.approx(diagnosis.recall(chosen, found).value)


def test_subsets_share_the_names_and_the_objects(small: Pipeline) -> None:
    every, objects = diagnosis.subsets(small), small.data.targets.instances
    assert list(every) == ["base", "novel", "test artists", "train artists"]
    assert sorted(every["base"][1] + every["novel"][1]) == sorted(small.data.targets.categories)
    assert sum(not i.crowd for name in list(every)[2:] for i in every[name][0].instances) == len(objects)
    table = diagnosis.subset_table(small, [Variant(source="clip", shots=2)])
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
    """Masks of all proposers lie in one file, encoders work side by side: each gives what it gives alone."""
    image_id, encoders = max(small.data.targets.images), {"clip": small.models["clip"]}
    for proposer in pipelines.PROPOSERS:
        rles = {image_id: small.proposals(proposer)[image_id].rles}
        expected = encode_masks(encoders, small.data.targets, rles, small.run.cache / "apart").of("clip", image_id)
        np.testing.assert_allclose(small.features(proposer, "clip", image_id), expected, atol=1e-5)
        assert small.features(proposer, "clip", image_id, "cut_out").shape == expected.shape


def test_the_head_to_head_is_on_the_same_targets(small: Pipeline) -> None:
    """Rows of notebook 02 stand there if it saw these targets; ours are of the images that 02 asked for all classes."""
    ways, figures = {"ours": Variant(source="clip", shots=2)}, small.run.figures
    alone = diagnosis.head_to_head(small, ways)
    assert alone["method"].tolist() == ["ours", "ours"] and (alone["images"] == 4).all()
    assert (alone["image_seconds"] > 0).all() and (alone["tuning_seconds"] == 0).all()
    head = {"variant": "all_classes", "artists": "all", "arm": "frozen SAM", "iou_type": "bbox"}
    rows = [(*part, 1, 0, 2) for part in (("base", 1), ("base", 2), ("novel", 1), ("novel", 2))]
    table = pd.DataFrame(rows, columns=["split", "shots", "AP", "low", "high"]).assign(**head)
    cost = {"arm": "frozen SAM", "tuning_seconds": 60, "image_seconds": 0.5, "images": 3}
    figures.mkdir(exist_ok=True)
    pd.concat([table, table.assign(variant="class_oracle", AP=99)]).to_csv(figures / "02_icl_ap.csv")
    pd.DataFrame([cost]).to_csv(figures / "02_cost.csv")
    same = small.run.facts["target_data"], ["in context, frozen SAM"] * 2 + ["ours"] * 2, 3
    for targets, methods, images in (same, ("others", ["ours"] * 2, 4)):
        write_json(figures / "02_icl_ap.json", {"recorded": {"target_data": targets}})
        table = diagnosis.head_to_head(small, ways)
        assert table["method"].tolist() == methods and (table["images"] == images).all()


def test_likeness(small: Pipeline) -> None:
    image = coco.read_image(small.data.targets, next(iter(small.data.targets.images)))
    heat = explorer.likeness_map(small.models["dinov2"], image, (68.0, 28.0))
    assert heat.shape == (image.height, image.width)
    assert heat.max() <= 1 + 1e-6 and heat[28, 68] > 0.9  # the middle of a token
    refused("lies outside the image", explorer.likeness_map, small.models["sam"], image, (500.0, 30.0))
    assert len(explorer.likeness_figure(small.models, image, (68.0, 28.0)).axes) == 5
    plt.close("all")


def test_incomplete_own_data_and_scales_without_data(small: Pipeline) -> None:
    refused("own data needs --ref.* and --images: --targets is missing", load_data, small.run, references="x.json")
    refused("scale paper needs COCO files", load_data, start_run("paper", "99_test"))


BOXES = [(0, 0, 20, 20), (30, 0, 50, 20), (0, 30, 20, 50), (40, 40, 58, 58)]


def scene() -> coco.CocoDataset:
    """Four objects of classes 1, 1, 2, 2 and an image without any."""
    return box_dataset((1, 2), 2, (box_object(n + 1, 1, 1 + n // 2, box) for n, box in enumerate(BOXES)))


RESULTS = [
    box_result(1, 1, BOXES[0], 0.9),
    box_result(1, 1, (1, 0, 21, 20), 0.8),  # the same object again
    box_result(1, 2, BOXES[1], 0.7),  # wrong class
    box_result(1, 2, (0, 40, 20, 60), 0.6),  # a third of the object
    box_result(1, 1, (0, 42, 20, 60), 0.5),  # as badly placed, and wrong
    box_result(1, 1, (22, 22, 28, 28), 0.4),
    box_result(2, 1, (0, 0, 9, 9), 0.3),
]


def ap(results: list[Result], figure: str = "AP50") -> float:
    return evaluate(scene(), results, "segm").metrics[figure] or 0.0


def test_verdicts() -> None:
    found = diagnosis.verdicts(scene(), RESULTS)
    kinds = ["correct", "duplicate", "class", "location", "both", "background", "background"]
    assert found["kind"].tolist() == kinds
    assert [None if o is None else o.id for o in found["object"]] == [1, None, 2, 3, None, None, None]
    better = diagnosis.verdicts(scene(), [box_result(1, 1, BOXES[0], 0.1), box_result(1, 1, (1, 0, 21, 20), 0.8)])
    assert better["kind"].tolist() == ["duplicate", "correct"]  # better-scored results take the object


def test_error_table() -> None:
    dataset = scene()
    table = diagnosis.error_table(dataset, RESULTS, diagnosis.verdicts(dataset, RESULTS)).set_index("kind")
    assert table["count"].to_dict() == dict(zip(diagnosis.KINDS, (1, 1, 1, 1, 2, 1), strict=True))
    assert table["share"].sum() == pytest.approx(100)
    mended = [*RESULTS[:2], {**RESULTS[2], "category_id": 1}, *RESULTS[3:]]
    assert table.loc["class", "gain"] == pytest.approx(ap(mended) - ap(RESULTS))
    assert (table["gain"] >= -1e-9).all()

    truth = [box_result(1, 1 + n // 2, box, 1.0) for n, box in enumerate(BOXES)]
    none = diagnosis.error_table(dataset, truth, diagnosis.verdicts(dataset, truth))
    assert none["count"].sum() == 0 and np.allclose(none["gain"], 0)
    crowd = box_object(9, 1, 1, (0, 0, 64, 64), crowd=True)  # is no object, and so is not missed
    crowded = dataclasses.replace(dataset, instances=(*dataset.instances, crowd))
    everything = diagnosis.error_table(crowded, [], diagnosis.verdicts(crowded, []))
    assert len(objects_of(crowded, 1)) == 4 and everything.set_index("kind")["count"].to_dict()["missed"] == 4


def test_oracles() -> None:
    dataset = scene()
    found = {1: box_proposals([*BOXES[:3], (40, 40, 58, 52), (5, 5, 15, 15)]), 2: box_proposals([])}
    named = diagnosis.with_true_classes(dataset, found)
    assert [r["category_id"] for r in named] == [1, 1, 2, 2]  # the part of an object below IoU 0.5 is dropped
    assert all(r["score"] > 0 for r in named)
    assert ap(diagnosis.best_masks(dataset, found)) == pytest.approx(100)
    true = true_masks(dataset)
    assert len(true[1]) == 4 and len(true[2]) == 0
    assert ap(diagnosis.best_masks(dataset, true), "AP") == pytest.approx(100)


def test_recall_ceiling() -> None:
    """IoU of the objects' best proposals: 1, 1, 0 and 12 / 18, which passes four of the ten thresholds."""
    recall = diagnosis.recall(scene(), {1: box_proposals([*BOXES[:2], (40, 40, 58, 52)]), 2: box_proposals([])})
    assert recall.value == pytest.approx(100 * (1 + 1 + 0 + 0.4) / 4)
    assert recall.low <= 60 <= recall.high


def test_wholes_parts_and_others() -> None:
    """An object, three fifths of one (still the object), a fifth of one, half beside one, and the whole image."""
    masks = [BOXES[0], (30, 0, 50, 12), (0, 30, 20, 34), (10, 0, 30, 20), (0, 0, 64, 64)]
    assert diagnosis.proposal_kinds(scene(), 1, coco.rles_of(box_masks(masks))).tolist() == [2, 1, 2]
    assert diagnosis.proposal_kinds(scene(), 1, []).tolist() == [0, 0, 0]
    assert diagnosis.proposal_kinds(scene(), 2, coco.rles_of(box_masks(BOXES[:1]))).tolist() == [0, 0, 1]


def test_best_results_and_order_of_images() -> None:
    """Image 1 has four objects, so its four best-scored results count; image 2 has none."""
    dataset = scene()
    best = diagnosis.best_results(dataset, diagnosis.verdicts(dataset, RESULTS[::-1]))
    assert best["kind"].tolist() == ["correct", "duplicate", "class", "location"]
    assert best.index.tolist() == [6, 5, 4, 3]
    assert diagnosis.ranked_images(dataset, best).to_numpy().tolist() == [[1, 4, 1, 0.25]]
    assert len(diagnosis.ranked_images(dataset, best, least=99)) == 1  # those with the most objects stand for them
    assert diagnosis.confusions(best, dataset.categories).to_numpy().tolist() == [["c1", "c2", 1]]
