"""Claims: every rule decides for and against; open comparisons, weak models and missing tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from samantics.errors import StudyError
from samantics.metrics import claims
from samantics.metrics.claims import Comparison, by_factor, evidence, findings, origins, unfit_models, verdict, zoo_aims
from samantics.metrics.intervals import Interval
from samantics.run import Run


def write_probes(folder: Path, drawing: dict[str, float], category: dict[str, float], width: float = 1.0) -> None:
    rows = [
        {"encoder": encoder, "labels": labels, "probe": probe, "layer": layer, "pooling": "mean", "seeds": 3}
        | {"top1": value, "top1_low": value - width, "top1_high": value + width}
        for labels, values in (("drawing", drawing), ("category", category))
        for encoder, value in values.items()
        for probe, layer in (("linear", "final"), ("knn", "final"), ("linear", "block_01"))
    ]
    for row in rows:  # only the headline rows may count
        if row["probe"] == "knn" or row["layer"] == "block_01":
            row |= {"top1": 99.0, "top1_low": 99.0, "top1_high": 99.0}
    pd.DataFrame(rows).to_csv(folder / "01_zoos.csv", index=False)


PAPER_LIKE = {"sam": 11.0, "sam2": 23.0, "clip": 74.0, "dinov2": 77.0}
ALIKE = {"sam": 30.0, "sam2": 30.5, "clip": 31.0, "dinov2": 29.5}


def row_of(folder: Path, claim: str) -> dict[Any, Any]:
    return {row["claim"]: row for row in findings(folder).to_dict("records")}[claim]


def test_without_tables_nothing_is_measured(tmp_path: Path) -> None:
    table = findings(tmp_path)
    assert table["claim"].tolist() == ["C1", "C2", "C3", "C4", "C5"]
    assert set(table["verdict"]) == {"not measured"} and table["measured"].isna().all()
    assert evidence(tmp_path).empty
    columns = ["claim", "statement", "paper", "measured", "low", "high", "verdict", "source"]
    assert table.columns.tolist() == columns


def test_probing_as_in_the_paper_supports_c1(tmp_path: Path) -> None:
    write_probes(tmp_path, PAPER_LIKE, PAPER_LIKE)
    row = row_of(tmp_path, "C1")
    assert (row["verdict"], row["measured"], row["low"], row["high"]) == ("supported", 51.0, 49.0, 53.0)
    assert row["source"] == "01_zoos.csv (3 seeds)"


@pytest.mark.parametrize(
    ("drawing", "category", "expected"),
    [
        (ALIKE, ALIKE, "not supported"),
        (PAPER_LIKE, ALIKE, "partly"),
        (PAPER_LIKE | {"sam2": 11.0}, PAPER_LIKE, "partly"),
        (PAPER_LIKE | {"sam2": 36.0}, PAPER_LIKE, "partly"),  # two intervals apart, but not by a factor of two
        (PAPER_LIKE | {"dinov2": 12.0}, ALIKE, "partly"),
    ],
)
def test_c1_follows_its_rule(
    drawing: dict[str, float], category: dict[str, float], expected: str, tmp_path: Path
) -> None:
    write_probes(tmp_path, drawing, category)
    assert row_of(tmp_path, "C1")["verdict"] == expected


@pytest.mark.parametrize(
    ("novel", "control", "expected"), [(5.0, 3.0, "supported"), (5.0, 30.0, "partly"), (35.0, 30.0, "not supported")]
)
def test_c2_follows_its_rule(novel: float, control: float, expected: str, tmp_path: Path) -> None:
    values = [("class_oracle", "base", 40.0), ("class_oracle", "novel", novel)]
    values += [
        (name, split, control) for name in ("wrong_reference", "random_reference") for split in ("base", "novel")
    ]
    rows = [
        {"variant": variant, "split": split, "shots": shots, "iou_type": kind, "seeds": 3}
        | {"AP": value if (shots, kind) == (10, "bbox") else 0.0, "low": value - 1, "high": value + 1}
        for variant, split, value in values
        for shots in (1, 10)
        for kind in ("bbox", "segm")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "02_icl_ap.csv", index=False)
    row = row_of(tmp_path, "C2")
    assert row["verdict"] == expected and row["measured"] == 40.0 - novel


def write_separability(folder: Path, values: dict[tuple[str, str], float], shuffled: float) -> None:
    rows = [
        {"stage": stage, "split": split, "metric": metric, "value": value, "low": value - 0.02, "high": value + 0.02}
        | {"shuffled": shuffled}
        for (stage, split), value in values.items()
        for metric in ("silhouette", "knn", "nmi", "linear")
    ]
    pd.DataFrame(rows).to_csv(folder / "02_separability.csv", index=False)


def test_c3_and_c4_count_what_is_above_shuffled_labels(tmp_path: Path) -> None:
    values = {("before", "base"): 0.15, ("before", "novel"): 0.15, ("after", "base"): 0.6, ("after", "novel"): 0.2}
    write_separability(tmp_path, values, shuffled=0.1)
    assert (row_of(tmp_path, "C3")["verdict"], row_of(tmp_path, "C4")["verdict"]) == ("supported", "supported")
    assert row_of(tmp_path, "C3")["measured"] == pytest.approx(0.45)
    write_separability(tmp_path, values | {("before", "base"): 0.4}, shuffled=0.1)
    assert row_of(tmp_path, "C3")["verdict"] == "not supported"
    write_separability(tmp_path, values | {("after", "novel"): 0.55}, shuffled=0.1)
    assert row_of(tmp_path, "C4")["verdict"] == "not supported"


def write_pipeline(folder: Path, ap: dict[str, float]) -> None:
    rows = [
        {"proposals": proposals, "source": source, "merging": merging, "shots": shots, "iou_type": kind, "seeds": 3}
        | {"AP": value, "low": value - 0.5, "high": value + 0.5}
        for source, value in ap.items()
        for proposals, merging, shots in (
            ("sam", "none", 10),
            ("sam", "soft", 10),
            ("sam2", "none", 30),
            ("sam", "none", 1),
        )
        for kind in ("bbox", "segm")
    ]
    table = pd.DataFrame(rows)
    lone = table.tail(1).assign(source="dinov2", shots=50, AP=99.0)  # nothing to compare with
    chosen = (table["proposals"] == "sam") & (table["merging"] == "none") & (table["shots"] == 10)
    table.loc[~chosen, ["AP", "low", "high"]] = 50.0
    pd.concat([table, lone]).to_csv(folder / "03_pipeline_ap.csv", index=False)


@pytest.mark.parametrize(("sam", "expected"), [(5.0, "supported"), (12.0, "partly"), (11.0, "partly")])
def test_c5_follows_its_rule(sam: float, expected: str, tmp_path: Path) -> None:
    write_pipeline(tmp_path, {"dinov2": 11.3, "sam": sam, "random": 2.0})
    row = row_of(tmp_path, "C5")
    assert (row["verdict"], row["measured"]) == (expected, 11.3)


def test_other_data_has_one_level_of_label(tmp_path: Path) -> None:
    write_probes(tmp_path, PAPER_LIKE, PAPER_LIKE)
    table = pd.read_csv(tmp_path / "01_zoos.csv")
    table[table["labels"] == "drawing"].assign(labels="class").to_csv(tmp_path / "01_zoos.csv", index=False)
    assert row_of(tmp_path, "C1")["verdict"] == "supported" and len(evidence(tmp_path)) == 2


def test_verdicts_by_factor_fall(tmp_path: Path) -> None:
    write_pipeline(tmp_path, {"dinov2": 11.3, "sam": 5.0, "random": 2.0})
    verdicts = by_factor(tmp_path, (1, 2, 6)).to_dict("index")["C5"]
    assert verdicts == {"1x": "supported", "2x": "partly", "6x": "not supported"}
    assert set(by_factor(tmp_path).loc["C1"]) == {"not measured"}


def test_origins_name_the_run_of_each_table(pocket_run: Run) -> None:
    pocket_run.save(None, pd.DataFrame({"a": [1]}), "01_zoos")
    rows = origins(pocket_run.figures).set_index("table")
    assert rows.loc["01_zoos.csv", "seed"] == 3 and rows.loc["02_icl_ap.csv", "seed"] == ""


def test_missing_row_is_named(tmp_path: Path) -> None:
    write_probes(tmp_path, {"sam": 1.0}, {"sam": 1.0})
    with pytest.raises(StudyError, match="no row with encoder=clip, labels=drawing"):
        findings(tmp_path)
    write_pipeline(tmp_path, {"dinov2": 11.3})
    (tmp_path / "01_zoos.csv").unlink()
    with pytest.raises(StudyError, match="no setting with dinov2, sam and random"):
        findings(tmp_path)


def test_a_comparison_needs_its_whole_intervals_apart() -> None:
    def holds(more: Interval, less: Interval, factor: float) -> bool:
        return Comparison("", more, less, factor, "").holds

    assert holds(Interval(10, 9, 11), Interval(5, 4, 6), 1)
    assert not holds(Interval(10, 9, 11), Interval(8, 7, 9.5), 1)
    assert not holds(Interval(10, 9, 11), Interval(4.4, 4.2, 4.6), 2)
    assert not holds(Interval(-0.08, -0.09, -0.07), Interval(-0.06, -0.07, -0.05), 2)  # below, and both below nothing
    assert verdict([]) == "not measured"


def test_what_another_processor_could_turn_stays_open() -> None:
    close = Comparison("", Interval(0.015, 0.004, 0.026), Interval(-0.01, -0.02, 0.0), 2.0, "", tolerance=0.5)
    clear = dataclasses.replace(close, more=Interval(0.5, 0.45, 0.55))
    fails = dataclasses.replace(close, more=Interval(-0.5, -0.55, -0.45))
    assert close.holds and close.is_open(()) and not dataclasses.replace(close, tolerance=0.0).is_open(())
    assert clear.holds and not clear.is_open(()) and not fails.holds and not fails.is_open(())
    assert verdict([close, fails]) == "not supported" and verdict([close, clear]) == "partly"
    assert verdict([close]) == "undecided" and verdict([]) == "not measured"


def test_summary_holds_the_judged_numbers(tmp_path: Path) -> None:
    write_probes(tmp_path, PAPER_LIKE, ALIKE)
    write_pipeline(tmp_path, {"dinov2": 11.3, "sam": 5.0, "random": 2.0, "clip": 9.0})
    values = {("before", "base"): 0.15, ("before", "novel"): 0.15, ("after", "base"): 0.6, ("after", "novel"): 0.3}
    write_separability(tmp_path, values, shuffled=0.1)
    shown = {name: rows["value"].round(6).tolist() for name, rows in claims.summary(tmp_path).groupby("claims")}
    assert shown == {"C1": list(PAPER_LIKE.values()), "C3, C4": [5.0, 50.0, 5.0, 20.0], "C5": [5.0, 9.0, 11.3, 2.0]}


def write_quality(folder: Path, share: dict[str, float]) -> None:
    aims = pd.read_csv(claims.ASSETS / "aims.csv")
    table = aims.assign(value=[aim * share.get(e, 1.0) for e, aim in zip(aims["encoder"], aims["aim"], strict=True)])
    bound = pd.DataFrame([{"encoder": "sam", "measure": aims["ceiling"][0], "value": 86.0}])
    pd.concat([table, bound]).to_csv(folder / "00_zoo_quality.csv", index=False)


@pytest.mark.parametrize(
    ("share", "probes", "expected"),
    [
        ({}, PAPER_LIKE, "supported"),
        ({"clip": 0.81, "sam": 0.81}, PAPER_LIKE, "supported"),
        ({"clip": 0.5}, PAPER_LIKE, "supported"),  # a weak CLIP could only hide the gap
        ({"clip": 0.5}, ALIKE, "not supported"),  # SAM 2 is not above SAM, whatever CLIP does: the rest is open
        ({"clip": 0.5, "sam2": 0.5}, ALIKE, "not measured"),
        ({"dinov2": 0.7}, PAPER_LIKE | {"dinov2": 12.0}, "partly"),
        ({"sam": 0.79}, PAPER_LIKE, "not measured"),  # a weak SAM could have made it
    ],
)
def test_a_weak_model_decides_nothing_that_its_weakness_could_have_made(
    share: dict[str, float], probes: dict[str, float], expected: str, tmp_path: Path
) -> None:
    write_probes(tmp_path, probes, probes)
    write_quality(tmp_path, share)
    assert unfit_models(tmp_path) == tuple(
        name for name in ("sam", "sam2", "clip", "dinov2") if share.get(name, 1.0) < 0.8
    )
    assert row_of(tmp_path, "C1")["verdict"] == expected
    aims = zoo_aims(tmp_path)
    assert aims["ceiling"].dropna().tolist() == [86, 86] and set(aims.dropna()["encoder"]) == {"sam"}
    assert aims["reached"].tolist() == pytest.approx([share.get(name, 1.0) for name in aims["encoder"]])
