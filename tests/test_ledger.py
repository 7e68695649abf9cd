"""The prediction ledger: guesses are kept, revealed and scored, with and without widgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from samantics.errors import StudyError
from samantics.metrics import ledger
from samantics.metrics.claims import evidence_row
from samantics.metrics.intervals import Difference


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    rows = [
        evidence_row("C1", "check", "clip", "", "artist", "zero_shot", 50.0, 40),
        evidence_row("C1", "comparison", "clip", "sam2", "artist", "linear", Difference(20.0, 18.0, 22.0, 0.001), 5),
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "01_differences.csv", index=False)
    return tmp_path


def test_a_guess_is_kept_revealed_and_scored(figures: Path) -> None:
    ledger.write_guesses(figures, {"C1": {"guess": 23, "plus_minus": 10}, "C2": {"guess": 1, "plus_minus": 1}})
    line = ledger.reveal(figures, "C1")
    assert line == "C1: guess 23 ± 10, measured 20.0 [18.0, 22.0] (within); the paper: 50.8 points (ImageNet-1k)"
    assert ledger.reveal(figures, "C5").startswith("C5: no guess, not measured; the paper: mask AP")
    table = ledger.scores(figures).set_index("claim")
    assert table["hit"].tolist() == ["yes", "", "", "", ""] and table["verdict"]["C1"] == "supported"
    draws = np.random.default_rng(0).normal(23, 10 / 1.96, (2, 200_000))  # the score by its definition
    assert table["off"]["C1"] == pytest.approx(abs(draws - 20).mean() - abs(draws[0] - draws[1]).mean() / 2, abs=0.05)


def test_without_guesses_nothing_is_scored(figures: Path) -> None:
    assert ledger.read_guesses(figures) == {} and ledger.scores(figures)["off"].isna().all()


def test_a_bad_file_is_named(figures: Path) -> None:
    (figures / ledger.FILE).write_text('{"C1": {"guess": "many", "plus_minus": 1}}')
    with pytest.raises(StudyError, match=r"guesses\.json: C1 guess input should be a valid number"):
        ledger.read_guesses(figures)


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
