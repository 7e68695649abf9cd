"""The whole way of notebook 03 at its smallest, on untrained models: tables, cache, own data, figures, explorer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from samantics.data import coco
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.run import Run, start_run
from samantics.training_free import diagnosis, explorer
from samantics.training_free import figures as pipeline_figures
from samantics.training_free import pipeline as pipelines
from samantics.training_free.pipeline import Pipeline, Variant

COLUMNS = "proposals,source,merging,shots,iou_type,AP,AP50,AP75,APs,APm,APl,AR1,AR10,AR100,low,high,seeds"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return pipelines.start(small_run(tmp_path_factory.mktemp("run")), weights="zoo_random")


def small_run(folder: Path) -> Run:
    run = start_run("pocket", "99_test", seed=3)
    settings = dataclasses.replace(
        run.scale.pipeline,
        reference_scenes=12,
        target_scenes=4,
        points_per_side=2,
        predicted_iou=0.0,
        shots=2,
        shot_curve=(1, 2),
        grids=(1, 2),
        grid_images=2,
        reference_seeds=2,
    )
    scale = dataclasses.replace(run.scale, pipeline=settings)
    return dataclasses.replace(run, scale=scale, figures=folder / "figures", cache=folder / "cache")


@pytest.fixture(autouse=True)
def _own_cache(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(small.run.cache))


def test_table_has_the_contract_and_is_kept(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [Variant(source=source, shots=2) for source in ("dinov2", "random")]
    table = pipelines.ap_table(small, variants)
    assert list(table.columns) == [*COLUMNS.split(","), "scoring"]
    assert table["seeds"].eq(2).all() and len(table) == 4
    assert ((table["low"] <= table["AP"] + 1e-9) & (table["AP"] <= table["high"] + 1e-9)).all()

    def refuse(*_: object) -> None:
        raise AssertionError("predicted again")

    monkeypatch.setattr(Pipeline, "predict", refuse)
    assert pipelines.ap_table(small, variants).equals(table)
    with pytest.raises(AssertionError, match="predicted again"):
        pipelines.ap_table(small, [Variant(source="dinov2", shots=1)])


def test_truth_scores_100_and_is_the_last_oracle(small: Pipeline) -> None:
    assert np.allclose(pipelines.truth_rows(small)["AP"].to_numpy(float), 100)
    table = pipelines.oracle_table(small, Variant(shots=2))
    assert list(table.columns) == ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    assert set(table["oracle"]) == set(pipeline_figures.STEPS)
    masks = table[table["iou_type"] == "segm"].set_index("oracle")
    assert masks.loc["truth", "AP"] == pytest.approx(100)
    assert masks.loc["best_mask", "AR100"] <= masks.loc["recall_ceiling", "AR100"] + 1e-9


def test_references_are_train_drawings_only(small: Pipeline) -> None:
    groups = [group for chosen in small.references.values() for group in chosen.values()]
    assert groups and not any(instance.held_out for group in groups for instance in group)
    assert any(instance.held_out for instance in small.data.targets.instances)


def test_gallery_order(small: Pipeline) -> None:
    results = small.predict(Variant(shots=2))
    judged = diagnosis.verdicts(small.data.targets, results)
    found = pipelines.top_results(small, results, judged)
    counts = found.groupby("image_id").size()
    assert all(counts[n] <= len(small.data.targets.by_image[n]) for n in counts.index)
    order = pipelines.ranked_images(small, found)
    assert order["share"].is_monotonic_decreasing and (order["objects"] >= 3).all()
    most = pipelines.ranked_images(small, found, least=99)  # no image has so many: those with the most stand for them
    assert len(most) and (most["objects"] == order["objects"].max()).all()
    confused = pipelines.confusions(small, Variant(proposals="truth", shots=2))
    assert (confused["true"] != confused["predicted"]).all()


def test_figures_can_be_drawn(small: Pipeline) -> None:
    image_id = next(iter(small.data.targets.images))
    results = small.predict(Variant(shots=2))
    table = pipelines.ap_table(small, [Variant(source=s, shots=k) for s in ("dinov2", "random") for k in (1, 2)])
    judged = diagnosis.verdicts(small.data.targets, results)
    found = pipelines.top_results(small, results, judged)
    scores = np.random.default_rng(0).random((len(small.proposals("sam")[image_id]), 3)).astype(np.float32)
    pipeline_figures.references_figure(small)
    pipeline_figures.step_figure(small, image_id, scores, results[:2])
    pipeline_figures.gallery_figure(small, pipelines.ranked_images(small, found), found)
    pipeline_figures.predictions_figure(small, [image_id], results)
    pipeline_figures.sources_figure(table[table["shots"] == 2], with_paper=True)
    pipeline_figures.shots_figure(table)
    pipeline_figures.merging_figure(table[table["shots"] == 2])
    pipeline_figures.oracle_figure(pipelines.oracle_table(small, Variant(shots=2)))
    pipeline_figures.error_figure(diagnosis.error_table(small.data.targets, results, judged))
    pipeline_figures.size_figure(pipelines.size_table(small))
    pipeline_figures.grid_figure(pipelines.grid_table(small))
    plt.close("all")


def test_explorer(small: Pipeline) -> None:
    image_id = next(iter(small.data.targets.images))
    image = coco.read_image(small.data.targets, image_id)
    heat = explorer.likeness_map(small.models["dinov2"], image, (70.0, 30.0))
    assert heat.shape == (image.height, image.width)
    assert heat.max() <= 1 + 1e-6 and heat[30, 70] > 0.95
    with pytest.raises(StudyError, match="lies outside the image"):
        explorer.likeness_map(small.models["sam"], image, (500.0, 30.0))
    maps, masks, clicked = explorer.static_view(small, image_id, (70.0, 30.0))
    assert len(maps.axes) == 5 and len(masks.axes) == 3
    assert clicked.masks.shape == (3, image.height, image.width) and len(clicked.classes) == 3
    box = explorer.widget(small)
    assert len(box.children[1].children) == explorer.CELLS**2  # type: ignore[attr-defined]
    plt.close("all")


def own_files(small: Pipeline, folder: Path, annotated: bool) -> dict[str, str]:
    """The small world's files as a user's own: images in sub-folders, targets with or without annotations."""
    content = json.loads(small.data.targets.path.read_text())
    if not annotated:
        del content["annotations"]
    (folder / "targets.json").write_text(json.dumps(content))
    for name, dataset in (("train", small.data.references), ("val", small.data.targets)):
        (folder / name).mkdir()
        for record in dataset.images.values():
            (folder / name / record.file).symlink_to(dataset.folder / record.file)
    content = json.loads(small.data.references.path.read_text())
    for entry in content["images"]:
        entry["file_name"] = f"train/{entry['file_name']}"
    (folder / "references.json").write_text(json.dumps(content))
    for entry in json.loads((folder / "targets.json").read_text())["images"]:
        (folder / "val" / entry["file_name"]).rename(folder / "val" / f"t{entry['file_name']}")
    text = (folder / "targets.json").read_text().replace('"file_name": "0', '"file_name": "t0')
    (folder / "targets.json").write_text(text)
    return {n: str(folder / f"{n}.json") for n in ("references", "targets")} | {"images": str(folder)}


@pytest.mark.parametrize("annotated", [True, False])
def test_own_data(small: Pipeline, tmp_path: Path, annotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "ReferenceRule", lambda **_: small.data.rule)
    files = own_files(small, tmp_path, annotated)
    own = pipelines.start(small_run(tmp_path), **files, weights="zoo_random")
    assert own.run.figures.name == "own_data"
    assert own.data.targets.annotated == annotated
    results = own.predict(Variant(shots=2))
    assert {r["image_id"] for r in results} <= set(own.data.targets.images)
    assert [r["category_id"] for r in results] == [r["category_id"] for r in small.predict(Variant(shots=2))]


def test_incomplete_own_data_and_scales_without_data(small: Pipeline) -> None:
    with pytest.raises(StudyError, match="own data needs --references, --targets and --images: --targets is missing"):
        pipelines.load_data(small.run, references="x.json")
    with pytest.raises(StudyError, match="scale paper needs COCO files"):
        pipelines.load_data(start_run("paper", "99_test"))


def test_worlds_differ_between_reference_and_target() -> None:
    world = mojiworld.World(seed=3)
    first, second = (mojiworld.scene(world, stream, 0, 0.0).image for stream in ("references", "targets"))
    assert not np.array_equal(first, second)
