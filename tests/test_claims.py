"""Claims: every verdict by its rule, what turns it, its tables; intervals against SciPy's; guesses."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from refusals import refused
from samantics.cache import write_json
from samantics.metrics import ledger
from samantics.metrics.claims import COLUMNS, chance, evidence, evidence_row, holm, judge
from samantics.metrics.intervals import Difference, bootstrap_mean, bootstrap_statistic, paired_difference

CLAIMS = ("C1", "C2", "C3", "C4", "C5")


def rows_of(claim: str, *comparisons: Any, check: float | None = 50.0) -> list[dict[str, Any]]:
    """A check with an aim of 40 and comparisons with a smallest effect of 5."""
    found = [] if check is None else [evidence_row(claim, "check", "clip", "", "artist", "zero_shot", check, 40)]
    pair = claim, "comparison", "clip", "sam2", "artist", "linear"
    return found + [evidence_row(*pair, Difference(*value[:3], 0.001, *value[3:]), 5) for value in comparisons]


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
        ([FAR], None, "not testable"),  # without a check
        ([FAR, (np.nan, np.nan, np.nan)], 50.0, "undecided"),  # there was nothing to measure it on
        ([FAR], np.nan, "not testable"),
    ],
)
def test_a_claim_follows_its_rule(comparisons: list[Any], check: float | None, expected: str) -> None:
    found = verdicts(rows_of("C1", *comparisons, check=check))
    assert found == {"C1": expected} | dict.fromkeys(CLAIMS[1:], "not measured")


def test_c4_waits_for_c3() -> None:
    assert verdicts(rows_of("C3", FAR) + rows_of("C4", FAR))["C4"] == "supported"
    assert verdicts(rows_of("C3", NONE) + rows_of("C4", FAR))["C4"] == "not testable"
    assert verdicts(rows_of("C3", FAR))["C4"] == "not measured"


def test_where_a_model_is_trained_within_the_run_another_processor_must_not_turn_the_verdict() -> None:
    for claim, expected in (("C1", "supported"), ("C2", "undecided"), ("C5", "supported")):
        rows = rows_of(claim, (12.0, 8.0, 16.0))  # half its width lower, its end is 4: below the effect of 5
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
    def judged(check: Any = 50.0, **others: list[float]) -> str:
        return verdicts(rows_of("C1", FAR, (*FAR, others), check=check))["C1"]

    assert judged() == judged(one=[28, 25, 31]) == "supported"
    assert judged(one=[28, 25, 31], other=[9, 4.9, 13]) == "undecided"
    assert judged(Difference(46, 44, 48, 0.001, {"one": [34.0, 32.0, 36.0]})) == "undecided"


def test_differences_know_what_other_seeds_say() -> None:
    more, less = np.random.default_rng(0).random((2, 3, 50))
    clusters = np.repeat(np.arange(25), 2)
    found = paired_difference(more, less, clusters)
    assert found.others is not None and len(found.others) == 3 + 3
    assert found.others["without seed 2"] == pytest.approx(paired_difference(more[:2], less[:2], clusters)[:3])
    assert found.others["bootstrap 1"] == pytest.approx(paired_difference(more, less, clusters, seed=1)[:3])


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
    assert evidence(tmp_path).empty and set(judge(evidence(tmp_path))["verdict"]) == {"not measured"}
    table = pd.DataFrame(rows_of("C5", FAR))
    table.assign(verdict="", p_holm=0.1).to_csv(tmp_path / "03_differences.csv", index=False)
    read = evidence(tmp_path)
    assert read.columns.tolist() == [*COLUMNS, "others"] and read["less"].tolist() == ["", "sam2"]
    row = judge(evidence(tmp_path)).set_index("claim").loc["C5"]
    assert (row["measured"], row["low"], row["high"], row["effect_of_interest"]) == (*FAR, 5)
    assert (row["check"], row["check_value"]) == ("clip (artist, zero_shot)", 50)
    assert (row["verdict"], row["source"]) == ("supported", "03_differences.csv")
    table.drop(columns="level").to_csv(tmp_path / "03_differences.csv", index=False)
    refused(r"03_differences\.csv has no column level: run notebook 03 again", lambda: judge(evidence(tmp_path)))


def test_mean_interval_agrees_with_scipy_and_so_does_the_medians() -> None:
    values = np.random.default_rng(0).exponential(size=401)
    median = bootstrap_statistic(lambda rows: float(np.median(values[rows])), len(values), samples=2000)
    for ours, statistic, margin in ((bootstrap_mean(values, samples=4000), np.mean, 0.01), (median, np.median, 0.05)):
        theirs = scipy.stats.bootstrap((values,), statistic, n_resamples=4000, method="percentile", rng=1)
        assert ours.value == pytest.approx(statistic(values))
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=margin)


def test_mean_interval_covers_the_truth_in_about_95_of_100_cases() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_mean(rng.random(200) < 0.3, seed=case, samples=300) for case in range(300)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.91 <= covered <= 0.98


def test_identical_seeds_tell_no_more_than_one_and_seeds_that_differ_widen_the_interval() -> None:
    values = np.random.default_rng(2).random(500)
    tables = values, np.stack([values] * 3), np.stack([values - 0.2, values, values + 0.2])
    one, same, apart = (bootstrap_mean(table, samples=3000) for table in tables)
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.1)
    assert apart.high - apart.low > 3 * (one.high - one.low)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    pd.DataFrame(rows_of("C1", (20.0, 18.0, 22.0))).to_csv(tmp_path / "01_differences.csv", index=False)
    return tmp_path


def test_a_guess_is_kept_revealed_and_scored(figures: Path) -> None:
    write_json(figures / ledger.FILE, {"C1": {"guess": 23, "plus_minus": 10}, "C2": {"guess": 1, "plus_minus": 1}})
    line = ledger.reveal(figures, "C1")
    assert line == "C1: guess 23 ± 10, measured 20.0 [18.0, 22.0] (within); the paper: 50.8 points (ImageNet-1k)"
    assert ledger.reveal(figures, "C5").startswith("C5: no guess, not measured; the paper: mask AP")
    table = ledger.scores(figures).set_index("claim")
    assert table["hit"].tolist() == ["yes", "", "", "", ""] and table["verdict"]["C1"] == "supported"
    draws = np.random.default_rng(0).normal(23, 10 / 1.96, (2, 200_000))  # the score by its definition
    assert table["off"]["C1"] == pytest.approx(abs(draws - 20).mean() - abs(draws[0] - draws[1]).mean() / 2, abs=0.05)


def test_without_guesses_nothing_is_scored_and_a_bad_file_is_named(figures: Path) -> None:
    assert ledger.read_guesses(figures) == {} and ledger.scores(figures)["off"].isna().all()
    bad = {'{"C1": {"guess": "many", "plus_minus": 1}}': "C1 guess input should be a valid number", "{": "invalid json"}
    for text, says in bad.items():
        (figures / ledger.FILE).write_text(text)
        refused(rf"guesses\.json: {says}", ledger.read_guesses, figures)


def test_the_form_writes_where_there_is_a_reader_and_shows_a_table_elsewhere(
    figures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert ledger.form(figures)["guess"].isna().all()
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    box = ledger.form(figures)
    box.children[1].children[0].value = 12.0
    box.children[-2].click()
    assert ledger.read_guesses(figures)["C1"] == ledger.Guess(guess=12, plus_minus=20)
    assert ledger.form(figures).children[1].children[0].value == 12
