"""Claims: every verdict by its rule, what turns it, and the tables that it is read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from samantics.errors import StudyError
from samantics.metrics.claims import COLUMNS, chance, evidence, evidence_row, findings, holm, judge
from samantics.metrics.intervals import Difference, Interval, paired_difference

CLAIMS = ("C1", "C2", "C3", "C4", "C5")


def rows_of(claim: str, *comparisons: tuple[float, float, float], check: float = 50.0) -> list[dict[str, Any]]:
    """A check with an aim of 40 and comparisons with a smallest effect of 5."""
    found = [evidence_row(claim, "check", "clip", "", "artist", "zero_shot", check, 40)]
    for value in comparisons:
        difference = Difference(*value, 0.001)
        found.append(evidence_row(claim, "comparison", "clip", "sam2", "artist", "linear", difference, 5))
    return found


def verdicts(rows: list[dict[str, Any]], **options: float) -> dict[str, str]:
    table = judge(pd.DataFrame(rows, columns=[*COLUMNS, "others"]), **options)
    return dict(zip(table["claim"], table["verdict"], strict=True))


FAR, NEAR, NONE = (30.0, 27.0, 33.0), (9.0, 4.9, 13.1), (1.0, -0.5, 2.5)


@pytest.mark.parametrize(
    ("comparisons", "check", "expected"),
    [
        ([FAR], 50.0, "supported"),
        ([FAR], 40.0, "supported"),  # an aim is reached when it is met
        ([FAR], 39.9, "not testable"),
        ([FAR, FAR], 50.0, "supported"),
        ([FAR, NEAR], 50.0, "undecided"),
        ([FAR, NONE], 50.0, "not supported"),
        ([NONE], 50.0, "not supported"),
        ([(-30.0, -33.0, -27.0)], 50.0, "not supported"),  # a difference the other way round
        ([(7.0, 5.3, 8.7)], 50.0, "undecided"),  # above its effect, but not for five claims at once
        ([], 50.0, "not testable"),
        ([FAR, (np.nan, np.nan, np.nan)], 50.0, "undecided"),  # there was nothing to measure it on
        ([FAR], np.nan, "not testable"),
    ],
)
def test_a_claim_follows_its_rule(comparisons: list[Any], check: float, expected: str) -> None:
    found = verdicts(rows_of("C1", *comparisons, check=check))
    assert found == {"C1": expected} | dict.fromkeys(CLAIMS[1:], "not measured")


def test_a_claim_without_a_check_is_not_testable() -> None:
    assert verdicts(rows_of("C5", FAR)[1:])["C5"] == "not testable"


def test_c4_waits_for_c3() -> None:
    assert verdicts(rows_of("C3", FAR) + rows_of("C4", FAR))["C4"] == "supported"
    assert verdicts(rows_of("C3", NONE) + rows_of("C4", FAR))["C4"] == "not testable"
    assert verdicts(rows_of("C3", FAR))["C4"] == "not measured"


@pytest.mark.parametrize(("claim", "expected"), [("C1", "supported"), ("C2", "undecided"), ("C5", "supported")])
def test_where_a_model_is_trained_within_the_run_another_processor_must_not_turn_the_verdict(
    claim: str, expected: str
) -> None:
    close = (12.0, 8.0, 16.0)  # half its width lower, its end is 4: below the effect of 5
    rows = rows_of(claim, close)
    assert verdicts(rows)[claim] == expected and verdicts(rows, processor=0)[claim] == "supported"


def test_p_and_interval_agree_at_the_end_of_the_interval() -> None:
    row = {"difference": 10.0, "low": 5.0, "high": 13.0, "effect_of_interest": 5.0}
    assert chance(row, 1) == pytest.approx(0.05) and chance(row, -1) == 1.0
    assert chance(row | {"effect_of_interest": 13.0}, -1) == pytest.approx(0.05)
    certain = row | {"low": 10.0, "high": 10.0}
    assert chance(certain, 1) == 0.0 and chance(certain | {"effect_of_interest": 10.0}, 1) == 1.0


def test_holm_as_in_his_example() -> None:
    """Three tests at 0.01, 0.02 and 0.03: 0.03, 0.04, and never below a smaller one's."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_verdict_that_another_seed_turns_is_undecided() -> None:
    def judged(**others: list[float]) -> str:
        rows = rows_of("C1", FAR)
        rows.append(evidence_row("C1", "comparison", "a", "b", "", "", Difference(*FAR, 0.001, others), 5))
        return verdicts(rows)["C1"]

    assert judged() == judged(one=[28, 25, 31]) == "supported"
    assert judged(one=[28, 25, 31], other=[9, 4.9, 13]) == "undecided"
    low_check = evidence_row("C1", "check", "a", "", "", "", Difference(6, 4, 8, 0.001, {"one": [4.0, 2.0, 6.0]}), 5)
    assert verdicts([*rows_of("C1", FAR), low_check])["C1"] == "undecided"


def test_differences_know_what_other_seeds_say() -> None:
    rng = np.random.default_rng(0)
    more, less = rng.random((2, 3, 50))
    found = paired_difference(more, less, np.repeat(np.arange(25), 2))
    assert found.others is not None and len(found.others) == 3 + 3
    without = paired_difference(more[:2], less[:2], np.repeat(np.arange(25), 2))
    assert found.others["without seed 2"] == pytest.approx(without[:3])
    assert found.others["bootstrap 1"] == pytest.approx(paired_difference(more, less, np.arange(50) // 2, seed=1)[:3])


def test_paired_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """1,000 experiments: 200 classes of two items that two models answer alike; the truth is 0.05."""
    rng, held, clusters = np.random.default_rng(1), 0, np.repeat(np.arange(200), 2)
    for experiment in range(1000):
        hard, taste = rng.normal(size=(2, 200))[:, clusters]
        less = hard + rng.normal(size=400)
        more = hard + 0.05 + 0.5 * taste + rng.normal(size=400)
        found = paired_difference(more, less, clusters, seed=experiment, samples=200)
        held += found.low <= 0.05 <= found.high
    assert 0.93 <= held / 1000 <= 0.97


def test_tables_are_read_and_a_missing_column_is_named(tmp_path: Path) -> None:
    assert evidence(tmp_path).empty and set(findings(tmp_path)["verdict"]) == {"not measured"}
    table = pd.DataFrame(rows_of("C5", FAR))
    table.assign(verdict="", p_holm=0.1).to_csv(tmp_path / "03_differences.csv", index=False)
    read = evidence(tmp_path)
    assert read.columns.tolist() == [*COLUMNS, "others"] and read["less"].tolist() == ["", "sam2"]
    row = findings(tmp_path).set_index("claim").loc["C5"]
    assert (row["measured"], row["low"], row["high"], row["effect_of_interest"]) == (*FAR, 5)
    assert (row["check"], row["check_value"]) == ("clip (artist, zero_shot)", 50)
    assert (row["verdict"], row["source"]) == ("supported", "03_differences.csv")
    table.drop(columns="level").to_csv(tmp_path / "03_differences.csv", index=False)
    with pytest.raises(StudyError, match=r"03_differences\.csv has no column level: run notebook 03 again"):
        findings(tmp_path)


def test_a_row_of_evidence_takes_numbers_with_and_without_intervals() -> None:
    row = evidence_row("C1", "check", "clip", "", "artist", "zero_shot", Interval(41.0, 39.0, 43.0), 40)
    assert list(row) == [*COLUMNS, "others"] and row["low"] == 39 and np.isnan(row["p"])
    with pytest.raises(ValueError, match="a check or a comparison"):
        evidence_row("C1", "test", "clip", "", "artist", "zero_shot", 1.0, 40)
